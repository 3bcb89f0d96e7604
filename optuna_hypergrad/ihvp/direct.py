"""Dense solve: the reference for small inner problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._results import Result, Status
from ..dense import cholesky, dense
from ..operators import AbstractLinearOperator
from ._base import AbstractLinearSolver, LinearSolution


def solve_positive_definite(
    operator: AbstractLinearOperator, vector: Tensor, max_size: int
) -> LinearSolution | None:
    """By Cholesky's factorization of the whole matrix, in float64; ``None`` if there is none.

    The residual is at the level of rounding (a normwise backward error of ``P eps`` at most), and true:
    that which CG's recurrence reports may be smaller and is not reached.

    Raises:
        RequirementError: if ``P > max_size``.
    """
    found = cholesky(operator, max_size)
    if found is None:
        return None
    matrix, factor = found
    b = vector.to(matrix)[:, None]
    x = torch.cholesky_solve(b, factor)
    x += torch.cholesky_solve(b - matrix @ x, factor)
    size = float(torch.linalg.vector_norm(b))
    residual = float(torch.linalg.vector_norm(b - matrix @ x))
    rounding = float(torch.linalg.matrix_norm(matrix) * torch.linalg.vector_norm(x)) + size
    if not residual <= len(b) * torch.finfo(matrix.dtype).eps * rounding:
        return None
    return LinearSolution(x[:, 0].to(vector.dtype), residual / size)


@dataclass(frozen=True)
class Direct(AbstractLinearSolver):
    """Build the matrix with ``P`` products, then factorize it (LU; any invertible operator).

    Reference: Larsen, Hansen, Svarer & Ohlsson (1996), "Design and regularization of neural networks:
    the optimal use of a validation set", who inverted the Hessian itself.

    Args:
        max_size: Refuse more inner parameters than this; ``P^2`` numbers are stored.
    """

    name: ClassVar[str] = "direct"
    max_size: int = 4096

    def compute(
        self, operator: AbstractLinearOperator, vector: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        matrix = dense(operator, self.max_size)
        x, info = torch.linalg.solve_ex(matrix, vector)
        if int(info) == 0:
            residual = float(torch.linalg.vector_norm(vector - matrix @ x)) / float(
                torch.linalg.vector_norm(vector)
            )
            if residual < float(torch.finfo(vector.dtype).eps) ** 0.5:
                return LinearSolution(x, residual)
        return LinearSolution(
            torch.zeros_like(vector),
            1.0,
            result=Result(
                Status.STALLED,
                "Direct: the inner Hessian is singular, so the inner solution is not unique and has no "
                "derivative. Add damping, or regularize the inner objective.",
            ),
        )
