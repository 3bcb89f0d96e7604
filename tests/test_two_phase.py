"""TwoPhase: which estimator is asked when, also after a stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import optuna
import problems
import pytest
import torch
from problems import relative_error

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import EstimatorState

SOLVER = ohg.GradientDescent(0.3, max_steps=60)
CHEAP, DEAR = ohg.Unroll(truncation=1), ohg.Unroll()


def ridge() -> problems.Case:
    return problems.ridge()


def estimates(
    estimator: Any, values: Iterator[float] | None = None, num: int = 12
) -> list[ohg.HypergradientEstimate]:
    """Successive ones at one point; with an outer objective that takes ``values`` in turn, if given."""
    case, state, found = ridge(), EstimatorState(), []
    for step in range(num):
        problem = case.problem
        if values is not None:
            value = next(values)
            problem = ohg.BilevelProblem(
                problem.inner_objective, lambda w, lam, _, v=value: 0 * w["w"].sum() + v
            )
        estimate = ohg.hypergradient(
            problem,
            case.inner_params,
            case.outer_params,
            estimator=estimator,
            inner_solver=SOLVER,
            step=step,
            state=state.cold(),
        )
        state = estimate.state
        found.append(estimate)
    return found


def phases(found: list[ohg.HypergradientEstimate]) -> list[int]:
    return [int(e.stats["phase"]) for e in found]


@pytest.mark.parametrize("switch", [0, 1, 5])
def test_it_switches_at_a_step(switch: int) -> None:
    found = estimates(ohg.TwoPhase(CHEAP, DEAR, switch), num=7)
    assert phases(found) == [1] * switch + [2] * (7 - switch)
    cheap, dear = (estimates(e, num=1)[0].value for e in (CHEAP, DEAR))
    for step, estimate in enumerate(found):
        assert relative_error(estimate.value, dear if step >= switch else cheap) < 1e-14
    assert relative_error(cheap, dear) > 0.1


def test_it_switches_once_the_outer_objective_stalls() -> None:
    falling = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0]
    level = [5.1, 4.9, 5.0, 5.05, 5.0, 5.0, 1.0, 0.5]  # and stays switched when it falls again
    switch = ohg.Stalled(patience=3, rtol=0.01)
    found = estimates(ohg.TwoPhase(CHEAP, DEAR, switch), iter(falling + level), num=14)
    # means 9, 6, 5 and 5.02: the fourth is no improvement
    assert phases(found) == [1] * 12 + [2] * 2


def test_noise_alone_does_not_switch_it() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, generator=generator, dtype=torch.float64)
    values = (math.exp(-0.02 * t) * 100 + 3 * float(e) for t, e in enumerate(noise))
    switch = ohg.Stalled(patience=10, rtol=0.01)
    assert set(phases(estimates(ohg.TwoPhase(CHEAP, DEAR, switch), values, num=60))) == {1}


def test_values_that_grow_or_are_not_finite_switch_it() -> None:
    switch = ohg.Stalled(patience=2)
    found = estimates(ohg.TwoPhase(CHEAP, DEAR, switch), iter([1.0, 1.0, 2.0, 2.0, 3.0]), num=5)
    assert phases(found) == [1, 1, 1, 1, 2]


def test_each_phase_has_a_memory_of_its_own() -> None:
    inner = ohg.TwoPhase(CHEAP, DEAR, ohg.Stalled(patience=1))
    outer = ohg.TwoPhase(inner, ohg.TwoPhase(CHEAP, DEAR, ohg.Stalled(patience=2)), 4)
    found = estimates(outer, iter([3.0] * 10), num=10)
    nested = [e.state.numbers for e in found]
    assert [n.get("first/phase") for n in nested[:4]] == [1.0, 2.0, 2.0, 2.0]
    assert [n["second/phase"] for n in nested[4:]] == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert all("first/phase" not in n for n in nested[4:])


@pytest.mark.parametrize("warm_start", [True, False])
def test_a_run_that_is_continued_stays_in_its_phase(warm_start: bool) -> None:
    case = ridge()
    estimator = ohg.TwoPhase(CHEAP, DEAR, ohg.Stalled(patience=2, rtol=0.3))

    def run(trial: optuna.Trial, num_steps: int) -> ohg.BilevelResult:
        return ohg.minimize_bilevel(
            case.problem,
            case.inner_params,
            case.outer_params,
            inner_solver=SOLVER,
            estimator=estimator,
            num_steps=num_steps,
            warm_start=warm_start,
            trial=trial,
            checkpoint_every=1,
            progress=False,
        )

    study = optuna.create_study()
    whole = run(study.ask(), 9)
    known = [h["phase"] for h in whole.history]
    assert known[0] == 1.0
    assert known[-1] == 2.0
    trial = study.ask()
    run(trial, known.index(2.0) + 1)
    again = run(optuna.trial.Trial(study, trial._trial_id), 9)
    assert [h["phase"] for h in again.history] == known
    assert all(torch.equal(again.outer_params[k], v) for k, v in whole.outer_params.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"switch": -1}, "an integer from 0 on"),
        ({"switch": 1.5}, "an integer from 0 on"),
        ({"switch": True}, "an integer from 0 on"),
        ({"second": None}, "second="),
        ({"first": ohg.CG()}, "first="),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ohg.TwoPhase(**{"first": CHEAP, "second": DEAR, **settings})


@pytest.mark.parametrize(
    "settings", [{"patience": 0}, {"patience": 2.5}, {"rtol": -1.0}, {"rtol": 1.0}, {"rtol": "0"}]
)
def test_conditions_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Stalled needs"):
        ohg.Stalled(**settings)


def test_what_the_second_cannot_do_is_refused_at_once() -> None:
    case = ridge()
    with pytest.raises(ohg.RequirementError, match="ForwardGradient cannot differentiate LBFGS"):
        ohg.hypergradient(
            case.problem,
            case.inner_params,
            case.outer_params,
            estimator=ohg.TwoPhase(ohg.Implicit(), ohg.ForwardGradient(), 1000),
            inner_solver=ohg.LBFGS(),
        )
