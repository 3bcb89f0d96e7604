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
from .delta_stn import DeltaSTN
from .forward_gradient import ForwardGradient
from .forward_mode import ForwardMode
from .hypernetwork import Hypernetwork
from .implicit import Implicit
from .reversible import Reversible
from .two_phase import Stalled, TwoPhase
from .unroll import Unroll
from .zeroth_order import ZerothOrder

REGISTRY = registry(AbstractHypergradientEstimator, globals())  # type: ignore[type-abstract]

__all__ = [
    "REGISTRY",
    "AbstractDirectionalEstimator",
    "AbstractHypergradientEstimator",
    "AbstractPullbackEstimator",
    "Auto",
    "Choice",
    "DeltaSTN",
    "EstimatorState",
    "ForwardGradient",
    "ForwardMode",
    "HypergradientEstimate",
    "Hypernetwork",
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
