"""The outer loop: descent, bounds, warm and cold, trials, checkpoints, refusals."""

from __future__ import annotations

import functools
import math
import re

import cases
import optuna
import pytest
import torch
from problems import F64, relative_error

import optuna_hypergrad as ohg
from optuna_hypergrad.outer_run import OuterRun

ADAM = functools.partial(torch.optim.Adam, lr=0.1)


def run(shift=0.0, inner_shift=0.0, **settings):
    case = cases.case("ridge")
    return ohg.minimize_bilevel(
        case.problem,
        {k: v + inner_shift for k, v in case.inner_params.items()},
        {k: v + shift for k, v in case.outer_params.items()},
        **{
            "inner_solver": ohg.LBFGS(),
            "num_steps": 15,
            "bounds": {"log_decay": (-6.0, 2.0)},
            **settings,
        },
    )


def test_outer_value_falls_to_a_stationary_point() -> None:
    found = run(num_steps=250, optimizer=functools.partial(torch.optim.Adam, lr=0.05))
    case = cases.case("ridge")
    slope = case.truth(found.outer_params)["log_decay"]
    at = found.outer_params["log_decay"]
    free = (at > -6.0) & (at < 2.0)
    assert found.history[0]["outer_value"] > found.outer_value
    assert float(slope[free].norm()) < 1e-2 * float(cases.truth("ridge")["log_decay"].norm())
    assert found.value_kind == "warm"
    assert found.result.success


def test_outer_value_belongs_to_the_returned_parameters() -> None:
    found = run()
    case = cases.case("ridge")
    w = case.solution(found.outer_params)
    assert relative_error(found.inner_params, w) < 1e-6
    assert found.outer_value == pytest.approx(
        float(case.problem.outer_objective(w, found.outer_params, None)), rel=1e-6
    )


def test_arguments_are_not_written_to() -> None:
    case = cases.case("ridge")
    before = {k: v.clone() for k, v in (case.inner_params | case.outer_params).items()}
    run()
    for k, v in (case.inner_params | case.outer_params).items():
        assert torch.equal(v, before[k])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_hold_at_every_step_exactly(log: bool, dtype: torch.dtype) -> None:
    low, high = 0.7, 1.1  # both round outwards in float32
    seen = []

    def outer(w, lam, _):
        seen.append(lam["x"].detach().clone())
        return ((w["w"] - torch.tensor([-5.0, 5.0, 1.0], dtype=dtype)) ** 2).sum()

    problem = ohg.BilevelProblem(lambda w, lam, _: ((w["w"] - lam["x"]) ** 2).sum(), outer)
    start = torch.full((3,), 0.9, dtype=dtype)
    found = ohg.minimize_bilevel(
        problem,
        {"w": torch.zeros(3, dtype=dtype)},
        {"x": start},
        inner_solver=ohg.GradientDescent(0.5, max_steps=1),
        optimizer=functools.partial(torch.optim.SGD, lr=1.0),
        bounds={"x": ohg.Domain(low, high, log=log, unit=0.1)},
        num_steps=12,
    )
    for x in [*seen, found.outer_params["x"]]:
        assert float(x.double().min()) >= low
        assert float(x.double().max()) <= high
    assert float(found.outer_params["x"][0]) == pytest.approx(low, rel=1e-6)
    assert float(found.outer_params["x"][1]) == pytest.approx(high, rel=1e-6)


def test_a_bound_lets_go_when_the_gradient_turns() -> None:
    """Internal coordinates are projected too: nothing has to come back from beyond the bound."""
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (w["w"] - lam["x"]) ** 2,
        lambda w, lam, t: (w["w"] - (5.0 if t < 10 else -5.0)) ** 2,
        outer_batch=lambda t: t,
    )
    found = ohg.minimize_bilevel(
        problem,
        {"w": torch.tensor(0.0, dtype=F64)},
        {"x": torch.tensor(0.5, dtype=F64)},
        inner_solver=ohg.GradientDescent(0.5, max_steps=1),
        optimizer=functools.partial(torch.optim.SGD, lr=0.02),
        bounds={"x": ohg.Domain(0.0, 0.6, unit=1.0)},
        num_steps=12,
    )
    assert float(found.outer_params["x"]) < 0.3


def test_log_coordinates_take_the_chain_rule() -> None:
    """One SGD step in log x moves log x by lr * x * df/dx."""
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (w["w"] - lam["x"]) ** 2, lambda w, lam, _: 3.0 * w["w"]
    )
    x = 0.02
    found = ohg.minimize_bilevel(
        problem,
        {"w": torch.tensor(0.0, dtype=F64)},
        {"x": torch.tensor(x, dtype=F64)},
        inner_solver=ohg.GradientDescent(0.5, max_steps=1),
        optimizer=functools.partial(torch.optim.SGD, lr=1.0),
        bounds={"x": ohg.Domain(1e-6, 1e2, log=True)},
        num_steps=1,
    )
    assert float(found.outer_params["x"]) == pytest.approx(x * math.exp(-3.0 * x), rel=1e-12)


def test_cold_runs_solve_from_the_start_each_time() -> None:
    starts = []

    def inner(w, lam, _):
        starts.append(float(w["w"].detach()))
        return (w["w"] - lam["x"]) ** 2

    problem = ohg.BilevelProblem(inner, lambda w, lam, _: w["w"] ** 2)
    for warm in (False, True):
        starts.clear()
        found = ohg.minimize_bilevel(
            problem,
            {"w": torch.tensor(7.0, dtype=F64)},
            {"x": torch.tensor(1.0, dtype=F64)},
            inner_solver=ohg.GradientDescent(0.1, max_steps=1),
            num_steps=4,
            warm_start=warm,
        )
        assert (starts.count(7.0) > 2) is not warm
        assert found.value_kind == ("warm" if warm else "cold")


def test_steps_that_fall() -> None:
    """``x`` moves by ``lr * lr_lambda(t)`` times its hypergradient, which is 3 here."""
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (w["w"] - lam["x"]) ** 2, lambda w, lam, _: 3.0 * w["w"]
    )
    found = ohg.minimize_bilevel(
        problem,
        {"w": torch.tensor(0.0, dtype=F64)},
        {"x": torch.tensor(2.0, dtype=F64)},
        inner_solver=ohg.GradientDescent(0.5, max_steps=1),
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        lr_lambda=lambda t: (1 + t) ** -0.5,
        num_steps=7,
    )
    moved = 0.3 * sum((1 + t) ** -0.5 for t in range(7))
    assert float(found.outer_params["x"]) == pytest.approx(2.0 - moved, rel=1e-12)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, None, "half", torch.ones(2)], ids=repr)
def test_a_step_that_is_no_number_is_refused(bad: object) -> None:
    said = re.escape(f"lr_lambda gives {bad!r} at outer step 3")
    with pytest.raises(ValueError, match=said):
        run(lr_lambda=lambda t: 1.0 if t < 3 else bad)


@pytest.mark.parametrize("solver", [ohg.HeavyBall(0.1, max_steps=5), ohg.Adam(0.05, max_steps=5)])
@pytest.mark.parametrize("stop_at", [5, 10])
@pytest.mark.parametrize("lr_lambda", [None, lambda t: 0.9**t], ids=["steady", "falling"])
def test_an_interrupted_run_goes_on_bit_for_bit(solver, stop_at, lr_lambda, tmp_path) -> None:
    case = cases.case("logistic")

    def go(trial, num_steps):
        return ohg.minimize_bilevel(
            case.problem,
            case.inner_params,
            case.outer_params,
            inner_solver=solver,
            estimator=ohg.Unroll(),
            optimizer=ADAM,
            lr_lambda=lr_lambda,
            num_steps=num_steps,
            checkpoint_every=5,
            trial=trial,
        )

    straight = ohg.minimize_bilevel(
        case.problem,
        case.inner_params,
        case.outer_params,
        inner_solver=solver,
        estimator=ohg.Unroll(),
        optimizer=ADAM,
        lr_lambda=lr_lambda,
        num_steps=20,
    )
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    trial = study.ask()
    go(trial, stop_at)
    again = optuna.trial.Trial(
        optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{tmp_path}/study.db"),
        trial._trial_id,
    )
    resumed = go(again, 20)
    assert [h["outer_value"] for h in resumed.history] == [
        h["outer_value"] for h in straight.history
    ]
    for k in straight.outer_params:
        assert torch.equal(resumed.outer_params[k], straight.outer_params[k])
    for k in straight.inner_params:
        assert torch.equal(resumed.inner_params[k], straight.inner_params[k])


def fresh(step: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(step)
    return {"w": torch.randn(6, 3, generator=rng, dtype=F64)}


def test_each_outer_step_may_have_a_start_of_its_own(tmp_path) -> None:
    """The starts are asked for by step, also after an interruption, and the run goes on bit for bit."""
    case, asked = cases.case("logistic"), []

    def starts(step):
        asked.append(step)
        return fresh(step)

    def go(num_steps, trial=None, **settings):
        asked.clear()
        return ohg.minimize_bilevel(
            case.problem,
            starts,
            case.outer_params,
            inner_solver=ohg.HeavyBall(0.1, max_steps=5),
            estimator=ohg.Unroll(),
            optimizer=ADAM,
            num_steps=num_steps,
            warm_start=False,
            checkpoint_every=3 if trial else None,
            trial=trial,
            **settings,
        )

    straight = go(6, final_eval="retrain")
    assert asked == [0, 0, 1, 1, 0, 1, 2, 3, 4, 5, 6]
    last = ohg.inner_solve(
        case.problem, ohg.HeavyBall(0.1, max_steps=5), fresh(6), straight.outer_params
    )
    assert torch.equal(straight.inner_params["w"], last.inner_params["w"])
    assert straight.retrained_value == straight.outer_value
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    trial = study.ask()
    go(3, trial)
    resumed = go(6, optuna.trial.Trial(study, trial._trial_id))
    assert asked == [0, 0, 1, 1, 3, 4, 5, 6]
    assert [h["outer_value"] for h in resumed.history] == [
        h["outer_value"] for h in straight.history
    ]
    for k, v in straight.outer_params.items():
        assert torch.equal(resumed.outer_params[k], v)


@pytest.mark.parametrize(
    ("starts", "warm_start", "error", "message"),
    [
        (fresh, True, ohg.RequirementError, "a function of the outer step, and warm starts go on"),
        (
            lambda step, calls=iter(range(99)): fresh(next(calls)),
            False,
            ohg.ProblemError,
            r"inner_params\(0\) gave different tensors",
        ),
        (
            lambda step, calls=iter(range(99)): fresh(next(calls) if step else 0),
            False,
            ohg.ProblemError,
            r"inner_params\(1\) gave different tensors",
        ),
        (
            lambda step: {"w": torch.zeros(6 - step, 3, dtype=F64)},
            False,
            ohg.ProblemError,
            r"inner_params\(1\)\['w'\] has shape \(5, 3\) .*step 0 has \(6, 3\)",
        ),
        (
            lambda step: {"w": fresh(step)["w"].float() if step == 2 else fresh(step)["w"]},
            False,
            ohg.ProblemError,
            r"inner_params\(2\)\['w'\] has .*float32 .*step 0 has .*float64",
        ),
        (
            lambda step: {"v" if step else "w": fresh(step)["w"]},
            False,
            ohg.ProblemError,
            r"inner_params\(1\) names \['v'\], and inner_params\(0\) names \['w'\]",
        ),
        (
            lambda step: {"w": fresh(step)["w"] * float("nan" if step else 1.0)},
            False,
            ohg.ProblemError,
            r"inner_params\(1\)\['w'\] holds NaN or infinite",
        ),
        (lambda step: None, False, ohg.ProblemError, "inner_params must be a non-empty dict"),
        (lambda step: {"w": 3.0}, False, ohg.ProblemError, "not a tensor"),
    ],
)
def test_starts_that_make_no_sense_are_refused(starts, warm_start, error, message) -> None:
    case = cases.case("logistic")
    with pytest.raises(error, match=message):
        ohg.minimize_bilevel(
            case.problem,
            starts,
            case.outer_params,
            inner_solver=ohg.HeavyBall(0.1, max_steps=5),
            estimator=ohg.Unroll(),
            num_steps=2,
            warm_start=warm_start,
        )


def test_values_are_reported_and_the_pruner_is_obeyed() -> None:
    class Pruner(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.last_step is not None and trial.last_step >= 6

    study = optuna.create_study(pruner=Pruner())
    study.optimize(lambda trial: run(trial=trial, num_steps=30).outer_value, n_trials=1)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert list(trial.intermediate_values) == list(range(7))


def test_final_values_are_stored_and_old_checkpoints_go(tmp_path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    found = []

    def objective(trial):
        found.append(run(trial=trial, num_steps=4, checkpoint_every=1))
        return found[-1].outer_value - trial.number

    study.optimize(objective, n_trials=4)
    loaded = ohg.load_tensors(study)["bilevel"]
    assert torch.equal(loaded["log_decay"], found[3].outer_params["log_decay"])
    store = ohg.TensorStore.of_study(study)
    readable = []
    for trial in study.trials:
        for pointer in store.pointers(trial, role="checkpoint"):
            try:
                store.load(pointer)
                readable.append(trial.number)
            except ohg.MissingTensorError:
                pass
        (value,) = store.pointers(trial, role="value")
        assert torch.equal(
            store.load(value)["log_decay"], found[trial.number].outer_params["log_decay"]
        )
    assert 3 in readable
    assert 0 not in readable


def test_reports_are_thinned() -> None:
    study = optuna.create_study()
    study.optimize(
        lambda trial: (
            run(
                trial=trial, num_steps=450, inner_solver=ohg.GradientDescent(0.3, max_steps=1)
            ).outer_value
        ),
        n_trials=1,
    )
    assert 100 < len(study.trials[0].intermediate_values) <= 200
    assert study.trials[0].user_attrs["value_kind"] == "warm"


def test_final_values_are_stored_without_checkpoints_too() -> None:
    study = optuna.create_study()
    trial = study.ask()
    found = run(trial=trial, num_steps=2, checkpoint_every=0)
    study.tell(trial, found.outer_value)
    loaded = ohg.load_tensors(study)["bilevel"]["log_decay"]
    assert torch.equal(loaded, found.outer_params["log_decay"])
    assert not ohg.TensorStore.of_study(study).pointers(study.trials[0], role="checkpoint")


def test_a_study_of_two_objectives_is_not_reported_to() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.optimize(lambda trial: (run(trial=trial, num_steps=2).outer_value, 0.0), n_trials=1)
    assert study.trials[0].state == optuna.trial.TrialState.COMPLETE


# refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"bounds": {"log_decai": (0.0, 1.0)}},
            ohg.HyperparameterError,
            "Did you mean 'log_decay'",
        ),
        (
            {"bounds": {"log_decay": (2.0, -6.0)}},
            ohg.HyperparameterError,
            "low=2.0 is above high=-6.0",
        ),
        ({"bounds": {"log_decay": (float("nan"), 1.0)}}, ohg.HyperparameterError, "a bound is NaN"),
        (
            {"bounds": {"log_decay": ohg.Domain(-1.0, 1.0, log=True)}},
            ohg.HyperparameterError,
            "raise low above 0",
        ),
        (
            {"bounds": {"log_decay": (5.0, 6.0)}},
            ohg.HyperparameterError,
            "'log_decay'.* starts outside its bounds",
        ),
        ({"num_steps": -1}, ValueError, "num_steps >= 0"),
        ({"burn_in": -1}, ValueError, "burn_in >= 0"),
        ({"checkpoint_every": -5}, ValueError, "checkpoint_every >= 0 or None, got -5"),
        ({"num_steps": 2.5}, ValueError, r"num_steps >= 0, an integer, got 2\.5"),
        ({"burn_in": None}, ValueError, "burn_in >= 0, an integer, got None"),
        (
            {"bounds": {"log_decay": 3.0}},
            ohg.HyperparameterError,
            r"give \(low, high\), or a Domain",
        ),
        ({"lr_lambda": 0.5}, ValueError, "lr_lambda= to be a function of the outer step"),
        ({"optimizer": "adam"}, ValueError, "optimizer= to be a factory"),
        ({"estimator": ohg.Unroll()}, ohg.RequirementError, "LBFGS cannot be unrolled"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        run(**settings)


@pytest.mark.parametrize("checkpoint_every", [None, 0])
def test_a_second_run_of_the_same_name_is_refused(checkpoint_every: int | None) -> None:
    study = optuna.create_study()
    trial = study.ask()
    first = run(trial=trial, num_steps=1, checkpoint_every=checkpoint_every)
    with pytest.raises(ohg.HyperparameterError, match=r"used by another run of trial 0.*its own"):
        run(trial=trial, num_steps=2, checkpoint_every=checkpoint_every)
    other = run(trial=trial, num_steps=1, checkpoint_every=checkpoint_every, name="fold 1")
    assert other.outer_value == first.outer_value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": {"log_decay": (-6.0, 3.0)}}, r"bounds\['log_decay'\] \(then .*2.0.*now .*3.0"),
        ({"bounds": {"log_decay": ohg.Domain(-6.0, 2.0, unit=1.0)}}, r"bounds\['log_decay'\]"),
        ({"num_steps": 1}, r"num_steps \(now 1\)"),
        ({"shift": 0.25}, r"outer_params\['log_decay'\]"),
        ({"inner_solver": ohg.GradientDescent(0.1, max_steps=3)}, r"then LBFGS, now Grad"),
        ({"optimizer": torch.optim.SGD}, r"then Adam, now SGD"),
        ({"warm_start": False}, r"warm_start"),
    ],
)
def test_a_checkpoint_is_not_continued_under_other_settings(settings, message: str) -> None:
    study = optuna.create_study()
    trial = study.ask()
    run(trial=trial, num_steps=2, checkpoint_every=1)
    again = functools.partial(run, num_steps=3, checkpoint_every=1)
    with pytest.raises(ohg.HyperparameterError, match=message):
        again(**{"trial": optuna.trial.Trial(study, trial._trial_id), **settings})
    assert len(again(trial=optuna.trial.Trial(study, trial._trial_id)).history) == 3


@pytest.mark.parametrize("warm_start", [True, False])
def test_another_inner_start_matters_to_cold_runs_only(warm_start: bool) -> None:
    study = optuna.create_study()
    trial = study.ask()
    settings = {"checkpoint_every": 1, "warm_start": warm_start}
    run(trial=trial, num_steps=1, **settings)
    settings |= {"trial": optuna.trial.Trial(study, trial._trial_id), "num_steps": 2}
    if warm_start:
        assert len(run(inner_shift=0.1, **settings).history) == 2
    else:
        with pytest.raises(ohg.HyperparameterError, match="inner_params"):
            run(inner_shift=0.1, **settings)


def test_a_checkpoint_without_settings_is_continued() -> None:
    study = optuna.create_study()
    trial = study.ask()
    with pytest.MonkeyPatch.context() as patch:
        snapshot = OuterRun.snapshot

        def older(self):
            tensors, numbers = snapshot(self)
            del numbers["settings"]
            return tensors, numbers

        patch.setattr(OuterRun, "snapshot", older)
        run(trial=trial, num_steps=2, checkpoint_every=1)
    again = optuna.trial.Trial(study, trial._trial_id)
    assert len(run(trial=again, num_steps=3, checkpoint_every=1).history) == 3


def with_objectives(inner=None, outer=None, **kwargs):
    problem = ohg.BilevelProblem(
        inner or (lambda w, lam, _: ((w["w"] - lam["x"]) ** 2).sum()),
        outer or (lambda w, lam, _: (w["w"] ** 2).sum()),
        **kwargs,
    )
    return ohg.minimize_bilevel(
        problem,
        {"w": torch.zeros(3, dtype=F64)},
        {"x": torch.ones(3, dtype=F64)},
        inner_solver=ohg.GradientDescent(0.1, max_steps=3),
        num_steps=3,
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"inner": lambda w, lam, _: 1.0}, ohg.ObjectiveError, "inner_objective returned a float"),
        (
            {"outer": lambda w, lam, _: w["w"]},
            ohg.ObjectiveError,
            r"outer_objective returned a tensor of shape \(3,\)",
        ),
        (
            {"outer": lambda w, lam, _: torch.tensor(1.0)},
            ohg.ObjectiveError,
            "depends neither on inner_params nor",
        ),
        (
            {"inner": lambda w, lam, _: lam["x"].sum()},
            ohg.RequirementError,
            "does not depend on inner_params",
        ),
        (
            {"inner": lambda w, lam, _: (w["w"] ** 2).sum()},
            ohg.ZeroHypergradientError,
            "'x' under Implicit is zero by",
        ),
        ({"outer": lambda w, lam, _: w["w"].sum() / 0.0}, ohg.SolverError, "NaN or infinite"),
        (
            {"inner": lambda w, lam, _: ((w["w"] - lam["x"]) ** 2).sum() * 1e200},
            ohg.SolverError,
            "lower its step size",
        ),
        (
            {"inner_batch": lambda t: torch.rand(3)},
            ohg.ProblemError,
            r"inner_batch\(0\) gave different data",
        ),
        (
            {"outer_batch": lambda t: {"a": torch.rand(3)}},
            ohg.ProblemError,
            r"outer_batch\(0\) gave different",
        ),
    ],
)
def test_bad_objectives_are_refused_in_words(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        with_objectives(**settings)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "non-empty dict"),
        ({"x": 1.0}, "is a float, not a tensor"),
        ({"x": torch.ones(2, dtype=torch.int64)}, "which has no gradient"),
        ({"x": torch.tensor([1.0, float("nan")])}, "holds NaN or infinite"),
        ({3: torch.ones(2)}, "is not a string"),
    ],
)
def test_bad_outer_params_are_refused(params, message) -> None:
    case = cases.case("ridge")
    with pytest.raises(ohg.HyperparameterError, match=message):
        ohg.hypergradient(case.problem, case.inner_params, params, estimator=ohg.Implicit())


def test_failure_without_throw_is_in_the_result() -> None:
    case = cases.case("ridge")
    found = ohg.minimize_bilevel(
        case.problem,
        case.inner_params,
        case.outer_params,
        inner_solver=ohg.LBFGS(),
        estimator=ohg.Implicit(ohg.Neumann(30, alpha=100.0)),
        num_steps=5,
        throw=False,
    )
    assert not found.result
    assert found.result.status is ohg.Status.DIVERGED
    assert "Outer step 0" in found.result.message
    assert torch.equal(found.outer_params["log_decay"], case.outer_params["log_decay"])
