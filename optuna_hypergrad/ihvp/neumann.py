"""Truncated Neumann series (Lorraine, Vicol & Duvenaud 2020, algorithm 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._results import SUCCESS, Result, Status
from ..curvature import largest_eigenvalue
from ..operators import AbstractLinearOperator
from ._base import AbstractLinearSolver, LinearSolution, TracedSolution, Vector, inner


@dataclass(frozen=True)
class Neumann(AbstractLinearSolver):
    """``x = alpha * sum_{j=0..K} (I - alpha H)^j b``.

    It equals backpropagation through ``K + 1`` gradient steps of length ``alpha`` from the inner
    solution. Converges if and only if ``0 < alpha < 2 / lambda_max``; the error contracts as
    ``(1 - alpha mu)^(K+1)``.

    Reference: Lorraine, Vicol & Duvenaud (2020), "Optimizing millions of hyperparameters by implicit
    differentiation", algorithm 3.

    Args:
        num_steps: ``K``, the number of products. 0 is the identity scaled by ``alpha`` (T1-T2).
        alpha: Step length; ``"lanczos"`` for ``1 / lambda_max``, estimated with ``num_probes`` further
            products; ``"inner_lr"`` for the inner solver's step size (valid for plain gradient descent).
        num_probes: Lanczos products for ``alpha="lanczos"``.
    """

    name: ClassVar[str] = "neumann"
    num_steps: int = 20
    alpha: float | str = "lanczos"
    num_probes: int = 10

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise ValueError(f"Neumann needs num_steps >= 0, got {self.num_steps}.")
        if isinstance(self.alpha, str):
            if self.alpha not in ("lanczos", "inner_lr"):
                raise ValueError(
                    f"Neumann: alpha={self.alpha!r} is neither a number, 'lanczos' nor 'inner_lr'."
                )
        elif not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"Neumann needs a positive finite alpha, got {self.alpha}.")

    def compute(
        self, operator: AbstractLinearOperator, vector: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        alpha, curvature, failure = self.step_length(operator, vector)
        if failure is not None:
            return LinearSolution(torch.zeros_like(vector), math.nan, result=failure)
        bb = torch.dot(vector, vector)
        v = vector if x0 is None else vector - operator(x0)
        start = torch.dot(v, v)
        total, memory = v.clone(), operator.workspace()
        for _ in range(self.num_steps):
            v.sub_(operator(v, memory), alpha=alpha)
            total += v
        residual = float((torch.dot(v, v) / bb).sqrt())
        x = total.mul_(alpha) if x0 is None else total.mul_(alpha).add_(x0)
        growth = residual / float((start / bb).sqrt())
        return LinearSolution(x, residual, result=self._judge(growth, alpha), curvature=curvature)

    def traced(
        self, product: Callable[[Vector], Vector], vector: Vector, alpha: Tensor
    ) -> TracedSolution:
        v = total = vector
        for _ in range(self.num_steps):
            v = [a - alpha * b for a, b in zip(v, product(v), strict=True)]
            total = [a + b for a, b in zip(total, v, strict=True)]
        residual = (inner(v, v) / inner(vector, vector)).sqrt()
        return TracedSolution(
            [alpha * t for t in total], residual, torch.full_like(residual, torch.inf)
        )

    def num_traced_products(self) -> int:
        return self.num_steps

    def fixed_alpha(self) -> float | None:
        return None if isinstance(self.alpha, str) else self.alpha

    def traced_verdict(self, solution: LinearSolution, least_curvature: float) -> Result:
        return self._judge(solution.residual, math.nan)

    def step_length(
        self, operator: AbstractLinearOperator, like: Tensor
    ) -> tuple[float, float, Result | None]:
        if self.alpha == "lanczos":
            curvature = largest_eigenvalue(operator, like, self.num_probes)
            if curvature > 0:
                return 1.0 / curvature, curvature, None
            return (
                math.nan,
                curvature,
                Result(
                    Status.NEGATIVE_CURVATURE,
                    f"Neumann: the largest eigenvalue of the inner Hessian is about {curvature:.1e}, "
                    f"so no step length converges; add damping or solve the inner problem further.",
                ),
            )
        if isinstance(self.alpha, str):
            raise ValueError(
                "Neumann: alpha='inner_lr' has to be resolved from an inner solver with a fixed step size; "
                "pass the inner solver to the estimator, or give alpha a number."
            )
        return self.alpha, math.nan, None

    def _judge(self, growth: float, alpha: float) -> Result:
        if growth <= 1.0001:
            return SUCCESS
        return Result(
            Status.DIVERGED,
            f"The Neumann series grew by a factor of {growth:.1e} over {self.num_steps} terms at "
            f"alpha={self.alpha if math.isnan(alpha) else alpha}: it converges only for alpha < 2 / lambda_max and "
            f"a positive semidefinite inner Hessian. Lower alpha, use alpha='lanczos', or add damping.",
        )
