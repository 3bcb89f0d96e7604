"""Many workers on one study: what each does, who is killed or paused, and what has to be true afterwards."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import torch
from conftest import open_storage
from lives import Life, Log, Striker, barrier
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.stores import unwrap_rdb
from optuna_hypergrad.studies import RetryingStorage, leases
from optuna_hypergrad.studies.events import Claim, Outcome
from optuna_hypergrad.studies.ledger import Ledger

_SLOT = "slot"
_PATIENCE = 600.0
_HANGS = 600.0


def study_of(storage: BaseStorage, directory: Path, **settings: Any) -> optuna.Study:
    if unwrap_rdb(storage) is None:
        settings["tensor_store"] = str(directory / "tensors")
    return optuna.create_study(
        study_name="s",
        storage=storage,
        sampler=ohg.HypergradientSampler(seed=3, publish=False, **settings),
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
    study = study_of(RetryingStorage(open_storage(kind, directory)), directory)
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
        self.storage = RetryingStorage(open_storage(kind, directory))
        self.study = study_of(self.storage, directory)
        self.log = Log(directory / "log")
        self.killed = 0

    def run(self, rng: random.Random) -> list[str]:
        """Let them work, and say what is wrong in the end."""
        total = self.workers * self.trials
        due = sorted(rng.randrange(3 * total // 4) for _ in range(self.kills))
        with ExitStack() as stack:
            lives = [self._begin(stack, slot) for slot in range(self.workers)]
            before, progress = 0, time.monotonic()
            while busy := [i for i, life in enumerate(lives) if life.process.is_alive()]:
                done = len(self.log.lines())
                if done > before:
                    before, progress = done, time.monotonic()
                if time.monotonic() - progress > _HANGS:
                    return [f"workers {busy} hang"]
                if due and due[0] <= done:
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
        last = ohg.differentiable(Objective(self.log, -1))
        with patch.object(leases, "_MOMENT", 0.0):  # nobody else is about to begin
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


# Races: the next step of one trajectory, wanted by many at once.


def race(kind: str, directory: Path, racer: int, races: int, start: Any, end: Any) -> None:
    """One racer's life: whoever gets the step takes it, whoever does not gives its trial back."""
    study = study_of(RetryingStorage(open_storage(kind, directory)), directory, optimizer=_slow)
    log, rng = Log(directory / "log"), random.Random(racer)
    for number in range(races):
        start.wait(_PATIENCE)
        time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.01)]))
        trial, loss = _begun(study)
        log.write(number, trial.number)
        end.wait(_PATIENCE)
        step = Claim.of(study.trials[trial.number])
        if step is None or step.parent is None:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, trial.backward(loss))


def _begun(study: optuna.Study) -> tuple[ohg.DifferentiableTrial, Tensor]:
    trial = ohg.DifferentiableTrial.of(study.ask())
    x, t = trial.suggest_float("x", -3.0, 3.0), trial.suggest_tensor("t", 2, 0.0, 1.0)
    return trial, (x - 1.0) ** 2 + (t - 0.3).pow(2).sum()


def _slow(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3)


def races_with_no_single_winner(
    kind: str, directory: Path, racers: int, races: int
) -> tuple[int, list[str]]:
    """Hold so many races for one trajectory; in how many not exactly one got the step, and what is wrong."""
    directory.mkdir(parents=True)
    study = study_of(open_storage(kind, directory), directory, optimizer=_slow)
    trial, loss = _begun(study)
    study.tell(trial, trial.backward(loss))
    start, end = barrier(racers), barrier(racers)
    with ExitStack() as stack:
        lives = [
            stack.enter_context(Life(race, kind, directory, i, races, start, end))
            for i in range(racers)
        ]
        wrong = [f"a racer fails with status {s}" for s in [life.end() for life in lives] if s]
    trials = study.get_trials(deepcopy=False)
    entered: dict[int, list[FrozenTrial]] = {n: [] for n in range(races)}
    for number, own in Log(directory / "log").lines():
        entered[int(number)].append(trials[int(own)])
    bad, last = 0, 0
    for number, own in entered.items():
        winners = [t for t in own if step_of(t) == (0, last)]
        losers = [t for t in own if step_of(t) == (t.number, None)]
        if (len(winners), len(losers)) != (1, racers - 1):
            bad += 1
            wrong.append(f"race {number}: the step after trial {last}: {[step_of(t) for t in own]}")
        last = winners[0].number if winners else last
    return bad, wrong + wrong_of(trials)


# Paused owners: their lease runs out, a successor does their step, and they wake up.

_LEASE = 0.5


def pause(kind: str, directory: Path, moment: int | None) -> None:
    """One trial, paused at some moment between two transactions."""
    storage = open_storage(kind, directory)
    study = study_of(storage, directory, lease=_LEASE, optimizer=_slow)
    striker = Striker(storage, moment, signal.SIGSTOP, between=True)
    log = Log(directory / "log")
    try:
        trial, loss = _begun(study)
        study.tell(trial, trial.backward(loss))
    except (ohg.TakenOverError, UpdateFinishedTrialError, ohg.StorageError, ValueError) as error:
        log.write("refused", type(error).__name__)
    else:
        log.write("finished", striker.moments)


class PausedOwners:
    """A study whose trials are paused, one after another, for longer than their lease."""

    def __init__(self, kind: str, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.kind, self.directory, self.log = kind, directory, Log(directory / "log")
        self.storage = open_storage(kind, directory)
        self._succeed()
        with Life(pause, kind, directory, None) as life:
            assert life.end() == 0
        self.moments = int(self.log.lines()[-1][1])

    def _succeed(self) -> optuna.Study:
        study = study_of(self.storage, self.directory, lease=_LEASE, optimizer=_slow)
        trial, loss = _begun(study)
        study.tell(trial, trial.backward(loss))
        return study

    def pause(self, rng: random.Random) -> tuple[bool, list[str]]:
        """Whether one was paused in the middle of its trial, and what is wrong then."""
        with Life(pause, self.kind, self.directory, rng.randint(1, self.moments)) as life:
            if not life.is_paused():
                return False, []
            time.sleep(1.2 * _LEASE)
            study = self._succeed()
            before = study.trials[-2]
            life.signal(signal.SIGCONT)
            status, said = life.end(), self.log.lines()[-1]
        if before.state != TrialState.FAIL:  # finished, or not begun, when it was paused
            return False, wrong_of(study.trials)
        wrong = wrong_of(study.trials) + ([f"status {status}"] if status else [])
        if said[0] != "refused":
            wrong.append(
                f"trial {before.number} was taken over, and its owner was let to finish it"
            )
        after = study.trials[before.number]
        if (after.params, after.values, after.state, after.system_attrs) != (
            before.params,
            before.values,
            before.state,
            before.system_attrs,
        ):
            wrong.append(f"trial {before.number} was overwritten: {after}, not {before}")
        claim = Claim.of(before)
        done = [step_of(t) for t in study.trials if t.state == TrialState.COMPLETE]
        if claim is not None and claim.parent is not None and (0, claim.parent) not in done:
            wrong.append(f"the step of trial {before.number} was not done by its successor")
        return True, wrong
