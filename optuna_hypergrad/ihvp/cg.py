"""Conjugate gradients (Hestenes & Stiefel 1952)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._results import SUCCESS, Result, Status
from ..operators import AbstractLinearOperator
from ._base import AbstractLinearSolver, LinearSolution


@dataclass(frozen=True)
class CG(AbstractLinearSolver):
    """Conjugate gradients for a symmetric positive definite operator.

    Reference: Hestenes & Stiefel (1952); for hypergradients Pedregosa (2016), "Hyperparameter
    optimization with approximate gradient", algorithm 1.

    Args:
        max_steps: At most this many products.
        rtol: Stop when ``|b - H x| <= rtol |b|``. 0 for exactly ``max_steps`` products.
        require_convergence: Whether stopping at ``max_steps`` above ``rtol`` is a failure. Off by
            default: a truncated solve is the usual compromise, and its residual is reported.
    """

    name: ClassVar[str] = "cg"
    requires: ClassVar[frozenset[str]] = frozenset({"symmetric"})
    max_steps: int = 100
    rtol: float = 1e-8
    require_convergence: bool = False

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.rtol < 0:
            raise ValueError(
                f"CG needs max_steps >= 1 and rtol >= 0, got {self.max_steps}, {self.rtol}."
            )

    def compute(
        self, operator: AbstractLinearOperator, vector: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        bb = torch.dot(vector, vector)
        target = max(self.rtol, _smallest_residual(vector)) ** 2 * bb
        if x0 is None:
            x, r, rr = torch.zeros_like(vector), vector, bb
        else:
            x = x0.clone()
            r = vector.sub_(operator(x))
            rr = torch.dot(r, r)
        p = r.clone()
        result = SUCCESS
        for _ in range(self.max_steps):
            if rr <= target:
                break
            hp = operator(p)
            curvature = torch.dot(p, hp)
            if not curvature > 0:
                result = _no_descent(curvature, p, operator)
                break
            alpha = rr / curvature
            x.addcmul_(p, alpha)
            r.addcmul_(hp, alpha, value=-1)
            rr_next = torch.dot(r, r)
            p.mul_(rr_next / rr).add_(r)
            rr = rr_next
            del hp
        residual = float((rr / bb).sqrt())
        if result and self.require_convergence and not rr <= target:
            result = Result(
                Status.MAX_STEPS_REACHED,
                f"CG stopped after {self.max_steps} products at a relative residual of {residual:.1e} "
                f"(asked for {self.rtol:.1e}); raise max_steps, add damping, or loosen rtol.",
            )
        return LinearSolution(x, residual, result=result)


def _smallest_residual(vector: Tensor) -> float:
    """Below this, the recurrence holds rounding errors only, and 0 / 0 is near."""
    return float(torch.finfo(vector.dtype).eps) * 1e-2


def _no_descent(curvature: Tensor, p: Tensor, operator: AbstractLinearOperator) -> Result:
    value = float(curvature / torch.dot(p, p))
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
