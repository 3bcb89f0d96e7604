"""Samples that count, and how much: weights that a user gives to ``fit``."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import _check_sample_weight


def counted(sample_weight: Any, X: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Places of the samples whose weight is not zero, and their weights.

    Args:
        sample_weight: ``(n_samples,)``, one number for all, or ``None`` for 1.
        X: ``(n_samples, n_features)``.
        name: Of ``sample_weight``, for errors.

    Raises:
        ValueError: in scikit-learn's words, for another shape and what is negative, not finite or zero everywhere.
    """
    try:
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    places = np.flatnonzero(weights > 0)
    if not len(places):
        raise ValueError(f"{name}: Sample weights must contain at least one non-zero number.")
    return places, weights[places]


def relative(weights: np.ndarray) -> np.ndarray:
    """In units of their mean; exactly 1 where all are equal."""
    if not len(weights) or np.ptp(weights) == 0:
        return np.ones(len(weights))
    found: np.ndarray = weights / weights.mean()
    return found
