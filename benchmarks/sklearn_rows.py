"""Tasks for searches over scikit-learn estimators: data, folds, what is searched, and one yardstick for all methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from optuna_hypergrad.sklearn_adapters import Fold, adapter_of

Data = tuple[np.ndarray, np.ndarray]
NUM_FOLDS = 5


@dataclass(frozen=True)
class Row:
    """A task.

    Attributes:
        label: For people.
        estimator: Searched; other settings are scikit-learn's defaults.
        space: Optuna's distributions by parameter.
        grid: Points per continuous parameter in a grid search.
        scoring: ``None`` is the smoothed hinge.
        trials: Of samplers; ``gp`` of the Gaussian process, whose trials are slow.
    """

    label: str
    load: Callable[[], Data]
    estimator: Any
    space: dict[str, Any]
    grid: int
    scoring: str | None = "neg_mean_squared_error"
    trials: int = 150
    gp: int = 60
    settings: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def data(self) -> Data:
        return self.load()

    @property
    def classes(self) -> bool:
        return self.scoring != "neg_mean_squared_error"

    @functools.cached_property
    def splits(self) -> list[tuple[np.ndarray, np.ndarray]]:
        kind = StratifiedKFold if self.classes else KFold
        return list(kind(NUM_FOLDS, shuffle=True, random_state=0).split(*self.data))

    @functools.cached_property
    def folds(self) -> list[Fold]:
        x, y = self.data
        found = []
        for a, b in self.splits:
            share = torch.full((len(b),), 1 / len(b), dtype=torch.float64)
            parts = (torch.tensor(x[a]), y[a], torch.tensor(x[b]), y[b])
            found.append(Fold(*parts, None, share))
        return found

    def loss(self, params: dict[str, Any], logs: torch.Tensor | None = None) -> torch.Tensor:
        """The cross-validated loss of exact fits, whoever found ``params``; of their logarithms, with a graph, where given."""
        chosen = {k: v for k, v in params.items() if isinstance(v, str)}
        names = [k for k in params if k not in chosen]
        if logs is None:
            logs = torch.tensor([params[k] for k in names], dtype=torch.float64).log()
        estimator = clone(self.estimator).set_params(**chosen)
        adapter = adapter_of(estimator)
        assert adapter is not None
        function = adapter.followed_loss(self.scoring).function
        given = dict(zip(names, logs.exp().unbind(), strict=True))
        losses = [
            function(*adapter.predict(estimator, given, fold, {}), fold.test_weights)
            for fold in self.folds
        ]
        return torch.stack(losses).mean()

    def best_known(self) -> float:
        """By L-BFGS-B along exact gradients from many starts, for each choice."""
        num_starts = 12 if len(self.space) > 1 else 2
        floats = {k: d for k, d in self.space.items() if isinstance(d, FloatDistribution)}
        choices = [{k: c} for k, d in self.space.items() if k not in floats for c in d.choices] or [
            {}
        ]
        bounds = [(np.log(d.low), np.log(d.high)) for d in floats.values()]
        low, high = np.transpose(bounds)
        rng, best = np.random.default_rng(0), np.inf
        for choice in choices:
            points = [low + rng.random(len(low)) * (high - low) for _ in range(8 * num_starts)]
            points = sorted(points, key=lambda p: self._safe(choice, floats, p)[0])[:num_starts]
            for point in points:
                found = minimize(
                    lambda p: self._safe(choice, floats, p),  # noqa: B023
                    point,
                    jac=True,
                    method="L-BFGS-B",
                    bounds=bounds,
                )
                best = min(best, float(found.fun))
        return best

    def _safe(self, choice: dict[str, Any], floats: dict[str, Any], p: np.ndarray) -> Any:
        logs = torch.tensor(p, dtype=torch.float64, requires_grad=True)
        try:
            value = self.loss({**choice, **dict.fromkeys(floats, 1.0)}, logs)
        except RuntimeError:  # no solution to rounding
            return 1e6, np.zeros(len(p))
        (slope,) = torch.autograd.grad(value, logs)
        return float(value.detach()), slope.numpy()


def _standard(load: Callable[..., Any]) -> Data:
    x, y = load(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    return (x, (y - y.mean()) / y.std()) if y.dtype.kind == "f" else (x, y)


def _linear(num_samples: int, num_features: int, num_relevant: int, noise: float) -> Data:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_samples, num_features))
    w = np.zeros(num_features)
    w[:num_relevant] = rng.normal(size=num_relevant)
    y = x @ w
    y = y / y.std() + noise * rng.normal(size=num_samples)
    return x, (y - y.mean()) / y.std()


def _log(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


ALPHA, L1 = _log(1e-4, 1e1), FloatDistribution(0.05, 1.0)
ROWS = {
    "ridge": Row(
        "Ridge 500x100 (1)", lambda: _linear(500, 100, 100, 1.0), Ridge(), {"alpha": _log(1e-3, 1e5)}, 25
    ),
    "lasso": Row("Lasso 300x100 (1)", lambda: _linear(300, 100, 10, 1.0), Lasso(), {"alpha": ALPHA}, 25),
    "elastic-net": Row(
        "ElasticNet 300x100 (2)", lambda: _linear(300, 100, 20, 1.0), ElasticNet(), {"alpha": ALPHA, "l1_ratio": L1}, 12
    ),
    "elastic-net-wide": Row(
        "ElasticNet 500x1000 (2)", lambda: _linear(500, 1000, 20, 1.0), ElasticNet(), {"alpha": _log(1e-3, 1e1), "l1_ratio": L1}, 10, gp=40
    ),
    "logistic-cancer": Row(
        "LogisticRegression breast_cancer (1)", lambda: _standard(load_breast_cancer), LogisticRegression(max_iter=1000), {"C": _log(1e-4, 1e4)}, 25, "neg_log_loss"
    ),
    "logistic-wine": Row(
        "LogisticRegression wine (1)", lambda: _standard(load_wine), LogisticRegression(max_iter=1000), {"C": _log(1e-4, 1e4)}, 25, "neg_log_loss"
    ),
    "logistic-digits": Row(
        "LogisticRegression digits (1)", lambda: _standard(load_digits), LogisticRegression(max_iter=1000), {"C": _log(1e-4, 1e2)}, 13, "neg_log_loss", trials=25, gp=15
    ),
    "kernel-ridge": Row(
        "KernelRidge diabetes (2)", lambda: _standard(load_diabetes), KernelRidge(kernel="rbf"), {"alpha": _log(1e-4, 1e2), "gamma": _log(1e-5, 1e1)}, 12
    ),
    "svr": Row(
        "SVR diabetes (3)", lambda: _standard(load_diabetes), SVR(), {"C": _log(1e-2, 1e3), "gamma": _log(1e-5, 1e1), "epsilon": _log(1e-3, 1e0)}, 7
    ),
    "svc": Row(
        "SVC breast_cancer (2)", lambda: _standard(load_breast_cancer), SVC(), {"C": _log(1e-2, 1e3), "gamma": _log(1e-5, 1e1)}, 12, None
    ),
    "kernels": Row(
        "kernel type x (alpha, gamma), diabetes", lambda: _standard(load_diabetes), KernelRidge(), {"kernel": CategoricalDistribution(["linear", "rbf", "laplacian"]), "alpha": _log(1e-4, 1e2), "gamma": _log(1e-5, 1e1)}, 10
    ),
}  # fmt: skip
