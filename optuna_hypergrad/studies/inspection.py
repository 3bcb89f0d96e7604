"""What a study holds, at a glance: its trials, trajectories and tensors. Only reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .. import _optuna
from ..stores import Pointer, Retention
from ..stores._verifying import Held, expected_of, held_by
from .events import Claim
from .leases import Lease
from .ledger import Ledger
from .racing import Race
from .trajectory import Trajectory

Presence = Literal["stored", "removed", "missing"]


@dataclass(frozen=True)
class Worker:
    """Who works on a running trial."""

    trial: int
    host: str
    pid: str
    is_gone: bool
    """Whether the process is known to have ended, or has not renewed its lease."""
    is_kept: bool = False
    """Whether the process has only asked for it (``lease=None``): any other may tell it."""

    def __str__(self) -> str:
        if self.is_kept:
            return (
                f"trial {self.trial} is to be told, asked for by process {self.pid} on {self.host}"
            )
        verb = "was left by" if self.is_gone else "by"
        return f"trial {self.trial} {verb} process {self.pid} on {self.host}"


@dataclass(frozen=True)
class TrajectorySummary:
    """One trajectory. ``id`` is the number of the trial that opened it.

    Args:
        setting: Values of the discrete hyperparameters.
        source: Where it started: ``"init"``, ``"base"``, ``"enqueued"`` or ``"trial 7"``.
        start: Its numbers at the start.
        best_value: As the objective returned it; ``None`` where nothing finite was.
        stop: Why it is over.
        workers: Those that take its next step, or its first.
    """

    id: int
    setting: dict[str, Any]
    source: str
    start: dict[str, float]
    steps: int
    best_value: float | None
    best_trial: int | None
    stop: str | None
    workers: tuple[Worker, ...]

    @property
    def state(self) -> str:
        """In words."""
        if self.workers:
            return "; ".join(map(str, self.workers))
        return "open" if self.stop is None else f"over: {self.stop}"


@dataclass(frozen=True)
class TensorSummary:
    """Tensors that a trial points to. ``missing``: gone, though no retention policy removes them."""

    trial: int
    pointer: Pointer
    presence: Presence


@dataclass(frozen=True)
class StudySummary:
    """All of it. ``problems`` names what cannot be read."""

    name: str
    directions: tuple[str, ...]
    trials: dict[str, int]
    best_value: float | None
    best_trial: int | None
    trajectories: tuple[TrajectorySummary, ...]
    tensors: tuple[TensorSummary, ...]
    problems: tuple[str, ...]

    @property
    def blobs(self) -> dict[str, int]:
        """Size of each stored blob; trials that were retried or copied share theirs."""
        return {t.pointer.blob: t.pointer.size for t in self.tensors if t.presence == "stored"}


def summarize(study: Study, stored: Mapping[str, object]) -> StudySummary:
    """Look at a study, any study.

    Args:
        stored: Keyed by the identifiers of everything that is in its tensor store.
    """
    trials = _optuna.all_trials(study)
    problems: list[str] = []
    trajectories: list[TrajectorySummary] = []
    if not _optuna.is_multi_objective(study):
        try:
            trajectories = trajectories_of(_optuna.sign_of(study), trials, problems.append)
        except Exception as error:  # attributes may hold anything
            problems.append(
                f"Its trajectories cannot be read ({type(error).__name__}: {error}): an attribute that "
                "starts with 'hypergrad:' was changed. Use a backup of the storage."
            )
    tensors, damaged = _tensors(study, trials, stored)
    best = _best(study)
    states = Counter(t.state.name.lower() for t in trials)
    return StudySummary(
        name=study.study_name,
        directions=tuple(d.name.lower() for d in study.directions),
        trials={s.name.lower(): states[s.name.lower()] for s in TrialState},
        best_value=None if best is None else best.value,
        best_trial=None if best is None else best.number,
        trajectories=tuple(trajectories),
        tensors=tuple(tensors),
        problems=(*problems, *damaged),
    )


def _best(study: Study) -> FrozenTrial | None:
    try:
        return study.best_trial
    except (ValueError, RuntimeError):  # no trial is complete; several objectives
        return None


def trajectories_of(
    sign: float, trials: Sequence[FrozenTrial], say: Callable[[str], None]
) -> list[TrajectorySummary]:
    """Those of all trials of a study, by number.

    Args:
        say: Is told of each trial that is left out, and why.
    """
    ledger, race = Ledger(sign, say), Race()
    ledger.sync(trials)
    workers: dict[int, list[Worker]] = {}
    starting: list[tuple[Claim, Worker]] = []
    running = [trials[n] for n in sorted(ledger.unfinished)]
    for trial in (t for t in running if t.state == TrialState.RUNNING):
        claim, worker = Claim.of(trial), _worker(trial)
        if claim is None:
            continue
        if claim.parent is None:
            starting.append((claim, worker))
        else:
            workers.setdefault(claim.trajectory, []).append(worker)
    found = [
        _summary(t, sign, race, tuple(workers.get(t.id, ()))) for t in ledger.trajectories.values()
    ]
    for claim, worker in starting:
        trial = trials[worker.trial]
        numbers = {n: trial.params[n] for n in trial.params if n in ledger.owned}
        setting = {n: v for n, v in trial.params.items() if n not in numbers}
        source = _source(claim.source)
        found.append(
            TrajectorySummary(
                trial.number, setting, source, numbers, 0, None, None, None, (worker,)
            )
        )
    return sorted(found, key=lambda t: t.id)


def _summary(
    trajectory: Trajectory, sign: float, race: Race, workers: tuple[Worker, ...]
) -> TrajectorySummary:
    best = trajectory.best
    stop = trajectory.stop if race.is_over(trajectory) else None
    return TrajectorySummary(
        id=trajectory.id,
        setting=trajectory.setting,
        source=_source(trajectory.source),
        start=trajectory.first,
        steps=len(trajectory.steps),
        best_value=None if best is None or not math.isfinite(best.value) else sign * best.value,
        best_trial=None if best is None else best.number,
        stop=stop,
        workers=workers,
    )


def _source(source: str) -> str:
    return f"trial {source}" if source.isdigit() else source


def _worker(trial: FrozenTrial) -> Worker:
    lease = Lease.of(trial)
    if lease is None:
        return Worker(trial.number, "?", "?", is_gone=False)
    return Worker(trial.number, lease.host or "?", lease.pid or "?", lease.is_over, lease.is_kept)


def _tensors(
    study: Study, trials: Sequence[FrozenTrial], stored: Mapping[str, object]
) -> tuple[list[TensorSummary], list[str]]:
    held, damaged = held_by(study.study_name, trials)
    expected = expected_of(held, study.directions, Retention().transient)

    def presence(entry: Held) -> Presence:
        if entry.pointer.blob in stored:
            return "stored"
        return "missing" if entry.place in expected else "removed"

    held.sort(key=lambda h: (h.trial.number, h.pointer.role, h.pointer.name))
    return [TensorSummary(h.trial.number, h.pointer, presence(h)) for h in held], damaged
