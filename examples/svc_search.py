"""C and gamma of a support vector machine by hypergradients of a smoothed hinge, beside GridSearchCV.

The loss that is followed stands for the score that counts, here the accuracy: at the end, scikit-learn fits the best settings
that were visited and ranks them by their accuracy.
"""

from __future__ import annotations

import time

import numpy as np
from optuna.distributions import FloatDistribution
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import optuna_hypergrad as ohg


def main(num_trials: int = 25, grid_size: int = 13) -> float:
    x, y = load_breast_cancer(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.3, random_state=0, stratify=y)
    pipeline = make_pipeline(StandardScaler(), SVC())
    folds = StratifiedKFold(5, shuffle=True, random_state=0)

    begun = time.perf_counter()
    search = ohg.HypergradientSearchCV(
        pipeline,
        {
            "svc__C": FloatDistribution(1e-2, 1e4, log=True),
            "svc__gamma": FloatDistribution(1e-5, 1e1, log=True),
        },
        cv=folds,
        n_trials=num_trials,
        n_rescored=8,
        random_state=0,
    ).fit(x, y)
    seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    grid = {
        "svc__C": np.logspace(-2, 4, grid_size),
        "svc__gamma": np.logspace(-5, 1, grid_size),
    }
    reference = GridSearchCV(pipeline, grid, cv=folds).fit(x, y)

    print(f"{num_trials} trials follow the {search.followed_}")
    for name, found, spent in (
        (f"hypergradients, {num_trials} trials", search, seconds),
        (f"a grid of {grid_size**2}", reference, time.perf_counter() - begun),
    ):
        best = {k.removeprefix("svc__"): f"{v:.3g}" for k, v in found.best_params_.items()}
        print(
            f"{name}: accuracy {100 * found.best_score_:.1f} % in cross-validation, "
            f"{100 * found.score(x_test, y_test):.1f} % on new data, {spent:.1f} s, {best}"
        )
    return 1 - float(search.best_score_)


if __name__ == "__main__":
    main()
