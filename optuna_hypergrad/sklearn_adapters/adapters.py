"""Which adapter knows an estimator."""

from __future__ import annotations

from typing import Any

from sklearn.base import BaseEstimator

from .._registry import registry
from ._adapter import AbstractAdapter
from .logistic_regression import LogisticRegressionAdapter
from .ridge import RidgeAdapter

REGISTRY = registry(AbstractAdapter, globals())  # type: ignore[type-abstract]
_BY_TYPE: dict[type[Any], type[AbstractAdapter]] = {a.type: a for a in REGISTRY.values()}


def adapter_of(estimator: BaseEstimator) -> AbstractAdapter | None:
    """The adapter of exactly this type: a subclass may fit otherwise."""
    found = _BY_TYPE.get(type(estimator))
    return None if found is None else found()


def known_types() -> list[str]:
    return sorted(t.__name__ for t in _BY_TYPE)


__all__ = ["REGISTRY", "LogisticRegressionAdapter", "RidgeAdapter", "adapter_of", "known_types"]
