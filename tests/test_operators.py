"""Operators: the Fisher information, several batches, half precision, random masks and running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import F64, randn, relative_error
from torch import Tensor
from torch.func import functional_call, hessian, jacrev

import optuna_hypergrad as ohg
from optuna_hypergrad.dense import dense
from optuna_hypergrad.operators import AveragedOperator, InnerGraph, MatrixOperator

Params = dict[str, Tensor]
X, XV = randn(12, 4, seed=1), randn(12, 4, seed=2)
LAM = {"log_decay": torch.linspace(-3, -1, 4, dtype=F64)}
W = {"w": randn(4, 3, seed=3), "b": randn(3, seed=4)}


def model(w: Params, lam: Params, batch: Any = None) -> Tensor:
    x = X if batch is None else X[batch]
    return (x @ w["w"]).tanh() @ (0.3 + torch.eye(3, dtype=F64)) + w["b"]


def decay(w: Params, lam: Params, batch: Any = None) -> Tensor:
    return (lam["log_decay"].exp()[:, None] * w["w"] ** 2).sum() + 0.1 * (w["b"] ** 2).sum()


def targets(likelihood: str, batch: Any = None) -> Tensor:
    y = {
        "categorical": torch.arange(12) % 3,
        "bernoulli": (randn(12, 3, seed=5) > 0).double(),
        "gaussian": randn(12, 3, seed=6),
    }[likelihood]
    return y if batch is None else y[batch]


def log_loss(likelihood: str, outputs: Tensor, y: Tensor) -> Tensor:
    if likelihood == "categorical":
        return torch.nn.functional.cross_entropy(outputs, y)
    if likelihood == "bernoulli":
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        return bce(outputs, y, reduction="none").sum(1).mean()
    return 0.5 * ((outputs - y) ** 2).sum(1).mean()


def inner(likelihood: str = "categorical") -> Any:
    def objective(w: Params, lam: Params, batch: Any) -> Tensor:
        y = targets(likelihood, batch)
        return log_loss(likelihood, model(w, lam, batch), y) + decay(w, lam)

    return objective


def graph_of(likelihood: str, batch: Any = None) -> InnerGraph:
    return InnerGraph(inner(likelihood), W, LAM, batch)


LIKELIHOODS = ["categorical", "bernoulli", "gaussian"]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_fisher_information_is_gauss_newton_without_a_look_at_the_targets(
    likelihood: Any,
) -> None:
    graph = graph_of(likelihood)
    fisher = dense(ohg.Fisher(model, likelihood, decay).build(graph, None), 99)
    y = targets(likelihood)
    gauss_newton = ohg.GaussNewton(model, lambda out, lam, _: log_loss(likelihood, out, y), decay)
    exact = dense(gauss_newton.build(graph, None), 99)
    assert float((fisher - exact).norm() / exact.norm()) < 1e-13
    assert float(torch.linalg.eigvalsh(fisher)[0]) > 0
    scaled = dense(ohg.Fisher(model, likelihood, scale=3.0).build(graph, None), 99)
    bare = dense(ohg.Fisher(model, likelihood).build(graph, None), 99)
    assert float((scaled - 3 * bare).norm() / bare.norm()) < 1e-13


def test_the_fisher_information_is_the_expectation_that_it_is_named_for() -> None:
    """Sum over all classes of p(y) g g^T, sample by sample, by per-sample Jacobians."""
    graph = graph_of("categorical")
    layout = graph.layout
    u = layout.flatten(list(W.values()))

    def logs(u: Tensor) -> Tensor:
        return model(layout.unflatten(u), LAM).log_softmax(1)

    p, slopes = logs(u).exp(), jacrev(logs)(u)  # (n, c), (n, c, P)
    exact = torch.einsum("nc,ncp,ncq->pq", p, slopes, slopes) / len(X)
    found = dense(ohg.Fisher(model).build(graph, None), 99)
    assert float((found - exact).norm() / exact.norm()) < 1e-13
    observed = slopes[torch.arange(12), targets("categorical")]
    empirical = observed.T @ observed / len(X)
    assert float((found - empirical).norm() / exact.norm()) > 0.3


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_sampled_targets_give_the_expectation_in_the_long_run(likelihood: Any) -> None:
    graph = graph_of(likelihood)
    exact = dense(ohg.Fisher(model, likelihood).build(graph, None), 99)
    errors = []
    for num_samples in (30, 30_000):
        sampled = ohg.Fisher(model, likelihood, num_samples=num_samples, seed=1)
        found = dense(sampled.build(graph, None), 99)
        assert float((found - found.mT).norm() / exact.norm()) < 1e-13
        assert torch.equal(found, dense(sampled.build(graph, None), 99))
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 0.02 < errors[0]


def test_a_fisher_hypergradient_says_that_it_is_one() -> None:
    problem = ohg.BilevelProblem(inner(), lambda w, lam, _: ((XV @ w["w"]) ** 2).mean())
    w = ohg.inner_solve(problem, ohg.NewtonCG(atol=1e-11), W, LAM).inner_params
    exact, found, product = (
        ohg.hypergradient(problem, w, LAM, estimator=ohg.Implicit(ohg.CG(100, 1e-12), curvature=c))
        for c in (
            ohg.Hessian(),
            ohg.Fisher(model, regularizer=decay),
            ohg.GaussNewton(
                model,
                lambda out, lam, _: log_loss("categorical", out, targets("categorical")),
                decay,
            ),
        )
    )
    assert found.stats["exact_hessian"] == 0.0
    assert relative_error(found.value, product.value) < 1e-9
    assert 1e-2 < relative_error(found.value, exact.value) < 1.0  # a bias


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"likelihood": "poisson"}, '"categorical", "bernoulli" or "gaussian"'),
        ({"num_samples": 0}, "num_samples >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"scale": 0.0}, "positive finite scale"),
    ],
)
def test_fisher_settings_that_make_no_sense_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ohg.Fisher(model, **settings)


def test_a_model_that_ignores_the_inner_params_is_refused() -> None:
    with pytest.raises(ohg.ObjectiveError, match="Fisher: outputs"):
        ohg.Fisher(lambda w, lam, batch: X[:, :3]).build(graph_of("categorical"), None)


# Several batches --------------------------------------------------------------------------------

PARTS = [torch.arange(4), torch.arange(4, 8), torch.arange(8, 12)]


def in_parts() -> ohg.BilevelProblem:
    return ohg.BilevelProblem(
        inner(), lambda w, lam, _: ((XV @ w["w"]) ** 2).mean(), inner_batch=lambda i: PARTS[i % 3]
    )


def test_the_mean_of_operators_is_that_of_their_matrices() -> None:
    matrices = [randn(5, 5, seed=i) for i in range(3)]
    matrices = [m + m.T for m in matrices]
    operator = AveragedOperator([MatrixOperator(m) for m in matrices])
    v = randn(5, seed=9)
    mean = sum(matrices) / 3
    assert torch.allclose(operator(v), mean @ v, rtol=1e-13)
    assert torch.allclose(operator.each(v), torch.stack([m @ v for m in matrices]), rtol=1e-13)
    assert torch.allclose(dense(operator, 5), mean, rtol=1e-13)
    assert operator.symmetric


@pytest.mark.parametrize(
    "curvature",
    [
        ohg.Hessian(),
        ohg.Fisher(model, regularizer=decay),
        ohg.GaussNewton(
            model,
            lambda out, lam, batch: log_loss("categorical", out, targets("categorical", batch)),
            decay,
        ),
    ],
    ids=lambda c: type(c).__name__,
)
def test_all_parts_together_are_the_whole(curvature: Any) -> None:
    whole = ohg.BilevelProblem(inner(), in_parts().outer_objective)
    w = ohg.inner_solve(whole, ohg.NewtonCG(atol=1e-11), W, LAM).inner_params
    exact, found, one = (
        ohg.hypergradient(
            p,
            w,
            LAM,
            estimator=ohg.Implicit(ohg.CG(100, 1e-12), curvature=curvature, num_batches=n),
        )
        for p, n in ((whole, 1), (in_parts(), 3), (in_parts(), 1))
    )
    assert relative_error(found.value, exact.value) < 1e-9
    assert relative_error(one.value, exact.value) > 1e-2
    assert found.stats["inner_gradient_norm"] < 1e-9


def test_a_check_finds_a_regularizer_that_was_not_given_to_the_fisher_information() -> None:
    """The docstring says so, since nothing else notices. The model is linear: with it, the matrix is the Hessian."""

    def linear(w: Params, lam: Params, batch: Any = None) -> Tensor:
        return X @ w["w"] + w["b"]

    problem = ohg.BilevelProblem(
        lambda w, lam, _: log_loss("gaussian", linear(w, lam), targets("gaussian")) + decay(w, lam),
        in_parts().outer_objective,
    )
    for regularizer, right in ((decay, True), (None, False)):
        curvature = ohg.Fisher(linear, "gaussian", regularizer)
        found = ohg.check_hypergradient(
            problem,
            W,
            LAM,
            estimator=ohg.Implicit(ohg.Direct(), curvature=curvature),
            inner_solver=ohg.NewtonCG(atol=1e-11),
            num_directions=1,
        )
        assert bool(found) == right, str(found)


def test_several_batches_are_refused_where_there_are_none_or_they_are_compiled() -> None:
    whole = ohg.BilevelProblem(inner(), in_parts().outer_objective)
    with pytest.raises(ohg.RequirementError, match="sees all data at once"):
        ohg.hypergradient(whole, W, LAM, estimator=ohg.Implicit(num_batches=2))
    with pytest.raises(ValueError, match="num_batches >= 1"):
        ohg.Implicit(num_batches=0)
    kfac = ohg.KFAC(torch.nn.Linear(2, 2), lambda batch: batch, "squared")
    with pytest.raises(ValueError, match=r"num_batches=2\): KFAC looks at the inputs of one batch"):
        ohg.Implicit(ohg.CG(preconditioner=kfac), num_batches=2)
    with pytest.raises(ValueError, match="compile=False with num_batches > 1"):
        ohg.Implicit(num_batches=2, compile=True)
    with pytest.raises(ValueError, match="Implicit needs Hessian"):
        ohg.Implicit(curvature="hessian")  # type: ignore[arg-type]


# Half precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_a_half_precision_model_has_the_hypergradient_of_single_precision(
    dtype: torch.dtype, rtol: float
) -> None:
    """Products in half precision, everything between them in float32: a few roundings of the dtype."""
    n, p = 256, 40
    x, y = randn(n, p, seed=11).float(), (randn(n, seed=12) > 0).float()

    def objective(w: Params, lam: Params, _: None) -> Tensor:
        logits = x.to(w["w"].dtype) @ w["w"] + w["b"]
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), y)
        return (
            each
            + 0.5 * (lam["log_decay"].exp() * w["w"].float() ** 2).sum()
            + 0.1 * w["b"].float() ** 2
        )

    def outer(w: Params, lam: Params, _: None) -> Tensor:
        return ((x[:32].to(w["w"].dtype) @ w["w"]).float() ** 2).mean() + (
            w["w"].float() ** 3
        ).sum()

    problem = ohg.BilevelProblem(objective, outer)
    lam = {"log_decay": torch.linspace(-3, -1, p)}
    start = {"w": torch.zeros(p), "b": torch.zeros(())}
    w = ohg.inner_solve(problem, ohg.LBFGS(), start, lam).inner_params
    exact = ohg.hypergradient(problem, w, lam, estimator=ohg.Implicit(ohg.CG(100, 1e-6)))
    half = {k: v.to(dtype) for k, v in w.items()}
    found = ohg.hypergradient(problem, half, lam, estimator=ohg.Implicit(ohg.CG(100, 1e-3)))
    assert found.value["log_decay"].dtype == torch.float32
    assert relative_error(found.value, exact.value) < rtol
    graph = InnerGraph(objective, half, lam, None)
    assert graph.layout.dtype == torch.float32
    v = torch.ones(graph.layout.size)
    assert graph.hvp(v).dtype == graph.hvp_many(v[None]).dtype == torch.float32


# Random masks and running statistics --------------------------------------------------------------


def hypergradient_by_hand(objective: Any, outer: Any, w: Tensor, lam: Tensor) -> Tensor:
    h = hessian(objective)(w, lam)
    (b,) = jacrev(outer, argnums=(0,))(w, lam)
    mixed = jacrev(jacrev(objective), argnums=1)(w, lam)
    return -mixed.T @ torch.linalg.solve(h, b)


@pytest.mark.parametrize("solver", [ohg.CG(100, 1e-12), ohg.Direct()], ids=lambda s: s.name)
def test_a_dropout_mask_is_drawn_once_for_all_products(solver: Any) -> None:
    y = randn(12, seed=8)

    def dropped(w: Tensor, lam: Tensor, mask: Tensor) -> Tensor:
        return (((X * mask) @ w - y) ** 2).mean() + (lam.exp() * w**2).sum()

    drawn: list[Tensor] = []

    def objective(w: Params, lam: Params, _: None) -> Tensor:
        drawn.append(torch.nn.functional.dropout(torch.ones_like(X), 0.5))
        return dropped(w["w"], lam["decay"], drawn[-1])

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return ((XV @ w) ** 2).mean()

    w, lam = randn(4, seed=13), torch.linspace(-2, -1, 4, dtype=F64)
    problem = ohg.BilevelProblem(objective, lambda w, lam, _: outer(w["w"], lam["decay"]))
    torch.manual_seed(3)
    found = ohg.hypergradient(
        problem, {"w": w}, {"decay": lam}, estimator=ohg.Implicit(solver)
    ).value
    assert len(drawn) == 1
    exact = hypergradient_by_hand(lambda w, lam: dropped(w, lam, drawn[0]), outer, w, lam)
    assert relative_error(found, {"decay": exact}) < 1e-10


def test_batch_normalization_sees_one_batch_once_for_all_products() -> None:
    """In ``train()`` mode: products use the batch's statistics, and the running ones move once a solve."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Tanh())
    net = torch.nn.Sequential(net, torch.nn.Linear(3, 1)).double()
    y = randn(12, seed=8)
    names = {k: v.shape for k, v in net.named_parameters()}
    flat = torch.cat([v.detach().reshape(-1) for v in net.parameters()])

    def unflatten(u: Tensor) -> Params:
        parts = torch.split(u, [s.numel() for s in names.values()])
        return {k: p.view(s) for (k, s), p in zip(names.items(), parts, strict=True)}

    def objective(w: Params, lam: Params, _: None) -> Tensor:
        fit = ((functional_call(net, w, (X,))[:, 0] - y) ** 2).mean()
        return fit + (lam["decay"].exp() * torch.stack([(v**2).sum() for v in w.values()])).sum()

    norm = net[0][1]
    lam = {"decay": torch.zeros(len(names), dtype=F64)}
    problem = ohg.BilevelProblem(objective, lambda w, lam, _: sum((v**3).sum() for v in w.values()))
    w = {k: v.detach() for k, v in net.named_parameters()}
    before = int(norm.num_batches_tracked)
    found = ohg.hypergradient(problem, w, lam, estimator=ohg.Implicit(ohg.CG(200, 1e-13)))
    assert found.stats["num_hvps"] > 5
    assert int(norm.num_batches_tracked) == before + 1

    def batch_norm(h: Tensor, w: Params) -> Tensor:
        centered = h - h.mean(0)
        spread = (centered.square().mean(0) + norm.eps).sqrt()
        return centered / spread * w["0.1.weight"] + w["0.1.bias"]

    def by_hand(u: Tensor, decay: Tensor) -> Tensor:
        w = unflatten(u)
        hidden = batch_norm(X @ w["0.0.weight"].T + w["0.0.bias"], w).tanh()
        fit = (((hidden @ w["1.weight"].T)[:, 0] + w["1.bias"] - y) ** 2).mean()
        return fit + (decay.exp() * torch.stack([(v**2).sum() for v in w.values()])).sum()

    exact = hypergradient_by_hand(by_hand, lambda u, lam: (u**3).sum(), flat, lam["decay"])
    assert relative_error(found.value, {"decay": exact}) < 1e-9
