"""Inner steps whose gradients, and the products on the way back, are compiled functions.

Where there is room, a step hands the results of its matrix products over to its way back. Otherwise nothing is kept between
steps but states: a compiled product with the derivative of the gradient takes the forward pass again within itself, and
leaves out what it does not need of it, such as the gradient. It costs 1.7 gradient evaluations, where a tape and its way
back cost 2.5.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._errors import RequirementError
from .._typing import Batch, Objective, Params
from ..inner import AbstractStepSolver
from ..inner._base import InnerState
from ._estimate import Cotangents
from ._halves import can_be_cut, compiled_in_halves, graphs_kept, no_word_on_what_is_no_leaf
from ._memory import at_least, num_bytes
from ._rewind import Cotangent, Plan, Planner, Point, Rewinder, Tape, pull_through
from .compiled import check_compilable, compiled_whole, in_one_graph, paths_of

_CACHE_SIZE = 16

Moved = tuple[Params, InnerState, Tensor, Params]
"""``(w', state', g, dg/dw)``."""


def _gradient_of(
    inner_objective: Objective,
) -> Callable[[Params, Params, Batch], tuple[Tensor, Params]]:
    def gradient(w: Params, lam: Params, batch: Batch) -> tuple[Tensor, Params]:
        slope, value = torch.func.grad_and_value(inner_objective)(w, lam, batch)
        return value, slope

    return gradient


def _step_of(inner_objective: Objective, solver: AbstractStepSolver) -> Callable[..., Moved]:
    """``(w, state, lam, batch) -> Moved``: a step of a solver that does not depend on its index."""
    gradient = _gradient_of(inner_objective)

    def step(w: Params, state: InnerState, lam: Params, batch: Batch) -> Moved:
        return solver.step(lambda at: gradient(at, lam, batch), w, lam, state, 0)

    return step


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _gradients(inner_objective: Objective) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``(w, lam, batch) -> (g, dg/dw)`` and ``(w, lam, batch, v) -> (H v, M^T v)``, ``M = d2g/dw dlam``."""
    gradient = _gradient_of(inner_objective)

    def pull(w: Params, lam: Params, batch: Batch, v: Params) -> tuple[Params, Params]:
        _, pull = torch.func.vjp(lambda w, lam: gradient(w, lam, batch)[1], w, lam)  # type: ignore[misc]
        found: tuple[Params, Params] = pull(v)
        return found

    return compiled_whole(gradient), compiled_whole(pull)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _steps(
    inner_objective: Objective, solver: AbstractStepSolver
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A whole step of a solver that does not depend on its index, and its pullback, which adds to ``outer`` and
    gives the numbers in it anew."""
    step = _step_of(inner_objective, solver)

    def pull(
        w: Params,
        state: InnerState,
        lam: Params,
        batch: Batch,
        after: tuple[Params, InnerState],
        outer: Params,
    ) -> tuple[Params, InnerState, Params]:
        _, pull = torch.func.vjp(  # type: ignore[misc]
            lambda w, state, lam: step(w, state, lam, batch)[:2], w, state, lam
        )
        before, memory, part = pull(after)
        sums = {}
        for k, v in part.items():
            # torch 2.13 loses what compiled code writes to a 0-d float64 argument.
            sums[k] = outer[k].add_(v) if v.dim() > 0 else outer[k] + v
        return before, memory, {k: v for k, v in sums.items() if v.dim() == 0}

    return compiled_whole(step), compiled_whole(pull)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _gradient_in_halves(inner_objective: Objective) -> Callable[..., Any]:
    """``(w, lam, batch) -> (g, dg/dw)``, with a graph."""
    return compiled_in_halves(_gradient_of(inner_objective))


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _step_in_halves(inner_objective: Objective, solver: AbstractStepSolver) -> Callable[..., Any]:
    """The same step with a graph, behind ``w'`` and ``state'`` only."""
    step = _step_of(inner_objective, solver)

    def run(w: Params, state: InnerState, lam: Params, batch: Batch) -> Moved:
        w, state, value, slope = step(w, state, lam, batch)
        return w, state, value.detach(), _tree.detach(slope)

    return compiled_in_halves(run)


def all_states(num_steps: int, tape: int, state: int) -> Plan:
    """The state before every step: none is taken twice."""
    return Plan(1)


def states_within(budget: float) -> Planner:
    """The plan with the fewest steps taken twice that needs at most ``budget`` bytes: a state before every ``k``-th step, and
    those of ``k`` steps at once; a tree where that is too much.

    The plan raises :class:`RequirementError` if there is none.
    """

    def choose(num_steps: int, tape: int, state: int) -> Plan:
        plans = []
        for stride in range(1, math.isqrt(num_steps) + 2):
            kept = math.ceil(num_steps / stride) + (stride if stride > 1 else 0)
            plans.append((kept * state, Plan(stride)))
        for levels in range(2, 12):
            slots = max(2, math.ceil(num_steps ** (1 / levels)))
            plans.append(((levels * slots + 1) * state, Plan(1, slots)))
        for needed, plan in plans:
            if needed <= budget:
                return plan
        raise RequirementError(
            f"Unroll(memory_budget={budget:.3g}) bytes cannot hold {num_steps} steps of which one state takes "
            f"{state / 1e6:.3g} MB, in any way. Raise memory_budget to {at_least(min(n for n, _ in plans))}, truncate, or "
            f"use an estimator whose memory does not depend on the number of steps."
        )

    return choose


class CompiledRewinder(Rewinder):
    """Keeps what the way back takes over of all steps, or states only. Steps that do not depend on their index are compiled
    whole, and what their way back does not need, such as the gradient, is left out; other solvers pay for one more
    evaluation a step where states are kept.

    Args:
        tapes_within: Bytes that all tapes together may take; more than that, and states are kept as ``planner`` says.
    """

    _reached: frozenset[str] = frozenset()
    _is_whole = _keeps_tapes = False
    _start: Params

    def __init__(self, *arguments: Any, tapes_within: float) -> None:
        super().__init__(*arguments)
        self._tapes_within = tapes_within

    def take(self, inner_params: Params, state: InnerState, index: int) -> Moved:
        point, position = Point(inner_params, state), self._count
        if position == 0:
            self._look_at(point, index)
        if self._keeps_tapes:
            return super().take(inner_params, state, index)
        self._count += 1
        if position % self._plan.stride(self._num_steps) == 0:
            self._keep(position, point)
        moved = self._step(point, position)
        self._last = Point(moved[0], moved[1])
        return moved

    def pull(self, cotangent: Params, keep: bool) -> tuple[Cotangents, Cotangents]:
        with graphs_kept():
            return super().pull(cotangent, keep)

    def _look_at(self, point: Point, index: int) -> None:
        self._first = index
        self._start = point.inner_params
        check_compilable("Unroll", self._problem.inner_objective)
        self._is_whole = not self._solver.depends_on_index(self._lam)
        size = num_bytes(point.tensors())
        self._plan = self._planner(self._num_steps, size, size)
        # A tape holds its state at least: with no room for those there is nothing to be tried.
        self._keeps_tapes = self._num_steps * size <= self._tapes_within and can_be_cut()

    def _begin(self, point: Point) -> tuple[Tape, Tensor, Params]:
        begun = self._record(point, 0)
        if math.isfinite(self._tapes_within):
            begun, held = self._measured(point)  # torch.func is not traced under hooks
            all_tapes = self._num_steps * self._own_bytes(begun[0], held)
            self._keeps_tapes = all_tapes <= self._tapes_within
        return begun

    def _keeps_tape(self, position: int) -> bool:
        return self._keeps_tapes

    def _record(self, point: Point, position: int) -> tuple[Tape, Tensor, Params]:
        before, index, lam = point.map(_tree.leaves), self._first + position, self._lam
        batch, w, state = self._batch(index), before.inner_params, before.state
        objective = self._problem.inner_objective

        def evaluate(at: Params) -> tuple[Tensor, Params]:
            run = _gradient_in_halves(objective)
            with no_word_on_what_is_no_leaf():
                found: tuple[Tensor, Params] = _called(run, at, lam, batch, graph=True)
            return found

        with graphs_kept(), torch.enable_grad():
            if self._is_whole:
                run = _step_in_halves(objective, self._one_step())
                moved: Moved = _called(run, w, state, lam, batch, graph=True)
            else:
                moved = self._solver.step(evaluate, w, lam, state, index)
        return Tape(before, Point(moved[0], moved[1])), moved[2], _tree.detach(moved[3])

    def _step(self, point: Point, position: int) -> Moved:
        w, lam, index = point.inner_params, _tree.detach(self._lam), self._first + position
        if self._is_whole:
            moved: Moved = _called(self._steps()[0], w, point.state, lam, self._batch(index))
            return moved
        with torch.no_grad():
            return self._solver.step(
                lambda at: self._gradient(at, index), w, lam, point.state, index
            )

    def _gradient(self, w: Params, index: int) -> tuple[Tensor, Params]:
        run = _gradients(self._problem.inner_objective)[0]
        found: tuple[Tensor, Params] = _called(run, w, _tree.detach(self._lam), self._batch(index))
        return found

    def _steps(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return _steps(self._problem.inner_objective, self._one_step())

    def _one_step(self) -> AbstractStepSolver:
        """The solver without what its steps do not depend on."""
        return replace(self._solver, max_steps=1, rtol=0.0, atol=0.0)

    def _batch(self, index: int) -> Batch:
        batch = self._problem.inner_batch(index)
        objective = self._problem.inner_objective
        self._reached |= paths_of("Unroll", objective, self._start, self._lam, batch)
        return batch

    def _pull_short(
        self, start: int, end: int, point: Point, arrival: Point, at: Cotangent
    ) -> None:
        points = [point]
        for position in range(start, end - 1):
            points.append(self._after(points[-1], position))
        if start == 0:
            self._check_repeats(start, end, point, self._after(points[-1], end - 1), arrival)
        pull = self._pull_whole_step if self._is_whole else self._pull_step
        for position in reversed(range(start, end)):
            pull(points.pop(), self._first + position, at)

    def _after(self, point: Point, position: int) -> Point:
        self.num_recomputed += 1
        w, state, _, _ = self._step(point, position)
        return Point(w, state)

    def _pull_whole_step(self, point: Point, index: int, at: Cotangent) -> None:
        lam, reached = _tree.detach(self._lam), self._reached | self._solver.hyperparameters()
        ends = point.with_tensors(
            torch.zeros_like(v) if c is None else c.to(v.dtype)
            for v, c in zip(point.tensors(), at.point, strict=True)
        )
        total = {
            k: torch.zeros_like(v) if so_far is None else so_far
            for (k, v), so_far in zip(lam.items(), at.outer, strict=True)
        }
        w, state, numbers = _called(
            self._steps()[1],
            *(point.inner_params, point.state, lam, self._batch(index)),
            *((ends.inner_params, ends.state), total),
        )
        at.point[:] = Point(w, state).tensors()
        total |= numbers
        at.outer[:] = [total[k] if k in reached else None for k in lam]

    def _pull_step(self, point: Point, index: int, at: Cotangent) -> None:
        before = point.map(_tree.leaves)
        lam = _tree.leaves(self._lam)
        names = tuple(point.inner_params)

        def evaluate(w: Params) -> tuple[Tensor, Params]:
            value, *slopes = _Evaluated.apply(  # type: ignore[no-untyped-call]
                self, index, names, *(w[k] for k in names), *lam.values()
            )
            return value, dict(zip(names, slopes, strict=True))

        with torch.enable_grad():
            w, state, _, _ = self._solver.step(
                evaluate, before.inner_params, lam, before.state, index
            )
        pull_through(Tape(before, Point(w, state)), lam, at, keep=False)


class _Evaluated(torch.autograd.Function):
    """The gradient wherever a step asks for it, with the compiled product as its way back."""

    @staticmethod
    def forward(
        ctx: Any, rewinder: CompiledRewinder, index: int, names: tuple[str, ...], *tensors: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        w = dict(zip(names, (t.detach() for t in tensors), strict=False))
        ctx.where = rewinder, index, w
        value, slope = rewinder._gradient(w, index)
        return value, *(slope[k] for k in names)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        rewinder, index, w = ctx.where
        if cotangents[0] is not None:
            raise RequirementError(
                f"{type(rewinder._solver).__name__} makes its steps depend on the value of inner_objective, and "
                f"Unroll(compile=True) differentiates its gradient only. Use Unroll(compile=False)."
            )
        vector = {
            k: torch.zeros_like(v) if c is None else c
            for (k, v), c in zip(w.items(), cotangents[1:], strict=True)
        }
        lam = _tree.detach(rewinder._lam)
        run = _gradients(rewinder._problem.inner_objective)[1]
        products, cross = _called(run, w, lam, rewinder._batch(index), vector)
        reached = (cross[k] if k in rewinder._reached else None for k in lam)
        return None, None, None, *(products[k] for k in w), *reached


def _called(run: Callable[..., Any], *arguments: Any, graph: bool = False) -> Any:
    with in_one_graph("Unroll", "the inner objective"), torch.set_grad_enabled(graph):
        return run(*arguments)
