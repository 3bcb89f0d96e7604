"""What an adapter says of an estimator that it knows: the loss of one fold, as a function of hyperparameters."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from torch import Tensor

from ._plain import PlainFit, Slope

Split = tuple[np.ndarray, np.ndarray]
"""Indices of the training and the test samples of a fold."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(predictions, targets, weights) -> scalar``, to be minimized; weights ``(m,)`` of the test samples, of sum 1."""


@dataclass(frozen=True)
class Fold:
    """What an estimator at the end of a pipeline sees of one fold.

    Attributes:
        x_train: ``(n, p)``, float64.
        y_train: ``(n,)`` or ``(n, k)``, as the user gave it.
        x_test: ``(m, p)``.
        y_test: As ``y_train``.
        weights: ``(n,)`` of the training samples, not negative, or ``None``.
        test_weights: ``(m,)`` of the test samples in the score, of sum 1.
    """

    x_train: Tensor
    y_train: np.ndarray
    x_test: Tensor
    y_test: np.ndarray
    weights: Tensor | None
    test_weights: Tensor


@dataclass(frozen=True)
class FollowedLoss:
    """A differentiable loss in place of a score.

    Attributes:
        label: Its name, for people.
        is_score: Whether it is the score itself but for the sign and a constant.
        function: The loss of one fold.
        of_variation: Whether it is relative to the variation of the targets, which must not be zero then.
        slope: The same in NumPy, with its slope; ``None`` where :attr:`function` does both.
    """

    label: str
    is_score: bool
    function: Loss
    of_variation: bool = False
    slope: Slope | None = None


class AbstractAdapter(abc.ABC):
    """How an estimator of exactly one type is fitted, differentiably. One file per type; no state."""

    name: ClassVar[str]
    type: ClassVar[type[BaseEstimator]]
    usual: ClassVar[dict[str, FloatDistribution]]
    """The hyperparameters that can be differentiated, with the ranges that "auto" takes."""
    vectors: ClassVar[dict[str, str]] = {}
    """Those of them that may be a vector, and one number per what: ``"per_target"``."""

    @abc.abstractmethod
    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        """Why these settings or targets are not for it; ``None`` where they are.

        Raises:
            ValueError: if the estimator itself cannot be fitted to a fold, whatever its hyperparameters.
        """

    def idle(self, estimator: BaseEstimator) -> frozenset[str]:
        """Names in :attr:`usual` of what fits under these settings do not depend on."""
        return frozenset()

    @abc.abstractmethod
    def followed_loss(self, scoring: Any) -> FollowedLoss:
        """The differentiable counterpart of ``scoring``, or the nearest there is."""

    @abc.abstractmethod
    def predict(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, Tensor],
        fold: Fold,
        memory: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Predictions for the test part of a fold, and the targets that they are held to.

        Differentiable in ``params``, and in ``fold.x_train``, ``fold.x_test`` and ``fold.weights``, wherever these require
        grad: penalties and length scales per feature are weights of the features, weights per class those of samples.

        Args:
            estimator: With all other hyperparameters set.
            params: By names in :attr:`usual`, float64: 0-d, or vectors of what :attr:`vectors` says. Those that are not
                searched are what the estimator has, without a graph; what is no number there is left out.
            fold: Finite numbers only. Its tensors may have a graph, and be others in each call.
            memory: Of this fold, for warm starts; at first, it has at most ``"rough"`` (whether the loss is only compared with
                those of points far away, so that an iterative fit may end early) and ``"neighbor"`` (the memory of a fold that
                was fitted just before). Nothing in it has, or comes from what has, a graph.
        """

    def fitted(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, np.ndarray],
        fold: Fold,
        scales: np.ndarray | None,
        memory: dict[str, Any],
    ) -> PlainFit | None:
        """What :meth:`predict` predicts, without a graph, with the slopes of ``params`` and of the weights of features.

        Args:
            estimator: As there.
            params: Arrays in place of tensors.
            fold: Its samples, without a graph and the same ones in each call.
            scales: ``(p,)``, which multiply the features, or ``None``.
            memory: As there, and the same.

        Returns:
            ``None`` where there is no formula, and :meth:`predict` is what there is.
        """
        return None


def tensor(array: Any) -> Tensor:
    """Of float64; a copy of what may not be written, such as a view of a data frame or a memory map of joblib."""
    found = np.ascontiguousarray(array, dtype=np.float64)
    return torch.as_tensor(found if found.flags.writeable else found.copy())
