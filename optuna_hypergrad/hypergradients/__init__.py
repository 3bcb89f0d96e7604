"""Hypergradient estimators, one file per method."""

from .._registry import registry
from ._base import (
    AbstractHypergradientEstimator,
    AbstractPullbackEstimator,
    EstimatorState,
    HypergradientEstimate,
    Pulled,
    Solved,
    hypergradient,
    run_inner,
)
from ._directional import AbstractDirectionalEstimator, PartialEstimate
from .auto import Auto, Choice
from .bome import BOME
from .bros import BROS
from .f2sa import F2SA
from .forward_gradient import ForwardGradient
from .forward_mode import ForwardMode
from .implicit import Implicit
from .ma_soba import MASOBA
from .pbgd import PBGD
from .reversible import Reversible
from .saba import SABA
from .soba import SOBA
from .two_phase import Stalled, TwoPhase
from .unroll import Unroll
from .zeroth_order import ZerothOrder

REGISTRY = registry(AbstractHypergradientEstimator, globals())  # type: ignore[type-abstract]

__all__ = [
    "BOME",
    "BROS",
    "F2SA",
    "MASOBA",
    "PBGD",
    "REGISTRY",
    "SABA",
    "SOBA",
    "AbstractDirectionalEstimator",
    "AbstractHypergradientEstimator",
    "AbstractPullbackEstimator",
    "Auto",
    "Choice",
    "EstimatorState",
    "ForwardGradient",
    "ForwardMode",
    "HypergradientEstimate",
    "Implicit",
    "PartialEstimate",
    "Pulled",
    "Reversible",
    "Solved",
    "Stalled",
    "TwoPhase",
    "Unroll",
    "ZerothOrder",
    "hypergradient",
    "run_inner",
]
