"""One hyperparameter: an interval that holds a minimum, and where in it a cubic puts that.

What is known of the line is kept among the numbers of the rule's state. One end of the interval is the best evaluation so
far, ``kept`` by the rule; the other one is at ``end_at``. The cubic goes through ``kept`` and the last evaluation that was not,
which need not be that end. In an interval the rule's radius limits no step: a step that fails must have it forgotten.

After Moré & Thuente 1994, "Line search algorithms with guaranteed sufficient decrease".
"""

from __future__ import annotations

import math
from typing import NamedTuple

_OTHER = ("other_at", "other_value", "other_slope")
_END = "end_at"
_ROUNDING = 3 * 2.3e-16


class OnLine(NamedTuple):
    """An evaluation."""

    at: float
    value: float
    slope: float


def take_in(n: dict[str, float], kept: OnLine, new: OnLine) -> None:
    """Learn from ``new``, which is kept from now on unless its value is higher.

    The better of the two is one end of the interval: the other one is its other end, if it is higher or if the
    slope at ``new`` points back.
    """
    worse = new.value > kept.value
    other = new if worse else kept
    n |= dict(zip(_OTHER, other, strict=True))
    if worse or new.slope * (new.at - kept.at) >= 0:
        n[_END] = other.at


def step_from(n: dict[str, float], kept: OnLine, by_slopes: float) -> float:
    """The step from ``kept``, for which the slopes alone propose ``by_slopes``: that, where no interval is known.

    In an interval it is the cubic's through the last two evaluations, or the one by slopes, or to the middle: the
    first of them that stays inside.
    """
    if _END not in n:
        return by_slopes
    end = n[_END] - kept.at
    if not end * kept.slope < 0:
        return by_slopes
    found = _to_least(kept, OnLine(*(n[key] for key in _OTHER)))
    for step in (found, by_slopes):
        if step is not None and 0 < step / end < 1:
            return step
    return 0.5 * end


def forget(n: dict[str, float]) -> None:
    for key in (*_OTHER, _END):
        n.pop(key, None)


def _to_least(kept: OnLine, other: OnLine) -> float | None:
    """From ``kept`` to the minimum of the cubic through both (Nocedal & Wright 2006, equation 3.59).

    ``None`` where it has none downhill, or where rounding of the values would decide where it is.
    """
    apart, rise = other.at - kept.at, other.value - kept.value
    if not _ROUNDING * (abs(kept.value) + abs(other.value)) < 1e-3 * abs(apart * kept.slope):
        return None
    # In t = (x - kept) / apart the cubic is a t^3 + b t^2 + c t; it bends up where its slope grows.
    c, last = kept.slope * apart, other.slope * apart
    a, b = c + last - 2 * rise, 3 * rise - 2 * c - last
    inside = b * b - 3 * a * c
    if not inside > 0:
        return None
    root = math.sqrt(inside)
    t = -c / (b + root) if b > 0 else (root - b) / (3 * a) if a else 0.0
    return t * apart if t * c < 0 else None
