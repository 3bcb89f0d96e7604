"""Studies whose worker is killed again and again, and what has to be the same as in an undisturbed one."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import test_resume
import torch
from conftest import open_storage
from lives import Life, Log, Striker
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard._note import get_note
from optuna_dashboard._serializer import serialize_frozen_trial
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.dashboard import publishing
from optuna_hypergrad.stores import TensorStore
from optuna_hypergrad.stores._published import is_published

# What workers do. Each has to end with the same study, however often it is killed.


def trials_with_tensors(study: optuna.Study, log: Log) -> None:
    def objective(trial: Any) -> Tensor:
        loss = test_resume.tensors(trial)
        log.write("evaluated")
        return loss

    study.optimize(ohg.differentiable(objective), n_trials=1)


class _Adam(torch.optim.Adam):
    log: Log

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        result = super().step(closure)
        self.log.write("stepped")
        return result


def long_run(study: optuna.Study, log: Log) -> None:
    """One trial that is a bilevel run, with noise from torch's own generator, a checkpoint at every step."""
    target = torch.linspace(-1.0, 1.0, 5)

    def inner(w: Any, lam: Any, batch: Any) -> Tensor:
        return ((w["w"] - batch) ** 2).mean() + (lam["decay"] * w["w"] ** 2).sum()

    def outer(w: Any, lam: Any, batch: Any) -> Tensor:
        return ((w["w"] - target - 0.1 * batch) ** 2).sum()

    def noise(step: int) -> Tensor:
        return torch.randn(5, generator=torch.Generator().manual_seed(step))

    class Noisy(ohg.Implicit):
        def estimate(self, *args: Any) -> Any:
            found = super().estimate(*args)
            log.write("evaluated")
            noisy = {k: v + 0.01 * torch.randn_like(v) for k, v in found.value.items()}
            return dataclasses.replace(found, value=noisy)

    def optimizer(params: Any) -> torch.optim.Optimizer:
        adam = _Adam(params, lr=0.1)
        adam.log = log
        return adam

    def objective(trial: optuna.Trial) -> float:
        width = trial.suggest_int("width", 1, 50)
        torch.manual_seed(width)
        return ohg.minimize_bilevel(
            ohg.BilevelProblem(inner, outer, noise, noise),
            {"w": torch.zeros(5)},
            {"decay": torch.full((5,), 0.1 + width / 100)},
            inner_solver=ohg.HeavyBall(step_size=0.1, max_steps=5),
            estimator=Noisy(),
            optimizer=optimizer,
            bounds={"decay": ohg.Domain(1e-3, 1e2, log=True)},
            num_steps=RUN_STEPS,
            trial=trial,
            checkpoint_every=1,
        ).outer_value

    study.optimize(objective, n_trials=1)


RUN_STEPS = 12
PUBLISHING = "publishing"
WORKS: dict[str, tuple[Callable[[optuna.Study, Log], None], int]] = {
    "trials": (trials_with_tensors, 12),
    "run": (long_run, 1),
    PUBLISHING: (trials_with_tensors, 12),
}
"""What does one trial, and how many of them make a study. Under ``PUBLISHING`` all is published at the end of each."""


def study_of(storage: BaseStorage, name: str) -> optuna.Study:
    publish = name == PUBLISHING
    return optuna.create_study(
        study_name="s",
        storage=storage,
        sampler=ohg.HypergradientSampler(seed=7, publish=publish, **test_resume.HURRIED),
        load_if_exists=True,
    )


def live_once(kind: str, directory: Path, name: str, moment: int | None = None) -> None:
    """Work until the study is complete."""
    storage = open_storage(kind, directory)
    assert isinstance(storage, RDBStorage)
    striker = Striker(storage, moment)
    log, (work, trials) = Log(directory / "log"), WORKS[name]
    publishing.SHARE = float("inf")
    study = study_of(storage, name)
    while len(kept(study.get_trials(deepcopy=False))) < trials:
        work(study, log)
    log.write("moments", striker.moments)


def kept(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that count: all but those that were cut off."""
    return [t for t in trials if t.state.is_finished() and not _is_lost(t)]


def _is_lost(trial: FrozenTrial) -> bool:
    outcome = trial.system_attrs.get("hypergrad:outcome")
    if outcome is None or outcome["kind"] == "good":
        return trial.state != TrialState.COMPLETE
    return outcome["kind"] == "void"


def remains(study: optuna.Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a study says of its trials, and their stored tensors: hyperparameters, optimizer states,
    checkpoints.
    """
    trials = kept(study.trials)
    ordinal = {t.number: i for i, t in enumerate(trials)}
    store = TensorStore.of_study(study)
    said, stored = [], []
    for trial in trials:
        if "hypergrad:outcome" in trial.system_attrs:
            said.append(test_resume.record(trial, ordinal))
        else:
            said.append({"params": trial.params, "values": trial.values, "state": trial.state})
        said[-1]["reports"] = trial.intermediate_values
        found: dict[str, Any] = {}
        for pointer in store.pointers(trial):
            with suppress(ohg.MissingTensorError):  # retention has removed it
                for k, v in store.load(pointer).items():
                    found[f"{pointer.role} {pointer.name} {k}"] = v
        stored.append(found)
    return said, stored


def difference(whole: optuna.Study, other: optuna.Study) -> str | None:
    """Where the remains of a study that was cut off are not, bit for bit, those of one that was not."""
    (said, stored), (said_too, stored_too) = remains(whole), remains(other)
    if len(said) != len(said_too):
        return f"{len(said)} trials, and {len(said_too)}"
    for i, (one, two) in enumerate(zip(said, said_too, strict=True)):
        for key in one:
            if one[key] != two[key]:
                return f"{key} of trial {i}: {one[key]}, and {two[key]}"
    newest = max(i for i, found in enumerate(stored) if found)
    for i, (a, b) in enumerate(zip(stored, stored_too, strict=True)):
        if i == newest and a.keys() != b.keys():
            return f"of {a.keys()} of trial {i}, {b.keys()} are left"
        for key in (
            a.keys() & b.keys()
        ):  # retention goes by numbers of trials, those cut off included
            tensor = a[key]
            if key.endswith("numbers.json"):
                if _timeless(tensor) != _timeless(b[key]):
                    return f"{key!r} of trial {i}: {_timeless(tensor)}, and {_timeless(b[key])}"
            elif tensor.dtype != b[key].dtype or not torch.equal(tensor, b[key]):
                return f"{key!r} of trial {i}: {tensor}, and {b[key]}"
    return None


def badly_shown(study: optuna.Study) -> list[str]:
    """What ``optuna-dashboard`` shows of a complete study that is not so."""
    attributes = study._storage.get_study_system_attrs(study._study_id)
    states = Counter(t.state for t in study.trials)
    wanted = f"**Trials**: {len(study.trials)} ({states[TrialState.COMPLETE]} complete"
    wrong = [] if wanted in get_note(study) else [f"the note does not say {wanted!r}"]
    store = TensorStore.of_study(study).artifact_store
    shown = {}
    for trial in study.trials:
        for meta in serialize_frozen_trial(study._study_id, trial, attributes)["artifacts"]:
            shown[meta["artifact_id"]] = trial.number
            with store.open_reader(meta["artifact_id"]) as file:
                if not file.read():
                    wrong.append(f"the artifact {meta['filename']} is empty")
    if set(shown.values()) != {study.best_trial.number}:
        wrong.append(f"artifacts are shown of the trials {set(shown.values())}")
    stored = {a.artifact_id for a in store.stored() if is_published(a.artifact_id)}  # type: ignore[attr-defined]
    if lost := TensorStore.of_study(study).sweep(min_age=-60, dry_run=True).orphans:
        wrong += [f"{a.artifact_id} is an orphan" for a in lost if a.artifact_id in shown]
    if missing := shown.keys() - stored:
        wrong.append(f"artifacts {missing} are shown and not stored")
    return wrong


def _timeless(encoded: Tensor) -> Any:
    """Numbers of a checkpoint, but for how long things took."""
    numbers = json.loads(bytes(encoded.numpy()))
    for record in numbers["history"]:
        for key in [k for k in record if k.startswith("seconds")]:
            del record[key]
    return numbers


class Whole:
    """A study whose worker was not cut off: what others are compared with."""

    def __init__(self, kind: str, directory: Path, name: str) -> None:
        directory.mkdir(parents=True)
        self.kind, self.name = kind, name
        self.study = study_of(open_storage(kind, directory), name)
        with Life(live_once, kind, directory, name) as life:
            life.has_begun()
            begun = time.monotonic()
            assert life.end() == 0, "a worker that nobody kills fails"
            self.seconds = time.monotonic() - begun
        self.moments = int(Log(directory / "log").lines()[-1][1])
        self.counts = _counts(directory)

    def cut_off(self, directory: Path, rng: random.Random, kills: int) -> tuple[int, list[str]]:
        """Do the same, but kill the worker at random, at most ``kills`` times, each time followed by
        another one: at a random instant, or when it next talks to the database. How often that came
        about, and what is wrong in the end.

        Of trials, at most one evaluation is to be repeated per kill. Of a run, at most one outer step
        that was taken, and what was evaluated for the one that was not: storing overlaps with it.
        """
        directory.mkdir(parents=True)
        storage = open_storage(self.kind, directory)
        planned, killed, wrong = kills, 0, []
        while True:
            at_moment = rng.random() < 0.5
            moment = rng.randint(1, self.moments) if planned and at_moment else None
            with Life(live_once, self.kind, directory, self.name, moment) as life:
                life.has_begun()
                if planned and not at_moment:
                    time.sleep(rng.uniform(0.0, self.seconds))
                    life.kill()
                status, planned = life.end(), max(planned - 1, 0)
            if status == 0:
                break
            if status != -signal.SIGKILL:
                wrong.append(f"a worker fails with status {status}")
                break
            killed += 1
        study = study_of(storage, self.name)
        counts = _counts(directory)
        for what, most in (("stepped", 1), ("evaluated", 2 if self.name == "run" else 1)):
            extra = counts[what] - self.counts[what]
            if not 0 <= extra <= most * killed:
                wrong.append(f"{extra} times too often {what} after {killed} kills")
        left = [t for t in study.trials if not t.state.is_finished() and _has_lease(t)]
        if left:
            wrong.append(f"trials {[t.number for t in left]} of killed workers are not marked")
        if self.name == PUBLISHING:
            wrong += badly_shown(study)
        found = difference(self.study, study)
        return killed, wrong if found is None else [*wrong, found]

    def repeated(self, directory: Path) -> int:
        """How many outer steps that were taken, or trials that were evaluated, were so again there."""
        what = "stepped" if self.counts["stepped"] else "evaluated"
        return _counts(directory)[what] - self.counts[what]


def _counts(directory: Path) -> Counter[str]:
    return Counter(line[0] for line in Log(directory / "log").lines())


def _has_lease(trial: FrozenTrial) -> bool:
    return "hypergrad:owner" in trial.system_attrs
