"""A momentum descent that goes forth without keeping anything, and back with one step's graph at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import _tree
from .._errors import HyperparameterError, RequirementError
from .._twice import check_differentiable_twice
from .._typing import Params
from ..inner import HeavyBall
from ..inner._base import InnerState, gradient_of, objective_at
from ..inner._settings import Setting, Value, resolve, times
from ..problem import BilevelProblem
from ._estimate import Cotangents
from ._fixed_doubles import DENOMINATOR
from ._fixed_point import FixedPoint, NotReversedError, OutOfRangeError, Rational
from ._rewind import Cotangent, Point, Tape, pull_through


class Descent:
    """The steps of one inner solve (:meth:`take`), and the way back through them (:meth:`pull`).

    Attributes:
        failed: The descent ended in numbers that do not fit.
        too_large: The one that did not fit, if it was finite; else 0.
        num_recomputed: Steps taken once more, for a second way back.
        bytes_aside: Of information buffers that were full.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        solver: HeavyBall,
        inner_params: Params,
        velocity: Params,
        outer_params: Params,
        fraction_bits: int,
        start: int,
    ) -> None:
        self._problem, self._solver, self._like = problem, solver, inner_params
        self._lam = _tree.leaves(outer_params)
        self._exact = FixedPoint(inner_params, velocity, fraction_bits)
        self._start = self._end = self._at = start
        self.failed = self._looked = False
        self.too_large = 0.0
        self.num_recomputed = self.bytes_aside = 0
        self._constant: Rational | None = None
        if isinstance(solver.momentum, (int, float)):
            self._constant = rational(solver, outer_params, start, inner_params)
        self._bare = replace(
            solver, weight_decay=0.0, max_norm=None, momentum=_rounded(solver.momentum)
        )

    @property
    def levels(self) -> float:
        return self._exact.levels()

    @property
    def num_steps(self) -> int:
        return self._end - self._start

    def memory(self) -> InnerState:
        """The solver's, where the descent is now."""
        velocity = self._exact.velocity()
        if self.failed:
            velocity = _tree.tree_map(lambda v: torch.full_like(v, torch.nan), velocity)
        return {"velocity": velocity}

    def take(
        self, inner_params: Params, state: InnerState, index: int
    ) -> tuple[Params, InnerState, Tensor, Params]:
        """A step of the first pass, from where the last one ended. NaN from where the numbers do not fit.

        The solver's memory is left out: :meth:`memory` has it.
        """
        if not self.failed:
            try:
                return self._forth(index)
            except OutOfRangeError as error:
                self.failed = True
                self.too_large = error.value if math.isfinite(error.value) else 0.0
        nan = _tree.tree_map(lambda v: torch.full_like(v, torch.nan), inner_params)
        return nan, {}, torch.tensor(torch.nan, device="cpu"), nan

    def pull(self, cotangent: Params, to_start: bool) -> tuple[Cotangents, Cotangents]:
        """Cotangents of the outer parameters and of ``w_0`` (not without ``to_start``), from one of the last ``w``.

        Raises:
            RequirementError: if the way back does not lead to the start.
        """
        at = Cotangent(
            [*cotangent.values(), *[None] * len(cotangent)],
            [None] * len(self._lam),
        )
        try:
            if self._at != self._end:  # not the first way back
                self._exact.restart()
                self._at = self._start
                for index in range(self._start, self._end):
                    self._forth(index)
                self.num_recomputed += self.num_steps
            self.bytes_aside = self._exact.num_bytes_aside()
            for index in range(self._end - 1, self._start - 1, -1):
                self._back(index, at, to_start or index > self._start)
            self._exact.check_start()
        except (NotReversedError, OutOfRangeError):
            raise RequirementError(
                f"Reversible went back over {self.num_steps} inner steps and did not arrive, bit for bit, where it had "
                f"started: the gradient of inner_objective was not the same when it was taken again. Look for dropout "
                f"or other random numbers (draw them from a generator that is seeded by the batch), an inner_batch "
                f"that gives other data for the same step, tensors that were written to in between, and operations "
                f"that are not deterministic (torch.use_deterministic_algorithms(True) names them). Or use "
                f"Unroll(recompute='never'), which keeps the steps instead of undoing them."
            ) from None
        return dict(zip(self._lam, at.outer, strict=True)), dict(
            zip(self._like, at.point, strict=False)
        )

    def _forth(self, index: int) -> tuple[Params, InnerState, Tensor, Params]:
        _, value, gradient, direction = self._evaluate(index)
        self._at = -1  # in the middle of a step
        self._exact.push(_tree.detach(direction), self._momentum(index), index)
        self._exact.move(self._length(index))
        self._at = index + 1
        self._end = max(self._end, self._at)
        return self._exact.inner_params(), {}, value.detach(), _tree.detach(gradient)

    def _back(self, index: int, at: Cotangent, to_start: bool) -> None:
        """Undo a step, and pull ``at`` through it (see :func:`pull_through`): the one evaluation serves both."""
        self._at = -1
        self._exact.unmove(self._length(index))
        w, value, _, direction = self._evaluate(index)
        self._exact.unpush(_tree.detach(direction), self._momentum(index), index)
        if self._has_plain_settings(direction):
            self._pull_plain(w, direction, at, to_start)
            self._at = index
            return
        v = {"velocity": _tree.leaves(self._exact.velocity())}
        with torch.enable_grad():
            w_after, v_after, _, _ = self._bare.step(
                lambda _: (value, direction), w, self._lam, v, index
            )
        tape = Tape(Point(w, v), Point(w_after, v_after))
        pull_through(tape, self._lam, at, keep=False, to_start=to_start)
        self._at = index

    def _has_plain_settings(self, direction: Params) -> bool:
        settings = self._solver.step_size, self._solver.momentum
        return all(isinstance(s, (int, float)) for s in settings) and all(
            d.dtype == self._like[k].dtype for k, d in direction.items()
        )

    def _pull_plain(self, w: Params, direction: Params, at: Cotangent, to_start: bool) -> None:
        """Pull ``at`` through a step whose step size and momentum are numbers: only ``direction`` needs a graph."""
        eta, mu = self._solver.step_size, self._solver.momentum
        assert isinstance(eta, (int, float))
        assert isinstance(mu, (int, float))
        of_w = [
            torch.zeros_like(u) if c is None else c.to(u.dtype)
            for u, c in zip(self._like.values(), at.point, strict=False)
        ]
        of_v = [  # of the velocity after the step, by what it is for the next one and for w
            c * -eta if b is None else b.add_(c, alpha=-eta)
            for c, b in zip(of_w, at.point[len(w) :], strict=True)
        ]
        through = Cotangent([*of_v], at.outer)
        if any(d.requires_grad for d in direction.values()):
            tape = Tape(Point(w, {}), Point(direction, {}))
            pull_through(tape, self._lam, through, keep=False, to_start=to_start)
            more = through.point
            of_w = [c if b is None else c + b for c, b in zip(of_w, more, strict=True)]
        mu = round(mu * DENOMINATOR) / DENOMINATOR
        at.point[:] = [*of_w, *(b.mul_(mu) for b in of_v)]
        if not to_start:
            at.point[:] = [None] * len(at.point)

    def _evaluate(self, index: int) -> tuple[Params, Tensor, Params, Params]:
        """``w``, ``g``, ``dg/dw`` and what is added to the velocity.

        Always with a graph: without one, torch takes the gradient of some operations (GELU, SiLU) by
        other formulas, and the last bits differ.
        """
        w = _tree.leaves(self._exact.inner_params())
        with torch.enable_grad():
            objective = objective_at(self._problem, self._lam, index)
            value, gradient = gradient_of(objective, w, create_graph=True)
            if not self._looked:
                check_differentiable_twice(value, gradient.values())
                self._looked = True
            direction = self._solver.regularized(gradient, w, self._lam, index)
        return w, value, gradient, direction

    def _length(self, index: int) -> Params | float:
        """What is subtracted from ``w``; a number if it is that times the velocity."""
        eta = self._solver.setting("step_size", _tree.detach(self._lam), index)
        if isinstance(eta, (int, float)):
            return float(eta)
        return times(self._exact.velocity(), eta)

    def _momentum(self, index: int) -> Rational:
        return self._constant or rational(self._solver, self._lam, index, self._like)


def rational(solver: HeavyBall, outer_params: Params, index: int, inner_params: Params) -> Rational:
    """The momentum of a step as fractions.

    Raises:
        HyperparameterError: naming it, if it is not between 0 and 1.
        RequirementError: if it is a dict, and not one of factors for the inner parameters.
    """
    value = solver.setting("momentum", _tree.detach(outer_params), index)
    if isinstance(value, dict):
        ones = {k: torch.ones_like(v, dtype=torch.float64) for k, v in inner_params.items()}
        each = times(ones, value)
    else:
        each = dict.fromkeys(
            inner_params, torch.as_tensor(value, dtype=torch.float64, device="cpu")
        )
    label = repr(solver.momentum) if isinstance(solver.momentum, str) else "momentum"
    numerators: dict[str, int | Tensor] = {}
    ends: dict[str, tuple[int, int]] = {}
    for k, v in each.items():
        n = (v.double() * DENOMINATOR).round_().to(torch.int64).reshape(-1)
        ends[k] = int(n.min()), int(n.max())
        if not (ends[k][0] >= 1 and float(v.max()) < 1):
            raise HyperparameterError(
                f"{label} is {_span(v)} at inner step {index}, and Reversible can undo a step only with a momentum "
                f"above 2^-17 and below 1. Give it such bounds, or use Unroll."
            )
        numerators[k] = ends[k][0] if n.numel() == 1 else n.to(inner_params[k].device)
    return Rational(
        numerators, {k: low for k, (low, _) in ends.items()}, max(h for _, h in ends.values())
    )


def _span(v: Tensor) -> str:
    low, high = float(v.min()), float(v.max())
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def _rounded(setting: Setting) -> Callable[[Params, int], Tensor | Params]:
    """The setting at the value that the integers are multiplied by, with the derivative of the given one."""

    def nearest(value: Tensor) -> Tensor:
        known = value.detach()
        return value + ((known * DENOMINATOR).round() / DENOMINATOR - known)

    def schedule(outer_params: Params, index: int) -> Tensor | Params:
        value: Value = resolve(setting, outer_params, index, "momentum")
        if isinstance(value, dict):
            return {
                k: nearest(torch.as_tensor(v, dtype=torch.float64, device="cpu"))
                for k, v in value.items()
            }
        return nearest(torch.as_tensor(value, dtype=torch.float64, device="cpu"))

    return schedule
