"""Inner steps, revisited in reverse order, with as much recomputation as the memory asks for.

Two things are kept for the way back: *states* (``w`` and the solver's memory before some steps) and *tapes*
(the double-backward graphs of some steps). The first pass keeps the state before every ``stride``-th step.
A stretch between two of them is taken once more: with tapes if it is short enough, otherwise with states
that are closer together, and so on: a tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _tree
from .._errors import RequirementError
from .._twice import check_differentiable_twice, saying_what_has_no_second_derivative
from .._typing import Params
from ..inner import AbstractStepSolver
from ..inner._base import InnerState, take_step
from ..problem import BilevelProblem
from ._estimate import Cotangents
from ._memory import at_least, num_bytes, storages, with_saved_storages
from ._shelf import Shelf, room_for


@dataclass(frozen=True)
class Point:
    """Where an inner solve is between two steps."""

    inner_params: Params
    state: InnerState

    def tensors(self) -> list[Tensor]:
        return [*self.inner_params.values(), *(v for s in self.state.values() for v in s.values())]

    def with_tensors(self, tensors: Iterable[Tensor]) -> Point:
        """Others in their places."""
        ahead = iter(tensors)
        return self.map(lambda tree: {k: next(ahead) for k in tree})

    def map(self, function: Callable[[Params], Params]) -> Point:
        inner_params = function(self.inner_params)
        return Point(inner_params, {role: function(tree) for role, tree in self.state.items()})


@dataclass(frozen=True)
class Tape:
    """One step with its graph, which starts at leaves of its own."""

    before: Point
    after: Point


@dataclass(frozen=True)
class Plan:
    """How much is kept.

    Args:
        tapes: At once.
        slots: States at once, on each level of the tree; ``None`` for as many as one level needs.
    """

    tapes: int
    slots: int | None = None

    def stride(self, num_steps: int) -> int:
        """Steps from one kept state to the next, in a stretch of ``num_steps``."""
        if self.slots is None:
            return self.tapes
        return max(self.tapes, math.ceil(num_steps / self.slots))


Planner = Callable[[int, int, int], Plan]
"""``(number of steps, bytes of a tape, bytes of a state) -> Plan``."""


def whole_tape(num_steps: int, tape: int, state: int) -> Plan:
    """Nothing is computed twice."""
    return Plan(num_steps)


def square_root(num_steps: int, tape: int, state: int) -> Plan:
    """Every step is taken twice; memory ``O(sqrt(num_steps))``, the least of all plans that do so.

    Reference: Chen, Xu, Zhang & Guestrin (2016), "Training deep nets with sublinear memory cost".
    """
    return Plan(max(1, math.isqrt(num_steps * state // max(tape, 1))))


def tree(num_steps: int, tape: int, state: int) -> Plan:
    """Memory ``O(log(num_steps))``; every step is taken about ``log_8(num_steps)`` times more.

    Reference: Griewank & Walther (2000), "Algorithm 799: Revolve"; Engstrom et al. (2025), "Optimizing ML
    training with metagradient descent" (REPLAY).
    """
    return Plan(1, slots=8)


def within(budget: float) -> Planner:
    """The plan with the least recomputation that needs at most ``budget`` bytes.

    The plan raises :class:`RequirementError` if there is none.
    """

    def choose(num_steps: int, tape: int, state: int) -> Plan:
        one_level = square_root(num_steps, tape, state)
        states = math.ceil(num_steps / one_level.tapes)
        plans = [
            (num_steps * tape, Plan(num_steps)),
            (states * state + one_level.tapes * tape, one_level),
        ]
        for levels in range(2, 12):
            slots = max(2, math.ceil(num_steps ** (1 / levels)))
            plans.append((levels * slots * state + tape, Plan(1, slots)))
        for needed, plan in plans:
            if needed <= budget:
                return plan
        raise RequirementError(
            f"Unroll(memory_budget={budget:.3g}) bytes cannot hold {num_steps} steps of which one takes "
            f"{tape / 1e6:.3g} MB and a state {state / 1e6:.3g} MB, in any way. Raise memory_budget to "
            f"{at_least(min(n for n, _ in plans))}, truncate, or use an estimator whose memory does not depend on the "
            f"number of steps."
        )

    return choose


NOT_REPEATED = (
    "the gradient of inner_objective was not the same when it was taken again. Look for dropout or other random "
    "numbers (draw them from a generator that is seeded by the batch), an inner_batch that gives other data for the "
    "same step, and tensors that were written to in between."
)


def meets(found: Params, known: Params, start: Params) -> bool:
    """Whether the same steps from ``start`` have led to the same place, but for rounding."""
    names = [k for k, v in known.items() if v.numel()]
    if all(torch.equal(found[k], known[k]) for k in names):
        return True
    off, way, size = (
        max(float((a[k].detach() - b[k].detach()).abs().max()) for k in names)
        for a, b in ((found, known), (known, start), (known, _tree.zeros_like(known)))
    )
    epsilon = max(torch.finfo(known[k].dtype).eps for k in names)
    return not off > 1e-2 * way + 1e3 * epsilon * size


@dataclass
class Cotangent:
    """Of a point, entry by entry as in ``Point.tensors``, and of the outer parameters, summed up."""

    point: list[Tensor | None]
    outer: list[Tensor | None]


class Rewinder:
    """Takes the steps of one inner solve (:meth:`take`), and pulls cotangents of its end back (:meth:`pull`).

    Args:
        planner: Is asked when the first step has been taken.
        num_steps: Steps there will be, at most.
        exact: Whether there will be exactly so many; the last ones then keep their tapes at once.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        solver: AbstractStepSolver,
        outer_params: Params,
        planner: Planner,
        num_steps: int,
        exact: bool,
    ) -> None:
        self.num_recomputed = 0
        self._to_start = True
        self._problem, self._solver = problem, solver
        self._lam = _tree.leaves(outer_params)
        self._planner, self._num_steps, self._exact = planner, num_steps, exact
        self._plan = Plan(1)
        self._kept: list[tuple[int, Point]] = []
        self._recorded: list[tuple[int, Tape]] = []
        self._first = self._count = 0
        self._last: Point | None = None
        self._shelf: Shelf | None = None

    def take(
        self, inner_params: Params, state: InnerState, index: int
    ) -> tuple[Params, InnerState, Tensor, Params]:
        """A step of the first pass, without a graph."""
        point, position = Point(inner_params, state), self._count
        self._count += 1
        if position == 0:
            self._first = index
            tape, value, gradient = self._begin(point)
        elif self._keeps_tape(position):
            tape, value, gradient = self._record(point, position)
        else:
            if position % self._plan.stride(self._num_steps) == 0:
                self._keep(position, point)
            moved = self._step(point, position)
            self._last = Point(moved[0], moved[1])
            return moved
        if self._keeps_tape(position):
            self._recorded.append((position, tape))
        else:
            self._keep(position, point)
        after = self._last = tape.after.map(_tree.detach)
        return after.inner_params, after.state, value.detach(), gradient

    def pull(self, cotangent: Params, keep: bool) -> tuple[Cotangents, Cotangents]:
        """Cotangents of the outer parameters and of ``w_0``, from one of the last ``w``.

        Args:
            cotangent: Of the last ``w``.
            keep: Whether it can be called again; otherwise tapes are given up as they are used, and there are no
                cotangents of ``w_0``.

        Raises:
            RequirementError: if steps that are taken again lead elsewhere.
        """
        if not self._kept and not self._recorded:
            raise RuntimeError(
                "last_pullback was called before, and has given up what it would need; use pullback."
            )
        start = self._kept[0][1] if self._kept else self._recorded[0][1].before
        num_params, num_states = len(start.inner_params), len(start.tensors())
        at = Cotangent(
            [*cotangent.values(), *[None] * (num_states - num_params)], [None] * len(self._lam)
        )
        end, arrival, self._to_start = self._count, self._last, keep
        recorded, kept = list(self._recorded), list(self._kept)
        if not keep:
            self._recorded.clear()
            self._kept.clear()
        while recorded:
            end, tape = recorded.pop()
            arrival = tape.before
            pull_through(tape, self._lam, at, keep, to_start=keep or bool(recorded or kept))
            del tape
        while kept:
            position, point = kept.pop()
            assert arrival is not None
            self._pull_stretch(position, end, point, arrival, at)
            end, arrival = position, point
        initial = dict(zip(start.inner_params, at.point, strict=False))
        return dict(zip(self._lam, at.outer, strict=True)), initial

    def _keep(self, position: int, point: Point) -> None:
        if self._shelf is None:
            kept = math.ceil(self._num_steps / self._plan.stride(self._num_steps))
            self._shelf = Shelf(kept * room_for(point.tensors()))
        self._kept.append((position, point.with_tensors(map(self._shelf.put, point.tensors()))))

    def _begin(self, point: Point) -> tuple[Tape, Tensor, Params]:
        begun, held = self._measured(point)
        check_differentiable_twice(begun[1], begun[0].after.tensors())
        size = 0 if self._planner is whole_tape else self._own_bytes(begun[0], held)
        self._plan = self._planner(self._num_steps, size, num_bytes(point.tensors()))
        return begun

    def _measured(self, point: Point) -> tuple[tuple[Tape, Tensor, Params], dict[int, int]]:
        """The first tape, and what it keeps alive."""
        return with_saved_storages(
            lambda: self._record(point, 0), lambda begun: [begun[1], *begun[0].after.tensors()]
        )

    def _own_bytes(self, tape: Tape, held: dict[int, int]) -> int:
        """Of the storages that ``tape`` holds on to, those that it does not share with every other tape."""
        shared = storages(self._lam.values()).keys() | self._data(tape)
        return sum(n for address, n in held.items() if address not in shared)

    def _data(self, tape: Tape) -> set[int]:
        """Where the data lie that every tape refers to: what a second graph saves from where ``tape`` does."""
        w = tape.before.inner_params
        batch = self._problem.inner_batch(self._first)

        def build() -> Tensor:
            with torch.enable_grad():
                return self._problem.inner_objective(dict(w), dict(self._lam), batch)

        _, found = with_saved_storages(build, lambda value: [value])
        return found.keys() - storages(w.values()).keys()

    def _keeps_tape(self, position: int) -> bool:
        if self._plan.tapes >= self._num_steps:
            return True
        return self._exact and position >= self._num_steps - self._plan.tapes

    def _pull_stretch(
        self, start: int, end: int, point: Point, arrival: Point, at: Cotangent
    ) -> None:
        """Pull ``at``, of ``arrival``, before step ``end``, back to ``point``, before step ``start``."""
        if end - start <= self._plan.tapes:
            self._pull_short(start, end, point, arrival, at)
            return
        stride = self._plan.stride(end - start)
        kept = [(start, point)]
        last = start + (end - start - 1) // stride * stride
        for position in range(start, last):
            w, state, _, _ = self._step(point, position)
            point = Point(w, state)
            self.num_recomputed += 1
            if (position + 1 - start) % stride == 0:
                kept.append((position + 1, point))
        while kept:
            position, point = kept.pop()
            self._pull_stretch(position, end, point, arrival, at)
            end, arrival = position, point

    def _pull_short(
        self, start: int, end: int, point: Point, arrival: Point, at: Cotangent
    ) -> None:
        """The same for a stretch whose steps are all recorded at once."""
        tapes, begun = [], point
        for position in range(start, end):
            tapes.append(self._record(point, position)[0])
            point = tapes[-1].after.map(_tree.detach)
        self.num_recomputed += end - start
        self._check_repeats(start, end, begun, point, arrival)
        while tapes:
            tape, is_first = tapes.pop(), start == 0 and not tapes
            pull_through(tape, self._lam, at, keep=False, to_start=self._to_start or not is_first)
            del tape

    def _check_repeats(
        self, start: int, end: int, begun: Point, found: Point, arrival: Point
    ) -> None:
        if not meets(found.inner_params, arrival.inner_params, begun.inner_params):
            raise RequirementError(
                f"Unroll took the inner steps {self._first + start} to {self._first + end - 1} again on the way back, "
                f"and they led elsewhere: {NOT_REPEATED} Or use Unroll(compile=False, recompute='never'), which "
                f"takes no step twice."
            )

    def _step(self, point: Point, position: int) -> tuple[Params, InnerState, Tensor, Params]:
        lam, index = _tree.detach(self._lam), self._first + position
        return take_step(
            self._problem, self._solver, lam, False, point.inner_params, point.state, index
        )

    def _record(self, point: Point, position: int) -> tuple[Tape, Tensor, Params]:
        before, index = point.map(_tree.leaves), self._first + position
        with torch.enable_grad():
            w, state, value, gradient = take_step(
                self._problem,
                self._solver,
                self._lam,
                True,
                before.inner_params,
                before.state,
                index,
            )
        return Tape(before, Point(w, state)), value, _tree.detach(gradient)


def pull_through(
    tape: Tape, outer_params: Params, at: Cotangent, keep: bool, to_start: bool = True
) -> None:
    """Pull ``at``, of the point after a step, back to the one before it; ``keep`` its graph.

    Without ``to_start``, to the outer parameters alone.
    """
    alive = [
        (output, cotangent.to(output.dtype))
        for output, cotangent in zip(tape.after.tensors(), at.point, strict=True)
        if output.requires_grad and cotangent is not None
    ]
    before = tape.before.tensors() if to_start else []
    with saying_what_has_no_second_derivative():
        found = torch.autograd.grad(
            [output for output, _ in alive],
            (*before, *outer_params.values()),
            [cotangent for _, cotangent in alive],
            allow_unused=True,
            retain_graph=keep,
        )
    at.point[:] = found[: len(before)] if to_start else [None] * len(at.point)
    at.outer[:] = map(_added, at.outer, found[len(before) :])


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """``total``, which is ours and is changed, plus ``part``, which may be shared."""
    if part is None:
        return total
    return part.clone() if total is None else total.add_(part)
