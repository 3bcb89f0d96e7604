"""What the adapters of support vector machines share: their settings, and where libsvm says that the solution is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import SVC, SVR
from torch import Tensor

from ._adapter import Fold, Split
from ._support_vectors import Machine

_LIBSVM: dict[str, Any] = {
    "kernel": "precomputed",
    "tol": 1e-2,
    "cache_size": 200,
    "max_iter": 200_000,
}


def reason_against_kernel(estimator: BaseEstimator) -> str | None:
    """Why its kernel is not adapted: it may have no unique solution then."""
    name, kernel = type(estimator).__name__, estimator.kernel
    if kernel not in ("linear", "rbf", "poly"):
        return f"{name}(kernel={kernel!r:.60}) is not adapted"
    if kernel == "poly" and (estimator.degree < 1 or estimator.coef0 < 0):
        return f"a polynomial kernel with degree={estimator.degree!r:.60}, coef0={estimator.coef0!r:.60} is not positive"
    return None


def reason_against_classes(y: np.ndarray, splits: list[Split]) -> str | None:
    if y.ndim != 1:
        return "there is more than one target"
    for train, _ in splits:
        if len(np.unique(y[train])) < 2:
            return "a fold is trained on one class only"
        if not np.isin(y, y[train]).all():
            return "a fold is not trained on every class"
    return None


def kernel_settings(
    estimator: BaseEstimator, params: Mapping[str, Tensor], fold: Fold
) -> dict[str, Any]:
    """``gamma``, ``coef0`` and ``degree``; ``gamma="scale"`` is a function of the samples."""
    gamma = estimator.gamma
    if gamma == "scale":
        variance = fold.x_train.var(correction=0)
        gamma = 1 / (fold.x_train.shape[1] * variance) if float(variance.detach()) else 1.0
    elif gamma == "auto":
        gamma = 1 / fold.x_train.shape[1]
    return {"gamma": gamma, "coef0": estimator.coef0, "degree": int(estimator.degree), **params}


@contextmanager
def _plainly() -> Iterator[None]:
    """Fits without checks of what was made here, and without a word of what is left, which is done exactly."""
    with (
        warnings.catch_warnings(),
        sklearn.config_context(assume_finite=True, skip_parameter_validation=True),
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _among(kernel: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return kernel if len(kept) == len(kernel) else kernel[np.ix_(kept, kept)]


def classifier_start(machine: Machine) -> np.ndarray:
    """``beta`` by libsvm, close to the solution."""
    with torch.no_grad():
        most = (machine.high - machine.low).numpy()
        kept = np.flatnonzero(most > 0)
        libsvm = SVC(C=1.0, **_LIBSVM)
        found = np.zeros(len(most))
        kernel = _among(machine.kernel.numpy(), kept)
        with _plainly():
            libsvm.fit(kernel, machine.target.numpy()[kept], sample_weight=most[kept])
        found[kept[libsvm.support_]] = libsvm.dual_coef_[0]
    return found


def regressor_start(
    kernel: np.ndarray, y: np.ndarray, most: np.ndarray, epsilon: float
) -> np.ndarray:
    """``beta`` by libsvm, close to the solution.

    Args:
        kernel: ``(n, n)``.
        y: Targets, ``(n,)``.
        most: Upper bounds, ``(n,)``.
        epsilon: Of the loss.
    """
    n, kept = len(kernel), np.flatnonzero(most > 0)
    libsvm = SVR(C=1.0, epsilon=epsilon, **_LIBSVM)
    with _plainly():
        libsvm.fit(_among(kernel, kept), y[kept], sample_weight=most[kept])
    found, each = np.zeros(2 * n), np.zeros(n)
    each[kept[libsvm.support_]] = libsvm.dual_coef_[0]
    found[:n], found[n:] = each.clip(min=0), each.clip(max=0)
    return found
