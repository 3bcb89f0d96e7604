"""Which adapter knows an estimator."""

from __future__ import annotations

from typing import Any

from sklearn.base import BaseEstimator

from .._registry import registry
from ._adapter import AbstractAdapter
from .elastic_net import ElasticNetAdapter
from .kernel_ridge import KernelRidgeAdapter
from .lasso import LassoAdapter
from .linear_svc import LinearSVCAdapter
from .logistic_regression import LogisticRegressionAdapter
from .ridge import RidgeAdapter
from .svc import SVCAdapter
from .svr import SVRAdapter

REGISTRY = registry(AbstractAdapter, globals())  # type: ignore[type-abstract]
_BY_TYPE: dict[type[Any], type[AbstractAdapter]] = {a.type: a for a in REGISTRY.values()}


def adapter_of(estimator: BaseEstimator) -> AbstractAdapter | None:
    """The adapter of exactly this type: a subclass may fit otherwise."""
    found = _BY_TYPE.get(type(estimator))
    return None if found is None else found()


def known_types() -> list[str]:
    return sorted(t.__name__ for t in _BY_TYPE)


__all__ = [
    "REGISTRY",
    "ElasticNetAdapter",
    "KernelRidgeAdapter",
    "LassoAdapter",
    "LinearSVCAdapter",
    "LogisticRegressionAdapter",
    "RidgeAdapter",
    "SVCAdapter",
    "SVRAdapter",
    "adapter_of",
    "known_types",
]
