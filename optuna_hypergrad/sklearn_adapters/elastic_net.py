"""The elastic net, by implicit differentiation on its support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from sklearn.linear_model import ElasticNet
from torch import Tensor

from . import _sparse_linear
from ._adapter import AbstractAdapter, Fold, FollowedLoss, Split, tensor
from ._kernels import remembered, with_zero_slopes
from ._losses import reason_against_targets, regression_loss
from ._plain import SCALES, PlainFit


class ElasticNetAdapter(AbstractAdapter):
    """``sklearn.linear_model.ElasticNet``: ``alpha`` and ``l1_ratio``, one or several targets.

    Fits are exact, and start from the fold's last one. Where ``alpha`` is so large that no feature is left, the loss is that
    of the mean of the targets, whatever ``alpha``, and its slope is zero.

    Reference: Bertrand et al. (2022), "Implicit differentiation for fast hyperparameter selection in non-smooth convex
    learning".
    """

    name: ClassVar[str] = "elastic_net"
    type: ClassVar[type[BaseEstimator]] = ElasticNet
    usual: ClassVar[dict[str, FloatDistribution]] = {
        "alpha": FloatDistribution(1e-4, 1e2, log=True),
        "l1_ratio": FloatDistribution(0.01, 1.0),
    }

    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        name = self.type.__name__
        if not estimator.alpha > 0:
            return f"{name}(alpha={estimator.alpha!r:.60}) has no penalty"
        if not estimator.l1_ratio > 0:
            return f"{name}(l1_ratio={estimator.l1_ratio!r:.60}) is a ridge regression, and smooth: use Ridge"
        if estimator.positive and y.ndim > 1:
            return f"{name}(positive=True) is not defined for several targets"
        return reason_against_targets(y)

    def followed_loss(self, scoring: Any) -> FollowedLoss:
        return regression_loss(scoring)

    def predict(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, Tensor],
        fold: Fold,
        memory: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        alpha, l1_ratio = (
            params.get(name, torch.tensor(float(getattr(estimator, name)), dtype=torch.float64))
            for name in ("alpha", "l1_ratio")
        )
        l1, l2 = alpha * l1_ratio, alpha * (1 - l1_ratio)
        x, y, shares = fold.x_train, tensor(fold.y_train), _shares(fold)
        columns = y.unsqueeze(1) if y.dim() == 1 else y
        intercept, predicted = estimator.fit_intercept, []
        for k, target in enumerate(columns.unbind(1)):
            data = _data(fold, k, intercept, memory)
            found = memory[f"coef {k}"] = _sparse_linear.coefficients(
                data,
                float(l1.detach()),
                float(l2.detach()),
                estimator.positive,
                memory.get(f"coef {k}"),
            )
            w, support, constant = _sparse_linear.fitted(
                x, target, shares, l1, l2, found, data, intercept
            )
            predicted.append(fold.x_test[:, support] @ w + constant)
        together = predicted[0] if y.dim() == 1 else torch.stack(predicted, 1)
        return with_zero_slopes(together + 0.0 * (l1 + l2), params, set(params)), tensor(
            fold.y_test
        )

    def fitted(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, np.ndarray],
        fold: Fold,
        scales: np.ndarray | None,
        memory: dict[str, Any],
    ) -> PlainFit | None:
        alpha, l1_ratio = (
            float(params.get(name, getattr(estimator, name))) for name in ("alpha", "l1_ratio")
        )
        l1, l2 = alpha * l1_ratio, alpha * (1 - l1_ratio)
        target = np.asarray(fold.y_test, dtype=np.float64)
        fits = []
        for k in range(1 if target.ndim == 1 else target.shape[1]):
            data = _data(fold, k, bool(estimator.fit_intercept), memory)
            seen = data if scales is None else data.weighted(scales)
            w = _sparse_linear.coefficients(
                seen, l1, l2, estimator.positive, memory.get(f"coef {k}")
            )
            memory[f"coef {k}"] = w
            fits.append(_sparse_linear.Solution.of(seen, w, l1, l2, scales))
        x_test = fold.x_test.numpy()
        predicted = [fit.predicted(x_test) for fit in fits]

        def pull(slope: np.ndarray) -> dict[str, Any]:
            columns = slope[None] if slope.ndim == 1 else slope.T
            pulled = [fit.pulled(x_test, by) for fit, by in zip(fits, columns, strict=True)]
            by_l1, by_l2 = (sum(p[i] for p in pulled) for i in (0, 1))
            by_alpha = l1_ratio * by_l1 + (1 - l1_ratio) * by_l2
            found = {"alpha": by_alpha, "l1_ratio": alpha * (by_l1 - by_l2)}
            return found if scales is None else {**found, SCALES: sum(p[2] for p in pulled)}

        return PlainFit(predicted[0] if target.ndim == 1 else np.stack(predicted, 1), target, pull)


def _shares(fold: Fold) -> Tensor:
    if fold.weights is None:
        return fold.x_train.new_full((len(fold.x_train),), 1 / len(fold.x_train))
    return fold.weights / fold.weights.sum()


def _data(
    fold: Fold, column: int, intercept: bool, memory: dict[str, Any]
) -> _sparse_linear.Centered:
    """The samples and one of the targets; once for as long as they are the same."""

    def made() -> _sparse_linear.Centered:
        y = tensor(fold.y_train)
        target = y if y.dim() == 1 else y[:, column]
        x, shares = fold.x_train.detach(), _shares(fold).detach()
        return _sparse_linear.Centered.of(x, target, shares, intercept)

    given = (fold.x_train, fold.weights, fold.y_train)
    found: _sparse_linear.Centered = remembered(memory, f"data {column}", given, made)
    return found
