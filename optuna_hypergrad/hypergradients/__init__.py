"""Hypergradient estimators, one file per method."""

from .._registry import registry
from ._base import (
    AbstractHypergradientEstimator,
    AbstractPullbackEstimator,
    hypergradient,
    run_inner,
)
from ._directional import AbstractDirectionalEstimator, PartialEstimate
from ._estimate import EstimatorState, HypergradientEstimate, Pulled, Solved
from .auto import Auto, Choice
from .bome import BOME
from .bros import BROS
from .delta_stn import DeltaSTN
from .f2sa import F2SA
from .fixed_point_implicit import FixedPointImplicit
from .forward_gradient import ForwardGradient
from .forward_mode import ForwardMode
from .hypernetwork import Hypernetwork
from .implicit import Implicit
from .ma_soba import MASOBA
from .pbgd import PBGD
from .per_task import PerTask
from .reversible import Reversible
from .saba import SABA
from .sama import SAMA
from .soba import SOBA
from .t1t2 import T1T2
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
    "SAMA",
    "SOBA",
    "T1T2",
    "AbstractDirectionalEstimator",
    "AbstractHypergradientEstimator",
    "AbstractPullbackEstimator",
    "Auto",
    "Choice",
    "DeltaSTN",
    "EstimatorState",
    "FixedPointImplicit",
    "ForwardGradient",
    "ForwardMode",
    "HypergradientEstimate",
    "Hypernetwork",
    "Implicit",
    "PartialEstimate",
    "PerTask",
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
