"""scikit-learn's dialect: searches that are studies, and adapters that differentiate estimators. One file per estimator."""

from ._adapter import AbstractAdapter, Fold, FollowedLoss
from ._nested import NestedChoice
from .adapters import REGISTRY, LogisticRegressionAdapter, RidgeAdapter, adapter_of
from .feature_weights import FeatureWeights
from .network import HypergradientClassifier, HypergradientRegressor
from .search import HypergradientSearchCV
from .tensor_distribution import TensorDistribution

__all__ = [
    "REGISTRY",
    "AbstractAdapter",
    "FeatureWeights",
    "Fold",
    "FollowedLoss",
    "HypergradientClassifier",
    "HypergradientRegressor",
    "HypergradientSearchCV",
    "LogisticRegressionAdapter",
    "NestedChoice",
    "RidgeAdapter",
    "TensorDistribution",
    "adapter_of",
]
