"""Descent on the outer objective behind a barrier that lets the inner one fall, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .._arguments import is_number
from .._typing import Params
from ..inner import AbstractInnerSolver, InnerSolution
from ..problem import BilevelProblem
from ._base import Cotangents, EstimatorState, run_inner
from ._penalty import AbstractJointPenalty, Slopes, product, squared


@dataclass(frozen=True)
class BOME(AbstractJointPenalty):
    """Moves ``(lam, y)`` along ``grad f + s grad q``, ``q = g(y, lam) - g(z, lam)``, with the least ``s`` that lets ``q`` fall.

    ``z`` is ``max_steps`` of the inner solver from ``y``, held fixed in ``grad q = (g_lam(y) - g_lam(z), g_w(y))``;
    ``s = max(0, barrier - <grad f, grad q> / |grad q|^2)``, so that ``<grad f + s grad q, grad q> >= barrier
    |grad q|^2``; ``y <- y - eta (f_w + s g_w)``, one step, and the estimate is the ``lam`` part at ``y`` before it.
    First derivatives only. Not a hypergradient at a point: ``s`` rises without bound as ``q`` falls, and it is small
    steps of ``y`` and ``lam``, of one order, that lead both to the solution. The paper's step lengths are equal: ``eta`` and
    the ``lr`` of ``torch.optim.SGD``.

    Reference: Liu, Ye, Wright, Stone & Liu (2022), "BOME! Bilevel optimization made easy: a simple first-order
    approach", algorithm 1 and equation 5.

    Args:
        barrier: ``eta`` in the paper.
    """

    name: ClassVar[str] = "bome"
    requires: ClassVar[frozenset[str]] = frozenset({"stationary_point"})
    barrier: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.barrier) and 0 < self.barrier < float("inf")):
            raise ValueError(f"BOME needs a finite barrier > 0, got {self.barrier!r:.80}.")

    def _inner(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        y: Params,
        state: EstimatorState,
    ) -> InnerSolution:
        fresh = replace(state, solver_state=None)
        return replace(run_inner(problem, inner_solver, y, outer_params, fresh), state={})

    def _weight(self, f: Slopes, slope: Params, gap: Cotangents, count: int) -> float:
        size = squared(slope) + squared(gap)
        if size == 0.0:
            return 0.0
        return max(0.0, self.barrier - (product(f.inner, slope) + product(f.outer, gap)) / size)

    def _direction(self, f: Tensor, g: Tensor, s: float) -> Tensor:
        return f.add(g, alpha=s)
