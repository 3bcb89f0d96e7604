"""Small operators as matrices, and their Cholesky factors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _tree
from ._errors import RequirementError
from .operators import AbstractLinearOperator

_COLUMNS = 32
"""Columns of a dense matrix that are computed at once: each takes the activations' memory again."""


def dense(operator: AbstractLinearOperator, max_size: int) -> Tensor:
    """The matrix ``(P, P)`` of an operator, a few columns at a time.

    Raises:
        RequirementError: if ``P > max_size``.
    """
    if operator.size > max_size:
        raise RequirementError(
            f"The inner problem has {operator.size} parameters; a dense matrix is refused above "
            f"{max_size}. Use CG or Neumann, or raise max_size."
        )
    identity = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    return torch.cat(
        [operator.many(rows) for rows in torch.chunk(identity, -(-operator.size // _COLUMNS))]
    ).mT


def cholesky(operator: AbstractLinearOperator, max_size: int) -> tuple[Tensor, Tensor] | None:
    """The matrix of a symmetric operator and its Cholesky factor; ``None`` if not positive definite.

    In float64 whatever the operator's dtype, where the device has it. "Positive definite" is beyond what
    rounding in the operator's dtype leaves of a zero eigenvalue: factorized, a singular matrix would give
    huge solutions without a complaint.

    Raises:
        RequirementError: if ``P > max_size``.
    """
    matrix = dense(operator, max_size)
    if matrix.device.type != "mps":
        matrix = matrix.double()
    factor, info = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.mT))
    if int(info) or not _tree.finite(factor):
        return None
    rounding = 10 * float(torch.finfo(operator.dtype).eps)
    rounding = max(rounding, len(matrix) * float(torch.finfo(matrix.dtype).eps))
    if _least_eigenvalue(factor) <= rounding * float(torch.linalg.matrix_norm(matrix)):
        return None
    return matrix, factor


def _least_eigenvalue(factor: Tensor, num_steps: int = 4) -> float:
    """Of ``factor @ factor.T``, from above, by inverse iteration from a fixed start."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(factor), 1, generator=generator, device="cpu", dtype=torch.float32).to(
        factor
    )
    size = torch.linalg.vector_norm(v)
    for _ in range(num_steps):
        v = torch.cholesky_solve(v / size, factor)
        size = torch.linalg.vector_norm(v)
    return 1.0 / float(size)
