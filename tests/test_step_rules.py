"""Step rules: convergence, bounds, taking back, noise, scale invariance, resumption bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from optuna_hypergrad.step_rules import (
    AUTO,
    REGISTRY,
    AbstractStepRule,
    Proposal,
    StepState,
    TrustRegion,
    make_step_rule,
)
from optuna_hypergrad.step_rules._quadratic import minimize_in_box, secant_model

F64 = torch.float64
Params = dict[str, Tensor]
Loss = Callable[[Params, int], Tensor]

FACTORIES = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.1),
    "torch-rprop": functools.partial(torch.optim.Rprop, lr=0.5),
    "adamax": functools.partial(torch.optim.Adamax, lr=0.3),
}
RULES = {name: name for name in sorted(REGISTRY) if name != "torch"} | FACTORIES | {"auto": "auto"}


@dataclasses.dataclass
class Run:
    values: list[float]
    points: list[Params]
    proposal: Proposal


def run(
    optimizer: object,
    loss: Loss,
    start: Params,
    lower: float | dict[str, float] = -5.0,
    upper: float | dict[str, float] = 5.0,
    steps: int = 60,
    bad: Callable[[int, float], tuple[float, bool] | None] = lambda i, v: None,
    restart: bool = False,
    on: bool = True,
) -> Run:
    rule = make_step_rule(optimizer)  # type: ignore[arg-type]
    low = lower if isinstance(lower, dict) else dict.fromkeys(start, lower)
    high = upper if isinstance(upper, dict) else dict.fromkeys(start, upper)
    point, state = start, rule.init(start, low, high)
    proposal = Proposal(point, state)
    values, points = [], []
    for i in range(steps):
        leaves = {k: v.detach().clone().requires_grad_(True) for k, v in point.items()}
        value = loss(leaves, i)
        gradient = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        number = float(value.detach())
        broken = bad(i, number)
        if broken is not None:
            number, failed = broken
            gradient = {} if failed else {k: g * math.nan for k, g in gradient.items()}
        values.append(number)
        points.append(point)
        if restart:
            state = reloaded(state)
            rule = make_step_rule(optimizer)  # type: ignore[arg-type]
        proposal = rule.step(state, point, number, gradient, low, high)
        point, state = proposal.point, proposal.state
        assert point.keys() == start.keys()
        for k, v in point.items():
            assert v.dtype == start[k].dtype
            assert v.shape == start[k].shape
            assert bool(((v.double() >= low[k]) & (v.double() <= high[k])).all())
        json.dumps(state.numbers, allow_nan=False)
        if proposal.stop is not None and on:
            break
    return Run(values, points, proposal)


def reloaded(state: StepState) -> StepState:
    tensors = {f"t/{k}": v for k, v in state.tensors.items()}
    return StepState(
        {k.removeprefix("t/"): v for k, v in load(save(tensors)).items()},
        json.loads(json.dumps(state.numbers)),
    )


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def sphere(p: Params, i: int) -> Tensor:
    return torch.stack([((v.double() - 0.7) ** 2).sum() for v in p.values()]).sum()


def rosenbrock(p: Params, i: int) -> Tensor:
    x = p["x"]
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(condition: float, d: int = 20) -> Loss:
    rotation = torch.linalg.qr(randn(d, d, d))[0]
    spectrum = torch.logspace(0, -math.log10(condition), d, dtype=F64)
    hessian, center = rotation @ torch.diag(spectrum) @ rotation.T, 3 * randn(1, d).tanh()
    return lambda p, i: 0.5 * (p["x"] - center) @ hessian @ (p["x"] - center)


def saturating(p: Params, i: int) -> Tensor:
    """Like decays: each entry matters a thousand times less where it starts, and runs to a bound."""
    weight = torch.logspace(0, -3, 30, dtype=F64)
    return (
        weight * torch.sigmoid(p["x"][:30] * torch.tensor([1.0, -1.0], dtype=F64).repeat(15))
    ).sum()


@pytest.mark.parametrize("name", RULES)
def test_reaches_a_minimum_inside_the_bounds(name: str) -> None:
    start = {"x": torch.full((4,), -3.0, dtype=F64), "s": torch.tensor(4.0, dtype=F64)}
    done = run(RULES[name], sphere, start, steps=100)
    assert min(done.values) < 1e-3 * done.values[0]


@pytest.mark.parametrize("name", RULES)
def test_bounds_hold_exactly_in_every_dtype_and_bind(name: str) -> None:
    start = {
        "half": torch.full((3,), 0.3, dtype=torch.bfloat16),
        "single": torch.full((2, 2), 0.1, dtype=torch.float32),
        "scalar": torch.tensor(-0.2, dtype=F64),
    }
    low = {"half": -1 / 3, "single": -0.1, "scalar": -math.inf}
    high = {"half": 1 / 3, "single": math.pi / 10, "scalar": math.inf}
    done = run(RULES[name], sphere, start, low, high, steps=60)
    assert min(done.values) < done.values[0]
    last = done.proposal.point["single"]
    assert float(last.max()) <= math.pi / 10 < float(last.max()) + 1e-7


@pytest.mark.parametrize("name", RULES)
def test_a_run_that_is_reloaded_at_each_step_is_the_same_run_bit_for_bit(name: str) -> None:
    start = {"a/b": randn(0, 3, 2), "s": torch.tensor(1.0).double(), "f": randn(1, 5).float()}

    def loss(p: Params, i: int) -> Tensor:
        noise = randn(i, 1)[0] if i > 10 else 0.0
        return sphere(p, i) + (p["a/b"][0, 0] * p["s"]) ** 2 + noise

    straight = run(RULES[name], loss, start, steps=25, on=False)
    resumed = run(RULES[name], loss, start, steps=25, restart=True, on=False)
    assert straight.values == resumed.values
    for a, b in zip(straight.points, resumed.points, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["nan", "inf", "failed", "gradient"])
def test_a_step_without_a_finite_value_or_gradient_is_taken_back_and_shortened(
    name: str, kind: str
) -> None:
    def bad(i: int, value: float) -> tuple[float, bool] | None:
        if i not in (2, 3):
            return None
        return {
            "nan": (math.nan, False),
            "inf": (math.inf, True),
            "failed": (math.nan, True),
            "gradient": (value, False),
        }[kind]

    start = {"x": torch.full((4,), -3.0, dtype=F64)}
    done = run(RULES[name], sphere, start, bad=bad, steps=80)
    good = done.points[1] if done.values[1] < done.values[0] else done.points[0]
    moves = [float((done.points[i]["x"] - good["x"]).abs().max()) for i in (2, 3, 4)]
    assert moves[0] > moves[1] > moves[2] > 0
    assert min(done.values[4:]) < 0.1 * done.values[0]


@pytest.mark.parametrize("name", RULES)
def test_a_start_that_fails_ends_the_trajectory_with_a_sentence(name: str) -> None:
    start = {"x": torch.zeros(2, dtype=F64)}
    done = run(RULES[name], sphere, start, bad=lambda i, v: (math.nan, True))
    assert len(done.values) == 1
    assert "start elsewhere" in str(done.proposal.stop)


@pytest.mark.parametrize("name", RULES)
def test_a_region_without_values_beside_the_start_is_left(name: str) -> None:
    def loss(p: Params, i: int) -> Tensor:
        x = p["x"]
        return torch.where(x.max() > 0.5, math.nan, 1.0) * ((x - 0.4) ** 2).sum()

    done = run(RULES[name], loss, {"x": torch.zeros(3, dtype=F64)}, steps=80)
    assert min(v for v in done.values if math.isfinite(v)) < 0.1 * done.values[0]


@pytest.mark.parametrize("name", ["auto", "lbfgs"])
def test_converged_quadratics_stop_early_and_accurately(name: str) -> None:
    done = run(name, quadratic(10.0), {"x": torch.zeros(20, dtype=F64)}, steps=100)
    assert done.proposal.stop is not None
    assert len(done.values) <= 45
    assert min(done.values) < 1e-7 * done.values[0]
    done = run(name, sphere, {"x": randn(3, 200).clamp(-5, 5)}, steps=100)
    assert len(done.values) <= 25
    assert min(done.values) < 1e-8 * done.values[0]


def test_auto_is_fast_where_the_scale_is_bad_the_valley_curved_or_the_effect_tiny() -> None:
    done = run("auto", quadratic(1e4), {"x": torch.zeros(20, dtype=F64)})
    assert min(done.values) < 1e-3 * done.values[0]
    done = run("auto", rosenbrock, {"x": torch.tensor([-1.2, 1.0], dtype=F64)}, -2.0, 2.0)
    assert min(done.values) < 1e-6
    done = run("auto", saturating, {"x": torch.zeros(30, dtype=F64)}, -10.0, 5.0, steps=12)
    lowest = float(saturating({"x": torch.tensor([-10.0, 5.0], dtype=F64).repeat(15)}, 0))
    assert min(done.values) - lowest < 1e-2 * (done.values[0] - lowest)


@pytest.mark.parametrize("rule", [TrustRegion(power=1.0), "lbfgs"], ids=["power 1", "lbfgs"])
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_scale_of_the_loss_changes_nothing(rule: object, scale: float) -> None:
    start = {"x": torch.tensor([-1.2, 1.0], dtype=F64)}
    plain = run(rule, rosenbrock, start, -2.0, 2.0, steps=30)
    scaled = run(rule, lambda p, i: scale * rosenbrock(p, i), start, -2.0, 2.0, steps=30)
    assert [v * scale for v in plain.values] == scaled.values


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_scale_of_the_loss_changes_rounding_only(scale: float) -> None:
    """A power of a scaled gradient is rounded otherwise, and the curved valley amplifies that."""
    start = {"x": torch.tensor([-1.2, 1.0], dtype=F64)}
    plain = run("auto", rosenbrock, start, -2.0, 2.0, steps=10)
    scaled = run("auto", lambda p, i: scale * rosenbrock(p, i), start, -2.0, 2.0, steps=10)
    assert [v * scale for v in plain.values] == pytest.approx(scaled.values, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_auto_recognizes_noise_and_does_not_freeze(seed: int) -> None:
    def loss(p: Params, i: int) -> Tensor:
        draw = randn(1000 * seed + i, 21)
        return (p["x"] ** 2).sum() + 2.0 * draw[:20] @ p["x"] + 10.0 * draw[20]

    done = run("auto", loss, {"x": 2.0 * randn(seed, 20).clamp(-2, 2)}, steps=80, on=False)
    assert "length" in done.proposal.state.numbers
    first, last = (float((done.points[i]["x"] ** 2).sum()) for i in (0, -1))
    assert last < 0.1 * first
    moved = (done.points[-1]["x"] - done.points[-2]["x"]).abs().max()
    assert float(moved) > 1e-3


@pytest.mark.parametrize("name", ["auto", "lbfgs"])
def test_smooth_losses_are_not_taken_for_noisy(name: str) -> None:
    for loss, start in (
        (rosenbrock, torch.tensor([-1.2, 1.0] * 3, dtype=F64)),
        (quadratic(1e3), torch.zeros(20, dtype=F64)),
        (saturating, torch.zeros(30, dtype=F64)),
    ):
        done = run(name, loss, {"x": start})
        assert "length" not in done.proposal.state.numbers


def test_an_explosion_teaches_the_model_nothing() -> None:
    def loss(p: Params, i: int) -> Tensor:
        x = p["x"]
        return (x**2).sum() + torch.exp(40 * (-x - 2.5)).sum()

    done = run("auto", loss, {"x": torch.full((5,), 2.0, dtype=F64)}, -50.0, 50.0)
    assert min(done.values) < 1e-6


def test_the_state_of_a_million_entries_is_fourteen_bytes_each() -> None:
    n = 1_000_000
    start = {"x": torch.linspace(-1, 1, n, dtype=torch.float32)}
    done = run("auto", lambda p, i: ((p["x"] - 0.5) ** 2).mean(), start, steps=6)
    tensors = done.proposal.state.tensors
    assert sum(v.numel() * v.element_size() for v in tensors.values()) <= 14 * n
    assert min(done.values) < 1e-2 * done.values[0]


def test_a_diverging_optimizer_is_taken_back_and_converges() -> None:
    factory = functools.partial(torch.optim.SGD, lr=1.3)
    done = run(factory, sphere, {"x": torch.full((4,), -1.0, dtype=F64)}, -math.inf, math.inf)
    assert done.proposal.state.numbers["fraction"] < 1.0
    assert min(done.values) < 1e-3 * done.values[0]


def test_what_is_no_step_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'adam', 'lbfgs', 'torch', 'trust_region'"):
        make_step_rule("adan")
    with pytest.raises(TypeError, match=r"functools\.partial"):
        make_step_rule(3)  # type: ignore[arg-type]
    rule = make_step_rule(torch.optim.LBFGS)
    with pytest.raises(ValueError, match="optimizer='lbfgs'"):
        rule.init({"x": torch.zeros(2)}, {"x": -1.0}, {"x": 1.0})


def test_names_make_rules() -> None:
    assert isinstance(make_step_rule("auto"), AUTO)
    rule = AUTO(history=3)
    assert make_step_rule(rule) is rule
    for name, cls in REGISTRY.items():
        assert issubclass(cls, AbstractStepRule)
        assert cls.name == name
        assert cls.__doc__


@pytest.mark.parametrize("size", [1, 2, 30, 100])
def test_the_model_of_arrays_is_that_of_tensors(size: int) -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(4, size))
    root = rng.normal(size=(size, size))
    changes = steps @ (root @ root.T + np.eye(size))
    diagonal, slope = rng.uniform(0.5, 2.0, size), rng.normal(size=size)
    low, high = -rng.uniform(0.0, 1.0, size), rng.uniform(0.0, 1.0, size)
    given = (diagonal, steps, changes)
    product, same = secant_model(*given), secant_model(*map(torch.as_tensor, given))
    v = rng.normal(size=size)
    assert product(v) == pytest.approx(same(torch.as_tensor(v)).numpy(), rel=1e-9, abs=1e-12)
    assert product(steps[-1]) == pytest.approx(changes[-1], rel=1e-7)  # the newest pair is exact
    found = minimize_in_box(slope, product, diagonal, low, high, 10)
    tensors = map(torch.as_tensor, (diagonal, low, high))
    expected = minimize_in_box(torch.as_tensor(slope), same, *tensors, 10)
    assert found[0] == pytest.approx(expected[0].numpy(), rel=1e-6, abs=1e-9)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)
    assert (low <= found[0]).all()
    assert (found[0] <= high).all()
