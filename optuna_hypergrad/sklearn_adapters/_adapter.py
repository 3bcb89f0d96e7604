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
        weights: ``(n,)`` of the training samples, or ``None``.
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
    """

    label: str
    is_score: bool
    function: Loss
    of_variation: bool = False


class AbstractAdapter(abc.ABC):
    """How an estimator of exactly one type is fitted, differentiably. One file per type; no state."""

    name: ClassVar[str]
    type: ClassVar[type[BaseEstimator]]
    usual: ClassVar[dict[str, FloatDistribution]]
    """The hyperparameters that can be differentiated, with the ranges that "auto" takes."""

    @abc.abstractmethod
    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        """Why these settings or targets are not for it; ``None`` where they are."""

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
        """Predictions for the test part of a fold, differentiable in ``params``, and the targets that they are held to.

        Args:
            estimator: With all other hyperparameters set.
            params: By names in :attr:`usual`, 0-d float64.
            fold: Finite numbers only.
            memory: Of this fold, for warm starts; empty at first.
        """


def tensor(array: Any) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(array, dtype=np.float64))
