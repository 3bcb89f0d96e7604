"""The default outer rule: a quasi-Newton model, scaled by the gradient's sizes, trusted in a cube."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .._typing import Params
from . import _line
from ._abstract import AbstractStepRule, Bounds, Proposal, StepState
from ._box import Layout, Vector, floored, larger, largest, least, projected
from ._noisy import averaged_step, start_averaging, take_in_noisy
from ._quadratic import minimize_in_box, secant_model
from ._work import Work

_HISTORY_ENTRIES = 400_000


@dataclass(frozen=True)
class TrustRegion(AbstractStepRule):
    """Every evaluation is a step: limited-memory BFGS in a box, without line searches.

    The model's diagonal is proportional to a decaying maximum of every entry's gradient to the
    power ``power``: an entry whose gradient is tiny (a decay that has little effect where it is)
    moves about as far as the others. 1 makes the first step a sign step; 0 is plain BFGS. The
    model is minimized where the bounds meet a cube around the best point; the cube grows and
    shrinks with the quality of the model's predictions (Nocedal & Wright 2006, chapters 4 and 7).
    A step to a worse or non-finite value is taken back and shortened; a worse one's gradient still
    improves the model.

    Noise is recognized by gradients that do not explain the difference of two values: twice in a
    row, the trapezoidal rule along the step is off by more than ``noise``; for smooth losses its
    error is of third order. From then on steps are those of Adam (Kingma & Ba 2015) with decaying
    lengths, and worse values stand.

    A single hyperparameter has values to go by, too: once two evaluations have a minimum between
    them, the next is where a cubic through the last two puts it (Moré & Thuente 1994), and a kink
    between two slopes that a convex loss may have is not taken for noise.

    Args:
        power: Of the gradient's size in the diagonal.
        radius: Half the side of the first cube, in internal units.
        history: Secant pairs; fewer above 57,000 entries, one above 400,000.
        memory: Decay of the maximum of the gradient's size, per accepted step.
        noise: Error of the trapezoidal rule, relative to its terms, that makes an evaluation
            suspicious; ``inf`` takes every loss for smooth.
        patience: Evaluations without a better value that end the trajectory.
        gtol: Projected gradient, relative to the first one, that ends it.
        ftol: Predicted decrease, relative to the progress so far, that ends it when seen twice.
        min_radius: A smaller cube ends it.
        rtol: Where it is not 0, ``patience`` evaluations (of a noisy loss, too) without a value that is better by this share of
            its size end the trajectory as well.
    """

    name: ClassVar[str] = "trust_region"

    power: float = 0.9
    radius: float = 1.0
    history: int = 7
    memory: float = 0.5
    noise: float = 0.5
    patience: int = 30
    gtol: float = 1e-7
    ftol: float = 1e-9
    min_radius: float = 1e-6
    rtol: float = 0.0

    def init(self, point: Params, lower: Bounds, upper: Bounds) -> StepState:
        return StepState({}, {"radius": self.radius})

    def step(
        self,
        state: StepState,
        point: Params,
        value: float,
        gradient: Params,
        lower: Bounds,
        upper: Bounds,
    ) -> Proposal:
        work = Work.of(state, Layout(point, lower, upper), point, value, gradient)
        if "value" not in work.numbers and work.slope is None:
            reason = "The first evaluation had no finite value and gradient: start elsewhere."
            return Proposal(point, state, reason)
        with np.errstate(all="ignore"):  # what is not finite is seen where it matters
            return work.proposal(self._ahead(work))

    def _ahead(self, work: Work) -> Vector:
        """The next point."""
        if "value" not in work.numbers:
            work.begin()
            assert work.slope is not None
            work.tensors["size"] = abs(work.slope)
        elif "length" in work.numbers:
            take_in_noisy(work, self.patience)
        else:
            self._take_in(work)
        if "length" in work.numbers:
            ahead = averaged_step(work)
        else:
            ahead = self._model_step(work)
            self._judge(work)
        if self.rtol:
            self._wait(work)
        return ahead

    def _take_in(self, work: Work) -> None:
        """Keep the point or take the step back, and learn from it."""
        n, base = work.numbers, work.tensors
        step = work.point - base["point"]
        reach = largest(step)
        work.count()
        if work.slope is None:
            self._shorten(n, reach)
            return
        change = work.slope - base["gradient"]
        before, after = float(base["gradient"] @ step), float(work.slope @ step)
        gain = n["value"] - work.value
        error = abs(gain + 0.5 * (before + after))
        doubtful = error > self.noise * 0.5 * (abs(before) + abs(after))
        steep = largest(work.slope) > 10 * float(base["size"].max())
        if not math.isfinite(error) or (doubtful and steep and gain < 0):
            self._shorten(n, reach)  # it exploded: nothing to learn from
            return
        line = len(step) == 1
        doubtful &= not (line and before <= -gain <= after)  # as between a convex loss's tangents
        n["suspicious"] = n["suspicious"] + 1 if doubtful else 0
        if n["suspicious"] >= 2:
            if error <= 1e-5 * work.progress() + 1e-12 * abs(work.value):
                work.stop = f"Values change by no more than their own error, {error:.2g}."
            else:
                start_averaging(work, n.get("reach", reach), error)
                return
        self._learn(base, n, step, change)
        if line and doubtful:
            _line.forget(n)
        elif line:
            _line.take_in(
                n, _kept(work), _line.OnLine(float(work.point[0]), work.value, float(work.slope[0]))
            )
        if gain < 0:
            n["radius"] *= 0.4
            return
        quality = gain / max(n["predicted"], 1e-300)
        if quality > 0.75 and reach >= 0.9 * n["radius"]:
            n["radius"] = min(2.0 * n["radius"], 50.0)
        elif quality < 0.25:
            n["radius"] *= 0.5
        n["reach"] = reach
        base["size"] = larger(abs(work.slope), self.memory * base["size"])
        work.keep()

    def _shorten(self, n: dict[str, float], reach: float) -> None:
        """Take back a step to where there is nothing to learn from; the next one goes by slopes, and less far."""
        n["radius"] = 0.3 * min(reach, n["radius"])
        _line.forget(n)

    def _learn(
        self, base: dict[str, Vector], n: dict[str, float], step: Vector, change: Vector
    ) -> None:
        """Add a secant pair, unless the loss bends downwards along it."""
        large = isinstance(step, Tensor)
        bent, enough = float(step @ change), 1e-2 if large else 1e-8
        if not bent > enough * math.sqrt(float(step @ step)) * math.sqrt(float(change @ change)):
            return
        pairs = min(self.history, max(_HISTORY_ENTRIES // max(len(step), 1), 1))
        for key, row in (("steps", step), ("changes", change)):
            kept = [base[key][1 - pairs :]] if key in base and pairs > 1 else []
            rows = [*kept, row[None]]
            base[key] = torch.cat(rows) if large else np.concatenate(rows)

    def _model_step(self, work: Work) -> Vector:
        n, base = work.numbers, work.tensors
        radius, slope = n["radius"], base["gradient"]
        weight = floored(base["size"]) ** self.power
        steps, changes = base.get("steps", ()), base.get("changes", ())
        if len(steps):
            change = changes[-1]
            curvature = float(change @ (change / weight)) / float(steps[-1] @ change)
        else:  # the entry of the largest gradient would move by three radii
            curvature = largest(slope / weight) / (3.0 * max(radius, self.min_radius))
        if not math.isfinite(curvature):
            curvature = 1.0
        diagonal = (curvature * weight).clip(min=least(weight))
        product = secant_model(diagonal, steps, changes)
        low = (work.low - base["point"]).clip(min=-radius)
        high = (work.high - base["point"]).clip(max=radius)
        max_steps, rtol = (80, 1e-8) if not work.layout.large else (6, 1e-3)
        step, predicted = minimize_in_box(slope, product, diagonal, low, high, max_steps, rtol)
        if len(slope) == 1:
            by_slopes = float(step[0])
            length = _line.step_from(n, _kept(work), by_slopes)
            if length != by_slopes:
                step, predicted = 0 * step + length, -0.5 * float(slope[0]) * length
        n["predicted"] = predicted
        return base["point"] + step

    def _wait(self, work: Work) -> None:
        """Say that the trajectory is over if nothing has become better for long enough to see."""
        n = work.numbers
        marked = n.setdefault("marked", n["first"])
        n["idle"] = n.get("idle", -1) + 1
        if n["best"] < marked - self.rtol * abs(marked):
            n["marked"], n["idle"] = n["best"], 0
        if n["idle"] >= self.patience:
            work.stop = (
                f"No value was better by {self.rtol:g} of its size in {self.patience} evaluations."
            )

    def _judge(self, work: Work) -> None:
        """Say why the trajectory is over, if it is."""
        n, base = work.numbers, work.tensors
        size = largest(projected(base["gradient"], base["point"], work.low, work.high))
        first = n.setdefault("first_size", size)
        small = n["predicted"] <= self.ftol * work.progress()
        n["small"] = n.get("small", 0) + 1 if small else 0
        if size <= self.gtol * first:
            work.stop = f"The projected gradient is {size:.2g}, {self.gtol:g} of the first."
        elif n["small"] >= 2:
            work.stop = f"The model predicts a decrease of {n['predicted']:.2g}, too small to see."
        elif n["radius"] < self.min_radius:
            work.stop = f"Steps were taken back until they were below {self.min_radius:g}."
        elif n["since_best"] >= self.patience:
            work.stop = f"No better value in {self.patience} evaluations."


def _kept(work: Work) -> _line.OnLine:
    base = work.tensors
    return _line.OnLine(float(base["point"][0]), work.numbers["value"], float(base["gradient"][0]))
