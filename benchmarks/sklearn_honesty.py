"""Do vectors of hyperparameters fool themselves? Loss on samples that nobody has seen: tied, free, and chosen by nested folds.

    python benchmarks/sklearn_honesty.py [number of splits [part of a task's name]]

Each task is split into samples for the search and samples for the test, several times. *Tied* is the best search with all
entries of the vector equal, *free* one with ``guard=None``, *nested* the default. The table, ``results/sklearn_honesty.md``,
has medians over the splits, and the worst split for the nested choice; the rows of the tasks that were run are replaced.
*Estimate* is the nested estimate of the chosen solution, *optimized* the cross-validated loss that was minimized.
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_wine,
    make_friedman1,
    make_regression,
)
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from optuna_hypergrad import FeatureWeights, HypergradientSearchCV, TensorDistribution
from optuna_hypergrad.sklearn_adapters import adapter_of

RESULTS = Path(__file__).parent / "results" / "sklearn_honesty.md"
WEIGHTS = "featureweights__weights"
LOGISTIC = {"tol": 1e-6, "max_iter": 1000}


@dataclass(frozen=True)
class Task:
    name: str
    data: Callable[[int], tuple[np.ndarray, np.ndarray]]
    estimator: Any
    vector: str
    shape: str
    train: float
    scoring: str = "r2"
    bounds: tuple[float, float] = (1e-3, 1e3)


def loaded(loader: Callable[..., Any], n: int | None = None) -> Callable[[int], Any]:
    def data(seed: int) -> Any:
        x, y = loader(return_X_y=True)
        chosen = np.random.default_rng(seed).permutation(len(y))[:n]
        return x[chosen], y[chosen]

    return data


def weighted(*steps: Any) -> Any:
    return make_pipeline(*steps[:-1], FeatureWeights(), steps[-1])


def sparse(p: int) -> Callable[[int], Any]:
    return lambda seed: make_regression(
        300, p, n_informative=10, noise=20.0, random_state=100 + seed
    )


scaled_ridge = weighted(StandardScaler(), Ridge())
scaled_logistic = weighted(StandardScaler(), LogisticRegression(**LOGISTIC))
TASKS = [
    Task("logistic, wine, per class", loaded(load_wine), make_pipeline(StandardScaler(), LogisticRegression(**LOGISTIC)),
         "logisticregression__class_weight", "per_class", 0.5, "neg_log_loss"),
    Task("logistic, breast_cancer, per feature (30)", loaded(load_breast_cancer), scaled_logistic, WEIGHTS, "per_feature",
         0.5, "neg_log_loss"),
    Task("logistic, wine, per feature (13)", loaded(load_wine), scaled_logistic, WEIGHTS, "per_feature", 0.5, "neg_log_loss"),
    Task("logistic, four digits, per feature (64)", loaded(functools.partial(load_digits, n_class=4), 300), scaled_logistic,
         WEIGHTS, "per_feature", 0.5, "neg_log_loss", (1e-2, 1e1)),
    Task("ridge, sparse regression, per feature (50)", sparse(50), scaled_ridge, WEIGHTS, "per_feature", 0.5),
    Task("ridge, sparse regression, per feature (200)", sparse(200), scaled_ridge, WEIGHTS, "per_feature", 0.5),
    Task("ridge, diabetes, per feature (10)", loaded(load_diabetes), scaled_ridge, WEIGHTS, "per_feature", 0.5),
    Task("ridge, diabetes with products, per feature (65)", loaded(load_diabetes),
         weighted(StandardScaler(), PolynomialFeatures(2, include_bias=False), StandardScaler(), Ridge()), WEIGHTS,
         "per_feature", 0.5),
    Task("kernel ridge, friedman, per feature (10)", lambda seed: make_friedman1(400, noise=0.5, random_state=seed),
         weighted(StandardScaler(), KernelRidge(kernel="rbf", alpha=1e-2, gamma=1.0)), WEIGHTS, "per_feature", 0.5, "r2",
         (1e-3, 1e1)),
]  # fmt: skip


def test_loss(task: Task, model: Any, x: np.ndarray, y: np.ndarray) -> float:
    if task.scoring == "neg_log_loss":
        return float(log_loss(y, model.predict_proba(x), labels=model.classes_))
    return 1 - float(r2_score(y, model.predict(x)))


def tied_setting(search: HypergradientSearchCV) -> dict[str, Any]:
    """The best setting with equal entries that the search has come by."""
    equal = [
        (score, setting)
        for score, setting in zip(
            search.cv_results_["mean_test_score"], search.cv_results_["params"], strict=True
        )
        if all(
            len(set(np.asarray(list(v.values()) if isinstance(v, dict) else v).tolist())) == 1
            for v in setting.values()
        )
    ]
    return max(equal, key=lambda e: e[0])[1]


def measured(task: Task, seed: int) -> dict[str, float]:
    x, y = task.data(seed)
    stratify = y if task.scoring == "neg_log_loss" else None
    x, x_test, y, y_test = train_test_split(
        x, y, train_size=task.train, random_state=seed, stratify=stratify
    )
    space = {task.vector: TensorDistribution(task.shape, *task.bounds)}
    search = HypergradientSearchCV(
        task.estimator, space, scoring=task.scoring, n_trials=60, random_state=seed
    )
    begun = time.perf_counter()
    search.fit(x, y)
    seconds = time.perf_counter() - begun
    tied = clone(task.estimator).set_params(**tied_setting(search)).fit(x, y)
    free = clone(search).set_params(guard=None).fit(x, y)
    return {
        "tied": test_loss(task, tied, x_test, y_test),
        "free": test_loss(task, free, x_test, y_test),
        "nested": test_loss(task, search, x_test, y_test),
        "untied": float(search.nested_.tau is not None),
        "estimate": search.nested_.loss,
        "optimized": float(search.cv_results_["followed_loss"][search.best_index_]),
        "seconds": seconds,
    }


HEAD = """| task | tied | free | nested | nested / tied, worst split | nested / better of the two | untied | estimate | optimized | seconds |
|---|---|---|---|---|---|---|---|---|---|
"""


def main(num_splits: int = 7, only: str = "") -> None:
    known = RESULTS.read_text().splitlines()[2:] if RESULTS.exists() else []
    rows = {line.split("|")[1].strip(): line for line in known}
    for task in TASKS:
        if adapter_of(task.estimator.steps[-1][1]) is None or only not in task.name:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs = [measured(task, seed) for seed in range(num_splits)]
        column = {k: np.array([r[k] for r in runs]) for k in runs[0]}
        median = {k: float(np.median(v)) for k, v in column.items()}
        better = np.minimum(column["tied"], column["free"])
        rows[task.name] = (
            f"| {task.name} | {median['tied']:.3f} | {median['free']:.3f} | {median['nested']:.3f} "
            f"| {max(column['nested'] / column['tied']):.2f} | {np.median(column['nested'] / better):.2f} "
            f"| {int(column['untied'].sum())} of {num_splits} | {median['estimate']:.3f} | {median['optimized']:.3f} "
            f"| {median['seconds']:.1f} |"
        )
        print(rows[task.name], flush=True)
        ordered = [rows[t.name] for t in TASKS if t.name in rows]
        RESULTS.write_text(HEAD + "\n".join(ordered) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7, sys.argv[2] if len(sys.argv) > 2 else "")
