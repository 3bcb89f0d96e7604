"""Ridge regression of a fold for any number of penalties, by one decomposition of its samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._adapter import Fold
from ._kernels import remembered

_LOST = 1e8
"""Roundings of the largest eigenvalue, below which another one (with the penalty) is not known well enough."""


@dataclass(frozen=True)
class Spectrum:
    """What predictions for the test samples of a fold are made of: ``left (right / (values + alpha)) + mean``.

    Attributes:
        values: Eigenvalues of the weighted, centered Gram matrix of features or of samples, the smaller of the two: ``(r,)``.
        left: ``(m, r)``.
        right: ``(r, k)``.
        mean: ``(k,)``, of the targets.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    mean: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, s: Tensor, x_test: Tensor, intercept: bool) -> Spectrum:
        """Of ``(n, p)``, ``(n, k)``, ``(n,)`` and ``(m, p)``."""
        mean = y.new_zeros(y.shape[1])
        if intercept:
            share = s / s.sum()
            mean_x, mean = share @ x, share @ y
            x, x_test, y = x - mean_x, x_test - mean_x, y - mean
        root = s.sqrt()[:, None]
        x, y = root * x, root * y
        if x.shape[1] <= x.shape[0]:
            values, vectors = torch.linalg.eigh(x.mT @ x)
            left, right = x_test @ vectors, vectors.mT @ (x.mT @ y)
        else:
            values, vectors = torch.linalg.eigh(x @ x.mT)
            left, right = x_test @ (x.mT @ vectors), vectors.mT @ y
        return cls(values.clamp(min=0.0), left, right, mean)

    def predictions(self, alpha: Tensor) -> Tensor | None:
        """``(m, k)`` at a penalty, or at one per target; ``None`` where it is lost beside the data."""
        floor = _LOST * torch.finfo(self.values.dtype).eps * self.values[-1]
        if not bool(self.values[0] + alpha.detach().min() > floor):
            return None
        raised = self.values[:, None] + alpha
        found: Tensor = self.left @ (self.right / raised) + self.mean
        return found


def spectral_predictions(
    fold: Fold, y: Tensor, alpha: Tensor, intercept: bool, memory: dict[str, Any]
) -> Tensor | None:
    """For the test samples, ``(m, k)``; ``None`` where samples or weights have a graph, or rounding is too large.

    The decomposition is kept for as long as the samples are the same: each further penalty takes no factorization.

    Args:
        fold: Of ``n`` samples.
        y: ``(n, k)``.
        alpha: 0-d, or one per target.
        intercept: Whether there is one.
        memory: Of the fold.
    """
    given = (fold.x_train, fold.x_test, fold.weights, y)
    if any(isinstance(t, Tensor) and t.requires_grad for t in given):
        return None

    def made() -> Spectrum:
        s = y.new_ones(len(y)) if fold.weights is None else fold.weights
        return Spectrum.of(fold.x_train, y, s, fold.x_test, intercept)

    spectrum: Spectrum = remembered(memory, "spectrum", (*given, intercept), made)
    return spectrum.predictions(alpha)
