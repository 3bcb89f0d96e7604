"""Where a continuous hyperparameter may move, and the coordinates in which it is moved.

External values are what the user sees; internal coordinates are what an outer step moves:
``log(x)`` where ``log=True``, ``x / unit`` otherwise. One internal unit is one natural step
(a factor of e, or a tenth of a bounded range).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._errors import HyperparameterError


@dataclass(frozen=True)
class Domain:
    """Bounds and scale of one hyperparameter (a number or a tensor of them).

    Args:
        low: Lower bound, included. ``-inf`` for none.
        high: Upper bound, included. ``inf`` for none.
        log: Move in the logarithm. Needs finite, positive bounds.
        unit: Length of one natural step for ``log=False``; ``None`` for a tenth of a bounded range, else 1.
    """

    low: float = -math.inf
    high: float = math.inf
    log: bool = False
    unit: float | None = None

    @property
    def scale(self) -> float:
        """External length of one internal unit (``log=False`` only)."""
        if self.unit is not None:
            return self.unit
        tenth = (self.high - self.low) / 10.0
        return tenth if 0.0 < tenth < math.inf else 1.0

    def check(self, name: str) -> None:
        """Refuse bounds that cannot be used.

        Raises:
            HyperparameterError: naming the hyperparameter and the remedy.
        """
        for label, bound in (("low", self.low), ("high", self.high)):
            if isinstance(bound, bool) or not isinstance(bound, (int, float)):
                raise HyperparameterError(
                    f"Hyperparameter {name!r}: {label}={bound!r} is not a number; give a float."
                )
        if math.isnan(self.low) or math.isnan(self.high):
            raise HyperparameterError(
                f"Hyperparameter {name!r}: a bound is NaN (low={self.low}, high={self.high}); give numbers."
            )
        if self.low > self.high:
            raise HyperparameterError(
                f"Hyperparameter {name!r}: low={self.low} is above high={self.high}; swap them."
            )
        if self.log and not (self.low > 0.0 and math.isfinite(self.high)):
            raise HyperparameterError(
                f"Hyperparameter {name!r}: log=True needs 0 < low and a finite high, "
                f"but low={self.low}, high={self.high}; raise low above 0, or use log=False."
            )
        if self.unit is not None and not (self.unit > 0 and math.isfinite(self.unit)):
            raise HyperparameterError(
                f"Hyperparameter {name!r}: unit={self.unit} is not a positive finite number."
            )

    def check_dtype(self, name: str, like: Tensor) -> None:
        """Refuse bounds between which the dtype of ``like`` has no finite number.

        Raises:
            HyperparameterError: naming the hyperparameter and the remedy.
        """
        low, high = self.bounds_as(like)
        if not low <= high or low == math.inf or high == -math.inf:
            raise HyperparameterError(
                f"Hyperparameter {name!r}: no number of {like.dtype} lies between low={self.low} and "
                f"high={self.high}; widen the bounds, or use dtype=torch.float64."
            )

    def clamp(self, value: Tensor) -> Tensor:
        """Project an external value on the bounds, exactly, in its own dtype."""
        low, high = self.bounds_as(value)
        return value.clamp(low, high)

    def bounds_as(self, like: Tensor) -> tuple[float, float]:
        """The bounds rounded *inwards* to the dtype of ``like``, as Python floats."""
        return (_round_inwards(self.low, like.dtype, +1), _round_inwards(self.high, like.dtype, -1))

    def contains(self, value: Tensor) -> bool:
        """Whether every entry is finite and within the bounds."""
        low, high = self.bounds_as(value)
        return bool((torch.isfinite(value) & (value >= low) & (value <= high)).all())

    def to_internal(self, value: Tensor) -> Tensor:
        """External value -> internal coordinate, same shape and dtype."""
        if self.log:
            return value.log()
        if not self._scale_fits(value):
            return (value.double() / self.scale).to(value.dtype)
        return value / self.scale

    def to_external(self, internal: Tensor) -> Tensor:
        """Internal coordinate -> external value inside the bounds, same shape and dtype."""
        if self.log:
            external = internal.exp()
        elif not self._scale_fits(internal):
            external = (internal.double() * self.scale).to(internal.dtype)
        else:
            external = internal * self.scale
        return self.clamp(external)

    def _scale_fits(self, like: Tensor) -> bool:
        """Whether a number of the dtype of ``like`` can be the scale."""
        limits = torch.finfo(like.dtype)
        return limits.tiny <= self.scale <= limits.max

    def internal_bounds(self) -> tuple[float, float]:
        """Bounds of the internal coordinate (float64)."""
        if self.log:
            return math.log(self.low), math.log(self.high)
        return self.low / self.scale, self.high / self.scale

    def internal_gradient(self, gradient: Tensor, value: Tensor) -> Tensor:
        """Chain rule: d/d(internal) from d/d(external) at the external ``value``."""
        return gradient * value if self.log else gradient * self.scale

    def midpoint(self) -> float:
        """Middle of the range (geometric where ``log``); 0 where a bound is infinite."""
        if self.log:
            return min(max(math.sqrt(self.low) * math.sqrt(self.high), self.low), self.high)
        if math.isfinite(self.low) and math.isfinite(self.high):
            width = self.high - self.low
            middle = (
                self.low + 0.5 * width if width < math.inf else 0.5 * self.low + 0.5 * self.high
            )
            return min(max(middle, self.low), self.high)
        return min(max(0.0, self.low), self.high)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON (infinite bounds become ``None``)."""
        return {
            "low": self.low if math.isfinite(self.low) else None,
            "high": self.high if math.isfinite(self.high) else None,
            "log": self.log,
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Domain:
        low, high = data["low"], data["high"]
        return cls(
            low=-math.inf if low is None else float(low),
            high=math.inf if high is None else float(high),
            log=bool(data["log"]),
            unit=None if data["unit"] is None else float(data["unit"]),
        )


def _round_inwards(bound: float, dtype: torch.dtype, direction: int) -> float:
    """``bound`` as a value of ``dtype`` that is not outside of it. ``direction`` +1 is up."""
    if dtype == torch.float64:
        return float(bound)
    rounded = torch.tensor(bound, dtype=torch.float64, device="cpu").to(dtype)
    outside = rounded.double() < bound if direction > 0 else rounded.double() > bound
    if bool(outside) and math.isfinite(bound):
        rounded = torch.nextafter(
            rounded, torch.tensor(direction * math.inf, dtype=dtype, device="cpu")
        )
    return float(rounded)
