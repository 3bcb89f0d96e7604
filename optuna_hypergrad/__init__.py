"""Gradients for Optuna: tune continuous hyperparameters by their hypergradients, one or millions."""

from typing import TYPE_CHECKING

from . import closed_form
from ._errors import (
    ConnectionLostError,
    CorruptTensorError,
    HypergradError,
    HyperparameterError,
    MissingTensorError,
    NoSpaceError,
    ObjectiveError,
    ProblemError,
    RequirementError,
    SolverError,
    StorageError,
    TakenOverError,
    ZeroHypergradientError,
)
from ._results import Result, Status
from ._typing import Batch, Objective, Params
from .check import check_hypergradient
from .check_report import HypergradientReport
from .evaluate import evaluate
from .hypergradients import (
    Auto,
    ForwardGradient,
    ForwardMode,
    HypergradientEstimate,
    Implicit,
    Reversible,
    Stalled,
    TwoPhase,
    Unroll,
    ZerothOrder,
    hypergradient,
)
from .ihvp import CG, Direct, Identity, Neumann, linear_solve
from .inner import LBFGS, Adam, AdamW, BlackBox, GradientDescent, HeavyBall, NewtonCG, inner_solve
from .operators import GaussNewton, Hessian
from .outer import BilevelResult, minimize_bilevel
from .problem import BilevelProblem
from .search_space import Domain
from .solve import solve
from .stores import Retention, TensorStore
from .studies import (
    AtomicJournalFileBackend,
    DifferentiableTrial,
    HypergradientSampler,
    RetryingStorage,
    differentiable,
    load_tensors,
    report_hypergradient,
)

if TYPE_CHECKING:
    from .sklearn_adapters import HypergradientSearchCV as HypergradientSearchCV

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> object:
    """scikit-learn's side, imported where it is used: it takes a second."""
    if name == "HypergradientSearchCV":
        from .sklearn_adapters import HypergradientSearchCV

        return HypergradientSearchCV
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CG",
    "LBFGS",
    "Adam",
    "AdamW",
    "AtomicJournalFileBackend",
    "Auto",
    "Batch",
    "BilevelProblem",
    "BilevelResult",
    "BlackBox",
    "ConnectionLostError",
    "CorruptTensorError",
    "DifferentiableTrial",
    "Direct",
    "Domain",
    "ForwardGradient",
    "ForwardMode",
    "GaussNewton",
    "GradientDescent",
    "HeavyBall",
    "Hessian",
    "HypergradError",
    "HypergradientEstimate",
    "HypergradientReport",
    "HypergradientSampler",
    "HyperparameterError",
    "Identity",
    "Implicit",
    "MissingTensorError",
    "Neumann",
    "NewtonCG",
    "NoSpaceError",
    "Objective",
    "ObjectiveError",
    "Params",
    "ProblemError",
    "RequirementError",
    "Result",
    "Retention",
    "RetryingStorage",
    "Reversible",
    "SolverError",
    "Stalled",
    "Status",
    "StorageError",
    "TakenOverError",
    "TensorStore",
    "TwoPhase",
    "Unroll",
    "ZeroHypergradientError",
    "ZerothOrder",
    "check_hypergradient",
    "closed_form",
    "differentiable",
    "evaluate",
    "hypergradient",
    "inner_solve",
    "linear_solve",
    "load_tensors",
    "minimize_bilevel",
    "report_hypergradient",
    "solve",
]
