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
from .implicit import Implicit
from .reversible import Reversible
from .unroll import Unroll

REGISTRY = registry(AbstractHypergradientEstimator, globals())  # type: ignore[type-abstract]

__all__ = [
    "REGISTRY",
    "AbstractHypergradientEstimator",
    "AbstractPullbackEstimator",
    "EstimatorState",
    "HypergradientEstimate",
    "Implicit",
    "Pulled",
    "Reversible",
    "Solved",
    "Unroll",
    "hypergradient",
    "run_inner",
]
