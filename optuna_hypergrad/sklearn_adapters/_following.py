"""The cross-validated loss as an objective with a hypergradient, where an adapter knows the estimator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from sklearn.base import BaseEstimator, clone
from sklearn.metrics import check_scoring
from sklearn.utils import _safe_indexing, indexable
from torch import Tensor

from ..search_space import Domain
from ._adapter import AbstractAdapter, FollowedLoss, Split
from ._cross_validated import CrossValidatedLoss, Data
from ._descent import Losses, scan, scan_elsewhere
from ._distributions import Space
from ._folds import NoMatrixError, last_step
from ._nested import Freedom
from ._rows import FailedTrialError
from ._vectors import SAMPLE_WEIGHT, Vectors, placed


class NotFollowedError(Exception):
    """Why hypergradients cannot be used; a reason for the user."""


class Followed:
    """The loss that hypergradients follow.

    Args:
        adapter: Of the last step of ``estimator``.
        estimator: An estimator, or a pipeline.
        space: What is searched.
        loss: In place of the score, where it is defined.
        X, y: Data.
        splits: Of all trials.
        weights: ``(n_samples,)`` of ``fit``, or ``None``.
        scored: Whether they count in the score, too.
        warm: Whether a fit may begin where the last one of its fold has ended.

    Attributes:
        names: Hyperparameters that move by their hypergradients: numbers, then vectors.
        floats: Domains of the numbers.
        vectors: The vectors.
        loss: What is followed.
        cross_validated: The loss over ``splits``.
        num_fits: Of folds, so far, over any splits.

    Raises:
        NotFollowedError: if they cannot, for these data, settings or distributions.
        ValueError: for vectors that do not fit, and data that cannot be fitted at all.
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
        warm: bool = True,
    ) -> None:
        self._adapter, self.space, self._warm = adapter, space, warm
        self.num_fits = 0
        _, self._prefix = last_step(estimator)
        self._given = clone(estimator)
        self.floats = {
            name: Domain(d.low, d.high, d.log)
            for name, d in space.items()
            if isinstance(d, FloatDistribution)
            and name.startswith(self._prefix)
            and name.removeprefix(self._prefix) in adapter.usual
            and _is_smooth(d)
        }
        vectors = placed(estimator, adapter, space.vectors)
        self.names = [*self.floats, *vectors]
        if not self.names:
            continuous = ", ".join(repr(self._prefix + n) for n in adapter.usual)
            raise NotFollowedError(
                f"none of {continuous} has a FloatDistribution without a step, above 0"
            )
        X, y = indexable(X, y)
        targets = np.asarray(y)
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = targets[:, 0]
        if targets.dtype.kind == "O" and all(isinstance(t, Real) for t in targets.flat):
            targets = targets.astype(np.float64)
        if targets.dtype.kind == "c":
            raise ValueError("Complex data not supported: the targets are complex.")
        if targets.dtype.kind == "f" and not np.isfinite(targets).all():
            raise NotFollowedError("the targets are not finite real numbers")
        self.loss = _defined(adapter, loss, targets, splits)
        kept = _weights(weights, len(targets))
        self._data = Data(X, targets, kept, scored)
        of_classes = any(v.place == "classes" for v in vectors.values())
        self.vectors = Vectors(vectors, np.unique(targets) if of_classes else np.empty(0))
        self._estimator = clone(estimator).set_params(
            **{n: None for n, v in vectors.items() if v.place in ("features", "classes")}
        )
        positive = self._positive()
        parts = [part for a, b in splits for part in ((a, b) if scored else (a,))]
        if not all(positive[part].any() for part in parts):
            raise NotFollowedError("all samples of a part of a fold have no weight")
        self._check_settings(targets, [(a[positive[a]], b) for a, b in splits])
        self._splits = splits
        self.cross_validated = self.over(splits)
        try:
            self.cross_validated.prepare()
        except Exception as error:
            if not isinstance(error, NoMatrixError) and not self._before():
                raise  # no setting can be fitted
            raise NotFollowedError(f"the data cannot be used: {error}") from error
        if vectors and not self._before():
            self.sizes(self.cross_validated, {})

    def over(self, splits: list[Split]) -> CrossValidatedLoss:
        """The loss over other folds."""
        return CrossValidatedLoss(
            self._adapter,
            self._estimator,
            self.space,
            self.loss,
            self.vectors,
            self._data,
            splits,
            self._warm,
            self._count,
        )

    def _count(self, fits: int) -> None:
        self.num_fits += fits

    def is_usable(self, split: Split) -> bool:
        """Whether a fold can be fitted and scored."""
        train, test = split
        positive = self._positive()
        train = train[positive[train]]
        if not len(train) or not positive[test if self._data.scored else train].any():
            return False
        y = self._data.y
        if not len(test) or (self.loss.of_variation and np.ptp(y[test], axis=0).min() == 0):
            return False
        leaf, _ = last_step(self._estimator)
        try:
            return self._adapter.reason_to_decline(leaf, y, [(train, test)]) is None
        except ValueError:
            return False

    def freedom(self, chosen: Mapping[str, Any]) -> Freedom:
        """The hyperparameters that move, under a setting of the others.

        Raises:
            FailedTrialError: if vectors do not fit what the transformers make.
        """
        try:
            sizes = self.sizes(self.cross_validated, chosen)
        except ValueError as error:
            raise FailedTrialError(str(error)) from error
        domains = {n: v.distribution.domain for n, v in self.vectors.by_name.items()}
        return Freedom(self.floats, domains, sizes, self._as_given(chosen))

    def sizes(self, loss: CrossValidatedLoss, chosen: Mapping[str, Any]) -> dict[str, int]:
        """Of each vector.

        Raises:
            ValueError: if its shape or its groups are another number.
        """
        found = {}
        y = self._data.y
        for name, vector in self.vectors.by_name.items():
            if vector.place == "features":
                count = loss.num_features(chosen)
            elif vector.place == "samples":
                count = len(y)
            elif vector.place == "classes":
                count = len(self.vectors.classes)
            else:
                count = 1 if y.ndim == 1 else y.shape[1]
            vector.check(count)
            found[name] = vector.size(count)
        return found

    def scanned(self, chosen: Mapping[str, Any], freedom: Freedom) -> dict[str, float]:
        """Where a descent begins: the best of a few points, vectors with all entries equal.

        What changes nothing is at the middle.
        """
        at_rest, domains, losses = self._scannable(chosen, freedom)
        return at_rest | scan(losses, domains, freedom.more, len(self._splits))

    def scanned_elsewhere(
        self,
        chosen: Mapping[str, Any],
        freedom: Freedom,
        visited: Sequence[Mapping[str, float]],
        number: int,
    ) -> dict[str, float]:
        """Where the next descent begins: the best of other points, away from those that were visited."""
        at_rest, domains, losses = self._scannable(chosen, freedom)
        if not domains:
            return at_rest
        return at_rest | scan_elsewhere(losses, domains, visited, number, len(self._splits))

    def _scannable(
        self, chosen: Mapping[str, Any], freedom: Freedom
    ) -> tuple[dict[str, float], dict[str, Domain], Losses]:
        """What changes nothing, at the middle; what is scanned; and the losses of the folds there."""
        idle = self.cross_validated.idle(chosen)
        at_rest = {n: d.midpoint() for n, d in freedom.domains.items() if n in idle}
        fixed = {n: torch.tensor(v, dtype=torch.float64) for n, v in at_rest.items()}

        def of(values: Mapping[str, Tensor], first: int, last: int) -> Tensor:
            point = freedom.untied({**fixed, **values})
            return self.cross_validated.each(chosen, point, first, last, rough=True)

        return at_rest, {n: d for n, d in freedom.domains.items() if n not in idle}, of

    def score_of(self, estimator: BaseEstimator, setting: Mapping[str, Any], scoring: Any) -> float:
        """Of scikit-learn's own fits: the mean over the folds. (Weights of samples that are searched are of the fits only.)"""
        learned, weights = self.vectors.of("samples"), self._data.weights
        params = {k: v for k, v in setting.items() if learned is None or k != learned.name}
        of_fits = weights
        if learned is not None:
            of_fits = setting[learned.name] * (1.0 if weights is None else weights)
        model = clone(estimator).set_params(**clone(params, safe=False))
        scorer, scores = check_scoring(model, scoring), []
        for train, test in self._splits:
            given, counted = {}, {}
            if of_fits is not None:
                given[f"{self._prefix}{SAMPLE_WEIGHT}"] = of_fits[train]
            if weights is not None and self._data.scored:
                counted[SAMPLE_WEIGHT] = weights[test]
            X, y = self._data.X, self._data.y
            fitted = clone(model).fit(_safe_indexing(X, train), y[train], **given)
            scores.append(float(scorer(fitted, _safe_indexing(X, test), y[test], **counted)))
        return float(np.mean(scores))

    def _as_given(self, chosen: Mapping[str, Any]) -> dict[str, float]:
        """The hyperparameters of the estimator as the user gave it; weights of one."""
        params = self._given.get_params()
        found = {n: params[n] for n in self.floats}
        for name, vector in self.vectors.by_name.items():
            found[name] = params[name] if vector.place == "targets" else 1.0
        return {n: float(v) for n, v in found.items() if isinstance(v, (int, float))}

    def _positive(self) -> np.ndarray:
        weights = self._data.weights
        return np.ones(len(self._data.y), dtype=bool) if weights is None else weights > 0

    def _before(self) -> list[str]:
        """What is searched of the transformers."""
        return [n for n, _ in self.space.items() if not n.startswith(self._prefix)]

    def _check_settings(self, y: np.ndarray, splits: list[Split]) -> None:
        """Choices of any hyperparameter, and the bounds of the last step's own ones, one at a time."""
        low = {n: d.low for n, d in self.floats.items()}
        for name, vector in self.vectors.by_name.items():
            if vector.place == "targets":
                low[name] = vector.distribution.low
        for params in ({}, *self._choices()):
            leaf, _ = last_step(clone(self._estimator).set_params(**params))
            if type(leaf) is not self._adapter.type:
                raise NotFollowedError(
                    f"{type(leaf).__name__} is among the choices of the last step"
                )
            leaf.set_params(**{n.removeprefix(self._prefix): v for n, v in low.items()})
            reason = self._adapter.reason_to_decline(leaf, y, splits)
            if reason is not None:
                raise NotFollowedError(reason)

    def _choices(self) -> Iterator[dict[str, Any]]:
        for name, distribution in self.space.items():
            if name in self.names:
                continue
            if isinstance(distribution, CategoricalDistribution):
                values = distribution.choices
            elif name.startswith(self._prefix):
                assert isinstance(distribution, (FloatDistribution, IntDistribution))
                values = (distribution.low, distribution.high)
            else:
                continue
            steps = self.space.steps_of(name)
            for chosen in itertools.product(values, *steps.values()):
                yield self.space.decode(dict(zip((name, *steps), chosen, strict=True)))


def _defined(
    adapter: AbstractAdapter, loss: FollowedLoss, y: np.ndarray, splits: list[Split]
) -> FollowedLoss:
    """The loss, or one that is defined for targets that do not vary in a fold."""
    if y.dtype.kind not in "biuf":  # for the adapter to decline
        return loss
    if not loss.of_variation or all(np.ptp(y[test], axis=0).min() > 0 for _, test in splits):
        return loss
    other = adapter.followed_loss("neg_mean_squared_error")
    why = f"{other.label} (as {loss.label} of a fold is not defined: its targets do not vary)"
    return replace(other, label=why, is_score=False)


def _is_smooth(distribution: FloatDistribution) -> bool:
    return distribution.step is None and 0 < distribution.low < distribution.high


def _weights(given: Any, num_samples: int) -> np.ndarray | None:
    if given is None:
        return None
    weights = np.asarray(given, dtype=np.float64)
    if weights.shape != (num_samples,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise NotFollowedError("sample_weight is not a vector of numbers >= 0, one per sample")
    return weights
