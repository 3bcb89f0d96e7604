"""MINRES (Paige & Saunders 1975)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._results import SUCCESS, Result, Status
from ..operators import AbstractLinearOperator
from ._base import AbstractPreconditionedSolver, LinearSolution, check_steps, smallest_residual
from ._preconditioner import AbstractPreconditioner, Inverse

_HOPELESS = 0.5
"""A run that leaves more than this of the true residual has met rounding, not the end of its steps."""

_PLATEAU = 4
"""Steps over which a residual that falls by no more than rounding will not fall."""


@dataclass(frozen=True)
class MINRES(AbstractPreconditionedSolver):
    """The least residual for a symmetric operator, which may be indefinite or singular.

    One product a step, and one more at the end for the true residual; where rounding has let that and
    the recurrence drift apart, a further run begins from there. Memory: eight vectors. If the operator is
    singular and ``b`` lies in its range, then, from ``x0 = None`` and without a preconditioner, ``x`` is
    the solution of least length (the pseudo-inverse's). If ``b`` does not, ``x`` minimizes ``|b - H x|``
    and need not be the shortest such; the residual says so, and so does the failure, where convergence was
    required.

    An indefinite inner Hessian means that the inner problem is not at a minimum: the solution is then the
    derivative of a stationary point.

    Reference: Paige & Saunders (1975), "Solution of sparse indefinite systems of linear equations",
    section 6.

    Args:
        max_steps: At most this many steps in all.
        rtol: Stop when ``|b - H x| <= rtol |b|``.
        require_convergence: Whether stopping above ``rtol`` is a failure. Off by default, as in ``CG``.
        preconditioner: Symmetric positive definite, for an operator that may be indefinite.
    """

    name: ClassVar[str] = "minres"
    requires: ClassVar[frozenset[str]] = frozenset({"symmetric"})
    lowers_residual: ClassVar[bool] = True
    max_steps: int = 1000
    rtol: float = 1e-6
    require_convergence: bool = False
    preconditioner: AbstractPreconditioner | None = None

    def __post_init__(self) -> None:
        check_steps("MINRES", self.max_steps, self.rtol)
        self.check_preconditioner()

    def compute_with(
        self,
        operator: AbstractLinearOperator,
        vector: Tensor,
        x0: Tensor | None,
        inverse: Inverse | None,
    ) -> LinearSolution:
        size = float(torch.linalg.vector_norm(vector))
        target = max(self.rtol, smallest_residual(vector)) * size
        x = torch.zeros_like(vector) if x0 is None else x0.clone()
        r = vector.clone() if x0 is None else vector - operator(x)
        norm, count, least_squares, hopeless = float(torch.linalg.vector_norm(r)), 0, False, False
        while norm > target and count < self.max_steps and not (least_squares or hopeless):
            step, spent, least_squares = _run(operator, r, inverse, self.max_steps - count, target)
            if step is None:
                return LinearSolution(x, norm / size, result=_INDEFINITE_PRECONDITIONER)
            ahead = step.add_(x)
            r = vector - operator(ahead)
            count, before = count + spent, norm
            norm = float(torch.linalg.vector_norm(r))
            hopeless = not norm < _HOPELESS * before
            if norm < before:
                x = ahead
            else:
                norm = before if math.isfinite(norm) else norm
        return LinearSolution(x, norm / size, result=self._judge(norm, target, size, least_squares))

    def _judge(self, norm: float, target: float, size: float, least_squares: bool) -> Result:
        if not math.isfinite(norm):
            return Result(
                Status.NONFINITE,
                "MINRES met NaN or infinite entries in a product; check that the inner objective is twice "
                "differentiable at the inner solution (sqrt, norm and abs at 0 are not).",
            )
        if norm <= target or not self.require_convergence:
            return SUCCESS
        reached = f"at a relative residual of {norm / size:.1e} (asked for {self.rtol:.1e})"
        if least_squares:
            return Result(
                Status.STALLED,
                f"MINRES ended {reached}, which is the least there is but for rounding: the inner Hessian is singular "
                f"or nearly so, and the gradient of the outer objective does not lie in its range, so the inner solution "
                f"has no derivative. Add damping, or regularize the inner objective.",
            )
        return Result(
            Status.MAX_STEPS_REACHED,
            f"MINRES stopped {reached} with max_steps={self.max_steps}; raise max_steps, add damping or a "
            f"preconditioner, or loosen rtol.",
        )


_INDEFINITE_PRECONDITIONER = Result(
    Status.STALLED,
    "MINRES needs a positive definite preconditioner, and r.P(r) was not positive for this one; raise its floor, rho "
    "or damping, or leave it out.",
)


def _run(
    operator: AbstractLinearOperator,
    r: Tensor,
    inverse: Inverse | None,
    max_steps: int,
    target: float,
) -> tuple[Tensor | None, int, bool]:
    """One Lanczos run from the residual ``r``, which is overwritten by what the recurrence makes of it.

    Returns:
        The correction (``None`` for a preconditioner that is not positive definite), the steps taken,
        and whether ``|r|`` has come to rest at its least value above ``target``.
    """
    rounding = 10 * float(torch.finfo(r.dtype).eps)
    r1, r2 = torch.zeros_like(r), r.clone()
    y = r2 if inverse is None else inverse(r2)
    square = float(torch.dot(r2, y))
    if not square > 0:
        return (None if math.isfinite(square) else y), 0, False
    beta = phibar = math.sqrt(square)
    beta_before = dbar = epsilon = spread = 0.0
    cs, sn, norms = -1.0, 0.0, [phibar]
    x, w, w_before = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
    for count in range(1, max_steps + 1):
        v = y / beta
        y = operator(v).clone()
        if count > 1:
            y.sub_(r1, alpha=beta / beta_before)
        alpha = float(torch.dot(v, y))
        y.sub_(r2, alpha=alpha / beta)
        r1, r2 = r2, y
        y = r2 if inverse is None else inverse(r2)
        beta_before, square = beta, float(torch.dot(r2, y))
        spread = max(spread, abs(alpha), beta_before * (count > 1))
        if square < 0:
            return None, count, False
        beta = math.sqrt(square) if math.isfinite(square) else math.nan
        last = beta <= rounding * spread  # the space is invariant
        beta = 0.0 if last else beta
        # QR of the tridiagonal matrix by the rotations (cs, sn)
        delta, gbar = cs * dbar + sn * alpha, sn * dbar - cs * alpha
        epsilon_before, epsilon, dbar = epsilon, sn * beta, -cs * beta
        if math.hypot(gbar, dbar) <= rounding * spread:  # |H r| / |r|
            return x, count, True
        gamma = math.hypot(gbar, beta)
        cs, sn = gbar / gamma, beta / gamma
        phi, phibar = cs * phibar, sn * phibar
        w_before, w = w, (v - epsilon_before * w_before - delta * w) / gamma
        if sn > 0.999 and gamma < 1e-3 * spread and count > 1:
            growth = float(torch.linalg.vector_norm(w) / torch.linalg.vector_norm(x))
            if abs(phi) * growth > rounding**-0.5:  # along the null space, for next to nothing
                return x, count, True
        x.add_(w, alpha=phi)
        if last:
            return x, count, False
        norms.append(phibar)
        if len(norms) > _PLATEAU and norms[-1] >= (1 - rounding) * norms[-1 - _PLATEAU]:
            return x, count, True
        r.mul_(sn * sn).sub_(r2, alpha=phibar * cs / beta)
        if not float(torch.linalg.vector_norm(r)) > target:
            return x, count, False
    return x, max_steps, False
