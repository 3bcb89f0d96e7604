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
from .bias import InnerBias, inner_bias
from .check import check_hypergradient
from .check_report import HypergradientReport
from .curvature_probe import probe_curvature
from .curvature_report import CurvatureReport
from .episodes import Episodes
from .equilibrium import Anderson, Phantom, Picard
from .evaluate import evaluate
from .fixed_point import fixed_point
from .gauss_newton import Fisher, GaussNewton
from .hypergradients import (
    BOME,
    BROS,
    F2SA,
    MASOBA,
    PBGD,
    SABA,
    SAMA,
    SOBA,
    T1T2,
    Auto,
    DeltaSTN,
    FixedPointImplicit,
    ForwardGradient,
    ForwardMode,
    HypergradientEstimate,
    Hypernetwork,
    Implicit,
    PerTask,
    Reversible,
    Stalled,
    TwoPhase,
    Unroll,
    ZerothOrder,
    hypergradient,
)
from .ihvp import (
    CG,
    GMRES,
    KFAC,
    MINRES,
    DiagonalPreconditioner,
    Direct,
    GaussNewtonPreconditioner,
    Identity,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    linear_solve,
)
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
from .proximal import proximal
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
from .two_stage import FineTuning, two_stage

if TYPE_CHECKING:
    from . import visualization as visualization
    from .sklearn_adapters import FeatureWeights as FeatureWeights
    from .sklearn_adapters import HypergradientClassifier as HypergradientClassifier
    from .sklearn_adapters import HypergradientRegressor as HypergradientRegressor
    from .sklearn_adapters import HypergradientSearchCV as HypergradientSearchCV
    from .sklearn_adapters import TensorDistribution as TensorDistribution

__version__ = "0.1.0.dev0"


_OF_SCIKIT_LEARN = (
    "FeatureWeights",
    "HypergradientClassifier",
    "HypergradientRegressor",
    "HypergradientSearchCV",
    "TensorDistribution",
)


def __getattr__(name: str) -> object:
    """scikit-learn's side and figures, imported where they are used: it takes a second."""
    import importlib

    if name == "visualization":
        return importlib.import_module(".visualization", __name__)
    if name in _OF_SCIKIT_LEARN:
        return getattr(importlib.import_module(".sklearn_adapters", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BOME",
    "BROS",
    "CG",
    "F2SA",
    "GMRES",
    "KFAC",
    "LBFGS",
    "MASOBA",
    "MINRES",
    "PBGD",
    "SABA",
    "SAMA",
    "SOBA",
    "T1T2",
    "Adam",
    "AdamW",
    "Anderson",
    "AtomicJournalFileBackend",
    "Auto",
    "Batch",
    "BilevelProblem",
    "BilevelResult",
    "BlackBox",
    "ConnectionLostError",
    "CorruptTensorError",
    "CurvatureReport",
    "DeltaSTN",
    "DiagonalPreconditioner",
    "DifferentiableTrial",
    "Direct",
    "Domain",
    "Episodes",
    "FeatureWeights",
    "FineTuning",
    "Fisher",
    "FixedPointImplicit",
    "ForwardGradient",
    "ForwardMode",
    "GaussNewton",
    "GaussNewtonPreconditioner",
    "GradientDescent",
    "HeavyBall",
    "Hessian",
    "HypergradError",
    "HypergradientClassifier",
    "HypergradientEstimate",
    "HypergradientRegressor",
    "HypergradientReport",
    "HypergradientSampler",
    "HypergradientSearchCV",
    "Hypernetwork",
    "HyperparameterError",
    "Identity",
    "Implicit",
    "InnerBias",
    "Lookahead",
    "MissingTensorError",
    "Neumann",
    "NewtonCG",
    "NoSpaceError",
    "Nystrom",
    "NystromPreconditioner",
    "Objective",
    "ObjectiveError",
    "Params",
    "PerTask",
    "Phantom",
    "Picard",
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
    "TensorDistribution",
    "TensorStore",
    "TwoPhase",
    "Unroll",
    "ZeroHypergradientError",
    "ZerothOrder",
    "check_hypergradient",
    "closed_form",
    "differentiable",
    "evaluate",
    "fixed_point",
    "hypergradient",
    "inner_bias",
    "inner_solve",
    "linear_solve",
    "load_tensors",
    "minimize_bilevel",
    "probe_curvature",
    "proximal",
    "report_hypergradient",
    "solve",
    "two_stage",
    "visualization",
]
