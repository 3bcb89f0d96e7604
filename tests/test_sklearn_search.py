"""HypergradientSearchCV: scikit-learn's conventions, the hypergradients of its adapters, and its studies."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import FitFailedWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, LogisticRegression, Ridge
from sklearn.metrics import (
    get_scorer,
    log_loss,
    make_scorer,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
)
from sklearn.model_selection import KFold, ShuffleSplit, StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils.estimator_checks import check_estimator
from threadpoolctl import ThreadpoolController

from optuna_hypergrad import HypergradientSampler
from optuna_hypergrad.sklearn_adapters import (
    REGISTRY,
    FeatureWeights,
    HypergradientSearchCV,
    LogisticRegressionAdapter,
    RidgeAdapter,
    TensorDistribution,
)
from optuna_hypergrad.sklearn_adapters._adapter import AbstractAdapter, Fold, tensor
from optuna_hypergrad.sklearn_adapters._study import quiet
from optuna_hypergrad.sklearn_adapters._threads import one_thread

ALPHA = FloatDistribution(1e-4, 1e4, log=True)
DIABETES = load_diabetes(return_X_y=True)


def small(loader: Any, n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    x, y = loader(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(y))[:n]
    return StandardScaler().fit_transform(x[chosen]), y[chosen]


def fold_of(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None) -> Fold:
    half = len(y) * 2 // 3
    return Fold(
        tensor(x[:half]),
        y[:half],
        tensor(x[half:]),
        y[half:],
        None if weights is None else tensor(weights[:half]),
        tensor(np.full(len(y) - half, 1 / (len(y) - half))),
    )


def by_scikit_learn(estimator: Any, scoring: str, fold: Fold) -> float:
    """The loss, by a fit of scikit-learn's own."""
    weights = None if fold.weights is None else fold.weights.numpy()
    model = clone(estimator).fit(fold.x_train.numpy(), fold.y_train, sample_weight=weights)
    x, y = fold.x_test.numpy(), fold.y_test
    if scoring == "neg_log_loss":
        return float(log_loss(y, model.predict_proba(x), labels=model.classes_))
    if scoring == "r2":
        return 1 - float(r2_score(y, model.predict(x)))
    error = mean_squared_error(y, model.predict(x), multioutput="raw_values")
    return float(np.mean(np.sqrt(error) if "root" in scoring else error))


EXACT = {"tol": 1e-10, "max_iter": 10_000}
CASES = [
    (RidgeAdapter(), Ridge(), "alpha", 3.0, load_diabetes, "neg_mean_squared_error"),
    (RidgeAdapter(), Ridge(fit_intercept=False), "alpha", 0.2, load_diabetes, "r2"),
    (RidgeAdapter(), Ridge(), "alpha", 50.0, load_diabetes, "neg_root_mean_squared_error"),
    (LogisticRegressionAdapter(), LogisticRegression(**EXACT), "C", 0.3, load_breast_cancer, "neg_log_loss"),
    (LogisticRegressionAdapter(), LogisticRegression(**EXACT), "C", 300.0, load_wine, "neg_log_loss"),
    (LogisticRegressionAdapter(), LogisticRegression(**EXACT), "C", 0.2, load_digits, "neg_log_loss"),
    (
        LogisticRegressionAdapter(),
        LogisticRegression(fit_intercept=False, **EXACT),
        "C",
        0.05,
        load_wine,
        "neg_log_loss",
    ),
]  # fmt: skip


def test_a_data_frame_may_have_columns_of_several_kinds() -> None:
    pd = pytest.importorskip("pandas")
    x, y = load_diabetes(return_X_y=True)
    kinds = {"age": x[:, 0], "is_male": x[:, 1] > 0, "visits": np.arange(len(x)) % 4}
    frame = pd.DataFrame(kinds)
    assert np.asarray(frame).dtype == object
    search = HypergradientSearchCV(Ridge(), n_trials=4, random_state=0)
    found = search.fit(frame, y)
    assert found.followed_ == "1 - R^2, by the hypergradients of alpha"
    array = np.asarray(frame, dtype=np.float64)
    assert found.best_params_ == clone(search).fit(array, y).best_params_
    texts = clone(search).fit(frame.assign(visits=frame["visits"].astype(str)), y)
    assert texts.followed_ == found.followed_  # as scikit-learn takes them
    search.set_params(error_score="raise")
    with pytest.raises(ValueError, match="could not convert string to float"):
        search.fit(frame.assign(visits="many"), y)


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (get_scorer("neg_mean_squared_error"), "mean squared error, by"),
        (make_scorer(mean_absolute_error, greater_is_better=False), "Huber loss, nearly"),
        (
            make_scorer(r2_score, multioutput="variance_weighted"),
            "mean squared error, which stands",
        ),
        (
            make_scorer(mean_squared_error),
            "mean squared error, which stands",
        ),  # the higher the better
    ],
)
def test_a_scorer_is_known_as_its_name_is(scorer: Any, expected: str) -> None:
    x, y = load_diabetes(return_X_y=True)
    search = HypergradientSearchCV(Ridge(), scoring=scorer, n_trials=2, random_state=0).fit(x, y)
    assert search.followed_.startswith(expected)
    named = search.set_params(scoring={"a": scorer}, refit="a").fit(x, y)
    assert named.followed_.startswith(expected)


def test_every_adapter_is_tested():
    assert {type(c[0]) for c in CASES} <= set(REGISTRY.values())  # others: test_sklearn_adapters.py


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{type(c[0]).__name__}-{c[3]}")
def test_the_hypergradient_of_a_fold_is_that_of_refits(
    case: tuple[AbstractAdapter, Any, str, float, Any, str], weighted: bool
) -> None:
    adapter, estimator, name, at, loader, scoring = case
    x, y = small(loader)
    weights = np.random.default_rng(1).uniform(0.2, 2.0, len(y)) if weighted else None
    fold = fold_of(x, y, weights)
    loss = adapter.followed_loss(scoring)
    assert loss.is_score

    def followed(log: torch.Tensor) -> torch.Tensor:
        return loss.function(
            *adapter.predict(estimator, {name: log.exp()}, fold, {}), fold.test_weights
        )

    log = torch.tensor(np.log(at), requires_grad=True, dtype=torch.float64)
    value = followed(log)
    (slope,) = torch.autograd.grad(value, log)
    reference = by_scikit_learn(clone(estimator).set_params(**{name: at}), scoring, fold)
    assert float(value.detach()) == pytest.approx(reference, rel=1e-5)
    step = 1e-4
    with torch.no_grad():
        ahead, behind = (float(followed(log + h)) for h in (step, -step))
    assert float(slope) == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)
    assert abs(float(slope)) > 1e-6


def test_several_targets_are_followed():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(60, 3))
    search = HypergradientSearchCV(Ridge(), n_trials=6, random_state=0).fit(x, y)
    assert search.followed_.startswith("1 - R^2, by the hypergradients of alpha")
    assert search.best_score_ == pytest.approx(
        1 - search.cv_results_["followed_loss"][search.best_index_]
    )


def test_the_loss_that_is_followed_is_the_score_of_scikit_learn():
    x, y = small(load_diabetes, 200)
    pipeline = make_pipeline(StandardScaler(), Ridge())
    search = HypergradientSearchCV(pipeline, n_trials=12, random_state=0).fit(x, y)
    assert search.followed_ == "1 - R^2, by the hypergradients of ridge__alpha"
    losses, scores = search.cv_results_["followed_loss"], search.cv_results_["mean_test_score"]
    assert 1 - losses == pytest.approx(scores, rel=1e-9)
    assert search.best_params_ == search.study_.best_params
    grid = [
        cross_val_score(clone(pipeline).set_params(ridge__alpha=a), x, y).mean()
        for a in np.logspace(-6, 6, 49)
    ]
    assert search.best_score_ >= max(grid) - 1e-6
    assert len(search.study_.trials) == 12


def test_a_score_without_a_counterpart_ranks_what_was_visited():
    x, y = small(load_breast_cancer)
    search = HypergradientSearchCV(
        LogisticRegression(), n_trials=8, n_rescored=4, scoring="accuracy", random_state=0
    ).fit(x, y)
    assert search.followed_.startswith(
        "log loss, which stands for the score, by the hypergradients of C"
    )
    assert search.best_score_ == search.cv_results_["mean_test_score"].max()
    assert len(search.cv_results_["params"]) == 4
    assert search.study_.user_attrs["scores"].keys() == {
        str(n) for n in search.cv_results_["trial_number"]
    }


@pytest.mark.parametrize("scoring", ["r2", "neg_mean_squared_error", "neg_root_mean_squared_error"])
def test_sample_weights_are_those_of_fits_and_scores(scoring):
    x, y = small(load_diabetes)
    weights = np.where(np.arange(len(y)) % 3 == 0, 0.0, 1.0 + np.arange(len(y)) % 2)
    search = HypergradientSearchCV(
        Ridge(), cv=KFold(3), n_trials=6, scoring=scoring, random_state=0
    )
    search.fit(x, y, sample_weight=weights)
    assert "by the hypergradients of alpha" in search.followed_
    expected = [
        get_scorer(scoring)(
            Ridge(**search.best_params_).fit(x[a], y[a], sample_weight=weights[a]),
            *(x[b], y[b]),
            sample_weight=weights[b],
        )
        for a, b in KFold(3).split(x)
    ]
    worst = float(scoring == "r2")
    assert search.best_score_ == pytest.approx(np.mean(expected), rel=1e-9)
    assert worst - search.study_.best_value == pytest.approx(np.mean(expected), rel=1e-9)


def test_discrete_choices_and_continuous_ones_share_a_study():
    x, y = small(load_diabetes)
    pipeline = Pipeline(
        [("poly", PolynomialFeatures()), ("scale", StandardScaler()), ("ridge", Ridge())]
    )
    space = {
        "poly__degree": IntDistribution(1, 2),
        "scale": [StandardScaler(), "passthrough"],
        "ridge__fit_intercept": CategoricalDistribution([True, False]),
        "ridge__alpha": ALPHA,
    }
    search = HypergradientSearchCV(pipeline, space, n_trials=25, random_state=0).fit(x, y)
    assert search.followed_ == "1 - R^2, by the hypergradients of ridge__alpha"
    assert search.cv_results_["followed_loss"] == pytest.approx(
        1 - search.cv_results_["mean_test_score"], rel=1e-7
    )
    tried = {tuple(t.params[k] for k in space if k != "ridge__alpha") for t in search.study_.trials}
    assert len(tried) > 2


KERNELS = {
    "kernel": ["linear", "rbf", "laplacian"],
    "alpha": FloatDistribution(1e-4, 1e2, log=True),
    "gamma": FloatDistribution(1e-5, 1e1, log=True),
}


def kernels_of(search: HypergradientSearchCV) -> list[str]:
    return [t.params["kernel"] for t in search.study_.trials]


def test_a_few_choices_are_all_looked_at_first_and_the_best_is_gone_on_with():
    x, y = small(load_diabetes)
    search = HypergradientSearchCV(KernelRidge(), KERNELS, n_trials=6, cv=3, random_state=0)
    search.fit(x, y)
    tried, values = kernels_of(search), [t.value for t in search.study_.trials]
    assert tried[:3] == KERNELS["kernel"]
    assert tried[3:5] == 2 * [tried[int(np.argmin(values[:3]))]]
    few = HypergradientSearchCV(KernelRidge(), KERNELS, n_trials=2, cv=3, random_state=0).fit(x, y)
    assert len(few.study_.trials) == 2
    own = search.set_params(sampler=HypergradientSampler(seed=0), n_trials=3).fit(x, y)
    assert not any("fixed_params" in t.system_attrs for t in own.study_.trials)


def test_a_parameter_of_a_choice_is_left_out_under_others():
    x, y = small(load_diabetes)
    space = {
        "reduce": [PCA(), "passthrough"],
        "reduce__n_components": [2, 5],
        "ridge__alpha": ALPHA,
    }
    pipeline = Pipeline([("reduce", "passthrough"), ("ridge", Ridge())])
    search = HypergradientSearchCV(pipeline, space, n_trials=8, cv=3, random_state=0).fit(x, y)
    plain = cross_val_score(Ridge(alpha=search.best_params_["ridge__alpha"]), x, y, cv=3)
    assert search.best_params_["reduce"] == "passthrough"
    assert "reduce__n_components" not in search.best_params_
    assert search.best_score_ == pytest.approx(plain.mean(), rel=1e-9)
    reduced = [p for p in search.cv_results_["params"] if p["reduce"] != "passthrough"]
    assert all(p["reduce__n_components"] in (2, 5) for p in reduced)


def test_a_search_that_was_cut_among_its_choices_goes_on(tmp_path):
    x, y = small(load_diabetes)
    settings: dict[str, Any] = {"n_trials": 6, "cv": 3, "random_state": 0}
    whole = HypergradientSearchCV(KernelRidge(), KERNELS, **settings).fit(x, y)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    stored = settings | {"storage": storage, "study_name": "a", "resume": True}

    def cut(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        study.stop()

    HypergradientSearchCV(KernelRidge(), KERNELS, **stored, callbacks=[cut]).fit(x, y)
    second = HypergradientSearchCV(KernelRidge(), KERNELS, **stored).fit(x, y)
    assert kernels_of(second) == kernels_of(whole)
    assert [t.values for t in second.study_.trials] == [t.values for t in whole.study_.trials]


@pytest.mark.parametrize(
    ("estimator", "space", "scoring", "data", "reason"),
    [
        (DecisionTreeRegressor(), {"max_depth": IntDistribution(1, 4)}, None, DIABETES, "no adapter for DecisionTree"),
        (Ridge(positive=True), {"alpha": ALPHA}, None, DIABETES, "no closed form"),
        (Ridge(), {"alpha": ALPHA, "positive": [True, False]}, None, DIABETES, "no closed form"),
        (Ridge(), {"alpha": [0.1, 1.0]}, None, DIABETES, "none of 'alpha' has a FloatDistribution"),
        (Ridge(), {"alpha": FloatDistribution(0.0, 1.0)}, None, DIABETES, "above 0"),
        (LogisticRegression(class_weight="balanced"), {"C": ALPHA}, None, small(load_wine, 60), "class_weight"),
    ],
)  # fmt: skip
def test_where_there_is_no_hypergradient_it_says_why(estimator, space, scoring, data, reason):
    x, y = data[0][:90], data[1][:90]
    search = HypergradientSearchCV(
        estimator, space, n_trials=3, scoring=scoring, cv=3, random_state=0
    ).fit(x, y)
    assert "without hypergradients" in search.followed_
    assert reason in search.followed_
    assert isinstance(search.study_.sampler, optuna.samplers.TPESampler)
    assert search.best_score_ == pytest.approx(search.study_.best_value)
    assert len(search.cv_results_["params"]) == 3
    assert "split_scores" in search.study_.best_trial.user_attrs


@pytest.mark.parametrize(
    "search",
    [
        HypergradientSearchCV(Ridge(), n_trials=2),
        HypergradientSearchCV(LogisticRegression(), n_trials=2),
        HypergradientSearchCV(
            make_pipeline(FeatureWeights(), Ridge()),
            {"featureweights__weights": TensorDistribution("per_feature", 1e-2, 1e2)},
            n_trials=3,
            guard=None,
        ),
        HypergradientSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [1, 2]}, n_trials=2),
    ],
    ids=["ridge", "logistic", "vectors", "tree"],
)  # fmt: skip
def test_scikit_learns_checks(search):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(search, on_fail=None, on_skip=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
    assert sum(r["status"] == "passed" for r in results) > 40


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"param_distributions": {"alhpa": ALPHA}}, ValueError, "Invalid parameter 'alhpa'.*'alpha'"),
        ({"param_distributions": {}}, ValueError, "param_distributions is empty"),
        ({"param_distributions": {"alpha": []}}, ValueError, "'alpha'.* is empty"),
        ({"param_distributions": {"alpha": 3.0}}, TypeError, "must be a distribution"),
        ({"estimator": DecisionTreeRegressor()}, ValueError, "usual ranges of .*LogisticRegression, Ridge"),
        ({"scoring": ["r2", "neg_max_error"]}, ValueError, "the parameter refit must be set"),
        ({"resume": True}, ValueError, "needs storage= and study_name="),
        (
            {"resume": True, "storage": optuna.storages.InMemoryStorage(), "study_name": "a",
             "cv": ShuffleSplit(2)},
            ValueError,
            "gives others each time",
        ),
        ({"n_trials": 0}, ValueError, "n_trials"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_fit(arguments, error, message, monkeypatch):
    def fit(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was fitted")

    monkeypatch.setattr(Ridge, "fit", fit)
    monkeypatch.setattr(DecisionTreeRegressor, "fit", fit)
    search = HypergradientSearchCV(**({"estimator": Ridge(), "n_trials": 2} | arguments))
    with pytest.raises(error, match=message):
        search.fit(*DIABETES)


def test_trials_that_fail_are_left_out_and_all_of_them_are_an_error():
    x, y = small(load_diabetes)
    space = {"max_depth": CategoricalDistribution([-3, 2])}
    search = HypergradientSearchCV(
        DecisionTreeRegressor(random_state=0), space, n_trials=6, random_state=0
    )
    with pytest.warns(FitFailedWarning, match="max_depth"):
        search.fit(x, y)
    states = {t.params["max_depth"]: t.state.name for t in search.study_.trials}
    assert states == {-3: "FAIL", 2: "COMPLETE"}
    assert {p["max_depth"] for p in search.cv_results_["params"]} == {2}
    search.set_params(param_distributions={"max_depth": [-3]})
    with pytest.warns(FitFailedWarning), pytest.raises(ValueError, match="fits failed"):
        search.fit(x, y)
    with pytest.raises(ValueError, match="max_depth"):
        search.set_params(error_score="raise").fit(x, y)


def test_a_failed_trial_is_one_warning_and_no_traceback_unless_asked_for(caplog):
    x, y = small(load_diabetes)
    logger, before = logging.getLogger("optuna"), optuna.logging.get_verbosity()
    logger.addHandler(caplog.handler)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        for verbose in (0, 1):
            search = HypergradientSearchCV(
                DecisionTreeRegressor(random_state=0),
                {"max_depth": [-3, 2]},
                n_trials=6,
                random_state=0,
                verbose=verbose,
            )
            with pytest.warns(FitFailedWarning, match="max_depth"):
                search.fit(x, y)
            assert ("Traceback" in caplog.text) == bool(verbose)
    finally:
        logger.removeHandler(caplog.handler)
        optuna.logging.set_verbosity(before)
    assert logging.getLogger("optuna.study").level == logging.NOTSET


def test_the_fits_of_clones_are_studies_of_their_own(tmp_path):
    x, y = small(load_diabetes)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    search = HypergradientSearchCV(
        Ridge(), n_trials=4, storage=storage, study_name="inner", cv=3, random_state=0
    )
    cross_val_score(search, x, y, cv=3)
    names = optuna.get_all_study_names(storage)
    assert sorted(names) == ["inner", "inner-2", "inner-3"]
    assert {len(optuna.load_study(study_name=n, storage=storage).trials) for n in names} == {4}


def test_a_search_that_was_cut_goes_on(tmp_path):
    x, y = small(load_diabetes)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    settings: dict[str, Any] = {"n_trials": 7, "cv": 3, "random_state": 0}
    whole = HypergradientSearchCV(Ridge(), **settings).fit(x, y)

    def cut(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number == 2:
            study.stop()

    stored: dict[str, Any] = {**settings, "storage": storage, "study_name": "a", "resume": True}
    first = HypergradientSearchCV(Ridge(), **stored, callbacks=[cut]).fit(x, y)
    assert len(first.study_.trials) == 3
    second = HypergradientSearchCV(Ridge(), **stored).fit(x, y)
    assert optuna.get_all_study_names(storage) == ["a"]
    assert [t.values for t in second.study_.trials] == [t.values for t in whole.study_.trials]
    assert second.best_params_ == whole.best_params_
    HypergradientSearchCV(Ridge(), **stored).fit(x[:90], y[:90])
    assert sorted(optuna.get_all_study_names(storage)) == ["a", "a-2"]
    again = HypergradientSearchCV(Ridge(), **stored).fit(x, y)  # nothing is left to do
    assert len(again.study_.trials) == 7
    assert again.best_params_ == whole.best_params_


def test_the_same_seed_gives_the_same_search():
    x, y = small(load_breast_cancer)
    runs = [
        HypergradientSearchCV(
            LogisticRegression(), n_trials=5, cv=StratifiedKFold(3), random_state=3
        ).fit(x, y)
        for _ in range(2)
    ]
    assert [t.values for t in runs[0].study_.trials] == [t.values for t in runs[1].study_.trials]


def test_several_scores_and_scorers_of_ones_own():
    x, y = small(load_diabetes)
    scoring = {"r2": "r2", "mse": make_scorer(mean_squared_error, greater_is_better=False)}
    search = HypergradientSearchCV(
        Ridge(), n_trials=5, scoring=scoring, refit="mse", random_state=0
    )
    search.fit(x, y)
    assert search.followed_.startswith("mean squared error, by the hypergradients")
    assert search.best_score_ == pytest.approx(-search.study_.best_value)
    assert "mean_test_r2" in search.cv_results_
    tree = HypergradientSearchCV(
        DecisionTreeRegressor(),
        {"max_depth": IntDistribution(1, 3)},
        n_trials=3,
        scoring=lambda e, a, b: {"one": e.score(a, b), "two": 0.0},
        refit="one",
        random_state=0,
    ).fit(x, y)
    assert tree.best_score_ == pytest.approx(tree.study_.best_value)


def test_several_scores_none_of_which_refit_names():
    """As in ``GridSearchCV``: a function chooses the row, ``False`` refits none; the first score is searched for."""
    x, y = small(load_diabetes)
    scoring = ["neg_mean_squared_error", "r2"]
    search = HypergradientSearchCV(Ridge(), n_trials=5, scoring=scoring, random_state=0)
    named = clone(search).set_params(refit=scoring[0]).fit(x, y)
    chosen = clone(search).set_params(refit=lambda results: len(results["params"]) - 1).fit(x, y)
    neither = clone(search).set_params(refit=False).fit(x, y)
    for other in (chosen, neither):
        assert other.followed_ == named.followed_
        assert other.study_.best_value == named.study_.best_value
        assert other.multimetric_
        assert (other.cv_results_["mean_test_r2"] == named.cv_results_["mean_test_r2"]).all()
    assert chosen.best_index_ == len(chosen.cv_results_["params"]) - 1
    assert chosen.best_estimator_.alpha == chosen.cv_results_["params"][-1]["alpha"]
    assert not hasattr(neither, "best_estimator_")
    with pytest.raises(ValueError, match="the parameter refit must be set"):
        search.fit(x, y)
    tree = HypergradientSearchCV(
        DecisionTreeRegressor(),
        {"max_depth": IntDistribution(1, 3)},
        n_trials=3,
        scoring=lambda e, a, b: {"two": e.score(a, b), "one": 0.0},
        refit=lambda results: int(np.argmin(results["rank_test_two"])),
        random_state=0,
    ).fit(x, y)
    best = tree.cv_results_["mean_test_two"][tree.best_index_]
    assert best == pytest.approx(tree.study_.best_value)


def test_pipelines_in_pipelines_are_followed_with_all_their_transformers():
    x, y = small(load_diabetes)
    inner = Pipeline([("poly", PolynomialFeatures(2)), ("ridge", Ridge())])
    search = HypergradientSearchCV(
        Pipeline([("scale", StandardScaler()), ("inner", inner)]), n_trials=5, random_state=0
    ).fit(x[:, :4], y)
    assert search.followed_ == "1 - R^2, by the hypergradients of inner__ridge__alpha"
    assert search.cv_results_["followed_loss"] == pytest.approx(
        1 - search.cv_results_["mean_test_score"], rel=1e-9
    )


def test_losses_and_scores_are_never_in_one_study(tmp_path):
    x, y = small(load_diabetes)
    stored: dict[str, Any] = {
        "storage": f"sqlite:///{tmp_path / 'study.db'}", "study_name": "a", "resume": True
    }  # fmt: skip
    followed = HypergradientSearchCV(Ridge(), n_trials=3, random_state=0, **stored).fit(x, y)
    sampled = HypergradientSearchCV(
        Ridge(), n_trials=4, sampler=optuna.samplers.TPESampler(seed=0), **stored
    ).fit(x, y)
    assert followed.study_.study_name != sampled.study_.study_name
    assert sampled.best_score_ == pytest.approx(sampled.study_.best_value)


def test_a_search_without_hypergradients_goes_on_where_it_was_cut(tmp_path):
    x, y = small(load_diabetes)
    space = {"alpha": FloatDistribution(0.0, 1.0)}
    settings: dict[str, Any] = {"cv": 3, "random_state": 0}
    whole = HypergradientSearchCV(Ridge(), space, n_trials=12, **settings).fit(x, y)
    settings |= {"storage": f"sqlite:///{tmp_path / 'study.db'}", "study_name": "a", "resume": True}
    for n in (5, 12):
        cut = HypergradientSearchCV(Ridge(), space, n_trials=n, **settings).fit(x, y)
    assert [t.params for t in cut.study_.trials] == [t.params for t in whole.study_.trials]


def test_settings_that_cannot_be_fitted_are_failed_trials():
    x, y = small(load_diabetes)
    pipeline = Pipeline([("pca", PCA()), ("ridge", Ridge())])
    space = {"pca__n_components": [2, 99], "ridge__alpha": ALPHA}
    search = HypergradientSearchCV(pipeline, space, n_trials=14, random_state=0)
    with pytest.warns(FitFailedWarning, match="n_components"):
        search.fit(x, y)
    assert "by the hypergradients" in search.followed_
    assert search.best_params_["pca__n_components"] == 2
    with pytest.raises(ValueError, match="n_components"):
        search.set_params(error_score="raise").fit(x, y)
    search.set_params(error_score=np.nan, param_distributions={**space, "pca__n_components": [99]})
    with (
        pytest.warns(FitFailedWarning),
        pytest.raises(ValueError, match=r"No trial .*n_components"),
    ):
        search.fit(x, y)


def test_a_setting_of_the_last_step_that_is_not_adapted_is_seen_before():
    x, y = small(load_wine, 60)
    space = {"C": ALPHA, "l1_ratio": FloatDistribution(0.0, 1.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = HypergradientSearchCV(
            LogisticRegression(solver="saga", max_iter=20), space, n_trials=2, random_state=0
        ).fit(x, y)
    assert "without hypergradients" in search.followed_


def test_a_fold_without_weight_is_left_to_scikit_learn():
    x, y = small(load_diabetes)
    weights = np.ones(len(y))
    weights[: len(y) // 3] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = HypergradientSearchCV(Ridge(), {"alpha": ALPHA}, cv=KFold(3), n_trials=2)
        search.fit(x, y, sample_weight=weights)
    assert "no weight" in search.followed_


def test_scorers_that_cannot_be_pickled_may_be_stored(tmp_path):
    x, y = small(load_diabetes)
    search = HypergradientSearchCV(
        Ridge(),
        n_trials=3,
        scoring=lambda e, a, b: -float(np.abs(e.predict(a) - b).mean()),
        storage=f"sqlite:///{tmp_path / 'study.db'}",
        random_state=0,
    ).fit(x, y)
    assert search.best_score_ == search.cv_results_["mean_test_score"].max()


def test_a_check_counts_the_weights_that_the_score_has():
    x, y = small(load_diabetes)
    weights = np.random.default_rng(0).integers(0, 4, len(y)).astype(float)
    search = HypergradientSearchCV(Ridge(), n_trials=2, random_state=0)
    report = search.check_hypergradient(x, y, at={"alpha": 0.1}, sample_weight=weights)
    loss, score = map(float, re.findall(r"-?\d+\.\d+", report.notes[0]))
    assert report
    assert 1 - loss == pytest.approx(score, rel=1e-6)


def test_a_check_at_a_bound_stays_inside():
    x, y = small(load_diabetes)
    search = HypergradientSearchCV(ElasticNet(), n_trials=2, random_state=0)
    report = search.check_hypergradient(x, y, at={"alpha": 0.1, "l1_ratio": 1.0})
    assert report
    assert "l1_ratio was compared 2 % of the range inside" in report.notes[-1]


def test_fits_have_one_thread_of_every_library():
    def now() -> list[int]:
        found = ThreadpoolController().info()
        return [int(i["num_threads"]) for i in found if i["user_api"] == "blas"]

    before = now()
    assert before
    with one_thread():
        assert now() == [1] * len(before)
    assert now() == before


def test_searches_that_overlap_leave_the_process_as_it_was():
    def now() -> tuple[int, int, int]:
        level = logging.getLogger("optuna.study").level
        return torch.get_num_threads(), optuna.logging.get_verbosity(), level

    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    torch.set_num_threads(2)
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        before = now()
        for context in (one_thread, lambda: quiet(0)):
            first, second = context(), context()
            first.__enter__()
            second.__enter__()
            first.__exit__(None, None, None)
            assert now() != before
            second.__exit__(None, None, None)
            assert now() == before
    finally:
        torch.set_num_threads(threads)
        optuna.logging.set_verbosity(verbosity)
