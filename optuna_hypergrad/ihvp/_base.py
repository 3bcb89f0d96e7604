"""Solving ``H x = b`` with products only. One loop driver, ``linear_solve``; one file per method."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .._errors import RequirementError
from .._results import SUCCESS, Result, Status
from ..operators import AbstractLinearOperator


@dataclass(frozen=True)
class LinearSolution:
    """What a linear solve found.

    Attributes:
        x: ``(P,)``.
        residual: ``|b - H x| / |b|`` as the method knows it; NaN where it does not.
        num_products: Products with ``H``, those spent on estimating step sizes included.
        result: Success, or a sentence that says what to change.
        curvature: Estimate of the largest eigenvalue, where one was made.
    """

    x: Tensor
    residual: float
    num_products: int = 0
    result: Result = SUCCESS
    curvature: float = math.nan


class AbstractLinearSolver(abc.ABC):
    """Settings of a method for ``H x = b``. Frozen; state lives in ``compute``'s locals."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def compute(
        self, operator: AbstractLinearOperator, vector: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        """``x ~ H^-1 vector`` for a finite, non-zero ``vector`` of shape ``(P,)``, which it may overwrite."""


def linear_solve(
    solver: AbstractLinearSolver,
    operator: AbstractLinearOperator,
    vector: Tensor,
    x0: Tensor | None = None,
    *,
    overwrite_vector: bool = False,
    throw: bool = True,
) -> LinearSolution:
    """Solve ``H x = vector``: checks, counts and verdict are made here, for every method.

    Args:
        solver: The method.
        operator: ``H``, acting on ``(P,)``.
        vector: ``b``, shape ``(P,)``.
        x0: First guess, or ``None`` for zero.
        overwrite_vector: Let the method use the memory of ``vector``.
        throw: Raise on failure; otherwise the failure is in ``result``.

    Raises:
        RequirementError: if the method cannot be used on this operator.
        SolverError: if it failed and ``throw`` is set.
    """
    if vector.shape != (operator.size,):
        raise RequirementError(
            f"{solver.name}: the right-hand side has shape {tuple(vector.shape)}, the operator acts on ({operator.size},)."
        )
    if "symmetric" in solver.requires and not operator.symmetric:
        raise RequirementError(
            f"{solver.name} needs a symmetric operator, and this one is not. Use Direct, or Neumann "
            f"if its spectral radius allows."
        )
    before = operator.num_products
    if not bool(torch.isfinite(vector).all()):
        solution = LinearSolution(
            torch.zeros_like(vector),
            math.nan,
            result=Result(
                Status.NONFINITE,
                "The gradient of the outer objective holds NaN or infinite entries; "
                "check the outer loss at the inner solution.",
            ),
        )
    elif not bool(vector.any()):
        solution = LinearSolution(torch.zeros_like(vector), 0.0)
    else:
        solution = solver.compute(operator, vector if overwrite_vector else vector.clone(), x0)
        if solution.result.success and not bool(torch.isfinite(solution.x).all()):
            solution = replace(
                solution,
                result=Result(
                    Status.NONFINITE,
                    f"{solver.name} met NaN or infinite values; check the inner loss at the inner solution, "
                    f"or add damping.",
                ),
            )
    solution = replace(solution, num_products=operator.num_products - before)
    if throw:
        solution.result.raise_if_failed()
    return solution
