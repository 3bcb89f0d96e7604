"""Unrolling through compiled steps: the same hypergradients, and what cannot be compiled is said."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from problems import F64, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients._halves import can_be_cut
from optuna_hypergrad.hypergradients.compiled_steps import states_within

Params = dict[str, Tensor]
STEPS = 7
KEEPS_TAPES = can_be_cut()
tapes = pytest.mark.skipif(not KEEPS_TAPES, reason="this torch cannot be told what to keep")


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
        ({"recompute": "never"}, 0),
        ({"recompute": "tree"}, 1),
        ({"memory_budget": 6.5 * state}, 3),
        ({"memory_budget": 7.5 * state}, 1),
        ({"truncation": 4}, 0),
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
        if KEEPS_TAPES:
            assert bool(found.stats["num_recomputed_steps"]) == bool(again)
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
        ohg.Unroll(compile=True, recompute="tree").estimate(problem, BALL, start(), hypers(), 0)


def test_plans_take_as_few_steps_twice_as_the_budget_lets_them() -> None:
    found = [states_within(budget)(100, 1, 1) for budget in (100, 99, 52, 51, 37, 20, 16)]
    assert [plan.tapes for plan in found] == [1, 2, 2, 3, 3, 10, 1]
    assert found[-1].slots is not None
    with pytest.raises(ohg.RequirementError, match="cannot hold 100 steps"):
        states_within(3)(100, 1, 1)


class OwnDecay(ohg.GradientDescent):
    """Its steps shrink with their index, and by a hyperparameter that is no setting."""

    def step(self, evaluate: Any, w: Params, lam: Params, state: Any, index: int) -> Any:
        value, gradient = evaluate(w)
        eta = self.step_size * lam["own"] / (1 + index)
        return {k: v - eta * gradient[k] for k, v in w.items()}, state, value, gradient


class Extragradient(ohg.GradientDescent):
    def step(self, evaluate: Any, w: Params, lam: Params, state: Any, index: int) -> Any:
        value, gradient = evaluate(w)
        _, ahead = evaluate({k: v - 0.3 * gradient[k] for k, v in w.items()})
        return {k: v - 0.3 * ahead[k] for k, v in w.items()}, state, value, gradient


class ByValue(ohg.GradientDescent):
    def step(self, evaluate: Any, w: Params, lam: Params, state: Any, index: int) -> Any:
        value, gradient = evaluate(w)
        return {k: v - 0.1 * value * gradient[k] for k, v in w.items()}, state, value, gradient


USES_ALL = ohg.BilevelProblem(
    inner, lambda w, lam, _: outer(w, lam, _) + sum(v.sum() for v in lam.values()), batch_of
)


def both(problem: Any, solver: Any, lam: Params, recompute: Any = "auto") -> tuple[Params, Params]:
    ways = (ohg.Unroll(compile=True, recompute=recompute), ohg.Unroll(recompute="never"))
    found, truth = (
        ohg.hypergradient(problem, start(), lam, estimator=way, inner_solver=solver).value
        for way in ways
    )
    return found, truth


@pytest.mark.parametrize("recompute", ["never", "tree"])
@pytest.mark.parametrize(
    "solver",
    [
        ohg.Lookahead(ohg.GradientDescent(0.2, STEPS), period=3),
        Extragradient(0.3, STEPS),
        OwnDecay(0.3, STEPS),
    ],
    ids=lambda s: type(s).__name__,
)
def test_steps_that_go_their_own_ways_are_differentiated_as_they_are(
    solver: Any, recompute: str
) -> None:
    found, truth = both(USES_ALL, solver, hypers(own=0.8), recompute)
    assert relative_error(found, truth) < 1e-10


@tapes
def test_steps_that_depend_on_the_value_need_all_tapes() -> None:
    found, truth = both(USES_ALL, ByValue(0.3, STEPS), hypers(), "never")
    assert relative_error(found, truth) < 1e-10
    with pytest.raises(ohg.RequirementError, match="value of inner_objective"):
        both(USES_ALL, ByValue(0.3, STEPS), hypers(), "tree")


def test_hyperparameters_that_only_later_batches_use_count() -> None:
    def staged(w: Params, lam: Params, batch: Any) -> Tensor:
        data, regularized = batch
        loss = inner(w, {"log_decay": torch.zeros((), dtype=F64)}, data)
        return inner(w, lam, data) if regularized else loss

    problem = ohg.BilevelProblem(
        staged,
        lambda w, lam, _: outer(w, lam, _) + lam["log_decay"].sum(),
        inner_batch=lambda s: (batch_of(s), s > 2),
    )
    for recompute in ("never", "tree"):
        found, truth = both(problem, BALL, hypers(), recompute)
        assert relative_error(found, truth) < 1e-10


def small(w: Params, lam: Params, batch: Any) -> Tensor:
    return 0.5 * (lam["a"] * w["w"] ** 2).sum()


SMALL = ohg.BilevelProblem(small, lambda w, lam, _: w["w"].sum())


def test_many_solvers_share_one_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 2)  # of compilations; 8 otherwise
    for k in range(3):
        solver = ohg.GradientDescent(0.1 + 0.01 * k, 1)
        ohg.hypergradient(
            SMALL,
            {"w": start()["b"]},
            {"a": torch.tensor(0.5, dtype=F64)},
            estimator=ohg.Unroll(compile=True),
            inner_solver=solver,
        )


def test_bad_settings_and_objectives_are_refused() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, w: Params, lam: Params, batch: Any) -> Tensor:
            return inner(w, lam, batch)

    with pytest.raises(ValueError, match="compile True or False"):
        ohg.Unroll(compile="no")  # type: ignore[arg-type]
    with pytest.raises(ohg.RequirementError, match="must be hashable"):
        both(ohg.BilevelProblem(Unhashable(), outer, batch_of), BALL, hypers())


def two_layers(w: Params, lam: Params, batch: Any) -> Tensor:
    x, y = batch
    loss = torch.nn.functional.cross_entropy((x @ w["first"]).tanh() @ w["second"], y)
    return loss + sum((lam["log_decay"].exp() * v**2).sum() for v in w.values())


def products_on_the_way_back(**way: Any) -> int:
    """How many products of matrices the pullback of one hypergradient takes."""
    problem = ohg.BilevelProblem(two_layers, lambda w, lam, _: w["first"].sum(), batch_of)
    w = {"first": problems.randn(4, 40, seed=1), "second": problems.randn(40, 3, seed=2)}
    lam = {"log_decay": torch.tensor(-3.0, dtype=F64)}
    solved = ohg.Unroll(**way).solve(problem, ohg.GradientDescent(0.1, STEPS), w, lam)
    assert solved.pullback is not None
    cotangent = {k: torch.ones_like(v) for k, v in w.items()}
    solved.pullback(dict(cotangent))  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        solved.pullback(dict(cotangent))
    return sum(e.count for e in seen.key_averages() if e.key in ("aten::mm", "aten::addmm"))


@tapes
def test_the_way_back_of_a_tape_takes_no_product_again() -> None:
    tape = products_on_the_way_back(recompute="never", compile=True)
    assert 0 < tape <= products_on_the_way_back(recompute="never")
    assert tape < products_on_the_way_back(recompute="tree", compile=True)


def test_hypergradients_of_tapes_are_the_same_twice_bit_for_bit() -> None:
    first, second = (
        ohg.hypergradient(
            USES_ALL, start(), hypers(), estimator=ohg.Unroll(compile=True), inner_solver=BALL
        )
        for _ in range(2)
    )
    assert all(torch.equal(v, second.value[k]) for k, v in first.value.items())
    assert all(torch.equal(v, second.inner_params[k]) for k, v in first.inner_params.items())


def noisy(w: Params, lam: Params, batch: Any) -> Tensor:
    return 0.5 * (lam["a"] * torch.rand_like(w["w"]) * w["w"] ** 2).sum()


@tapes
def test_random_numbers_of_a_step_are_those_of_its_way_back() -> None:
    w = {"w": 1 + problems.randn(50, seed=1).abs()}
    found = ohg.hypergradient(
        ohg.BilevelProblem(noisy, lambda w, lam, _: w["w"].sum()),
        w,
        {"a": torch.tensor(0.5, dtype=F64)},
        estimator=ohg.Unroll(recompute="never", compile=True),
        inner_solver=ohg.GradientDescent(0.3, 1),
    )
    moved = found.inner_params["w"] - w["w"]  # - 0.3 a noise w
    assert relative_error(found.value, {"a": moved.sum() / 0.5}) < 1e-12
