"""Tasks for searches over scikit-learn estimators: data, folds, what is searched, and one yardstick for all methods."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_wine,
    make_friedman1,
    make_moons,
)
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from optuna_hypergrad import FeatureWeights, TensorDistribution
from optuna_hypergrad.sklearn_adapters import Fold, adapter_of

Data = tuple[np.ndarray, np.ndarray]
NUM_FOLDS = 5


@dataclass(frozen=True)
class Vector:
    """Weights of features that are searched, beside numbers: by :class:`FeatureWeights` before the estimator.

    Attributes:
        low, high: Of each of them.
        groups: Of features, ``0, 1, ...``; of one weight each by default.
    """

    low: float
    high: float
    groups: tuple[int, ...] | None = None

    def size(self, num_features: int) -> int:
        return num_features if self.groups is None else 1 + max(self.groups)

    def spread(self, weights: Any) -> Any:
        return weights if self.groups is None else weights[list(self.groups)]

    @property
    def distribution(self) -> TensorDistribution:
        if self.groups is None:
            return TensorDistribution("per_feature", self.low, self.high)
        return TensorDistribution("per_group", self.low, self.high, groups=self.groups)


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
        own: Trials of ours, where numbers are searched.
        vector: Of weights, in the place of a number; parameters ``w0``, ``w1``, ... for those that know of numbers only.
    """

    label: str
    load: Callable[[], Data]
    estimator: Any
    space: dict[str, Any]
    grid: int
    scoring: str | None = "neg_mean_squared_error"
    trials: int = 150
    gp: int = 60
    own: int = 30
    vector: Vector | None = None

    @functools.cached_property
    def data(self) -> Data:
        return self.load()

    @property
    def own_trials(self) -> int:
        """Of ours: a setting of vectors is one of many."""
        if self.vector is None:
            return self.own
        return 60 if len(self.all_numbers) < 500 else 200

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

    @property
    def all_numbers(self) -> dict[str, Any]:
        """What is searched, for those that know of numbers only."""
        if self.vector is None:
            return self.space
        one = FloatDistribution(self.vector.low, self.vector.high, log=True)
        size = self.vector.size(self.data[0].shape[1])
        return {**self.space, **{f"w{i}": one for i in range(size)}}

    def model(self, params: dict[str, Any]) -> Any:
        """scikit-learn's own, at values of :attr:`all_numbers`."""
        numbers = {k: v for k, v in params.items() if k in self.space}
        model = clone(self.estimator).set_params(**numbers)
        if self.vector is None:
            return model
        weights = np.array([params[k] for k in self.all_numbers if k not in self.space])
        return make_pipeline(FeatureWeights(self.vector.spread(weights)), model)

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
        values = dict(zip(names, logs.exp().unbind(), strict=True))
        fixed = {k: estimator.get_params()[k] for k in adapter.usual if k not in self.space}
        given = {
            k: torch.tensor(v, dtype=torch.float64)
            for k, v in fixed.items()
            if isinstance(v, (int, float))
        }
        given |= {k: v for k, v in values.items() if k in self.space}
        folds = self.folds
        if self.vector is not None:
            each = self.vector.spread(
                torch.stack([v for k, v in values.items() if k not in self.space])
            )
            folds = [replace(f, x_train=f.x_train * each, x_test=f.x_test * each) for f in folds]
        losses = [
            function(*adapter.predict(estimator, given, fold, {}), fold.test_weights)
            for fold in folds
        ]
        return torch.stack(losses).mean()

    def best_known(self, more: Sequence[dict[str, Any]] = ()) -> float:
        """By L-BFGS-B along exact gradients from many starts, for each choice, and from ``more``."""
        num_starts = 12 if len(self.all_numbers) > 1 else 2
        if len(self.all_numbers) > 20:
            num_starts = 3
        floats = {k: d for k, d in self.all_numbers.items() if isinstance(d, FloatDistribution)}
        choices = [{k: c} for k, d in self.space.items() if k not in floats for c in d.choices] or [
            {}
        ]
        bounds = [(np.log(d.low), np.log(d.high)) for d in floats.values()]
        low, high = np.transpose(bounds)
        rng, best = np.random.default_rng(0), np.inf
        for choice in choices:
            points = [low + rng.random(len(low)) * (high - low) for _ in range(8 * num_starts)]
            points = sorted(points, key=lambda p: self._safe(choice, floats, p)[0])[:num_starts]
            if self.vector is not None:
                shares = (0.1, 0.3, 0.5, 0.7, 0.9)
                if len(low) > 500:  # a second for each evaluation
                    points, shares = [], (0.5,)
                points += [low + share * (high - low) for share in shares]
                points += [np.log([m[k] for k in floats]).clip(low, high) for m in more]
            for point in points:
                found = minimize(
                    lambda p: self._safe(choice, floats, p),  # noqa: B023
                    point,
                    jac=True,
                    method="L-BFGS-B",
                    bounds=bounds,
                    options={"maxiter": 300},
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


def _friedman(num_samples: int) -> Data:
    x, y = make_friedman1(num_samples, 10, noise=1.0, random_state=0)
    x = StandardScaler().fit_transform(x)
    return x, (y - y.mean()) / y.std()


def _moons() -> Data:
    x, y = make_moons(300, noise=0.3, random_state=0)
    return StandardScaler().fit_transform(x), y


def _sinc() -> Data:
    """Two features, and noise of heavy tails."""
    rng = np.random.default_rng(4)
    x = rng.uniform(-3, 3, size=(250, 2))
    y = np.sinc(x[:, 0]) + 0.3 * x[:, 1] + 0.1 * rng.standard_t(2, size=250)
    return StandardScaler().fit_transform(x), (y - y.mean()) / y.std()


def _correlated() -> Data:
    """Features of which each is much like the one before, 20 of 100 relevant."""
    rng = np.random.default_rng(2)
    z = rng.normal(size=(150, 100))
    x = z.copy()
    for j in range(1, 100):
        x[:, j] = 0.95 * x[:, j - 1] + np.sqrt(1 - 0.95**2) * z[:, j]
    w = np.zeros(100)
    w[rng.permutation(100)[:20]] = rng.normal(size=20)
    y = x @ w
    y = y / y.std() + 0.5 * rng.normal(size=150)
    return x, (y - y.mean()) / y.std()


def _of_many_scales() -> Data:
    """Features and coefficients whose sizes range over orders of magnitude."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 30)) * np.exp(3 * rng.normal(size=30))
    w = rng.normal(size=30) / np.exp(2 * rng.normal(size=30))
    return x, x @ w + 30 * rng.normal(size=200)


def _grouped() -> Data:
    """Ten groups of ten features each, whose coefficients are of other sizes, most of them zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 100))
    y = x @ (rng.normal(size=100) * np.repeat([3, 1, 0.3, 0.1, 0, 0, 0, 0, 0, 0], 10))
    y = y / y.std() + rng.normal(size=300)
    return x, (y - y.mean()) / y.std()


WEIGHTS = Vector(1e-3, 1e2)
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
    "svr-friedman": Row(
        "SVR friedman 200x10 (3)", lambda: _friedman(200), SVR(), {"C": _log(1e-2, 1e3), "gamma": _log(1e-5, 1e1), "epsilon": _log(1e-3, 1e0)}, 7
    ),
    "ridge-scales": Row(
        "Ridge, features of many scales 200x30 (1)", _of_many_scales, Ridge(), {"alpha": _log(1e-8, 1e8)}, 25, own=100
    ),
    "elastic-net-correlated": Row(
        "ElasticNet, correlated 150x100 (2)", _correlated, ElasticNet(), {"alpha": ALPHA, "l1_ratio": L1}, 12, own=100
    ),
    "svc-moons": Row(
        "SVC two moons 300x2 (2)", _moons, SVC(), {"C": _log(1e-2, 1e3), "gamma": _log(1e-5, 1e1)}, 12, None, own=100
    ),
    "svr-sinc": Row(
        "SVR sinc 250x2 (3)", _sinc, SVR(), {"C": _log(1e-2, 1e3), "gamma": _log(1e-5, 1e1), "epsilon": _log(1e-3, 1e0)}, 7, own=100
    ),
    "ridge-features": Row(
        "Ridge per feature diabetes (10)", lambda: _standard(load_diabetes), Ridge(), {}, 0, trials=300, vector=WEIGHTS
    ),
    "ridge-features-many": Row(
        "Ridge per feature 300x100 (100)", lambda: _linear(300, 100, 10, 1.0), Ridge(), {}, 0, trials=150, gp=40, vector=WEIGHTS
    ),
    "ridge-features-1000": Row(
        "Ridge per feature 1500x1000 (1000)", lambda: _linear(1500, 1000, 50, 1.0), Ridge(), {}, 0, trials=60, gp=5, vector=WEIGHTS
    ),
    "ridge-groups": Row(
        "Ridge 10 groups 300x100 (10)", _grouped, Ridge(), {}, 0, trials=300, vector=replace(WEIGHTS, groups=tuple(np.repeat(range(10), 10).tolist()))
    ),
    "lasso-features": Row(
        "weighted Lasso 300x100 (100)", lambda: _linear(300, 100, 10, 1.0), Lasso(alpha=0.05), {}, 0, trials=150, gp=40, vector=Vector(1e-2, 1e2)
    ),
    "logistic-features": Row(
        "LogisticRegression C per feature breast_cancer (30)", lambda: _standard(load_breast_cancer), LogisticRegression(max_iter=1000), {}, 0, "neg_log_loss", trials=200, vector=Vector(1e-3, 1e2)
    ),
    "ard": Row(
        "ARD KernelRidge friedman 200x10 (11)", lambda: _friedman(200), KernelRidge(kernel="rbf", gamma=0.1), {"alpha": _log(1e-4, 1e2)}, 0, trials=200, vector=Vector(1e-3, 1e1)
    ),
}  # fmt: skip
