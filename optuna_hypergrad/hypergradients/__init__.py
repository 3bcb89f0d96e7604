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
from .forward_mode import ForwardMode
from .implicit import Implicit
from .unroll import Unroll

REGISTRY = registry(AbstractHypergradientEstimator, globals())  # type: ignore[type-abstract]

__all__ = [
    "REGISTRY",
    "AbstractHypergradientEstimator",
    "AbstractPullbackEstimator",
    "EstimatorState",
    "ForwardMode",
    "HypergradientEstimate",
    "Implicit",
    "Pulled",
    "Solved",
    "Unroll",
    "hypergradient",
    "run_inner",
]
