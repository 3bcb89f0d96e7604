"""Whether everything that trials point to can be read back: found here, asked for by ``TensorStore``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from tqdm.auto import tqdm

from .. import _optuna
from .._errors import CorruptTensorError, MissingTensorError
from ._pointer import Pointer, pointers_in, shorten
from ._retention import Retention

Read = Callable[[Pointer], object]


@dataclass(frozen=True)
class VerifyReport:
    """What a verification has found. Tensors that several trials point to count once."""

    sound: tuple[Pointer, ...]
    """Read, and bit for bit what was written."""
    removed: tuple[Pointer, ...]
    """Not in the store any more, as a retention policy leaves it."""
    damaged: tuple[str, ...]
    """For each thing that cannot be read: the row, the cause and what to do."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are sound."""
        return sum(pointer.size for pointer in self.sound)

    def __str__(self) -> str:
        return (
            f"{len(self.sound)} ok ({self.num_bytes / 1e6:.1f} MB), "
            f"{len(self.removed)} removed by retention, {len(self.damaged)} damaged."
        )


@dataclass(frozen=True)
class Held:
    """A pointer and the trial that has it."""

    study: str
    trial: FrozenTrial
    pointer: Pointer

    @property
    def place(self) -> tuple[str, int, Pointer]:
        return self.study, self.trial.number, self.pointer

    def says(self, problem: object) -> str:
        return f"Study {shorten(self.study)}, trial {self.trial.number}: {problem}"


@dataclass
class Contents:
    """Every pointer of some studies."""

    held: list[Held]
    unreadable: list[str]
    """Attributes that should be pointers and are none."""
    expected: set[tuple[str, int, Pointer]]
    """Places of the pointers whose blobs every retention policy keeps."""


def contents_of(
    storage: BaseStorage, study_ids: Iterable[int] | None, transient: frozenset[str]
) -> Contents:
    """What the trials of ``study_ids`` (``None``: of all studies) point to, as of now."""
    wanted = None if study_ids is None else set(study_ids)
    found = Contents([], [], set())
    for study in storage.get_all_studies():
        study_id = _optuna.study_id_of(study)
        if wanted is not None and study_id not in wanted:
            continue
        trials = storage.get_all_trials(study_id, deepcopy=False)
        held, damaged = held_by(study.study_name, trials)
        name = shorten(study.study_name)
        found.unreadable += [f"Study {name}: {problem}" for problem in damaged]
        found.held += held
        found.expected |= expected_of(held, study.directions, transient)
    return found


def held_by(study: str, trials: Iterable[FrozenTrial]) -> tuple[list[Held], list[str]]:
    """What the trials of a study point to; and, in words, the pointers that cannot be read."""
    held: list[Held] = []
    damaged: list[str] = []
    for trial in trials:
        for key, value in pointers_in(trial.system_attrs).items():
            try:
                held.append(Held(study, trial, Pointer.from_json(value, key, trial.number)))
            except CorruptTensorError as error:
                damaged.append(str(error))
    return held, damaged


def expected_of(
    held: Sequence[Held], directions: Sequence[StudyDirection], transient: frozenset[str]
) -> set[tuple[str, int, Pointer]]:
    """Places of those of ``held``, all of one study, whose blobs every retention policy keeps."""
    least = Retention(newest=1, best=0, every=0, transient=transient)
    expected: set[tuple[str, int, Pointer]] = set()
    for role in {h.pointer.role for h in held}:
        of_role = [h for h in held if h.pointer.role == role]
        trials = list({h.trial.number: h.trial for h in of_role}.values())
        kept = least.keeps(role, trials, directions, lambda trial: None)
        expected.update(h.place for h in of_role if h.trial.number in kept)
    return expected


def verify(
    storage: BaseStorage,
    study_ids: Iterable[int] | None,
    transient: frozenset[str],
    read: Read,
    progress: bool,
) -> VerifyReport:
    """Read everything; what cannot be read once more, in case that it was replaced meanwhile."""
    study_ids = None if study_ids is None else list(study_ids)
    contents = contents_of(storage, study_ids, transient)
    distinct = {h.pointer: h for h in contents.held}
    total = sum(pointer.size for pointer in distinct)
    sound: list[Pointer] = []
    doubtful: set[Pointer] = set()
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="verify", disable=not progress, leave=False
    ) as bar:
        for held in distinct.values():
            if _problem(held, read) is None:
                sound.append(held.pointer)
            else:
                doubtful.add(held.pointer)
            bar.update(held.pointer.size)
    removed: list[Pointer] = []
    damaged = list(contents.unreadable)
    if doubtful:
        contents = contents_of(storage, study_ids, transient)
        left = {h.pointer: h for h in contents.held if h.pointer in doubtful}
        expected = {pointer for _, _, pointer in contents.expected}
        for held in left.values():
            problem = _problem(held, read)
            if problem is None:
                sound.append(held.pointer)
            elif isinstance(problem, MissingTensorError) and held.pointer not in expected:
                removed.append(held.pointer)
            elif isinstance(problem, MissingTensorError):
                damaged.append(held.says(_lost(held.pointer)))
            else:
                damaged.append(held.says(problem))
    return VerifyReport(tuple(sound), tuple(removed), tuple(damaged))


def _problem(held: Held, read: Read) -> Exception | None:
    try:
        read(held.pointer)
    except (CorruptTensorError, MissingTensorError) as error:
        return error
    except (OSError, sa.exc.DatabaseError) as error:
        if isinstance(error, sa.exc.OperationalError):  # the connection, not the row
            raise
        cause = getattr(error, "orig", None) or error
        return CorruptTensorError(
            f"Cannot read {held.pointer}: {cause}. Use an earlier trial, or a backup of the storage."
        )
    return None


def _lost(pointer: Pointer) -> str:
    return (
        f"There is nothing in the store for {pointer}, which no retention policy removes. It was "
        "discarded, or the study was copied without its tensors, or they are in another store: give "
        "that one (tensor_store=, --tensor-store), or use an earlier trial, or a backup."
    )
