"""The folds as the last step of a pipeline sees them; transformers are fitted once per fold and setting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, assert_all_finite

from ._adapter import Fold, Split, tensor
from .feature_weights import FeatureWeights

T = TypeVar("T")


_SETTINGS = 3
"""Of which the folds are kept, the last ones that were used."""


class NoMatrixError(ValueError):
    """What comes out of the transformers is nothing that an adapter could take; the estimator may take it."""


def remembered(kept: OrderedDict[Hashable, T], setting: Hashable, make: Callable[[], T]) -> T:
    """What was made for a setting, of the last few of them."""
    if setting not in kept:
        kept[setting] = make()
    kept.move_to_end(setting)
    while len(kept) > _SETTINGS:
        kept.popitem(last=False)
    return kept[setting]


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
        self._kept: OrderedDict[Hashable, list[Fold]] = OrderedDict()
        self._memories: OrderedDict[Hashable, list[dict[str, Any]]] = OrderedDict()

    def of(self, estimator: BaseEstimator, setting: Hashable) -> list[Fold]:
        """The folds behind the transformers of ``estimator``, which are those of every other ``estimator`` of ``setting``.

        Raises:
            NoMatrixError: if what comes out of them is not a dense matrix of numbers.
            ValueError: in scikit-learn's words, if they are not finite; and what the transformers raise.
        """
        return remembered(
            self._kept, setting, lambda: [self._fold(estimator, *split) for split in self._splits]
        )

    def memories(self, setting: Hashable) -> list[dict[str, Any]]:
        """What an adapter remembers of each fold, by setting of everything but the differentiated hyperparameters."""
        return remembered(self._memories, setting, lambda: [{} for _ in self._splits])

    def _fold(self, estimator: BaseEstimator, train: np.ndarray, test: np.ndarray) -> Fold:
        x_train, x_test = _rows(self._X, train), _rows(self._X, test)
        y_train = self._y[train]
        while isinstance(estimator, Pipeline):
            if not _changes_nothing(estimator.steps[:-1], x_train):
                transformers = clone(estimator[:-1])
                x_train = transformers.fit_transform(x_train, y_train)
                x_test = transformers.transform(x_test)
            estimator = estimator.steps[-1][1]
        owner = type(estimator).__name__
        return Fold(
            _matrix(x_train, owner),
            y_train,
            _matrix(x_test, owner),
            self._y[test],
            None if self._weights is None else tensor(self._weights[train]),
            tensor(self._test_weights[test] / self._test_weights[test].sum()),
        )


def _rows(data: Any, index: np.ndarray) -> Any:
    return data[index] if type(data) is np.ndarray else _safe_indexing(data, index)


def _changes_nothing(steps: list[tuple[str, Any]], data: Any) -> bool:
    """Whether transformers pass on a plain matrix: weights of features that are searched are applied to what comes out."""
    is_matrix = type(data) is np.ndarray and data.ndim == 2 and data.size > 0
    if not is_matrix or data.dtype.kind not in "fiu":  # transformers have their own words for it
        return not steps
    return all(type(t) is FeatureWeights and t.weights is None for _, t in steps)


def _matrix(data: Any, owner: str) -> Any:
    if hasattr(data, "toarray"):
        raise NoMatrixError(
            "what the last step would get is sparse, and adapters take dense data (an encoder makes them with sparse_output=False)"
        )
    given = np.asarray(data)
    if given.dtype.kind == "c":
        raise ValueError("Complex data not supported: what the last step would get is complex.")
    if given.dtype.kind not in "fiubO":
        raise NoMatrixError("what the last step would get is not a matrix of real numbers")
    try:  # numbers may be objects: of a data frame, where some columns are Booleans
        array = given.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise NoMatrixError(
            f"what the last step would get is not a matrix of real numbers: {error}"
        ) from error
    if array.ndim != 2 or not array.size:
        raise NoMatrixError(
            f"what the last step would get, of shape {array.shape}, is not a matrix"
        )
    if not np.isfinite(array.sum()):
        assert_all_finite(array, estimator_name=owner, input_name="X")
    return tensor(array)


def last_step(estimator: BaseEstimator) -> tuple[BaseEstimator, str]:
    """The estimator at the end, and the prefix of its parameters' names."""
    prefix = ""
    while isinstance(estimator, Pipeline):
        name, estimator = estimator.steps[-1]
        prefix += f"{name}__"
    return estimator, prefix
