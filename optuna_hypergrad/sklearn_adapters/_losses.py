"""Differentiable counterparts of scikit-learn's scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import get_scorer
from torch import Tensor
from torch.nn.functional import huber_loss, nll_loss

from ._adapter import FollowedLoss


def _mean_squared_error(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return (weights @ (predicted - target).square()).mean()


def _root_mean_squared_error(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The mean over targets of the roots, as scikit-learn takes it."""
    return (weights @ (predicted - target).square()).sqrt().mean()


def _one_less_r2(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    unexplained = weights @ (predicted - target).square()
    return (unexplained / (weights @ (target - weights @ target).square())).mean()


def _huber(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Close to the absolute error: quadratic within a hundredth of the targets' deviation."""
    width = 1e-2 * float(target.std().clamp(min=1e-12))
    each = huber_loss(predicted, target, delta=width, reduction="none") / width
    return (weights @ each).mean()


def _log_loss(log_probabilities: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return weights @ nll_loss(log_probabilities, target, reduction="none")


def _error_and_slope(
    predicted: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    gap = predicted - target
    if gap.ndim == 1:
        weighted = weights * gap
        return float(weighted @ gap), 2 * weighted
    weighted = weights[:, None] * gap / gap.shape[1]
    return float((weighted * gap).sum()), 2 * weighted


def _one_less_r2_and_slope(
    predicted: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    varied = weights @ (target - weights @ target) ** 2
    gap = predicted - target
    weighted = (
        weights[:, None] * gap / (varied * gap.shape[1])
        if gap.ndim == 2
        else weights * gap / varied
    )
    return float((weighted * gap).sum()), 2 * weighted


_REGRESSION = {
    None: FollowedLoss(
        "1 - R^2", True, _one_less_r2, of_variation=True, slope=_one_less_r2_and_slope
    ),
    "r2": FollowedLoss(
        "1 - R^2", True, _one_less_r2, of_variation=True, slope=_one_less_r2_and_slope
    ),
    "neg_mean_squared_error": FollowedLoss(
        "mean squared error", True, _mean_squared_error, slope=_error_and_slope
    ),
    "neg_root_mean_squared_error": FollowedLoss(
        "root mean squared error", True, _root_mean_squared_error
    ),
    "neg_mean_absolute_error": FollowedLoss("Huber loss, nearly the absolute error", False, _huber),
    "neg_median_absolute_error": FollowedLoss(
        "Huber loss, nearly the absolute error", False, _huber
    ),
}


_NAMED = (*(name for name in _REGRESSION if name is not None), "neg_log_loss")


def by_name(scoring: Any) -> Any:
    """The name of a scorer that is one of scikit-learn's own with a counterpart here; anything else as it is."""
    told = _told_apart(scoring)
    if told is None:
        return scoring
    return next((n for n in _NAMED if _told_apart(get_scorer(n)) == told), scoring)


def _told_apart(scorer: Any) -> tuple[Any, ...] | None:
    """What a scorer of ``make_scorer`` scores by."""
    names = ("_score_func", "_sign", "_kwargs", "_response_method")
    if not all(hasattr(scorer, n) for n in names):
        return None
    return tuple(getattr(scorer, n) for n in names)


def reason_against_targets(y: np.ndarray) -> str | None:
    """Why targets are not for a regression; ``None`` where they are."""
    if not np.issubdtype(y.dtype, np.number):
        return f"the targets are {y.dtype}, not numbers"
    return None


def regression_loss(scoring: Any) -> FollowedLoss:
    """Of a regressor; the mean squared error for a score that has no counterpart."""
    known = _REGRESSION.get(scoring) if scoring is None or isinstance(scoring, str) else None
    return known or FollowedLoss(
        "mean squared error", False, _mean_squared_error, slope=_error_and_slope
    )


def classification_loss(scoring: Any) -> FollowedLoss:
    """Of a classifier that predicts log probabilities ``(m, k)`` for classes ``(m,)``: the log loss."""
    return FollowedLoss("log loss", scoring == "neg_log_loss", _log_loss, slope=_log_loss_and_slope)


def _log_loss_and_slope(
    log_probabilities: np.ndarray, target: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    rows, slope = np.arange(len(target)), np.zeros_like(log_probabilities)
    slope[rows, target] = -weights
    return -float(weights @ log_probabilities[rows, target]), slope


def _smoothed_hinge(decisions: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """``max(0, 1 - t f)``, quadratic where it is below 1; the mean over the decisions ``(m, d)`` that concern a sample.

    Reference: Rennie & Srebro (2005), "Loss functions for preference levels".
    """
    shortfall = (1 - target * decisions).clamp(min=0)
    each = huber_loss(shortfall, shortfall.new_zeros(()).expand_as(shortfall), reduction="none")
    concerned = target.abs()
    return weights @ ((each * concerned).sum(1) / concerned.sum(1))


def margin_loss() -> FollowedLoss:
    """Of a classifier that predicts decisions ``(m, d)`` for signs ``(m, d)``, 0 where one does not concern a sample."""
    return FollowedLoss("smoothed hinge", False, _smoothed_hinge)
