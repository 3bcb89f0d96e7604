"""The folds as the last step of a pipeline sees them; transformers are fitted once per fold and setting."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing

from ._adapter import Fold, Split, tensor


class Folds:
    """Folds by setting of the transformers.

    Args:
        X: Data as the user gave them.
        y: Targets, an array.
        splits: Of all trials.
        weights: ``(n_samples,)`` or ``None``.
        scored: Whether they count in the score, too.
    """

    def __init__(
        self,
        X: Any,
        y: np.ndarray,
        splits: list[Split],
        weights: np.ndarray | None,
        scored: bool,
    ) -> None:
        self._test_weights = weights if scored and weights is not None else np.ones(len(y))
        self._X, self._y, self._splits, self._weights = X, y, splits, weights
        self._kept: dict[Hashable, list[Fold]] = {}
        self._memories: dict[Hashable, list[dict[str, Any]]] = {}

    def of(self, estimator: BaseEstimator, setting: Hashable) -> list[Fold]:
        """The folds behind the transformers of ``estimator``, which are those of every other ``estimator`` of ``setting``.

        Raises:
            ValueError: if what comes out of them is not a finite matrix of numbers.
        """
        if setting not in self._kept:
            self._kept[setting] = [self._fold(estimator, *split) for split in self._splits]
        return self._kept[setting]

    def memories(self, setting: Hashable) -> list[dict[str, Any]]:
        """What an adapter remembers of each fold, by setting of everything but the differentiated hyperparameters."""
        return self._memories.setdefault(setting, [{} for _ in self._splits])

    def _fold(self, estimator: BaseEstimator, train: np.ndarray, test: np.ndarray) -> Fold:
        x_train, x_test = _safe_indexing(self._X, train), _safe_indexing(self._X, test)
        y_train = self._y[train]
        if isinstance(estimator, Pipeline) and len(estimator.steps) > 1:
            transformers = clone(estimator)[:-1]
            x_train = transformers.fit_transform(x_train, y_train)
            x_test = transformers.transform(x_test)
        return Fold(
            _matrix(x_train),
            y_train,
            _matrix(x_test),
            self._y[test],
            None if self._weights is None else tensor(self._weights[train]),
            tensor(self._test_weights[test] / self._test_weights[test].sum()),
        )


def _matrix(data: Any) -> Any:
    if hasattr(data, "toarray") or np.asarray(data).dtype.kind not in "fiub":
        raise ValueError("they are not a dense matrix of real numbers")
    array = np.asarray(data, dtype=np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"they are not a matrix of finite numbers, but of shape {array.shape}, or not finite"
        )
    return tensor(array)


def last_step(estimator: BaseEstimator) -> tuple[BaseEstimator, str]:
    """The estimator at the end, and the prefix of its parameters' names."""
    prefix = ""
    while isinstance(estimator, Pipeline):
        name, estimator = estimator.steps[-1]
        prefix += f"{name}__"
    return estimator, prefix
