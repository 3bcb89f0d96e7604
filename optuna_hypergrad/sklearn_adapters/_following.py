"""The cross-validated loss as an objective with a hypergradient, where an adapter knows the estimator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from sklearn.base import BaseEstimator, clone
from sklearn.utils import indexable
from torch import Tensor

from ..studies import DifferentiableTrial
from ._adapter import AbstractAdapter, FollowedLoss, Split
from ._distributions import Space, suggest
from ._folds import Folds, last_step
from ._rows import FailedTrialError


class NotFollowedError(Exception):
    """Why hypergradients cannot be used; a reason for the user."""


class Followed:
    """The loss that hypergradients follow.

    Args:
        adapter: Of the last step of ``estimator``.
        estimator: An estimator, or a pipeline.
        space: What is searched.
        loss: In place of the score.
        X, y: Data.
        splits: Of all trials.
        weights: ``(n_samples,)`` of ``fit``, or ``None``.
        scored: Whether they count in the score, too.

    Attributes:
        names: Hyperparameters that move by their hypergradients.

    Raises:
        NotFollowedError: if they cannot, for these data, settings or distributions.
    """

    def __init__(
        self,
        adapter: AbstractAdapter,
        estimator: BaseEstimator,
        space: Space,
        loss: FollowedLoss,
        X: Any,
        y: Any,
        splits: list[Split],
        weights: Any,
        scored: bool,
    ) -> None:
        self._adapter, self._estimator, self._space, self.loss = adapter, estimator, space, loss
        _, self._prefix = last_step(estimator)
        self.names = [
            self._prefix + name
            for name in adapter.usual
            if _is_smooth(space.distributions.get(self._prefix + name))
        ]
        if not self.names:
            continuous = ", ".join(repr(self._prefix + n) for n in adapter.usual)
            raise NotFollowedError(
                f"none of {continuous} has a FloatDistribution without a step, above 0"
            )
        X, y = indexable(X, y)
        targets = np.asarray(y)
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = targets[:, 0]
        self._check_targets(targets, splits)
        kept = _weights(weights, len(targets))
        positive = np.ones(len(targets), dtype=bool) if kept is None else kept > 0
        parts = [part for a, b in splits for part in ((a, b) if scored else (a,))]
        if not all(positive[part].any() for part in parts):
            raise NotFollowedError("all samples of a part of a fold have no weight")
        self._check_settings(targets, [(a[positive[a]], b) for a, b in splits])
        self._folds = Folds(X, targets, splits, kept, scored)
        try:
            self._folds.of(estimator, ())
        except Exception as error:
            raise NotFollowedError(f"the data cannot be used: {error}") from error

    def objective(self, trial: DifferentiableTrial) -> Tensor:
        """The mean loss over the folds."""
        chosen: dict[str, Any] = {}
        moved: dict[str, Tensor] = {}
        for name, distribution in self._space.items():
            if name in self.names:
                assert isinstance(distribution, FloatDistribution)
                moved[name.removeprefix(self._prefix)] = trial.suggest_float(
                    name, distribution.low, distribution.high, log=distribution.log
                )
            else:
                chosen[name] = suggest(trial, name, distribution)
        estimator = clone(self._estimator).set_params(**self._space.decode(chosen))
        before = {k: v for k, v in chosen.items() if not k.startswith(self._prefix)}
        try:
            folds = self._folds.of(estimator, tuple(before.items()))
        except Exception as error:
            raise FailedTrialError(f"{before}: {error}") from error
        memories = self._folds.memories(tuple(chosen.items()))
        leaf, _ = last_step(estimator)
        losses = [
            self.loss.function(*self._adapter.predict(leaf, moved, fold, memory), fold.test_weights)
            for fold, memory in zip(folds, memories, strict=True)
        ]
        return torch.stack(losses).mean()

    def _check_targets(self, y: np.ndarray, splits: list[Split]) -> None:
        if y.dtype.kind == "c" or (y.dtype.kind == "f" and not np.isfinite(y).all()):
            raise NotFollowedError("the targets are not finite real numbers")
        if self.loss.of_variation and any(np.ptp(y[test], axis=0).min() == 0 for _, test in splits):
            raise NotFollowedError(
                f"{self.loss.label} of a fold is not defined: its targets do not vary"
            )

    def _check_settings(self, y: np.ndarray, splits: list[Split]) -> None:
        """Choices of any hyperparameter, and the bounds of the last step's own ones, one at a time."""
        for params in ({}, *self._choices()):
            leaf, _ = last_step(clone(self._estimator).set_params(**params))
            if type(leaf) is not self._adapter.type:
                raise NotFollowedError(
                    f"{type(leaf).__name__} is among the choices of the last step"
                )
            reason = self._adapter.reason_to_decline(leaf, y, splits)
            if reason is not None:
                raise NotFollowedError(reason)

    def _choices(self) -> Iterator[dict[str, Any]]:
        for name, distribution in self._space.items():
            if name in self.names:
                continue
            if isinstance(distribution, CategoricalDistribution):
                yield from (self._space.decode({name: c}) for c in distribution.choices)
            elif name.startswith(self._prefix):
                assert isinstance(distribution, (FloatDistribution, IntDistribution))
                yield from ({name: v} for v in (distribution.low, distribution.high))


def _is_smooth(distribution: BaseDistribution | None) -> bool:
    return (
        isinstance(distribution, FloatDistribution)
        and distribution.step is None
        and 0 < distribution.low < distribution.high
    )


def _weights(given: Any, num_samples: int) -> np.ndarray | None:
    if given is None:
        return None
    weights = np.asarray(given, dtype=np.float64)
    if weights.shape != (num_samples,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise NotFollowedError("sample_weight is not a vector of numbers >= 0, one per sample")
    return weights


@contextmanager
def one_thread() -> Iterator[None]:
    """Fits of this size are faster on one thread of torch (and BLAS) than on many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
