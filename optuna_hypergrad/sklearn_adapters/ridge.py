"""Ridge regression, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from sklearn.linear_model import Ridge
from torch import Tensor

from ..closed_form.ridge import ridge
from ._adapter import AbstractAdapter, Fold, FollowedLoss, Split, tensor
from ._losses import reason_against_targets, regression_loss
from ._normal_equations import fit_and_predict
from ._plain import PlainFit
from ._shrinkage import along_penalties, along_weights


class RidgeAdapter(AbstractAdapter):
    """``sklearn.linear_model.Ridge``: one penalty or one per target, with or without an intercept.

    Reference: Hoerl & Kennard (1970), "Ridge regression".
    """

    name: ClassVar[str] = "ridge"
    type: ClassVar[type[BaseEstimator]] = Ridge
    usual: ClassVar[dict[str, FloatDistribution]] = {
        "alpha": FloatDistribution(1e-6, 1e6, log=True)
    }
    vectors: ClassVar[dict[str, str]] = {"alpha": "per_target"}

    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        if estimator.positive:
            return "Ridge(positive=True) has no closed form"
        if not (np.asarray(estimator.alpha) > 0).all():
            return f"Ridge(alpha={estimator.alpha!r}) has no penalty"
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
        if "y" not in memory:
            memory["y"] = y, _ = tensor(fold.y_train), tensor(fold.y_test)
            memory["wide"] = y if y.dim() == 2 else y[:, None]
        alpha, (y, y_test) = params["alpha"], memory["y"]
        wide = memory["wide"]
        n, p = fold.x_train.shape
        if alpha.dim() == 0 and p <= n:
            weights = torch.ones(n, dtype=y.dtype) if fold.weights is None else fold.weights
            found = fit_and_predict(
                fold.x_train, wide, weights, alpha, estimator.fit_intercept, fold.x_test
            )
            return found if y.dim() == 2 else found[:, 0], y_test
        if alpha.dim() == 1:  # one per target
            alpha = alpha.expand(1, 1 if y.dim() == 1 else y.shape[1])
        model = ridge(
            fold.x_train,
            y,
            alpha,
            intercept=estimator.fit_intercept,
            sample_weight=fold.weights,
        )
        return model.predict(fold.x_test), y_test

    def fitted(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, np.ndarray],
        fold: Fold,
        scales: np.ndarray | None,
        memory: dict[str, Any],
    ) -> PlainFit | None:
        alpha, intercept = params["alpha"], bool(estimator.fit_intercept)
        if scales is None:
            return along_penalties(fold, alpha, intercept, memory)
        if alpha.ndim:
            return None
        return along_weights(fold, alpha, scales, intercept, memory)
