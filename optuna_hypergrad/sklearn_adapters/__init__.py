"""scikit-learn's dialect: searches that are studies, and adapters that differentiate estimators. One file per estimator."""

from ._adapter import AbstractAdapter, Fold, FollowedLoss
from .adapters import REGISTRY, LogisticRegressionAdapter, RidgeAdapter, adapter_of
from .network import HypergradientClassifier, HypergradientRegressor
from .search import HypergradientSearchCV

__all__ = [
    "REGISTRY",
    "AbstractAdapter",
    "Fold",
    "FollowedLoss",
    "HypergradientClassifier",
    "HypergradientRegressor",
    "HypergradientSearchCV",
    "LogisticRegressionAdapter",
    "RidgeAdapter",
    "adapter_of",
]
