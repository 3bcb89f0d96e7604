"""Fits of a fold in NumPy, and the slopes of their losses: what has a formula for them needs no graph.

A graph of torch takes some microseconds for each of its operations, twice: where data are small, that is most of a fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..closed_form._solving import refuse_lost_pivots

SCALES = "scales"
"""The name of the weights of features, among the hyperparameters of a :class:`PlainFit`."""

Slope = Callable[[np.ndarray, Any, np.ndarray], tuple[float, np.ndarray]]
"""``(predictions, targets, weights) -> (loss, its slope by the predictions)``."""


@dataclass(frozen=True)
class PlainFit:
    """A fit of a fold.

    Attributes:
        prediction: For the test samples.
        target: What they are held to.
        pull: From the slope of a loss by the predictions to its slopes by the hyperparameters, by name; what has no name there
            has no effect.
        exact: Whether it is more than a rough fit.
    """

    prediction: np.ndarray
    target: np.ndarray
    pull: Callable[[np.ndarray], Mapping[str, Any]]
    exact: bool = True


def losses_of(
    fits: Sequence[tuple[PlainFit, np.ndarray]], slope: Slope, given: Mapping[str, Tensor]
) -> Tensor:
    """``(len(fits),)``, differentiable once in ``given``.

    Args:
        fits: Each with the weights of its test samples.
        slope: Of a loss.
        given: The hyperparameters at which they were fitted.
    """
    found: Tensor = _Losses.apply(fits, slope, tuple(given), *given.values())  # type: ignore[no-untyped-call]
    return found


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fits: Sequence[tuple[PlainFit, np.ndarray]],
        slope: Slope,
        names: tuple[str, ...],
        *given: Tensor,
    ) -> Tensor:
        with np.errstate(all="ignore"):
            told = [slope(fit.prediction, fit.target, share) for fit, share in fits]
        ctx.pulls = [(fit.pull, by) for (fit, _), (_, by) in zip(fits, told, strict=True)]
        ctx.names, ctx.shapes = names, [tuple(g.shape) for g in given]
        return torch.tensor([loss for loss, _ in told], dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        sums = [np.zeros(shape) for shape in ctx.shapes]
        for (pull, by), share in zip(ctx.pulls, cotangent.tolist(), strict=True):
            with np.errstate(all="ignore"):
                pulled = pull(share * by)
            for i, name in enumerate(ctx.names):
                if name in pulled:
                    sums[i] += pulled[name]
        return None, None, None, *map(torch.from_numpy, sums)


def radial(pairs: np.ndarray, gamma: float) -> np.ndarray:
    """The kernel ``exp(gamma pairs)``."""
    found: np.ndarray = gamma * pairs
    np.exp(found, out=found)
    return found


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of a positive definite matrix.

    Attributes:
        upper: ``(n, n)``; below the diagonal there is anything.
    """

    upper: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray) -> tuple[Factor, bool]:
        """Of a matrix in the order of C, which is lost; and whether that has failed."""
        # the lower triangle in the order of C is the upper one in that of Fortran
        upper, info = lapack.dpotrf(matrix.T, lower=0, clean=0, overwrite_a=1)
        return cls(upper), bool(info)

    @classmethod
    def checked(cls, matrix: np.ndarray, what: str) -> Factor:
        """The same, of the linear system of an estimator.

        Raises:
            SolverError: if it is singular to rounding.
        """
        size = matrix.diagonal().copy()
        factor, failed = cls.of(matrix)
        refuse_lost_pivots(failed, size, factor.pivots, what)
        return factor

    @property
    def pivots(self) -> np.ndarray:
        """``(n,)``."""
        found: np.ndarray = self.upper.diagonal() ** 2
        return found

    @property
    def lower(self) -> np.ndarray:
        """Its transpose, which has zeros above the diagonal."""
        found: np.ndarray = np.tril(self.upper.T)
        return found

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        """``(n,)`` or ``(n, k)``."""
        found: np.ndarray = lapack.dpotrs(self.upper, rhs, lower=0)[0]
        return found
