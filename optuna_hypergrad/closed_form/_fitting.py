"""Ridge regression in one differentiable step, whichever of its two systems is solved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._solving import common_shape, factorized, no_forward_mode, residuals, rows_as_columns


def ridge_fit(x: Tensor, y: Tensor, weights: Tensor, penalty: Tensor, what: str) -> Tensor:
    """``w = (X^T S X + D)^-1 X^T S y``, ``S = diag(weights)``, ``D = diag(penalty)``; without an intercept.

    What is factorized is that matrix, or ``I + S^1/2 X D^-1 X^T S^1/2`` where that is smaller. Gradients to all
    arguments take one more solve with the factor and products with ``X``, ``O(n p k)``; so do theirs.

    Args:
        x: ``(..., n, p)``.
        y: ``(..., n, k)``.
        weights: ``(..., n)``, not negative.
        penalty: ``(..., p)``, positive.
        what: Names the system in errors.

    Raises:
        SolverError: if the system is singular to rounding.
    """
    n, p = x.shape[-2:]
    dual = n < p
    with torch.no_grad():
        if dual:
            root = weights.sqrt().unsqueeze(-1)
            matrix = (root * x / penalty.unsqueeze(-2)) @ (root * x).mT
            matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
        else:
            matrix = normal_matrix(x, weights, penalty)
    factor = factorized(matrix.detach(), what)
    nothing = y.new_zeros(p, y.shape[-1])
    w: Tensor = _Fit.apply(x, weights, penalty, y, nothing, factor, dual)[0]  # type: ignore[no-untyped-call]
    return w


def normal_matrix(x: Tensor, weights: Tensor, penalty: Tensor) -> Tensor:
    """``X^T S X + D``, ``(..., p, p)``."""
    return x.mT @ (weights.unsqueeze(-1) * x) + torch.diag_embed(penalty)


class _Fit(torch.autograd.Function):
    """``w = A^-1 (X^T S t + b)`` with ``A = X^T S X + D``, and ``t - X w``, which is small where ``t`` is not."""

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(
        x: Tensor,
        weights: Tensor,
        penalty: Tensor,
        t: Tensor,
        b: Tensor,
        factor: Tensor,
        dual: bool,
    ) -> tuple[Tensor, Tensor]:
        batch = common_shape(factor.shape[:-2], t.shape[:-2], b.shape[:-2])
        t, b = (v.expand(*batch, *v.shape[-2:]) for v in (t, b))
        diagonal, s = penalty.unsqueeze(-1), weights.unsqueeze(-1)
        if not dual:
            w = torch.cholesky_solve(x.mT @ (s * t) + b, factor)
            return w, t - x @ w
        left = residuals(
            lambda v: x @ (x.mT @ v / diagonal), weights, t - x @ (b / diagonal), factor
        )
        return (b + x.mT @ (s * left)) / diagonal, left

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weights, penalty, t, b, factor, dual = inputs
        ctx.save_for_backward(x, weights, penalty, factor, *output)
        ctx.shapes, ctx.dual = (t.shape, b.shape), dual
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, by_w: Tensor | None, by_left: Tensor | None) -> tuple[Any, ...]:
        x, weights, penalty, factor, w, left = ctx.saved_tensors
        slope = torch.zeros_like(w) if by_w is None else by_w
        if by_left is not None:
            slope = slope - x.mT @ by_left
        nothing = left.new_zeros(left.shape[-2:])
        v, left_v = _Fit.apply(  # type: ignore[no-untyped-call]
            x, weights, penalty, nothing, slope, factor, ctx.dual
        )
        s = weights.unsqueeze(-1)
        by_t = -s * left_v if by_left is None else by_left - s * left_v  # left_v = -X v
        by_x = by_weights = by_penalty = None
        if ctx.needs_input_grad[0]:
            by_x = ((s * left) @ v.mT - by_t @ w.mT).sum_to_size(x.shape)
        if ctx.needs_input_grad[1]:
            by_weights = -(left_v * left).sum(-1).sum_to_size(weights.shape)
        if ctx.needs_input_grad[2]:
            by_penalty = -(v * w).sum(-1).sum_to_size(penalty.shape)
        t_shape, b_shape = ctx.shapes
        return (
            by_x,
            by_weights,
            by_penalty,
            by_t.sum_to_size(t_shape),
            v.sum_to_size(b_shape),
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
        return rows_as_columns(_Fit, (3, 4), info, in_dims, given)
