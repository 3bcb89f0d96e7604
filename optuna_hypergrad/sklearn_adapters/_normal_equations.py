"""Ridge regression of a fold by its normal equations, with as few operations as there can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..closed_form._solving import factorized


class NormalEquations(torch.autograd.Function):
    """``(x, s, alpha, y) -> (x^T S x + alpha I)^-1 x^T S y``; differentiable once, in all of them.

    What :func:`optuna_hypergrad.closed_form.ridge` does for any shapes and orders takes more than twice as long where data are
    small: a search fits thousands of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
        weighted = x * s[:, None]
        matrix = x.mT @ weighted
        matrix.diagonal().add_(alpha)
        factor = factorized(matrix, "Ridge")
        w = torch.cholesky_solve(weighted.mT @ y, factor)
        ctx.save_for_backward(x, s, y, w, factor)
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, s, y, w, factor = ctx.saved_tensors
        v = torch.cholesky_solve(cotangent, factor)
        left, along = y - x @ w, x @ v
        by_x = by_y = None
        if ctx.needs_input_grad[0]:
            by_x = (s[:, None] * left) @ v.mT - (s[:, None] * along) @ w.mT
        by_s = (left * along).sum(1)
        if ctx.needs_input_grad[3]:
            by_y = s[:, None] * along
        return by_x, by_s, -(v * w).sum(), by_y


def fit_and_predict(
    x: Tensor, y: Tensor, s: Tensor, alpha: Tensor, intercept: bool, x_test: Tensor
) -> Tensor:
    """``(m, k)`` from ``(n, p)``, ``(n, k)``, ``(n,)``, a number, and ``(m, p)``.

    Raises:
        SolverError: if the system is singular to rounding.
    """
    if not intercept:
        w: Tensor = NormalEquations.apply(x, s, alpha, y)  # type: ignore[no-untyped-call]
        return x_test @ w
    share = s / s.sum()
    mean_x, mean_y = share @ x, share @ y
    w = NormalEquations.apply(x - mean_x, s, alpha, y - mean_y)  # type: ignore[no-untyped-call]
    return (x_test - mean_x) @ w + mean_y
