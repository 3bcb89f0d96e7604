"""Forward gradients: unbiased, with the variance they promise, alone or by several processes; flat memory."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import optuna
import problems
import pytest
import test_unrolling as unrolling
import torch
from problems import F64, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import PartialEstimate
from optuna_hypergrad.hypergradients._directions import LAWS, Directions

PROBLEM, hypers, start = unrolling.PROBLEM, unrolling.hypers, unrolling.start
ADAM = ohg.Adam("lr", 6, beta1=0.8, weight_decay="l2", max_norm=0.5)
LAM = hypers(lr=0.05, l2=0.1)
N = 8 + 35 + 2
SLOPE = {"a": problems.randn(2, 3, seed=1), "b": problems.randn(6, seed=2)}
DRAWS = 4000


@functools.cache
def exact() -> ohg.HypergradientEstimate:
    return ohg.hypergradient(PROBLEM, start(), LAM, estimator=ohg.Unroll(), inner_solver=ADAM)


def found(step: int = 0, **settings: Any) -> ohg.HypergradientEstimate:
    return ohg.hypergradient(
        PROBLEM,
        start(),
        LAM,
        estimator=ohg.ForwardGradient(**settings),
        inner_solver=ADAM,
        step=step,
    )


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in tree.values()])


# exactness --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"directions": "orthogonal"},
        {"directions": "coordinate"},
        {"num_directions": 1000},
        {"memory_budget": 60e3},
        {"width": 7, "control_variate": ohg.Unroll(truncation=3)},
    ],
)
def test_as_many_directions_as_entries_are_exact(settings: dict[str, Any]) -> None:
    estimate = found(**{"num_directions": None, **settings})
    assert relative_error(estimate.value, exact().value) < 1e-10
    assert relative_error(estimate.inner_params, exact().inner_params) < 1e-14
    assert torch.equal(estimate.outer_value, exact().outer_value)
    assert estimate.stats["num_directions"] == N
    assert (estimate.stats["num_passes"] > 1) == ("memory_budget" in settings)


@pytest.mark.parametrize("law", LAWS)
def test_scalars_are_derivatives_in_the_directions(law: Any) -> None:
    """Of the indirect term; the direct one is there without directions."""
    estimator = ohg.ForwardGradient(num_directions=20, directions=law, seed=3)
    partial = estimator.partial(PROBLEM, ADAM, start(), LAM, step=5)
    rows = torch.stack([*Directions(law, 3, 5, LAM).each(range(20))])
    indirect = flat(exact().value) - flat(partial.known.value)
    assert torch.allclose(partial.scalars, rows @ indirect, rtol=1e-9, atol=1e-12)
    assert float(flat(partial.known.value).norm()) > 0


def test_hyperparameters_that_no_step_depends_on_have_no_noise() -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: ((w["w"] - lam["x"]) ** 2).sum(),
        lambda w, lam, _: (w["w"] ** 2).sum() + 3 * lam["y"].sum(),
    )
    w, lam = {"w": torch.zeros(3, dtype=F64)}, {"x": torch.ones(3, dtype=F64)}
    run = functools.partial(
        ohg.hypergradient,
        problem,
        w,
        estimator=ohg.ForwardGradient(num_directions=1),
        inner_solver=ohg.GradientDescent(0.1, 3),
    )
    estimate = run({**lam, "y": torch.ones(2, dtype=F64)})
    assert torch.equal(estimate.value["y"], torch.full((2,), 3.0, dtype=F64))
    with pytest.raises(ohg.ZeroHypergradientError, match="'z' under ForwardGradient is zero by"):
        run({**lam, "y": torch.ones(2, dtype=F64), "z": torch.ones(2, dtype=F64)})


# moments ----------------------------------------------------------------------------------------


def draws(law: Any, num_directions: int, control: Tensor | None = None) -> Tensor:
    """Estimates of ``SLOPE`` from exact scalars, one for each of ``DRAWS`` outer steps."""
    estimator = ohg.ForwardGradient(num_directions, law)
    zero = {k: torch.zeros_like(v) for k, v in SLOPE.items()}
    known = ohg.HypergradientEstimate(zero, torch.tensor(0.0), {})
    rows = []
    for step in range(DRAWS):
        numbers = range(num_directions)
        scalars = torch.stack(
            [v @ flat(SLOPE) for v in Directions(law, 0, step, SLOPE).each(numbers)]
        )
        partial = PartialEstimate(scalars, numbers, step, known, control, frozenset(SLOPE))
        rows.append(flat(estimator.combine(SLOPE, partial, scalars).value))
    return torch.stack(rows)


VARIANCES = {
    "orthogonal": lambda n, b: n / b - 1,
    "coordinate": lambda n, b: n / b - 1,
    "rademacher": lambda n, b: (n - 1) / b,
    "gaussian": lambda n, b: (n + 1) / b,
}


@pytest.mark.parametrize(
    ("law", "controlled"), [*((law, False) for law in LAWS), ("orthogonal", True)]
)
def test_estimates_are_unbiased_and_vary_as_they_promise(law: Any, controlled: bool) -> None:
    slope = flat(SLOPE)
    control = slope + 0.3 * problems.randn(12, seed=9) if controlled else None
    left = slope - control if control is not None else slope
    errors = draws(law, 4, control) - slope
    z = errors.mean(0) / errors.std(0) * math.sqrt(DRAWS)
    assert float(z.abs().max()) < 4.0
    variance = float(errors.square().sum(1).mean() / left.square().sum())
    assert variance == pytest.approx(VARIANCES[law](12, 4), rel=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 45])
def test_orthogonal_directions_are_orthogonal_and_isotropic(size: int) -> None:
    like = {"x": torch.zeros(size, dtype=F64)}
    frame = torch.stack([*Directions("orthogonal", 0, 0, like).each(range(size))])
    eye = torch.eye(size, dtype=F64)
    assert torch.allclose(frame @ frame.T, size * eye, atol=1e-11)
    if size > 7:
        return
    firsts = torch.stack(
        [next(Directions("orthogonal", 0, s, like).each(range(1))) for s in range(DRAWS)]
    )
    assert torch.allclose(firsts.T @ firsts / DRAWS, eye, atol=0.12)
    if (
        size == 7
    ):  # signs: without them, all rows but one are blind to a slope that is everywhere the same
        assert float((firsts.sum(1).abs() < 1e-9).double().mean()) < 0.3


def test_a_control_variate_leaves_less_to_the_directions() -> None:
    errors = {}
    for control in (None, ohg.Unroll(truncation=4)):
        estimates = [found(step, num_directions=4, control_variate=control) for step in range(12)]
        errors[control] = sum(relative_error(e.value, exact().value) ** 2 for e in estimates)
    plain, controlled = errors.values()
    assert controlled < plain / 2


# seeds and processes ----------------------------------------------------------------------------


def test_equal_seeds_and_steps_give_equal_bytes_and_others_do_not() -> None:
    once = found(3, seed=1)
    again, later, other = found(3, seed=1), found(4, seed=1), found(3, seed=2)
    for k in LAM:
        assert torch.equal(once.value[k], again.value[k])
        assert not torch.equal(once.value[k], later.value[k])
        assert not torch.equal(once.value[k], other.value[k])


@pytest.mark.parametrize("law", LAWS)
def test_a_direction_does_not_depend_on_where_a_range_begins(law: Any) -> None:
    sampled = Directions(law, 0, 2, SLOPE)
    rows = [*sampled.each(range(9))]
    for i, row in zip(range(4, 9), sampled.each(range(4, 9)), strict=True):
        assert torch.equal(row, rows[i])


PROCESS = """
import sys, torch
import test_forward_gradient as test
rank, path = int(sys.argv[1]), sys.argv[2]
found = test.share(rank, 2)
torch.save({"scalars": found.scalars, "known": found.known.value}, path)
"""
ESTIMATOR = ohg.ForwardGradient(20, width=4, memory_budget=60e3)


def share(rank: int, num_processes: int) -> PartialEstimate:
    numbers = ESTIMATOR.shares(start(), LAM, num_processes)[rank]
    return ESTIMATOR.partial(PROBLEM, ADAM, start(), LAM, step=7, directions=numbers)


def in_process(script: str, *arguments: str) -> str:
    here = Path(__file__).parent
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_two_processes_find_the_same_bytes_as_one(tmp_path: Path) -> None:
    parts = []
    for rank in range(2):
        in_process(PROCESS, str(rank), str(tmp_path / f"{rank}.pt"))
        parts.append(torch.load(tmp_path / f"{rank}.pt"))
    assert [len(p["scalars"]) for p in parts] == [8, 12]
    scalars = torch.cat([p["scalars"] for p in parts])
    together = ESTIMATOR.combine(LAM, share(0, 2), scalars)
    alone = ESTIMATOR.estimate(PROBLEM, ADAM, start(), LAM, step=7)
    for k in LAM:
        assert torch.equal(parts[0]["known"][k], parts[1]["known"][k])
        assert torch.equal(together.value[k], alone.value[k])


def test_shares_are_whole_groups_and_everything() -> None:
    for num_processes in (1, 2, 3, 5, 9):
        shares = ESTIMATOR.shares(start(), LAM, num_processes)
        assert [i for share in shares for i in share] == [*range(20)]
        assert all(share.start % 4 == 0 for share in shares)
    idle = ESTIMATOR.partial(PROBLEM, ADAM, start(), LAM, step=7, directions=range(0))
    assert idle.scalars.shape == (0,)
    assert torch.equal(idle.known.outer_value, exact().outer_value)


# memory -----------------------------------------------------------------------------------------

MEMORY = """
import resource, torch
import optuna_hypergrad as ohg

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(96, 64, generator=generator), torch.randint(0, 10, (96,), generator=generator)
w = {"a": torch.randn(64, 64, generator=generator) / 8, "b": torch.randn(64, 10, generator=generator) / 8}

def inner(w, lam, _):
    return torch.nn.functional.cross_entropy((x @ w["a"]).relu() @ w["b"], y) + sum(
        (lam["decay"].exp() * v**2).sum() for v in w.values()
    )

def outer(w, lam, _):
    return torch.nn.functional.cross_entropy((x @ w["a"]).relu() @ w["b"], y)

def peak(num_steps):
    for estimator in (ohg.ForwardMode(), ohg.ForwardGradient(2)):
        ohg.hypergradient(
            ohg.BilevelProblem(inner, outer), w,
            {"decay": torch.tensor(-6.0), "lr": torch.tensor(0.01)},
            estimator=estimator, inner_solver=ohg.HeavyBall("lr", num_steps),
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

print(peak(10), peak(1000))
"""


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """A thousand tapes would be 100 MB."""
    before, after = map(float, in_process(MEMORY).split())
    assert after - before < 12


# the outer loop ---------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    case = cases.case("logistic")

    def go(num_steps: int, trial: optuna.Trial | None = None) -> ohg.BilevelResult:
        return ohg.minimize_bilevel(
            case.problem,
            case.inner_params,
            case.outer_params,
            inner_solver=ohg.HeavyBall(0.3, 5),
            estimator=ohg.ForwardGradient(4),
            num_steps=num_steps,
            trial=trial,
            checkpoint_every=3,
        )

    straight = go(12)
    assert straight.outer_value < straight.history[0]["outer_value"]
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    trial = study.ask()
    go(6, trial)
    resumed = go(12, optuna.trial.Trial(study, trial._trial_id))
    assert [h["outer_value"] for h in resumed.history] == [
        h["outer_value"] for h in straight.history
    ]
    for k in straight.outer_params:
        assert torch.equal(resumed.outer_params[k], straight.outer_params[k])


def test_a_trajectory_that_diverges_is_a_failed_result() -> None:
    estimate = ohg.hypergradient(
        PROBLEM,
        start(),
        hypers(),
        estimator=ohg.ForwardGradient(4),
        inner_solver=ohg.GradientDescent(1e300, 5),
        throw=False,
    )
    assert estimate.result.status is ohg.Status.NONFINITE
    assert "lower its step size" in estimate.result.message
    assert all(v.isnan().all() for v in estimate.value.values())


# refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_directions": 0}, "num_directions >= 1 or None, got 0"),
        ({"directions": "haar"}, "one of 'orthogonal', .* got 'haar'"),
        ({"num_directions": 2.5}, r"num_directions >= 1, an integer, or None, got 2\.5"),
        ({"num_directions": True}, "an integer"),
        ({"num_directions": "8"}, "an integer, or None, got '8'"),
        ({"seed": -1}, "seed >= 0"),
        ({"seed": None}, "seed >= 0, an integer, got None"),
        ({"control_variate": ohg.Unroll}, "as control_variate=, got <class"),
        ({"width": 0}, "width >= 1"),
        ({"memory_budget": -1.0}, "memory_budget > 0 bytes"),
        ({"control_variate": ohg.ForwardGradient(2)}, "both have seed=0.*another seed"),
        ({"control_variate": ohg.Auto()}, "both have seed=0.*another seed"),
        (
            {"control_variate": ohg.TwoPhase(ohg.Unroll(), ohg.ForwardGradient(2), 0)},
            "both have seed=0.*another seed",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ohg.ForwardGradient(**settings)


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ohg.RequirementError, match=r"ForwardGradient\(memory_budget=100\).* Raise"):
        found(memory_budget=100)


@pytest.mark.parametrize("numbers", [range(2, 8), range(6), range(16, 24), range(8, 0), [0, 1]])
def test_torn_groups_are_refused(numbers: Any) -> None:
    with pytest.raises(ohg.RequirementError, match=r"directions.*shares"):
        ESTIMATOR.partial(PROBLEM, ADAM, start(), LAM, directions=numbers)


def test_scalars_that_are_missing_are_noticed() -> None:
    part = share(0, 2)
    with pytest.raises(ohg.RequirementError, match=r"all 20 directions, and was given \(8,\)"):
        ESTIMATOR.combine(LAM, part, part.scalars)


@pytest.mark.parametrize("number", [0, -1, 2.5])
def test_numbers_of_processes_that_mean_nothing_are_refused(number: Any) -> None:
    with pytest.raises(ValueError, match="shares needs num_processes >= 1"):
        ohg.ForwardGradient(20).shares(start(), hypers(), number)


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="hypergradient needs step >= 0, got -1"):
        ohg.hypergradient(
            PROBLEM,
            start(),
            hypers(),
            estimator=ohg.ForwardGradient(),
            inner_solver=ohg.HeavyBall(0.1, 3),
            step=-1,
        )
