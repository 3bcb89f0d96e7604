"""Kernel ridge regression, and its predictions for samples that were left out."""

from __future__ import annotations

import torch
from torch import Tensor

from .._errors import ProblemError
from ._blocks import from_kernel
from ._inputs import Systems, make_folds, systems
from ._solving import weighted_solve


def kernel_ridge(
    kernel: Tensor, y: Tensor, penalty: Tensor | float, *, sample_weight: Tensor | None = None
) -> Tensor:
    """Dual coefficients ``(K + penalty)^-1 y``: predictions are ``kernel_of(x_new, x) @ coefficients``.

    That is scikit-learn's ``KernelRidge(alpha=penalty)``, with gradients; with one factorization, which they reuse.

    Reference: Saunders, Gammerman & Vovk (1998), "Ridge regression learning algorithm in dual variables".

    Args:
        kernel: ``(..., n, n)``, symmetric and positive semidefinite; leading dimensions are separate problems.
        y: ``(..., n)``, or ``(..., n, k)`` for ``k`` targets.
        penalty: Positive: a number, ``(n,)`` for one per sample, ``(1, k)`` for one per target.
        sample_weight: ``(n,)`` or ``(..., n)``, not negative: ``penalty / sample_weight`` is what a sample's penalty
            amounts to. Ones by default.

    Returns:
        Shaped like ``y``.

    Raises:
        HyperparameterError: if the penalty is not positive, or does not fit.
        ProblemError: if data are not finite or do not fit, or the kernel is not symmetric.
        SolverError: if the system is singular to rounding.
    """
    given, weights = _kernel_systems("kernel_ridge", kernel, y, penalty, sample_weight)
    residual = weighted_solve(given.x, weights, given.y, "kernel_ridge")
    return given.restored(weights.unsqueeze(-1) * residual)


def kernel_ridge_leave_one_out(
    kernel: Tensor, y: Tensor, penalty: Tensor | float, *, sample_weight: Tensor | None = None
) -> Tensor:
    """For each sample, what kernel ridge predicts for it when fitted to all others; shaped like ``y``.

    The leave-one-out residual is ``(G^-1 y)_i / (G^-1)_ii`` with ``G = K + penalty``: one factorization, then about
    six times its operations.

    Reference: Rasmussen & Williams (2006), "Gaussian processes for machine learning", equation 5.12.

    Args:
        kernel, y, penalty, sample_weight: As for :func:`kernel_ridge`.

    Raises:
        HyperparameterError: if the penalty is not positive, or does not fit.
        ProblemError: if data are not finite or do not fit, the kernel is not symmetric, or there is one sample.
        SolverError: if the system is singular to rounding.
    """
    owner = "kernel_ridge_leave_one_out"
    given, weights = _kernel_systems(owner, kernel, y, penalty, sample_weight)
    made = make_folds(owner, given.x.shape[-1], given.x.shape[-1], given.x.device)
    return given.restored(given.y - from_kernel(given.x, weights, given.y, made, owner))


def kernel_ridge_k_fold(
    kernel: Tensor,
    y: Tensor,
    penalty: Tensor | float,
    folds: int | Tensor,
    *,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """For each sample, what kernel ridge predicts for it when fitted to the other folds; shaped like ``y``.

    Residuals of a fold are ``((G^-1)_FF)^-1 (G^-1 y)_F`` with ``G = K + penalty``: one factorization and a small
    system for each fold.

    Reference: Pahikkala, Boberg & Salakoski (2006), "Fast n-fold cross-validation for regularized least-squares".

    Args:
        kernel, y, penalty, sample_weight: As for :func:`kernel_ridge`.
        folds: Their number, for blocks of successive samples, or the fold of each sample, integers ``(n,)``.

    Raises:
        HyperparameterError: if the penalty is not positive, or does not fit.
        ProblemError: if data are not finite or do not fit, the kernel is not symmetric, or there are fewer samples than
            folds.
        SolverError: if the system is singular to rounding.
    """
    owner = "kernel_ridge_k_fold"
    given, weights = _kernel_systems(owner, kernel, y, penalty, sample_weight)
    made = make_folds(owner, folds, given.x.shape[-1], given.x.device)
    return given.restored(given.y - from_kernel(given.x, weights, given.y, made, owner))


def _kernel_systems(
    owner: str, kernel: Tensor, y: Tensor, penalty: Tensor | float, sample_weight: Tensor | None
) -> tuple[Systems, Tensor]:
    """And how much each sample counts."""
    given = systems(owner, kernel, y, penalty, sample_weight, name="kernel")
    seen = given.x.detach()
    if seen.shape[-1] != seen.shape[-2]:
        raise ProblemError(
            f"{owner}: the kernel has shape {tuple(seen.shape)}; give that of the samples with themselves, square."
        )
    off = float((seen - seen.mT).abs().max())
    if off > 100 * torch.finfo(seen.dtype).eps * float(seen.abs().max()):
        raise ProblemError(
            f"{owner}: the kernel is not symmetric (entries differ by up to {off:.1e}); give that of the samples with "
            f"themselves."
        )
    return given, given.weights / given.penalty
