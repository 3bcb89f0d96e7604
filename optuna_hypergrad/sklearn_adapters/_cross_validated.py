"""The cross-validated loss as a differentiable function of hyperparameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from torch import Tensor

from ._adapter import AbstractAdapter, Fold, FollowedLoss, Split
from ._distributions import Space
from ._folds import Folds, last_step, remembered
from ._plain import SCALES, PlainFit, losses_of
from ._rows import FailedTrialError
from ._vectors import Vectors

_KEPT_SAMPLES = 1000
"""Fits of a scan to more of them are not kept for the first trial, which begins at the best one: their kernels take too much memory."""


@dataclass(frozen=True)
class Data:
    """What a search is given.

    Attributes:
        X: As the user gave them.
        y: Targets, an array.
        weights: ``(n_samples,)`` or ``None``.
        scored: Whether they count in the score, too.
    """

    X: Any
    y: np.ndarray
    weights: np.ndarray | None
    scored: bool


class CrossValidatedLoss:
    """The loss of each fold.

    Args:
        adapter: Of the last step of ``estimator``.
        estimator: An estimator, or a pipeline.
        space: What is searched.
        loss: Of one fold.
        vectors: Those that are searched.
        data: All samples.
        splits: The folds.
        warm: Whether a fit may begin where the last one of its fold has ended.
        fitted: Is told of the number of folds that were fitted, each time.

    Attributes:
        splits: The folds.
    """

    def __init__(
        self,
        adapter: AbstractAdapter,
        estimator: BaseEstimator,
        space: Space,
        loss: FollowedLoss,
        vectors: Vectors,
        data: Data,
        splits: list[Split],
        warm: bool,
        fitted: Callable[[int], None],
    ) -> None:
        self._adapter, self._estimator, self._space, self._loss = adapter, estimator, space, loss
        self._vectors, self.splits, self._warm = vectors, splits, warm
        self._folds = Folds(data.X, data.y, splits, data.weights, data.scored)
        _, self._prefix = last_step(estimator)
        self._estimators: OrderedDict[Hashable, tuple[BaseEstimator, dict[str, Tensor]]] = (
            OrderedDict()
        )
        self._fitted = fitted

    def __call__(self, chosen: Mapping[str, Any], values: Mapping[str, Tensor]) -> Tensor:
        """The mean over the folds.

        Args:
            chosen: Hyperparameters that are not differentiated, as a study knows them.
            values: The others, by name: 0-d tensors, and vectors of what is searched.

        Raises:
            FailedTrialError: if the transformers cannot be fitted.
        """
        return self.each(chosen, values).mean()

    def each(
        self,
        chosen: Mapping[str, Any],
        values: Mapping[str, Tensor],
        first: int = 0,
        last: int | None = None,
        rough: bool = False,
    ) -> Tensor:
        """``(num_folds,)``, of the folds from ``first`` to before ``last``; see :meth:`__call__`.

        Where ``rough``, iterative fits may end early: the losses are only compared with others, of points that are far away.
        """
        fits = self._fits(chosen, values, first, last, rough)
        if fits is not None:
            given, plain = fits
            return losses_of(plain, self._slope, given)
        predicted = self._predicted(chosen, values, first, last, rough)
        return torch.stack([self._loss.function(*found, share) for found, share in predicted])

    def with_influences(
        self, chosen: Mapping[str, Any], values: Mapping[str, Tensor]
    ) -> list[tuple[float, Tensor]]:
        """The loss of each fold, and the influence of its test samples on it, ``(m,)``, each times its share of the weight.

        They add up to zero, and the sum of their squares is the variance of the loss over other test samples, to first
        order (none is seen where there is one sample). Of a mean of losses ``l_i`` they are ``(l_i - loss) / sqrt(m (m - 1))``.

        Reference: Efron (1982), "The jackknife, the bootstrap and other resampling plans", chapter 6 (the infinitesimal
        jackknife).
        """
        with torch.no_grad():
            fits = self._fits(chosen, values)
            if fits is None:
                predicted = self._predicted(chosen, values)
            else:
                predicted = [
                    ((torch.as_tensor(f.prediction), torch.as_tensor(f.target)), torch.as_tensor(s))
                    for f, s in fits[1]
                ]
        found = []
        for (prediction, target), share in predicted:
            with torch.enable_grad():
                leaf = share.detach().clone().requires_grad_()
                loss = self._loss.function(prediction, target, leaf)
                (slope,) = torch.autograd.grad(loss, [leaf])
            freedom = (1 - share.square().sum()).clamp(min=1e-12)  # (m - 1) / m, of equal shares
            found.append((float(loss.detach()), share * (slope - share @ slope) / freedom.sqrt()))
        return found

    def _predicted(
        self,
        chosen: Mapping[str, Any],
        values: Mapping[str, Tensor],
        first: int = 0,
        last: int | None = None,
        rough: bool = False,
    ) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Predictions with their targets, and the weights of the test samples, of each fold."""
        leaf, given, every = self._at(chosen)
        floats = self._floats(values)
        found = []
        for fold, split, memory in _in_turn(every, first, last, rough):
            seen, arguments = self._vectors.applied(fold, split, values)
            params = {**given, **floats, **arguments}
            found.append((self._adapter.predict(leaf, params, seen, memory), fold.test_weights))
        self._fitted(len(found))
        return found

    def _fits(
        self,
        chosen: Mapping[str, Any],
        values: Mapping[str, Tensor],
        first: int = 0,
        last: int | None = None,
        rough: bool = False,
    ) -> tuple[dict[str, Tensor], list[tuple[PlainFit, np.ndarray]]] | None:
        """Fits with formulas for slopes, and the weights of the test samples; and the hyperparameters by the adapter's names.

        ``None`` where there is none of one of the folds.
        """
        vectors = self._vectors
        if vectors.of("samples") is not None or vectors.of("classes") is not None:
            return None
        leaf, fixed, every = self._at(chosen)
        given = self._floats(values)
        for name, vector in vectors.by_name.items():
            key = SCALES if vector.place == "features" else vector.argument
            given[key] = vector.spread(values[name])
        params = {k: v.detach().numpy() for k, v in {**fixed, **given}.items()}
        point = tuple((k, v.tobytes()) for k, v in sorted(params.items()))
        scales, found, new = params.pop(SCALES, None), [], 0
        for fold, _, memory in _in_turn(every, first, last, rough):
            kept = memory.setdefault("scanned", {})
            fit = kept.get(point)
            if fit is None:
                with np.errstate(all="ignore"):  # what is not finite is seen in the loss
                    fit = self._adapter.fitted(leaf, params, fold, scales, memory)
                if fit is None:
                    return None
                new += 1
            if not rough:
                kept.clear()
            elif fit.exact and len(fold.x_train) <= _KEPT_SAMPLES:
                kept[point] = fit
            found.append((fit, fold.test_weights.numpy()))
        self._fitted(new)
        return given, found

    def _at(
        self, chosen: Mapping[str, Any]
    ) -> tuple[BaseEstimator, dict[str, Tensor], list[tuple[Fold, Split, dict[str, Any]]]]:
        """The last step under a setting, the numbers that it has, and each fold with its memory."""
        estimator, given = remembered(
            self._estimators, tuple(chosen.items()), lambda: self._with(chosen)
        )
        folds = self._of(estimator, chosen)
        memories: list[dict[str, Any]] = [{} for _ in folds]
        if self._warm:
            memories = self._folds.memories(tuple(chosen.items()))
        every = list(zip(folds, self.splits, memories, strict=True))
        return last_step(estimator)[0], given, every

    def _floats(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is no vector, by the adapter's names."""
        return {
            name.removeprefix(self._prefix): value
            for name, value in values.items()
            if name not in self._vectors.by_name
        }

    def _slope(
        self, prediction: np.ndarray, target: np.ndarray, weights: np.ndarray
    ) -> tuple[float, np.ndarray]:
        if self._loss.slope is not None:
            return self._loss.slope(prediction, target, weights)
        with torch.enable_grad():
            leaf = torch.tensor(prediction, requires_grad=True)
            loss = self._loss.function(leaf, torch.as_tensor(target), torch.as_tensor(weights))
            (by,) = torch.autograd.grad(loss, [leaf])
        return float(loss.detach()), by.numpy()

    def prepare(self) -> None:
        """Fit the transformers as they are; what is wrong with the data is said now."""
        self._folds.of(self._estimator, ())

    def num_features(self, chosen: Mapping[str, Any]) -> int:
        """That the last step sees.

        Raises:
            FailedTrialError: if it sees another number in each fold, or the transformers cannot be fitted.
        """
        estimator, _ = self._with(chosen)
        found = {fold.x_train.shape[1] for fold in self._of(estimator, chosen)}
        if len(found) > 1:
            raise FailedTrialError(
                f"the transformers make another number of features in each fold, {sorted(found)}, so that there is no "
                f"vector of one number per feature"
            )
        return int(found.pop())

    def idle(self, chosen: Mapping[str, Any]) -> set[str]:
        """Hyperparameters that change nothing under a setting."""
        return {self._prefix + n for n in self._adapter.idle(self._at(chosen)[0])}

    def _with(self, chosen: Mapping[str, Any]) -> tuple[BaseEstimator, dict[str, Tensor]]:
        """The estimator of a setting, and the numbers that it has where they could be differentiated."""
        estimator = self._estimator
        if chosen:
            estimator = clone(estimator).set_params(**self._space.decode(chosen))
        return estimator, _numbers(last_step(estimator)[0], self._adapter)

    def _of(self, estimator: BaseEstimator, chosen: Mapping[str, Any]) -> Any:
        before = {k: v for k, v in chosen.items() if not k.startswith(self._prefix)}
        try:
            return self._folds.of(estimator, tuple(before.items()))
        except Exception as error:
            raise FailedTrialError(f"{before}: {error}") from error


def _numbers(leaf: BaseEstimator, adapter: AbstractAdapter) -> dict[str, Tensor]:
    """What an adapter can differentiate, as the estimator has it."""
    params = leaf.get_params(deep=False)
    found = {}
    for name in adapter.usual:
        value: Any = params.get(name)
        is_vector = name in adapter.vectors and isinstance(value, (list, tuple, np.ndarray))
        if is_vector or (isinstance(value, Real) and value is not True and value is not False):
            found[name] = torch.as_tensor(value, dtype=torch.float64)
    return found


def _in_turn(
    every: list[tuple[Fold, Split, dict[str, Any]]], first: int, last: int | None, rough: bool
) -> Iterator[tuple[Fold, Split, dict[str, Any]]]:
    """Folds from ``first`` to before ``last``, the memories of which know how fits are to be and what was fitted just before."""
    neighbor = every[first - 1][2] if first > 0 else {}
    for fold, split, memory in every[first:last]:
        memory |= {"rough": rough, "neighbor": neighbor}
        neighbor = memory
        yield fold, split, memory
