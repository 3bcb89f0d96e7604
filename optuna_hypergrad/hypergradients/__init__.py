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
from .fixed_point_implicit import FixedPointImplicit
from .forward_gradient import ForwardGradient
from .forward_mode import ForwardMode
from .implicit import Implicit
from .reversible import Reversible
from .sama import SAMA
from .t1t2 import T1T2
from .two_phase import Stalled, TwoPhase
from .unroll import Unroll
from .zeroth_order import ZerothOrder

REGISTRY = registry(AbstractHypergradientEstimator, globals())  # type: ignore[type-abstract]

__all__ = [
    "REGISTRY",
    "SAMA",
    "T1T2",
    "AbstractDirectionalEstimator",
    "AbstractHypergradientEstimator",
    "AbstractPullbackEstimator",
    "Auto",
    "Choice",
    "EstimatorState",
    "FixedPointImplicit",
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
