"""Which kernel, and which penalty and width for it: a choice by TPE and numbers by hypergradients, in one study.

Each kernel wants a penalty and a width of its own, so that a grid has to have all of them for each. Here a kernel is judged
by what it gives after a few steps along the hypergradient.
"""

from __future__ import annotations

import time

import numpy as np
from optuna.distributions import FloatDistribution
from sklearn.datasets import make_friedman1
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import optuna_hypergrad as ohg

KERNELS = ["linear", "rbf", "laplacian", "poly"]


def main(num_trials: int = 40, grid_size: int = 10) -> float:
    x, y = make_friedman1(300, n_features=8, noise=1.0, random_state=0)
    y = y - y.mean()  # kernel ridge has no intercept
    pipeline = make_pipeline(StandardScaler(), KernelRidge())
    folds = KFold(5, shuffle=True, random_state=0)

    begun = time.perf_counter()
    search = ohg.HypergradientSearchCV(
        pipeline,
        {
            "kernelridge__kernel": KERNELS,
            "kernelridge__alpha": FloatDistribution(1e-4, 1e2, log=True),
            "kernelridge__gamma": FloatDistribution(1e-4, 1e1, log=True),
        },
        scoring="neg_mean_squared_error",
        cv=folds,
        n_trials=num_trials,
        random_state=0,
    ).fit(x, y)
    seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    grid = {
        "kernelridge__kernel": KERNELS,
        "kernelridge__alpha": np.logspace(-4, 2, grid_size),
        "kernelridge__gamma": np.logspace(-4, 1, grid_size),
    }
    reference = GridSearchCV(pipeline, grid, scoring=search.scoring, cv=folds).fit(x, y)

    print(f"{num_trials} trials follow the {search.followed_}")
    for name, found, spent in (
        (f"hypergradients, {num_trials} trials", search, seconds),
        (f"a grid of {len(KERNELS) * grid_size**2}", reference, time.perf_counter() - begun),
    ):
        best = {
            k.removeprefix("kernelridge__"): v if isinstance(v, str) else f"{v:.3g}"
            for k, v in found.best_params_.items()
        }
        print(f"{name}: squared error {-found.best_score_:.4f} in {spent:.1f} s, {best}")
    return float(-search.best_score_)


if __name__ == "__main__":
    main()
