"""Auto: what it takes for which problem, and that it is the same thing as taking that by hand."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import optuna
import problems
import pytest
import torch
from problems import F64, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator

Params = dict[str, Tensor]
STEPS = ohg.Adam(0.1, max_steps=20)


def inner(w: Params, lam: Params, batch: Any) -> Tensor:
    x, y = problems.randn(12, 5, seed=1), problems.randn(12, 4, seed=2)
    each = ((x @ w["w"]).tanh() - y).square().mean(1)
    decay = (lam["log_decay"].exp() * w["w"].square()).sum() if "log_decay" in lam else 0.0
    return each.mean() + decay + 0.01 * w["w"].square().sum()


def outer(w: Params, lam: Params, batch: Any) -> Tensor:
    x, y = problems.randn(12, 5, seed=3), problems.randn(12, 4, seed=4)
    return ((x @ w["w"]).tanh() - y).square().mean()


PROBLEM = ohg.BilevelProblem(inner, outer)
W = {"w": 0.3 * problems.randn(5, 4, seed=5)}
FEW = {"log_decay": torch.tensor(-2.0, dtype=F64)}
MANY = {"log_decay": -2 + 0.1 * problems.randn(3, 5, 4, seed=6)}
LR = {"lr": torch.tensor(0.1, dtype=F64)}


class Once(torch.autograd.Function):
    """tanh, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


def without_derivative(w: Params, lam: Params, batch: Any) -> Tensor:
    """Weights of classes, by which torch does not differentiate."""
    weights = lam["log_decay"].exp() * torch.arange(1.0, 5.0, dtype=F64)
    return torch.nn.functional.cross_entropy(w["w"], torch.arange(5) % 4, weight=weights)


def rough(w: Params, lam: Params, batch: Any) -> Tensor:
    return (Once.apply(w["w"]) - 1).square().mean() + lam["log_decay"].exp() * w["w"].square().sum()


@pytest.mark.parametrize(
    ("problem", "solver", "lam", "settings", "expected", "why"),
    [
        (PROBLEM, None, FEW, {}, ohg.Implicit, "is given"),
        (PROBLEM, ohg.LBFGS(), MANY, {}, ohg.Implicit, "found by LBFGS"),
        (
            PROBLEM,
            dataclasses.replace(STEPS, atol=1e-8),
            MANY,
            {},
            ohg.Implicit,
            "until its tolerance is met",
        ),
        (PROBLEM, STEPS, FEW, {}, ohg.ForwardMode, "only 1 hyperparameter,"),
        (
            PROBLEM,
            ohg.Adam("lr", max_steps=20, atol=1e-8),
            LR,
            {},
            ohg.ForwardMode,
            "only 1 hyperparameter,",
        ),
        (
            PROBLEM,
            ohg.Adam(lambda lam, t: 0.1 * lam["lr"], max_steps=20, rtol=1e-3),
            LR,
            {},
            ohg.ForwardMode,
            "only 1",
        ),
        (PROBLEM, STEPS, MANY, {}, ohg.Unroll, "60 hyperparameters, 20 inner parameters"),
        (
            PROBLEM,
            dataclasses.replace(STEPS, max_steps=10**6),
            MANY,
            {"memory_budget": 1e4},
            ohg.TwoPhase,
            r"TwoPhase\(Unroll\(truncation=20000\), .*1,000,000 inner steps of .* do not fit",
        ),
        (
            ohg.BilevelProblem(rough, outer),
            STEPS,
            FEW,
            {},
            ohg.ZerothOrder,
            "no second derivatives .*once_differentiable",
        ),
        (
            ohg.BilevelProblem(without_derivative, outer),
            STEPS,
            FEW,
            {},
            ohg.ZerothOrder,
            "no second derivatives .*argument 'weight'",
        ),
        (
            ohg.BlackBox(lambda lam: float(lam["log_decay"] ** 2)).problem(),
            ohg.BlackBox(lambda lam: float(lam["log_decay"] ** 2)),
            FEW,
            {},
            ohg.ZerothOrder,
            "black box",
        ),
    ],
    ids=lambda v: getattr(v, "__name__", None) or type(v).__name__,
)
def test_it_takes_what_the_table_says_and_says_why(
    problem: ohg.BilevelProblem,
    solver: Any,
    lam: Params,
    settings: dict[str, Any],
    expected: type[AbstractHypergradientEstimator],
    why: str,
) -> None:
    auto = ohg.Auto(**settings)
    choice = auto.choose(problem, solver, W, lam)
    assert type(choice.estimator) is expected
    line = auto.explain(problem, W, lam, inner_solver=solver)
    assert line.startswith(f"Auto takes {expected.__name__}(")
    assert "\n" not in line
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(line)


def test_it_is_what_it_chose() -> None:
    for lam in (FEW, MANY):
        estimate = ohg.hypergradient(PROBLEM, W, lam, estimator=ohg.Auto(), inner_solver=STEPS)
        exact = ohg.hypergradient(PROBLEM, W, lam, estimator=ohg.Unroll(), inner_solver=STEPS)
        assert relative_error(estimate.value, exact.value) < 1e-10


@pytest.fixture
def told() -> Iterator[list[str]]:
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("optuna.hypergradients"), Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_run_says_it_once_and_is_continued_with_the_same(told: list[str]) -> None:
    study = optuna.create_study()

    def run(trial: optuna.Trial, num_steps: int, solver: Any = STEPS) -> ohg.BilevelResult:
        return ohg.minimize_bilevel(
            PROBLEM,
            W,
            MANY,
            inner_solver=solver,
            estimator=ohg.Auto(memory_budget=3e4),
            num_steps=num_steps,
            trial=trial,
            checkpoint_every=1,
            progress=False,
        )

    whole = run(study.ask(), 4)
    assert [line for line in told if line.startswith("Auto takes")] == told[:1]
    assert told[0].startswith("Auto takes Unroll(memory_budget=3e+04): there are many")
    trial = study.ask()
    run(trial, 2)
    again = run(optuna.trial.Trial(study, trial._trial_id), 4)
    assert all(torch.equal(again.outer_params[k], v) for k, v in whole.outer_params.items())


def test_what_cannot_be_used_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Auto needs memory_budget > 0"):
        ohg.Auto(memory_budget=0)
    with pytest.raises(ValueError, match="Auto needs seed >= 0"):
        ohg.Auto(seed=-1)
    lam = {**FEW, "unused": torch.tensor(1.0, dtype=F64)}
    with pytest.raises(ohg.ZeroHypergradientError, match="'unused'"):
        ohg.hypergradient(PROBLEM, W, lam, estimator=ohg.Auto(), inner_solver=STEPS)


@pytest.mark.parametrize("estimator", [ohg.Implicit(), ohg.Unroll()], ids=lambda e: e.name)
def test_a_second_derivative_is_never_left_out(estimator: AbstractHypergradientEstimator) -> None:
    with pytest.raises(ohg.RequirementError, match="marked once_differentiable"):
        ohg.hypergradient(
            ohg.BilevelProblem(rough, outer), W, FEW, estimator=estimator, inner_solver=STEPS
        )


def test_differences_in_single_precision_take_longer_steps() -> None:
    box = ohg.BlackBox(lambda lam: float(lam["x"].square().sum()))
    lam = {"x": torch.tensor([95.0, 3.0])}
    found = ohg.hypergradient(
        box.problem(), box.start(), lam, estimator=ohg.Auto(), inner_solver=box
    )
    assert torch.allclose(found.value["x"], 2 * lam["x"], rtol=1e-2)
    said = ohg.Auto().explain(box.problem(), box.start(), lam, inner_solver=box)
    assert said.startswith("Auto takes ZerothOrder(num_directions=2, mu=0.01)")
