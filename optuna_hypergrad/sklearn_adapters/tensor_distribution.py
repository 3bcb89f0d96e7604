"""The search space of a vector of hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np

from ..search_space import Domain

PER = ("per_feature", "per_class", "per_sample", "per_target", "per_group")


@dataclass(frozen=True)
class TensorDistribution:
    """Many hyperparameters of one kind, each between ``low`` and ``high``: a distribution for :class:`HypergradientSearchCV`.

    Args:
        shape: ``"per_feature"`` (of what comes out of the transformers before), ``"per_class"``, ``"per_sample"``,
            ``"per_target"``, ``"per_group"``; or the shape itself, such as ``(10,)``.
        low: Least value, included.
        high: Largest value, included.
        log: Move in the logarithm; ``low`` is positive then.
        groups: For ``"per_group"``: the group of each feature (or sample, where it is their weights that are searched), an
            integer or a label. All members of a group have the same value.

    Raises:
        ValueError: for anything else.
    """

    shape: tuple[int, ...] | str
    low: float
    high: float
    log: bool = field(default=True, kw_only=True)
    groups: Sequence[Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        given: Any = self.shape
        if isinstance(given, str):
            if given not in PER:
                raise ValueError(
                    f"TensorDistribution: shape={given!r} is none of {', '.join(PER)}, nor a tuple of numbers."
                )
        else:
            shape = (given,) if isinstance(given, Integral) else tuple(given)
            if len(shape) != 1 or not isinstance(shape[0], Integral) or shape[0] < 1:
                raise ValueError(
                    f"TensorDistribution: shape={given!r} is not the length of a vector, such as (10,)."
                )
            object.__setattr__(self, "shape", (int(shape[0]),))
        if (self.groups is not None) != (self.shape == "per_group"):
            raise ValueError(
                "TensorDistribution: groups= goes with shape='per_group', and gives the group of each feature."
            )
        if self.groups is not None:
            groups = tuple(np.asarray(self.groups).tolist())
            if not groups or any(isinstance(g, list) for g in groups):
                raise ValueError(
                    "TensorDistribution: groups is not a vector with one group per feature."
                )
            object.__setattr__(self, "groups", groups)
        self._check_bounds()

    def _check_bounds(self) -> None:
        low, high = self.low, self.high
        for name, bound in (("low", low), ("high", high)):
            if isinstance(bound, bool) or not isinstance(bound, (int, float, np.number)):
                raise ValueError(f"TensorDistribution: {name}={bound!r} is not a number.")
            object.__setattr__(self, name, float(bound))
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"TensorDistribution: low={low} and high={high} must be finite, low below high."
            )
        if self.log and low <= 0:
            raise ValueError(
                f"TensorDistribution: low={low} must be positive to move in the logarithm; raise it, or use log=False."
            )

    @property
    def domain(self) -> Domain:
        """Bounds of each entry."""
        return Domain(self.low, self.high, self.log)
