"""The Gauss-Newton preconditioner against matrices that are written out, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import networks
import pytest
import torch
from problems import F64, Params, randn
from torch import Tensor, nn

import optuna_hypergrad as ohg
from optuna_hypergrad.dense import dense
from optuna_hypergrad.ihvp._samples import SampledLayer
from optuna_hypergrad.operators import (
    AbstractLinearOperator,
    DampedOperator,
    HessianOperator,
    InnerGraph,
)


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


class Twice(nn.Module):
    """One layer is called twice, the second time on what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.again(self.first(x).tanh()).tanh()).tanh())


class Places(nn.Module):
    """A linear layer at two places of each sample: too few for its gradients to be written out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(torch.stack([x, x.flip(1) ** 2], 1)).tanh().sum(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5, 1)), nn.Conv2d(1, 2, (3, 1), padding=(2, 0)), nn.ReLU(inplace=True),
        nn.Conv2d(2, 2, (2, 1), bias=False, stride=(2, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.BatchNorm1d(6).eval(), nn.Linear(6, 3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "twice": Twice,
    "places": Places,
    "normalized": normalized,
}
ROWS = 13
WEIGHTS = torch.linspace(0.0, 2.0, ROWS, dtype=F64)


class Net:
    """A model, and its Gauss-Newton terms by ``torch.func``, which knows nothing of layers."""

    def __init__(self, name: str, loss: str, weighted: bool = False, scale: float = 1.0) -> None:
        self.model = networks.initialized(MODELS[name](), seed=20)
        self.x, self.loss = randn(ROWS, 5, seed=1), loss
        self.y = torch.arange(ROWS) % 3 if loss == "cross_entropy" else randn(ROWS, 3, seed=2)
        self.weights = WEIGHTS if weighted else torch.ones(ROWS, dtype=F64)
        self.scale = scale
        self.w = {k: v.detach() for k, v in self.model.named_parameters()}
        self.settings: dict[str, object] = {
            "model": self.model,
            "inputs": lambda _: self.x,
            "loss": loss,
        }
        if name == "normalized":
            self.settings["uncovered"] = "per_sample"
        if weighted:
            self.settings["weights"] = lambda lam, _: lam["weights"]
        if scale != 1.0:
            self.settings["scale"] = scale

    def inner(self, w: Params, lam: Params, batch: object) -> Tensor:
        outputs = torch.func.functional_call(self.model, w, (self.x,))
        if self.loss == "cross_entropy":
            each = nn.functional.cross_entropy(outputs, self.y, reduction="none")
        else:
            each = 0.5 * (outputs - self.y).square().sum(1)
        return (self.scale * self.weights * each).mean()

    def operator(self) -> HessianOperator:
        return HessianOperator(InnerGraph(self.inner, self.w, {"weights": self.weights}, None))

    def terms(self) -> Tensor:
        """``(samples * outputs, P)``: ``G = terms^T terms``."""

        def one(w: Params, x: Tensor) -> Tensor:
            return torch.func.functional_call(self.model, w, (x[None],))[0]

        jacobians = torch.func.vmap(torch.func.jacrev(one), in_dims=(None, 0))(self.w, self.x)
        slopes = torch.cat([j.flatten(2) for j in jacobians.values()], 2)  # (n, outputs, P)
        eye = torch.eye(3, dtype=F64).expand(ROWS, 3, 3)
        if self.loss == "cross_entropy":
            p = torch.func.functional_call(self.model, self.w, (self.x,)).softmax(1)
            eye = p.sqrt()[:, :, None] * (eye - p[:, None])
        each = (self.scale * self.weights / ROWS).sqrt()[:, None, None]
        return (each * eye @ slopes).flatten(0, 1).detach()


@pytest.mark.parametrize("damping", [1e-5, 0.3])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("name", list(MODELS))
def test_all_terms_are_the_damped_gauss_newton_matrix(name, loss, damping: float) -> None:
    net = Net(name, loss, weighted=damping > 0.1, scale=1.0 if damping > 0.1 else 3.0)
    base, u = net.operator(), net.terms()
    found = ohg.GaussNewtonPreconditioner(**net.settings, damping=0.4 * damping, rank=3 * ROWS)
    v = randn(base.size, seed=3)
    exact = torch.linalg.solve(u.mT @ u + damping * torch.eye(base.size, dtype=F64), v)
    assert off(found.build(DampedOperator(base, 0.6 * damping))(v), exact) < 1e-10
    assert base.num_products == 0
    assert found.factorize(base).stats["preconditioner_kept"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_largest_terms_are_kept(name: str) -> None:
    net = Net(name, "cross_entropy", weighted=True)
    base, every = net.operator(), net.terms()
    given = ohg.GaussNewtonPreconditioner(**net.settings, rank=11)
    count = int(given.factorize(base).stats["gauss_newton_passes"]) - 1
    p = torch.func.functional_call(net.model, net.w, (net.x,)).softmax(1).detach()
    each = p * (
        1 - 2 * p + p.square().sum(1, keepdim=True)
    )  # of the loss's curvature by the outputs
    best = each.argsort(1, descending=True)[:, :count]
    share = (WEIGHTS[:, None] * each.gather(1, best)).sum() / (WEIGHTS[:, None] * each).sum()
    assert share > 0.95
    looked = every[(3 * torch.arange(ROWS)[:, None] + best).flatten()]
    sizes = looked.square().sum(1)
    u = looked[sizes.argsort(descending=True)[:11]]
    left = (sizes.sum() - u.square().sum()) / (len(looked) - 11)
    v, eye = randn(base.size, seed=3), torch.eye(base.size, dtype=F64)
    for damping, rho in ((1e-3, 1e-3), (0.0, float(left))):
        operator = DampedOperator(base, damping) if damping else base
        assert off(given.build(operator)(v), torch.linalg.solve(u.mT @ u + rho * eye, v)) < 1e-8


def directions(net: Net, factors: ohg.ihvp.Factors, operator: AbstractLinearOperator) -> Tensor:
    """``e_j a^T`` of all layers as flat rows."""
    found, graph = [], InnerGraph(net.inner, net.w, {"weights": net.weights}, None)
    settings = ohg.GaussNewtonPreconditioner(**net.settings)
    for layer in settings.layers(graph, SampledLayer):
        axis = factors.tensors[f"{layer.name}/axis"]
        for j in range(layer.shape[0]):
            matrix = torch.zeros(layer.shape[0], len(axis), dtype=F64)
            matrix[j] = axis
            parts = {k: torch.zeros_like(p) for k, p in net.w.items()} | layer.tensors(matrix)
            found.append(graph.layout.flatten([parts[k] for k in net.w], copy=True))
    return torch.stack(found)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_targets_add_the_second_derivatives_of_layers(loss: str) -> None:
    """Of one hidden layer whose outputs bend by themselves, so that random signs are exact."""
    net = Net("perceptron", loss, weighted=True)
    net.model = networks.initialized(
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), seed=20
    )
    net.w = {k: v.detach() for k, v in net.model.named_parameters()}
    net.settings["model"] = net.model
    base, u, damping = net.operator(), net.terms(), 1.0
    given = ohg.GaussNewtonPreconditioner(**net.settings, targets=lambda _: net.y, rank=3 * ROWS)
    factors = given.factorize(base)
    rows = directions(net, factors, base)
    residual = dense(base, base.size) - u.mT @ u
    exact = torch.einsum("ji,ik,jk->j", rows, residual, rows)
    found = torch.cat([factors.tensors[f"{k}/rest"] for k in ("0", "2")])
    assert off(found, exact.clamp_min(0)) < 1e-10
    assert float(exact.min()) < -1e-3 < 1e-3 < float(exact.max())
    assert {len(factors.tensors[f"{k}/rest"]) for k in ("0", "2")} == {6, 3}
    eye = torch.eye(base.size, dtype=F64)
    held = torch.einsum(
        "ji,ik,jk->j", rows, u.mT @ u, torch.linalg.solve(u.mT @ u + damping * eye, rows.mT).mT
    )
    stiff = found * (1 - 2 * held).clamp_min(0)
    assert float(stiff.max()) > 1e-3
    matrix = u.mT @ u + damping * eye + rows.mT @ (stiff[:, None] * rows)
    v = randn(base.size, seed=3)
    inverse = given.inverse(factors, DampedOperator(base, damping))
    assert off(inverse(v), torch.linalg.solve(matrix, v)) < 1e-10


def test_random_signs_of_each_sample_average_to_the_second_derivatives() -> None:
    net = Net("convolutions", "cross_entropy")
    base, u = net.operator(), net.terms()
    given = ohg.GaussNewtonPreconditioner(**net.settings, targets=lambda _: net.y, rank=3 * ROWS)
    drawn = []
    for seed in range(200):
        factors = replace(given, seed=seed).factorize(base)
        drawn.append(torch.cat([factors.tensors[f"{k}/rest"] for k in ("1", "3", "6")]))
    rows = directions(net, factors, base)
    residual = dense(base, base.size) - u.mT @ u
    exact = torch.einsum("ji,ik,jk->j", rows, residual, rows)
    mean, error = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 200**0.5
    sure = torch.stack(drawn).gt(0).all(0)  # never cut off at 0
    assert int(sure.sum()) >= 1
    assert bool(((mean - exact)[sure].abs() < 4 * error[sure] + 1e-12).all())


def test_a_classifier_that_is_sure_needs_few_terms() -> None:
    """40 samples, 2,728 weights: half of the terms save 6 of 10 steps of plain CG, targets or not."""
    model = networks.initialized(
        nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 4)),
        seed=3,
    )
    x, y = randn(40, 20, seed=1), torch.arange(40) % 4

    def inner(w: Params, lam: Params, batch: object) -> Tensor:
        outputs = torch.func.functional_call(model, w, (x,))
        decay = torch.stack([v.square().sum() for v in w.values()]).sum()
        return nn.functional.cross_entropy(outputs, y) + 0.5e-4 * decay

    start = {k: v.detach() for k, v in model.named_parameters()}
    problem, lam = ohg.BilevelProblem(inner, inner), {"unused": torch.zeros(1)}
    w = ohg.inner_solve(problem, ohg.LBFGS(), start, lam, num_steps=200).inner_params
    operator = DampedOperator(HessianOperator(InnerGraph(inner, w, {}, None)), 1e-4)
    b = randn(operator.size, seed=5)
    plain = ohg.linear_solve(ohg.CG(2000, 1e-6, True), operator, b)
    for targets in (None, lambda _: y):
        given = ohg.GaussNewtonPreconditioner(
            model, lambda _: x, "cross_entropy", targets, damping=1e-4, rank=80
        )
        found = ohg.linear_solve(ohg.CG(2000, 1e-6, True, preconditioner=given), operator, b)
        assert found.num_products < 0.4 * plain.num_products
        assert off(found.x, plain.x) < 1e-4


def test_single_precision_keeps_the_map_positive_definite() -> None:
    net = Net("perceptron", "cross_entropy")
    net.model, net.x = net.model.float(), net.x.float()
    net.w = {k: v.float() for k, v in net.w.items()}
    net.weights = net.weights.float()
    base = net.operator()
    inverse = ohg.GaussNewtonPreconditioner(**net.settings).build(DampedOperator(base, 1e-8))
    v = randn(50, base.size, seed=3).float()
    assert min(float(torch.dot(r, inverse(r))) for r in v) > 0
    assert inverse(v[0]).dtype == torch.float32


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Folded(nn.Module):
    """Its layer sees two rows of each sample as two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.cat([x, x])).unflatten(0, (2, len(x))).sum(0)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).tanh())


def of(model: nn.Module, **settings: object) -> Callable[[], object]:
    """Make a preconditioner of a model's summed squares."""

    def go() -> object:
        net = model.double()
        x = randn(6, 5, seed=1)
        w = {k: v.detach() for k, v in net.named_parameters()}
        graph = InnerGraph(
            lambda w, lam, _: torch.func.functional_call(net, w, (x,)).square().sum(), w, {}, None
        )
        given = {"inputs": lambda _: x, "loss": "cross_entropy", **settings}
        made = ohg.GaussNewtonPreconditioner(net, **given)  # type: ignore[arg-type]
        return made.build(DampedOperator(HessianOperator(graph), 0.1))(
            randn(graph.layout.size, seed=2)
        )

    return go


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of(Tied()), "'a' and 'b' share a weight.*Call one module twice"),
        (of(Folded()), "'a' is applied to 12 rows where the model returns 6"),
        (of(Normed()), "does not cover the inner parameter 'norm.weight': LayerNorm 'norm'"),
        (
            of(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), uncovered="per_sample"),
            r"could not run the model on single samples.*'1.weight'.*eval\(\) mode",
        ),
        (of(nn.Linear(5, 3), memory_budget=1e3), r"would hold 3\.46e\+03 bytes.*Lower rank"),
        (of(nn.Linear(5, 3), weights=lambda lam, _: -torch.ones(6)), "one finite number >= 0"),
        (of(nn.Linear(5, 3), weights=lambda lam, _: torch.ones(5)), r"shape \(6,\); it returned \(5"),
        (of(nn.Linear(5, 3), targets=lambda _: torch.arange(5) % 3), "could not take the loss"),
        (
            of(nn.Linear(5, 3), loss="squared", targets=lambda _: torch.ones(6)),
            r"could not take the loss 'squared'.*\(6,\) for outputs \(6, 3\)",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_see_is_refused_in_words(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ohg.RequirementError, match=f"(?s)GaussNewtonPreconditioner.*{message}"):
        make()


def test_a_parameter_that_the_model_lacks_is_refused() -> None:
    net = Net("perceptron", "squared")
    net.settings["uncovered"] = "per_sample"
    w = net.w | {"offset": torch.zeros(3, dtype=F64)}
    graph = InnerGraph(
        lambda w, lam, _: (
            net.inner({k: v for k, v in w.items() if k != "offset"}, lam, None)
            + w["offset"].sum() ** 2
        ),
        w,
        {"weights": net.weights},
        None,
    )
    with pytest.raises(ohg.RequirementError, match="'offset' is none"):
        ohg.GaussNewtonPreconditioner(**net.settings).build(HessianOperator(graph))


def test_other_layers_may_be_scaled_by_the_mean_curvature() -> None:
    assert bool(of(Normed(), uncovered="identity")().isfinite().all())  # type: ignore[attr-defined]


def test_a_model_without_curvature_is_said_to_have_none() -> None:
    net = Net("perceptron", "squared")
    net.settings["weights"] = lambda lam, _: torch.zeros(ROWS)
    with pytest.raises(ohg.SolverError, match="no curvature at all"):
        ohg.GaussNewtonPreconditioner(**net.settings).build(net.operator())
    with pytest.raises(ohg.SolverError, match=r"NaN or infinite entries .* inputs\(batch\)"):
        of(nn.Linear(5, 3), inputs=lambda _: torch.full((6, 5), torch.nan, dtype=F64))()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "a torch.nn.Module as model"),
        ({"loss": "hinge"}, "loss to be one of"),
        ({"rank": 0}, "rank >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"memory_budget": 0}, "memory_budget > 0"),
        ({"targets": 3}, "targets= to be a function or None"),
        ({"weights": 3}, "weights= to be a function or None"),
        ({"damping": -1}, "damping >= 0"),
        ({"refresh_every": 0}, "refresh_every >= 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    given = {"model": nn.Linear(1, 1), "inputs": len, "loss": "squared", **settings}
    with pytest.raises(ValueError, match=f"GaussNewtonPreconditioner needs .*{message}"):
        ohg.GaussNewtonPreconditioner(**given)  # type: ignore[arg-type]
