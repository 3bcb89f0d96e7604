"""Reversible momentum descent: exact reversal, gradients of everything it sees, flat memory, and what it refuses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from problems import F64, randn, relative_error
from test_unrolling import PROBLEM, SIZES, by_hand, hypers, inner, outer, start
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import EstimatorState
from optuna_hypergrad.hypergradients._fixed_point import (
    DENOMINATOR,
    FixedPoint,
    NotReversedError,
    Rational,
)

Params = dict[str, Tensor]
MOMENTA = [0.1, 0.5, 0.9, 0.99, 1 / 3]


def gradient_at(w: Params, t: int) -> Params:
    return {"w": (3 * w["w"]).sin() + 0.3 * w["w"] + math.cos(t)}


def fractions(momentum: float) -> Rational:
    n = round(momentum * DENOMINATOR)
    return Rational({"w": n}, {"w": n}, n)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_two_thousand_steps_are_undone_bit_for_bit(momentum: float) -> None:
    w0, v0, m = {"w": randn(50, seed=1)}, {"w": randn(50, seed=2)}, fractions(momentum)
    exact = FixedPoint(w0, v0, 44)
    passed = []
    for t in range(2000):
        passed.append((exact._w["w"].clone(), exact._v["w"].clone(), exact._buffers["w"].clone()))
        exact.push(gradient_at(exact.inner_params(), t), m, t)
        exact.move({"w": 0.05 * exact.velocity()["w"]})
    assert (exact.num_bytes_aside() > 0) == (momentum < 0.99)
    for t in reversed(range(2000)):
        exact.unmove({"w": 0.05 * exact.velocity()["w"]})
        exact.unpush(gradient_at(exact.inner_params(), t), m, t)
        w, v, buffer = passed.pop()
        assert torch.equal(exact._w["w"], w)
        assert torch.equal(exact._v["w"], v)
        assert torch.equal(exact._buffers["w"], buffer)
    exact.check_start()
    assert exact.num_bytes_aside() == 0


EACH = torch.linspace(1, DENOMINATOR - 1, 50).to(torch.int64)


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 1 / 3, "each"])
def test_narrow_numbers_are_those_of_integers_in_doubles(momentum: Any) -> None:
    m = Rational({"w": EACH}, {"w": 1}, 65535) if momentum == "each" else fractions(momentum)
    w0, v0 = {"w": randn(50, seed=1).float()}, {"w": randn(50, seed=2).float()}
    exact, truth = FixedPoint(w0, v0, 44), FixedPoint(w0, v0, 44)
    truth._go_on_in_integers()
    passed = []

    def same() -> None:
        for name in ("_w", "_v", "_buffers"):
            found, known = getattr(exact, name)["w"], getattr(truth, name)["w"]
            assert (found.dtype, known.dtype) == (F64, torch.int64)
            assert torch.equal(found.to(torch.int64), known)

    for t in range(300):
        passed.append(0.1 * gradient_at(exact.inner_params(), t)["w"])
        for numbers in (exact, truth):
            numbers.push({"w": passed[t]}, m, t)
            numbers.move(0.05)
        same()
    assert exact.num_bytes_aside() > 0
    for t in reversed(range(300)):
        for numbers in (exact, truth):
            numbers.unmove(0.05)
        assert torch.equal(0.1 * gradient_at(exact.inner_params(), t)["w"], passed[t])
        for numbers in (exact, truth):
            numbers.unpush({"w": passed[t]}, m, t)
        same()
    exact.check_start()


def test_what_grows_out_of_doubles_goes_on_in_integers_and_back() -> None:
    """Velocities grow by ten orders of magnitude on the way, ``w`` from 1 to 100,000."""
    m, w0 = fractions(0.75), {"w": torch.ones(8)}
    exact = FixedPoint(w0, {"w": torch.zeros(8)}, 44)
    w, v = w0["w"].double(), torch.zeros(8, dtype=F64)
    pushes = [{"w": (1e-6 * 1.3**t * randn(8, seed=t)).float()} for t in range(90)]
    kinds = []
    for t, push in enumerate(pushes):
        exact.push(push, m, t)
        exact.move(0.5)
        v = 0.75 * v + push["w"]
        w = w - 0.5 * v
        kinds.append(exact._whole)
    assert float(w.abs().max()) > 1e4
    assert relative_error(exact.inner_params(), {"w": w}) < 1e-6
    assert (kinds[0], kinds[-1]) == (F64, torch.int64)
    for t in reversed(range(90)):
        exact.unmove(0.5)
        exact.unpush(pushes[t], m, t)
    exact.check_start()
    exact.restart()
    assert exact._whole is F64


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_velocities_that_have_died_out_may_come_back(dtype: torch.dtype) -> None:
    """After 80 steps at a momentum of 0.0001 their bound is zero, and they are what rounding has left."""
    w0, m = {"w": randn(50, seed=1).to(dtype)}, fractions(1e-4)
    exact = FixedPoint(w0, {"w": torch.zeros(50, dtype=dtype)}, 44)
    sizes = [1e-3] * 3 + [0.0] * 100 + [1e3] * 3
    pushes = [{"w": (size * randn(50, seed=t)).to(dtype)} for t, size in enumerate(sizes)]
    for t, push in enumerate(pushes):
        exact.push(push, m, t)
        exact.move(1e-3)
    for t in reversed(range(len(pushes))):
        exact.unmove(1e-3)
        exact.unpush(pushes[t], m, t)
    exact.check_start()


def test_there_is_no_negative_zero_that_the_way_back_would_miss() -> None:
    w0 = {"w": torch.tensor([-0.0, -1e-40, 1.0])}
    exact = FixedPoint(w0, {"w": torch.zeros(3)}, 44)
    assert not exact.inner_params()["w"].signbit().any()


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9])
def test_undoing_steps_in_floating_point_does_not_work(momentum: float) -> None:
    w, v = {"w": randn(50, seed=1)}, torch.zeros(50, dtype=F64)
    for t in range(2000):
        v = momentum * v + gradient_at(w, t)["w"]
        w = {"w": w["w"] - 0.05 * v}
    for t in reversed(range(2000)):
        w = {"w": w["w"] + 0.05 * v}
        v = (v - gradient_at(w, t)["w"]) / momentum
    error = (w["w"] - randn(50, seed=1)).norm() / randn(50, seed=1).norm()
    assert not float(error) < 1  # NaN, where it has overflowed


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_velocities_of_any_size_are_undone_and_are_those_of_floating_point(scale: float) -> None:
    """Also where they grow by ten orders of magnitude on the way."""
    m, w0 = fractions(0.75), {"w": torch.zeros(8, dtype=F64)}
    exact = FixedPoint(w0, w0, 44)
    pushes = [{"w": scale * 1.3**t * randn(8, seed=t)} for t in range(100)]
    pushes[0]["w"].zero_()
    v = torch.zeros(8, dtype=F64)
    for t, push in enumerate(pushes):
        exact.push(push, m, t)
        v = 0.75 * v + push["w"]
    assert relative_error(exact.velocity(), {"w": v}) < 1e-9
    for t in reversed(range(100)):
        exact.unpush(pushes[t], m, t)
    exact.check_start()


def test_what_does_not_lead_back_is_noticed() -> None:
    m, w0 = fractions(0.75), {"w": torch.zeros(8, dtype=F64)}
    exact = FixedPoint(w0, w0, 44)
    push = {"w": randn(8, seed=0)}
    exact.push(push, m, 0)
    exact.unpush({"w": push["w"].nextafter(torch.tensor(9.0, dtype=F64)) * (1 + 1e-12)}, m, 0)
    with pytest.raises(NotReversedError):
        exact.check_start()


def on_the_grid(momentum: float) -> float:
    return round(momentum * DENOMINATOR) / DENOMINATOR


def heavy_ball(w: Params, g: Params, lam: Params, memory: dict[str, Any], t: int) -> Params:
    new = {}
    for k in w:
        memory[k] = lam["momentum"][t] * memory.get(k, 0.0) + g[k] + lam["l2"] * w[k]
        new[k] = w[k] - lam["lr"][t] * memory[k]
    return new


@pytest.mark.parametrize("momentum", MOMENTA)
def test_hypergradients_equal_plain_autograd(momentum: float) -> None:
    """Of a step size and a momentum for each step, weight decay, and what is in the objectives."""
    num_steps = 60
    lam = hypers(
        lr=torch.linspace(0.3, 0.05, num_steps, dtype=F64) * (1 - momentum),
        momentum=torch.full((num_steps,), on_the_grid(momentum)),
        l2=0.01,
    )
    solver = ohg.HeavyBall("lr", num_steps, momentum="momentum", weight_decay="l2")
    w, exact = by_hand(heavy_ball, lam, num_steps)
    found = ohg.hypergradient(
        PROBLEM, start(), lam, estimator=ohg.Reversible(), inner_solver=solver
    )
    for name, value in exact.items():
        assert relative_error({name: found.value[name]}, {name: value}) < 2e-9
    assert relative_error(found.inner_params, {k: v.detach() for k, v in w.items()}) < 1e-9


def rates(lam: Params, step: int) -> Params:
    return dict(zip(SIZES, lam["rates"] * 0.99**step, strict=True))


def momenta(lam: Params, step: int) -> Params:
    return {k: v.sigmoid() for k, v in zip(SIZES, lam["momenta"], strict=True)}


def each_its_own(lam: Params, step: int) -> Params:
    return {
        k: lam["each"] * torch.linspace(0.5, 1, 7, dtype=F64)[: s[-1]] for k, s in SIZES.items()
    }


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "numbers": ({"step_size": 0.1, "momentum": 0.8}, {}),
    "names": ({"step_size": "lr", "momentum": "m"}, {"lr": 0.1, "m": 0.8}),
    "for each tensor": (
        {"step_size": rates, "momentum": momenta},
        {"rates": [0.2, 0.1, 0.05], "momenta": [0.0, 1.0, 2.0]},
    ),
    "for each entry": ({"step_size": 0.1, "momentum": each_its_own}, {"each": 0.9}),
    "clipped": ({"step_size": "lr", "max_norm": 0.3, "weight_decay": "l2"}, {"lr": 0.1, "l2": 0.1}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_form_of_a_setting_is_what_unroll_makes_of_it(name: str) -> None:
    settings, values = SETTINGS[name]
    lam = hypers(**values)
    solver = ohg.HeavyBall(max_steps=40, **settings)
    kept, undone = (
        ohg.hypergradient(PROBLEM, start(), lam, estimator=e, inner_solver=solver)
        for e in (ohg.Unroll(), ohg.Reversible())
    )
    assert relative_error(undone.value, kept.value) < 2e-4  # the momentum is rounded to 2^-17
    grid = _rounded_settings(settings)
    kept = ohg.hypergradient(
        PROBLEM,
        start(),
        lam,
        estimator=ohg.Unroll(),
        inner_solver=ohg.HeavyBall(max_steps=40, **grid),
    )
    assert relative_error(undone.value, kept.value) < 2e-9


def _rounded_settings(settings: dict[str, Any]) -> dict[str, Any]:
    def nearest(value: Any) -> Any:
        value = torch.as_tensor(value, dtype=F64)
        return value + (value.detach() * DENOMINATOR).round() / DENOMINATOR - value.detach()

    given = settings.get("momentum", 0.9)

    def momentum(lam: Params, step: int) -> Any:
        value = given(lam, step) if callable(given) else lam.get(given, given)
        return (
            {k: nearest(v) for k, v in value.items()} if isinstance(value, dict) else nearest(value)
        )

    return {**settings, "momentum": momentum}


def test_gradients_reach_the_initialization_through_solve() -> None:
    solver = ohg.HeavyBall(0.1, 30, momentum=0.75)
    found = []
    for estimator in (ohg.Unroll(), ohg.Reversible()):
        w0 = {k: v.requires_grad_() for k, v in start().items()}
        lam = {k: v.requires_grad_() for k, v in hypers().items()}
        w = ohg.solve(
            inner, w0, lam, solver=solver, estimator=estimator, inner_batch=PROBLEM.inner_batch
        )
        outer(w, lam, None).backward()
        found.append({**{k: v.grad for k, v in w0.items()}, **{k: v.grad for k, v in lam.items()}})
    assert relative_error(found[1], found[0]) < 2e-9


def test_exact_reversal_and_finite_differences_agree() -> None:
    case = problems.momentum_descent()
    lam = {**case.outer_params, "momentum": torch.tensor(on_the_grid(0.6), dtype=F64)}
    found = ohg.hypergradient(
        case.problem,
        case.inner_params,
        lam,
        estimator=ohg.Reversible(),
        inner_solver=ohg.HeavyBall("lr", 12, momentum="momentum"),
    )
    assert relative_error(found.value, case.truth(lam)) < 1e-8


def test_warm_starts_carry_the_velocity_on() -> None:
    solver = ohg.HeavyBall(0.1, 7, momentum=0.75)
    found = []
    for estimator in (ohg.Unroll(), ohg.Reversible()):
        w, state, lam = start(), EstimatorState(), hypers()
        for _ in range(3):
            estimate = ohg.hypergradient(
                PROBLEM, w, lam, estimator=estimator, inner_solver=solver, state=state
            )
            w, state = estimate.inner_params, estimate.state
        found.append(estimate)
    assert state.inner_index == 21
    assert relative_error(found[1].value, found[0].value) < 2e-9
    assert relative_error(found[1].inner_params, found[0].inner_params) < 1e-10


def test_a_solve_that_stops_early_is_undone_as_far_as_it_went() -> None:
    case = problems.quadratic()
    solver = ohg.HeavyBall(0.2, max_steps=5000, momentum=0.5, atol=1e-8)
    kept, undone = (
        ohg.hypergradient(
            case.problem, case.inner_params, case.outer_params, estimator=e, inner_solver=solver
        )
        for e in (ohg.Unroll(), ohg.Reversible())
    )
    assert undone.stats["num_inner_steps"] == kept.stats["num_inner_steps"] < 1000
    assert relative_error(undone.value, kept.value) < 1e-9


def test_a_tolerance_that_is_not_met_leaves_the_hypergradient_of_the_iterate() -> None:
    case = problems.quadratic()
    solver = ohg.HeavyBall(0.2, max_steps=10, momentum=0.5, atol=1e-8)
    kept, undone = (
        ohg.hypergradient(
            case.problem,
            case.inner_params,
            case.outer_params,
            estimator=e,
            inner_solver=solver,
            throw=False,
        )
        for e in (ohg.Unroll(), ohg.Reversible())
    )
    assert undone.result.status is kept.result.status is ohg.Status.MAX_STEPS_REACHED
    assert relative_error(undone.value, kept.value) < 2e-9


def test_random_numbers_that_the_batch_seeds_are_undone() -> None:
    def seeded(w: Params, lam: Params, batch: Any) -> Tensor:
        seed, data = batch
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(7, 3, generator=generator, dtype=F64) < 0.5
        return inner({**w, "w2": w["w2"] * mask}, lam, data)

    problem = ohg.BilevelProblem(seeded, outer, inner_batch=lambda t: (t, PROBLEM.inner_batch(t)))
    solver = ohg.HeavyBall(0.1, 30, momentum=0.75)
    kept, undone = (
        ohg.hypergradient(problem, start(), hypers(), estimator=e, inner_solver=solver).value
        for e in (ohg.Unroll(), ohg.Reversible())
    )
    assert relative_error(undone, kept) < 2e-9


def test_the_way_back_can_be_taken_again() -> None:
    solver = ohg.HeavyBall(0.1, 50, momentum=0.75)
    solved = ohg.Reversible().solve(PROBLEM, solver, start(), hypers())
    first, second, half = (
        solved.pullback({k: scale * torch.ones_like(v) for k, v in start().items()})
        for scale in (1.0, 1.0, 0.5)
    )
    assert (first.stats["num_recomputed_steps"], second.stats["num_recomputed_steps"]) == (0, 50)
    for k, v in first.outer.items():
        assert torch.equal(second.outer[k], v)
        assert torch.allclose(half.outer[k], 0.5 * v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_undone_as_exactly(dtype: torch.dtype) -> None:
    def narrow(tree: Params) -> Params:
        return {k: v.to(dtype) for k, v in tree.items()}

    problem = ohg.BilevelProblem(
        lambda w, lam, t: inner(w, lam, tuple(v.to(dtype) for v in PROBLEM.inner_batch(t))),
        lambda w, lam, _: sum(v.square().sum() for v in w.values()),
        inner_batch=lambda t: t,
    )
    found = ohg.hypergradient(
        problem,
        narrow(start()),
        narrow(hypers()),
        estimator=ohg.Reversible(),
        inner_solver=ohg.HeavyBall(0.05, 300, momentum=0.9),
    )
    assert all(v.dtype == dtype for v in found.inner_params.values())
    assert found.stats["bytes_aside"] > 0


def test_activations_whose_gradient_has_two_formulas_are_undone() -> None:
    """torch takes the gradients of GELU and SiLU by other formulas where they are differentiated again."""
    x, y = randn(20, 5, seed=0), randn(20, 3, seed=1)
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (
            (
                (torch.nn.functional.silu(torch.nn.functional.gelu(x @ w["w1"])) @ w["w2"] - y) ** 2
            ).mean()
            + lam["c"] * w["w1"].sum()
        ),
        lambda w, lam, _: w["w2"].square().sum(),
    )
    w0 = {k: v for k, v in start().items() if k != "b1"}
    lam = {"c": torch.tensor(0.01, dtype=F64)}
    solver = ohg.HeavyBall(0.1, 50, momentum=0.75)
    kept, undone = (
        ohg.hypergradient(problem, w0, lam, estimator=e, inner_solver=solver).value
        for e in (ohg.Unroll(), ohg.Reversible())
    )
    assert relative_error(undone, kept) < 2e-9


def dropped_out(w: Params, lam: Params, batch: Any) -> Tensor:
    return inner({**w, "w2": torch.nn.functional.dropout(w["w2"], 0.5)}, lam, batch)


def shuffled(step: int) -> tuple[Tensor, Tensor]:
    calls[step] = calls.get(step, 0) + 1
    x, y = PROBLEM.inner_batch(step)
    return (x, y) if step == 0 or calls[step] == 1 else (x.flip(1), y)


calls: dict[int, int] = {}


@pytest.mark.parametrize(
    ("objective", "batches"),
    [(dropped_out, PROBLEM.inner_batch), (inner, shuffled)],
    ids=["dropout", "other batches"],
)
@pytest.mark.parametrize("num_steps", [2, 300], ids=["", "bits-aside"])
def test_gradients_that_differ_when_taken_again_are_an_error(
    objective: Any, batches: Callable[[int], Any], num_steps: int
) -> None:
    calls.clear()
    problem = ohg.BilevelProblem(objective, outer, inner_batch=batches)
    with pytest.raises(
        ohg.RequirementError,
        match=rf"over {num_steps} inner steps .* bit for bit.* dropout .* Unroll\(",
    ):
        ohg.hypergradient(
            problem,
            start(),
            hypers(),
            estimator=ohg.Reversible(),
            inner_solver=ohg.HeavyBall(0.05, num_steps),
        )


REFUSED = [
    (None, {}, ohg.RequirementError, "none was given; pass inner_solver=HeavyBall"),
    (
        ohg.GradientDescent(0.1),
        {},
        ohg.RequirementError,
        "GradientDescent cannot be undone .* Unroll",
    ),
    (ohg.Adam(0.1), {}, ohg.RequirementError, "Adam cannot be undone"),
    (ohg.LBFGS(), {}, ohg.RequirementError, "LBFGS cannot be undone"),
    (ohg.HeavyBall(0.1, nesterov=True), {}, ohg.RequirementError, "nesterov=True.* or Unroll"),
    (ohg.HeavyBall(0.1, momentum=0.0), {}, ohg.RequirementError, "momentum=0.* or Unroll"),
    (ohg.HeavyBall(0.1, max_steps=0), {}, ohg.RequirementError, "raise max_steps"),
    (
        ohg.HeavyBall(0.1, momentum="m"),
        {"m": 0.0},
        ohg.HyperparameterError,
        "'m' is 0 at inner step 0",
    ),
    (
        ohg.HeavyBall(0.1, momentum="m"),
        {"m": 1.0},
        ohg.HyperparameterError,
        "'m' is 1 at .* below 1",
    ),
    (ohg.HeavyBall(0.1, momentum="m"), {"m": -0.5}, ohg.HyperparameterError, "'m' is -0.5 at"),
    (
        ohg.HeavyBall(0.1, 2, momentum="m"),
        {"m": [0.9, 1.5]},
        ohg.HyperparameterError,
        "'m' is 1.5 at inner step 1",
    ),
    (
        ohg.HeavyBall(0.1, momentum=lambda lam, t: torch.tensor(2.0)),
        {},
        ohg.HyperparameterError,
        "momentum is 2 at inner step 0, .* bounds, or use Unroll",
    ),
    (ohg.HeavyBall(0.1, momentum="beta"), {"m": 0.5}, ohg.RequirementError, "parameter 'beta'"),
]


@pytest.mark.parametrize(("solver", "values", "error", "message"), REFUSED)
def test_what_cannot_be_undone_is_refused_by_name(
    solver: Any, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ohg.hypergradient(
            PROBLEM, start(), hypers(**values), estimator=ohg.Reversible(), inner_solver=solver
        )


@pytest.mark.parametrize("bits", [0, 61, 44.0, "44", None])
def test_bits_are_refused_where_they_are_none(bits: Any) -> None:
    with pytest.raises(ValueError, match=f"fraction_bits from 8 to 60, got {bits!r}"):
        ohg.Reversible(bits)


@pytest.mark.parametrize("size", [1e-20, 1e-12, 1e-9])
def test_what_would_be_rounded_away_is_no_silent_zero(size: float) -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (lam["c"] * (w["w"] - size).square()).sum(),
        lambda w, lam, _: (w["w"] / size - 2).square().sum(),
    )
    w0, lam = {"w": torch.full((3,), 3 * size, dtype=F64)}, {"c": torch.ones(3, dtype=F64)}
    solver = ohg.HeavyBall(0.05, 5, momentum=0.5)
    with pytest.raises(ohg.RequirementError, match=r"rounded away\. Raise fraction_bits"):
        ohg.hypergradient(problem, w0, lam, estimator=ohg.Reversible(), inner_solver=solver)
    if size == 1e-9:
        kept, undone = (
            ohg.hypergradient(problem, w0, lam, estimator=e, inner_solver=solver).value
            for e in (ohg.Unroll(), ohg.Reversible(60))
        )
        assert relative_error(undone, kept) < 1e-6


LINE = ohg.BilevelProblem(
    lambda w, lam, _: -lam["c"] * w["w"].square().sum(), lambda w, lam, _: w["w"].sum()
)


@pytest.mark.parametrize(
    ("step_size", "status", "message"),
    [
        (
            0.5,
            ohg.Status.DIVERGED,
            r"reached 1\.\d+e\+05 at inner step \d+\. Lower the step size .* 131072 in",
        ),
        (1e300, ohg.Status.DIVERGED, r"e\+301 at inner step 0"),
        (1e308, ohg.Status.NONFINITE, "ended in NaN or infinite values"),
    ],
)
def test_what_leaves_the_range_is_a_failure_with_a_way_out(
    step_size: float, status: ohg.Status, message: str
) -> None:
    w0, lam = {"w": torch.full((3,), 2.0, dtype=F64)}, {"c": torch.tensor(10.0, dtype=F64)}
    solver = ohg.HeavyBall(step_size if step_size > 1 else 0.05, 400, momentum=0.5)
    found = ohg.hypergradient(
        LINE, w0, lam, estimator=ohg.Reversible(), inner_solver=solver, throw=False
    )
    assert found.result.status is status
    assert found.value["c"].isnan()
    with pytest.raises(ohg.SolverError, match=message):
        ohg.hypergradient(LINE, w0, lam, estimator=ohg.Reversible(), inner_solver=solver)


def test_fewer_bits_hold_larger_parameters() -> None:
    w0, lam = {"w": torch.full((3,), 1e6, dtype=F64)}, {"c": torch.tensor(-1.0, dtype=F64)}
    solver = ohg.HeavyBall(0.01, 20, momentum=0.5)
    with pytest.raises(
        ohg.RequirementError, match=r"inner_params reach 1e\+06.* lower fraction_bits"
    ):
        ohg.hypergradient(LINE, w0, lam, estimator=ohg.Reversible(), inner_solver=solver)
    kept, undone = (
        ohg.hypergradient(LINE, w0, lam, estimator=e, inner_solver=solver).value
        for e in (ohg.Unroll(), ohg.Reversible(fraction_bits=36))
    )
    assert relative_error(undone, kept) < 1e-9


def test_a_study_of_outer_steps_runs_on_it() -> None:
    case = problems.logistic()
    found = ohg.minimize_bilevel(
        case.problem,
        case.inner_params,
        {**case.outer_params, "lr": torch.tensor(0.05, dtype=F64)},
        inner_solver=ohg.HeavyBall("lr", 30, momentum=0.75),
        estimator=ohg.Reversible(),
        bounds={"lr": ohg.Domain(1e-3, 1.0, log=True)},
        num_steps=15,
        warm_start=False,
    )
    values = [h["outer_value"] for h in found.history]
    assert found.result
    assert values[-1] < 0.9 * values[0]
    assert found.outer_params["lr"] != 0.05


MEMORY = """
import resource, sys, torch
import optuna_hypergrad as ohg
torch.set_num_threads(1)
num_steps, generator = int(sys.argv[1]), torch.Generator().manual_seed(0)
x = torch.randn(16, 196, generator=generator)
y = torch.randint(0, 10, (16,), generator=generator)
w0 = {"a": 0.03 * torch.randn(196, 256, generator=generator),
      "b": 0.04 * torch.randn(256, 256, generator=generator),
      "c": 0.04 * torch.randn(256, 10, generator=generator)}
def loss(w):
    return torch.nn.functional.cross_entropy(((x @ w["a"]).relu() @ w["b"]).relu() @ w["c"], y)
problem = ohg.BilevelProblem(
    lambda w, lam, _: loss(w) + sum((lam[k].exp() * v * v).sum() for k, v in w.items()),
    lambda w, lam, _: loss(w))
found = ohg.hypergradient(
    problem, w0, {k: torch.full_like(v, -9.0) for k, v in w0.items()},
    estimator=ohg.Reversible(), inner_solver=ohg.HeavyBall(0.01, num_steps))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, found.stats["bytes_aside"])
"""


def test_memory_is_flat_from_ten_steps_to_a_thousand() -> None:
    """118,272 weights: a thousand velocities alone would take 473 MB."""

    def peak(num_steps: int) -> tuple[float, float]:
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEMORY), str(num_steps)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        megabytes, aside = map(float, ran.stdout.split())
        return megabytes, aside

    few, many = peak(10), peak(1000)
    assert few[1] == 0
    assert many[1] * 8 < 0.2 * 1000 * 118_272  # bits
    assert many[0] < few[0] + 20
