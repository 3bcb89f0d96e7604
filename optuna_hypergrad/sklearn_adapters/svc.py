"""Support vector classification, by implicit differentiation on the free support vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from sklearn.svm import SVC
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from ._adapter import AbstractAdapter, Fold, FollowedLoss, Split
from ._kernels import of_fold, with_zero_slopes
from ._losses import margin_loss
from ._machines import (
    classifier_start,
    kernel_settings,
    reason_against_classes,
    reason_against_kernel,
)
from ._support_vectors import Machine, solved


class SVCAdapter(AbstractAdapter):
    """``sklearn.svm.SVC`` with a linear, rbf or polynomial kernel: ``C`` and ``gamma``, any number of classes.

    Several classes are told apart one pair at a time, as libsvm does. What is followed is the smoothed hinge of the
    decisions on each pair that a sample's class belongs to.

    Reference: Chapelle, Vapnik, Bousquet & Mukherjee (2002), "Choosing multiple parameters for support vector machines".
    """

    name: ClassVar[str] = "svc"
    type: ClassVar[type[BaseEstimator]] = SVC
    usual: ClassVar[dict[str, FloatDistribution]] = {
        "C": FloatDistribution(1e-3, 1e4, log=True),
        "gamma": FloatDistribution(1e-5, 1e1, log=True),
    }

    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        if getattr(estimator, "probability", False) not in (False, "deprecated"):
            return "SVC(probability=True) is not adapted"
        return reason_against_kernel(estimator) or reason_against_classes(y, splits)

    def idle(self, estimator: BaseEstimator) -> frozenset[str]:
        return frozenset({"gamma"} if estimator.kernel == "linear" else ())

    def followed_loss(self, scoring: Any) -> FollowedLoss:
        return margin_loss()

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
        classes, labels = np.unique(fold.y_train, return_inverse=True)
        importance = compute_class_weight(estimator.class_weight, classes=classes, y=fold.y_train)
        c = params.get("C", torch.tensor(float(estimator.C), dtype=torch.float64))
        places = np.searchsorted(classes, fold.y_test)
        decisions, targets = [], []
        for i in range(len(classes)):
            for j in range(i + 1, len(classes)):
                chosen = np.flatnonzero((labels == i) | (labels == j))
                sign = torch.as_tensor(np.where(labels[chosen] == j, 1.0, -1.0))
                most = c * torch.as_tensor(importance[labels[chosen]])
                if fold.weights is not None:
                    most = most * fold.weights[chosen]
                bound = sign * most
                machine = Machine(
                    among if len(classes) == 2 else among[chosen][:, chosen],
                    np.arange(len(chosen)),
                    sign,
                    bound.clamp(max=0.0),
                    bound.clamp(min=0.0),
                )
                beta, b, _ = solved(machine, classifier_start(machine))
                seen = across if len(classes) == 2 else across[:, chosen]
                decisions.append(seen @ beta + b)
                targets.append(np.where(places == j, 1.0, np.where(places == i, -1.0, 0.0)))
        predicted = torch.stack(decisions, 1)
        used = {"C"} if estimator.kernel == "linear" else set(params)
        return (
            with_zero_slopes(predicted, params, used),
            torch.as_tensor(np.stack(targets, 1)),
        )
