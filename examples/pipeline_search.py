"""A scikit-learn pipeline: what penalty, and polynomials of what degree, beside GridSearchCV.

The penalty moves by the hypergradient of the cross-validated loss; the degree and the scaler are left to TPE, in the
same study. At the end scikit-learn fits and ranks the three best settings.
"""

from __future__ import annotations

import time

import numpy as np
from optuna.distributions import FloatDistribution, IntDistribution
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler, PolynomialFeatures, StandardScaler

import optuna_hypergrad as ohg


def main(num_trials: int = 40, grid_size: int = 13) -> float:
    x, y = load_diabetes(return_X_y=True)
    pipeline = Pipeline(
        [("scale", StandardScaler()), ("poly", PolynomialFeatures()), ("ridge", Ridge())]
    )
    scalers = [StandardScaler(), MinMaxScaler()]
    folds = KFold(5, shuffle=True, random_state=0)

    begun = time.perf_counter()
    search = ohg.HypergradientSearchCV(
        pipeline,
        {
            "ridge__alpha": FloatDistribution(1e-4, 1e4, log=True),
            "poly__degree": IntDistribution(1, 3),
            "scale": scalers,
        },
        scoring="neg_root_mean_squared_error",
        cv=folds,
        n_trials=num_trials,
        random_state=0,
    ).fit(x, y)
    seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    grid = {
        "ridge__alpha": np.logspace(-4, 4, grid_size),
        "poly__degree": [1, 2, 3],
        "scale": scalers,
    }
    reference = GridSearchCV(pipeline, grid, scoring=search.scoring, cv=folds).fit(x, y)
    num_settings = len(reference.cv_results_["params"])

    print(f"{num_trials} trials follow the {search.followed_}")
    for name, found, spent in (
        (f"hypergradients, {num_trials} trials", search, seconds),
        (f"a grid of {num_settings}", reference, time.perf_counter() - begun),
    ):
        print(f"{name}: error {-found.best_score_:.4f} in {spent:.1f} s, {found.best_params_}")
    return float(-search.best_score_)


if __name__ == "__main__":
    main()
