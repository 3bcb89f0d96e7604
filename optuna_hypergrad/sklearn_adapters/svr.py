"""Support vector regression, by implicit differentiation on the free support vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from sklearn.svm import SVR
from torch import Tensor

from ._adapter import AbstractAdapter, Fold, FollowedLoss, Split, tensor
from ._kernels import of_fold, with_zero_slopes
from ._losses import regression_loss
from ._machines import kernel_settings, reason_against_kernel, regressor_start
from ._support_vectors import Machine, solved


class SVRAdapter(AbstractAdapter):
    """``sklearn.svm.SVR`` with a linear, rbf or polynomial kernel: ``C``, ``gamma`` and ``epsilon``.

    Reference: Chapelle, Vapnik, Bousquet & Mukherjee (2002), "Choosing multiple parameters for support vector machines".
    """

    name: ClassVar[str] = "svr"
    type: ClassVar[type[BaseEstimator]] = SVR
    usual: ClassVar[dict[str, FloatDistribution]] = {
        "C": FloatDistribution(1e-3, 1e4, log=True),
        "gamma": FloatDistribution(1e-5, 1e1, log=True),
        "epsilon": FloatDistribution(1e-4, 1e1, log=True),
    }

    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        if not np.issubdtype(y.dtype, np.number) or y.ndim != 1:
            return "the targets are not one number for each sample"
        if not estimator.epsilon > 0:
            return f"SVR(epsilon={estimator.epsilon!r:.60}) is not adapted"
        return reason_against_kernel(estimator)

    def followed_loss(self, scoring: Any) -> FollowedLoss:
        return regression_loss(scoring)

    def predict(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, Tensor],
        fold: Fold,
        memory: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        among, across = of_fold(
            estimator.kernel, kernel_settings(estimator, params, fold), fold, memory
        )
        y = tensor(fold.y_train)
        c, epsilon = (
            params.get(name, torch.tensor(float(getattr(estimator, name)), dtype=torch.float64))
            for name in ("C", "epsilon")
        )
        most = c * (torch.ones_like(y) if fold.weights is None else fold.weights)
        nothing = torch.zeros_like(y)
        machine = Machine(
            among,
            np.tile(np.arange(len(y)), 2),
            torch.cat([y - epsilon, y + epsilon]),
            torch.cat([nothing, -most]),
            torch.cat([most, nothing]),
        )
        beta, b, _ = solved(machine, regressor_start(machine, float(epsilon.detach())))
        predicted = across @ (beta[: len(y)] + beta[len(y) :]) + b
        used = {"C", "epsilon"} if estimator.kernel == "linear" else set(params)
        return with_zero_slopes(predicted, params, used), tensor(fold.y_test)
