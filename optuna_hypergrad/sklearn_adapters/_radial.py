"""Kernel ridge regression of a fold with few operations: neither a product of two vectors nor a check has the kernel's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..closed_form._solving import factorized


class KernelPredictions(torch.autograd.Function):
    """``(among, across, gamma, alpha, y, root) -> across K (K S + alpha I)^-1 y``, ``(m, k)``; once, in ``gamma`` and ``alpha``.

    ``K`` is ``exp(gamma among)``, entry by entry, or ``among`` itself where ``gamma`` is ``None``; so for ``across``, ``(m, n)``. ``root``
    is that of each sample's weight. What :func:`optuna_hypergrad.closed_form.kernel_ridge` does for any kernel with a graph takes
    more than twice as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        among: Tensor,
        across: Tensor,
        gamma: Tensor | None,
        alpha: Tensor,
        y: Tensor,
        root: Tensor | None,
    ) -> Tensor:
        kernel, seen = among, across
        if gamma is not None:
            kernel, seen = (among * gamma).exp_(), (across * gamma).exp_()
        matrix = kernel.clone() if root is None else root[:, None] * kernel * root
        matrix.diagonal().add_(alpha)
        factor = factorized(matrix, "KernelRidge")
        inner = torch.cholesky_solve(_times(root, y), factor)
        dual = _times(root, inner)
        ctx.save_for_backward(among, across, kernel, seen, factor, inner, dual)
        ctx.root, ctx.radial = root, gamma is not None
        return seen @ dual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        among, across, kernel, seen, factor, inner, dual = ctx.saved_tensors
        pulled = torch.cholesky_solve(_times(ctx.root, seen.mT @ cotangent), factor)
        by_alpha, by_gamma = -(pulled * inner).sum(), None
        if ctx.radial and ctx.needs_input_grad[2]:
            by_gamma = (cotangent * ((across * seen) @ dual)).sum()
            by_gamma = by_gamma - (_times(ctx.root, pulled) * ((among * kernel) @ dual)).sum()
        return None, None, by_gamma, by_alpha, None, None


def _times(root: Tensor | None, v: Tensor) -> Tensor:
    return v if root is None else root[:, None] * v
