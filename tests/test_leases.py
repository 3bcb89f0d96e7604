"""Who works on a trial, what becomes of it when nobody does, and who goes on with it."""

from __future__ import annotations

import itertools
import logging
import math
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import open_storage
from crowds import wrong_of
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import checkpoint
from optuna_hypergrad.stores import _retrying
from optuna_hypergrad.studies import leases, processes, succession
from optuna_hypergrad.studies.events import CLAIM
from optuna_hypergrad.studies.inspection import _worker
from optuna_hypergrad.studies.leases import CUT_OFF, OWNER, Lease, LeaseKeeper
from optuna_hypergrad.studies.recording import Recorder

KINDS = ("sqlite", "journal")
_count = itertools.count()


def another_process() -> str:
    return f"another-machine|{next(_count)}|1@pid:[1]"


class Cut(BaseException):
    """The process ends here; what it was running is as it was."""


@pytest.fixture(autouse=True)
def no_connection_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retrying, "_last_loss", -1e9)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    logger = logging.getLogger("optuna.hypergradients")
    monkeypatch.setattr(logger, "warning", lambda text, *a, **k: said.append(str(text)))
    return said


@ohg.differentiable
def objective(trial: Any) -> Tensor:
    x = trial.suggest_float("x", -3.0, 3.0)
    return (x - 1.0) ** 4 + x**2


def study_in(storage: BaseStorage, **settings: Any) -> optuna.Study:
    sampler = ohg.HypergradientSampler(seed=1, **settings)
    return optuna.create_study(
        study_name="s", storage=storage, sampler=sampler, load_if_exists=True
    )


def begin_elsewhere(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch, lease: float | None
) -> optuna.Trial:
    """A trial that a worker on another machine has asked for and claimed, and whose lease it does not
    renew."""
    elsewhere = study_in(study._storage, lease=lease)
    name = another_process()
    with monkeypatch.context() as patch:
        patch.setattr(leases, "this_process", lambda: name)
        trial = elsewhere.ask()
        _ = ohg.DifferentiableTrial.of(trial).suggest_float("x", -3.0, 3.0)
        elsewhere.sampler._leases._forget()  # type: ignore[attr-defined]
    return trial


@pytest.mark.parametrize("kind", KINDS)
def test_a_lease_is_there_from_the_first_moment(kind: str, tmp_path: Path) -> None:
    study = study_in(open_storage(kind, tmp_path), lease=50.0)
    study.ask()
    (trial,) = study.trials
    lease = Lease.of(trial)
    assert lease is not None
    assert lease.process == processes.this_process()
    assert lease.until is not None
    assert 40 < lease.until - time.time() <= 50


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_whose_owner_is_late_is_done_by_the_next(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    study = study_in(open_storage(kind, tmp_path), lease=0.2)
    study.optimize(objective, n_trials=3)
    late = begin_elsewhere(study, monkeypatch, 0.2)
    study.optimize(objective, n_trials=1)  # the lease still holds: a new trajectory, not the step
    assert study.trials[4].system_attrs[CLAIM]["parent"] is None
    time.sleep(0.25)
    other = study_in(open_storage(kind, tmp_path), lease=0.2)
    other.optimize(objective, n_trials=5)
    assert other.trials[3].state == TrialState.FAIL
    assert other.trials[3].system_attrs[CUT_OFF] is True
    claims = [t.system_attrs[CLAIM] for t in other.trials if t.state == TrialState.COMPLETE]
    assert claims.count(other.trials[3].system_attrs[CLAIM]) == 1
    assert any("Trial 3 is marked as failed" in text for text in warned)
    assert late.number == 3


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_wakes_up_late_can_write_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(open_storage(kind, tmp_path), lease=0.1)
    study.optimize(objective, n_trials=2)
    late = begin_elsewhere(study, monkeypatch, 0.2)
    time.sleep(0.25)
    other = study_in(open_storage(kind, tmp_path), lease=60.0)
    other.optimize(objective, n_trials=3)
    before = [(t.params, t.values, t.state, t.system_attrs) for t in other.trials]
    own = ohg.DifferentiableTrial.of(late)
    x = own.suggest_float("x", -3.0, 3.0)
    with pytest.raises(ohg.TakenOverError, match=r"Trial 2 .* taken it over .*lease="):
        own.backward((x - 1.0) ** 4 + x**2)
    with pytest.raises(ValueError, match="Cannot tell a FAIL trial"):
        study.tell(late, 0.0)
    with pytest.raises(ohg.StorageError):
        ohg.TensorStore.of_study(study).save(
            study._study_id, late._trial_id, "t", "value", 0, {"": torch.zeros(2)}
        )
    after = study_in(open_storage(kind, tmp_path))
    assert [(t.params, t.values, t.state, t.system_attrs) for t in after.trials] == before
    steps = [t.system_attrs[CLAIM]["parent"] for t in after.trials if t.state.name == "COMPLETE"]
    assert steps == [None, 0, 1, 3, 4]


def test_a_step_is_not_taken_from_an_owner_who_can_still_finish_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    study.optimize(objective, n_trials=3)
    late = begin_elsewhere(study, monkeypatch, 60.0)
    other = study_in(open_storage("sqlite", tmp_path))
    successor = other.ask()  # the lease still holds
    monkeypatch.setattr(Lease, "is_over", True)
    for trial in (successor, late):
        trial.study.tell(trial, float(objective(trial)))
    assert wrong_of(study.get_trials(deepcopy=False)) == []
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 5


def test_a_lease_that_comes_at_the_last_moment_counts(tmp_path: Path) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    trial_id = study._storage.create_new_trial(study._study_id)
    seen = study.get_trials()[0]
    lease = {"process": another_process(), "until": time.time() + 60}
    study._storage.set_trial_system_attr(trial_id, OWNER, lease)
    assert not leases.mark_as_failed(study, seen)
    assert study.trials[0].state == TrialState.RUNNING
    run_out(study, trial_id)
    assert leases.mark_as_failed(study, seen)


def test_a_lease_is_renewed_while_the_trial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(open_storage("sqlite", tmp_path), lease=0.4)
    trial = study.ask()
    first = Lease.of(study.trials[0])
    time.sleep(1.0)
    second = Lease.of(study.trials[0])
    assert first is not None
    assert second is not None
    assert second.until > first.until  # type: ignore[operator]
    with monkeypatch.context() as patch:  # seen from elsewhere
        patch.setattr(leases, "this_process", another_process)
        assert leases.cut_off(study.trials, [0]) == []
    study.tell(trial, 1.0)
    assert not study.sampler._leases._held


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_leaves_its_parents_trials_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_ended", {})
    study = study_in(open_storage("sqlite", tmp_path))
    done, running = study.ask(), study.ask()
    study.tell(done, 1.0)
    keeper = study.sampler._leases
    assert len(keeper._held) == len(leases._ended) == 1
    child = os.fork()
    if child == 0:
        os._exit(len(keeper._held) + len(leases._ended) + (keeper._thread is not None))
    assert os.waitpid(child, 0)[1] == 0
    assert list(keeper._held) == [(id(study._storage), running._trial_id)]


def test_a_lease_is_renewed_while_the_outcome_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    keeper, held = study.sampler._leases, []
    record = Recorder.record

    def watched(*args: Any) -> None:
        held.append(len(keeper._held))
        record(*args)

    monkeypatch.setattr(Recorder, "record", watched)
    study.optimize(objective, n_trials=1)
    assert held == [1]
    assert not keeper._held


def test_a_late_renewal_says_that_the_trial_is_lost(tmp_path: Path, warned: list[str]) -> None:
    study = study_in(open_storage("sqlite", tmp_path), lease=30.0)
    trial = study.ask()
    study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    keeper = study.sampler._leases
    assert keeper.renew()
    assert "was taken over" in warned[-1]
    assert not keeper.renew()


def test_a_study_in_memory_has_no_leases() -> None:
    study = optuna.create_study(sampler=ohg.HypergradientSampler())
    study.optimize(objective, n_trials=2)
    assert not any(OWNER in t.system_attrs for t in study.trials)


def test_a_live_process_keeps_its_trials(tmp_path: Path) -> None:
    study = study_in(open_storage("sqlite", tmp_path), lease=0.01)
    study.optimize(objective, n_trials=1)
    study.ask()
    time.sleep(0.05)  # as when the machine was suspended
    study.optimize(objective, n_trials=1)
    assert study.trials[1].state == TrialState.RUNNING


def test_a_killed_process_is_gone_before_its_parent_knows() -> None:
    code = "from optuna_hypergrad.studies.processes import this_process; print(this_process(), flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        assert not processes.is_dead(name)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert processes.is_dead(name)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="becomes another user")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_process_of_another_user_lives() -> None:
    name = processes.this_process()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        os._exit(processes.is_dead(name))
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_that_is_hidden_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, _, birth = processes.this_process().split("|")
    name = f"{machine}|4194305|{birth}"
    assert processes.is_dead(name)

    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not processes.is_dead(name)


def test_processes_are_compared_within_one_boot_of_one_machine() -> None:
    machine, _, birth = processes.this_process().split("|")
    host, _, boot = machine.partition("/")
    assert boot or not Path("/proc/sys/kernel/random/boot_id").exists()
    assert processes.is_dead(f"{machine}|4194305|{birth}")
    assert processes.is_dead(f"{host}|4194305|{birth}")  # as written before there were boots
    assert not processes.is_dead(f"{host}/another-boot|4194305|{birth}")
    lease = Lease(f"{host}/another-boot|12|{birth}", None)
    assert (lease.pid, lease.host) == ("12", host)


@pytest.mark.parametrize("begun", [False, True])
def test_an_enqueued_trial_whose_process_dies_is_done_by_the_next(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    study.optimize(objective, n_trials=1)
    study.enqueue_trial({"x": 2.5})
    if begun:
        run_out(study, begin_elsewhere(study, monkeypatch, 60.0)._trial_id)
    else:
        monkeypatch.setattr(leases, "_MOMENT", 0.0)
        study._storage.set_trial_state_values(study.trials[1]._trial_id, TrialState.RUNNING)
    study.optimize(objective, n_trials=2)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [t.params.get("x") for t in study.trials].count(2.5) == 1 + begun
    assert study.trials[2].params == {"x": 2.5}


def test_trials_that_were_cut_off_before_their_lease_are_marked_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    study.optimize(objective, n_trials=1)
    monkeypatch.setattr(leases, "_MOMENT", 0.0)
    for _ in range(2):
        study._storage.create_new_trial(study._study_id)
        study.optimize(objective, n_trials=1)
    assert [t.state.name for t in study.trials] == ["COMPLETE", *(["FAIL", "COMPLETE"] * 2)]


def test_trials_of_other_samplers_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage("sqlite", tmp_path)
    monkeypatch.setattr(leases, "_MOMENT", 0.0)
    ours = study_in(storage)
    ours.optimize(objective, n_trials=1)
    other = optuna.create_study(
        study_name="s", storage=storage, sampler=TPESampler(seed=0), load_if_exists=True
    )
    theirs = other.ask()
    theirs.suggest_int("n", 0, 5)
    ours.optimize(objective, n_trials=1)
    other.tell(theirs, 1.0)
    other.ask()  # finished trials without a lease: an untouched one may be theirs as well
    ours.optimize(objective, n_trials=1)
    assert [t.state.name for t in ours.trials] == [
        "COMPLETE",
        "COMPLETE",
        "COMPLETE",
        "RUNNING",
        "COMPLETE",
    ]


def test_after_a_lost_connection_everybody_gets_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(open_storage("sqlite", tmp_path), lease=0.01)
    begin_elsewhere(study, monkeypatch, 0.01)
    time.sleep(0.02)
    monkeypatch.setattr(leases, "seconds_since_loss", lambda: 5.0)
    assert leases.cut_off(study.trials, [0]) == []
    monkeypatch.setattr(leases, "seconds_since_loss", lambda: 50.0)
    assert [t.number for t in leases.cut_off(study.trials, [0])] == [0]


@pytest.mark.parametrize("bad", [0, -1.0, math.nan])
def test_a_lease_that_makes_no_sense_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="lease="):
        ohg.HypergradientSampler(lease=bad)


def test_a_keeper_can_be_pickled(tmp_path: Path) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    study.ask()
    copied = pickle.loads(pickle.dumps(study.sampler))
    assert copied._leases.seconds == 120.0
    assert not copied._leases._held
    assert isinstance(copied._leases, LeaseKeeper)


@pytest.mark.parametrize("lease", [None, math.inf])
def test_a_trial_is_kept_for_another_process_to_tell(
    lease: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(open_storage("sqlite", tmp_path), lease=lease)
    machine, _, birth = processes.this_process().split("|")
    with monkeypatch.context() as patch:  # it has ended since
        patch.setattr(leases, "this_process", lambda: f"{machine}|4194305|{birth}")
        asked = study.ask()
        asked.suggest_float("x", -3.0, 3.0)
    other = study_in(open_storage("sqlite", tmp_path))
    other.optimize(objective, n_trials=1)
    if lease is None:
        assert other.trials[0].state == TrialState.RUNNING
        told = Lease.of(other.trials[0])
        assert told is not None
        assert (told.pid, told.host, told.is_kept) == ("4194305", machine.split("/")[0], True)
        assert str(_worker(other.trials[0])).startswith("trial 0 is to be told, asked for by")
        assert other.tell(0, 2.0).value == 2.0
    else:
        assert other.trials[0].state == TrialState.FAIL


@pytest.mark.parametrize("lease", [math.inf, 1e12])
def test_a_lease_may_be_longer_than_a_thread_can_sleep(
    lease: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(leases, "_renew", lambda _, interval: slept.append(interval))
    study = study_in(open_storage("sqlite", tmp_path), lease=lease)
    study.optimize(objective, n_trials=1)
    assert slept == ([] if lease == math.inf else [3600.0])
    stored = Lease.of(study.trials[0])
    assert stored is not None
    assert (stored.until is None, stored.is_kept) == (lease == math.inf, False)


def test_leases_may_never_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_in(open_storage("sqlite", tmp_path), lease=None)
    begin_elsewhere(study, monkeypatch, None)
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == TrialState.RUNNING


# Long runs: the next trial goes on.


def quadratic() -> ohg.BilevelProblem:
    target = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)

    def inner(w: Any, lam: Any, batch: Any) -> Tensor:
        return ((w["w"] - 1.0) ** 2).sum() + (lam["decay"] * w["w"] ** 2).sum()

    def outer(w: Any, lam: Any, batch: Any) -> Tensor:
        return ((w["w"] - target) ** 2).sum()

    return ohg.BilevelProblem(inner, outer)


def long_run(trial: Any, cut_at: int | None, seen: list[int] | None = None) -> float:
    width = trial.suggest_int("width", 1, 50)
    start = {"w": torch.zeros(5, dtype=torch.float64)}
    outer = {"decay": torch.full((5,), 0.1 + width / 100, dtype=torch.float64)}

    class Counted(ohg.Implicit):
        def estimate(
            self, problem: Any, solver: Any, w: Any, lam: Any, step: int, state: Any
        ) -> Any:  # type: ignore[override]
            if seen is not None:
                seen.append(step)
            if step == cut_at:
                raise Cut
            return super().estimate(problem, solver, w, lam, step, state)

    result = ohg.minimize_bilevel(
        quadratic(),
        start,
        outer,
        inner_solver=ohg.GradientDescent(step_size=0.1, max_steps=5),
        estimator=Counted(),
        bounds={"decay": ohg.Domain(1e-3, 1e2, log=True)},
        num_steps=8,
        trial=trial,
        checkpoint_every=2,
    )
    return result.outer_value


def cut_off(study: optuna.Study, monkeypatch: pytest.MonkeyPatch, cut_at: int) -> FrozenTrial:
    """A trial of a process that is gone, in the middle of its run."""
    name = another_process()
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a heartbeat is not meant for ask()
        patch.setattr(leases, "this_process", lambda: name)
        trial = study.ask()
        with pytest.raises(Cut):
            long_run(trial, cut_at)
    run_out(study, trial._trial_id)
    return study.trials[trial.number]


def run_out(study: optuna.Study, trial_id: int, until: float | None = 1.0) -> None:
    lease = {"process": another_process(), "until": until}
    study._storage.set_trial_system_attr(trial_id, OWNER, lease)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_off_goes_on_in_the_next_trial(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    study = study_in(open_storage(kind, tmp_path))
    gone = cut_off(study, monkeypatch, 5)
    fresh = study_in(open_storage(kind, tmp_path))
    seen: list[int] = []
    fresh.optimize(lambda trial: long_run(trial, None, seen), n_trials=1)
    assert seen == [4, 5, 6, 7]  # the checkpoint is from after step 3
    heir = fresh.trials[1]
    assert heir.params == gone.params
    assert heir.system_attrs["failed_trial"] == 0
    assert heir.system_attrs["retry_history"] == [0]
    assert "Trial 1 goes on where trial 0 was cut off." in warned
    whole = optuna.create_study(sampler=ohg.HypergradientSampler(seed=1))
    whole.enqueue_trial(gone.params)
    whole.optimize(lambda trial: long_run(trial, None), n_trials=1)
    assert heir.value == whole.best_value
    assert torch.equal(
        ohg.load_tensors(heir, "bilevel", study=fresh)["bilevel"]["decay"],
        ohg.load_tensors(whole.trials[0], "bilevel", study=whole)["bilevel"]["decay"],
    )
    fresh.optimize(lambda trial: long_run(trial, None), n_trials=1)
    assert "retry_history" not in fresh.trials[2].system_attrs


def test_a_second_one_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    first = cut_off(study, monkeypatch, 3)
    run_out(study, first._trial_id, until=None)
    second = cut_off(study, monkeypatch, 7)
    run_out(study, first._trial_id)
    seen: list[int] = []
    study.optimize(lambda trial: long_run(trial, None, seen), n_trials=2)
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    heirs = {t.system_attrs["failed_trial"]: t for t in study.trials if t.state.name == "COMPLETE"}
    assert heirs[0].params == first.params
    assert heirs[1].params == second.params
    assert sorted(seen) == sorted([2, 3, 4, 5, 6, 7, 6, 7])


def no_room(*args: Any) -> None:
    raise ohg.NoSpaceError("There is no room.")


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("cause", ["keyboard", "a checkpoint that is not whole", "no room"])
def test_a_run_that_was_interrupted_goes_on_in_the_next_trial_once(
    cause: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    study = study_in(open_storage(kind, tmp_path))
    write = checkpoint.Checkpoints.save
    with monkeypatch.context() as patch, patched_cut(KeyboardInterrupt):
        if cause == "no room":
            patch.setattr(
                checkpoint.Checkpoints,
                "save",
                lambda self, step, *rest: (no_room if step == 6 else write)(self, step, *rest),
            )
        elif cause == "a checkpoint that is not whole":
            wait, left = checkpoint.Checkpoints.wait, iter(range(9))
            patch.setattr(
                checkpoint.Checkpoints,
                "wait",
                lambda self: wait(self) if next(left, None) is not None else no_room(),
            )
        with pytest.raises((KeyboardInterrupt, ohg.NoSpaceError)):
            study.optimize(
                lambda trial: long_run(trial, 5 if cause == "keyboard" else None), n_trials=1
            )
    assert [t.state.name for t in study.trials] == ["FAIL"]
    saved = max(p.step for p in ohg.TensorStore.of_study(study).pointers(study.trials[0]))
    assert saved in (4, 6)
    fresh = study_in(study._storage)
    seen: list[int] = []
    fresh.optimize(lambda trial: long_run(trial, None, seen), n_trials=2)
    assert seen == [*range(saved, 8), *range(8)]
    failed, heir, other = fresh.trials
    assert heir.params == failed.params
    assert heir.system_attrs["retry_history"] == [0]
    assert "retry_history" not in other.system_attrs
    assert "Trial 1 goes on where trial 0 was interrupted." in warned
    whole = optuna.create_study(sampler=ohg.HypergradientSampler(seed=1))
    whole.enqueue_trial(failed.params)
    whole.optimize(lambda trial: long_run(trial, None), n_trials=1)
    assert heir.value == whole.best_value
    assert heir.intermediate_values == whole.trials[0].intermediate_values


def test_an_heir_that_is_interrupted_before_its_run_passes_on(tmp_path: Path) -> None:
    study = study_in(open_storage("memory", tmp_path))

    def stopped(trial: Any) -> float:
        raise KeyboardInterrupt

    def interrupted(trial: Any) -> float:
        with patched_cut(KeyboardInterrupt):
            return long_run(trial, 5)

    for objective in (interrupted, stopped, stopped):
        with pytest.raises(KeyboardInterrupt):
            study.optimize(objective, n_trials=1)
    seen: list[int] = []
    study.optimize(lambda trial: long_run(trial, None, seen), n_trials=1)
    assert seen == [4, 5, 6, 7]
    assert study.trials[3].system_attrs["retry_history"] == [0, 1, 2]


def test_a_run_that_failed_by_its_own_fault_is_not_gone_on_with(tmp_path: Path) -> None:
    study = study_in(open_storage("memory", tmp_path))

    def pruned(trial: Any) -> float:
        with patched_cut(optuna.TrialPruned):
            return long_run(trial, 5)

    with patched_cut(ArithmeticError):
        study.optimize(lambda trial: long_run(trial, 5), n_trials=1, catch=(ArithmeticError,))
    study.optimize(pruned, n_trials=1)
    seen: list[int] = []
    study.optimize(lambda trial: long_run(trial, None, seen), n_trials=1)
    assert [t.state.name for t in study.trials] == ["FAIL", "PRUNED", "COMPLETE"]
    assert seen == list(range(8))


def test_of_two_trials_that_begin_one_goes_on_with_an_interrupted_run(tmp_path: Path) -> None:
    storage = open_storage("memory", tmp_path)
    study = study_in(storage)
    with patched_cut(KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        study.optimize(lambda trial: long_run(trial, 5), n_trials=1)
    rival = storage.create_new_trial(study._study_id)
    storage.set_trial_system_attr(rival, succession.HEIR_OF, [0])
    study.ask()
    assert "retry_history" not in study.trials[-1].system_attrs
    storage.set_trial_state_values(rival, TrialState.FAIL)
    study.ask()
    assert study.trials[-1].system_attrs["retry_history"] == [0]


@contextmanager
def patched_cut(error: type[BaseException]) -> Iterator[None]:
    """What :func:`long_run` raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Cut", error)
        yield


@pytest.mark.parametrize("done", range(8))
def test_an_heir_that_dies_before_it_has_inherited_all_passes_on(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    gone = cut_off(study, monkeypatch, 5)
    with monkeypatch.context() as patch:
        left, write = iter(range(done)), succession._set

        def write_some(*args: Any) -> None:
            if next(left, None) is None:
                raise Cut
            write(*args)

        patch.setattr(succession, "_set", write_some)
        with pytest.raises(Cut):
            study.ask()
    run_out(study, study.trials[1]._trial_id)
    seen: list[int] = []
    study.optimize(lambda trial: long_run(trial, None, seen), n_trials=1)
    assert seen == [4, 5, 6, 7]
    assert study.trials[2].params == gone.params
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL", "COMPLETE"]


def test_what_kills_every_process_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    for _ in range(succession.MAX_FUTILE + 1):
        cut_off(study, monkeypatch, 5)
    seen: list[int] = []
    study.optimize(lambda trial: long_run(trial, None, seen), n_trials=1)
    assert seen[0] == 0
    assert any("is not continued again" in text for text in warned)


def test_a_step_that_kills_every_process_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    study = study_in(open_storage("sqlite", tmp_path), lease=0.01)
    study.optimize(objective, n_trials=2)
    for _ in range(5):
        begin_elsewhere(study, monkeypatch, 0.01)
        time.sleep(0.02)
    study.optimize(objective, n_trials=1)
    assert study.trials[-2].system_attrs[CLAIM]["parent"] == 1
    assert study.trials[-1].system_attrs[CLAIM]["parent"] is None
    assert any("was cut off 5 times" in text for text in warned)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_callback_of_the_users_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{tmp_path}/study.db",
        heartbeat_interval=60,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
    )
    study = study_in(storage)
    gone = cut_off(study, monkeypatch, 5)
    seen: list[int] = []
    study.optimize(lambda trial: long_run(trial, None, seen), n_trials=2)
    retried = next(t for t in study.trials if t.system_attrs.get("retry_history") == [0])
    assert retried.params == gone.params
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    storage.engine.dispose()
