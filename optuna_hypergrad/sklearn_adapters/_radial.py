"""Kernel ridge regression of a fold with few operations: no product of two vectors and no check has the kernel's size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..closed_form._solving import factorized
from ._plain import Factor, PlainFit, radial


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


def radial_fit(
    among: np.ndarray,
    across: np.ndarray,
    gamma: float,
    alpha: float,
    y: np.ndarray,
    y_test: np.ndarray,
    root: np.ndarray | None,
) -> PlainFit:
    """The same in arrays, of a kernel ``exp(gamma among)``, with its slopes.

    Args:
        among, across: ``(n, n)`` and ``(m, n)``.
        gamma, alpha: Hyperparameters.
        y, y_test: ``(n,)`` or ``(n, k)``, and likewise.
        root: Of each sample's weight, ``(n,)``, or ``None``.

    Raises:
        SolverError: if the system is singular to rounding.
    """
    kernel, seen = radial(among, gamma), radial(across, gamma)
    wide = y if y.ndim == 2 else y[:, None]
    times = 1.0 if root is None else root[:, None]
    matrix = kernel.copy() if root is None else times * kernel * root
    matrix.flat[:: len(matrix) + 1] += alpha
    factor = Factor.checked(matrix, "KernelRidge")
    inner = factor.solve(times * wide)
    dual = times * inner
    found = seen @ dual

    def pull(slope: np.ndarray) -> dict[str, Any]:
        by = slope if slope.ndim == 2 else slope[:, None]
        pulled = factor.solve(times * (seen.T @ by))
        bent = (by * ((across * seen) @ dual)).sum()
        bent -= (times * pulled * ((among * kernel) @ dual)).sum()
        return {"alpha": -(pulled * inner).sum(), "gamma": bent}

    return PlainFit(found if y.ndim == 2 else found[:, 0], y_test, pull)
