"""Gradients for Optuna: tune continuous hyperparameters by their hypergradients, one or millions."""

from ._errors import (
    CorruptTensorError,
    HypergradError,
    HyperparameterError,
    MissingTensorError,
    ObjectiveError,
    ProblemError,
    RequirementError,
    SolverError,
    StorageError,
    ZeroHypergradientError,
)
from ._results import Result, Status
from .hypergradients import HypergradientEstimate, Implicit, Unroll, hypergradient
from .ihvp import CG, Direct, Identity, Neumann, linear_solve
from .inner import LBFGS, Adam, GradientDescent, HeavyBall, inner_solve
from .operators import GaussNewton, Hessian
from .outer import BilevelResult, minimize_bilevel
from .problem import BilevelProblem
from .search_space import Domain
from .solve import solve

__version__ = "0.1.0.dev0"

__all__ = [
    "CG",
    "LBFGS",
    "Adam",
    "BilevelProblem",
    "BilevelResult",
    "CorruptTensorError",
    "Direct",
    "Domain",
    "GaussNewton",
    "GradientDescent",
    "HeavyBall",
    "Hessian",
    "HypergradError",
    "HypergradientEstimate",
    "HyperparameterError",
    "Identity",
    "Implicit",
    "MissingTensorError",
    "Neumann",
    "ObjectiveError",
    "ProblemError",
    "RequirementError",
    "Result",
    "SolverError",
    "Status",
    "StorageError",
    "Unroll",
    "ZeroHypergradientError",
    "hypergradient",
    "inner_solve",
    "linear_solve",
    "minimize_bilevel",
    "solve",
]
