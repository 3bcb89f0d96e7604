"""Damage to stored tensors: to the bytes of a blob, to its rows, or to the pointer to it."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from specimen import CUT_OFF_AT, Specimen, objective, opened, resume, sampler, warnings
from torch import Tensor

from optuna_hypergrad import CorruptTensorError, MissingTensorError, load_tensors
from optuna_hypergrad.stores import Pointer, TensorStore


@dataclass(frozen=True)
class Stored:
    """Rows: those of a blob, and the attribute that points to it."""

    trial_id: int
    key: str
    blob: str
    pointer: dict[str, Any]
    chunks: tuple[bytes, ...]
    num_bytes: int

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)

    def with_data(self, data: bytes) -> Stored:
        """Cut into rows where this one is, and with the number of bytes that it then has."""
        size = len(self.chunks[0])
        chunks = tuple(data[i : i + size] for i in range(0, len(data), size))
        return replace(self, chunks=chunks, num_bytes=len(data))

    def forged(self) -> Stored:
        """With a pointer whose size and checksum are right for what there is."""
        claims = {**self.pointer, "size": self.num_bytes}
        pointer = Pointer.from_json(claims, self.key, 0)
        return replace(self, pointer={**claims, "sha256": pointer.digest(self.data)})


class Rows:
    """A database behind the back of everybody who uses it."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA synchronous=OFF")
        self._connection.execute("PRAGMA journal_mode=MEMORY")

    def close(self) -> None:
        self._connection.close()

    def all(self) -> list[Stored]:
        found = self._connection.execute(
            "SELECT trial_id, key, value_json FROM trial_system_attributes "
            "WHERE key LIKE 'hypergrad:tensor:%'"
        ).fetchall()
        rows = [self._stored(trial_id, key, json.loads(text)) for trial_id, key, text in found]
        return [row for row in rows if row.chunks]  # the others: as retention has left them

    def put(self, *stored: Stored) -> None:
        do = self._connection.execute
        do("BEGIN")
        for row in stored:
            do("DELETE FROM hypergrad_chunks WHERE artifact_id = ?", (row.blob,))
            do(
                "UPDATE hypergrad_blobs SET num_bytes = ? WHERE artifact_id = ?",
                (row.num_bytes, row.blob),
            )
            for chunk, data in enumerate(row.chunks):
                do("INSERT INTO hypergrad_chunks VALUES (?, ?, ?)", (row.blob, chunk, data))
            do(
                "UPDATE trial_system_attributes SET value_json = ? WHERE trial_id = ? AND key = ?",
                (json.dumps(row.pointer), row.trial_id, row.key),
            )
        do("COMMIT")

    def _stored(self, trial_id: int, key: str, pointer: dict[str, Any]) -> Stored:
        blob = pointer["blob"]
        chunks = self._connection.execute(
            "SELECT data FROM hypergrad_chunks WHERE artifact_id = ? ORDER BY chunk", (blob,)
        ).fetchall()
        data = tuple(row[0] for row in chunks)
        return Stored(trial_id, key, blob, pointer, data, sum(map(len, data)))


def _bit_flip(rng: random.Random, mine: Stored, other: Stored) -> Stored:
    data = bytearray(mine.data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return mine.with_data(bytes(data))


def _truncation(rng: random.Random, mine: Stored, other: Stored) -> Stored:
    cut = mine.with_data(mine.data[: rng.randrange(mine.num_bytes)])
    return cut if rng.random() < 0.5 else replace(cut, num_bytes=mine.num_bytes)


def _swapped_chunks(rng: random.Random, mine: Stored, other: Stored) -> Stored:
    chunks = list(mine.chunks)
    pairs = [(i, j) for j in range(len(chunks)) for i in range(j) if chunks[i] != chunks[j]]
    i, j = rng.choice(pairs)
    chunks[i], chunks[j] = chunks[j], chunks[i]
    return replace(mine, chunks=tuple(chunks))


def _wrong_step(rng: random.Random, mine: Stored, other: Stored) -> Stored:
    step = mine.pointer["step"]
    wrong = rng.choice([step + 1, step - 1, 2**40, -1, step + rng.randrange(1, 1000)])
    return replace(mine, pointer={**mine.pointer, "step": wrong})


def _wrong_shape_in_pointer(rng: random.Random, mine: Stored, other: Stored) -> Stored:
    tensors = [list(entry) for entry in mine.pointer["tensors"]]
    chosen = rng.choice(tensors)
    chosen[2] = _reshaped(rng, chosen[2])
    wrong = replace(mine, pointer={**mine.pointer, "tensors": tensors})
    return wrong.forged() if rng.random() < 0.5 else wrong


def _wrong_shape_in_header(rng: random.Random, mine: Stored, other: Stored) -> Stored:
    end = 8 + int.from_bytes(mine.data[:8], "little")
    header = json.loads(mine.data[8:end])
    entry = rng.choice(list(header.values()))
    entry["shape"] = _reshaped(rng, entry["shape"])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    wrong = mine.with_data(len(text).to_bytes(8, "little") + text + mine.data[end:])
    return wrong.forged() if rng.random() < 0.5 else wrong


def _blob_of_another(rng: random.Random, mine: Stored, other: Stored) -> Stored:
    return replace(mine, chunks=other.chunks, num_bytes=other.num_bytes)


def _reshaped(rng: random.Random, shape: list[int]) -> list[int]:
    """Another shape of as many entries."""
    choices = [[*shape, 1], [1, *shape], shape[::-1], [math.prod(shape)]]
    return rng.choice([c for c in choices if c != shape])


DAMAGES: dict[str, Callable[[random.Random, Stored, Stored], Stored]] = {
    "bit flip": _bit_flip,
    "truncation": _truncation,
    "swapped chunks": _swapped_chunks,
    "wrong step": _wrong_step,
    "wrong shape in the pointer": _wrong_shape_in_pointer,
    "wrong shape in the header": _wrong_shape_in_header,
    "swapped with another trial's": _blob_of_another,
}
SWAPS = frozenset({"swapped with another trial's"})
"""Of these, the other one gets the bytes of the first in turn."""


class Case(NamedTuple):
    """One damage, and the failure that it should not have led to, if any."""

    damage: str
    failure: str | None


class Reader:
    """Reads what is stored, damaged and not, in a copy of ``specimen`` that stays the same."""

    def __init__(self, specimen: Specimen, storage: RDBStorage, path: Path) -> None:
        study = optuna.load_study(storage=storage, study_name="steps")
        self._storage, self._store = storage, TensorStore.of_study(study)
        self._rows = Rows(path)
        self._all = self._rows.all()
        self._truth = {s.blob: self._load(s) for s in self._all}

    def close(self) -> None:
        self._rows.close()

    def __call__(self, rng: random.Random, damage: str) -> Case:
        mine = rng.choice(self._all)
        rivals = [s for s in self._all if s.pointer["role"] == mine.pointer["role"]]
        other = rng.choice([s for s in rivals if s.data != mine.data])
        damaged = [DAMAGES[damage](rng, mine, other)]
        if damage in SWAPS:
            damaged.append(DAMAGES[damage](rng, other, mine))
        assert all(d not in (mine, other) for d in damaged)
        self._rows.put(*damaged)
        failures = [self._failure(d) for d in damaged]
        sound = (mine, other)[: len(damaged)]
        self._rows.put(*sound)
        for one in sound:
            if not _same(self._load(one), self._truth[one.blob]):
                failures.append("not what it was before")
        return Case(damage, next((f for f in failures if f is not None), None))

    def _failure(self, damaged: Stored) -> str | None:
        try:
            self._load(damaged)
        except (CorruptTensorError, MissingTensorError) as error:
            name = damaged.pointer["name"]
            return None if damaged.key in str(error) else f"{name!r} is not named: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "loaded as if it were sound"

    def _load(self, stored: Stored) -> dict[str, Tensor]:
        trial = self._storage.get_trial(stored.trial_id)
        name, role = stored.pointer["name"], stored.pointer["role"]
        (pointer,) = self._store.pointers(trial, name, role)
        return self._store.load(pointer)


def go_on_with_study(specimen: Specimen, directory: Path, rng: random.Random, damage: str) -> Case:
    """Damage the newest state of a trajectory: its next trial is the one after the state before."""
    with specimen.copy(directory) as storage:
        rows = Rows(directory / "copy.db")
        states = _newest_last(rows.all(), "step_state")
        rows.put(_damaged(rng, damage, states[-1], rows.all()))
        rows.close()
        study = optuna.load_study(storage=storage, study_name="steps", sampler=sampler())
        with warnings() as said:
            study.optimize(objective, n_trials=1)
        *_, last, new = study.get_trials(deepcopy=False)
        text = f"goes on from its state after trial {last.number - 1}"
        if not any(text in warning for warning in said):
            return Case(damage, f"no warning: {said}")
        if new.params != last.params or new.value != last.value:
            return Case(damage, f"{new.params} instead of {last.params}")
        return Case(damage, _difference(_values(study, new), _values(study, last)))


def go_on_with_run(specimen: Specimen, directory: Path, rng: random.Random, damage: str) -> Case:
    """Damage the newest checkpoint of a run: it ends where it would have ended without."""
    with specimen.copy(directory) as storage:
        rows = Rows(directory / "copy.db")
        checkpoints = _newest_last(rows.all(), "checkpoint")
        assert [c.pointer["step"] for c in checkpoints] == [CUT_OFF_AT - 1, CUT_OFF_AT]
        damaged = _damaged(rng, damage, checkpoints[-1], rows.all())
        rows.put(damaged)
        rows.close()
        with warnings() as said:
            trial, found = resume(storage)
        newest = damaged.pointer["step"] > CUT_OFF_AT - 1  # else the other one is read, and no more
        if newest and not any(f"checkpoint, of step {CUT_OFF_AT - 1}" in text for text in said):
            return Case(damage, f"no warning: {said}")
        truth = {"x": specimen.end}
        stored = load_tensors(trial, "bilevel")["bilevel"]
        return Case(damage, _difference(found.outer_params, truth) or _difference(stored, truth))


def check(
    specimen: Specimen, directory: Path, count: int, going_on: int, seed: int
) -> Iterator[Case]:
    """``count`` cases, all damages in turn; in ``going_on`` of them the study or the run goes on."""
    rng = random.Random(seed)
    names = list(DAMAGES)
    with _reader(specimen, directory) as reader:
        for i in range(count - going_on):
            yield reader(rng, names[i % len(names)])
    for i in range(going_on):
        go_on = (go_on_with_study, go_on_with_run)[i // len(names) % 2]
        try:
            yield go_on(specimen, directory, rng, names[i % len(names)])
        except Exception as error:
            yield Case(names[i % len(names)], f"{go_on.__name__}: {error!r}")


@contextmanager
def _reader(specimen: Specimen, directory: Path) -> Iterator[Reader]:
    path = directory / "read.db"
    path.write_bytes(specimen.path.read_bytes())
    with opened(path) as storage:
        reader = Reader(specimen, storage, path)
        yield reader
        reader.close()


def _newest_last(rows: list[Stored], role: str) -> list[Stored]:
    found = [row for row in rows if row.pointer["role"] == role]
    return sorted(found, key=lambda row: row.pointer["step"])


def _damaged(rng: random.Random, damage: str, mine: Stored, rows: list[Stored]) -> Stored:
    other = rng.choice([row for row in rows if row.data != mine.data])
    return DAMAGES[damage](rng, mine, other)


def _values(study: optuna.Study, trial: FrozenTrial) -> dict[str, Tensor]:
    found = load_tensors(trial, study=study)
    return {"decay": found["decay"], **found["tree"]}


def _difference(found: dict[str, Tensor], truth: dict[str, Tensor]) -> str | None:
    return None if _same(found, truth) else f"{found} instead of {truth}"


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)
