"""Predictions of ridge regression for samples that were left out, without fitting it again for each."""

from __future__ import annotations

import torch
from torch import Tensor

from .._errors import ProblemError
from ._blocks import corrected, from_kernel
from ._fitting import normal_matrix
from ._inputs import Folds, Systems, make_folds, systems
from ._solving import common_shape, positive_solve
from .ridge import center


def ridge_leave_one_out(
    x: Tensor,
    y: Tensor,
    penalty: Tensor | float,
    *,
    intercept: bool = False,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """For each sample, what :func:`ridge` predicts for it when fitted to all others; shaped like ``y``.

    The leave-one-out residual is ``r_i / (1 - h_i)`` with the residual and leverage of the one fit to all samples
    (``n < p``: both from the ``(n, n)`` system, which loses nothing where ``h`` is close to one). Exact, also with
    an intercept and weights: one factorization, then as much work again.

    Reference: Allen (1974), "The relationship between variable selection and data augmentation and a method for
    prediction" (PRESS).

    Args:
        x, y, penalty, intercept, sample_weight: As for :func:`ridge`. A sample's weight does not matter for its
            own prediction.

    Raises:
        HyperparameterError: if the penalty is not positive, or does not fit.
        ProblemError: if data are not finite or do not fit, or there is one sample.
        SolverError: if the system is singular to rounding.
    """
    owner = "ridge_leave_one_out"
    given = systems(owner, x, y, penalty, sample_weight)
    return _held_out(owner, given, given.x.shape[-2], intercept)


def ridge_k_fold(
    x: Tensor,
    y: Tensor,
    penalty: Tensor | float,
    folds: int | Tensor,
    *,
    intercept: bool = False,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """For each sample, what :func:`ridge` predicts for it when fitted to the other folds; shaped like ``y``.

    Many small folds, or fewer samples than features: one factorization, and the residuals of each fold corrected by its
    block of the hat matrix. A few large ones: the normal equations of each fold are formed once, and those of all other
    folds added and factorized.

    Reference: Pahikkala, Boberg & Salakoski (2006), "Fast n-fold cross-validation for regularized least-squares".

    Args:
        x, y, penalty, intercept, sample_weight: As for :func:`ridge`.
        folds: Their number, for blocks of successive samples (as scikit-learn's ``KFold`` without shuffling), or the
            fold of each sample, integers ``(n,)``.

    Raises:
        HyperparameterError: if the penalty is not positive, or does not fit.
        ProblemError: if data are not finite or do not fit, or there are fewer samples than folds.
        SolverError: if the system is singular to rounding.
    """
    return _held_out(
        "ridge_k_fold", systems("ridge_k_fold", x, y, penalty, sample_weight), folds, intercept
    )


def _held_out(owner: str, given: Systems, folds: int | Tensor, intercept: bool) -> Tensor:
    made = make_folds(owner, folds, given.x.shape[-2], given.x.device)
    if intercept:
        _check_remaining(owner, made, given.weights)
    centered, _, mean_y = center(given, intercept)
    n, p = given.x.shape[-2:]
    if n < p:
        kernel = (centered.x / given.penalty.unsqueeze(-2)) @ centered.x.mT
        residuals = from_kernel(kernel, given.weights, centered.y, made, owner, intercept)
        found = given.y - residuals
    elif _few_and_large(made, n, p):
        found = _by_other_folds(centered, made, owner, intercept) + mean_y
    else:
        found = given.y - _by_hat_matrix(centered, made, owner, intercept)
    return given.restored(found)


def _few_and_large(folds: Folds, n: int, p: int) -> bool:
    """Whether a system for each fold costs less than the columns and blocks of the hat matrix."""
    count, size = folds.rows.shape
    return 4 * size > p and count**2 < 8 * n


def _check_remaining(owner: str, folds: Folds, weights: Tensor) -> None:
    """An intercept needs somebody to be fitted to."""
    held = (folds.pick_one(weights) > 0).sum(-1)
    if bool((held == (weights > 0).sum(-1, keepdim=True)).any()):
        raise ProblemError(
            f"{owner}: all samples that have a weight are in one fold, so that without it there is nothing to fit an "
            f"intercept to. Use folds that share them, or intercept=False."
        )


def _by_hat_matrix(given: Systems, folds: Folds, what: str, intercept: bool) -> Tensor:
    """Held-out residuals where folds are small."""
    matrix = normal_matrix(given.x, given.weights, given.penalty)
    moments = given.x.mT @ (given.weights.unsqueeze(-1) * given.y)
    batch = common_shape(matrix.shape[:-2], moments.shape[:-2])
    columns = [c.expand(*batch, *c.shape[-2:]) for c in (given.x.mT, moments)]
    solved = positive_solve(matrix, torch.cat(columns, -1), what)
    n = given.x.shape[-2]
    residuals = given.y - given.x @ solved[..., n:]
    hat = folds.pick(given.x) @ folds.pick(solved[..., :n].mT).mT
    if intercept:
        hat = hat + (1 / given.weights.sum(-1))[..., None, None, None]
    held = folds.pick_one(given.weights).unsqueeze(-2)
    eye = torch.eye(hat.shape[-1], dtype=hat.dtype, device=hat.device)
    return corrected(eye - hat * held, residuals, folds)


def _by_other_folds(given: Systems, folds: Folds, what: str, intercept: bool) -> Tensor:
    """Held-out predictions where folds are large: the normal equations of all other folds, one system per fold."""
    x, penalty = given.x, given.penalty
    if intercept:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        penalty = torch.cat([penalty, torch.zeros_like(penalty[..., :1])], -1)
    held = folds.pick(x)
    weighted = (folds.pick_one(given.weights).unsqueeze(-1) * held).mT
    count = len(folds.rows)
    others = 1 - torch.eye(count, dtype=x.dtype, device=x.device)
    gram, moments = (
        torch.einsum("gf,...fab->...gab", others, each)  # sums, not differences: nothing cancels
        for each in (weighted @ held, weighted @ folds.pick(given.y))
    )
    w = positive_solve(gram + torch.diag_embed(penalty).unsqueeze(-3), moments, what)
    return folds.put_back(held @ w)
