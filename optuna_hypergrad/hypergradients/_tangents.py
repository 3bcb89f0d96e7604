"""Inner steps, and columns of tangents that are pushed through each of them. Nothing of a graph survives a step.

The tangent of the inner gradient in a direction ``(y, v)`` is ``H y + M v``; by the symmetry of second
derivatives that is the gradient in ``w`` of ``<g_w, y> + <g_lam, v>``: one walk of the graph of ``(g_w, g_lam)``,
in reverse mode, for each column, and batched. The rest of a step, which is the solver's own algebra, is
elementwise, and is pushed forward with the gradient as one more input.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _tree
from .._errors import RequirementError
from .._typing import Params
from ..inner import AbstractStepSolver, Adam, GradientDescent, HeavyBall
from ..inner._base import InnerState, take_step
from ..operators import scalar
from ..problem import BilevelProblem
from ._rewind import NOT_REPEATED, Point, meets
from ._second_derivatives import SecondDerivatives
from .compiled import check_traced, kind_of

_ALIKE = (GradientDescent, HeavyBall, Adam)
"""Solvers whose steps all depend on the same hyperparameters, schedules aside."""
_PLAIN = (Tensor, bool, int, float, str, type(None))


class _OtherwiseError(Exception):
    """The solver's step is not one gradient at ``w`` and some algebra in forward mode."""


@dataclass
class Columns:
    """Tangents that are pushed together: of ``lam``, and of a point as in ``Point.tensors``; ``(B, *shape)``."""

    outer: Params
    point: list[Tensor]


class Pushforward:
    """Takes the steps of one inner solve (:meth:`take`), and carries tangents along.

    Args:
        directions: Of ``lam``: for each block of columns, tensors ``(B, *shape)``. The tangents of ``w_0`` and of
            the solver's memory are zero.
        label: The estimator's name, for messages.
        compile: Compile the inner gradient and its tangents.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        solver: AbstractStepSolver,
        inner_params: Params,
        outer_params: Params,
        directions: Sequence[Params],
        label: str,
        compile: bool = False,
    ) -> None:
        self._problem, self._solver, self._label = problem, solver, label
        self._compile = compile
        self._lam = _tree.leaves(outer_params)
        self._unseen = set(outer_params)
        self._blocks = [Columns(v, []) for v in directions]
        self._names = list(inner_params)
        self._plain = True
        self._compared = False
        self._kinds: set[Hashable] = set()
        self._second = SecondDerivatives(problem, self._lam, label)

    @property
    def seen(self) -> frozenset[str]:
        """The hyperparameters that some step depended on."""
        return frozenset(self._lam.keys() - self._unseen)

    def columns(self) -> list[Params]:
        """By block, the tangents of the last ``w``: ``(B, *shape)``."""
        return [dict(zip(self._names, b.point, strict=False)) for b in self._blocks]

    def take(
        self, inner_params: Params, state: InnerState, index: int
    ) -> tuple[Params, InnerState, Tensor, Params]:
        """A step on inner batch ``index``, without a graph; the columns go with it."""
        before = Point(inner_params, state)
        self._second.at(before, index)
        for block in self._blocks:
            if not block.point:
                rows = len(next(iter(block.outer.values())))
                block.point = [t.new_zeros(rows, *t.shape) for t in before.tensors()]
        if self._plain:
            try:
                return self._take(before, index)
            except _OtherwiseError:
                self._go_whole()
        return self._take_whole(before, index, self._blocks)

    def _take(self, before: Point, index: int) -> tuple[Params, InnerState, Tensor, Params]:
        lam = _tree.detach(self._lam)
        looking = bool(self._unseen) and not self._was_looked_at(index)
        value, gradient, bends = self._bends(before, index, looking)
        asked: list[Params] = []

        def evaluate(at: Params) -> tuple[Tensor, Params]:
            if asked or any(at[k] is not v for k, v in before.inner_params.items()):
                raise _OtherwiseError
            asked.append(at)
            return value, gradient

        with torch.no_grad():
            moved = self._solver.step(evaluate, before.inner_params, lam, before.state, index)
        if looking:
            self._look(before, index)
        for i, (block, bent) in enumerate(zip(self._blocks, bends, strict=True)):
            try:
                block.point = self._push(before, lam, value, gradient, block, bent, index)
            except _OtherwiseError:
                self._go_whole()
                self._take_whole(before, index, self._blocks[i:])
                break
        return moved

    def _was_looked_at(self, index: int) -> bool:
        """Whether a step that depends on the same hyperparameters was: code that is compiled has no branches."""
        if not self._compile or self._solver.has_schedule() or type(self._solver) not in _ALIKE:
            return False
        batch = self._problem.inner_batch(index)
        if not all(isinstance(v, _PLAIN) for v in torch.utils._pytree.tree_leaves(batch)):
            return False
        kind = kind_of(batch)
        known = kind in self._kinds
        self._kinds.add(kind)
        return known

    def _go_whole(self) -> None:
        """Differentiate whole steps from now on.

        Raises:
            RequirementError: if what is compiled are gradients.
        """
        if self._compile:
            raise RequirementError(
                f"{self._label}(compile=True) compiles the inner gradient at w and its tangents, and a step of "
                f"{type(self._solver).__name__} is not made of one such gradient alone, or looks at values. Use "
                f"{self._label}(compile=False)."
            )
        self._plain = False

    def _bends(
        self, before: Point, index: int, looking: bool
    ) -> tuple[Tensor, Params, Iterator[list[Tensor]]]:
        """``g``, ``g_w``, and by block the tangents of ``g_w``, each found when it is asked for."""
        w = _tree.leaves(before.inner_params)
        compiled = self._compile and bool(self._blocks)
        if looking or not compiled:
            value, slopes = self._gradients(w, index)
            if looking:
                self._second.refuse_dead_ends([g for g in slopes if g.requires_grad])
        if not compiled:
            gradient = {k: g.detach() for k, g in zip(w, slopes, strict=False)}
            return value, gradient, (self._bend(slopes, w, b) for b in self._blocks)
        first, *rest = self._blocks
        value, gradient, bent = self._bent(before, index, first)

        def others() -> Iterator[list[Tensor]]:
            for block in rest:
                found = self._bent(before, index, block)
                if not self._compared:
                    self._check_same(found[0], found[1], value, gradient)
                yield found[2]
            self._compared = True

        return value, gradient, itertools.chain([bent], others())

    def _check_same(self, found: Tensor, slope: Params, value: Tensor, gradient: Params) -> None:
        """Each compiled call evaluates the objective; that of a first step tells if it is random."""
        off = (found - value).abs() > 1e-3 * value.abs()
        if bool(off) and not meets(slope, gradient, _tree.zeros_like(gradient)):
            raise RequirementError(
                f"{self._label}(compile=True) evaluates inner_objective for each of {len(self._blocks)} blocks of columns, and "
                f"{NOT_REPEATED} Or use {self._label}(compile=False), or a width of all directions."
            )

    def _bent(
        self, before: Point, index: int, block: Columns
    ) -> tuple[Tensor, Params, list[Tensor]]:
        from .compiled_tangents import bent_by_columns  # the compiler comes with it

        value, gradient, bent = bent_by_columns(
            self._label,
            self._problem.inner_objective,
            before.inner_params,
            self._lam,
            self._problem.inner_batch(index),
            dict(zip(self._names, block.point, strict=False)),
            block.outer,
        )
        return value, gradient, [bent[k] for k in self._names]

    def _gradients(self, w: Params, index: int) -> tuple[Tensor, list[Tensor]]:
        """``g``, and ``(g_w, g_lam)`` with their graph; zeros where there is no path."""
        at = (*w.values(), *self._lam.values())
        with torch.enable_grad():
            value = scalar(
                self._problem.inner_objective(
                    dict(w), dict(self._lam), self._problem.inner_batch(index)
                ),
                "inner_objective",
            )
            if not value.requires_grad:
                raise RequirementError(
                    "inner_objective does not depend on inner_params through differentiable torch operations."
                )
            if self._compile:
                check_traced(self._label, value)
            found = torch.autograd.grad(value, at, create_graph=True, allow_unused=True)
        slopes = [torch.zeros_like(t) if g is None else g for t, g in zip(at, found, strict=True)]
        return value.detach(), slopes

    def _bend(self, slopes: list[Tensor], w: Params, block: Columns) -> list[Tensor]:
        """Tangents of the inner gradient."""
        directions = (*block.point[: len(w)], *block.outer.values())
        return self._second.of_rows(slopes, tuple(w.values()), directions)

    def _push(
        self,
        before: Point,
        lam: Params,
        value: Tensor,
        gradient: Params,
        block: Columns,
        bent: list[Tensor],
        index: int,
    ) -> list[Tensor]:
        """Tangents of the next point, through the solver's own algebra."""
        if self._solver.is_linear():
            at = _filled(before, block.point)
            slopes = dict(zip(gradient, bent, strict=True))
            step = self._solver.step(
                lambda _: (value, slopes), at.inner_params, lam, at.state, index
            )
            return Point(step[0], step[1]).tensors()
        tensors = before.tensors()
        inputs = (*tensors, *gradient.values(), *lam.values())

        def algebra(*inputs: Tensor) -> tuple[Tensor, ...]:
            at = _filled(before, inputs)
            rest = inputs[len(tensors) :]
            g = dict(zip(gradient, rest, strict=False))
            lam_at = dict(zip(lam, rest[len(gradient) :], strict=True))
            step = self._solver.step(lambda _: (value, g), at.inner_params, lam_at, at.state, index)
            return tuple(Point(step[0], step[1]).tensors())

        def push(*tangents: Tensor) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = torch.func.jvp(algebra, inputs, tangents)[1]
            return found

        try:
            moved = torch.func.vmap(push)(*block.point, *bent, *block.outer.values())
        except RuntimeError as error:  # no forward mode, or a look at a value
            raise _OtherwiseError from error
        # 0-d factors in float64 promote tangents that vmap has given a dimension
        return [new.to(old.dtype) for new, old in zip(moved, tensors, strict=True)]

    def _take_whole(
        self, before: Point, index: int, blocks: list[Columns]
    ) -> tuple[Params, InnerState, Tensor, Params]:
        """Any step: the pullback is linear in its cotangents, and its own pullback is the pushforward."""
        at, after, value, gradient = self._record(before, index)
        if self._unseen:
            self._look(before, index)
        ends = after.tensors()
        alive = [t for t in ends if t.requires_grad]
        inputs = (*at.tensors(), *self._lam.values())
        cotangents = tuple(torch.zeros_like(t, requires_grad=True) for t in alive)
        try:
            pulled = torch.autograd.grad(
                alive, inputs, cotangents, create_graph=True, materialize_grads=True
            )
        except RuntimeError as error:
            raise self._second.refusal(error) from error
        for block in blocks:
            found = iter(
                self._second.of_rows(pulled, cotangents, (*block.point, *block.outer.values()))
            )
            block.point = [
                next(found) if new.requires_grad else torch.zeros_like(old)
                for new, old in zip(ends, block.point, strict=True)
            ]
        end = after.map(_tree.detach)
        return end.inner_params, end.state, value.detach(), _tree.detach(gradient)

    def _record(self, before: Point, index: int) -> tuple[Point, Point, Tensor, Params]:
        at = before.map(_tree.leaves)
        with torch.enable_grad():
            w, state, value, gradient = take_step(
                self._problem, self._solver, self._lam, True, at.inner_params, at.state, index
            )
        return at, Point(w, state), value, gradient

    def _look(self, before: Point, index: int) -> None:
        """Which hyperparameters this step depends on, in whatever way; and that it can be differentiated."""
        names = sorted(self._unseen)
        _, after, value, _ = self._record(before, index)
        ends = [t for t in after.tensors() if t.requires_grad]
        self._second.refuse_dead_ends(ends, value)
        if not ends:
            return
        ones = [torch.ones_like(t) for t in ends]
        try:
            found = torch.autograd.grad(
                ends, [self._lam[k] for k in names], ones, allow_unused=True
            )
        except RuntimeError as error:
            raise self._second.refusal(error) from error
        self._unseen -= {k for k, slope in zip(names, found, strict=True) if slope is not None}


def _filled(like: Point, tensors: Sequence[Tensor]) -> Point:
    """``tensors`` in the order of ``Point.tensors``."""
    rest = iter(tensors)
    w = {k: next(rest) for k in like.inner_params}
    return Point(w, {role: {k: next(rest) for k in tree} for role, tree in like.state.items()})
