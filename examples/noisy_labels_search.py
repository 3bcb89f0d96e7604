"""Noisy labels: a weight for each training sample, found by cross-validation, beside GridSearchCV.

Three labels in ten are wrong, in the training and the test parts of the folds alike. Weights of the samples move by the
hypergradient of the cross-validated loss. Labels by which a gain is judged are wrong, too, so that it is not sure, and the guard
leaves the weights equal rather than fit the noise. (``data_cleaning`` has labels to be trusted, and finds the wrong ones.)
"""

from __future__ import annotations

import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import optuna_hypergrad as ohg


def main(num_trials: int = 20) -> float:
    generator = np.random.default_rng(0)
    x, y = load_digits(n_class=5, return_X_y=True)
    order = generator.permutation(len(y))
    train, test = order[:400], order[400:]
    wrong = generator.random(len(train)) < 0.3
    labels = np.where(wrong, (y[train] + generator.integers(1, 5, len(train))) % 5, y[train])
    model = make_pipeline(StandardScaler(), PCA(16), LogisticRegression(max_iter=1000))

    begun = time.perf_counter()
    search = ohg.HypergradientSearchCV(
        model,
        {"sample_weight": ohg.TensorDistribution("per_sample", 1e-2, 1e1)},
        scoring="neg_log_loss",
        n_trials=num_trials,
        random_state=0,
    ).fit(x[train], labels)
    seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    space = {"logisticregression__C": np.logspace(-4, 2, 13)}
    grid = GridSearchCV(model, space, scoring="neg_log_loss").fit(x[train], labels)
    accuracy = []
    for name, found, spent in (
        ("a weight per sample, by hypergradients", search, seconds),
        ("no weights, a grid of 13", grid, time.perf_counter() - begun),
    ):
        accuracy.append(found.best_estimator_.score(x[test], y[test]))
        print(f"{name}: {accuracy[-1]:.1%} of new digits right, {spent:.1f} s")
    nested = search.nested_
    print(f"log loss on nested folds: all equal {nested.tied_loss:.3f}, chosen {nested.loss:.3f}")
    area = roc_auc_score(~wrong, search.best_params_["sample_weight"])
    print(f"The weights tell right labels from wrong ones with AUROC {area:.2f}")
    return float(1 - accuracy[0])


if __name__ == "__main__":
    main()
