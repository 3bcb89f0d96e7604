"""What a search refuses: in words, by scikit-learn's own kind of error, before any fit."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.svm import LinearSVC

from optuna_hypergrad import FeatureWeights, HypergradientSearchCV, TensorDistribution

ALPHA = FloatDistribution(1e-3, 1e3, log=True)
X, Y = load_diabetes(return_X_y=True)
FLOWERS = load_iris(return_X_y=True)


def with_nan() -> np.ndarray:
    x = X.copy()
    x[17, 3] = np.nan
    return x


def one_class() -> tuple[np.ndarray, np.ndarray]:
    return FLOWERS[0][:100], np.repeat([0, 1], [90, 10])


PIPELINE = make_pipeline(StandardScaler(), PolynomialFeatures(), Ridge())
CASES: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "an unknown name": (Ridge(), {"param_distributions": {"alhpa": ALPHA}}, (X, Y), "did you mean 'alpha'"),
    "an unknown name of a step": (
        PIPELINE, {"param_distributions": {"ridge__alhpa": ALPHA}}, (X, Y), "did you mean 'ridge__alpha'"),
    "a negative penalty": (
        Ridge(), {"param_distributions": {"alpha": FloatDistribution(-1.0, 1.0)}}, (X, Y),
        r"'alpha'\] goes from -1.0 to 1.0, and Ridge takes"),
    "a float for an integer": (
        PIPELINE, {"param_distributions": {"polynomialfeatures__degree": FloatDistribution(1.0, 3.0)}}, (X, Y),
        "PolynomialFeatures takes"),
    "a pair that may be a range": (
        Ridge(), {"param_distributions": {"alpha": (1e-3, 1e2)}}, (X, Y),
        r"write FloatDistribution\(0.001, 100.0, log=True\) .* or the list \[0.001, 100.0\] for two choices"),
    "a file for a URL": (Ridge(), {"storage": "x.db"}, (X, Y), r"x.db' is not the URL .* 'sqlite:///x.db'"),
    "an integer out of range": (
        LogisticRegression(), {"param_distributions": {"max_iter": IntDistribution(-5, 10)}}, FLOWERS, "takes"),
    "a number for a word": (
        LogisticRegression(), {"param_distributions": {"solver": FloatDistribution(0.0, 1.0)}}, FLOWERS, "takes"),
    "NaN in X": (PIPELINE, {}, (with_nan(), Y), "Input X contains NaN"),
    "infinite X": (Ridge(), {}, (np.where(X > 0.15, np.inf, X), Y), "Input X contains infinity"),
    "fewer samples than folds": (Ridge(), {"cv": KFold(5)}, (X[:4], Y[:4]), "n_splits=5 greater than the number of samples"),
    "a fold of one class": (LogisticRegression(), {"cv": KFold(5)}, one_class(), "only one class"),
    "unequal lengths": (Ridge(), {}, (X, Y[:-1]), "inconsistent numbers of samples"),
    "an unknown score": (Ridge(), {"scoring": "r3"}, (X, Y), "scoring"),
    "two scores": (Ridge(), {"scoring": ["r2", "neg_max_error"]}, (X, Y), "the parameter refit must be set"),
    "a refit that is none of two scores": (
        Ridge(), {"scoring": ["r2", "neg_max_error"], "refit": "mse"}, (X, Y), "the parameter refit must be set"),
    "a vector of what is none": (
        Ridge(), {"param_distributions": {"fit_intercept": TensorDistribution("per_feature", 0.1, 1)}}, (X, Y), "is a vector"),
}  # fmt: skip


@pytest.mark.parametrize(("estimator", "more", "data", "message"), CASES.values(), ids=CASES)
def test_it_is_refused_before_any_fit(estimator, more, data, message, monkeypatch):
    for kind in (Ridge, LogisticRegression):

        @functools.wraps(kind.fit)
        def fit(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("it was fitted")

        monkeypatch.setattr(kind, "fit", fit)
    search = HypergradientSearchCV(estimator, **{"n_trials": 2, **more})
    with pytest.raises(ValueError, match=message):
        search.fit(*data)
    assert not hasattr(search, "best_params_")


def test_constant_targets_have_no_r2_to_follow():
    search = HypergradientSearchCV(Ridge(), n_trials=2, random_state=0).fit(X[:60], np.ones(60))
    assert "its targets do not vary" in search.followed_
    assert search.best_score_ == 1.0


def test_a_score_without_a_counterpart_says_what_is_followed():
    search = HypergradientSearchCV(Ridge(), n_trials=4, scoring="neg_max_error", random_state=0)
    search.fit(X, Y)
    assert search.followed_.startswith("mean squared error, which stands for the score")


def test_what_an_estimator_alone_can_judge_is_left_to_it():
    space = {
        "C": FloatDistribution(1e-3, 1e-1),
        "fit_intercept": CategoricalDistribution([True, False]),
    }
    search = HypergradientSearchCV(LinearSVC(), space, n_trials=2, random_state=0).fit(*FLOWERS)
    assert search.best_score_ > 0.8


def test_words_as_targets_of_a_regression_are_declined_in_words():
    words = np.array(["low", "high"])[(Y > 100).astype(int)]
    search = HypergradientSearchCV(Ridge(), n_trials=1, random_state=0)
    with (
        pytest.warns(FitFailedWarning),
        pytest.raises(ValueError, match="could not convert string to float"),
    ):
        search.fit(X, words)
    assert "the targets are <U4, not numbers" in search.followed_


def test_data_that_may_not_be_written_are_read_without_a_warning():
    x, y = X.copy(), Y.copy()
    for array in (x, y):
        array.setflags(write=False)
    search = HypergradientSearchCV(Ridge(), n_trials=2, random_state=0).fit(x, y)
    assert "by the hypergradients" in search.followed_


def test_pairs_of_other_things_are_choices():
    space = {"fit_intercept": (True, False), "solver": ("svd", "cholesky"), "alpha": [1e-3, 1e2]}
    search = HypergradientSearchCV(Ridge(), space, n_trials=2, random_state=0).fit(X, Y)
    assert search.best_params_["alpha"] in (1e-3, 1e2)


def test_a_search_without_a_guard_says_why_there_is_no_nested_estimate():
    space = {"featureweights__weights": TensorDistribution("per_feature", 0.1, 10.0)}
    pipeline = make_pipeline(StandardScaler(), FeatureWeights(), Ridge())
    search = HypergradientSearchCV(pipeline, space, guard=None, n_trials=1, random_state=0)
    for message in ("is not fitted", "has guard=None"):
        assert not hasattr(search, "nested_")
        with pytest.raises(AttributeError, match=f"nested cross-validation .* {message}"):
            _ = search.nested_
        search.fit(X, Y)
    with pytest.raises(AttributeError, match="no attribute 'nestd_'"):
        _ = search.nestd_
