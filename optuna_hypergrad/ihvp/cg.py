"""Conjugate gradients (Hestenes & Stiefel 1952)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._errors import RequirementError
from .._results import SUCCESS, Result, Status
from ..operators import AbstractLinearOperator
from ._base import (
    AbstractPreconditionedSolver,
    LinearSolution,
    TracedSolution,
    Vector,
    inner,
    smallest_residual,
)
from ._preconditioner import AbstractPreconditioner, Inverse
from .direct import solve_positive_definite


@dataclass(frozen=True)
class CG(AbstractPreconditionedSolver):
    """Conjugate gradients for a symmetric positive definite operator.

    With a preconditioner the residual that ends the solve is still ``b - H x`` itself.

    Reference: Hestenes & Stiefel (1952); for hypergradients Pedregosa (2016), "Hyperparameter
    optimization with approximate gradient", algorithm 1; preconditioned as in Golub & Van Loan (2013),
    "Matrix computations", algorithm 11.5.1.

    Args:
        max_steps: At most this many products.
        rtol: Stop when ``|b - H x| <= rtol |b|``. 0 for exactly ``max_steps`` products.
        require_convergence: Whether stopping at ``max_steps`` above ``rtol`` is a failure. Off by
            default: a truncated solve is the usual compromise, and its residual is reported.
        factorize_up_to: For so many unknowns ``P`` at most, a solve that has not converged after
            ``P // 4`` products tries the factorized matrix (``P`` more, done together) before it goes
            on. 0 for never; compiled solves never do.
        preconditioner: For fewer steps where the spectrum is wide; compiled solves take none.
    """

    name: ClassVar[str] = "cg"
    requires: ClassVar[frozenset[str]] = frozenset({"symmetric"})
    max_steps: int = 1000
    rtol: float = 1e-6
    require_convergence: bool = False
    factorize_up_to: int = 0
    preconditioner: AbstractPreconditioner | None = None

    def __post_init__(self) -> None:
        counts = self.max_steps, self.factorize_up_to
        if any(type(n) is not int for n in counts) or counts[0] < 1 or counts[1] < 0:
            raise ValueError(
                "CG needs integers max_steps >= 1 and factorize_up_to >= 0, got "
                f"{self.max_steps!r}, {self.factorize_up_to!r}."
            )
        if not 0 <= self.rtol < 1:
            raise ValueError(f"CG needs 0 <= rtol < 1, got {self.rtol!r}.")
        self.check_preconditioner()

    def compute_with(
        self,
        operator: AbstractLinearOperator,
        vector: Tensor,
        x0: Tensor | None,
        inverse: Inverse | None,
    ) -> LinearSolution:
        bb = float(torch.dot(vector, vector))
        target = max(self.rtol, smallest_residual(vector)) ** 2 * bb
        factorized_at = operator.size // 4 if operator.size <= self.factorize_up_to else None
        b = vector if factorized_at is None else vector.clone()
        if x0 is None:
            x, r, rr = torch.zeros_like(vector), vector, bb
        else:
            x = x0.clone()
            r = vector.sub_(operator(x))
            rr = float(torch.dot(r, r))
        z = r if inverse is None else inverse(r)
        rz = rr if inverse is None else float(torch.dot(r, z))
        p, memory = z.clone(), operator.workspace()
        result = SUCCESS
        for count in range(self.max_steps):
            if rr <= target:
                break
            if not rz > 0:
                result = _no_preconditioner(rz)
                break
            if count == factorized_at:
                direct = solve_positive_definite(operator, b, self.factorize_up_to)
                if direct is not None:
                    return direct
            hp = operator(p, memory)
            curvature = float(torch.dot(p, hp))
            if not curvature > 0:
                result = _no_descent(curvature / float(torch.dot(p, p)))
                break
            alpha = rz / curvature
            x.add_(p, alpha=alpha)
            r.sub_(hp, alpha=alpha)
            del hp
            rr = float(torch.dot(r, r))
            z = r if inverse is None else inverse(r)
            rz, before = rr if inverse is None else float(torch.dot(r, z)), rz
            torch.add(z, p, alpha=rz / before, out=p)
        residual = math.sqrt(rr / bb)
        if result and not rr <= target:
            result = self._unconverged(residual)
        return LinearSolution(x, residual, result=result)

    def traced(
        self, product: Callable[[Vector], Vector], vector: Vector, alpha: Tensor
    ) -> TracedSolution:
        if self.preconditioner is not None:
            raise RequirementError(
                "CG with a preconditioner cannot be compiled; use Implicit(compile=False), or CG without one."
            )
        bb = inner(vector, vector)
        target = max(self.rtol, smallest_residual(vector[0])) ** 2 * bb
        x, r, p, rr, pp = [torch.zeros_like(b) for b in vector], vector, vector, bb, bb
        least = torch.full_like(bb, torch.inf)
        for _ in range(self.max_steps):
            hp = product(p)
            curvature = inner(p, hp)
            going = (rr > target) & (least > 0)
            least = torch.where(going, torch.minimum(least, curvature / pp), least)
            going = going & (least > 0)
            step = torch.where(going, rr / curvature, torch.zeros_like(rr))
            x = [a + step * b for a, b in zip(x, p, strict=True)]
            r = [a - step * b for a, b in zip(r, hp, strict=True)]
            rr_next = torch.where(going, inner(r, r), rr)
            ratio = torch.where(going, rr_next / rr, torch.ones_like(rr))
            p = [a + ratio * b for a, b in zip(r, p, strict=True)]
            rr, pp = rr_next, rr_next + ratio**2 * pp  # r and the last p are orthogonal
        return TracedSolution(x, (rr / bb).sqrt(), least)

    def num_traced_products(self) -> int:
        return self.max_steps

    def traced_verdict(self, solution: LinearSolution, least_curvature: float) -> Result:
        if not least_curvature > 0:
            return _no_descent(least_curvature)
        if solution.residual > self.rtol:
            return self._unconverged(solution.residual)
        return SUCCESS

    def _unconverged(self, residual: float) -> Result:
        if not self.require_convergence:
            return SUCCESS
        return Result(
            Status.MAX_STEPS_REACHED,
            f"CG stopped after {self.max_steps} products at a relative residual of {residual:.1e} "
            f"(asked for {self.rtol:.1e}); raise max_steps, add damping, or loosen rtol.",
        )


def _no_preconditioner(value: float) -> Result:
    if math.isnan(value):
        return Result(
            Status.NONFINITE,
            "CG's preconditioner gave NaN; raise its floor, rho or damping, or leave it out.",
        )
    return Result(
        Status.STALLED,
        f"CG needs a positive definite preconditioner, and r.P(r) is {value:.1e} for this one; raise its floor, rho or "
        f"damping, or leave it out.",
    )


def _no_descent(value: float) -> Result:
    if math.isnan(value):
        return Result(
            Status.NONFINITE,
            "CG met NaN in a product with the inner Hessian; check that the inner objective is twice "
            "differentiable at the inner solution (sqrt, norm and abs at 0 are not).",
        )
    return Result(
        Status.NEGATIVE_CURVATURE,
        f"CG met a direction of curvature {value:.2e}: the inner Hessian is not positive definite here. "
        f"Add damping of at least {max(-value, 0.0) + 1e-6:.1e}, solve the inner problem further, or use "
        f"the GaussNewton curvature.",
    )
