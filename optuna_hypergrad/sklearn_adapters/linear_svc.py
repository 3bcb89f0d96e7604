"""Linear support vector classification with the squared hinge, by implicit differentiation of its optimum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from sklearn.svm import LinearSVC
from torch import Tensor

from .._errors import SolverError
from .._results import Result, Status
from ._adapter import AbstractAdapter, Fold, FollowedLoss, Split
from ._losses import margin_loss
from ._machines import reason_against_classes


class LinearSVCAdapter(AbstractAdapter):
    """``sklearn.svm.LinearSVC`` with the squared hinge and the L2 penalty: ``C``; several classes one against the rest.

    The objective is piecewise quadratic: Newton's method ends at its minimum, to rounding. As in liblinear, the intercept is
    penalized like a weight.

    Reference: Keerthi & DeCoste (2005), "A modified finite Newton method for fast solution of large scale linear SVMs".
    """

    name: ClassVar[str] = "linear_svc"
    type: ClassVar[type[BaseEstimator]] = LinearSVC
    usual: ClassVar[dict[str, FloatDistribution]] = {"C": FloatDistribution(1e-5, 1e4, log=True)}

    def reason_to_decline(
        self, estimator: BaseEstimator, y: np.ndarray, splits: list[Split]
    ) -> str | None:
        for name, adapted in (
            ("penalty", "l2"),
            ("loss", "squared_hinge"),
            ("multi_class", "ovr"),
            ("class_weight", None),
        ):
            value = getattr(estimator, name)
            if value != adapted:
                return f"LinearSVC({name}={value!r:.60}) is not adapted"
        if not estimator.intercept_scaling > 0:
            return (
                f"LinearSVC(intercept_scaling={estimator.intercept_scaling!r:.60}) is not adapted"
            )
        return reason_against_classes(y, splits)

    def followed_loss(self, scoring: Any) -> FollowedLoss:
        return margin_loss()

    def predict(
        self,
        estimator: BaseEstimator,
        params: Mapping[str, Tensor],
        fold: Fold,
        memory: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        classes, labels = np.unique(fold.y_train, return_inverse=True)
        c = params.get("C", torch.tensor(float(estimator.C), dtype=torch.float64))
        most = c * (fold.x_train.new_ones(len(labels)) if fold.weights is None else fold.weights)
        scaling = [float(estimator.intercept_scaling)] * int(estimator.fit_intercept)
        x_train, x_test = (
            torch.cat([x, x.new_tensor(scaling).expand(len(x), -1)], 1)
            for x in (fold.x_train, fold.x_test)
        )
        places = np.searchsorted(classes, fold.y_test)
        decisions, targets = [], []
        for k in range(len(classes)) if len(classes) > 2 else (1,):
            sign = torch.as_tensor(np.where(labels == k, 1.0, -1.0))
            found = memory[f"w {k}"] = _minimum(
                x_train.detach().numpy(), sign.numpy(), most.detach().numpy(), memory.get(f"w {k}")
            )
            decisions.append(x_test @ _with_graph(x_train, sign, most, torch.as_tensor(found)))
            targets.append(np.where(places == k, 1.0, -1.0))
        return torch.stack(decisions, 1), torch.as_tensor(np.stack(targets, 1))


def _minimum(
    x: np.ndarray, y: np.ndarray, most: np.ndarray, start: np.ndarray | None
) -> np.ndarray:
    """``argmin over w of |w|^2 / 2 + sum_i most_i max(0, 1 - y_i x_i w)^2``."""

    def value(w: np.ndarray) -> float:
        return float(w @ w / 2 + most @ (1 - y * (x @ w)).clip(min=0.0) ** 2)

    w = np.zeros(x.shape[1]) if start is None else start
    current = value(w)
    within: np.ndarray | None = None
    for _ in range(200):
        before, within = within, (y * (x @ w) < 1) & (most > 0)
        if before is not None and (before == within).all():
            return w
        target = _quadratic_minimum(x[within], y[within], most[within])
        step, length = target - w, 1.0
        gradient = w - 2 * (most * within * (y - x @ w)) @ x
        decrease = float(-gradient @ step)
        if decrease <= 1e-15 * current:
            return target
        while (new := value(w + length * step)) > current - 1e-4 * length * decrease:
            length /= 2
            if length < 1e-12:
                return w
        if length == 1:  # if it keeps the set, it was the last one
            w, current = target, new
        else:
            w, current, within = w + length * step, new, None
    message = "A linear support vector machine could not be solved in 200 Newton steps: scale the features, or lower C."
    raise SolverError(message, Result(Status.MAX_STEPS_REACHED, message))


def _quadratic_minimum(x: np.ndarray, y: np.ndarray, most: np.ndarray) -> np.ndarray:
    """``argmin over w of |w|^2 / 2 + sum_i most_i (y_i - x_i w)^2``, by the smaller of its two systems."""
    found: np.ndarray
    if len(x) < x.shape[1]:
        found = x.T @ np.linalg.solve(x @ x.T + np.diag(0.5 / most), y)
    else:
        scaled = 2 * most[:, None] * x
        found = np.linalg.solve(np.eye(x.shape[1]) + scaled.T @ x, scaled.T @ y)
    return found


def _with_graph(x: Tensor, y: Tensor, most: Tensor, w: Tensor) -> Tensor:
    """The same minimum: one Newton step from it, the Hessian held fixed."""
    with torch.no_grad():
        within = (y * (x @ w) < 1) & (most > 0)
    near = x[within]
    gradient: Tensor = w - 2 * near.mT @ (most[within] * (y[within] - near @ w))
    fixed, weights = near.detach(), most[within].detach()
    if len(fixed) < len(w):
        matrix = fixed @ fixed.mT + torch.diag(0.5 / weights)
        step: Tensor = gradient - fixed.mT @ torch.linalg.solve(matrix, fixed @ gradient)
        return w - step
    hessian = torch.eye(len(w), dtype=w.dtype) + 2 * fixed.mT @ (weights[:, None] * fixed)
    step = torch.linalg.solve(hessian, gradient)
    return w - step
