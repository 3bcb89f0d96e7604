"""Kernel ridge regression, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor

from ..closed_form.kernel_ridge import kernel_ridge
from ._adapter import AbstractAdapter, Fold, FollowedLoss, Split, tensor
from ._kernels import (
    KERNELS,
    is_radial,
    of_fold,
    pairs_of_fold,
    remembered,
    with_zero_slopes,
)
from ._losses import reason_against_targets, regression_loss
from ._plain import PlainFit
from ._radial import KernelPredictions, radial_fit
from ._shrinkage import along_penalties


class KernelRidgeAdapter(AbstractAdapter):
    """``sklearn.kernel_ridge.KernelRidge``: its penalty, one or one per target, and ``gamma`` of its kernel, where it has
    one.

    The kernels are linear, rbf, laplacian, polynomial (of a degree from 1 on) and sigmoid. Distances are kept per fold, and
    one factorization gives a fit and all its derivatives.

    Reference: Saunders, Gammerman & Vovk (1998), "Ridge regression learning algorithm in dual variables".
    """

    name: ClassVar[str] = "kernel_ridge"
    type: ClassVar[type[BaseEstimator]] = KernelRidge
    usual: ClassVar[dict[str, FloatDistribution]] = {
        "alpha": FloatDistribution(1e-6, 1e3, log=True),
        "gamma": FloatDistribution(1e-4, 1e2, log=True),
    }
    vectors: ClassVar[dict[str, str]] = {"alpha": "per_target"}

    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        if not isinstance(estimator.kernel, str) or estimator.kernel not in KERNELS:
            return f"KernelRidge(kernel={estimator.kernel!r:.60}) is not adapted"
        polynomial = estimator.kernel.startswith("poly")
        if polynomial and not (estimator.degree >= 1 and estimator.degree == int(estimator.degree)):
            return f"a polynomial kernel of degree {estimator.degree!r:.60} is not adapted"
        if polynomial and estimator.coef0 < 0:
            return f"a polynomial kernel with coef0={estimator.coef0!r:.60} is not positive"
        if not np.min(estimator.alpha) > 0:
            return f"KernelRidge(alpha={estimator.alpha!r:.60}) may have no solution"
        return reason_against_targets(y)

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
        alpha = params.get("alpha", tensor(estimator.alpha))
        gamma = 1 / fold.x_train.shape[1] if estimator.gamma is None else estimator.gamma
        fixed = {"gamma": gamma, "coef0": estimator.coef0, "degree": int(estimator.degree)}
        settings = {**fixed, **params}
        y = remembered(memory, "y", (fold.y_train,), lambda: tensor(fold.y_train))
        y_test = remembered(memory, "y_test", (fold.y_test,), lambda: tensor(fold.y_test))
        if alpha.dim() == 0 and is_radial(estimator.kernel, fold):
            among, across = pairs_of_fold(estimator.kernel, fold, memory)
            linear = estimator.kernel == "linear"
            scale = None if linear else torch.as_tensor(settings["gamma"], dtype=y.dtype)
            root = None if fold.weights is None else fold.weights.sqrt()
            wide = y if y.dim() == 2 else y[:, None]
            found: Tensor = KernelPredictions.apply(  # type: ignore[no-untyped-call]
                among, across, scale, alpha, wide, root
            )
            used = {"alpha"} if linear else set(params)
            return with_zero_slopes(found if y.dim() == 2 else found[:, 0], params, used), y_test
        among, across = of_fold(estimator.kernel, settings, fold, memory)
        if estimator.kernel == "sigmoid":
            dual = _indefinite(among, y, alpha, fold.weights)
        else:
            penalty = alpha.reshape(1, -1) if alpha.dim() else alpha
            dual = kernel_ridge(among, y, penalty, sample_weight=fold.weights)
        used = {"alpha"} if estimator.kernel == "linear" else set(params)
        return with_zero_slopes(across @ dual, params, used), y_test

    def fitted(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, np.ndarray],
        fold: Fold,
        scales: np.ndarray | None,
        memory: dict[str, Any],
    ) -> PlainFit | None:
        alpha = np.asarray(params.get("alpha", estimator.alpha), dtype=np.float64)
        if scales is not None or estimator.kernel not in ("linear", "rbf", "laplacian"):
            return None
        if estimator.kernel == "linear":
            return along_penalties(fold, alpha, False, memory)
        if alpha.ndim:
            return None
        among, across = pairs_of_fold(estimator.kernel, fold, memory)
        gamma = 1 / fold.x_train.shape[1] if estimator.gamma is None else estimator.gamma
        y, y_test = (np.asarray(part, dtype=np.float64) for part in (fold.y_train, fold.y_test))
        root = None if fold.weights is None else fold.weights.sqrt().numpy()
        given = float(params.get("gamma", gamma)), float(alpha)
        return radial_fit(among.numpy(), across.numpy(), *given, y, y_test, root)


def _indefinite(kernel: Tensor, y: Tensor, alpha: Tensor, weights: Tensor | None) -> Tensor:
    """``S^1/2 (S^1/2 K S^1/2 + alpha)^-1 S^1/2 y`` where ``K`` has eigenvalues of both signs."""
    s = kernel.new_ones(len(kernel)) if weights is None else weights
    eye = torch.eye(len(kernel), dtype=kernel.dtype)
    each = y.unsqueeze(0) if y.dim() == 1 else y.mT  # (k, n)
    matrix = kernel * s + alpha.reshape(-1).expand(len(each))[:, None, None] * eye
    dual: Tensor = s * torch.linalg.solve(matrix, each)
    return dual[0] if y.dim() == 1 else dual.mT
