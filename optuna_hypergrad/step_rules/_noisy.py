"""Steps for noisy losses: Adam with decaying lengths, started from what was seen so far."""

from __future__ import annotations

import math

from ._box import Vector, floored, larger
from ._work import Work

_BETA1, _BETA2 = 0.7, 0.99
_DECAY_STEPS = 10.0
_GAIN = 1e-3
"""Of the average value, relative to all progress, that patience starts anew for."""


def start_averaging(work: Work, reach: float, error: float) -> None:
    """Replace the model by averages of the gradient and its square.

    State from here on: ``point`` (of the best value), ``gradient`` (average), ``size`` (root of the
    average square), ``length`` (first step), ``averaged`` (steps), ``smooth`` (average value),
    ``noise`` (average distance of values from it).
    """
    assert work.slope is not None
    n, t = work.numbers, work.tensors
    n["noise"] = error
    if _far_worse(work, n["value"]):
        work.point = t["point"]
    t["gradient"] = 0.5 * (t["gradient"] + work.slope)
    t["size"] = larger(t["size"], abs(work.slope))
    for key in ("steps", "changes"):
        t.pop(key, None)
    n["length"] = min(max(1.5 * reach, 0.02), 0.7)
    n["averaged"] = 0
    n["smooth"] = n["best_smooth"] = 0.5 * (n["value"] + work.value)
    n["since_best"] = 0


def take_in_noisy(work: Work, patience: int) -> None:
    """Average in the evaluation; go back to the best point when it is not finite or far worse."""
    n, t = work.numbers, work.tensors
    n["since_best"] += 1
    if work.slope is None or _far_worse(work, n["smooth"]):
        n["length"] *= 0.5
        work.point = t["point"]
    else:
        n["averaged"] += 1
        t["gradient"] = _BETA1 * t["gradient"] + (1 - _BETA1) * work.slope
        t["size"] = (_BETA2 * t["size"] ** 2 + (1 - _BETA2) * work.slope**2) ** 0.5
        n["noise"] += 0.2 * (abs(work.value - n["smooth"]) - n["noise"])
        n["smooth"] += 0.2 * (work.value - n["smooth"])
        if work.value < n["best"]:
            n["best"] = work.value
            t["point"] = work.point
        if n["smooth"] < n["best_smooth"] - _GAIN * max(work.progress(), 0.0):
            n["best_smooth"], n["since_best"] = n["smooth"], 0
    if n["since_best"] >= patience:
        work.stop = f"Noisy values did not become better on average in {patience} evaluations."
    elif n["length"] < 1e-6:
        work.stop = "Steps were shortened until nothing was left of them."


def averaged_step(work: Work) -> Vector:
    """The next point."""
    n, t = work.numbers, work.tensors
    length = n["length"] / math.sqrt(1.0 + n["averaged"] / _DECAY_STEPS)
    return work.point - length * t["gradient"] / floored(t["size"])


def _far_worse(work: Work, usual: float) -> bool:
    """Whether the value is out of reach of the noise, and lost more than was won so far."""
    n = work.numbers
    return work.value - max(usual, n["first"]) > 5.0 * n["noise"] + work.progress()
