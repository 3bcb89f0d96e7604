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
from ._kernels import of_fold, pairs_of_fold, with_zero_slopes
from ._losses import regression_loss
from ._machines import kernel_settings, reason_against_kernel, regressor_start
from ._plain import PlainFit
from ._regressor_fit import RegressorFit
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

    def idle(self, estimator: BaseEstimator) -> frozenset[str]:
        return frozenset({"gamma"} if estimator.kernel == "linear" else ())

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
        start = regressor_start(
            among.detach().numpy(), y.numpy(), most.detach().numpy(), float(epsilon.detach())
        )
        beta, b, _ = solved(machine, start)
        predicted = across @ (beta[: len(y)] + beta[len(y) :]) + b
        used = {"C", "epsilon"} if estimator.kernel == "linear" else set(params)
        return with_zero_slopes(predicted, params, used), tensor(fold.y_test)

    def fitted(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, np.ndarray],
        fold: Fold,
        scales: np.ndarray | None,
        memory: dict[str, Any],
    ) -> PlainFit | None:
        if scales is not None or estimator.kernel not in ("linear", "rbf"):
            return None
        among, across = pairs_of_fold(estimator.kernel, fold, memory)
        gamma = None
        if estimator.kernel == "rbf":
            given = params if "gamma" in params else kernel_settings(estimator, {}, fold)
            gamma = float(given["gamma"])
        c, epsilon = (
            float(params.get(name, getattr(estimator, name))) for name in ("C", "epsilon")
        )
        y, y_test = (np.asarray(part, dtype=np.float64) for part in (fold.y_train, fold.y_test))
        weights = np.ones(len(y)) if fold.weights is None else fold.weights.numpy()
        fit = RegressorFit.of(among.numpy(), across.numpy(), gamma, y, c * weights, epsilon)
        if fit is None:
            return None

        def pull(slope: np.ndarray) -> dict[str, float]:
            by_scale, by_epsilon, by_gamma = fit.pulled(slope)
            return {"C": by_scale / c, "epsilon": by_epsilon, "gamma": by_gamma}

        return PlainFit(fit.predicted(), y_test, pull)
