"""Gradients for Optuna: tune continuous hyperparameters by their hypergradients, one or millions."""

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
from .curvature_probe import probe_curvature
from .curvature_report import CurvatureReport
from .evaluate import evaluate
from .gauss_newton import Fisher, GaussNewton
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
from .inner import (
    LBFGS,
    Adam,
    AdamW,
    BlackBox,
    GradientDescent,
    HeavyBall,
    Lookahead,
    NewtonCG,
    SketchySGD,
    inner_solve,
)
from .operators import Hessian
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

__version__ = "0.1.0.dev0"

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
    "CurvatureReport",
    "DifferentiableTrial",
    "Direct",
    "Domain",
    "Fisher",
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
    "Lookahead",
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
    "SketchySGD",
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
    "differentiable",
    "evaluate",
    "hypergradient",
    "inner_solve",
    "linear_solve",
    "load_tensors",
    "minimize_bilevel",
    "probe_curvature",
    "report_hypergradient",
    "solve",
]
