"""Ridge regression, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from sklearn.linear_model import Ridge
from torch import Tensor

from ..closed_form.ridge import ridge
from ._adapter import AbstractAdapter, Fold, FollowedLoss, Split, tensor
from ._losses import regression_loss


class RidgeAdapter(AbstractAdapter):
    """``sklearn.linear_model.Ridge``: one penalty, one or several targets, with or without an intercept.

    Reference: Hoerl & Kennard (1970), "Ridge regression".
    """

    name: ClassVar[str] = "ridge"
    type: ClassVar[type[BaseEstimator]] = Ridge
    usual: ClassVar[dict[str, FloatDistribution]] = {
        "alpha": FloatDistribution(1e-6, 1e6, log=True)
    }

    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        if estimator.positive:
            return "Ridge(positive=True) has no closed form"
        if not np.issubdtype(y.dtype, np.number):
            return f"the targets are {y.dtype}, not numbers"
        return None

    def followed_loss(self, scoring: Any) -> FollowedLoss:
        return regression_loss(scoring)

    def predict(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, Tensor],
        fold: Fold,
        memory: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        model = ridge(
            fold.x_train,
            tensor(fold.y_train),
            params["alpha"],
            intercept=estimator.fit_intercept,
            sample_weight=fold.weights,
        )
        return model.predict(fold.x_test), tensor(fold.y_test)
