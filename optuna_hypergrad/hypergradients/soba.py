"""Stochastic bilevel descent in a single loop, with steps that fall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._typing import Params
from ..problem import BilevelProblem
from ._estimate import EstimatorState
from ._single_loop import AbstractSingleLoop, Directions, derivatives, directions


@dataclass(frozen=True)
class SOBA(AbstractSingleLoop):
    """``w <- w - rho g_w;  v <- v - rho (H v - f_w);  lam <- lam - gamma (f_lam - M^T v)``, all at one point.

    Each step sees one batch of each objective (``inner_batch(t)``, ``outer_batch(t)``) and costs two gradients and
    one walk of a double-backward graph. With batches that are noisy, steps of constant length end in a ball
    around the solution; ``rho, gamma ~ t^(-1/2)`` reach it. The paper's algorithm, for noisy batches::

        def falling(t):
            return 0.1 * (1 + t) ** -0.5

        ohg.minimize_bilevel(..., estimator=ohg.SOBA(), inner_solver=ohg.GradientDescent(
            lambda lam, t: falling(t), max_steps=1), optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            lr_lambda=falling)

    with a ``gamma`` that is ``lr * lr_lambda(t)`` of plain ``torch.optim.SGD`` (no momentum; without bounds, so that its
    coordinates are ``lam`` itself).

    Reference: Dagreou, Ablin, Vaiter & Moreau (2022), "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", algorithm 1 and equations 5-7.
    """

    name: ClassVar[str] = "soba"
    requires: ClassVar[frozenset[str]] = frozenset({"second_derivatives"})

    def _directions(
        self,
        problem: BilevelProblem,
        inner_params: Params,
        outer_params: Params,
        v: Tensor,
        step: int,
        count: int,
        state: EstimatorState,
    ) -> Directions:
        seen = derivatives(
            problem, inner_params, outer_params, v, state.inner_index, step, count == 0
        )
        return directions(seen, outer_params, inner_params, type(self).__name__, self.sees)
