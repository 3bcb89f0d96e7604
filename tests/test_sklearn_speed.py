"""What makes searches fast finds the same: products with a Hessian, one decomposition for all penalties, races of starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from optuna.distributions import FloatDistribution
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from torch import Tensor

from optuna_hypergrad._errors import SolverError
from optuna_hypergrad.closed_form import ridge
from optuna_hypergrad.search_space import Domain
from optuna_hypergrad.sklearn_adapters import HypergradientSearchCV, _newton, _newton_cg, adapter_of
from optuna_hypergrad.sklearn_adapters._adapter import Fold
from optuna_hypergrad.sklearn_adapters._descent import NUM_SCANNED, scan
from optuna_hypergrad.sklearn_adapters._kernels import of_fold
from optuna_hypergrad.sklearn_adapters._losses import classification_loss, regression_loss
from optuna_hypergrad.sklearn_adapters._plain import PlainFit
from optuna_hypergrad.sklearn_adapters._shrinkage import along_penalties, along_weights


def classified(num_classes: int, n: int = 120, p: int = 9, seed: int = 0) -> Fold:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    scores = x @ rng.normal(size=(p, num_classes)) + rng.normal(size=(n, num_classes))
    y = scores.argmax(1)
    cut, weights = n * 2 // 3, rng.uniform(0.2, 2.0, n * 2 // 3)
    weights[::9] = 0.0
    test = torch.full((n - cut,), 1 / (n - cut), dtype=torch.float64)
    return Fold(
        torch.tensor(x[:cut]), y[:cut], torch.tensor(x[cut:]), y[cut:], torch.tensor(weights), test
    )


def regressed(n: int, p: int, targets: int = 1, weighted: bool = True) -> Fold:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, p)) + 2.0
    y = x @ rng.normal(size=(p, targets)) + rng.normal(size=(n, targets))
    y = y[:, 0] if targets == 1 else y
    cut = n * 2 // 3
    weights = torch.tensor(rng.uniform(0.2, 2.0, cut)) if weighted else None
    test = torch.full((n - cut,), 1 / (n - cut), dtype=torch.float64)
    return Fold(torch.tensor(x[:cut]), y[:cut], torch.tensor(x[cut:]), y[cut:], weights, test)


def logistic_slopes(
    fold: Fold, c: float, memory: dict[str, Any], intercept: bool = True
) -> list[Tensor]:
    """The loss, and its gradient by ``C``, the training samples and their weights."""
    estimator = LogisticRegression(fit_intercept=intercept)
    adapter = adapter_of(estimator)
    assert adapter is not None
    assert fold.weights is not None
    leaves = [
        torch.tensor(math.log(c), dtype=torch.float64), fold.x_train.clone(), fold.weights.clone()
    ]  # fmt: skip
    u, x, s = (t.requires_grad_() for t in leaves)
    seen = Fold(x, fold.y_train, fold.x_test, fold.y_test, s, fold.test_weights)
    predicted = adapter.predict(estimator, {"C": u.exp()}, seen, memory)
    loss = adapter.followed_loss("neg_log_loss").function(*predicted, fold.test_weights)
    return [loss.detach(), *torch.autograd.grad(loss, [u, x, s])]


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_products_with_the_hessian_find_what_the_whole_hessian_finds(
    num_classes: int, intercept: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = classified(num_classes)
    dense = [logistic_slopes(fold, c, {}, intercept) for c in (0.05, 4.0)]
    monkeypatch.setattr(_newton, "MAX_DENSE", 0)
    if not blocks:
        monkeypatch.setattr(_newton_cg, "MAX_BLOCK_ENTRIES", 0)
    memory: dict[str, Any] = {}
    products = [logistic_slopes(fold, c, memory, intercept) for c in (0.05, 4.0)]
    for known, found in zip(dense, products, strict=True):
        for a, b in zip(known, found, strict=True):
            assert float((a - b).norm()) < 1e-6 * float(a.norm())
    assert memory["blocks"].dim() == (3 if blocks else 2)


def test_many_unknowns_have_no_matrix_of_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = load_digits(return_X_y=True)
    x = StandardScaler().fit_transform(x[:300])
    test = torch.full((100,), 0.01, dtype=torch.float64)
    fold = Fold(
        torch.tensor(x[:200]),
        y[:200],
        torch.tensor(x[200:]),
        y[200:300],
        torch.ones(200).double(),
        test,
    )
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.numel())
            return made

    with Watch():
        logistic_slopes(fold, 0.3, {})
    assert largest < 650**2 / 2


def test_a_warm_start_finds_the_same_with_fewer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_newton, "MAX_DENSE", 0)
    counts, plain = [0], _newton_cg.SoftmaxHessian.times

    def times(self: Any, v: Tensor) -> Tensor:
        counts[-1] += 1
        return plain(self, v)

    monkeypatch.setattr(_newton_cg.SoftmaxHessian, "times", times)
    fold, memory = classified(4), dict[str, Any]()
    for c in (1.0, 1.5):
        logistic_slopes(fold, c, memory)
    counts.append(0)
    warm = logistic_slopes(fold, 1.6, memory)
    counts.append(0)
    cold = logistic_slopes(fold, 1.6, {})
    assert counts[1] < 0.7 * counts[2]
    for a, b in zip(warm, cold, strict=True):
        assert float((a - b).norm()) < 1e-6 * float(b.norm())


def test_a_hypergradient_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_newton, "MAX_DENSE", 0)
    plain = _newton_cg.conjugate_gradients
    monkeypatch.setattr(_newton_cg, "conjugate_gradients", lambda *a: (*plain(*a)[:2], False))
    with pytest.raises(
        SolverError, match=r"linear system of its hypergradient .* upper bound of C"
    ):
        logistic_slopes(classified(4), 1.0, {})


def test_a_rough_fit_is_near_and_the_next_one_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    fold, exact = classified(4), logistic_slopes(classified(4), 2.0, {})[0]
    for most in (0, 10**6):
        monkeypatch.setattr(_newton, "MAX_DENSE", most)
        memory: dict[str, Any] = {"rough": True}
        rough = logistic_slopes(fold, 2.0, memory)[0]
        assert 0 <= abs(float(rough / exact) - 1) < 1e-2
        assert most or rough != exact
        memory["rough"] = False
        assert float(logistic_slopes(fold, 2.0, memory)[0]) == pytest.approx(float(exact), rel=1e-9)


def slopes_of(fit: PlainFit, by: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A function of the predictions of a fit, and its slopes."""
    leaf = torch.tensor(fit.prediction, requires_grad=True)
    (slope,) = torch.autograd.grad(by(leaf), leaf)
    return leaf.detach(), {k: torch.as_tensor(v) for k, v in fit.pull(slope.numpy()).items()}


def near(found: Tensor, expected: Tensor, rtol: float) -> bool:
    return float((found - expected).detach().norm()) <= rtol * float(expected.detach().norm())


@pytest.mark.parametrize("shape", [(90, 7), (30, 50), (40, 1)], ids=["tall", "wide", "one"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("each", [True, False], ids=["per target", "one penalty"])
def test_one_reduction_gives_every_penalty(
    shape: tuple[int, int], intercept: bool, targets: int, each: bool
) -> None:
    fold, memory = regressed(*shape, targets), dict[str, Any]()
    y = torch.tensor(fold.y_train).reshape(len(fold.y_train), -1)
    for size in (1e-2, 3.0, 1e3):
        penalty = size * np.arange(1.0, 1.0 + targets) if each else np.array(size)
        alpha = torch.tensor(penalty, requires_grad=True)
        fit = along_penalties(fold, penalty, intercept, memory)
        assert fit is not None
        found, slopes = slopes_of(fit, lambda p: (p**3).sum())
        model = ridge(
            fold.x_train,
            y,
            alpha.expand(1, -1) if each else alpha,
            intercept=intercept,
            sample_weight=fold.weights,
        )
        expected = model.predict(fold.x_test).reshape(found.shape)
        assert near(found, expected, 1e-9)
        (slope,) = torch.autograd.grad((expected**3).sum(), alpha)
        assert near(slopes["alpha"], slope, 1e-7)


@pytest.mark.parametrize("shape", [(90, 7), (30, 50)], ids=["tall", "wide"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("targets", [1, 3])
def test_moments_give_every_weight_of_features(
    shape: tuple[int, int], intercept: bool, targets: int
) -> None:
    fold, memory = regressed(*shape, targets), dict[str, Any]()
    y = torch.tensor(fold.y_train)
    for size in (1e-2, 3.0):
        alpha = torch.tensor(size, dtype=torch.float64, requires_grad=True)
        scales = torch.linspace(0.0, 2.0, shape[1], dtype=torch.float64, requires_grad=True)
        fit = along_weights(fold, np.array(size), scales.detach().numpy(), intercept, memory)
        found, slopes = slopes_of(fit, lambda p: (p**3).sum())
        model = ridge(
            fold.x_train * scales, y, alpha, intercept=intercept, sample_weight=fold.weights
        )
        expected = model.predict(fold.x_test * scales)
        assert near(found, expected, 1e-9)
        by = torch.autograd.grad((expected**3).sum(), [alpha, scales])
        assert near(slopes["alpha"], by[0], 1e-7)
        assert near(slopes["scales"], by[1], 1e-7)


PLAIN = [
    (Ridge(), "regressed", {"alpha": 3.0}),
    (Ridge(fit_intercept=False), "wide", {"alpha": 3.0}),
    (Lasso(), "regressed", {"alpha": 0.1}),
    (Lasso(positive=True), "regressed", {"alpha": 0.1}),
    (ElasticNet(), "targets", {"alpha": 0.2, "l1_ratio": 0.3}),
    (ElasticNet(fit_intercept=False), "wide", {"alpha": 0.3, "l1_ratio": 0.7}),
    (Lasso(), "regressed", {"alpha": 1e3}),
    (LogisticRegression(), "classes", {"C": 2.0}),
    (LogisticRegression(fit_intercept=False), "classes", {"C": 0.1}),
    (KernelRidge(kernel="rbf"), "regressed", {"alpha": 0.5, "gamma": 0.1}),
    (KernelRidge(kernel="laplacian"), "targets", {"alpha": 0.5, "gamma": 0.1}),
    (KernelRidge(kernel="rbf", gamma=0.02), "wide", {"alpha": 0.5}),
    (KernelRidge(kernel="linear"), "targets", {"alpha": 0.5}),
    (KernelRidge(kernel="linear"), "wide", {"alpha": 0.5}),
    (SVR(), "regressed", {"C": 0.5, "gamma": 0.1, "epsilon": 0.2}),
    (SVR(gamma="scale"), "wide", {"C": 2.0, "epsilon": 0.2}),
    (SVR(kernel="linear"), "wide", {"C": 0.3}),
]
FOLDS: dict[str, Callable[[], Fold]] = {
    "regressed": lambda: regressed(90, 7),
    "wide": lambda: regressed(30, 50, weighted=False),
    "targets": lambda: regressed(90, 7, 2),
    "classes": lambda: classified(2),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["as they are", "weights of features"])
@pytest.mark.parametrize(("estimator", "kind", "params"), PLAIN, ids=[str(r[:2]) for r in PLAIN])
def test_fits_in_arrays_are_those_of_the_graph(
    estimator: Any, kind: str, params: dict[str, float], weighted: bool
) -> None:
    fold, adapter, memory = FOLDS[kind](), adapter_of(estimator), dict[str, Any]()
    assert adapter is not None
    p = fold.x_train.shape[1]
    for factor in (1.0, 1.3):  # the second fit goes on from the first
        given = {
            k: torch.tensor(min(v * factor, 1e3), dtype=torch.float64, requires_grad=True)
            for k, v in params.items()
        }
        scales = torch.linspace(0.5 * factor, 1.5, p, dtype=torch.float64, requires_grad=weighted)
        arrays = {k: v.detach().numpy() for k, v in given.items()}
        own = scales.detach().numpy() if weighted else None
        fit = adapter.fitted(estimator, arrays, fold, own, memory)
        if weighted and isinstance(estimator, (KernelRidge, SVR)):
            assert fit is None  # left to the graph
            return
        assert fit is not None
        found, slopes = slopes_of(fit, lambda q: (q**3).sum())
        seen = fold
        if weighted:
            seen = replace(fold, x_train=fold.x_train * scales, x_test=fold.x_test * scales)
        expected, target = adapter.predict(estimator, given, seen, {})
        assert near(found, expected, 1e-8)
        assert np.array_equal(fit.target, target.numpy())
        leaves = {**given, "scales": scales} if weighted else given
        by = torch.autograd.grad((expected**3).sum(), list(leaves.values()))
        for name, slope in zip(leaves, by, strict=True):
            assert near(slopes[name], slope, 1e-6), name


@pytest.mark.parametrize("scoring", ["neg_mean_squared_error", "r2", "neg_log_loss"])
@pytest.mark.parametrize("targets", [1, 2])
def test_slopes_of_losses_in_arrays_are_those_of_the_graph(scoring: str, targets: int) -> None:
    rng = np.random.default_rng(0)
    weights, predicted = rng.uniform(0.1, 1.0, 20), rng.normal(size=(20, 2))
    weights /= weights.sum()
    target: Any = rng.normal(size=(20, 2))
    if scoring == "neg_log_loss":
        loss = classification_loss(scoring)
        target = rng.integers(0, 2, 20)
    else:
        loss = regression_loss(scoring)
        if targets == 1:
            predicted, target = predicted[:, 0], target[:, 0]
    assert loss.slope is not None
    value, slope = loss.slope(predicted, target, weights)
    leaf = torch.tensor(predicted, requires_grad=True)
    expected = loss.function(leaf, torch.as_tensor(target), torch.as_tensor(weights))
    assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    (by,) = torch.autograd.grad(expected, leaf)
    assert near(torch.as_tensor(slope), by, 1e-12)


def test_a_penalty_that_is_lost_beside_the_data_is_left_to_factorizations() -> None:
    fold = regressed(30, 50)
    assert along_penalties(fold, np.array(1e-9), True, {}) is None
    adapter = adapter_of(Ridge())
    assert adapter is not None
    alpha = torch.tensor(1e-9, dtype=torch.float64)
    predicted, _ = adapter.predict(Ridge(), {"alpha": alpha}, fold, {})
    assert torch.isfinite(predicted).all()


def test_a_reduction_is_that_of_the_samples_it_is_asked_for() -> None:
    fold, other, memory = regressed(60, 5), regressed(60, 5, weighted=False), dict[str, Any]()
    alpha = np.array(2.0)
    along_penalties(fold, alpha, True, memory)
    found = along_penalties(other, alpha, True, memory)
    expected = along_penalties(other, alpha, True, {})
    assert found is not None
    assert expected is not None
    assert np.array_equal(found.prediction, expected.prediction)


def test_kernels_far_from_the_origin_are_symmetric() -> None:
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)).double() + 300.0
    y, shares = np.arange(80.0), torch.full((20,), 0.05, dtype=torch.float64)
    fold = Fold(x[:60].requires_grad_(), y[:60], x[60:], y[60:], None, shares)
    gamma = torch.tensor(0.5, dtype=torch.float64)
    among, _ = of_fold("rbf", {"gamma": gamma}, fold, {})
    assert torch.equal(among, among.mT)
    adapter = adapter_of(KernelRidge())
    assert adapter is not None
    given = {"alpha": torch.tensor(0.1).double(), "gamma": gamma}
    predicted, _ = adapter.predict(KernelRidge(kernel="rbf"), given, fold, {})
    assert torch.isfinite(predicted).all()


DOMAINS = {"a": Domain(1e-3, 1e3, True), "b": Domain(0.0, 1.0, False)}


def distances(to: dict[str, float], scales: np.ndarray, seen: list[tuple[float, int]]) -> Any:
    """Losses of folds that are each a multiple of a distance."""

    def losses(values: dict[str, Tensor], first: int, last: int) -> Tensor:
        seen.append((float(values["a"]), last - first))
        gap = (values["a"].log() - math.log(to["a"])) ** 2 + (values["b"] - to["b"]) ** 2
        return torch.as_tensor(scales[first:last]) * (1 + gap)

    return losses


@pytest.mark.parametrize(("num_folds", "expected"), [(1, 5), (2, 8), (5, 10), (10, 20), (23, 50)])
def test_starts_race_over_the_folds(num_folds: int, expected: int) -> None:
    seen: list[tuple[float, int]] = []
    scales = np.random.default_rng(0).uniform(0.5, 2.0, num_folds)
    losses = distances({"a": 700.0, "b": 0.6}, scales, seen)
    best = scan(losses, DOMAINS, {"a": 650.0}, num_folds)
    assert best == {"a": 650.0, "b": 0.5}
    assert len({a for a, _ in seen}) == NUM_SCANNED + 1
    assert sum(count for _, count in seen) == expected


def test_a_start_that_fails_is_passed_over_at_any_fold() -> None:
    plain = distances({"a": 650.0, "b": 0.5}, np.ones(5), [])

    def losses(values: dict[str, Tensor], first: int, last: int) -> Tensor:
        if float(values["a"]) == 650.0 and first == 1:
            raise SolverError("no solution", None)  # type: ignore[arg-type]
        return plain(values, first, last)  # type: ignore[no-any-return]

    found = scan(losses, DOMAINS, {"a": 650.0}, 5)
    assert found["a"] != 650.0
    assert found == scan(plain, DOMAINS, {}, 5)


def test_where_every_start_fails_it_is_the_middle() -> None:
    def losses(values: dict[str, Tensor], first: int, last: int) -> Tensor:
        return torch.full((last - first,), math.nan)

    assert scan(losses, DOMAINS, {"a": 650.0}, 5) == {n: d.midpoint() for n, d in DOMAINS.items()}


def test_fits_of_a_race_are_counted() -> None:
    x, y = load_digits(return_X_y=True)
    space = {"alpha": FloatDistribution(1e-4, 1e6, log=True)}
    search = HypergradientSearchCV(Ridge(), space, cv=5, n_trials=3, n_rescored=1, random_state=0)
    search.fit(x[:100], y[:100])
    # the first trial is at the winner, which was fitted to two folds already
    assert search.n_fits_ == 6 + (3 * 5 - 2) + 5


def test_a_rough_fit_of_the_scan_is_no_fit_of_a_trial() -> None:
    x, y = load_digits(n_class=2, return_X_y=True)
    space = {"C": FloatDistribution(1e-4, 1e3, log=True)}
    search = HypergradientSearchCV(
        LogisticRegression(), space, cv=5, n_trials=1, n_rescored=1, random_state=0
    )
    search.fit(StandardScaler().fit_transform(x[:100]), y[:100])
    assert search.n_fits_ == 6 + 5 + 5


def test_what_changes_nothing_is_not_scanned() -> None:
    x, y = load_digits(return_X_y=True)
    space = {"alpha": FloatDistribution(1e-3, 1e3, log=True), "gamma": FloatDistribution(0.1, 9.0)}
    search = HypergradientSearchCV(KernelRidge(), space, cv=5, n_trials=1, n_rescored=1)
    search.fit(x[:100], y[:100])
    assert search.n_fits_ == 6 + (5 - 2) + 5  # as of one number
    assert search.study_.trials[0].params["gamma"] == pytest.approx(4.55)
