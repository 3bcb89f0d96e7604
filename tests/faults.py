"""Faults of disks, made on purpose: places that run out of room, and what is stored in them."""

from __future__ import annotations

import abc
import functools
import os
import resource
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import optuna
import sqlalchemy as sa
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.storages import (
    BaseStorage,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.trial import TrialState
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.stores._encoding import encode
from optuna_hypergrad.stores._full import is_full

KINDS = ("sqlite", "journal")
ENTRIES = 5_000
"""Of a tensor. What is stored with it takes more than 100 kB at once."""


class UnavailableError(Exception):
    """Why there can be no such place here."""


class Place(abc.ABC):
    """A directory whose room can be taken away and given back."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def storage(self, kind: str) -> BaseStorage:
        if kind == "sqlite":
            return RDBStorage(f"sqlite:///{self.directory}/study.db")
        return JournalStorage(ohg.AtomicJournalFileBackend(str(self.directory / "study.log")))

    @contextmanager
    def full(self, storage: BaseStorage, room: int) -> Iterator[None]:
        """Leave ``room`` bytes, or a little more."""
        try:
            self._take(storage, room)
            yield
        finally:
            self._give(storage)

    @abc.abstractmethod
    def _take(self, storage: BaseStorage, room: int) -> None: ...

    @abc.abstractmethod
    def _give(self, storage: BaseStorage) -> None: ...

    def close(self) -> None:  # noqa: B027
        """Nothing is left of it."""


class PageLimit(Place):
    """``PRAGMA max_page_count`` of SQLite."""

    name = "page limit"
    kinds = ("sqlite",)

    def _take(self, storage: BaseStorage, room: int) -> None:
        with storage.engine.connect() as connection:
            size = connection.exec_driver_sql("PRAGMA page_size").scalar()
            used = connection.exec_driver_sql("PRAGMA page_count").scalar()
            free = connection.exec_driver_sql("PRAGMA freelist_count").scalar()
        self._limit(storage, max(used, used - free + room // size))

    def _give(self, storage: BaseStorage) -> None:
        self._limit(storage, 2**30)

    def _limit(self, storage: BaseStorage, pages: int) -> None:
        storage.engine.dispose()  # the limit belongs to a connection

        def limit(connection: Any, record: Any) -> None:
            connection.execute(f"PRAGMA max_page_count={pages}")

        sa.event.listen(storage.engine, "connect", limit)


class FileSizeLimit(Place):
    """``RLIMIT_FSIZE`` of this process. (Python ignores SIGXFSZ, so that a write fails with EFBIG.)"""

    name = "file-size limit"

    def _take(self, storage: BaseStorage, room: int) -> None:
        logs = [p for p in self.directory.iterdir() if p.is_file() and not p.is_symlink()]
        used = max(p.stat().st_size for p in logs)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (used + room, hard))

    def _give(self, storage: BaseStorage) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class SmallDisk(Place):
    """A tmpfs of 4 MB, filled up by a file of nothing.

    Raises:
        UnavailableError: where it cannot be mounted.
    """

    name = "small tmpfs"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(directory)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UnavailableError(f"mount cannot be run: {error}") from None
        if done.returncode:
            raise UnavailableError(f"no tmpfs can be mounted: {done.stderr.strip()}")

    def _take(self, storage: BaseStorage, room: int) -> None:
        state = os.statvfs(self.directory)
        ballast = max(0, state.f_bavail * state.f_frsize - room)
        with suppress(OSError):  # a checkpoint under way takes some of it
            (self.directory / "ballast").write_bytes(b"\0" * ballast)

    def _give(self, storage: BaseStorage) -> None:
        (self.directory / "ballast").unlink()

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.directory)], check=True)


PLACES: dict[str, type[Place]] = {c.name: c for c in (PageLimit, FileSizeLimit, SmallDisk)}


def study_in(storage: BaseStorage, seed: int = 3) -> optuna.Study:
    sampler = ohg.HypergradientSampler(seed=seed)
    return optuna.create_study(
        study_name="s", storage=storage, sampler=sampler, load_if_exists=True
    )


@ohg.differentiable
def objective(trial: Any, entries: int = ENTRIES) -> Tensor:
    """A number, and a tensor of ``entries``."""
    x = trial.suggest_float("x", 1e-3, 1e1, log=True)
    t = trial.suggest_tensor("t", entries, 0.0, 1.0)
    return (x.log() - 0.5) ** 2 + ((t - torch.linspace(0.1, 0.9, entries)) ** 2).sum()


small_objective = functools.partial(objective, entries=50)


@dataclass
class Run:
    """An objective that is a whole run of outer steps over a tensor of ``ENTRIES``."""

    steps: int = 12
    every: int = 1
    entries: int = ENTRIES
    at: Callable[[int], None] = lambda step: None
    """Called with each outer step that is begun."""
    begun: list[int] = field(default_factory=list)

    def __call__(self, trial: optuna.Trial) -> float:
        target = torch.linspace(0.1, 0.9, self.entries)

        def outer(w: ohg.Params, lam: ohg.Params, step: int) -> Tensor:
            if torch.is_grad_enabled():
                self.begun.append(step)
                self.at(step)
            return ((w["w"] - target) ** 2).mean()

        problem = ohg.BilevelProblem(
            lambda w, lam, _: 0.5 * ((w["w"] - lam["t"]) ** 2).sum(), outer, outer_batch=int
        )
        return ohg.minimize_bilevel(
            problem,
            {"w": torch.zeros(self.entries)},
            {"t": torch.full((self.entries,), 0.5)},
            inner_solver=ohg.HeavyBall(0.4, max_steps=2),
            optimizer=functools.partial(torch.optim.Adam, lr=0.1),
            bounds={"t": (0.0, 1.0)},
            num_steps=self.steps,
            trial=trial,
            checkpoint_every=self.every,
        ).outer_value


def stored(study: optuna.Study) -> dict[str, ohg.Params]:
    """Everything that trials point to, by blob.

    Raises:
        AssertionError: if any of it is damaged.
    """
    store = ohg.TensorStore.of_study(study)
    report = store.verify()
    assert not report.damaged, report.damaged
    return {pointer.blob: store.load(pointer) for pointer in report.sound}


def same(one: ohg.Params, other: ohg.Params) -> bool:
    """Whether two dicts of tensors are equal bit for bit."""
    return encode(one) == encode(other)


def steps_of(study: optuna.Study) -> list[tuple[Any, ...]]:
    """What the trials that count gave; without those that were cut off, and done again."""
    found = []
    for trial in study.trials:
        outcome = trial.system_attrs.get("hypergrad:outcome", {"kind": "void"})
        cut_off = outcome["kind"] == "good" and trial.state != TrialState.COMPLETE
        if outcome["kind"] != "void" and not cut_off:
            found.append((trial.state, trial.params, trial.value))
    return found


def differences(study: optuna.Study, whole: optuna.Study) -> list[str]:
    """In words, where the steps of ``study`` are not the first ones of ``whole``."""
    wrong = []
    mine, theirs = steps_of(study), steps_of(whole)
    if mine != theirs[: len(mine)]:
        wrong.append(f"went on otherwise: {mine} instead of {theirs}")
        return wrong
    best = min((v, i) for i, (state, _, v) in enumerate(mine) if state == TrialState.COMPLETE)
    trials = [t for t in whole.trials if t.value == best[0]]
    expected = ohg.load_tensors(trials[0], study=whole)
    found = ohg.load_tensors(study)
    if found.keys() != expected.keys() or not same(found, expected):
        wrong.append("other tensors")
    return wrong


@functools.cache
def whole_study(trials: int, entries: int = ENTRIES) -> optuna.Study:
    """One that nothing went wrong in."""
    study = study_in(InMemoryStorage())
    study.sampler = ohg.HypergradientSampler(seed=3, retention=ohg.Retention(every=1))
    study.optimize(functools.partial(objective, entries=entries), n_trials=trials)
    return study


@functools.cache
def whole_run(steps: int, entries: int = ENTRIES) -> tuple[float, Tensor]:
    """Value and hyperparameters of a run that nothing went wrong in."""
    study = study_in(InMemoryStorage())
    study.optimize(Run(steps, entries=entries), n_trials=1)
    return study.best_value, ohg.load_tensors(study)["bilevel"]["t"]


def retry(study: optuna.Study, run: Run) -> list[str]:
    """Go on from the newest trial; what is wrong with how that ends.

    Optuna retries it where it is marked as failed. Where not even that had room, it is found by itself.
    """
    newest = study.trials[-1].state if study.trials else TrialState.WAITING
    if newest == TrialState.FAIL:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            RetryHeartbeatStaleTrialCallback()(study, study.trials[-1])
    run.begun.clear()
    if newest != TrialState.COMPLETE:
        study.optimize(run, n_trials=1)
    value, t = whole_run(run.steps, run.entries)
    trial = study.trials[-1]
    wrong = [] if trial.value == value else [f"it ended at {trial.value} and not at {value}"]
    if not torch.equal(ohg.load_tensors(trial, study=study)["bilevel"]["t"], t):
        wrong.append("it ended at other hyperparameters")
    return wrong


def study_without_room(place: Place, kind: str, room: int) -> list[str]:
    """Trials until there is no room, and further ones when there is; what was wrong.

    Args:
        room: Bytes that are left: below the size of a tensor.
    """
    storage = place.storage(kind)
    study = study_in(storage)
    study.optimize(objective, n_trials=3)
    before = stored(study)
    with place.full(storage, room):
        wrong = _refused(lambda: study.optimize(objective, n_trials=5), room, "'t'")
        wrong += _lost(before, storage, "while there was no room")
    wrong += _lost(before, storage, "afterwards")
    for one in (study, study_in(storage)):
        one.optimize(objective, n_trials=3)
    wrong += differences(study, whole_study(16))
    if len(steps_of(study)) != 9:
        wrong.append(f"{len(steps_of(study))} steps instead of 9")
    return wrong


def run_without_room(place: Place, kind: str, room: int) -> list[str]:
    """A run until there is no room for its checkpoint, continued when there is; what was wrong."""
    storage = place.storage(kind)
    study = study_in(storage)
    study.optimize(Run(2), n_trials=1)
    before = stored(study)
    with ExitStack() as stack:
        run = Run(8)
        run.at = lambda step: stack.enter_context(place.full(storage, room)) if step == 2 else None
        wrong = _refused(lambda: study.optimize(run, n_trials=1), room, "'bilevel")
        wrong += _lost(before, storage, "while there was no room")
    wrong += _lost(before, storage, "afterwards")
    study = study_in(storage)
    run = Run(8)
    wrong += retry(study, run)
    if run.begun[:1] not in ([1], [2], [3]):  # that of step 2 or 3 may have been under way
        wrong.append(f"it went on from step {run.begun[:1]}")
    return wrong


WITHOUT_ROOM = {"study": study_without_room, "run": run_without_room}


def _refused(action: Callable[[], Any], room: int, name: str) -> list[str]:
    """What is wrong with the error of an action for which there is no room."""
    try:
        action()
    except Exception as error:
        chain = [error]
        while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(before)
        said = next((str(e) for e in chain if isinstance(e, ohg.NoSpaceError)), None)
        if said is not None:
            clear = "no room left" in said and name in said and "rial " in said
            return [] if clear else [f"unclear: {said}"]
        frames = [f.filename for e in chain for f in traceback.extract_tb(e.__traceback__)]
        ours = any(str(Path("optuna_hypergrad", "stores")) in f for f in frames)
        if not is_full(error) or ours or room >= 40_000:
            return [f"not typed: {error!r}"]
        return []  # a write of Optuna's own came first
    return ["there was room"]


def _lost(before: Mapping[str, ohg.Params], storage: BaseStorage, when: str) -> list[str]:
    now = stored(optuna.load_study(study_name="s", storage=storage))
    return [f"{b} is not what it was {when}" for b, t in before.items() if not same(now[b], t)]
