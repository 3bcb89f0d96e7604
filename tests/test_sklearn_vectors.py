"""Vectors of hyperparameters in a search: weights of features, samples and classes, penalties per target."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import optuna
import pytest
import scipy.sparse
import torch
from optuna.distributions import FloatDistribution, IntDistribution
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.svm import SVR
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

from optuna_hypergrad import FeatureWeights, HypergradientSearchCV, TensorDistribution, load_tensors
from optuna_hypergrad.sklearn_adapters import (
    AbstractAdapter,
    Fold,
    LogisticRegressionAdapter,
    RidgeAdapter,
    _nested,
)

WEIGHTS = "featureweights__weights"
PER_FEATURE = TensorDistribution("per_feature", 1e-2, 1e2)
EXACT = {"tol": 1e-10, "max_iter": 10_000}


@parametrize_with_checks([FeatureWeights()])
def test_feature_weights_are_a_transformer_of_scikit_learn(estimator, check):
    check(estimator)


def test_feature_weights_multiply_columns():
    x = np.arange(6.0).reshape(2, 3)
    wanted = x * [1.0, 0.0, 2.0]
    fitted = FeatureWeights([1, 0, 2]).fit(x)
    assert fitted.transform(x).tolist() == wanted.tolist()
    assert fitted.get_feature_names_out(["a", "b", "c"]).tolist() == ["a", "b", "c"]
    for made in (scipy.sparse.csr_matrix, scipy.sparse.csc_array):
        found = fitted.transform(made(x))
        assert isinstance(found, made)
        assert found.toarray().tolist() == wanted.tolist()
    assert x[0, 2] == 2.0  # not in place
    assert FeatureWeights().fit_transform(x.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0, 2.0], "has shape"), ([1, -1, 1], "not be negative"), ([1, np.nan, 1], "NaN"), ([[1, 1, 1]], "has shape")],
)  # fmt: skip
def test_feature_weights_refuse_what_does_not_fit(weights, message):
    with pytest.raises(ValueError, match=message):
        FeatureWeights(weights).fit(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "per_thing"}, "none of"),
        ({"shape": (2, 3)}, "length of a vector"),
        ({"shape": (0,)}, "length of a vector"),
        ({"low": 0.0}, "must be positive"),
        ({"low": 2.0}, "low below high"),
        ({"high": np.inf}, "finite"),
        ({"low": "a"}, "not a number"),
        ({"shape": "per_group"}, "groups="),
        ({"groups": [0, 1]}, "groups="),
        ({"shape": "per_group", "groups": [[0], [1]]}, "not a vector"),
    ],
)
def test_a_tensor_distribution_refuses_what_it_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        TensorDistribution(**({"shape": "per_feature", "low": 0.1, "high": 1.0} | arguments))


def folded(adapter: AbstractAdapter, targets: int, n: int, p: int) -> tuple[Any, dict[str, Tensor]]:
    """A loss of everything that an adapter is differentiable in, and a point."""
    generator = torch.Generator().manual_seed(n + p)
    x = torch.randn(n + 20, p, generator=generator, dtype=torch.float64)
    y = x[:, :2].sum(1, keepdim=True) + torch.randn(n + 20, targets, generator=generator)
    argument, weights = "alpha", torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    if isinstance(adapter, LogisticRegressionAdapter):
        y, argument = (y[:, :1] > 0) + (y[:, :1] > 1.0) * (targets - 1), "C"
    known = y.numpy()[:, 0] if argument == "C" or targets == 1 else y.numpy()
    loss = adapter.followed_loss("neg_log_loss" if argument == "C" else "neg_mean_squared_error")
    equal = torch.full((20,), 0.05, dtype=torch.float64)

    def of(point: dict[str, Tensor]) -> Tensor:
        fold = Fold(
            point["x_train"], known[:n], point["x_test"], known[n:], point["weights"], equal
        )
        predicted = adapter.predict(adapter.type(), {argument: point["own"]}, fold, {})
        return loss.function(*predicted, equal)

    own = torch.tensor(0.7, dtype=torch.float64)
    if argument == "alpha" and targets > 1:
        own = torch.linspace(0.5, 2.0, targets, dtype=torch.float64)
    return of, {"x_train": x[:n], "x_test": x[n:], "weights": weights, "own": own}


@pytest.mark.parametrize(
    ("adapter", "targets", "n", "p"),
    [
        (RidgeAdapter(), 1, 40, 5),
        (RidgeAdapter(), 3, 40, 5),
        (RidgeAdapter(), 1, 12, 25),
        (LogisticRegressionAdapter(), 1, 60, 4),
        (LogisticRegressionAdapter(), 2, 60, 4),
    ],
)
def test_adapters_are_differentiable_in_data_and_weights(adapter, targets, n, p):
    loss, at = folded(adapter, targets, n, p)
    leaves = {k: v.clone().requires_grad_() for k, v in at.items()}
    gradients = torch.autograd.grad(loss(leaves), list(leaves.values()))
    generator = torch.Generator().manual_seed(0)
    for (name, value), gradient in zip(at.items(), gradients, strict=True):
        way = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        way = way + way.norm() * gradient / gradient.norm()
        with torch.no_grad():
            four = [loss({**at, name: value + s * 1e-3 * way}) for s in (-2, -1, 1, 2)]
        difference = float((four[0] - 8 * four[1] + 8 * four[2] - four[3]) / 12e-3)
        assert float((gradient * way).sum()) == pytest.approx(difference, rel=1e-6), name


def diabetes(n: int = 150) -> tuple[np.ndarray, np.ndarray]:
    x, y = load_diabetes(return_X_y=True)
    return x[:n], y[:n]


def sparse(n: int = 80, p: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, p))
    return x, x[:, :3] @ [3.0, -2.0, 2.0] + generator.normal(size=n)


SCALED = make_pipeline(StandardScaler(), FeatureWeights(), Ridge())


def test_weights_of_features_are_penalties_of_a_plain_pipeline():
    x, y = sparse()
    search = HypergradientSearchCV(
        SCALED, {WEIGHTS: PER_FEATURE}, n_trials=40, guard=None, random_state=0
    ).fit(x, y)
    weights = search.best_params_[WEIGHTS]
    assert isinstance(weights, np.ndarray)
    assert weights[:3].min() > 20 * np.median(weights[3:])
    assert type(search.best_estimator_) is Pipeline
    assert search.best_estimator_[1].weights_.tolist() == weights.tolist()
    assert 1 - search.cv_results_["followed_loss"] == pytest.approx(
        search.cv_results_["mean_test_score"], rel=1e-9
    )
    scaled = StandardScaler().fit_transform(x)
    z = np.hstack([scaled, np.ones((len(y), 1))])
    penalty = np.append(1 / weights**2, 0.0)
    solved = np.linalg.solve(z.T @ z + np.diag(penalty), z.T @ y)
    assert search.predict(x) == pytest.approx(z @ solved, rel=1e-8)
    trial = search.study_.best_trial
    assert trial.params.keys() == {"descent"}
    assert load_tensors(trial, study=search.study_)[WEIGHTS].shape == (30,)
    assert search.cv_results_[f"param_{WEIGHTS}"][search.best_index_] is weights
    assert search.best_score_ > cross_val_score(SCALED, x, y).mean() + 0.02


def test_members_of_a_group_have_one_weight():
    x, y = sparse()
    groups = ["signal"] * 3 + ["noise"] * 27
    space = {WEIGHTS: TensorDistribution("per_group", 1e-2, 1e2, groups=groups)}
    search = HypergradientSearchCV(SCALED, space, n_trials=30, random_state=0).fit(x, y)
    weights = search.best_params_[WEIGHTS]
    assert len(set(weights[:3])) == len(set(weights[3:])) == 1
    assert weights[0] > 4 * weights[-1]
    assert search.nested_.tau is not None
    assert load_tensors(search.study_)[WEIGHTS].shape == (2,)


@pytest.mark.parametrize(
    "model", [Ridge(), KernelRidge(kernel="rbf", gamma=0.05), Lasso(alpha=0.05)], ids=lambda m: type(m).__name__
)  # fmt: skip
def test_the_loss_of_weights_of_features_is_the_score_of_a_plain_pipeline(model):
    x, y = sparse(60, 6)
    search = HypergradientSearchCV(
        Pipeline([("weights", FeatureWeights()), ("model", model)]),
        {"weights__weights": TensorDistribution("per_feature", 1e-2, 1e1)},
        scoring="neg_mean_squared_error",
        n_trials=4,
        n_rescored=1,
        guard=None,
        cv=KFold(4),
        random_state=0,
    ).fit(x, y)
    assert len(set(search.best_params_["weights__weights"])) > 1
    assert search.study_.best_value == pytest.approx(-search.best_score_, rel=1e-4)


def test_weights_of_samples_are_in_fits_and_the_refit_but_not_in_scores():
    x, y = sparse(60, 4)
    y[::6] += 30.0  # outliers
    own = np.where(np.arange(60) % 2, 1.0, 2.0)
    space = {
        "sample_weight": TensorDistribution("per_sample", 1e-3, 1e1),
        "ridge__alpha": FloatDistribution(1e-3, 1e3, log=True),
    }
    search = HypergradientSearchCV(
        make_pipeline(Ridge()), space, n_trials=30, scoring="neg_mean_absolute_error",
        guard=None, cv=KFold(4), random_state=0
    )  # fmt: skip
    search.fit(x, y, ridge__sample_weight=own)
    learned = search.best_params_["sample_weight"]
    assert np.median(learned[::6]) < 0.3 * np.median(np.delete(learned, np.arange(0, 60, 6)))
    alpha = search.best_params_["ridge__alpha"]
    again = Ridge(alpha=alpha).fit(x, y, sample_weight=own * learned)
    assert search.best_estimator_[-1].coef_ == pytest.approx(again.coef_, rel=1e-9)
    scores = [
        -np.abs(Ridge(alpha=alpha).fit(x[a], y[a], sample_weight=(own * learned)[a]).predict(x[b]) - y[b]).mean()
        for a, b in KFold(4).split(x)
    ]  # fmt: skip
    assert search.best_score_ == pytest.approx(np.mean(scores), rel=1e-9)
    assert len(search.cv_results_["param_sample_weight"]) == len(search.cv_results_["params"])


def test_weights_of_classes_are_a_dict():
    x, y = load_wine(return_X_y=True)
    model = make_pipeline(StandardScaler(), LogisticRegression(**EXACT))
    space = {"logisticregression__class_weight": TensorDistribution("per_class", 0.1, 10.0)}
    search = HypergradientSearchCV(
        model, space, n_trials=8, scoring="neg_log_loss", guard=None, random_state=0
    ).fit(x, y)
    found = search.best_params_["logisticregression__class_weight"]
    assert found.keys() == {0, 1, 2}
    assert len(set(found.values())) > 1
    assert search.best_estimator_[-1].class_weight == found
    assert search.best_score_ == pytest.approx(
        -search.cv_results_["followed_loss"][search.best_index_], rel=1e-5
    )


def test_a_penalty_per_target():
    x, _ = sparse(60, 20)
    noise = np.random.default_rng(1).normal(size=(60, 2))
    y = x[:, :2] * 4.0 + noise * [0.1, 20.0]
    space = {"alpha": TensorDistribution("per_target", 1e-4, 1e4)}
    search = HypergradientSearchCV(Ridge(), space, n_trials=25, guard=None, random_state=0).fit(
        x, y
    )
    alpha = search.best_params_["alpha"]
    assert alpha[1] > 20 * alpha[0]
    assert search.best_estimator_.alpha is not None
    best = np.logspace(-4, 4, 33)
    grid = max(
        cross_val_score(Ridge(alpha=[a, b]), x, y).mean() for a in best for b in [*best[16:]]
    )
    assert search.best_score_ > grid - 1e-3


def test_a_kernel_penalty_per_target():
    x, _ = sparse(60, 4)
    noise = np.random.default_rng(1).normal(size=(60, 2))
    y = np.sin(x[:, :2]) * 4.0 + noise * [0.1, 5.0]
    space = {"alpha": TensorDistribution("per_target", 1e-4, 1e4)}
    model = KernelRidge(kernel="rbf", gamma=0.1)
    search = HypergradientSearchCV(model, space, n_trials=20, guard=None, random_state=0)
    search.fit(x, y)
    alpha = search.best_params_["alpha"]
    assert alpha[1] > 20 * alpha[0]
    best = max(
        cross_val_score(clone(model).set_params(alpha=[a, b]), x, y).mean()
        for a in np.logspace(-4, 1, 11)
        for b in np.logspace(-2, 4, 13)
    )
    assert search.best_score_ > best - 1e-3
    assert search.check_hypergradient(x, y, at={"alpha": [0.1, 2.0]})


def test_vectors_and_discrete_choices_share_a_study():
    x, y = diabetes(120)
    model = make_pipeline(
        StandardScaler(), PolynomialFeatures(include_bias=False), FeatureWeights(), Ridge(alpha=10)
    )
    space = {WEIGHTS: PER_FEATURE, "polynomialfeatures__degree": IntDistribution(1, 2)}
    for guard in (None, "nested"):
        search = HypergradientSearchCV(
            model, space, n_trials=14, guard=guard, cv=3, random_state=0
        ).fit(x[:, :4], y)
        sizes = {len(p[WEIGHTS]) for p in search.cv_results_["params"]}
        assert sizes <= {4, 14}
        degree = search.best_params_["polynomialfeatures__degree"]
        assert len(search.best_params_[WEIGHTS]) == {1: 4, 2: 14}[degree]
    assert search.nested_ is not None


@pytest.mark.parametrize("cut_at", [2, 10])
def test_a_search_with_vectors_that_was_cut_goes_on_to_the_bit(tmp_path, cut_at, monkeypatch):
    x, y = sparse(120, 40)
    monkeypatch.setattr(_nested, "_MAX_FREE", 8)
    settings: dict[str, Any] = {"n_trials": 16, "cv": 3, "random_state": 0, "resume": True}

    def search(name: str, **more: Any) -> HypergradientSearchCV:
        storage = f"sqlite:///{tmp_path / name}.db"
        return HypergradientSearchCV(
            SCALED, {WEIGHTS: PER_FEATURE}, storage=storage, study_name="a", **settings, **more
        ).fit(x, y)

    def cut(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number == cut_at:
            study.stop()

    whole, first = search("whole"), search("cut", callbacks=[cut])
    assert len(first.study_.trials) == cut_at + 1 < len(whole.study_.trials)
    assert (first.nested_ is None) == (cut_at == 2)
    second = search("cut")
    assert [t.values for t in second.study_.trials] == [t.values for t in whole.study_.trials]
    assert second.best_params_[WEIGHTS].tolist() == whole.best_params_[WEIGHTS].tolist()
    assert second.nested_ == whole.nested_
    assert whole.nested_.tau is not None
    third = search("cut")  # nothing is left to do: the best point comes from the store
    assert len(third.study_.trials) == len(whole.study_.trials)
    assert third.best_params_[WEIGHTS].tolist() == whole.best_params_[WEIGHTS].tolist()
    assert third.predict(x).tolist() == whole.predict(x).tolist()


def test_a_search_with_vectors_is_cloned_and_the_same_again(monkeypatch):
    x, y = sparse(60, 8)
    monkeypatch.setattr(_nested, "_MAX_FREE", 8)
    search = HypergradientSearchCV(
        SCALED, {WEIGHTS: PER_FEATURE}, n_trials=12, cv=3, random_state=1
    )
    found = [clone(search).fit(x, y).best_params_[WEIGHTS].tolist() for _ in range(2)]
    assert found[0] == found[1]


LOGISTIC = make_pipeline(FeatureWeights(), LogisticRegression())
BAD = [
    (SCALED, {"standardscaler__with_mean": PER_FEATURE}, {}, "takes one as ridge__sample_weight, ridge__alpha, or"),
    (SCALED, {WEIGHTS: TensorDistribution("per_class", 0.1, 1.0)}, {}, "one number per feature"),
    (SCALED, {WEIGHTS: TensorDistribution((9,), 0.1, 1.0)}, {}, "that of 9 features, and there are 10"),
    (SCALED, {WEIGHTS: TensorDistribution("per_group", 0.1, 1.0, groups=[0, 1])}, {}, "group of 2 features"),
    (SCALED, {"sample_weight": TensorDistribution((3,), 0.1, 1.0)}, {}, "that of 3 samples"),
    (SCALED, {"ridge__class_weight": PER_FEATURE}, {}, "Invalid parameter 'ridge__class_weight'"),
    (SCALED, {"sample_wieght": PER_FEATURE}, {}, "did you mean 'sample_weight'"),
    (SCALED, {WEIGHTS: PER_FEATURE}, {"sampler": optuna.samplers.RandomSampler()}, "only be searched by hypergradients"),
    (make_pipeline(FeatureWeights(), LinearRegression()), {WEIGHTS: PER_FEATURE}, {}, "no adapter for LinearRegression"),
    (make_pipeline(FeatureWeights(), Ridge(positive=True)), {WEIGHTS: PER_FEATURE}, {}, "no closed form"),
    (make_pipeline(FeatureWeights(), Ridge(alpha=0)), {WEIGHTS: PER_FEATURE}, {}, "has no penalty"),
    (SCALED, {"ridge__sample_weight": PER_FEATURE, WEIGHTS: PER_FEATURE}, {}, "one number per sample"),
    (SCALED, {WEIGHTS: PER_FEATURE}, {"cv": [(np.arange(50), np.arange(50, 100))]}, "Use more folds, or guard=None"),
    (SCALED, {WEIGHTS: PER_FEATURE}, {"guard": "none"}, "guard"),
]  # fmt: skip


@pytest.mark.parametrize(("estimator", "space", "more", "message"), BAD)
def test_vectors_that_do_not_fit_are_refused_before_any_fit(
    estimator, space, more, message, monkeypatch
):
    for kind in (Ridge, LogisticRegression, LinearRegression):

        @functools.wraps(kind.fit)
        def fit(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("it was fitted")

        monkeypatch.setattr(kind, "fit", fit)
    with pytest.raises(ValueError, match=message):
        HypergradientSearchCV(estimator, space, n_trials=2, **more).fit(*diabetes())


@pytest.mark.parametrize(
    ("model", "space"),
    [
        (
            LogisticRegression(**EXACT),
            {"class_weight": TensorDistribution("per_class", 0.1, 10.0)},
        ),
        (
            make_pipeline(StandardScaler(), LogisticRegression(**EXACT)),
            {
                "standardscaler": [StandardScaler(), StandardScaler(with_mean=False)],
                "logisticregression__C": FloatDistribution(0.1, 10.0, log=True),
                "sample_weight": TensorDistribution("per_group", 0.1, 1, groups=["b", "a"] * 89),
            },
        ),
    ],
    ids=["classes", "choices and groups"],
)
def test_a_check_takes_the_best_parameters_as_they_are(model, space):
    x, y = load_wine(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    search = HypergradientSearchCV(model, space, n_trials=4, cv=3, guard=None, random_state=0)
    search.fit(x, y)
    assert search.check_hypergradient(x, y, at=search.best_params_)
    if "standardscaler" in space:
        with pytest.raises(ValueError, match="the choices are"):
            search.check_hypergradient(x, y, at={"standardscaler": "none"})


def test_a_search_can_be_asked_whether_its_gradients_are_right(monkeypatch):
    x, y = load_wine(return_X_y=True)
    model = make_pipeline(StandardScaler(), FeatureWeights(), LogisticRegression(**EXACT))
    space = {
        WEIGHTS: TensorDistribution("per_feature", 1e-2, 1e1),
        "logisticregression__C": FloatDistribution(1e-3, 1e1, log=True),
        "logisticregression__class_weight": TensorDistribution("per_class", 0.1, 10.0),
        "sample_weight": TensorDistribution("per_sample", 0.1, 10.0),
    }
    search = HypergradientSearchCV(model, space, scoring="neg_log_loss", cv=3)
    report = search.check_hypergradient(x, y, rtol=1e-6)
    assert report
    assert report.conclusive
    assert [r.hyperparameter for r in report.rows] == [
        "logisticregression__C",
        WEIGHTS,
        *list(space)[2:],
    ]
    numbers = [float(w.strip(".;")) for w in report.notes[0].split() if w[-2].isdigit()]
    assert numbers[0] == pytest.approx(-numbers[1], rel=1e-5)
    assert not hasattr(search, "study_")
    at = {WEIGHTS: np.full(13, 0.5), "logisticregression__C": 2.0}
    assert search.check_hypergradient(x, y, at=at, rtol=1e-6)
    with pytest.raises(ValueError, match="does not search"):
        search.check_hypergradient(x, y, at={"C": 1.0})
    with pytest.raises(ValueError, match="not of shape"):
        search.check_hypergradient(x, y, at={WEIGHTS: np.ones(3)})
    real = LogisticRegressionAdapter.predict

    def blind(self, estimator, params, fold, memory):  # to what weights do to the fit
        return real(self, estimator, params, torch_detached(fold), memory)

    monkeypatch.setattr(LogisticRegressionAdapter, "predict", blind)
    report = search.check_hypergradient(x, y)
    assert not report
    assert {r.hyperparameter for r in report.rows if r.verdict == "wrong"} >= {
        WEIGHTS,
        "sample_weight",
    }


def test_a_check_takes_rounding_for_no_slope():
    """Of a support vector machine that interpolates at as many points as it has coefficients, however much each may count."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6))
    y = x @ rng.normal(size=6) + rng.normal(size=40)
    space = {
        "C": FloatDistribution(1e-2, 1e2, log=True),
        "epsilon": FloatDistribution(1e-3, 1.0, log=True),
        "sample_weight": TensorDistribution("per_sample", 0.01, 10.0),
    }
    search = HypergradientSearchCV(
        SVR(kernel="linear"), space, scoring="neg_mean_squared_error", cv=3
    )
    report = search.check_hypergradient(x, y)
    assert max(abs(r.estimate) for r in report.rows if r.hyperparameter != "epsilon") < 1e-9
    assert report
    assert report.conclusive


def test_a_check_goes_on_where_the_score_is_not_defined():
    x, _ = load_wine(return_X_y=True)
    x, y = StandardScaler().fit_transform(x), np.arange(len(x)) % 3
    split = np.arange(100), np.arange(100, len(x))[y[100:] > 0]  # tested without one of its classes
    search = HypergradientSearchCV(LogisticRegression(**EXACT), scoring="neg_log_loss", cv=[split])
    report = search.check_hypergradient(x, y)
    assert report
    assert "score of these folds is not defined: y_true and y_prob" in report.notes[0]


def torch_detached(fold: Fold) -> Fold:
    assert fold.weights is not None
    return Fold(
        fold.x_train.detach(), fold.y_train, fold.x_test, fold.y_test, fold.weights.detach() + 0 * fold.weights,
        fold.test_weights,
    )  # fmt: skip


def test_nested_cross_validation_with_a_persistent_study_leaks_nothing(tmp_path):
    """Scores of outer folds are those of studies that cannot have known of each other."""
    x, y = sparse(60, 6)
    settings: dict[str, Any] = {"n_trials": 5, "cv": 3, "guard": None, "random_state": 0}
    space = {WEIGHTS: PER_FEATURE}
    alone = HypergradientSearchCV(SCALED, space, **settings)
    expected = cross_val_score(alone, x, y, cv=3)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    kept = HypergradientSearchCV(
        SCALED, space, **settings, storage=storage, study_name="a", resume=True
    )
    kept.fit(x, y)  # has seen everything
    assert cross_val_score(kept, x, y, cv=3) == pytest.approx(expected, rel=1e-12)
    names = optuna.get_all_study_names(storage)
    assert sorted(names) == ["a", "a-2", "a-3", "a-4"]
    digests = {
        optuna.load_study(study_name=n, storage=storage).user_attrs["hypergrad:search"]
        for n in names
    }
    assert len(digests) == 4


@pytest.mark.parametrize("loader", [load_breast_cancer, load_wine])
def test_scalars_begin_at_the_best_of_a_few_points(loader):
    x, y = loader(return_X_y=True)
    search = HypergradientSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression()), n_trials=1, scoring="neg_log_loss"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search.fit(x, y)
    middle = cross_val_score(
        clone(search.estimator), x, y, scoring="neg_log_loss"
    ).mean()  # C=1 is the middle
    assert search.best_score_ >= middle - 1e-4


def test_a_warm_start_that_is_far_off_is_dropped():
    x, y = load_wine(return_X_y=True)
    x = torch.as_tensor(StandardScaler().fit_transform(x))
    equal = torch.full((89,), 1 / 89, dtype=torch.float64)
    point = {"C": torch.tensor(1.0, dtype=torch.float64)}

    def predicted(scale: float, memory: dict[str, Any]) -> Tensor:
        fold = Fold(x[::2] * scale, y[::2], x[1::2] * scale, y[1::2], None, equal)
        adapter = LogisticRegressionAdapter()
        return adapter.predict(LogisticRegression(), point, fold, memory)[0]

    memory: dict[str, Any] = {}
    for scale in (
        1e-2,
        26.0,
        100.0,
        1e3,
    ):  # the last solution, times so much, rounds probabilities to 0 and 1
        assert torch.allclose(predicted(scale, memory), predicted(scale, {}), rtol=1e-9, atol=1e-9)
