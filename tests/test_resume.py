"""A study that is cut off and continued is, bit for bit, the study that was not.

Run as a script, this file is the worker: ``test_resume.py STORAGE DIRECTORY TRIALS CRASH_AT``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import DATABASES, open_storage
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from optuna_hypergrad.studies import HypergradientSampler, differentiable, leases, load_tensors
from optuna_hypergrad.studies.leases import OWNER
from optuna_hypergrad.studies.processes import this_process

CRASH_AT: int | None = None


def numbers(trial: Any) -> Tensor:
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    shift = trial.suggest_int("shift", 0, 5)
    x = trial.suggest_float("x", 1e-3, 1e3, log=True)
    loss = (x.log() - shift) ** 2 + 0.3 * torch.sin(4 * x.log()) + {"a": 0, "b": 1, "c": 0.2}[kind]
    if kind == "b":  # a number that exists in some settings only
        y = trial.suggest_float("y", -5.0, 5.0)
        loss = loss + (y - 2) ** 4
    return loss * float("nan") if float(torch.sin(50 * x.detach().log())) > 0.8 else loss


def tensors(trial: Any) -> Tensor:
    loss = numbers(trial)
    size = trial.suggest_int("size", 1, 2)
    t = trial.suggest_tensor("t", (size, 2), 0.0, 1.0)
    tree = trial.suggest_tensor_like("d", {"w": torch.zeros(3)}, 1e-3, 1e1, log=True)
    if trial.number == CRASH_AT:
        os._exit(9)
    return loss + (t - 0.3).pow(4).sum() + (tree["w"].log() - 0.5).pow(2).sum()


def only_numbers(trial: Any) -> Tensor:
    x = torch.stack([trial.suggest_float(f"x{i}", -3.0, 3.0) for i in range(3)])
    return (x**2 - 1).pow(2).sum() + 0.1 * x.sum()


OBJECTIVES: dict[str, Callable[[Any], Tensor]] = {
    "numbers": numbers,
    "tensors": tensors,
    "only numbers": only_numbers,
}


HURRIED = {"start": "best", "slice_steps": 1}
"""Settings under which a short study opens many trajectories, from points of others."""


def run(
    storage: BaseStorage, name: str, trials: int, sampler: BaseSampler | None = None
) -> optuna.Study:
    study = optuna.create_study(
        study_name="s",
        storage=storage,
        sampler=HypergradientSampler(seed=7, **HURRIED) if sampler is None else sampler,
        load_if_exists=True,
    )
    study.optimize(differentiable(OBJECTIVES[name]), n_trials=trials)
    return study


def record(trial: FrozenTrial, ordinal: dict[int, int]) -> dict[str, Any]:
    """Everything that has to agree; numbers of trials without those that were cut off."""
    attrs = trial.system_attrs
    outcome = dict(attrs["hypergrad:outcome"])
    claim = dict(attrs["hypergrad:claim"])
    for data in (outcome, claim):
        for key in ("trajectory", "parent"):
            data[key] = ordinal.get(data[key])
    if claim["source"].isdigit():
        claim["source"] = ordinal[int(claim["source"])]
    outcome["stop"] = outcome["stop"] is None
    return {
        "params": trial.params,
        "values": trial.values,
        "state": trial.state,
        "gradient": attrs.get("hypergrad:gradient"),
        "outcome": outcome,
        "claim": claim,
    }


def records(study: optuna.Study) -> list[dict[str, Any]]:
    kept = [t for t in study.trials if "hypergrad:outcome" in t.system_attrs]
    ordinal = {t.number: i for i, t in enumerate(kept)}
    return [record(t, ordinal) for t in kept]


def assert_same(one: optuna.Study, other: optuna.Study) -> None:
    for a, b in zip(records(one), records(other), strict=True):
        assert a == b


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", [*DATABASES, "journal"])
@pytest.mark.parametrize("settings", [{}, HURRIED], ids=["defaults", "hurried"])
def test_fresh_samplers_continue_bit_for_bit(
    settings: dict[str, Any], kind: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def sampler() -> BaseSampler:
        return HypergradientSampler(seed=7, **settings)

    whole = run(open_storage(kind, tmp_path / "a"), name, 24, sampler())
    for trials in (1, 6, 8, 9):
        parts = run(open_storage(kind, tmp_path / "b"), name, trials, sampler())
    assert_same(whole, parts)
    assert len({r["claim"]["trajectory"] for r in records(whole)}) > 1
    assert (name == "only numbers") != any(t.state == TrialState.FAIL for t in whole.trials)
    if name == "tensors":
        one, other = load_tensors(whole), load_tensors(parts)
        assert torch.equal(one["t"], other["t"])
        assert torch.equal(one["d"]["w"], other["d"]["w"])


BASES: dict[str, Callable[[], BaseSampler]] = {
    "seeded TPE": lambda: TPESampler(seed=5, n_startup_trials=2),
    "TPE by groups": lambda: TPESampler(seed=5, n_startup_trials=2, multivariate=False),
    "random": lambda: RandomSampler(seed=5),
    "GP": lambda: GPSampler(seed=5, n_startup_trials=2),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_seeded_base_sampler_is_seed_enough(base: str, tmp_path: Path) -> None:
    trials = 12
    whole = run(
        open_storage("memory", tmp_path), "numbers", trials, HypergradientSampler(BASES[base]())
    )
    storage = open_storage("memory", tmp_path)
    for _ in range(2):
        parts = run(storage, "numbers", trials // 2, HypergradientSampler(BASES[base]()))
    assert_same(whole, parts)


def test_same_seed_same_trials_and_other_seed_other_trials(tmp_path: Path) -> None:
    studies = [
        run(open_storage("memory", tmp_path), "numbers", 12, HypergradientSampler(seed=seed))
        for seed in (1, 1, 2)
    ]
    assert_same(studies[0], studies[1])
    assert records(studies[0]) != records(studies[2])


@pytest.mark.parametrize("crash_at", [0, 4, 11])
@pytest.mark.parametrize("kind", [*DATABASES, "journal"])
def test_another_process_continues_after_a_crash(kind: str, crash_at: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    opened = open_storage(kind, tmp_path / "b")  # a server, if it takes one, is this process's
    if crash_at == 4:
        run(opened, "tensors", 2)
    command = [sys.executable, __file__, kind, str(tmp_path / "b"), "20", str(crash_at)]
    crashed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert crashed.returncode == 9, crashed.stderr
    storage = open_storage(kind, tmp_path / "b")
    begun = len(storage.get_all_trials(storage.get_study_id_from_name("s")))
    assert begun == crash_at + 1
    parts = run(storage, "tensors", 4)
    assert parts.trials[crash_at].state == TrialState.FAIL
    assert parts.trials[crash_at + 1].params == parts.trials[crash_at].params
    assert_same(run(open_storage(kind, tmp_path / "a"), "tensors", crash_at + 4), parts)


@pytest.mark.parametrize("owner", [None, "dead", "just now"])
@pytest.mark.parametrize("orphan_at", [5, 12])
def test_a_trial_cut_off_before_its_claim_changes_nothing(
    orphan_at: int, owner: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(open_storage("memory", tmp_path), "numbers", 24)
    storage = open_storage("sqlite" if owner == "just now" else "memory", tmp_path)
    run(storage, "numbers", orphan_at)
    trial_id = storage.create_new_trial(storage.get_study_id_from_name("s"))
    if owner is None:
        monkeypatch.setattr(leases, "_MOMENT", 0.0)
    elif owner == "just now":
        monkeypatch.setattr(leases, "_SETTLED", 0.2)
    else:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        name, _, birth = this_process().split("|")
        space = birth.partition("@")[2]
        lease = {"process": f"{name}|{gone.pid}|1@{space}", "until": None}
        storage.set_trial_system_attr(trial_id, OWNER, lease)
    assert_same(whole, run(storage, "numbers", 24 - orphan_at))


def test_interrupted_by_the_keyboard_is_as_if_not_begun(storage: BaseStorage) -> None:
    interrupt = [7]

    @differentiable
    def objective(trial: Any) -> Tensor:
        x = trial.suggest_float("x", -3.0, 3.0)
        t = trial.suggest_tensor("t", 2, -1.0, 1.0)
        if trial.number in interrupt:
            raise KeyboardInterrupt
        return (x**2 - 1) ** 2 + (t - 0.5).pow(4).sum()

    study = optuna.create_study(storage=storage, sampler=HypergradientSampler(seed=3))
    with pytest.raises(KeyboardInterrupt):
        study.optimize(objective, n_trials=12)
    study.sampler = HypergradientSampler(seed=3)
    study.optimize(objective, n_trials=5)
    interrupt.clear()
    whole = optuna.create_study(sampler=HypergradientSampler(seed=3))
    whole.optimize(objective, n_trials=12)
    values = [t.value for t in study.trials if t.number != 7]
    assert values == [t.value for t in whole.trials]


def main() -> None:
    global CRASH_AT
    kind, directory, trials, crash_at = sys.argv[1:]
    CRASH_AT = int(crash_at)
    run(open_storage(kind, Path(directory)), "tensors", int(trials))


if __name__ == "__main__":
    main()
