"""Closed forms against fitting again: solutions, held-out predictions, their gradients, and what they refuse (GT12)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import torch
from problems import F64, randn, relative_error
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import pairwise
from sklearn.model_selection import KFold, cross_val_predict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optuna_hypergrad as ohg
from optuna_hypergrad import closed_form as cf
from optuna_hypergrad import kept_graph
from optuna_hypergrad.closed_form._solving import _PositiveSolve, positive_solve, weighted_solve
from optuna_hypergrad.operators import InnerGraph

SHAPES = {"tall": (26, 5), "wide": (7, 12), "square": (9, 9)}
FOLDS: dict[str, Any] = {
    "one": "each",
    "blocks": 3,
    "small_blocks": 7,
    "uneven": "random",
}


def data(shape: str, targets: int | None = 2, seed: int = 0) -> dict[str, Tensor]:
    n, p = SHAPES[shape]
    y = randn(n, seed=seed + 1) if targets is None else randn(n, targets, seed=seed + 1)
    return {
        "x": randn(n, p, seed=seed) + 1.0,
        "y": y + 2.0,
        "penalty": randn(p, seed=seed + 2).exp(),
        "sample_weight": randn(n, seed=seed + 3).exp(),
    }


def refit(
    x: Tensor, y: Tensor, penalty: Tensor, sample_weight: Tensor, intercept: bool
) -> Callable[[Tensor], Tensor]:
    """Normal equations with a column of ones, one target after the other; gives its predictions."""
    ones = x.new_ones(len(x), int(intercept))
    design, columns = torch.cat([x, ones], 1), []
    penalty = (penalty.reshape(-1, 1) if penalty.dim() < 2 else penalty).expand(
        x.shape[1], y.shape[1]
    )
    for target, of_target in zip(y.mT, penalty.mT, strict=True):
        diagonal = torch.cat([of_target, ones.new_zeros(int(intercept))])
        matrix = design.mT @ (sample_weight[:, None] * design) + torch.diag(diagonal)
        columns.append(torch.linalg.solve(matrix, design.mT @ (sample_weight * target)))
    w = torch.stack(columns, 1)
    return lambda at: torch.cat([at, at.new_ones(len(at), int(intercept))], 1) @ w


def fold_numbers(kind: str, n: int) -> Tensor:
    if kind == "one":
        return torch.arange(n)
    if kind == "uneven":
        return torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(1))
    sizes = [len(out) for _, out in KFold(FOLDS[kind]).split(range(n))]
    return torch.arange(FOLDS[kind]).repeat_interleave(torch.tensor(sizes))


def refit_held_out(of_sample: Tensor, intercept: bool, **given: Tensor) -> Tensor:
    found = torch.zeros_like(given["y"])
    for fold in of_sample.unique():
        rest, out = of_sample != fold, of_sample == fold
        per_sample = ("x", "y", "sample_weight")
        kept = {k: v[rest] if k in per_sample else v for k, v in given.items()}
        found = found.index_put(
            (out.nonzero()[:, 0],), refit(**kept, intercept=intercept)(given["x"][out])
        )
    return found


def held_out(kind: str, intercept: bool, **given: Tensor) -> Tensor:
    x, y, penalty, weight = (given[k] for k in ("x", "y", "penalty", "sample_weight"))
    if kind == "one":
        return cf.ridge_leave_one_out(x, y, penalty, intercept=intercept, sample_weight=weight)
    folds = FOLDS[kind] if kind != "uneven" else fold_numbers(kind, x.shape[-2])
    return cf.ridge_k_fold(x, y, penalty, folds, intercept=intercept, sample_weight=weight)


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found - exact).detach().norm() / exact.detach().norm())


def slope_errors(
    value: Callable[..., Tensor], exact: Callable[..., Tensor], given: dict[str, Tensor]
) -> dict[str, float]:
    """Relative errors of gradients of ``value`` beside central differences of ``exact``, entry by entry."""
    at = {k: v.clone().requires_grad_() for k, v in given.items()}
    gradients = torch.autograd.grad(value(**at), list(at.values()))
    errors = {}
    for (name, v), found in zip(given.items(), gradients, strict=True):
        differences, h = torch.zeros_like(v), 1e-5
        for i in range(v.numel()):
            ends = []
            for sign in (2.0, 1.0, -1.0, -2.0):
                moved = v.clone()
                moved.view(-1)[i] += sign * h
                ends.append(float(exact(**{**given, name: moved})))
            far, near, mirrored, mirrored_far = ends
            differences.view(-1)[i] = (8 * (near - mirrored) - (far - mirrored_far)) / (12 * h)
        errors[name] = error(found, differences)
    return errors


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["number", "feature", "target", "weight"])
def test_ridge_and_what_it_predicts_for_those_left_out_equal_refits(
    shape: str, kind: str, intercept: bool, weighted: bool
) -> None:
    given = data(shape)
    n, p = SHAPES[shape]
    given["penalty"] = {
        "number": torch.tensor(0.7, dtype=F64),
        "feature": given["penalty"],
        "target": randn(1, 2, seed=8).exp(),
        "weight": randn(p, 2, seed=9).exp(),
    }[kind]
    if weighted:
        given["sample_weight"][2] = 0.0
    else:
        given["sample_weight"] = torch.ones(n, dtype=F64)
    weight = given["sample_weight"] if weighted else None
    new = randn(4, p, seed=5)
    model = cf.ridge(
        given["x"], given["y"], given["penalty"], intercept=intercept, sample_weight=weight
    )
    assert error(model.predict(new), refit(**given, intercept=intercept)(new)) < 1e-11
    assert model.coefficients.shape == (p, 2)
    assert model.intercept.shape == (2,)
    for fold in FOLDS:
        exact = refit_held_out(fold_numbers(fold, n), intercept, **given)
        assert error(held_out(fold, intercept, **given), exact) < 1e-10, fold


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("fold", [None, *FOLDS])
def test_gradients_equal_differences_of_refits(shape: str, fold: str | None, absent: bool) -> None:
    """To the penalty, the weights (some of them zero), the samples and their targets; with an intercept."""
    given = data(shape)
    n, p = SHAPES[shape]
    if absent:
        given["sample_weight"][[1, 4]] = 0.0
    new, goal = randn(4, p, seed=5), randn(4, 2, seed=6)

    def loss(**at: Tensor) -> Tensor:
        if fold is not None:
            return ((held_out(fold, True, **at) - at["y"]) ** 2).mean()
        model = cf.ridge(
            at["x"], at["y"], at["penalty"], intercept=True, sample_weight=at["sample_weight"]
        )
        return ((model.predict(new) - goal) ** 2).mean()

    def exact(**at: Tensor) -> Tensor:
        if fold is not None:
            return ((refit_held_out(fold_numbers(fold, n), True, **at) - at["y"]) ** 2).mean()
        return ((refit(**at, intercept=True)(new) - goal) ** 2).mean()

    checked = given if fold is None else {k: given[k] for k in ("penalty", "sample_weight")}
    rest = {k: v for k, v in given.items() if k not in checked}
    errors = slope_errors(
        lambda **at: loss(**at, **rest), lambda **at: exact(**at, **rest), checked
    )
    assert max(errors.values()) < 1e-7, errors


@pytest.mark.parametrize("fold", ["one", "blocks", "small_blocks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_to_the_data_equal_autograd_through_refits(shape: str, fold: str) -> None:
    given = {k: v.requires_grad_() for k, v in data(shape).items()}
    n = SHAPES[shape][0]
    both = [
        torch.autograd.grad(((found - given["y"]) ** 2).mean(), list(given.values()))
        for found in (
            held_out(fold, True, **given),
            refit_held_out(fold_numbers(fold, n), True, **given),
        )
    ]
    for found, exact in zip(*both, strict=True):
        assert error(found, exact) < 1e-9


def test_scikit_learn_agrees() -> None:
    given = data("tall", targets=3)
    x, y, weight = given["x"], given["y"], given["sample_weight"]
    arrays = {k: v.numpy() for k, v in given.items()}
    alphas = torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    theirs = Ridge(alpha=alphas.numpy()).fit(arrays["x"], arrays["y"], arrays["sample_weight"])
    ours = cf.ridge(x, y, alphas[None], intercept=True, sample_weight=weight)
    assert error(ours.coefficients, torch.tensor(theirs.coef_).mT) < 1e-10
    assert error(ours.intercept, torch.tensor(theirs.intercept_)) < 1e-10

    search = RidgeCV(alphas=alphas.numpy(), store_cv_results=True)
    search.fit(arrays["x"], arrays["y"])
    for i, alpha in enumerate(alphas):
        squares = (cf.ridge_leave_one_out(x, y, alpha, intercept=True) - y) ** 2
        assert error(squares, torch.tensor(search.cv_results_[:, :, i])) < 1e-10

    by_fold = cross_val_predict(Ridge(alpha=1.0), arrays["x"], arrays["y"], cv=KFold(4))
    assert error(cf.ridge_k_fold(x, y, 1.0, 4, intercept=True), torch.tensor(by_fold)) < 1e-10

    machine = KernelRidge(alpha=0.5, kernel="rbf", gamma=0.125)
    machine.fit(arrays["x"], arrays["y"], sample_weight=arrays["sample_weight"])
    dual = cf.kernel_ridge(cf.rbf_kernel(x, length_scale=2.0), y, 0.5, sample_weight=weight)
    assert error(dual, torch.tensor(machine.dual_coef_)) < 1e-10


WITHIN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ridge": lambda x, y, penalty: cf.ridge(x, y, penalty, intercept=True).predict(x),
    "wide ridge": lambda x, y, penalty: cf.ridge(x[:2], y[:2], penalty).predict(x),
    "held out": lambda x, y, penalty: cf.ridge_leave_one_out(x, y, penalty),
    "kernel": lambda x, y, penalty: cf.kernel_ridge_leave_one_out(
        cf.rbf_kernel(x), y, penalty.sum()
    ),
}


@pytest.mark.parametrize("what", WITHIN)
def test_forward_methods_go_through_a_closed_form(what: str) -> None:
    """Columns of tangents take second derivatives, all at once or one by one; as unrolling in reverse."""
    x, y = randn(8, 3, seed=1), randn(8, seed=2)

    def inner(w: ohg.Params, lam: ohg.Params, batch: object) -> Tensor:
        found = WITHIN[what](x * w["w"], y, lam["log_penalty"].exp())
        return (found - y).square().mean() + 0.1 * (w["w"] - lam["center"]).square().sum()

    def found(estimator: Any) -> ohg.Params:
        return ohg.hypergradient(
            ohg.BilevelProblem(inner, inner),
            {"w": torch.ones(3, dtype=F64)},
            {"log_penalty": randn(3, seed=3), "center": torch.tensor(0.3, dtype=F64)},
            estimator=estimator,
            inner_solver=ohg.GradientDescent(0.05, max_steps=3),
        ).value

    truth = found(ohg.Unroll())
    for estimator in (
        ohg.ForwardMode(),
        ohg.ForwardMode(width=1),
        ohg.ForwardGradient(num_directions=None),
    ):
        assert relative_error(found(estimator), truth) < 1e-12


def weighted_folds(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0], dtype=F64) + 0 * penalty.sum()
    kernel = cf.rbf_kernel(x, length_scale=penalty[0])
    by_kernel = cf.kernel_ridge_k_fold(kernel, y, penalty[1], 2, sample_weight=weights)
    few = torch.arange(8) // 4
    return by_kernel + cf.ridge_k_fold(x, y, penalty, few, intercept=True, sample_weight=weights)


def tasks(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    xs, ys = torch.stack([x, x + penalty, 2 * x]), torch.stack([y, y + 1.0, 2 * y])
    return cf.ridge(xs, ys, penalty, intercept=True).predict(xs).mean(0)


@pytest.mark.parametrize("num_targets", [None, 2])
@pytest.mark.parametrize("what", [*WITHIN, "weighted folds", "tasks"])
def test_rows_of_second_derivatives_are_those_of_one_at_a_time(
    what: str, num_targets: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And take the quick way, which asks each function for a rule of its own."""

    def fail(*_: Any) -> None:
        raise AssertionError("torch.func.vmap has failed")

    monkeypatch.setattr(kept_graph, "_by_older_batching", fail)
    others = {"weighted folds": weighted_folds, "tasks": tasks}
    function = others.get(what) or WITHIN[what]
    x = randn(8, 3, seed=1)
    y = randn(8, seed=2) if num_targets is None else randn(8, num_targets, seed=2)

    def inner(w: ohg.Params, lam: ohg.Params, batch: object) -> Tensor:
        return (function(x * w["x"], y + w["y"], w["log_penalty"].exp()) - lam["y"]).square().mean()

    w = {"x": randn(3, seed=3).exp(), "y": 0.1 * y, "log_penalty": randn(3, seed=4)}
    graph = InnerGraph(inner, w, {"y": y}, None)
    rows = randn(4, graph.layout.size, seed=5)
    for found, row in zip(graph.hvp_many(rows), rows, strict=True):
        assert error(found, graph.hvp(row)) < 1e-10


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_rows_of_second_derivatives_are_columns_of_one_solve(shape: str) -> None:
    given = data(shape)

    def inner(w: ohg.Params, lam: ohg.Params, batch: object) -> Tensor:
        return (cf.ridge(given["x"], given["y"], w["penalty"].exp()).coefficients ** 2).sum()

    graph = InnerGraph(inner, {"penalty": given["penalty"].log()}, {}, None)
    with Counted() as one:
        graph.hvp(randn(graph.layout.size, seed=5))
    with Counted() as many:
        graph.hvp_many(randn(7, graph.layout.size, seed=5))
    assert many.seen == one.seen
    assert many.columns == [7 * k for k in one.columns]


def test_rows_of_data_are_refused_in_words() -> None:
    matrices = torch.stack([torch.eye(3, dtype=F64), 2 * torch.eye(3, dtype=F64)])
    side, factor = randn(3, 2, seed=1), torch.eye(3, dtype=F64)
    with pytest.raises(ohg.RequirementError, match=r"for rows of its data.* leading dimensions"):
        torch.func.vmap(lambda matrix: _PositiveSolve.apply(matrix, side, factor))(matrices)


@pytest.mark.parametrize("what", [*WITHIN, "folds", "duals"])
def test_forward_mode_of_torch_is_refused_in_words(what: str) -> None:
    x, y = randn(8, 3, seed=1), randn(8, seed=2)
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "folds": lambda penalty: cf.ridge_k_fold(x, y, penalty, 2),
        "duals": lambda penalty: cf.kernel_ridge(cf.rbf_kernel(x), y, penalty.sum()),
    }
    function = others.get(what, lambda penalty: WITHIN[what](x, y, penalty))
    ones = torch.ones(3, dtype=F64)
    with pytest.raises(ohg.RequirementError, match=r"in reverse mode only.* Use torch.autograd"):
        torch.func.jvp(function, (ones,), (ones,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(ohg.RequirementError, match="in reverse mode only"),
    ):
        function(torch.autograd.forward_ad.make_dual(ones, ones))
    (slope,) = torch.func.vjp(function, ones)[1](torch.ones_like(function(ones)))
    assert slope.isfinite().all()


def test_bros_over_a_closed_form_is_refused_in_words() -> None:
    x, y = randn(8, 3, seed=1), randn(8, seed=2)

    def inner(w: ohg.Params, lam: ohg.Params, batch: object) -> Tensor:
        return (cf.ridge(x @ w["w"], y, lam["penalty"]).predict(x @ w["w"]) - y).square().mean()

    with pytest.raises(ohg.RequirementError, match="in place of BROS use MASOBA"):
        ohg.hypergradient(
            ohg.BilevelProblem(inner, inner),
            {"w": randn(3, 4, seed=3)},
            {"penalty": torch.tensor(0.5, dtype=F64)},
            estimator=ohg.BROS(step_size=0.05),
            inner_solver=ohg.GradientDescent(0.05, max_steps=1),
        )


def test_the_solution_is_that_of_implicit_differentiation() -> None:
    x, xv = randn(40, 6, seed=1), randn(30, 6, seed=2)
    y, yv = randn(40, seed=3), randn(30, seed=4)
    log_penalty = randn(6, seed=5)

    def inner(w: ohg.Params, lam: ohg.Params, batch: object) -> Tensor:
        return ((x @ w["w"] - y) ** 2).sum() + (lam["log_penalty"].exp() * w["w"] ** 2).sum()

    gradients = []
    for closed in (True, False):
        lam = log_penalty.clone().requires_grad_()
        if closed:
            w = cf.ridge(x, y, lam.exp()).coefficients
        else:
            w = ohg.solve(
                inner,
                {"w": torch.zeros(6, dtype=F64)},
                {"log_penalty": lam},
                solver=ohg.LBFGS(atol=1e-12),
                estimator=ohg.Implicit(ohg.Direct()),
            )["w"]
        ((xv @ w - yv) ** 2).mean().backward()
        gradients.append({"log_penalty": lam.grad})
    assert relative_error(*gradients) < 1e-8


@pytest.mark.parametrize("kind", ["number", "sample", "target"])
@pytest.mark.parametrize("fold", FOLDS)
def test_kernel_ridge_leaves_out_as_refits_do(fold: str, kind: str) -> None:
    """GT12, with gradients to length scales and the penalty; one refit for each fold."""
    x, y = randn(14, 3, seed=1), randn(14, 2, seed=2)
    penalty = {
        "number": torch.tensor(0.3, dtype=F64),
        "sample": randn(14, seed=3).exp(),
        "target": randn(1, 2, seed=4).exp(),
    }[kind]
    given = {"length_scale": torch.tensor([0.5, 1.0, 2.0], dtype=F64), "penalty": penalty}
    of_sample = fold_numbers(fold, 14)

    def found(length_scale: Tensor, penalty: Tensor) -> Tensor:
        kernel = cf.rbf_kernel(x, length_scale=length_scale)
        if fold == "one":
            return cf.kernel_ridge_leave_one_out(kernel, y, penalty)
        folds = FOLDS[fold] if fold != "uneven" else of_sample
        return cf.kernel_ridge_k_fold(kernel, y, penalty, folds)

    def exact(length_scale: Tensor, penalty: Tensor) -> Tensor:
        kernel = torch.cdist(x / length_scale, x / length_scale).square().div(-2).exp()
        held = torch.zeros_like(y)
        each = (penalty.reshape(-1, 1) if penalty.dim() < 2 else penalty).expand(14, 2)
        for number in of_sample.unique():
            rest, out = of_sample != number, of_sample == number
            for j in range(2):
                matrix = kernel[rest][:, rest] + torch.diag(each[rest, j])
                held[out, j] = kernel[out][:, rest] @ torch.linalg.solve(matrix, y[rest, j])
        return held

    assert error(found(**given), exact(**given)) < 1e-10
    errors = slope_errors(
        lambda **at: ((found(**at) - y) ** 2).mean(),
        lambda **at: ((exact(**at) - y) ** 2).mean(),
        given,
    )
    assert max(errors.values()) < 1e-7, errors


@pytest.mark.parametrize("fold", ["one", "blocks", "uneven"])
def test_weighted_kernel_ridge_on_a_linear_kernel_is_ridge(fold: str) -> None:
    """Also its gradients, where a sample has no weight."""
    given = {k: v for k, v in data("tall").items() if k != "penalty"}
    given["sample_weight"][[1, 4]] = 0.0
    given["penalty"] = torch.tensor(0.7, dtype=F64)
    given = {k: v.requires_grad_() for k, v in given.items()}
    x, y, weight, penalty = (given[k] for k in ("x", "y", "sample_weight", "penalty"))
    kernel, folds = cf.linear_kernel(x), fold_numbers(fold, len(x))
    dual = cf.kernel_ridge(kernel, y, penalty, sample_weight=weight)
    w = cf.ridge(x, y, penalty, sample_weight=weight).coefficients
    by_kernel = cf.kernel_ridge_k_fold(kernel, y, penalty, folds, sample_weight=weight)
    if fold == "one":
        same = cf.kernel_ridge_leave_one_out(kernel, y, penalty, sample_weight=weight)
        assert torch.equal(same, by_kernel)
    by_features = held_out(fold, False, **given)
    for found, exact in ((x.mT @ dual, w), (by_kernel, by_features)):
        assert error(found, exact) < 1e-10
        both = [
            torch.autograd.grad((v**3).mean(), list(given.values()), retain_graph=True)
            for v in (found, exact)
        ]
        for ours, theirs in zip(*both, strict=True):
            assert error(ours, theirs) < 1e-9


def test_single_precision_is_single_precision() -> None:
    for shape in SHAPES:
        given = data(shape)
        narrow = {k: v.float() for k, v in given.items()}
        for fold in FOLDS:
            found = held_out(fold, True, **narrow)
            assert found.dtype == torch.float32
            assert error(found.double(), held_out(fold, True, **given)) < 1e-4


def test_a_large_mean_is_left_to_the_intercept() -> None:
    """Means of 1e6 and a penalty: centered, nothing cancels but the means themselves."""
    for shape in SHAPES:
        given = data(shape)
        far = {**given, "x": given["x"] + 1e6, "y": given["y"] - 1e6}
        for fold in FOLDS:
            found = held_out(fold, True, **far) + 1e6
            assert error(found, held_out(fold, True, **given)) < 1e-7


@pytest.mark.parametrize("penalty", [1e-2, 1e-9])
def test_leaving_one_out_is_right_where_the_penalty_is_almost_nothing(penalty: float) -> None:
    """``1 - h`` is then 1e-11: subtracted from one, it would have five digits."""
    x, y = randn(10, 30, seed=1) + 5.0, randn(10, seed=2)
    exact = torch.zeros(10, dtype=F64)
    for i in range(10):  # the dual system, which a small penalty does not spoil
        rest = torch.arange(10) != i
        middle, mean = x[rest].mean(0), y[rest].mean()
        a = x[rest] - middle
        gram = a @ a.mT + 10 * torch.ones(9, 9, dtype=F64)  # a.mT @ 1 = 0
        dual = torch.linalg.solve(gram + penalty * torch.eye(9, dtype=F64), y[rest] - mean)
        exact[i] = mean + (x[i] - middle) @ a.mT @ dual
    found = cf.ridge_leave_one_out(x, y, penalty, intercept=True)
    assert error(found, exact) < 1e-11
    by_folds = cf.ridge_k_fold(x, y, penalty, 10, intercept=True)
    assert error(by_folds, exact) < 1e-11


def test_both_solves_are_differentiable_twice() -> None:
    root, side = randn(4, 4, seed=1), randn(4, 2, seed=2)
    weights = torch.tensor([0.5, 2.0, 0.3, 1.0], dtype=F64)

    def positive(root: Tensor, side: Tensor) -> Tensor:
        return positive_solve(root @ root.mT + torch.eye(4, dtype=F64), side, "a test")

    def weighted(root: Tensor, weights: Tensor, side: Tensor) -> Tensor:
        return weighted_solve(root @ root.mT, weights, side, "a test")

    for function, inputs in ((positive, (root, side)), (weighted, (root, weights, side))):
        at = [v.clone().requires_grad_() for v in inputs]
        assert torch.autograd.gradcheck(function, at)
        assert torch.autograd.gradgradcheck(function, at)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_function_transforms_go_through(shape: str) -> None:
    given = data(shape)

    def loss(penalty: Tensor) -> Tensor:
        held = cf.ridge_leave_one_out(given["x"], given["y"], penalty, intercept=True)
        return ((held - given["y"]) ** 2).mean()

    exact = torch.autograd.functional.hessian(loss, given["penalty"])
    slope, pull = torch.func.vjp(torch.func.grad(loss), given["penalty"])
    rows = torch.stack([pull(row)[0] for row in torch.eye(len(slope), dtype=F64)])
    assert error(rows, exact) < 1e-12


def test_second_derivatives_to_weights_of_zero_equal_those_of_refits() -> None:
    """Where ``S^1/2`` has none."""
    x, y, weights = randn(5, 9, seed=1), randn(5, seed=2), randn(5, seed=3).exp()
    weights[1] = 0.0

    def closed(weights: Tensor) -> Tensor:
        return (cf.ridge(x, y, 0.5, sample_weight=weights).coefficients ** 2).sum()

    def plain(weights: Tensor) -> Tensor:
        matrix = x.mT @ (weights[:, None] * x) + 0.5 * torch.eye(9, dtype=F64)
        return (torch.linalg.solve(matrix, x.mT @ (weights * y)) ** 2).sum()

    found, exact = (torch.autograd.functional.hessian(f, weights) for f in (closed, plain))
    assert error(found, exact) < 1e-10


class Counted(TorchDispatchMode):
    """Operations on matrices, by name; solves with the columns that they have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.columns: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(word in name for word in ("linalg", "cholesky", "lu_", "triangular", "eigh")):
            self.seen[name] += 1
        if name == "cholesky_solve":
            self.columns.append(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_one_factorization_serves_the_solution_and_all_gradients(shape: str) -> None:
    given = {k: v.requires_grad_() for k, v in data(shape).items()}
    with Counted() as forward:
        model = cf.ridge(
            given["x"], given["y"], given["penalty"], sample_weight=given["sample_weight"]
        )
        loss = (model.coefficients**2).sum()
    assert forward.seen == {"linalg_cholesky_ex": 1, "cholesky_solve": 1}
    with Counted() as backward:
        gradients = torch.autograd.grad(loss, list(given.values()), create_graph=True)
        second = sum((g**2).sum() for g in gradients)
        torch.autograd.grad(second, list(given.values()))
    assert backward.seen.keys() == {"cholesky_solve"}
    assert set(backward.columns) == {2}


@pytest.mark.parametrize("fold", ["one", "small_blocks"])
def test_one_factorization_serves_all_that_are_left_out(fold: str) -> None:
    given = {k: v.requires_grad_() for k, v in data("square").items()}
    with Counted() as counted:
        ((held_out(fold, True, **given) - given["y"]) ** 2).mean().backward()
    assert counted.seen["linalg_cholesky_ex"] == 1
    assert counted.seen["cholesky_solve"] == 2
    blocks = {"_linalg_solve_ex", "_linalg_check_errors", "linalg_lu_solve"}  # of a fold's size
    assert counted.seen.keys() <= {"linalg_cholesky_ex", "cholesky_solve", *blocks}


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_tasks_are_solved_together_as_one_by_one(shape: str) -> None:
    tasks = [data(shape, seed=s) for s in (0, 10, 20)]
    together = {k: torch.stack([t[k] for t in tasks]) for k in tasks[0]}
    together["penalty"] = together["penalty"].unsqueeze(-1)
    new = randn(3, 4, SHAPES[shape][1], seed=5)
    model = cf.ridge(
        together["x"],
        together["y"],
        together["penalty"],
        intercept=True,
        sample_weight=together["sample_weight"],
    )
    predictions = model.predict(new)
    for task, at, found in zip(tasks, new, predictions, strict=True):
        assert error(found, refit(**task, intercept=True)(at)) < 1e-11
    for fold in FOLDS:
        found = held_out(fold, True, **together)
        for task, own in zip(tasks, found, strict=True):
            exact = refit_held_out(fold_numbers(fold, SHAPES[shape][0]), True, **task)
            assert error(own, exact) < 1e-10
    kernel = cf.rbf_kernel(together["x"])
    dual = cf.kernel_ridge(kernel, together["y"], 0.3)
    for own, square, task in zip(dual, kernel, tasks, strict=True):
        assert error(own, cf.kernel_ridge(square, task["y"], 0.3)) < 1e-12


def test_a_head_takes_classes() -> None:
    features, classes = randn(2, 9, 4, seed=1), torch.arange(9).expand(2, 9) % 3
    head = cf.ridge_head(features, classes, 0.5)
    same = cf.ridge(features, torch.nn.functional.one_hot(classes).double(), 0.5)
    assert torch.equal(head.coefficients, same.coefficients)
    assert head.predict(features).shape == (2, 9, 3)


def test_one_target_needs_no_dimension() -> None:
    for shape in SHAPES:
        given = data(shape, targets=None)
        column = {**given, "y": given["y"].unsqueeze(-1)}
        model, same = (
            cf.ridge(g["x"], g["y"], g["penalty"], intercept=True) for g in (given, column)
        )
        assert model.coefficients.shape == (SHAPES[shape][1],)
        assert model.intercept.shape == ()
        assert torch.equal(model.coefficients, same.coefficients.squeeze(-1))
        assert torch.equal(model.predict(given["x"]), same.predict(given["x"]).squeeze(-1))
        for fold in FOLDS:
            assert torch.equal(
                held_out(fold, True, **given), held_out(fold, True, **column).squeeze(-1)
            )


def test_kernels_are_those_of_scikit_learn() -> None:
    a, b = randn(6, 3, seed=1) + 100.0, randn(4, 3, seed=2) + 100.0
    scales = torch.tensor([0.5, 1.0, 4.0], dtype=F64)
    found = cf.rbf_kernel(a, b, length_scale=scales)
    exact = pairwise.rbf_kernel((a / scales).numpy(), (b / scales).numpy(), gamma=0.5)
    assert error(found, torch.tensor(exact)) < 1e-11
    found = cf.polynomial_kernel(a, b, degree=2, scale=scales, offset=0.5)
    exact = pairwise.polynomial_kernel((a * scales).numpy(), b.numpy(), 2, gamma=1.0, coef0=0.5)
    assert error(found, torch.tensor(exact)) < 1e-12
    assert error(cf.linear_kernel(a, b), a @ b.mT) == 0.0
    assert error(cf.rbf_kernel(a).diagonal(), torch.ones(6, dtype=F64)) < 1e-14


@pytest.mark.parametrize("gap", [0.0, 10.0, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_far_clusters_do_not_spoil_near_distances(gap: float, dtype: torch.dtype) -> None:
    """Values and slopes, also where points coincide (the diagonal, and one point of ``b``)."""
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    a = torch.cat([randn(5, 3, seed=1), randn(5, 3, seed=2) + gap]).to(dtype)
    b = torch.cat([a[:1], a[5:8] + 0.5])
    weights = randn(10, 4, seed=3)

    def exact(a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
        squares = ((a.unsqueeze(1) - b.unsqueeze(0)) / scales).square().sum(-1)
        return squares.div(-2).exp()

    def slopes(kernel: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        at = [v.detach().to(dtype).requires_grad_() for v in (a, b, scales)]
        first = torch.autograd.grad((kernel(*at) * weights.to(dtype)).sum(), at, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), at)
        return [*first, *second]

    def found(a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
        return cf.rbf_kernel(a, b, length_scale=scales)

    square = cf.rbf_kernel(a, length_scale=scales)
    assert square.dtype == dtype
    assert float(square.max()) <= 1.0
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    wide = [v.to(F64) for v in (a, a, scales)]
    assert float((square.to(F64) - exact(*wide)).abs().max()) < tolerance
    for own, true in zip(slopes(found, dtype), slopes(exact, F64), strict=True):
        assert error(own.to(F64), true) < tolerance


@pytest.mark.parametrize("targets", [None, 2])
def test_inducing_points_are_differentiated_as_by_differences(targets: int | None) -> None:
    x, goal = randn(12, 3, seed=1), randn(12, *([] if targets is None else [targets]), seed=2)
    given = {
        "support_x": randn(4, 3, seed=3),
        "support_y": randn(4, *([] if targets is None else [targets]), seed=4),
        "scale": torch.tensor([0.7, 1.0, 1.5], dtype=F64),
        "penalty": torch.tensor(0.2, dtype=F64),
    }

    def found(support_x: Tensor, support_y: Tensor, scale: Tensor, penalty: Tensor) -> Tensor:
        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return cf.polynomial_kernel(a, b, degree=2, scale=scale)

        predictions = cf.kernel_inducing_points(kernel, support_x, support_y, x, penalty)
        return 0.5 * (predictions - goal).square().mean()

    def exact(support_x: Tensor, support_y: Tensor, scale: Tensor, penalty: Tensor) -> Tensor:
        among = ((support_x * scale) @ support_x.mT + 1) ** 2
        shift = penalty * among.trace() / 4 * torch.eye(4, dtype=F64)
        across = ((x * scale) @ support_x.mT + 1) ** 2
        predictions = across @ torch.linalg.inv(among + shift) @ support_y
        return ((predictions - goal) ** 2).mean() / 2

    assert float(found(**given)) == pytest.approx(float(exact(**given)), rel=1e-12)
    errors = slope_errors(found, exact, given)
    assert max(errors.values()) < 1e-7, errors


def test_a_study_learns_a_penalty_per_feature_by_leaving_one_out() -> None:
    x = randn(40, 12, seed=1)
    y = x[:, :3].sum(1) + 0.5 * randn(40, seed=2)

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        penalty = trial.suggest_tensor("penalty", (12,), 1e-3, 1e4, log=True, init=torch.ones(12))
        return ((cf.ridge_leave_one_out(x, y, penalty) - y) ** 2).mean()

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=15)
    one_for_all = min(
        float(((cf.ridge_leave_one_out(x, y, float(a)) - y) ** 2).mean())
        for a in torch.logspace(-3, 4, 50)
    )
    assert study.best_value < 0.9 * one_for_all


X, Y = randn(6, 3, seed=1), randn(6, seed=2)
K = X @ X.mT
REFUSED = {
    "no penalty": (
        lambda: cf.ridge(X, Y, 0.0),
        ohg.HyperparameterError,
        "penalty must be positive",
    ),
    "negative penalty": (
        lambda: cf.kernel_ridge(K, Y, torch.tensor([1.0, 1, 1, 1, 1, -1])),
        ohg.HyperparameterError,
        "least entry is -1. Suggest it with log=True",
    ),
    "penalty NaN": (lambda: cf.ridge(X, Y, float("nan")), ohg.HyperparameterError, "finite"),
    "penalty is text": (lambda: cf.ridge(X, Y, "1"), ohg.HyperparameterError, "give a number"),  # type: ignore[arg-type]
    "penalties of another number of features": (
        lambda: cf.ridge_leave_one_out(X, Y, torch.ones(4)),
        ohg.HyperparameterError,
        "does not fit 3 features and 1 targets",
    ),
    "penalties of another number of samples": (
        lambda: cf.kernel_ridge(K, Y, torch.ones(4)),
        ohg.HyperparameterError,
        "does not fit 6 samples",
    ),
    "targets of another length": (
        lambda: cf.ridge(X, Y[:5], 1.0),
        ohg.ProblemError,
        r"y has shape \(5,\) beside x of shape \(6, 3\)",
    ),
    "targets of another dtype": (lambda: cf.ridge(X, Y.float(), 1.0), ohg.ProblemError, "the same"),
    "integers": (lambda: cf.ridge(X.long(), Y, 1.0), ohg.ProblemError, "torch.int64"),
    "half": (
        lambda: cf.ridge(X.half(), Y.half(), 1.0),
        ohg.ProblemError,
        "no system is factorized",
    ),
    "arrays": (lambda: cf.ridge(X.numpy(), Y, 1.0), ohg.ProblemError, "not a tensor"),  # type: ignore[arg-type]
    "no samples": (lambda: cf.ridge(X[:0], Y[:0], 1.0), ohg.ProblemError, "x is empty"),
    "a vector": (lambda: cf.ridge(Y, Y, 1.0), ohg.ProblemError, "at least 2 dimensions"),
    "NaN": (lambda: cf.ridge(X.log(), Y, 1.0), ohg.ProblemError, "x holds NaN or infinite"),
    "negative weight": (
        lambda: cf.ridge(X, Y, 1.0, sample_weight=Y),
        ohg.ProblemError,
        "must not be negative",
    ),
    "no weight at all": (
        lambda: cf.ridge(X, Y, 1.0, sample_weight=0 * Y),
        ohg.ProblemError,
        "nor zero for all",
    ),
    "weights of another length": (
        lambda: cf.ridge(X, Y, 1.0, sample_weight=torch.ones(5)),
        ohg.ProblemError,
        "one per sample",
    ),
    "fewer samples than folds": (
        lambda: cf.ridge_k_fold(X, Y, 1.0, 7),
        ohg.ProblemError,
        "6 samples cannot be split into 7 folds",
    ),
    "one fold": (lambda: cf.kernel_ridge_k_fold(K, Y, 1.0, 1), ohg.ProblemError, "use 2 to 6"),
    "all in one fold": (
        lambda: cf.ridge_k_fold(X, Y, 1.0, torch.ones(6, dtype=torch.long)),
        ohg.ProblemError,
        "all 6 samples are in one fold",
    ),
    "half folds": (lambda: cf.ridge_k_fold(X, Y, 1.0, 2.5), ohg.ProblemError, "give their number"),  # type: ignore[arg-type]
    "folds of other samples": (
        lambda: cf.ridge_k_fold(X, Y, 1.0, torch.arange(5)),
        ohg.ProblemError,
        "the integer fold of each sample",
    ),
    "one sample": (
        lambda: cf.ridge_leave_one_out(X[:1], Y[:1], 1.0),
        ohg.ProblemError,
        "at least 2 samples",
    ),
    "nobody left for an intercept": (
        lambda: cf.ridge_leave_one_out(
            X, Y, 1.0, intercept=True, sample_weight=torch.eye(6, dtype=F64)[1]
        ),
        ohg.ProblemError,
        "nothing to fit an intercept to",
    ),
    "a column twice": (
        lambda: cf.ridge(torch.cat([X, X], 1), Y, 1e-18, sample_weight=1 + Y**2),
        ohg.SolverError,
        "system of ridge is singular to rounding.* Raise the penalty",
    ),
    "columns twice": (
        lambda: cf.ridge(X[:, [0, 1, 0, 1]], Y, 1e-18),
        ohg.SolverError,
        "take out columns that repeat others",
    ),
    "float32": (
        lambda: cf.ridge(X[:, [0, 1, 0, 1]].float(), Y.float(), 1e-8),
        ohg.SolverError,
        "Or use float64",
    ),
    "not symmetric": (
        lambda: cf.kernel_ridge(K.tril(), Y, 1.0),
        ohg.ProblemError,
        "kernel is not symmetric",
    ),
    "not square": (lambda: cf.kernel_ridge(X, Y, 1.0), ohg.ProblemError, "square"),
    "an indefinite kernel": (
        lambda: cf.kernel_ridge(K - 5.0, Y, 0.1),
        ohg.SolverError,
        "singular to rounding",
    ),
    "no length": (
        lambda: cf.rbf_kernel(X, length_scale=0.0),
        ohg.HyperparameterError,
        "length_scale must be positive",
    ),
    "lengths of other features": (
        lambda: cf.rbf_kernel(X, length_scale=torch.ones(2)),
        ohg.HyperparameterError,
        "one per feature",
    ),
    "other features": (lambda: cf.linear_kernel(X, X[:, :2]), ohg.ProblemError, "must be the same"),
    "a negative offset": (
        lambda: cf.polynomial_kernel(X, offset=-1.0),
        ohg.HyperparameterError,
        "offset",
    ),
    "no degree": (lambda: cf.polynomial_kernel(X, degree=0), ValueError, "degree >= 1"),
    "kernel of another shape": (
        lambda: cf.kernel_inducing_points(lambda a, b: a, X, Y, X),
        ohg.ProblemError,
        "must give",
    ),
    "predictions from other features": (
        lambda: cf.ridge(X, Y, 1.0).predict(X[:, :2]),
        ohg.ProblemError,
        r"has shape \(6, 2\), so 2 columns, .*fitted to 3 features",
    ),
    "predictions of several targets from other features": (
        lambda: cf.ridge(X, X[:, :2], 1.0).predict(randn(5, 2, seed=3)),
        ohg.ProblemError,
        r"has shape \(5, 2\), so 2 columns, .*fitted to 3 features",
    ),
    "negative classes": (
        lambda: cf.ridge_head(X, torch.arange(6) - 1, 1.0),
        ohg.ProblemError,
        "from 0 on",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_solved_is_refused_in_words(what: str) -> None:
    call, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message):
        call()
