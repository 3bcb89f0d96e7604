"""Held-out residuals from the residuals of one fit to everything."""

from __future__ import annotations

import torch
from torch import Tensor

from ._inputs import Folds
from ._solving import common_shape, weighted_solve


def corrected(complements: Tensor, residuals: Tensor, folds: Folds) -> Tensor:
    """``(I - H)_FF^-1 r_F`` for each fold ``F``, in the order of the samples.

    Args:
        complements: ``(I - H)_FF``, ``(..., num_folds, size, size)``, ``H`` the hat matrix of the fit.
        residuals: ``r = y - H y``, ``(..., n, k)``.
    """
    held = folds.pick(residuals)
    if complements.shape[-1] == 1:
        return folds.put_back(held / complements)
    both = folds.real.unsqueeze(-1) & folds.real.unsqueeze(-2)
    padding = torch.diag_embed((~folds.real).to(complements))
    return folds.put_back(torch.linalg.solve(complements * both + padding, held))


def from_kernel(
    kernel: Tensor, weights: Tensor, y: Tensor, folds: Folds, what: str, intercept: bool = False
) -> Tensor:
    """Held-out residuals of ``min over f of sum_i weights_i (y_i - f_i)^2 + f^T K^-1 f``, ``f`` plus a constant or not.

    ``I - H = (I + K S)^-1`` is solved for, never subtracted: its blocks are right where ``H`` is close to ``I``.
    """
    n = kernel.shape[-1]
    if (
        intercept
    ):  # a constant may be had for nothing, so that any multiple of it may be added to the kernel
        size = kernel.detach().diagonal(dim1=-2, dim2=-1).mean(-1)
        kernel = kernel + size[..., None, None]
    batch = common_shape(kernel.shape[:-2], weights.shape[:-1], y.shape[:-2])
    eye = torch.eye(n, dtype=y.dtype, device=y.device)
    sides = torch.cat([eye.expand(*batch, n, n), y.expand(*batch, *y.shape[-2:])], -1)
    solved = weighted_solve(kernel, weights, sides, what)
    if intercept:
        constant = solved[..., :n].sum(-1, keepdim=True)
        row = weights.unsqueeze(-2)
        solved = solved - constant * ((row @ solved) / (row @ constant))
    complements = solved[..., folds.rows.unsqueeze(-1), folds.rows.unsqueeze(-2)]
    return corrected(complements, solved[..., n:], folds)
