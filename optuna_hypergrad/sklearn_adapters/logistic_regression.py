"""Logistic regression, by implicit differentiation of its optimum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import one_hot

from ._adapter import AbstractAdapter, Fold, FollowedLoss, Split
from ._kernels import remembered
from ._losses import classification_loss
from ._newton import MAX_DENSE, LogisticOptimum, log_probabilities, unsolved
from ._plain import PlainFit
from ._two_classes import TwoClasses

_SAME = {
    ("penalty", "l2"),
    ("l1_ratio", 0),
    ("l1_ratio", None),
    ("solver", "newton-cg"),
    ("solver", "newton-cholesky"),
}
_IGNORED = {
    "C",
    "fit_intercept",
    "max_iter",
    "n_jobs",
    "random_state",
    "tol",
    "verbose",
    "warm_start",
}


class LogisticRegressionAdapter(AbstractAdapter):
    """``sklearn.linear_model.LogisticRegression`` with the L2 penalty, of any number of classes.

    Each fit starts from the fold's last ones. Above 200 unknowns (features times classes), the Hessian is no matrix but products
    with it, preconditioned by its blocks of each class as far as they take 32 MB, else by its diagonal.

    Reference: Pedregosa (2016), "Hyperparameter optimization with approximate gradient".
    """

    name: ClassVar[str] = "logistic_regression"
    type: ClassVar[type[BaseEstimator]] = LogisticRegression
    usual: ClassVar[dict[str, FloatDistribution]] = {"C": FloatDistribution(1e-5, 1e5, log=True)}

    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        plain = LogisticRegression()
        for name, value in estimator.get_params().items():
            adapted = value == getattr(plain, name) or (name, value) in _SAME or name in _IGNORED
            if not adapted:
                return f"LogisticRegression({name}={value!r}) is not adapted"
        if y.ndim != 1:
            return "there is more than one target"
        for train, test in splits:
            if len(np.unique(y[train])) < 2:
                raise ValueError(
                    "LogisticRegression needs samples of at least 2 classes in the data, but a fold contains only one class: "
                    f"{y[train][:1].tolist()} (of samples with a positive sample_weight). Use cv=StratifiedKFold(), or more "
                    "samples."
                )
            if not np.isin(y[test], y[train]).all():
                return "a fold is tested on a class that it is not trained on"
        return None

    def followed_loss(self, scoring: Any) -> FollowedLoss:
        return classification_loss(scoring)

    def predict(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, Tensor],
        fold: Fold,
        memory: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        if "y" not in memory:
            memory["y"] = _targets(fold)
        y_train, y_test = memory["y"]
        x, x_test = (
            _with_ones(part, estimator.fit_intercept, key, memory)
            for key, part in (("train", fold.x_train), ("test", fold.x_test))
        )
        log_c, path = math.log(float(params["C"].detach())), memory.setdefault("path", [])
        theta: Tensor = LogisticOptimum.apply(  # type: ignore[no-untyped-call]
            x,
            y_train,
            torch.ones_like(y_train[:, 0]) if fold.weights is None else fold.weights,
            params["C"],
            fold.x_train.shape[1],
            _starts(path, log_c) + _neighbors(memory, log_c, x.shape[1], y_train.shape[1]),
            memory,
        )
        memory["path"] = [*path[-1:], (log_c, theta.detach())]
        return log_probabilities(theta, x_test), y_test

    def fitted(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, np.ndarray],
        fold: Fold,
        scales: np.ndarray | None,
        memory: dict[str, Any],
    ) -> PlainFit | None:
        intercept, p = bool(estimator.fit_intercept), fold.x_train.shape[1]
        if p + intercept > MAX_DENSE:
            return None
        if "y" not in memory:
            memory["y"] = _targets(fold)
        y_train, y_test = memory["y"]
        if y_train.shape[1] > 1:
            return None

        def made() -> TwoClasses:
            s = torch.ones_like(y_train[:, 0]) if fold.weights is None else fold.weights
            positive: np.ndarray = y_train[:, 0].numpy()
            return TwoClasses.of(
                fold.x_train.numpy(), fold.x_test.numpy(), positive, s.numpy(), intercept
            )

        key = (fold.x_train, fold.x_test, fold.weights, intercept)
        problem: TwoClasses = remembered(memory, "two classes", key, made)
        c = float(params["C"])
        log_c, path = math.log(c), memory.setdefault("plain path", [])
        near = memory.get("neighbor", {}).get("plain path", [])
        starts, rough = _starts(path, log_c), bool(memory.get("rough"))
        starts += [t for at, t in near if at == log_c]
        optimum = problem.at(c, scales).optimum(starts, rough)
        if optimum is None:
            raise unsolved(c)
        memory["plain path"] = [*path[-1:], (log_c, optimum.theta)]
        return PlainFit(
            optimum.log_probabilities(), y_test.numpy(), optimum.pulled, exact=not rough
        )


def _starts(path: list[tuple[float, Any]], log_c: float) -> list[Any]:
    """The last optimum, and what lies on a line through the last two, which are smooth in the logarithm of ``C``."""
    if len(path) < 2:
        return [theta for _, theta in path]
    (before, older), (last, theta) = path
    if before == last:
        return [theta]
    share = (log_c - last) / (last - before)
    return [theta, theta + share * (theta - older)] if abs(share) <= 2 else [theta]


def _neighbors(memory: dict[str, Any], log_c: float, *shape: int) -> list[Tensor]:
    """The optimum of another fold, most of whose samples are the same, at the same ``C``."""
    path = memory.get("neighbor", {}).get("path", [])
    return [theta for at, theta in path if at == log_c and theta.shape == shape]


def _targets(fold: Fold) -> tuple[Tensor, Tensor]:
    """One-hot for training, ``(n, k)``, of two classes the second one; numbers of the classes for the test, ``(m,)``."""
    classes, labels = np.unique(fold.y_train, return_inverse=True)
    targets = one_hot(torch.as_tensor(labels), len(classes)).to(torch.float64)
    places = torch.as_tensor(np.searchsorted(classes, fold.y_test))
    return targets[:, 1:] if len(classes) == 2 else targets, places


def _with_ones(x: Tensor, intercept: bool, key: str, memory: dict[str, Any]) -> Tensor:
    if not intercept:
        return x
    found: Tensor = remembered(memory, key, (x,), lambda: torch.cat([x, x.new_ones(len(x), 1)], 1))
    return found
