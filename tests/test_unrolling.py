"""Unrolling: every solver's step against torch.optim and plain autograd, however much is computed again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from problems import F64, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients._memory import at_least
from optuna_hypergrad.hypergradients._rewind import Plan, within
from optuna_hypergrad.hypergradients.compiled_steps import states_within

Params = dict[str, Tensor]
SIZES = {"w1": (5, 7), "b1": (7,), "w2": (7, 3)}
STEPS = 11


def start() -> Params:
    return {k: 0.5 * problems.randn(*s, seed=i) for i, (k, s) in enumerate(SIZES.items())}


def predict(w: Params, x: Tensor) -> Tensor:
    return (x @ w["w1"] + w["b1"]).tanh() @ w["w2"]


def inner(w: Params, lam: Params, batch: Any) -> Tensor:
    x, y = batch
    weights = lam["weights"].sigmoid()
    each = ((predict(w, x) - y) ** 2).mean(1)
    return (weights * each).mean() + (lam["log_decay"].exp() * w["w1"] ** 2).sum()


def outer(w: Params, lam: Params, batch: Any) -> Tensor:
    x, y = problems.randn(20, 5, seed=70), problems.randn(20, 3, seed=71)
    return ((predict(w, x) - y) ** 2).mean() + 0.1 * lam["log_decay"].square().sum()


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    return problems.randn(8, 5, seed=100 + step), problems.randn(8, 3, seed=300 + step)


def hypers(**more: Any) -> Params:
    return {
        "weights": problems.randn(8, seed=50),
        "log_decay": -3 + 0.1 * problems.randn(5, 7, seed=51),
        **{k: torch.as_tensor(v, dtype=F64) for k, v in more.items()},
    }


PROBLEM = ohg.BilevelProblem(inner, outer, inner_batch=batch_of)


def by_hand(
    step: Callable[..., Params], lam: Params, num_steps: int = STEPS
) -> tuple[Params, Params]:
    """The last inner parameters and the hypergradient, by plain autograd through steps written out."""
    lam = {k: v.clone().requires_grad_() for k, v in lam.items()}
    w0 = {k: v.requires_grad_() for k, v in start().items()}
    w, memory = w0, {}
    for t in range(num_steps):
        value = inner(w, lam, batch_of(t))
        found = torch.autograd.grad(value, tuple(w.values()), create_graph=True)
        w = step(w, dict(zip(w, found, strict=True)), lam, memory, t)
    f = outer(w, lam, None)
    gradient = torch.autograd.grad(f, tuple(lam.values()))
    return w, dict(zip(lam, gradient, strict=True))


def nesterov(w: Params, g: Params, lam: Params, memory: dict[str, Any], t: int) -> Params:
    new = {}
    for k in w:
        gradient = g[k] + lam["l2"] * w[k]
        memory[k] = lam["momentum"] * memory.get(k, 0.0) + gradient
        new[k] = w[k] - lam["lr"][t] * (gradient + lam["momentum"] * memory[k])
    return new


def clipped_descent(w: Params, g: Params, lam: Params, memory: dict[str, Any], t: int) -> Params:
    norm = torch.stack([v.square().sum() for v in g.values()]).sum().sqrt()
    factor = torch.clamp(0.4 / norm, max=1.0)
    return {k: w[k] - lam["rates"][i] * factor * g[k] for i, k in enumerate(w)}


def adamw(w: Params, g: Params, lam: Params, memory: dict[str, Any], t: int) -> Params:
    new = {}
    for k in w:
        m, s = memory.get(k, (0.0, 0.0))
        m = lam["beta1"] * m + (1 - lam["beta1"]) * g[k]
        s = lam["beta2"] * s + (1 - lam["beta2"]) * g[k] ** 2
        memory[k] = m, s
        m, s = m / (1 - lam["beta1"] ** (t + 1)), s / (1 - lam["beta2"] ** (t + 1))
        new[k] = w[k] * (1 - lam["lr"] * lam["l2"]) - lam["lr"] * m / (s + 1e-16).sqrt()
    return new


def rates(lam: Params, step: int) -> Params:
    return dict(zip(SIZES, lam["rates"], strict=True))


SOLVERS = {
    "nesterov": (
        ohg.HeavyBall("lr", STEPS, momentum="momentum", nesterov=True, weight_decay="l2"),
        nesterov,
        {"lr": torch.linspace(0.3, 0.05, STEPS, dtype=F64), "momentum": 0.8, "l2": 0.01},
    ),
    "clipped descent, a rate for each tensor": (
        ohg.GradientDescent(rates, STEPS, max_norm=0.4),
        clipped_descent,
        {"rates": [0.3, 0.1, 0.2]},
    ),
    "adamw": (
        ohg.AdamW("lr", STEPS, beta1="beta1", beta2="beta2", weight_decay="l2"),
        adamw,
        {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "l2": 0.1},
    ),
}
BUDGETS = {
    "never": {"recompute": "never"},
    "sqrt": {"recompute": "sqrt"},
    "tree": {"recompute": "tree"},
    "in the budget": {"memory_budget": 30e3},
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kept", BUDGETS)
def test_hypergradients_equal_plain_autograd(name: str, kept: str) -> None:
    solver, step, settings = SOLVERS[name]
    lam = hypers(**settings)
    w, exact = by_hand(step, lam)
    found = ohg.hypergradient(
        PROBLEM, start(), lam, estimator=ohg.Unroll(**BUDGETS[kept]), inner_solver=solver
    )
    assert relative_error(found.value, exact) < 1e-10
    assert relative_error(found.inner_params, {k: v.detach() for k, v in w.items()}) < 1e-12
    assert (found.stats["num_recomputed_steps"] > 0) == (kept != "never")


@pytest.mark.parametrize("num_steps", [1, 2, 7, 64, 65, 100])
@pytest.mark.parametrize("plan", [Plan(1), Plan(3), Plan(1, 2), Plan(2, 3), Plan(1, 8), Plan(200)])
def test_every_plan_gives_the_same_hypergradient(plan: Plan, num_steps: int) -> None:
    h = torch.tensor([0.5, 1.5], dtype=F64)
    problem = ohg.BilevelProblem(
        lambda w, lam, t: 0.5 * (h * w["w"] ** 2).sum() - (1 + 0.01 * t) * lam["c"] * w["w"].sum(),
        lambda w, lam, _: w["w"].sum(),
        inner_batch=lambda t: t,
    )
    estimator = ohg.Unroll()
    object.__setattr__(estimator, "_planner", lambda: lambda *_: plan)
    found = ohg.hypergradient(
        problem,
        {"w": torch.zeros(2, dtype=F64)},
        {"c": torch.tensor(1.0, dtype=F64)},
        estimator=estimator,
        inner_solver=ohg.GradientDescent(0.3, num_steps),
    )
    powers = torch.arange(num_steps - 1, -1, -1, dtype=F64)
    weights = 0.3 * (1 + 0.01 * torch.arange(num_steps, dtype=F64))
    exact = sum((weights * (1 - 0.3 * float(one)) ** powers).sum() for one in h)
    assert float(found.value["c"]) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("recompute", ["never", "sqrt", "tree"])
def test_a_solve_that_stops_early_is_unrolled_as_far_as_it_went(recompute: Any) -> None:
    case = problems.quadratic()
    solver = ohg.GradientDescent(0.25, max_steps=5000, atol=1e-12)
    found = ohg.hypergradient(
        case.problem,
        case.inner_params,
        case.outer_params,
        estimator=ohg.Unroll(recompute=recompute),
        inner_solver=solver,
    )
    assert found.stats["num_inner_steps"] < 1000
    assert relative_error(found.value, case.truth(case.outer_params)) < 1e-8


TORCH = [
    (
        ohg.GradientDescent(0.1, 6, weight_decay=0.05),
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.05),
    ),
    (
        ohg.HeavyBall(0.1, 6, momentum=0.7, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.7, nesterov=True),
    ),
    (
        ohg.Adam(0.1, 6, beta1=0.7, weight_decay=0.05, eps=1e-12),
        lambda p: torch.optim.Adam(p, 0.1, (0.7, 0.999), 1e-12, weight_decay=0.05),
    ),
    (
        ohg.AdamW(0.1, 6, eps=1e-12, weight_decay=0.2),
        lambda p: torch.optim.AdamW(p, 0.1, eps=1e-12, weight_decay=0.2),
    ),
]


@pytest.mark.parametrize(("solver", "optimizer"), TORCH, ids=["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_steps_are_those_of_torch_optim(
    solver: Any, optimizer: Any, max_norm: float | None
) -> None:
    lam = hypers()
    solver = dataclasses.replace(solver, max_norm=max_norm)
    w = {k: v.requires_grad_() for k, v in start().items()}
    theirs = optimizer(list(w.values()))
    for t in range(6):
        theirs.zero_grad()
        inner(w, lam, batch_of(t)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(w.values()), max_norm)
        theirs.step()
    ours = ohg.inner_solve(PROBLEM, solver, start(), lam).inner_params
    exact = {k: v.detach() for k, v in w.items()}
    assert relative_error(ours, exact) < 1e-6 if max_norm else relative_error(ours, exact) < 1e-9


def test_clipping_is_differentiable_at_a_zero_gradient() -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: ((w["w"] - lam["c"]) ** 2).sum(), lambda w, lam, _: w["w"].sum()
    )
    at = torch.tensor([1.0, 2.0], dtype=F64)
    solver = ohg.GradientDescent(0.1, 3, max_norm=1.0)
    found = ohg.hypergradient(
        problem, {"w": at}, {"c": at.clone()}, estimator=ohg.Unroll(), inner_solver=solver
    )
    assert torch.allclose(found.value["c"], torch.full((2,), 1 - 0.8**3, dtype=F64))


def test_a_budget_is_kept_or_refused() -> None:
    assert within(100)(10, 10, 1) == Plan(10)
    one_level = within(70)(100, 10, 1)
    assert one_level.slots is None
    assert -(-100 // one_level.tapes) + 10 * one_level.tapes <= 70
    tree = within(40)(1000, 10, 1)
    assert tree.slots is not None
    with pytest.raises(
        ohg.RequirementError, match=r"cannot hold 1000 steps .* Raise memory_budget to 30,"
    ):
        within(12)(1000, 10, 1)


@pytest.mark.parametrize("plans", [within, states_within])
@pytest.mark.parametrize("steps", [2, 7, 30, 1000])
@pytest.mark.parametrize(("tape", "state"), [(12_345, 4_567), (1001, 999), (10, 1)])
def test_the_budget_that_a_refusal_names_is_enough_and_hardly_more(
    plans: Any, steps: int, tape: int, state: int
) -> None:
    with pytest.raises(ohg.RequirementError) as refused:
        plans(state / 2)(steps, tape, state)
    named = float(re.findall(r"Raise memory_budget to ([0-9.e+]+),", str(refused.value))[0])
    plans(named)(steps, tape, state)
    with pytest.raises(ohg.RequirementError):
        plans(0.99 * named - 1)(steps, tape, state)


@pytest.mark.parametrize("number", [1, 99.5, 123, 1234, 7496, 999_001, 123_456_789])
def test_a_number_of_bytes_in_three_digits_is_not_below_it(number: float) -> None:
    assert number <= float(at_least(number)) <= 1.01 * number


def class_weights(w: Params, lam: Params, batch: Any) -> Tensor:
    """A hyperparameter where torch has no derivative."""
    x, _ = batch_of(0)
    classes = torch.arange(8) % 3
    return torch.nn.functional.cross_entropy(predict(w, x), classes, weight=lam["weights"].exp())


@pytest.mark.parametrize(
    "estimator",
    [
        ohg.Unroll(),
        ohg.ForwardMode(),
        ohg.ForwardGradient(2),
        ohg.Reversible(),
        ohg.Implicit(damping=1.0),
    ],
    ids=lambda e: e.name,
)
@pytest.mark.parametrize("which", ["inner_objective", "outer_objective"])
def test_an_argument_without_a_derivative_is_named_with_a_way_out(
    estimator: Any, which: str
) -> None:
    lam = {"weights": torch.zeros(3, dtype=F64), "log_decay": torch.tensor(-3.0, dtype=F64)}

    def weighed(w: Params, lam: Params, batch: Any) -> Tensor:
        x, y = batch_of(0)
        decay = lam["log_decay"].exp() * sum(v.square().sum() for v in w.values())
        return ((predict(w, x) - y) ** 2 * lam["weights"].exp()).mean() + decay

    objectives = {"inner_objective": weighed, "outer_objective": outer, which: class_weights}
    with pytest.raises(
        ohg.RequirementError, match=rf"^{which} uses .*argument 'weight'.*c\[y\] \* .* ZerothOrder"
    ):
        ohg.hypergradient(
            ohg.BilevelProblem(**objectives),
            start(),
            lam,
            estimator=estimator,
            inner_solver=ohg.HeavyBall(0.1, 3),
        )


def test_a_black_box_is_not_sent_to_implicit_differentiation() -> None:
    with pytest.raises(
        ohg.RequirementError, match=r"BlackBox cannot be unrolled: .* Use ZerothOrder with it"
    ) as refused:
        ohg.hypergradient(
            PROBLEM, start(), hypers(), estimator=ohg.Unroll(), inner_solver=ohg.BlackBox(len)
        )
    assert "Implicit" not in str(refused.value)


@pytest.mark.parametrize("given", [None, "weights", [0.1, 0.1], {"w1": 0.1, "b1": None, "w2": 0.1}])
@pytest.mark.parametrize("estimator", [ohg.Unroll(), ohg.ForwardMode(), ohg.Reversible()])
@pytest.mark.parametrize("setting", ["step_size", "momentum", "weight_decay"])
def test_a_schedule_that_gives_no_number_is_named(estimator: Any, setting: str, given: Any) -> None:
    settings: dict[str, Any] = {"step_size": 0.1, setting: lambda lam, step: given}
    with pytest.raises(
        ohg.RequirementError, match=f"inner solver's {setting} is a function that gave .* at step 0"
    ):
        ohg.hypergradient(
            PROBLEM,
            start(),
            hypers(),
            estimator=estimator,
            inner_solver=ohg.HeavyBall(max_steps=3, **settings),
        )


@pytest.mark.parametrize(
    ("settings", "lam", "message"),
    [
        ({"step_size": "lr"}, {"lr": [0.1, 0.1]}, "has an entry for each of 2 inner steps"),
        ({"step_size": "lr"}, {"lr": [[0.1]]}, r"shape \(1, 1\); it must be 0-d"),
        ({"step_size": "rate"}, {"lr": 0.1}, "step_size is the outer parameter 'rate'"),
        ({"weight_decay": "l2"}, {"lr": 0.1}, "weight_decay is the outer parameter 'l2'"),
        ({"step_size": lambda lam, t: {"w1": lam["lr"]}}, {"lr": 0.1}, r"has factors for \['w1'\]"),
        (
            {"step_size": lambda lam, t: lam["lr"]},
            {"lr": [0.1] * 7},
            r"gave a tensor of shape \(7,\)",
        ),
        (
            {"step_size": lambda lam, t: {"w1": 0.1, "b1": lam["lr"], "w2": 0.1}},
            {"lr": [[0.1] * 7] * 2},
            r"factor of shape \(2, 7\) for 'b1', which has the shape \(7,\)",
        ),
    ],
)
def test_settings_that_cannot_be_resolved_are_named(
    settings: dict[str, Any], lam: Any, message: str
) -> None:
    solver = ohg.GradientDescent(**{"max_steps": 5, **settings})
    with pytest.raises(ohg.RequirementError, match=message):
        ohg.hypergradient(
            PROBLEM, start(), hypers(**lam), estimator=ohg.Unroll(), inner_solver=solver
        )


def test_a_decay_of_the_solver_is_no_part_of_the_inner_problem() -> None:
    solver = ohg.HeavyBall(0.1, 5, weight_decay=0.1)
    with pytest.raises(ohg.RequirementError, match="Write the decay into inner_objective"):
        ohg.hypergradient(PROBLEM, start(), hypers(), estimator=ohg.Implicit(), inner_solver=solver)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation": 2.5}, r"truncation >= 1, an integer, or None, got 2\.5"),
        ({"truncation": True}, "an integer"),
        ({"truncation": float("nan")}, "an integer"),
        ({"memory_budget": "1e9"}, "memory_budget > 0 bytes"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ohg.Unroll(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 2.5}, r"Adam needs max_steps >= 0, an integer, got 2\.5"),
        ({"max_steps": "10"}, "max_steps >= 0, an integer, got '10'"),
        ({"rtol": float("nan")}, "rtol >= 0, got nan"),
        ({"atol": "1e-3"}, "atol >= 0"),
        ({"max_norm": "1"}, "max_norm > 0"),
        ({"eps": "1"}, "eps > 0"),
        ({"step_size": None}, "step_size must be a number, the name"),
        ({"beta1": [0.9]}, "beta1 must be a number, the name"),
        ({"weight_decay": torch.tensor(0.1)}, "weight_decay is a tensor, .* give its name"),
    ],
)
def test_solvers_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ohg.Adam(**settings)


@pytest.mark.parametrize("estimator", [ohg.Unroll(), ohg.ForwardMode(), ohg.Reversible()])
@pytest.mark.parametrize(
    "solver",
    [
        ohg.HeavyBall("lr", 4, momentum=lambda lam, t: {"a": lam["each"], "b": 0.5}),
        ohg.HeavyBall(lambda lam, t: {"a": lam["each"], "b": lam["lr"]}, 4, weight_decay="lr"),
        ohg.AdamW(lambda lam, t: {"a": lam["each"], "b": lam["lr"]}, 4, beta1="lr"),
        ohg.Adam(0.1, 4),
    ],
)
def test_inner_parameters_keep_their_dtypes(estimator: Any, solver: Any) -> None:
    """Also 0-d ones, which torch promotes, under settings in float64."""
    if isinstance(solver, ohg.Adam) and isinstance(estimator, ohg.Reversible):
        return
    x = problems.randn(9, 3, seed=1)

    def g(w: Params, lam: Params, _: Any) -> Tensor:
        if any(v.dtype != x.dtype for v in w.values()):
            raise TypeError("the inner parameters have changed their dtype")
        return ((x @ w["a"] - w["b"] - 1) ** 2).mean() + (lam["each"] * w["a"] ** 2).sum().to(x)

    def f(w: Params, lam: Params, _: Any) -> Tensor:
        return w["a"].square().sum() + w["b"] * lam["lr"]

    lam = {"each": torch.tensor([0.1, 0.2, 0.3], dtype=F64), "lr": torch.tensor(0.05, dtype=F64)}
    problem, values = ohg.BilevelProblem(g, f), []
    for x in (x, x.float()):  # noqa: B020
        w = {"a": torch.ones(3, dtype=x.dtype), "b": torch.zeros((), dtype=x.dtype)}
        found = ohg.hypergradient(problem, w, lam, estimator=estimator, inner_solver=solver)
        assert all(v.dtype == x.dtype for v in found.inner_params.values())
        values.append(found.value)
    assert relative_error(*values) < 1e-4


@pytest.mark.parametrize("estimator", [ohg.Unroll(), ohg.ForwardMode(), ohg.Implicit(damping=10.0)])
def test_inference_mode_is_refused_by_name(estimator: Any) -> None:
    solver, lam = ohg.GradientDescent(0.1, 3), hypers()
    with torch.no_grad():
        ohg.hypergradient(PROBLEM, start(), lam, estimator=estimator, inner_solver=solver)
    with torch.inference_mode():
        made = start()
        with pytest.raises(ohg.ProblemError, match=r"inference_mode\(\) is on"):
            ohg.hypergradient(PROBLEM, start(), lam, estimator=estimator, inner_solver=solver)
    with pytest.raises(ohg.ProblemError, match=r"inner_params\['w1'\] was made under .* clone\(\)"):
        ohg.hypergradient(PROBLEM, made, lam, estimator=estimator, inner_solver=solver)


@pytest.mark.parametrize("recompute", ["sqrt", "tree"])
@pytest.mark.parametrize("rtol", [0.0, 1e-12])
def test_steps_that_are_not_the_same_twice_are_no_silent_error(recompute: Any, rtol: float) -> None:
    def dropped_out(w: Params, lam: Params, batch: Any) -> Tensor:
        return inner({**w, "w2": torch.nn.functional.dropout(w["w2"], 0.5)}, lam, batch)

    problem = ohg.BilevelProblem(dropped_out, outer, inner_batch=batch_of)
    solver = ohg.HeavyBall(0.1, STEPS, rtol=rtol)
    with pytest.raises(
        ohg.RequirementError, match=r"led elsewhere: .* dropout .*recompute='never'"
    ):
        ohg.hypergradient(
            problem,
            start(),
            hypers(),
            estimator=ohg.Unroll(recompute=recompute),
            inner_solver=solver,
        )


@pytest.mark.parametrize(("tolerance", "ends"), [({"atol": 1e-9}, False), ({"rtol": 0.93}, True)])
@pytest.mark.parametrize("truncation", [None, 3])
def test_a_tolerance_that_is_not_met_is_a_failure_also_of_the_last_steps(
    tolerance: dict[str, float], ends: bool, truncation: int | None
) -> None:
    found = ohg.hypergradient(
        ohg.BilevelProblem(inner, outer, inner_batch=lambda step: batch_of(0)),
        start(),
        hypers(),
        estimator=ohg.Unroll(truncation=truncation),
        inner_solver=ohg.GradientDescent(0.05, 6, **tolerance),
        throw=False,
    )
    assert bool(found.result) is ends
    if not ends:
        assert found.result.status is ohg.Status.MAX_STEPS_REACHED


@pytest.mark.parametrize(
    "estimator",
    [ohg.Unroll(recompute=r) for r in ("never", "sqrt", "tree")] + [ohg.Reversible()],
    ids=["never", "sqrt", "tree", "reversible"],
)
@pytest.mark.parametrize("num_steps", [1, 9])
@pytest.mark.parametrize("step_size", [0.1, "lr"])
def test_a_last_pullback_is_the_same_and_leaves_the_initialization_out(
    estimator: ohg.Unroll | ohg.Reversible, step_size: float | str, num_steps: int
) -> None:
    solver, lam = ohg.HeavyBall(step_size, num_steps, momentum=0.75), hypers(lr=0.1)
    ones = {k: torch.ones_like(v) for k, v in start().items()}
    first = estimator.solve(PROBLEM, solver, start(), lam).pullback(dict(ones))
    solved = estimator.solve(PROBLEM, solver, start(), lam)
    assert solved.last_pullback is not None
    last = solved.last_pullback(dict(ones))
    for k, v in first.outer.items():
        assert v is None if last.outer[k] is None else torch.equal(v, last.outer[k])
    assert any(v is not None for v in last.outer.values())
    assert all(v is not None for v in first.initial.values())
    assert list(last.initial.values()) == [None] * len(first.initial)


def test_a_last_pullback_gives_up_what_a_second_one_would_need() -> None:
    estimator, solver = ohg.Unroll(recompute="never"), ohg.GradientDescent(0.1, 3)
    solved = estimator.solve(PROBLEM, solver, start(), hypers())
    ones = {k: torch.ones_like(v) for k, v in start().items()}
    first = solved.pullback(dict(ones)).outer
    assert solved.last_pullback is not None
    last = solved.last_pullback(dict(ones)).outer
    assert all(torch.equal(first[k], last[k]) for k in first)
    with pytest.raises(RuntimeError, match="given up what it would need"):
        solved.last_pullback(dict(ones))


@pytest.mark.parametrize(
    "estimator",
    [
        ohg.Unroll(recompute="never"),
        ohg.Unroll(recompute="sqrt"),
        ohg.Unroll(recompute="tree"),
        ohg.Unroll(compile=True, recompute="never"),
        ohg.ForwardMode(),
        ohg.ForwardGradient(4),
        ohg.Reversible(),
        ohg.ZerothOrder(2),
        ohg.Auto(),
        ohg.Implicit(damping=1.0),
        ohg.F2SA(100.0),
        ohg.T1T2(),
        ohg.SAMA(),
    ],
    ids=lambda e: f"{e.name}-{getattr(e, 'recompute', '')}-{getattr(e, 'compile', '')}",
)
def test_objectives_may_give_other_tensors_to_the_names_that_they_are_given(estimator: Any) -> None:
    def rebinding(objective: Any) -> Any:
        def rebound(w: Params, lam: Params, batch: Any) -> Tensor:
            lam["log_decay"] = 2 * lam.pop("half_log_decay")
            w["w1"] = w["w1"] + 0.5
            return objective(w, lam, batch)

        return rebound

    def written_out(objective: Any) -> Any:
        def plain(w: Params, lam: Params, batch: Any) -> Tensor:
            lam = {**lam, "log_decay": 2 * lam["half_log_decay"]}
            return objective({**w, "w1": w["w1"] + 0.5}, lam, batch)

        return plain

    lam = hypers()
    lam["half_log_decay"] = lam.pop("log_decay") / 2
    names, before = set(lam), {k: v.clone() for k, v in lam.items()}
    found = [
        ohg.hypergradient(
            ohg.BilevelProblem(kind(inner), kind(outer), inner_batch=batch_of),
            start(),
            lam,
            estimator=estimator,
            inner_solver=ohg.HeavyBall(0.05, 3, momentum=0.5),
            throw=False,
        )
        for kind in (rebinding, written_out)
    ]
    assert set(lam) == names
    assert all(torch.equal(lam[k], v) for k, v in before.items())
    assert torch.equal(found[0].outer_value, found[1].outer_value)
    assert relative_error(found[0].value, found[1].value) < 1e-12
    assert found[1].value["half_log_decay"].abs().sum() > 0
