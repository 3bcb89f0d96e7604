"""Lookahead: its variance (GT11), its derivatives, and that nothing is lost when a run is continued."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import optuna
import pytest
import test_unrolling as unrolling
import torch
from problems import F64, randn, relative_error
from torch import Tensor

import optuna_hypergrad as ohg

Params = dict[str, Tensor]
PROBLEM, hypers, start = unrolling.PROBLEM, unrolling.hypers, unrolling.start


def noisy(num_entries: int, h: float) -> ohg.BilevelProblem:
    """Each entry is a noisy quadratic of its own: curvature ``h``, centers drawn anew at each step."""
    return ohg.BilevelProblem(
        lambda w, lam, batch: 0.5 * h * ((w["w"] - batch) ** 2).sum(),
        lambda w, lam, batch: w["w"].sum(),
        inner_batch=lambda step: randn(num_entries, seed=step),
    )


@pytest.mark.parametrize(
    ("slow_step", "period", "lr"), [(0.5, 5, 0.3), (0.2, 3, 0.1), (0.8, 10, 0.1)]
)
def test_the_variance_on_a_noisy_quadratic_is_that_of_the_formula(
    slow_step: float, period: int, lr: float
) -> None:
    """Zhang et al. (2019), proposition 2: relative to the variance of plain descent."""
    h, entries = 1.0, 20_000
    q = 1 - lr * h
    above = slow_step**2 * (1 - q ** (2 * period))
    ratio = above / (above + 2 * slow_step * (1 - slow_step) * (1 - q**period))
    assert lr != 0.3 or ratio == pytest.approx(0.3687, abs=5e-5)
    plain = ohg.GradientDescent(lr, max_steps=600)
    w0, lam = {"w": torch.zeros(entries, dtype=F64)}, {"c": torch.zeros((), dtype=F64)}
    slow = ohg.inner_solve(noisy(entries, h), ohg.Lookahead(plain, period, slow_step), w0, lam)
    descent = lr**2 * h**2 / (1 - q**2)
    found = float(slow.inner_params["w"].var())
    assert found == pytest.approx(ratio * descent, rel=0.04)
    fast = ohg.inner_solve(noisy(entries, h), plain, w0, lam)
    assert float(fast.inner_params["w"].var()) == pytest.approx(descent, rel=0.04)


@pytest.mark.parametrize(
    "inner_solver",
    [
        ohg.HeavyBall(0.2, 12, momentum=0.7, weight_decay=0.1, max_norm=0.5),
        ohg.Adam(lambda lam, t: 0.1 / (t + 1), 12),
        ohg.Lookahead(ohg.GradientDescent(0.2, 12), 2),
    ],
    ids=lambda s: s.name,
)
@pytest.mark.parametrize("period", [1, 4, 6])
def test_a_whole_slow_step_is_the_inner_solver(inner_solver: Any, period: int) -> None:
    lam = hypers()
    plain, wrapped = (
        ohg.inner_solve(PROBLEM, s, start(), lam)
        for s in (inner_solver, ohg.Lookahead(inner_solver, period, slow_step=1.0))
    )
    for k, v in plain.inner_params.items():
        assert torch.equal(wrapped.inner_params[k], v)


def test_between_two_slow_steps_the_inner_params_stand_still() -> None:
    lam, solver = hypers(), ohg.Lookahead(ohg.GradientDescent(0.2), 3)
    ends = [
        ohg.inner_solve(PROBLEM, solver, start(), lam, num_steps=n).inner_params["w1"]
        for n in range(7)
    ]
    assert all(torch.equal(ends[n], start()["w1"]) for n in (0, 1, 2))
    assert torch.equal(ends[4], ends[3])
    assert torch.equal(ends[5], ends[3])
    assert not torch.equal(ends[3], ends[0])
    assert not torch.equal(ends[6], ends[3])


def lookahead(w: Params, g: Params, lam: Params, memory: dict[str, Any], t: int) -> Params:
    """The fast weights of Lookahead around momentum descent; the slow ones in ``memory``."""
    slow = memory.setdefault("slow", w)
    fast = {}
    for k in w:
        memory[k] = lam["momentum"] * memory.get(k, 0.0) + g[k]
        fast[k] = w[k] - lam["lr"] * memory[k]
    if t % 4 == 3:
        fast = {k: slow[k] + lam["slow_step"] * (fast[k] - slow[k]) for k in w}
        memory["slow"] = fast
    return fast


SOLVER = ohg.Lookahead(ohg.HeavyBall("lr", 12, momentum="momentum"), 4, "slow_step")
STEERED = {"lr": 0.3, "momentum": 0.6, "slow_step": 0.4}


@pytest.mark.parametrize(
    "estimator",
    [
        ohg.Unroll(),
        ohg.Unroll(recompute="sqrt"),
        ohg.Unroll(recompute="tree"),
        ohg.Unroll(truncation=12),
        ohg.ForwardMode(),
        ohg.ForwardGradient(num_directions=None),
    ],
    ids=lambda e: f"{e.name}-{getattr(e, 'recompute', '')}",
)
def test_hypergradients_through_it_equal_plain_autograd(estimator: Any) -> None:
    lam = hypers(**STEERED)
    w, exact = unrolling.by_hand(lookahead, lam, num_steps=12)
    found = ohg.hypergradient(PROBLEM, start(), lam, estimator=estimator, inner_solver=SOLVER)
    assert set(exact) >= {"lr", "momentum", "slow_step"}
    assert relative_error(found.value, exact) < 1e-10
    assert relative_error(found.inner_params, {k: v.detach() for k, v in w.items()}) < 1e-12


def test_the_first_weights_have_a_gradient_though_the_state_holds_them_too() -> None:
    lam = hypers(**STEERED)
    w0 = {k: v.requires_grad_() for k, v in start().items()}
    w = ohg.solve(
        PROBLEM.inner_objective,
        w0,
        lam,
        solver=SOLVER,
        estimator=ohg.Unroll(),
        inner_batch=PROBLEM.inner_batch,
    )
    found = torch.autograd.grad(unrolling.outer(w, lam, None), tuple(w0.values()))
    by_hand, memory = w0, {}
    for t in range(12):
        g = torch.autograd.grad(
            unrolling.inner(by_hand, lam, unrolling.batch_of(t)),
            tuple(by_hand.values()),
            create_graph=True,
        )
        by_hand = lookahead(by_hand, dict(zip(w0, g, strict=True)), lam, memory, t)
    exact = torch.autograd.grad(unrolling.outer(by_hand, lam, None), tuple(w0.values()))
    pairs = (dict(zip(w0, t, strict=True)) for t in (found, exact))
    assert relative_error(*pairs) < 1e-10


@pytest.mark.parametrize("cut", [3, 4, 6])
def test_a_solve_in_two_parts_is_the_same_solve(cut: int) -> None:
    lam = hypers(**STEERED)
    whole = ohg.inner_solve(PROBLEM, SOLVER, start(), lam)
    first = ohg.inner_solve(PROBLEM, SOLVER, start(), lam, num_steps=cut)
    rest = ohg.inner_solve(
        PROBLEM, SOLVER, first.inner_params, lam, start=cut, state=first.state, num_steps=12 - cut
    )
    for k, v in whole.inner_params.items():
        assert torch.equal(rest.inner_params[k], v)
    for role, tree in whole.state.items():
        for k, v in tree.items():
            assert torch.equal(rest.state[role][k], v)


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    """Three inner steps of a period of four are taken between checkpoints: the phase has to be known."""
    study = optuna.create_study()
    solver = dataclasses.replace(SOLVER, max_steps=3)

    def go(num_steps: int, trial: optuna.Trial) -> ohg.BilevelResult:
        return ohg.minimize_bilevel(
            PROBLEM,
            start(),
            hypers(**STEERED),
            inner_solver=solver,
            estimator=ohg.Unroll(),
            num_steps=num_steps,
            warm_start=True,
            bounds={"slow_step": (0.1, 0.9), "momentum": (0.1, 0.9), "lr": (0.01, 0.5)},
            trial=trial,
            checkpoint_every=1,
        )

    straight = go(7, study.ask())
    trial = study.ask()
    go(3, trial)
    resumed = go(7, optuna.trial.Trial(study, trial._trial_id))
    for k, v in straight.outer_params.items():
        assert torch.equal(resumed.outer_params[k], v)
    for k, v in straight.inner_params.items():
        assert torch.equal(resumed.inner_params[k], v)


def test_sama_is_adapted_to_the_last_slow_step_wherever_the_run_ends() -> None:
    """At the end of a period the reaction to the last gradient is that of descent, ``slow_step`` times; so it is after it."""
    case = cases.case("isotropic")

    def estimate(solver: Any, **settings: Any) -> ohg.HypergradientEstimate:
        w, lam = case.inner_params, case.outer_params
        return ohg.hypergradient(
            case.problem, w, lam, estimator=ohg.SAMA(), inner_solver=solver, **settings
        )

    descent = ohg.GradientDescent(0.1, 12)
    for solver in (
        ohg.Lookahead(descent, 4),
        ohg.Lookahead(descent, 5),
        ohg.Lookahead(ohg.Lookahead(descent, 5, 1.0), 1),
        ohg.Lookahead(ohg.Lookahead(descent, 2, 1.0), 5, 0.5),
    ):
        found = estimate(solver)
        a = solver.slow_step * getattr(solver.inner_solver, "slow_step", 1.0)
        here = {"w": found.inner_params["w"]}
        plain = ohg.hypergradient(
            case.problem, here, case.outer_params, estimator=ohg.T1T2(0.1 * a)
        )
        assert relative_error(found.value, plain.value) < 1e-8
    with pytest.raises(ohg.ZeroHypergradientError, match=r"none of the 4 steps.*Raise max_steps"):
        estimate(ohg.Lookahead(ohg.GradientDescent(0.1, 4), 5))
    begun = ohg.hypergradient(
        case.problem,
        case.inner_params,
        case.outer_params,
        estimator=ohg.Unroll(),
        inner_solver=ohg.Lookahead(ohg.GradientDescent(0.1, 3), 5),
    )
    goes_on = estimate(ohg.Lookahead(ohg.GradientDescent(0.1, 3), 5), state=begun.state)
    assert all(float(v.abs().max()) > 0 for v in goes_on.value.values())


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((ohg.LBFGS(),), {}, "goes around a step solver"),
        ((0.1,), {}, "goes around a step solver"),
        ((ohg.GradientDescent(),), {"period": 0}, "period >= 1"),
        ((ohg.GradientDescent(),), {"period": 2.5}, "period >= 1, an integer"),
        ((ohg.GradientDescent(),), {"slow_step": 0.0}, "0 < slow_step <= 1"),
        ((ohg.GradientDescent(),), {"slow_step": 1.1}, "0 < slow_step <= 1"),
        ((ohg.GradientDescent(),), {"slow_step": float("nan")}, "slow_step"),
        ((ohg.GradientDescent(),), {"slow_step": torch.tensor(0.5)}, "is a tensor"),
        ((ohg.GradientDescent(),), {"max_steps": -1}, "max_steps >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    arguments: tuple[Any, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ohg.Lookahead(*arguments, **settings)


def test_it_says_what_steers_it_and_takes_over_what_is_not_given() -> None:
    inner = ohg.HeavyBall("lr", 40, atol=1e-3, momentum=lambda lam, t: 0.5, weight_decay=0.1)
    solver = ohg.Lookahead(inner, slow_step="a")
    assert solver.hyperparameters() == {"lr", "a"}
    assert solver.has_schedule()
    assert (solver.max_steps, solver.atol, solver.weight_decay) == (40, 1e-3, 0.1)
    assert ohg.Lookahead(inner, max_steps=7).max_steps == 7
    with pytest.raises(ohg.ZeroHypergradientError, match="'momentum', 'slow_step' steers"):
        ohg.hypergradient(
            PROBLEM,
            start(),
            {k: v for k, v in hypers(**STEERED).items() if k != "lr"},
            estimator=ohg.Implicit(),
            inner_solver=dataclasses.replace(
                SOLVER, inner_solver=ohg.HeavyBall(0.1, momentum="momentum")
            ),
        )
    with pytest.raises(ohg.RequirementError, match="must be one number"):
        ohg.inner_solve(
            PROBLEM,
            ohg.Lookahead(ohg.GradientDescent(), slow_step=lambda lam, t: {"w1": 0.5}),
            start(),
            hypers(),
        )
