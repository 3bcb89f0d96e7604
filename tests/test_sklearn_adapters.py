"""Adapters of estimators: each fold's loss is that of scikit-learn's own fit, and its hypergradient that of refits."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from optuna_hypergrad.closed_form import ridge
from optuna_hypergrad.sklearn_adapters import REGISTRY, HypergradientSearchCV, adapter_of
from optuna_hypergrad.sklearn_adapters._adapter import Fold, tensor
from optuna_hypergrad.sklearn_adapters._machines import classifier_start
from optuna_hypergrad.sklearn_adapters._support_vectors import Machine, solved

CD: dict[str, Any] = {"tol": 1e-14, "max_iter": 100_000}
LIBSVM: dict[str, Any] = {"tol": 1e-10}


@dataclass(frozen=True)
class Case:
    """An estimator whose settings are where derivatives are taken.

    Attributes:
        value, slope: Relative errors allowed against scikit-learn's predictions, and against finite differences.
    """

    estimator: Any
    names: tuple[str, ...]
    value: float = 1e-8
    slope: float = 1e-6
    data: Any = load_diabetes
    label: str = field(default="", compare=False)

    def __str__(self) -> str:
        kernel = getattr(self.estimator, "kernel", "")
        return f"{type(self.estimator).__name__}-{self.label or kernel or 'plain'}"


CASES = [
    Case(KernelRidge(kernel="linear", alpha=3.0), ("alpha",)),
    Case(KernelRidge(kernel="rbf", alpha=0.2, gamma=0.05), ("alpha", "gamma")),
    Case(KernelRidge(kernel="rbf", alpha=0.2), ("alpha",), label="default-gamma"),
    Case(KernelRidge(kernel="laplacian", alpha=0.2, gamma=0.1), ("alpha", "gamma")),
    Case(KernelRidge(kernel="poly", alpha=5.0, gamma=0.1, coef0=2.0, degree=2), ("alpha", "gamma")),
    Case(KernelRidge(kernel="sigmoid", alpha=9.0, gamma=0.01, coef0=0.3), ("alpha", "gamma")),
    Case(Lasso(alpha=0.08, **CD), ("alpha",)),
    Case(Lasso(alpha=0.08, fit_intercept=False, positive=True, **CD), ("alpha",), label="positive"),
    Case(ElasticNet(alpha=0.1, l1_ratio=0.4, **CD), ("alpha", "l1_ratio")),
    Case(SVC(C=0.7, gamma=0.05, **LIBSVM), ("C", "gamma"), 1e-6, data=load_breast_cancer),
    Case(SVC(C=2.0, gamma=0.3, **LIBSVM), ("C", "gamma"), 1e-6, data=load_iris, label="classes"),
    Case(SVC(C=3.0, class_weight={0: 1.0, 1: 2.0, 2: 0.3}, **LIBSVM), ("C",), 1e-6, data=load_iris, label="weighted-classes"),
    Case(SVC(kernel="linear", C=0.05, **LIBSVM), ("C",), 1e-6, data=load_breast_cancer),
    Case(SVC(kernel="poly", C=0.5, coef0=1.0, degree=2, **LIBSVM), ("C", "gamma"), 1e-6, data=load_breast_cancer),
    Case(LinearSVC(C=0.03, **CD), ("C",), 1e-6, data=load_breast_cancer),
    Case(LinearSVC(C=0.3, intercept_scaling=2.0, **CD), ("C",), 1e-6, data=load_iris, label="classes"),
    Case(SVR(C=0.8, gamma=0.1, epsilon=0.2, **LIBSVM), ("C", "gamma", "epsilon"), 1e-6),
    Case(SVR(kernel="linear", C=0.01, epsilon=0.3, **LIBSVM), ("C", "epsilon"), 1e-6),
]  # fmt: skip


def small(loader: Any, n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    x, y = loader(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(y))[:n]
    x, y = StandardScaler().fit_transform(x[chosen]), y[chosen]
    return x, y if loader is not load_diabetes else (y - y.mean()) / y.std()


def fold_of(case: Case, weighted: bool) -> Fold:
    x, y = small(case.data)
    x = x[:, :12]
    cut = len(y) * 2 // 3
    weights = np.random.default_rng(1).uniform(0.2, 2.0, cut)
    weights[::7] = 0.0
    return Fold(
        tensor(x[:cut]),
        y[:cut],
        tensor(x[cut:]),
        y[cut:],
        tensor(weights) if weighted else None,
        tensor(np.full(len(y) - cut, 1 / (len(y) - cut))),
    )


def log_params(case: Case) -> dict[str, torch.Tensor]:
    values = {k: 0.1 if (v := getattr(case.estimator, k)) == "scale" else v for k in case.names}
    return {
        k: torch.tensor(np.log(v), dtype=torch.float64, requires_grad=True)
        for k, v in values.items()
    }


def at(case: Case, log: dict[str, torch.Tensor]) -> Any:
    return clone(case.estimator).set_params(**{k: float(v.detach().exp()) for k, v in log.items()})


def loss_of(
    case: Case, log: dict[str, torch.Tensor], fold: Fold, memory: dict[str, Any]
) -> torch.Tensor:
    adapter = adapter_of(case.estimator)
    assert adapter is not None
    params = {k: v.exp() for k, v in log.items()}
    predicted, target = adapter.predict(case.estimator, params, fold, memory)
    return adapter.followed_loss(None).function(predicted, target, fold.test_weights)


def by_scikit_learn(case: Case, log: dict[str, torch.Tensor], fold: Fold) -> np.ndarray:
    weights = {} if fold.weights is None else {"sample_weight": fold.weights.numpy()}
    model = at(case, log)
    if isinstance(model, SVC):
        model.set_params(decision_function_shape="ovo")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular matrix")  # sigmoid is not positive
        model.fit(fold.x_train.numpy(), fold.y_train, **weights)
    if hasattr(model, "decision_function"):
        return np.asarray(model.decision_function(fold.x_test.numpy()))
    return np.asarray(model.predict(fold.x_test.numpy()))


def test_every_adapter_is_tested():
    others = {"ridge", "logistic_regression"}  # in test_sklearn_search.py
    assert {type(adapter_of(c.estimator)) for c in CASES} | {REGISTRY[k] for k in others} == set(
        REGISTRY.values()
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_predictions_are_those_of_scikit_learn(case: Case, weighted: bool) -> None:
    fold, log = fold_of(case, weighted), log_params(case)
    adapter = adapter_of(case.estimator)
    assert adapter is not None
    predicted, _ = adapter.predict(case.estimator, {k: v.exp() for k, v in log.items()}, fold, {})
    expected = by_scikit_learn(case, log, fold)
    if isinstance(case.estimator, SVC) and expected.ndim == 2:
        expected = -expected  # of two classes, scikit-learn's decisions are for the first then
    found = predicted.detach().numpy().reshape(expected.shape)
    assert found == pytest.approx(expected, rel=case.value, abs=case.value)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hypergradients_are_those_of_refits(case: Case, weighted: bool) -> None:
    fold, log, memory = fold_of(case, weighted), log_params(case), {}
    slopes = torch.autograd.grad(loss_of(case, log, fold, memory), list(log.values()))
    for (name, value), slope in zip(log.items(), slopes, strict=True):
        step = 1e-5
        ahead, behind = (
            float(loss_of(case, {**log, name: value.detach() + h}, fold, {}).detach())
            for h in (step, -step)
        )
        assert float(slope) == pytest.approx((ahead - behind) / (2 * step), rel=case.slope)
        assert abs(float(slope)) > 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_data_and_weights_have_slopes_too(case: Case) -> None:
    """What stands before the last step may be tuned, and the weights of samples."""
    fold, log = fold_of(case, weighted=True), log_params(case)
    generator = torch.Generator().manual_seed(0)
    assert fold.weights is not None
    towards = [
        torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for v in (fold.x_train, fold.x_test, fold.weights)
    ]
    towards[2] = towards[2] * fold.weights  # zeros stay zeros

    def loss(t: Any) -> torch.Tensor:
        moved = replace(
            fold,
            x_train=fold.x_train + t * towards[0],
            x_test=fold.x_test + t * towards[1],
            weights=fold.weights + t * towards[2],
        )
        return loss_of(case, {k: v.detach() for k, v in log.items()}, moved, memory)

    memory: dict[str, Any] = {}
    loss(0.0)  # what is remembered must not be taken for what is moved
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(t), t)
    ahead, behind = (float(loss(h).detach()) for h in (1e-5, -1e-5))
    kinks = (
        getattr(case.estimator, "kernel", "") == "laplacian"
    )  # where samples share a feature's value
    assert float(slope) == pytest.approx((ahead - behind) / 2e-5, rel=5e-4 if kinks else 5e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_ridge_of_products_is_ridge(weighted: bool) -> None:
    fold = fold_of(CASES[0], weighted)
    for predicted in (
        ridge(
            fold.x_train, tensor(fold.y_train), torch.tensor(3.0), sample_weight=fold.weights
        ).predict(fold.x_test),
        torch.as_tensor(by_scikit_learn(Case(Ridge(alpha=3.0, fit_intercept=False), ()), {}, fold)),
    ):
        found, _ = adapter_of(KernelRidge()).predict(KernelRidge(alpha=3.0), {}, fold, {})  # type: ignore[union-attr]
        assert torch.allclose(found, predicted, rtol=1e-9)


def test_the_slope_of_the_lasso_is_its_closed_form_where_features_are_orthogonal() -> None:
    """``w_j = soft(c_j, alpha)`` for ``x^T x / n = 1``, so that ``dw_j / d alpha = -sign(c_j)`` on the support."""
    x = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 6)))[0] * np.sqrt(40)
    y = x @ np.array([3.0, -2.0, 1.0, 0.5, 0.1, 0.0])
    fold = Fold(
        tensor(x),
        y,
        torch.eye(6, dtype=torch.float64),
        np.zeros(6),
        None,
        tensor(np.full(6, 1 / 6)),
    )
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    estimator = Lasso(fit_intercept=False)
    found, _ = adapter_of(estimator).predict(estimator, {"alpha": alpha}, fold, {})  # type: ignore[union-attr]
    assert found.tolist() == pytest.approx([2.7, -1.7, 0.7, 0.2, 0.0, 0.0], abs=1e-12)
    slopes = [float(torch.autograd.grad(f, alpha, retain_graph=True)[0]) for f in found]
    assert slopes == pytest.approx([-1.0, 1.0, -1.0, -1.0, 0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("copies", [False, True])
def test_a_sparse_model_is_exact_on_long_paths(copies: bool) -> None:
    """More features than samples, warm starts, penalties up and down; with columns that repeat others, too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 80))
    if copies:
        x[:, 10:20] = x[:, :10]
    y = x[:, :5].sum(1) + 0.5 * rng.normal(size=40)
    fold = Fold(tensor(x), y, tensor(x[:9]), y[:9], None, tensor(np.full(9, 1 / 9)))
    memory: dict[str, Any] = {}
    for alpha in (1.0, 0.01, 0.1, 1e-3, 0.3):
        model = Lasso(alpha=alpha)
        adapter_of(model).predict(model, {}, fold, memory)  # type: ignore[union-attr]
        w = memory["coef 0"]
        centered = x - x.mean(0)
        correlations = centered.T @ (y - y.mean() - centered @ w) / 40
        assert np.abs(correlations).max() <= alpha * (1 + 1e-8)
        assert correlations[w != 0] == pytest.approx(alpha * np.sign(w[w != 0]), rel=1e-7)


def test_a_flat_start_does_not_end_a_search() -> None:
    """No feature is left above some ``alpha``, and the loss has no slope there."""
    x, y = small(load_diabetes)
    space = {"alpha": FloatDistribution(1e-3, 1e4, log=True)}
    search = HypergradientSearchCV(Lasso(**CD), space, n_trials=25, random_state=0).fit(x, y)
    assert "by the hypergradients of alpha" in search.followed_
    assert {t.state.name for t in search.study_.trials} == {"COMPLETE"}
    best = max(
        search.set_params(param_distributions={"alpha": [a]}, n_trials=1).fit(x, y).best_score_
        for a in np.logspace(-3, 0, 13)
    )
    assert search.fit(x, y).best_score_ <= best


SEARCHES = [
    KernelRidge(), Lasso(), ElasticNet(), SVC(), LinearSVC(), SVR(),
]  # fmt: skip


@pytest.mark.parametrize("estimator", SEARCHES, ids=lambda e: type(e).__name__)
def test_scikit_learns_checks(estimator: Any) -> None:
    search = HypergradientSearchCV(estimator, n_trials=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(search, on_fail=None, on_skip=None)
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
    assert sum(r["status"] == "passed" for r in results) > 40


@pytest.mark.parametrize(
    ("estimator", "scoring", "followed"),
    [
        (make_pipeline(StandardScaler(), KernelRidge(kernel="rbf")), None, "1 - R^2, by the hypergradients of kernelridge__alpha, kernelridge__gamma"),
        (ElasticNet(), "neg_mean_squared_error", "mean squared error, by the hypergradients of alpha, l1_ratio"),
        (SVC(), "accuracy", "smoothed hinge, which stands for the score, by the hypergradients of C, gamma"),
        (make_pipeline(StandardScaler(), SVR()), "neg_mean_absolute_error", "Huber .* of svr__C, svr__gamma, svr__epsilon"),
    ],
    ids=lambda v: None if isinstance(v, str) else type(v).__name__,
)  # fmt: skip
def test_searches_follow_them(estimator: Any, scoring: str | None, followed: str) -> None:
    x, y = small(load_iris if isinstance(estimator, SVC) else load_diabetes)
    search = HypergradientSearchCV(estimator, scoring=scoring, n_trials=8, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's coordinate descent stops early
        search.fit(x, y)
    assert re.match(followed.replace("^", r"\^"), search.followed_)
    assert len(search.study_.get_trials(states=[optuna.trial.TrialState.COMPLETE])) == 8
    assert search.best_score_ == search.cv_results_["mean_test_score"].max()


@pytest.mark.parametrize(
    ("estimator", "reason"),
    [
        (KernelRidge(kernel="cosine"), "kernel='cosine'"),
        (KernelRidge(kernel="poly", degree=1.5), "degree 1.5"),
        (KernelRidge(kernel="poly", coef0=-1.0), "coef0=-1.0"),
        (KernelRidge(alpha=0.0), "alpha=0.0"),
        (ElasticNet(l1_ratio=0.0), "use Ridge"),
        (Lasso(alpha=0.0), "no penalty"),
        (SVC(kernel="sigmoid"), "kernel='sigmoid'"),
        (SVC(kernel="poly", coef0=-1.0), "coef0=-1.0"),
        (SVR(epsilon=0.0), "epsilon=0.0"),
        (LinearSVC(loss="hinge"), "loss='hinge'"),
        (LinearSVC(class_weight="balanced"), "class_weight='balanced'"),
    ],
    ids=lambda v: None if isinstance(v, str) else repr(v),
)
def test_what_is_not_adapted_is_declined_in_words(estimator: Any, reason: str) -> None:
    adapter = adapter_of(estimator)
    assert adapter is not None
    y = np.arange(30) % 3
    splits = [(np.arange(20), np.arange(20, 30))]
    assert (
        adapter.reason_to_decline(clone(estimator).set_params(**_plain(estimator)), y, splits)
        is None
    )
    said = adapter.reason_to_decline(estimator, y, splits)
    assert said is not None
    assert reason in said


def _plain(estimator: Any) -> dict[str, Any]:
    return type(estimator)().get_params()


@pytest.mark.parametrize("estimator", [SVC(), LinearSVC()])
def test_classes_that_a_fold_does_not_have_are_declined(estimator: Any) -> None:
    adapter = adapter_of(estimator)
    assert adapter is not None
    y = np.repeat([0, 1, 2], 10)
    test = np.arange(20, 30)
    for num_train, reason in ((20, "not trained on every class"), (10, "one class only")):
        said = adapter.reason_to_decline(estimator, y, [(np.arange(num_train), test)])
        assert said is not None
        assert reason in said


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("estimator", "vector"),
    [
        (KernelRidge(kernel="rbf", gamma=0.1, alpha=0.5), False),
        (KernelRidge(kernel="rbf", gamma=0.1, alpha=np.array([0.1, 2.0])), True),
        (KernelRidge(kernel="sigmoid", gamma=0.01, alpha=np.array([7.0, 9.0])), True),
        (Lasso(alpha=0.05, **CD), False),
        (ElasticNet(alpha=0.1, l1_ratio=0.3, **CD), False),
    ],
    ids=lambda v: None if isinstance(v, bool) else type(v).__name__,
)
def test_several_targets(estimator: Any, vector: bool, weighted: bool) -> None:
    case = Case(estimator, ("alpha",))
    fold = fold_of(case, weighted)
    fold = replace(
        fold,
        y_train=np.stack([fold.y_train, fold.y_train**2], 1),
        y_test=np.stack([fold.y_test, fold.y_test**2], 1),
    )
    alpha = torch.as_tensor(estimator.alpha, dtype=torch.float64).requires_grad_(True)
    adapter = adapter_of(estimator)
    assert adapter is not None
    predicted, target = adapter.predict(estimator, {"alpha": alpha}, fold, {})
    assert predicted.shape == target.shape == fold.y_test.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular matrix")
        expected = by_scikit_learn(case, {} if vector else {"alpha": alpha.log()}, fold)
    assert predicted.detach().numpy() == pytest.approx(expected, rel=1e-7, abs=1e-8)
    (slope,) = torch.autograd.grad(predicted.sum(), alpha)
    assert bool((slope.abs() > 1e-6).all())


@pytest.mark.parametrize("gamma", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("most", [1e-3, 1.0, 1e4])
def test_machines_are_optimal_where_samples_repeat_and_kernels_are_nearly_singular(
    gamma: float, most: float
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    x[30:40] = x[:10]
    y = np.where(x[:, 0] + 0.5 * rng.normal(size=60) > 0, 1.0, -1.0)
    kernel = torch.as_tensor(np.exp(-gamma * ((x[:, None] - x[None]) ** 2).sum(2)))
    sign = torch.as_tensor(y)
    bound = most * sign
    machine = Machine(kernel, np.arange(60), sign, bound.clamp(max=0), bound.clamp(min=0))
    beta, b, _ = solved(machine, classifier_start(machine))
    assert abs(float(beta.sum())) < 1e-8 * most
    assert bool((beta >= machine.low - 1e-9 * most).all())
    assert bool((beta <= machine.high + 1e-9 * most).all())
    left = sign - kernel @ beta - b
    slack = 1e-6 * (1 + float((kernel.abs() @ beta.abs()).max()))
    at_low, at_high = beta <= machine.low + 1e-9 * most, beta >= machine.high - 1e-9 * most
    assert bool((left[~at_low] >= -slack).all())
    assert bool((left[~at_high] <= slack).all())


def test_more_features_than_samples_in_a_linear_machine() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 90))
    y = np.where(x[:, 0] > 0, "a", "b")
    fold = Fold(tensor(x[:30]), y[:30], tensor(x[30:]), y[30:], None, tensor(np.full(10, 0.1)))
    case = Case(LinearSVC(C=0.3, tol=1e-9, max_iter=100_000), ("C",))
    log = log_params(case)
    slope = torch.autograd.grad(loss_of(case, log, fold, {}), log["C"])[0]
    ahead, behind = (
        float(loss_of(case, {"C": log["C"].detach() + h}, fold, {}).detach()) for h in (1e-5, -1e-5)
    )
    assert float(slope) == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)
    predicted, _ = adapter_of(case.estimator).predict(case.estimator, {}, fold, {})  # type: ignore[union-attr]
    assert predicted[:, 0].numpy() == pytest.approx(by_scikit_learn(case, log, fold), abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hypergradients_are_those_of_scikit_learns_own_fits(case: Case) -> None:
    """To what its tolerances leave of a central difference."""
    fold, log = fold_of(case, weighted=True), log_params(case)
    adapter = adapter_of(case.estimator)
    assert adapter is not None
    slopes = torch.autograd.grad(loss_of(case, log, fold, {}), list(log.values()))
    target = adapter.predict(case.estimator, {k: v.exp() for k, v in log.items()}, fold, {})[1]
    function = adapter.followed_loss(None).function

    def loss(logs: dict[str, torch.Tensor]) -> float:
        found = torch.as_tensor(by_scikit_learn(case, logs, fold))
        if isinstance(case.estimator, (SVC, LinearSVC)):
            found = found.reshape(len(target), -1)
            sign = -1 if isinstance(case.estimator, SVC) and found.shape[1] > 1 else 1
            found = sign * found
        return float(function(found, target, fold.test_weights))

    for (name, value), slope in zip(log.items(), slopes, strict=True):
        h = 1e-3
        ahead, behind = (loss({**log, name: value.detach() + s}) for s in (h, -h))
        assert float(slope) == pytest.approx((ahead - behind) / (2 * h), rel=2e-3)
