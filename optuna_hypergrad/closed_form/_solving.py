"""Two linear solves that are factorized once: their gradients, of any order, use the factor of the forward pass.

Plain autograd through ``torch.linalg.cholesky`` factorizes once as well, but goes back through the factor, which
takes more operations than the factorization (two triangular solves with whole matrices). Here a backward pass is one
solve with as many columns as the forward pass has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._errors import RequirementError, SolverError


def positive_solve(matrix: Tensor, rhs: Tensor, what: str) -> Tensor:
    """``matrix^-1 rhs`` for symmetric positive definite matrices; differentiable any number of times.

    Args:
        matrix: ``(..., p, p)``.
        rhs: ``(..., p, k)``; leading dimensions broadcast.
        what: Names the system in errors.

    Raises:
        SolverError: if a matrix is singular to rounding.
    """
    factor = factorized(matrix.detach(), what)
    return _PositiveSolve.apply(matrix, rhs, factor)  # type: ignore[no-untyped-call, no-any-return]


def weighted_solve(kernel: Tensor, weights: Tensor, rhs: Tensor, what: str) -> Tensor:
    """``(I + K S)^-1 rhs`` with ``S = diag(weights)``; differentiable any number of times, also at weights of zero.

    What is factorized is ``I + S^1/2 K S^1/2``, whose eigenvalues are at least one.

    Args:
        kernel: ``K``, ``(..., n, n)``, symmetric and positive semidefinite.
        weights: ``(..., n)``, not negative.
        rhs: ``(..., n, k)``; leading dimensions broadcast.
        what: Names the system in errors.

    Raises:
        SolverError: if a matrix is singular to rounding.
    """
    root = weights.detach().sqrt()
    matrix = root.unsqueeze(-1) * kernel.detach() * root.unsqueeze(-2)
    matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor = factorized(matrix, what)
    return _WeightedSolve.apply(  # type: ignore[no-untyped-call, no-any-return]
        kernel, weights, rhs, factor, False
    )


def residuals(
    multiply: Callable[[Tensor], Tensor], weights: Tensor, rhs: Tensor, factor: Tensor
) -> Tensor:
    """``(I + K S)^-1 rhs`` given the factor of ``I + S^1/2 K S^1/2`` and products with ``K``; without a graph."""
    root = weights.sqrt().unsqueeze(-1)
    solved = torch.cholesky_solve(root * rhs, factor)
    absent = root == 0
    if not bool(absent.any()):
        return solved / root
    return torch.where(absent, rhs - multiply(root * solved), solved / root)


def common_shape(*shapes: Sequence[int]) -> torch.Size:
    """The shape that all of these broadcast to."""
    return torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call, no-any-return]


def factorized(matrix: Tensor, what: str) -> Tensor:
    """The Cholesky factor; a pivot that rounding has eaten up is no pivot."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    size = matrix.diagonal(dim1=-2, dim2=-1)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    refuse_lost_pivots(info.any(), size, pivots, what, matrix.dtype)
    return factor  # type: ignore[no-any-return]


def refuse_lost_pivots(
    failed: Any, size: Any, pivots: Any, what: str, dtype: torch.dtype = torch.float64
) -> None:
    """Refuse a Cholesky factor that rounding has eaten up.

    Args:
        failed: Whether it could not be computed.
        size: The diagonal of the matrix, ``(..., n)``, a tensor or an array.
        pivots: The squared diagonal of the factor.
        what: The system, for an error.
        dtype: Of both.

    Raises:
        SolverError: naming the penalty that would do.
    """
    lost = 10 * size.shape[-1] ** 0.5 * torch.finfo(dtype).eps  # as rounding errors add up
    # pivot / diagonal is what is new in a column beside the columns before it, whatever its scale
    if not failed and bool((pivots > lost * size).all()):
        return
    other = "" if dtype == torch.float64 else " Or use float64."
    raise SolverError(
        f"The linear system of {what} is singular to rounding in {dtype}: its penalty is lost beside the "
        f"data, of size up to {float(abs(size).max()):.1e}. Raise the penalty (the lower bound of a "
        f"hyperparameter) above about {lost:.0e} times that, or take out columns that repeat others.{other}"
    )


def no_forward_mode(ctx: Any, *tangents: Any) -> Tensor:
    """The ``jvp`` of these functions: torch's own words name nothing that a caller knows.

    Raises:
        RequirementError: always.
    """
    raise RequirementError(
        "A closed form was asked for a derivative in forward mode (torch.func.jvp, torch.autograd.forward_ad, BROS), and "
        "has derivatives in reverse mode only, of any order. Use torch.autograd.grad or torch.func.vjp; in place of BROS "
        "use MASOBA, and for tangents along inner steps ForwardMode, which take no more than those."
    )


def rows_as_columns(
    function: type[torch.autograd.Function],
    sides: Sequence[int],
    info: Any,
    in_dims: Sequence[int | None],
    given: Sequence[Any],
) -> tuple[Any, Any]:
    """The ``vmap`` of these functions: rows of right-hand sides are further columns of one solve with one factor.

    Args:
        function: Whose results have the columns of its right-hand sides.
        sides: Which arguments those are, ``(..., n, k)``.
        info, in_dims, given: As torch calls ``vmap``.

    Raises:
        RequirementError: if there are rows of anything else.
    """
    if any(d is not None for i, d in enumerate(in_dims) if i not in sides):
        raise RequirementError(
            "torch.func.vmap was to solve a closed form for rows of its data, weights or penalties. Give them as leading "
            "dimensions, which closed forms take."
        )
    rows, columns = info.batch_size, list(given)
    for i in sides:
        v, d = given[i], in_dims[i]
        last = v.unsqueeze(-1).expand(*v.shape, rows) if d is None else v.movedim(d, -1)
        columns[i] = last.flatten(-2)
    found = function.apply(*columns)  # type: ignore[no-untyped-call]
    results = (found,) if isinstance(found, Tensor) else found
    split = tuple(t.reshape(*t.shape[:-1], -1, rows) for t in results)
    return (split[0], -1) if isinstance(found, Tensor) else (split, (-1,) * len(split))


class _PositiveSolve(torch.autograd.Function):
    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(matrix: Tensor, rhs: Tensor, factor: Tensor) -> Tensor:
        batch = common_shape(factor.shape[:-2], rhs.shape[:-2])
        return torch.cholesky_solve(rhs.expand(*batch, *rhs.shape[-2:]), factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        matrix, rhs, factor = inputs
        ctx.save_for_backward(matrix, output, factor)
        ctx.rhs_shape = rhs.shape

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        matrix, found, factor = ctx.saved_tensors
        pulled = _PositiveSolve.apply(matrix, slope, factor)  # type: ignore[no-untyped-call]
        by_matrix = None
        if ctx.needs_input_grad[0]:
            by_matrix = (-pulled @ found.mT).sum_to_size(matrix.shape)
        return by_matrix, pulled.sum_to_size(ctx.rhs_shape), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        return rows_as_columns(_PositiveSolve, (1,), info, in_dims, given)


class _WeightedSolve(torch.autograd.Function):
    """With ``M = I + K S``: ``M^-1 T``, or ``M^-T T``. ``R = S^1/2``, ``C = (I + R K R)^-1``."""

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(
        kernel: Tensor, weights: Tensor, rhs: Tensor, factor: Tensor, transposed: bool
    ) -> Tensor:
        root = weights.sqrt().unsqueeze(-1)
        batch = common_shape(factor.shape[:-2], rhs.shape[:-2])
        wide = rhs.expand(*batch, *rhs.shape[-2:])
        absent = root == 0
        some_absent = bool(absent.any())
        if (
            transposed
        ):  # R C R^-1 on samples that have a weight; those without one are only passed on
            given = wide / root
            if some_absent:
                given = given - root * (kernel @ torch.where(absent, wide, 0.0))
                given = torch.where(absent, 0.0, given)
            found = root * torch.cholesky_solve(given, factor)
            if some_absent:
                found = torch.where(absent, wide, found)
        else:
            found = residuals(lambda v: kernel @ v, weights, wide, factor)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        kernel, weights, rhs, factor, transposed = inputs
        ctx.save_for_backward(kernel, weights, output, factor)
        ctx.rhs_shape, ctx.transposed = rhs.shape, transposed

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        kernel, weights, found, factor = ctx.saved_tensors
        pulled = _WeightedSolve.apply(  # type: ignore[no-untyped-call]
            kernel, weights, slope, factor, not ctx.transposed
        )
        left, right = (found, pulled) if ctx.transposed else (pulled, found)
        # M differs by dK S + K dS, and right is what M^-1 was applied to last
        by_kernel = by_weights = None
        if ctx.needs_input_grad[0]:
            by_kernel = (-left @ (weights.unsqueeze(-1) * right).mT).sum_to_size(kernel.shape)
        if ctx.needs_input_grad[1]:
            by_weights = -((kernel @ left) * right).sum(-1).sum_to_size(weights.shape)
        return by_kernel, by_weights, pulled.sum_to_size(ctx.rhs_shape), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        return rows_as_columns(_WeightedSolve, (2,), info, in_dims, given)
