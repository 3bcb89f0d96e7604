"""Many workers on one study: what each does, who is killed or paused, and what has to be true afterwards."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from conftest import open_storage
from lives import Life, Log
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.studies.events import Claim, Outcome
from optuna_hypergrad.studies.trajectory import Ledger

_SLOT = "slot"
_UNCLEAR = 10.0
"""Seconds after which a trial that has no lease yet counts as cut off."""


def study_of(storage: BaseStorage, directory: Path, **settings: Any) -> optuna.Study:
    if isinstance(storage, optuna.storages.GrpcStorageProxy):
        settings["tensor_store"] = str(directory / "tensors")
    return optuna.create_study(
        study_name="s",
        storage=storage,
        sampler=ohg.HypergradientSampler(seed=3, **settings),
        load_if_exists=True,
    )


class Objective:
    """Differentiable, with a number, a tensor and a setting; logs the trials that it has evaluated."""

    def __init__(self, log: Log, slot: int) -> None:
        self.log, self.slot = log, slot

    def __call__(self, trial: Any) -> Tensor:
        trial.set_user_attr(_SLOT, self.slot)
        kind = trial.suggest_categorical("kind", ["a", "b", "c"])
        x = trial.suggest_float("x", 1e-3, 1e3, log=True)
        t = trial.suggest_tensor("t", 3, 0.0, 1.0)
        loss = (
            (x.log() - len(kind)) ** 2 + {"a": 0, "b": 1, "c": 0.2}[kind] + (t - 0.3).pow(4).sum()
        )
        self.log.write(trial.number)
        return loss


def take_part(kind: str, directory: Path, slot: int, trials: int) -> None:
    """One worker's life: until its slot has so many completed trials, of which it may have inherited some."""
    study = study_of(open_storage(kind, directory), directory)
    objective = ohg.differentiable(Objective(Log(directory / "log"), slot))
    while (left := trials - completed(study, slot)) > 0:
        study.optimize(objective, n_trials=left)


def completed(study: optuna.Study, slot: int) -> int:
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sum(t.user_attrs.get(_SLOT) == slot for t in trials)


class Crowd:
    """Workers on one study, some of which are killed, and each of these followed by another.

    Args:
        kind: Of storage, as ``open_storage`` takes it.
        workers: How many at a time.
        trials: Of each.
        kills: At random, spread over the evaluations.
    """

    def __init__(self, kind: str, directory: Path, workers: int, trials: int, kills: int) -> None:
        directory.mkdir(parents=True)
        self.kind, self.directory, self.kills = kind, directory, kills
        self.workers, self.trials = workers, trials
        self.storage = open_storage(kind, directory)
        self.study = study_of(self.storage, directory)
        self.log = Log(directory / "log")
        self.killed = 0

    def run(self, rng: random.Random) -> list[str]:
        """Let them work, and say what is wrong in the end."""
        total = self.workers * self.trials
        due = sorted(rng.randrange(total) for _ in range(self.kills))
        with ExitStack() as stack:
            lives = [self._begin(stack, slot) for slot in range(self.workers)]
            while any(life.process.is_alive() for life in lives):
                done = len(self.log.lines())
                busy = [i for i, life in enumerate(lives) if life.process.is_alive()]
                if due and due[0] <= done and busy:
                    slot = rng.choice(busy)
                    time.sleep(rng.uniform(0.0, 0.2))
                    if lives[slot].kill():
                        self.killed += 1
                        due.pop(0)
                        lives[slot] = self._begin(stack, slot)
                time.sleep(0.01)
            statuses = [life.end() for life in lives]
        wrong = [f"worker {i} fails with status {s}" for i, s in enumerate(statuses) if s]
        return wrong + self.audit(total)

    def _begin(self, stack: ExitStack, slot: int) -> Life:
        args = (self.kind, self.directory, slot, self.trials)
        return stack.enter_context(Life(take_part, *args))

    def audit(self, total: int) -> list[str]:
        """One more trial, and then: what is lost, doubled, or still there."""
        running = [t for t in self.study.trials if t.state == TrialState.RUNNING]
        if any("hypergrad:owner" not in t.system_attrs for t in running):
            time.sleep(_UNCLEAR)
        last = ohg.differentiable(Objective(self.log, -1))
        self.study.optimize(last, n_trials=1)
        trials = self.study.get_trials(deepcopy=False)
        wrong = wrong_of(trials)
        evaluated = Counter(int(line[0]) for line in self.log.lines())
        complete = [t for t in trials if t.state == TrialState.COMPLETE]
        if len(complete) != total + 1:
            wrong.append(f"{len(complete)} completed trials, not {total + 1}")
        if len(trials) > total + 1 + self.killed:
            wrong.append(f"{len(trials)} trials after {self.killed} kills")
        if any(count > 1 for count in evaluated.values()):
            wrong.append(f"evaluated twice: {[n for n, c in evaluated.items() if c > 1]}")
        unseen = {t.number for t in complete} - evaluated.keys()
        if unseen:
            wrong.append(f"complete but never evaluated: {sorted(unseen)}")
        return wrong


def wrong_of(trials: Sequence[FrozenTrial]) -> list[str]:
    """What no study may have, whoever worked on it, once nobody does any more."""
    wrong: list[str] = []
    if [t.number for t in trials] != list(range(len(trials))):
        wrong.append(f"the trials are numbered {[t.number for t in trials]}")
    unfinished = [t.number for t in trials if not t.state.is_finished()]
    if unfinished:
        wrong.append(f"trials {unfinished} are not finished")
    said: list[str] = []
    ledger = Ledger(1.0, said.append)
    ledger.sync(trials)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    strays = [t.number for t in complete if t.number not in ledger.member]
    if strays or ledger.left_out or ledger.early:
        wrong.append(f"trials {strays} have no place in a trajectory: {' '.join(said)}")
    steps = Counter(step_of(t) for t in complete)
    twice = [step for step, count in steps.items() if count > 1]
    if twice:
        wrong.append(f"steps that were taken twice: {twice}")
    return wrong


def step_of(trial: FrozenTrial) -> tuple[int, int | None]:
    """The trajectory of a trial and the trial before it there."""
    event = Outcome.of(trial) or Claim.of(trial)
    assert event is not None, f"trial {trial.number} has no claim"
    return event.trajectory, event.parent
