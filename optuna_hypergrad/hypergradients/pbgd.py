"""Descent on outer objective plus penalty, jointly in both variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._typing import Params
from ..inner import AbstractInnerSolver, InnerSolution
from ..problem import BilevelProblem
from ._base import run_inner
from ._estimate import Cotangents, EstimatorState
from ._pace import Schedule, check_schedule, scheduled
from ._penalty import AbstractJointPenalty
from ._slopes import Slopes


@dataclass(frozen=True)
class PBGD(AbstractJointPenalty):
    """Descends ``f(y, lam) + s (g(y, lam) - min g(., lam))`` in ``y`` and ``lam`` at once.

    ``z`` goes on towards ``argmin g`` by the inner solver's ``max_steps``; then ``y <- y - eta (g_w(y) + f_w(y)/s)``,
    one step, and the estimate is ``f_lam(y) + s [g_lam(y) - g_lam(z)]`` at ``y`` before it. First derivatives only.
    For fixed ``s`` the minimum is off by ``O(1/s)``. (``y`` moves by ``eta = step_size``, a length that suits ``g``: the
    paper's step length of the sum, times ``s``. That of ``lam`` is the outer optimizer's, and has to be of the order
    ``1/s`` for plain ``torch.optim.SGD``: the penalty bends what ``lam`` falls along ``s`` times as much.) With
    ``same_batch`` the gap, that of objectives over one batch, is less noisy and always to one side: ``z`` is better on the
    batch that it has just been moved on, by the order of its step size, which is multiplied by ``s``.

    Reference: Shen & Chen (2023), "On penalty-based bilevel gradient descent method", algorithm 1 (V-PBGD).

    Args:
        penalty: ``s``: a number, or ``t -> number``.
    """

    name: ClassVar[str] = "pbgd"
    requires: ClassVar[frozenset[str]] = frozenset({"stationary_point"})
    penalty: Schedule = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule("PBGD", "penalty", self.penalty)

    def _inner(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        y: Params,
        state: EstimatorState,
    ) -> InnerSolution:
        return run_inner(problem, inner_solver, inner_params, outer_params, state)

    def _weight(
        self, f: Slopes, slope: Params, slope_outer: Cotangents, gap: float, count: int
    ) -> float:
        return scheduled("PBGD", "penalty", self.penalty, count)

    def _direction(self, f: Tensor, g: Tensor, s: float) -> Tensor:
        return g.add(f, alpha=1.0 / s)
