"""Ridge regression of a fold for any number of penalties, or of weights of features, from what is made of its samples once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal, lapack  # type: ignore[import-untyped]

from ._adapter import Fold
from ._kernels import remembered
from ._plain import SCALES, Factor, PlainFit

_LOST = 1e8
"""Roundings of the largest eigenvalue, below which the smallest one (with the penalty) is not known well enough."""


@dataclass(frozen=True)
class Moments:
    """The samples of a fold, centered where there is an intercept, each times the root of its weight.

    Attributes:
        x, y: ``(n, p)`` and ``(n, k)``.
        x_test: ``(m, p)``, centered as they are.
        mean: ``(k,)``, of the targets.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, fold: Fold, intercept: bool) -> Moments:
        x, x_test, y = fold.x_train.numpy(), fold.x_test.numpy(), _columns(fold.y_train)
        s = None if fold.weights is None else fold.weights.numpy()
        mean = np.zeros(y.shape[1])
        if intercept:
            share = np.full(len(x), 1 / len(x)) if s is None else s / s.sum()
            mean_x, mean = share @ x, share @ y
            x, x_test, y = x - mean_x, x_test - mean_x, y - mean
        if s is not None:
            root = np.sqrt(s)[:, None]
            x, y = root * x, root * y
        return cls(x, y, x_test, mean)


@dataclass(frozen=True)
class Tridiagonal:
    """What predictions for the test samples of a fold are made of: ``left (T + alpha I)^-1 right + mean``.

    ``T`` is similar to the Gram matrix of features or of samples, the smaller of the two: a further penalty takes ``O(r)``
    operations, and ``T`` a fifth of the time of eigenvalues.

    Reference: Eldén (1977), "Algorithms for the regularization of ill-conditioned least squares problems".

    Attributes:
        diagonal: Of ``T``, ``(r,)``.
        beside: The diagonal next to it, ``(r - 1,)``.
        left: ``(m, r)``.
        right: ``(r, k)``.
        mean: ``(k,)``, of the targets.
        floor: Below it, a penalty is lost.
    """

    diagonal: np.ndarray
    beside: np.ndarray
    left: np.ndarray
    right: np.ndarray
    mean: np.ndarray
    floor: float

    @classmethod
    def of(cls, data: Moments) -> Tridiagonal:
        x, x_test = data.x, data.x_test
        if x.shape[1] <= x.shape[0]:
            gram, left, right = x.T @ x, x_test, x.T @ data.y
        else:
            gram, left, right = x @ x.T, x_test @ x.T, data.y
        size = len(gram)
        reduced, diagonal, beside, tau, _ = lapack.dsytrd(
            gram.T, lower=1, lwork=32 * size, overwrite_a=1
        )
        if size > 1:  # the first coordinate is not turned
            turn = reduced[1:, :-1]
            left, right = _turned(left, turn, tau), _turned(right.T, turn, tau).T
        largest = np.abs(diagonal).max() + 2 * np.abs(beside).max(initial=0.0)
        floor = _LOST * np.finfo(np.float64).eps * float(largest)
        return cls(diagonal, beside, left, np.ascontiguousarray(right), data.mean, floor)

    def is_lost(self, alpha: float) -> bool:
        """Whether rounding hides a penalty beside the data."""
        if alpha > self.floor:
            return False
        ends = eigvalsh_tridiagonal(self.diagonal, self.beside, select="i", select_range=(0, 0))
        return not bool(max(float(ends[0]), 0.0) + alpha > self.floor)

    def solved(self, alpha: np.ndarray, rhs: np.ndarray) -> np.ndarray:
        """``(T + alpha I)^-1 rhs``, ``(r, k)``, for a penalty or one per column."""
        if alpha.ndim == 0:
            return _tridiagonal_solve(self.diagonal + alpha, self.beside, rhs)
        each = zip(alpha, rhs.T, strict=True)
        return np.stack([_tridiagonal_solve(self.diagonal + a, self.beside, r) for a, r in each], 1)


def _turned(rows: np.ndarray, turn: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """Rows in the coordinates of the tridiagonal matrix."""
    rest = np.array(rows[:, 1:], order="F")  # a copy: it is overwritten
    rest, _, _ = lapack.dormqr("R", "N", turn, tau, rest, 32 * max(len(rows), 1), overwrite_c=1)
    return np.concatenate([rows[:, :1], rest], 1)


def _tridiagonal_solve(diagonal: np.ndarray, beside: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    found: np.ndarray
    if len(diagonal) == 1:
        found = rhs / diagonal
    else:
        _, _, found, _ = lapack.dptsv(diagonal, beside, rhs)
    return found


def along_penalties(
    fold: Fold, alpha: np.ndarray, intercept: bool, memory: dict[str, Any]
) -> PlainFit | None:
    """A fit at a penalty, or one per target; ``None`` where rounding is too large.

    Args:
        fold: Its samples; what is made of them is kept for as long as they are the same.
        alpha: 0-d or ``(k,)``.
        intercept: Whether there is one.
        memory: Of the fold.
    """
    key = (fold.x_train, fold.x_test, fold.weights, fold.y_train, intercept)
    made: Tridiagonal = remembered(
        memory, "tridiagonal", key, lambda: Tridiagonal.of(Moments.of(fold, intercept))
    )
    if made.is_lost(float(alpha.min())):
        return None
    solved = made.solved(alpha, made.right)

    def pull(slope: np.ndarray) -> dict[str, Any]:
        again = made.solved(alpha, made.left.T @ _columns(slope))
        by = -(again * solved).sum(0)
        return {"alpha": by if alpha.ndim else by.sum()}

    return _fit(made.left @ solved + made.mean, fold, pull)


@dataclass(frozen=True)
class Gram:
    """``x^T x`` and ``x^T y`` of :class:`Moments`, of which those for any weights of features are made."""

    matrix: np.ndarray
    correlations: np.ndarray
    x_test: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, data: Moments) -> Gram:
        return cls(data.x.T @ data.x, data.x.T @ data.y, data.x_test, data.mean)


def along_weights(
    fold: Fold, alpha: np.ndarray, scales: np.ndarray, intercept: bool, memory: dict[str, Any]
) -> PlainFit:
    """A fit at a penalty and weights of features; as :func:`along_penalties`.

    With ``W = diag(w)``, ``G = x^T x``, ``b = (W G W + alpha I)^-1 W x^T y``: predictions are ``x_test W b``. A slope ``q`` by them
    has the adjoint ``v = (W G W + alpha I)^-1 W x_test^T q``, the slope ``2 alpha b v / w`` by the weights, since
    ``W x^T (y - x W b) = alpha b``, and likewise for ``v``.

    Raises:
        SolverError: if the system is singular to rounding.
    """
    key = (fold.x_train, fold.x_test, fold.weights, fold.y_train, intercept)
    wide = scales[:, None]
    solve: Callable[[np.ndarray], np.ndarray]
    if fold.x_train.shape[1] <= fold.x_train.shape[0]:
        gram: Gram = remembered(memory, "gram", key, lambda: Gram.of(Moments.of(fold, intercept)))
        x_test, mean = gram.x_test, gram.mean
        matrix = gram.matrix * wide * scales
        matrix.flat[:: len(matrix) + 1] += alpha
        solve = Factor.checked(matrix, "Ridge").solve
        b = solve(wide * gram.correlations)
    else:
        data: Moments = remembered(memory, "moments", key, lambda: Moments.of(fold, intercept))
        x_test, mean, x = data.x_test, data.mean, data.x * scales
        matrix = x @ x.T
        matrix.flat[:: len(matrix) + 1] += alpha
        factor = Factor.checked(matrix, "Ridge")
        b = x.T @ factor.solve(data.y)

        def solve(rhs: np.ndarray) -> np.ndarray:
            found: np.ndarray = (rhs - x.T @ factor.solve(x @ rhs)) / alpha
            return found

    def pull(slope: np.ndarray) -> dict[str, Any]:
        v = solve(wide * (x_test.T @ _columns(slope)))
        product = (b * v).sum(1)
        by = np.divide(2 * alpha * product, scales, out=np.zeros_like(scales), where=scales > 0)
        return {SCALES: by, "alpha": -product.sum()}

    return _fit(x_test @ (wide * b) + mean, fold, pull)


def _fit(
    prediction: np.ndarray, fold: Fold, pull: Callable[[np.ndarray], dict[str, Any]]
) -> PlainFit:
    target = np.asarray(fold.y_test, dtype=np.float64)
    return PlainFit(prediction if target.ndim == 2 else prediction[:, 0], target, pull)


def _columns(y: np.ndarray) -> np.ndarray:
    found = np.asarray(y, dtype=np.float64)
    return found if found.ndim == 2 else found[:, None]
