"""A network as a scikit-learn estimator that finds its weight decays while it trains, beside GridSearchCV over MLPClassifier.

One fit against five for each penalty of the grid. Both are judged on digits that neither has seen.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import optuna_hypergrad as ohg


def main(max_iter: int = 100, grid_size: int = 9) -> float:
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, train_size=400, random_state=0, stratify=y)

    begun = time.perf_counter()
    tuned = ohg.HypergradientClassifier(
        hidden_layer_sizes=(64,), decay="per_layer", max_iter=max_iter, random_state=0
    ).fit(x, y)
    seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    network = MLPClassifier((64,), random_state=0, max_iter=300)
    grid = {"mlpclassifier__alpha": np.logspace(-4, 2, grid_size)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        reference = GridSearchCV(
            make_pipeline(StandardScaler(), network), grid, scoring="neg_log_loss"
        ).fit(x, y)

    decays = {k: f"{float(v):.2g}" for k, v in tuned.hyperparameters_.items()}
    print(
        f"decays after {tuned.n_iter_} outer steps: {decays}; penalties: {reference.best_params_}"
    )
    for name, found, spent in (
        ("hypergradients while training", tuned, seconds),
        (f"a grid of {grid_size}", reference, time.perf_counter() - begun),
    ):
        right = 100 * float((found.predict(x_test) == y_test).mean())
        loss = log_loss(y_test, found.predict_proba(x_test))
        print(f"{name}: {right:.1f} % right, log loss {loss:.3f} on new data, {spent:.1f} s")
    return float(log_loss(y_test, tuned.predict_proba(x_test)))


if __name__ == "__main__":
    main()
