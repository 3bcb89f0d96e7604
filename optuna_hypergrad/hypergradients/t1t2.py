"""The identity in place of the inverse Hessian (T1-T2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .._arguments import is_number
from .._errors import RequirementError
from .._typing import Params
from ..ihvp import Identity
from ..inner import AbstractInnerSolver, GradientDescent, HeavyBall
from ..problem import BilevelProblem
from ._base import AbstractPullbackEstimator, refuse_solver_hyperparameters, sees_objectives
from ._estimate import EstimatorState, Solved
from .implicit import Implicit


@dataclass(frozen=True)
class T1T2(AbstractPullbackEstimator):
    """``d_lam = f_lam - eta M^T f_w``: the gradient through one inner step, taken where the inner solver has arrived.

    The same as ``Implicit(Identity(eta))``, and as ``Implicit(Neumann(0, alpha=eta))``. No products with the Hessian: the
    cheapest estimator there is, and a biased one. What comes out is right in sign and relative size along directions of
    equal curvature only; its scale is that of ``eta``, so that outer steps have to be tuned along with it. Where
    the direct term counts, too, a wrong ``eta`` is a wrong direction.

    Cost: the inner solve, then 2 gradient evaluations and one mixed product.

    Reference: Luketina, Berglund, Greff & Raiko (2016), "Scalable gradient-based tuning of continuous regularization
    hyperparameters"; its T1 and T2 are the training and the validation set.

    Args:
        step_size: ``eta``; ``None`` for that of the inner solver, where it is one number for all directions
            (``GradientDescent``, ``HeavyBall``).
    """

    name: ClassVar[str] = "t1t2"
    requires: ClassVar[frozenset[str]] = frozenset({"second_derivatives"})
    sees: ClassVar[str] = sees_objectives("T1T2")

    step_size: float | None = None

    def __post_init__(self) -> None:
        eta = self.step_size
        if not (eta is None or (is_number(eta) and 0 < eta < math.inf)):
            raise ValueError(f"T1T2 needs a finite step_size > 0, or None, got {eta!r:.80}.")

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        refuse_solver_hyperparameters("T1T2", inner_solver, outer_params)
        self._implicit(inner_solver)

    def solve(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        state: EstimatorState | None = None,
    ) -> Solved:
        refuse_solver_hyperparameters("T1T2", inner_solver, outer_params)
        implicit = self._implicit(inner_solver)
        return implicit.solve(problem, inner_solver, inner_params, outer_params, state)

    def _implicit(self, inner_solver: AbstractInnerSolver | None) -> Implicit:
        eta = self.step_size
        if eta is None and isinstance(inner_solver, GradientDescent | HeavyBall):
            eta = inner_solver.fixed_step_size()
        if eta is None:
            has = (
                "no inner solver was given"
                if inner_solver is None
                else f"{type(inner_solver).__name__} has not one fixed step size for all directions"
            )
            raise RequirementError(
                f"T1T2 takes the step size of the inner solver, and {has}; give T1T2(step_size=...) a number of about "
                f"1 over a typical eigenvalue of the inner Hessian. With Adam, SAMA() is adapted to its step."
            )
        return Implicit(Identity(float(eta)))
