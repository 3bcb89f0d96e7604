"""Descent on the outer objective behind a barrier that lets the inner one fall, too."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from .._arguments import is_number
from .._typing import Params
from ..inner import AbstractInnerSolver, InnerSolution
from ..problem import BilevelProblem
from ._base import run_inner
from ._estimate import Cotangents, EstimatorState
from ._penalty import AbstractJointPenalty
from ._slopes import Slopes, product, squared

BarrierOn = Literal["gradient", "gap"]
BARRIERS: tuple[BarrierOn, ...] = ("gradient", "gap")


@dataclass(frozen=True)
class BOME(AbstractJointPenalty):
    """Moves ``(lam, y)`` along ``grad f + s grad q``, ``q = g(y, lam) - g(z, lam)``, with the least ``s`` that lets ``q`` fall.

    ``z`` is ``max_steps`` of the inner solver from ``y``, held fixed in ``grad q = (g_lam(y) - g_lam(z), g_w(y))``;
    ``s = max(0, (phi - <grad f, grad q>) / |grad q|^2)``, so that ``<grad f + s grad q, grad q> >= phi``;
    ``y <- y - eta (f_w + s g_w)``, one step, and the estimate is the ``lam`` part at ``y`` before it. First
    derivatives only. Not a hypergradient at a point: ``s`` rises without bound as ``q`` falls, and it is small steps of
    ``y`` and ``lam``, of one order, that lead both to the solution. The paper's step lengths are equal: ``eta`` and the
    ``lr`` of ``torch.optim.SGD``.

    Reference: Liu, Ye, Wright, Stone & Liu (2022), "BOME! Bilevel optimization made easy: a simple first-order
    approach", algorithm 1 and equation 5.

    Batches are not in the paper. ``q`` is small, and steps on another batch than its own need not lower ``g`` there: so
    ``same_batch`` is set by default, which makes it the ``q`` of one function, as in the paper. Its mean over batches is then
    not quite that of all data: ``z`` is better on the batch that it has been moved on. (Weights of samples below an MLP
    are found better so than with the noise of two batches; below softmax regression, slightly less well:
    ``benchmarks/results/cleaning.md``.)

    Args:
        barrier: ``eta`` in the paper.
        barrier_on: What ``phi`` is ``barrier`` times: ``"gradient"``, ``|grad q|^2``, or ``"gap"``, ``q``, as in the authors'
            code. One short step of ``z`` of size ``a`` has ``q ~ a |g_w|^2``: there the second is about ``a`` times the first.
    """

    name: ClassVar[str] = "bome"
    requires: ClassVar[frozenset[str]] = frozenset({"stationary_point"})
    begins_at_y: ClassVar[bool] = True
    barrier: float = 0.5
    barrier_on: BarrierOn = field(default="gradient", kw_only=True)
    same_batch: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.barrier) and 0 < self.barrier < float("inf")):
            raise ValueError(f"BOME needs a finite barrier > 0, got {self.barrier!r:.80}.")
        if self.barrier_on not in BARRIERS:
            named = ", ".join(map(repr, BARRIERS))
            raise ValueError(
                f"BOME needs barrier_on to be one of {named}, got {self.barrier_on!r:.80}."
            )

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

    def _weight(
        self, f: Slopes, slope: Params, slope_outer: Cotangents, gap: float, count: int
    ) -> float:
        size = squared(slope) + squared(slope_outer)
        if size == 0.0:
            return 0.0
        along = product(f.inner, slope) + product(f.outer, slope_outer)
        wanted = self.barrier * (size if self.barrier_on == "gradient" else gap)
        return max(0.0, (wanted - along) / size)

    def _direction(self, f: Tensor, g: Tensor, s: float) -> Tensor:
        return f.add(g, alpha=s)
