"""The lasso, by implicit differentiation on its support."""

from __future__ import annotations

from typing import ClassVar

from optuna.distributions import FloatDistribution
from sklearn.base import BaseEstimator
from sklearn.linear_model import Lasso

from .elastic_net import ElasticNetAdapter


class LassoAdapter(ElasticNetAdapter):
    """``sklearn.linear_model.Lasso``: its penalty ``alpha``, as in :class:`ElasticNetAdapter`.

    Reference: Bertrand et al. (2022), "Implicit differentiation for fast hyperparameter selection in non-smooth convex
    learning".
    """

    name: ClassVar[str] = "lasso"
    type: ClassVar[type[BaseEstimator]] = Lasso
    usual: ClassVar[dict[str, FloatDistribution]] = {
        "alpha": FloatDistribution(1e-4, 1e2, log=True)
    }
