"""Unrolling through compiled steps: the same hypergradients, and what cannot be compiled is said."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from problems import F64, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients.compiled_steps import states_within

Params = dict[str, Tensor]
STEPS = 7


def start() -> Params:
    return {"w": 0.5 * problems.randn(4, 3, seed=1), "b": problems.randn(3, seed=2)}


def inner(w: Params, lam: Params, batch: Any) -> Tensor:
    x, y = batch
    loss = torch.nn.functional.cross_entropy((x @ w["w"]).tanh() + w["b"], y)
    return loss + (lam["log_decay"].exp() * w["w"] ** 2).sum()


def outer(w: Params, lam: Params, batch: Any) -> Tensor:
    return ((problems.randn(9, 4, seed=3) @ w["w"] + w["b"]) ** 2).mean() + 0 * lam["unused"]


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    return problems.randn(8, 4, seed=100 + step), torch.arange(8) % 3


PROBLEM = ohg.BilevelProblem(inner, outer, inner_batch=batch_of)


def hypers(**more: Any) -> Params:
    given = {"log_decay": problems.randn(4, 3, seed=4) - 3}
    given |= {"unused": torch.zeros((), dtype=F64), "l2": torch.tensor(0.1, dtype=F64)}
    return given | {k: torch.as_tensor(v, dtype=F64) for k, v in more.items()}


BALL = ohg.HeavyBall(0.2, STEPS, momentum=0.8, weight_decay="l2")
SOLVERS = {
    "heavy ball with a learned decay": (BALL, {}),
    "a rate for each step": (
        ohg.HeavyBall("lr", STEPS, momentum="mu", nesterov=True, weight_decay="l2"),
        {"lr": torch.linspace(0.3, 0.1, STEPS), "mu": 0.7},
    ),
    "adam": (ohg.Adam("lr", STEPS, max_norm=0.4, weight_decay="l2"), {"lr": 0.05}),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_hypergradients_equal_those_of_the_tape(name: str) -> None:
    solver, settings = SOLVERS[name]
    lam = hypers(**settings)
    exact = ohg.hypergradient(
        PROBLEM, start(), lam, estimator=ohg.Unroll(recompute="never"), inner_solver=solver
    )
    vectors = 3 if name == "adam" else 2
    state = sum(v.numel() * 8 for v in start().values()) * vectors
    for way, again in (
        ({"recompute": "never"}, 1),
        ({"recompute": "tree"}, 1),
        ({"memory_budget": 6.5 * state}, 3),
        ({"truncation": 4}, 1),
    ):
        found = ohg.hypergradient(
            PROBLEM, start(), lam, estimator=ohg.Unroll(compile=True, **way), inner_solver=solver
        )
        truth = exact
        if "truncation" in way:
            truth = ohg.hypergradient(
                PROBLEM, start(), lam, estimator=ohg.Unroll(**way), inner_solver=solver
            )
        assert relative_error(found.value, truth.value) < 1e-10, way
        assert relative_error(found.inner_params, truth.inner_params) < 1e-12
        assert found.stats["num_recomputed_steps"] >= again


def test_the_way_back_can_be_gone_twice() -> None:
    lam = {k: v.requires_grad_() for k, v in hypers().items()}
    solver = BALL
    w = ohg.solve(
        inner, start(), lam, solver=solver, estimator=ohg.Unroll(compile=True), inner_batch=batch_of
    )
    loss = outer(w, lam, None)
    first, second = (
        torch.autograd.grad(loss, lam["log_decay"], retain_graph=True)[0] for _ in range(2)
    )
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


def test_what_no_step_depends_on_is_no_silent_zero() -> None:
    problem = ohg.BilevelProblem(inner, lambda w, lam, _: outer(w, hypers(), None), batch_of)
    with pytest.raises(ohg.ZeroHypergradientError, match="unused"):
        ohg.hypergradient(
            problem,
            start(),
            hypers(),
            estimator=ohg.Unroll(compile=True),
            inner_solver=BALL,
        )


def test_what_cannot_be_compiled_is_said() -> None:
    def branching(w: Params, lam: Params, batch: Any) -> Tensor:
        value = inner(w, lam, batch)
        return value if float(value.detach()) > 0 else -value

    with pytest.raises(ohg.RequirementError, match=r"one graph .* Use Unroll\(compile=False\)"):
        ohg.hypergradient(
            ohg.BilevelProblem(branching, outer, batch_of),
            start(),
            hypers(),
            estimator=ohg.Unroll(compile=True),
            inner_solver=BALL,
        )


def test_other_data_for_the_same_step_are_no_silent_error() -> None:
    calls = iter(range(10**6))
    problem = ohg.BilevelProblem(inner, outer, lambda step: batch_of(step + 50 * next(calls)))
    with pytest.raises(ohg.RequirementError, match="led elsewhere"):
        ohg.Unroll(compile=True).estimate(problem, BALL, start(), hypers(), 0)


def test_plans_take_as_few_steps_twice_as_the_budget_lets_them() -> None:
    found = [states_within(budget)(100, 1, 1) for budget in (100, 99, 52, 51, 37, 20, 16)]
    assert [plan.tapes for plan in found] == [1, 2, 2, 3, 3, 10, 1]
    assert found[-1].slots is not None
    with pytest.raises(ohg.RequirementError, match="cannot hold 100 steps"):
        states_within(3)(100, 1, 1)
