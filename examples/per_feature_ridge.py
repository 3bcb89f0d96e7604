"""A penalty for each feature of a ridge regression in a pipeline, beside GridSearchCV with one for all.

Eighty features, of which five matter, and sixty samples. ``FeatureWeights`` in front of ``Ridge`` stands for the penalties; its weights move by
the hypergradient of the cross-validated loss, as far as nested cross-validation lets them, and what comes out is a plain
pipeline.
"""

from __future__ import annotations

import time

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_squared_error
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import optuna_hypergrad as ohg

WEIGHTS = "featureweights__weights"


def main(num_trials: int = 60) -> float:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1060, 80))
    y = x[:, :5] @ [3.0, -2.0, 2.0, 1.0, -1.0] + generator.normal(size=len(x))
    train, test = slice(60), slice(60, None)
    pipeline = make_pipeline(StandardScaler(), ohg.FeatureWeights(), Ridge())

    begun = time.perf_counter()
    search = ohg.HypergradientSearchCV(
        pipeline,
        {WEIGHTS: ohg.TensorDistribution("per_feature", 1e-2, 1e2)},
        n_trials=num_trials,
        random_state=0,
    ).fit(x[train], y[train])
    seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    grid = GridSearchCV(pipeline, {"ridge__alpha": np.logspace(-4, 4, 49)}).fit(x[train], y[train])
    errors = []
    for name, found, spent in (
        ("a penalty per feature, by hypergradients", search, seconds),
        ("one penalty, by a grid of 49", grid, time.perf_counter() - begun),
    ):
        errors.append(mean_squared_error(y[test], found.predict(x[test])))
        print(f"{name}: error on new samples {errors[-1]:.3f} (the noise is 1), {spent:.1f} s")
    nested, weights = search.nested_, search.best_params_[WEIGHTS]
    print(f"1 - R^2 on nested folds: all equal {nested.tied_loss:.3f}, chosen {nested.loss:.3f}")
    print(f"minimized: {search.cv_results_['followed_loss'][search.best_index_]:.3f}")
    print(
        f"weights that matter: {np.sort(weights[:5]).round(2)}, others: {np.median(weights[5:]):.2f}"
    )
    return float(errors[0])


if __name__ == "__main__":
    main()
