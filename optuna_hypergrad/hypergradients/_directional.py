"""Estimates from derivatives in a few directions: ``(1/b) sum_i s_i v_i``, by one process or by several."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._arguments import check_count
from .._errors import RequirementError
from .._typing import Params
from ..inner import AbstractInnerSolver
from ..problem import BilevelProblem
from ._base import AbstractHypergradientEstimator
from ._directions import LAWS, WITHOUT_REPLACEMENT, Directions, Law, shaped
from ._estimate import EstimatorState, HypergradientEstimate
from ._outer_gradients import _finite, _first_failure


@dataclass(frozen=True)
class PartialEstimate:
    """What one of several processes finds: the scalars of its directions, and what all of them find alike.

    Attributes:
        scalars: Derivatives in its directions, ``(len(directions),)``, in float64 on the CPU: all that the
            processes need to exchange.
        directions: Their numbers.
        step: Outer step.
        known: The estimate without directions: its ``value`` is the part that is known exactly.
        control: What the directions correct, ``(N,)``; ``None`` for nothing.
        moving: Names of the outer parameters that directions say something about.
    """

    scalars: Tensor
    directions: range
    step: int
    known: HypergradientEstimate
    control: Tensor | None = None
    moving: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AbstractDirectionalEstimator(AbstractHypergradientEstimator):
    """Settings of all estimators from directions.

    Args:
        num_directions: ``b``. Of orthogonal and of coordinate directions as many as ``lam`` has entries ``N``
            give the exact answer, and no more than these are taken. ``None`` for ``N``.
        directions: ``"orthogonal"`` (relative variance ``N/b - 1``), ``"coordinate"`` (single entries without
            replacement; the same, but concentrated on few entries), ``"rademacher"`` (``(N - 1)/b``) or
            ``"gaussian"`` (``(N + 1)/b``).
        seed: Direction ``i`` of outer step ``s`` is a function of ``(seed, s, i)``, and of ``N``, alone.
    """

    num_directions: int | None = 8
    directions: Law = "orthogonal"
    seed: int = 0

    def __post_init__(self) -> None:
        label = type(self).__name__
        check_count(label, "num_directions", self.num_directions, 1, none=True)
        if self.directions not in LAWS:
            named = ", ".join(repr(law) for law in LAWS)
            raise ValueError(
                f"{label} needs directions to be one of {named}, got {self.directions!r}."
            )
        check_count(label, "seed", self.seed, 0)

    def is_exact(self, outer_params: Params) -> bool:
        """Whether the directions leave nothing to chance: as many as there are entries, and no two alike."""
        sampled = self._sampled(outer_params, 0)
        return self.directions in WITHOUT_REPLACEMENT and (
            sampled.most(self.num_directions) == sampled.size
        )

    @abc.abstractmethod
    def partial(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
        directions: range | None = None,
    ) -> PartialEstimate:
        """The part of an estimate of one process: it solves the inner problem and takes its ``directions``.

        Args:
            directions: One of :meth:`shares`; ``None`` for all.
        """

    @abc.abstractmethod
    def group(self, inner_params: Params) -> int:
        """Directions that must not be torn apart, lest they are rounded in another way."""

    def shares(self, inner_params: Params, outer_params: Params, num_processes: int) -> list[range]:
        """The directions of each process, in whole groups; empty ones where there are fewer groups."""
        check_count(f"{type(self).__name__}.shares", "num_processes", num_processes, 1)
        count, group = (
            self._sampled(outer_params, 0).most(self.num_directions),
            self.group(inner_params),
        )
        num_groups = -(-count // group)
        ends = [min(count, group * (num_groups * i // num_processes)) for i in range(num_processes)]
        return [range(a, b) for a, b in zip(ends, [*ends[1:], count], strict=True)]

    def combine(
        self, outer_params: Params, partial: PartialEstimate, scalars: Tensor
    ) -> HypergradientEstimate:
        """The estimate, from any process's part and the scalars of all, in the order of their directions.

        Equal inputs give equal bytes, however many processes there were.

        Raises:
            RequirementError: if these are not the scalars of all directions.
        """
        sampled = self._sampled(outer_params, partial.step)
        count = sampled.most(self.num_directions)
        if scalars.shape != (count,):
            raise RequirementError(
                f"{type(self).__name__} combines the scalars of all {count} directions, and was given "
                f"{tuple(scalars.shape)}; concatenate those of all processes in the order of their directions."
            )
        known = partial.known
        total = torch.zeros(sampled.size, dtype=torch.float64, device="cpu")
        for scalar, row in zip(scalars.tolist(), sampled.each(range(count)), strict=True):
            expected = 0.0 if partial.control is None else float(partial.control @ row)
            total.add_(row, alpha=(scalar - expected) / count)
        if partial.control is not None:
            total += partial.control
        found = shaped(total, outer_params)
        value = {
            k: known.value[k] + v if k in partial.moving else known.value[k]
            for k, v in found.items()
        }
        result = _first_failure(known.result, _finite(value, known.outer_value))
        stats = {**known.stats, "num_directions": float(count)}
        return replace(known, value=value, result=result, stats=stats)

    def estimate(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
    ) -> HypergradientEstimate:
        partial = self.partial(problem, inner_solver, inner_params, outer_params, step, state)
        return self.combine(outer_params, partial, partial.scalars)

    def _sampled(self, outer_params: Params, step: int) -> Directions:
        return Directions(self.directions, self.seed, step, outer_params)

    def _numbers(self, sampled: Directions, directions: range | None, group: int) -> range:
        count = sampled.most(self.num_directions)
        if directions is None:
            return range(count)
        if not isinstance(directions, range):
            raise RequirementError(
                f"{type(self).__name__} needs directions= to be a range that shares(...) gives, not {directions!r:.80}."
            )
        whole = directions.start % group == 0 and (
            directions.stop % group == 0 or directions.stop == count
        )
        inside = 0 <= directions.start <= directions.stop <= count and directions.step == 1
        if not (inside and (whole or not directions)):
            raise RequirementError(
                f"{type(self).__name__} has {count} directions in groups of {group}, and {directions} is not made "
                f"of whole ones; take the ranges that shares(...) gives."
            )
        return directions
