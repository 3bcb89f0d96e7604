"""TensorStore: bit for bit, blob before pointer, damage found and named, retention and sweeps."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import optuna
import pytest
import safetensors.torch
import sqlalchemy as sa
import torch
from conftest import open_storage
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from servers import SERVERS
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import (
    CorruptTensorError,
    HyperparameterError,
    MissingTensorError,
    StorageError,
    TakenOverError,
    stores,
)
from optuna_hypergrad.stores import (
    Pointer,
    Retention,
    TensorStore,
    _identity,
    _optuna_tables,
    _retrying,
    _writing,
)
from optuna_hypergrad.stores import _encoding as encoding

Params = dict[str, Tensor]
STORAGES = ["in_memory", "journal", "sqlite_file", "postgresql", "mariadb"]
NASTY = [
    "",
    " ",
    "a'b\"c`d",
    "'; DROP TABLE trials; --",
    "nul\0in it",
    "layers/0.weight",
    "../../etc/passwd",
    "\N{PILE OF POO}\N{ZERO WIDTH JOINER}\N{SNOWMAN}",
    "é vs é",
    "%s %(a)s {0} :x ?",
    "hypergrad:tensor:value:x",
    "x" * 10_000,
    "\N{PILE OF POO}" * 2_500,
]


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: Optuna takes half a second to make its tables."""
    path = tmp_path_factory.mktemp("empty") / "study.db"
    RDBStorage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, empty_database: Path
) -> Iterator[BaseStorage]:
    kind = getattr(request, "param", "sqlite_file")
    if kind == "in_memory":
        yield InMemoryStorage()
    elif kind == "journal":
        yield JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    elif kind in SERVERS:
        database = open_storage(kind, tmp_path)
        yield optuna.storages.get_storage(database)
        database.engine.dispose()
    else:
        shutil.copy(empty_database, tmp_path / "study.db")
        url = "sqlite://" if kind == "sqlite_memory" else f"sqlite:///{tmp_path}/study.db"
        database = RDBStorage(url)
        yield optuna.storages.get_storage(database)
        database.engine.dispose()


every_storage = pytest.mark.parametrize("storage", STORAGES, indirect=True)
with_sqlite_memory = pytest.mark.parametrize("storage", [*STORAGES, "sqlite_memory"], indirect=True)


class Desk:
    """A study with its store, and short words for what the tests do."""

    def __init__(self, storage: BaseStorage, direction: str = "minimize", **kwargs: Any) -> None:
        self.study = optuna.create_study(storage=storage, direction=direction)
        self.storage = self.study._storage
        self.store = TensorStore.of_study(self.study, **kwargs)

    def running(self) -> optuna.Trial:
        return self.study.ask()

    def save(
        self,
        trial: optuna.Trial,
        tensors: Params | None = None,
        name: str = "decay",
        role: str = "value",
        step: int = 0,
    ) -> Pointer:
        tensors = {"decay": torch.arange(5.0)} if tensors is None else tensors
        return self.store.save(self.study._study_id, trial._trial_id, name, role, step, tensors)

    def finished(self, value: float | None, role: str = "value", **constraints: float) -> Pointer:
        trial = self.running()
        pointer = self.save(trial, {"x": torch.full((3,), float(trial.number))}, role=role)
        for name, constraint in constraints.items():
            trial.set_constraint(name, constraint)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        self.study.tell(trial, value, state)
        return pointer

    def frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def survivors(self, role: str = "value") -> list[int]:
        """Numbers of the trials whose tensors can be loaded."""
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            for pointer in self.store.pointers(trial, role=role):
                try:
                    self.store.load(pointer)
                except MissingTensorError:
                    continue
                found.append(trial.number)
        return found

    def stored(self) -> list[stores.StoredArtifact]:
        assert isinstance(self.store.artifact_store, stores.AbstractArtifactStore)
        return list(self.store.artifact_store.stored())

    def retain(self, **kwargs: Any) -> tuple[Pointer, ...]:
        self.store.retention = Retention(**kwargs)
        return self.store.apply_retention(self.study._study_id)


@pytest.fixture
def desk(storage: BaseStorage) -> Desk:
    return Desk(storage)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    raw = [t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(raw[0], raw[1])


def some_of_everything() -> Params:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45])
    payload = torch.tensor([0x7FC01234, -0x3FEDCB], dtype=torch.int32).view(torch.float32)
    tensors = {
        "0-d": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.empty(0),
        "empty 3-d": torch.empty(2, 0, 3, dtype=torch.int64),
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "view 1": base[0],
        "view 2": base[:2],
        "the same again": base,
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "special": special,
        "nan payload": payload,
        "needs grad": torch.randn(3, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "not a leaf": torch.randn(3, requires_grad=True) * 2,
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "many dimensions": torch.zeros((1,) * 12),
    }
    for dtype in encoding._CODES:
        if not dtype.is_complex:
            tensors[str(dtype)] = torch.randint(0, 2, (7,)).to(dtype)
    return tensors


# --- what goes in comes out ---------------------------------------------------------------------


@with_sqlite_memory
def test_everything_comes_back_bit_for_bit_and_in_order(desk: Desk) -> None:
    tensors = some_of_everything()
    trial = desk.running()
    desk.save(trial, tensors, step=7)
    [pointer] = desk.store.pointers(desk.frozen(0), "decay", "value")
    found = desk.store.load(pointer)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert same_bits(found[name], tensor), name
        assert not found[name].requires_grad
    for tensor in found.values():
        tensor.zero_()  # theirs: writable, and no two share memory
    assert same_bits(desk.store.load(pointer)["view 1"], tensors["view 1"])
    assert (pointer.trial, pointer.step, pointer.name, pointer.role) == (0, 7, "decay", "value")


@every_storage
def test_no_tensors_at_all(desk: Desk) -> None:
    assert desk.store.load(desk.save(desk.running(), {})) == {}


@every_storage
def test_a_fresh_store_finds_them(desk: Desk) -> None:
    pointer = desk.save(desk.running())
    again = TensorStore.of_study(desk.study)
    assert torch.equal(again.load(pointer)["decay"], torch.arange(5.0))


def test_blobs_are_plain_safetensors_files(desk: Desk) -> None:
    tensors = {
        "b": torch.randn(3),
        "a": torch.ones(2, 2, dtype=torch.float64),
        "c": torch.tensor(True),
    }
    pointer = desk.save(desk.running(), tensors)
    with desk.store.artifact_store.open_reader(pointer.blob) as reader:
        found = safetensors.torch.load(reader.read())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_is_aligned_in_its_file() -> None:
    data, _ = encoding.encode(some_of_everything())
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    for entry in json.loads(data[8 : 8 + size]).values():
        assert entry["data_offsets"][0] % encoding._DTYPES[entry["dtype"]].itemsize == 0


def test_another_device(desk: Desk) -> None:
    pointer = desk.save(desk.running())
    assert desk.store.load(pointer, device="meta")["decay"].device.type == "meta"


@every_storage
@pytest.mark.parametrize("name", NASTY, ids=lambda n: ascii(n[:12]))
def test_any_text_is_a_name(desk: Desk, name: str) -> None:
    trial = desk.running()
    pointer = desk.save(trial, {name: torch.ones(2), name + "'": torch.zeros(1)}, name=name)
    desk.save(trial, name=name + "2")
    [found] = desk.store.pointers(desk.frozen(0), name=name)
    assert found == pointer
    assert list(desk.store.load(found)) == [name, name + "'"]
    assert len(desk.store.pointers(desk.frozen(0))) == 2


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.text(max_size=60),
    keys=st.lists(st.text(max_size=20), unique=True, max_size=4),
    step=st.integers(-(2**63), 2**63 - 1),
)
@example(name="__metadata__", keys=["", "\0"], step=0)
def test_any_names_and_steps_in_memory(name: str, keys: list[str], step: int) -> None:
    desk = Desk(InMemoryStorage())
    tensors = {
        key: torch.full((2,), float(i)) for i, key in enumerate(keys) if key != "__metadata__"
    }
    pointer = desk.save(desk.running(), tensors, name=name, step=step)
    read = Pointer.from_json(json.loads(json.dumps(pointer.to_json())), pointer.key, 0)
    assert read == pointer
    assert list(desk.store.load(read)) == list(tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": 1.5}, r"'a' must be a torch.Tensor .* not float"),
        ({"__metadata__": torch.ones(1)}, "reserves that name"),
        ({"a": torch.eye(3).to_sparse()}, "sparse or quantized"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "dtype torch.complex128"),
        ({"a": torch.ones(2, device="meta")}, "meta device"),
        ({"\ud83d": torch.ones(1)}, "no UTF-8 encoding"),
        ({3: torch.ones(1)}, "must be a str, not int"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_work(
    desk: Desk, tensors: Any, message: str
) -> None:
    trial = desk.running()
    with pytest.raises(HyperparameterError, match=message):
        desk.save(trial, tensors)
    with pytest.raises(HyperparameterError, match=message):
        desk.store.save_all_soon(0, trial._trial_id, 0, {("a", "value"): tensors})
    assert desk.frozen(0).system_attrs == {}
    assert desk.stored() == []


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"name": "\udc00x"}, "no UTF-8 encoding"),
        ({"name": 3}, "must be a str"),
        ({"role": "Step State"}, "must look like 'step_state'"),
        ({"role": ""}, "must look like"),
        ({"role": "a" * 33}, "must look like"),
        ({"step": 1.0}, "an integer of at most 64 bits, not 1.0"),
        ({"step": True}, "not True"),
        ({"step": 2**63}, "at most 64 bits"),
    ],
)
def test_claims_that_make_no_sense_are_refused(desk: Desk, claims: Any, message: str) -> None:
    trial = desk.running()
    with pytest.raises(HyperparameterError, match=message):
        desk.save(trial, **claims)
    assert desk.stored() == []


def test_very_many_tensors_still_fit_into_an_attribute(desk: Desk) -> None:
    tensors = {f"layer.{i}.weight": torch.full((2,), float(i)) for i in range(3000)}
    pointer = desk.save(desk.running(), tensors)
    assert pointer.tensors is None
    found = desk.store.load(desk.store.pointers(desk.frozen(0))[0])
    assert list(found) == list(tensors)
    assert found["layer.2999.weight"].tolist() == [2999.0, 2999.0]
    assert all(
        len(json.dumps(value)) <= stores.MAX_ATTRIBUTE_BYTES
        for value in desk.frozen(0).system_attrs.values()
    )


def test_attributes_have_a_limit(desk: Desk) -> None:
    trial = desk.running()
    study = desk.study._study_id
    stores.set_trial_attribute(desk.storage, trial._trial_id, "k", "x" * 47_990)
    for write in (
        lambda: stores.set_trial_attribute(desk.storage, trial._trial_id, "k", "\0" * 8_001),
        lambda: stores.set_study_attribute(desk.storage, study, "k", ["x"] * 12_000),
        lambda: desk.save(trial, name="\N{SNOWMAN}" * 9_000),
    ):
        with pytest.raises(StorageError, match=r"takes \d+ bytes as JSON and the limit is 48000"):
            write()
    with pytest.raises(StorageError, match="has 513 characters"):
        stores.set_study_attribute(desk.storage, study, "k" * 513, 1)
    with pytest.raises(StorageError, match="cannot be written as JSON"):
        stores.set_trial_attribute(desk.storage, trial._trial_id, "k", {1, 2})
    assert desk.frozen(0).system_attrs == {"k": "x" * 47_990}
    assert desk.stored() == []


# --- several at once, and while the caller computes ------------------------------------------------


@with_sqlite_memory
def test_several_at_once(desk: Desk) -> None:
    trial = desk.running()
    wanted = {
        ("decay", "value"): {"decay": torch.arange(3.0)},
        ("decay", "step_state"): {"m": torch.ones(2), "v": torch.zeros(2)},
        ("weights", "value"): {},
    }
    pointers = desk.store.save_all(desk.study._study_id, trial._trial_id, 4, wanted)
    assert [(p.name, p.role) for p in pointers] == list(wanted)
    assert {p.step for p in pointers} == {4}
    assert sorted(desk.store.pointers(desk.frozen(0)), key=str) == sorted(pointers, key=str)
    assert list(desk.store.load(pointers[1])) == ["m", "v"]
    desk.store.save_all(desk.study._study_id, trial._trial_id, 5, wanted)
    assert len(desk.stored()) == 3


@with_sqlite_memory
def test_while_the_caller_computes(desk: Desk) -> None:
    trial = desk.running()
    tensor = torch.arange(4.0)
    future = desk.store.save_all_soon(
        desk.study._study_id, trial._trial_id, 0, {("x", "value"): {"x": tensor}}
    )
    tensor.zero_()
    [pointer] = future.result(timeout=60)
    assert desk.store.load(pointer)["x"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert desk.store.pointers(desk.frozen(0)) == [pointer]
    desk.study.tell(trial, 1.0)
    desk.finished(2.0)
    desk.store.retention = Retention(newest=1, best=0, every=0)
    [removed] = desk.store.apply_retention_soon(desk.study._study_id).result(timeout=60)
    assert removed == pointer
    with pytest.raises(TakenOverError, match="Trial 0 has finished"):
        desk.store.save_all_soon(
            desk.study._study_id, trial._trial_id, 0, {("x", "value"): {"x": tensor}}
        ).result(timeout=60)


def test_the_thread_leaves_no_session_behind(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = desk.running()
    seen: list[str] = []
    remove = desk.storage.remove_session

    def watched() -> None:
        seen.append(threading.current_thread().name)
        remove()

    monkeypatch.setattr(desk.storage, "remove_session", watched)
    desk.store.save_all_soon(desk.study._study_id, trial._trial_id, 0, {("x", "value"): {}}).result(
        60
    )
    assert seen == ["hypergrad-tensors_0"]


def test_a_store_can_be_pickled_while_it_has_a_thread(desk: Desk) -> None:
    trial = desk.running()
    claim = {("x", "value"): {"x": torch.ones(1)}}
    [pointer] = desk.store.save_all_soon(desk.study._study_id, trial._trial_id, 0, claim).result(60)
    again = pickle.loads(pickle.dumps(desk.store))
    assert again.load(pointer)["x"].tolist() == [1.0]
    [newer] = again.save_all_soon(desk.study._study_id, trial._trial_id, 1, claim).result(60)
    assert desk.store.load(newer)["x"].tolist() == [1.0]
    again._storage._backend.engine.dispose()


# --- blob first, pointer second --------------------------------------------------------------------


@with_sqlite_memory
def test_the_new_one_takes_the_place_of_the_old(desk: Desk) -> None:
    trial = desk.running()
    for step in range(4):
        desk.save(trial, {"w": torch.full((3,), float(step))}, role="checkpoint", step=step)
        desk.save(trial, {"w": torch.full((2,), -1.0)}, role="value", step=step)
    [pointer] = desk.store.pointers(desk.frozen(0), role="checkpoint")
    assert pointer.step == 3
    assert desk.store.load(pointer)["w"].tolist() == [3.0] * 3
    assert len(desk.stored()) == 2


class Failing:
    """A three-method store that dies at the k-th of its calls, before or after it has worked."""

    def __init__(self, inner: stores.AbstractArtifactStore, method: str, after: bool) -> None:
        self.inner, self.method, self.after, self.armed = inner, method, after, False

    def open_reader(self, artifact_id: str) -> BinaryIO:
        return self.inner.open_reader(artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self._do("write", lambda: self.inner.write(artifact_id, content_body))

    def remove(self, artifact_id: str) -> None:
        self._do("remove", lambda: self.inner.remove(artifact_id))

    def _do(self, method: str, action: Callable[[], None]) -> None:
        if self.armed and method == self.method and not self.after:
            raise KeyboardInterrupt
        action()
        if self.armed and method == self.method:
            raise KeyboardInterrupt


@every_storage
@pytest.mark.parametrize("method", ["write", "remove", "pointer"])
@pytest.mark.parametrize("after", [False, True])
def test_death_at_any_point_leaves_a_whole_checkpoint(
    storage: BaseStorage, method: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stores.default_artifact_store(storage)
    failing = Failing(whole, method, after)
    desk = Desk(storage, artifact_store=failing)
    trial = desk.running()
    desk.save(trial, {"w": torch.zeros(4)}, role="checkpoint", step=0)
    failing.armed = True
    write = desk.storage.set_trial_system_attr

    def die(*args: Any) -> None:
        if after:
            write(*args)
        raise KeyboardInterrupt

    if method == "pointer":
        monkeypatch.setattr(desk.storage, "set_trial_system_attr", die)
    with pytest.raises(KeyboardInterrupt):
        desk.save(trial, {"w": torch.ones(4)}, role="checkpoint", step=1)
    monkeypatch.undo()
    survivor = TensorStore(whole, desk.storage, exclusive=True)
    survivor.sweep(min_age=-60)
    [pointer] = survivor.pointers(desk.frozen(0))
    replaced = method == "remove" or (method == "pointer" and after)
    assert pointer.step == (1 if replaced else 0)
    assert survivor.load(pointer)["w"].tolist() == [float(pointer.step)] * 4
    assert [a.artifact_id for a in whole.stored()] == [pointer.blob]


@every_storage
def test_a_finished_trial_takes_nothing_more(desk: Desk) -> None:
    trial = desk.running()
    pointer = desk.save(trial)
    desk.study.tell(trial, 1.0)
    with pytest.raises(TakenOverError, match="Trial 0 has finished, so 'decay'"):
        desk.save(trial)
    assert [a.artifact_id for a in desk.stored()] == [pointer.blob]
    assert desk.store.load(pointer)["decay"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_no_transaction_of_ours_is_open_across_a_call_of_optunas(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = desk.storage._backend.engine  # type: ignore[attr-defined]
    held: list[int] = []
    sa.event.listen(engine, "checkout", lambda *_: held.append(1))
    sa.event.listen(engine, "checkin", lambda *_: held.pop())
    seen: list[int] = []
    backend = desk.storage._backend  # type: ignore[attr-defined]
    for method in (
        "set_trial_system_attr",
        "set_study_user_attr",
        "get_study_user_attrs",
        "get_trial_system_attrs",
        "get_all_studies",
    ):

        def watched(*args: Any, _call: Any = getattr(backend, method), **kwargs: Any) -> Any:
            seen.append(len(held))
            return _call(*args, **kwargs)

        monkeypatch.setattr(backend, method, watched)
    for value in (2.0, 1.0, 3.0):
        desk.finished(value)
    desk.retain(newest=1, best=0, every=0)
    desk.store.sweep()
    assert len(seen) > 1
    assert set(seen) == {0}


# --- one save is one transaction --------------------------------------------------------------------


class Statements:
    """Watches a database; raises at the ``fail_at``-th statement that is executed."""

    def __init__(self, storage: BaseStorage) -> None:
        engine = storage._backend.engine  # type: ignore[attr-defined]
        self.start()
        sa.event.listen(engine, "before_cursor_execute", self._statement)
        sa.event.listen(engine, "commit", self._commit)

    def _statement(self, connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        self.seen += 1
        self.dirty |= statement.startswith(("INSERT", "UPDATE", "DELETE"))
        if self.seen == self.fail_at:
            raise KeyboardInterrupt

    def _commit(self, connection: sa.engine.Connection) -> None:
        self.commits += self.dirty
        self.dirty = False

    def start(self, fail_at: int | None = None) -> None:
        self.seen = self.commits = 0
        self.dirty, self.fail_at = False, fail_at


def two_roles(number: float, size: int = 300_000) -> dict[tuple[str, str], Params]:
    state = {"m": torch.full((size,), number), "v": torch.full((size,), -number)}
    return {
        ("decay", "value"): {"decay": torch.full((size,), number)},
        ("t", "step_state"): state,
    }


def test_a_save_that_fails_anywhere_leaves_all_of_the_last_one(desk: Desk) -> None:
    trial, study_id = desk.running(), desk.study._study_id
    desk.finished(0.0)
    desk.finished(1.0)
    desk.store.retention = Retention(newest=1, best=0, every=0)
    old = desk.store.save_all(study_id, trial._trial_id, 1, two_roles(1.0))
    before = sorted(a.artifact_id for a in desk.stored())
    database = Statements(desk.storage)
    for fail_at in itertools.count(1):
        database.start(fail_at)
        with contextlib.suppress(KeyboardInterrupt):
            desk.store.save_all(study_id, trial._trial_id, 2, two_roles(2.0), retain=True)
        database.start()
        found = desk.store.pointers(desk.frozen(0))
        if {p.step for p in found} == {2}:
            break
        assert found == sorted(old, key=lambda p: p.role)
        assert sorted(a.artifact_id for a in desk.stored()) == before
        assert desk.store.load(old[0])["decay"].unique().tolist() == [1.0]
        assert desk.store.load(old[1])["v"].unique().tolist() == [-1.0]
    assert fail_at > 15  # statements of a save
    assert desk.store.load(found[0])["v"].unique().tolist() == [-2.0]
    assert desk.store.load(found[1])["decay"].unique().tolist() == [2.0]
    assert desk.survivors() == [0, 2]  # what retention does not keep is gone too
    assert len(desk.stored()) == 3


def test_a_save_is_one_transaction(desk: Desk) -> None:
    database = Statements(desk.storage)
    for value in (3.0, 2.0, 1.0, 4.0, 5.0):
        trial = desk.running()
        commits = []
        for step in range(2):  # the second one replaces the first
            database.start()
            desk.store.save_all(
                desk.study._study_id, trial._trial_id, step, two_roles(value, 10), retain=True
            )
            commits.append(database.commits)
        desk.study.tell(trial, value)
        if trial.number:  # the first one makes the tables and names the study
            assert commits == [1, 1]


@every_storage
@pytest.mark.parametrize("soon", [False, True])
def test_saving_can_retain(desk: Desk, soon: bool) -> None:
    other = Desk(desk.storage)
    for each in (desk, other):
        each.store.retention = Retention(newest=1, best=1, every=4)
    for value in (3.0, 1.0, 2.0, 4.0, 5.0, 6.0):
        trial, second = desk.running(), other.running()
        claims = (desk.study._study_id, trial._trial_id, 0, two_roles(value, 3))
        if soon:
            desk.store.save_all_soon(*claims, retain=True, trajectory=lambda t: 0).result(60)
        else:
            desk.store.save_all(*claims, retain=True, trajectory=lambda t: 0)
        claims = (other.study._study_id, second._trial_id, 0, two_roles(value, 3))
        other.store.save_all(*claims)
        other.store.apply_retention(other.study._study_id, lambda t: 0)
        assert desk.survivors() == other.survivors()
        assert desk.survivors("step_state") == other.survivors("step_state")
        desk.study.tell(trial, value), other.study.tell(second, value)
    assert desk.survivors() == [0, 1, 4, 5]
    assert desk.survivors("step_state") == [4, 5]


def test_a_storage_of_another_class_is_written_by_its_methods(tmp_path: Path) -> None:
    class Own(RDBStorage):
        written: ClassVar[list[str]] = []

        def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
            self.written.append(key)
            super().set_trial_system_attr(trial_id, key, value)

    storage = Own(f"sqlite:///{tmp_path}/own.db")
    desk = Desk(storage)
    trial = desk.running()
    for step in range(2):
        pointers = desk.store.save_all(
            desk.study._study_id, trial._trial_id, step, two_roles(step, 5), retain=True
        )
    assert [k for k in storage.written if "tensor" in k] == 2 * [p.key for p in pointers]
    assert len(desk.stored()) == 2
    assert desk.store.load(pointers[1])["m"].tolist() == [1.0] * 5
    storage.engine.dispose()


def test_the_tables_of_optuna_are_where_we_write(desk: Desk) -> None:
    pointer = desk.save(desk.running())
    rdb = _optuna_tables.plain_rdb(desk.storage)
    assert rdb is not None
    fresh = RDBStorage(str(rdb.engine.url), skip_compatibility_check=True)
    [trial] = fresh.get_all_trials(desk.study._study_id)
    assert trial.system_attrs == {pointer.key: pointer.to_json()}
    fresh.set_trial_system_attr(trial._trial_id, pointer.key, "by Optuna")
    again = desk.save(trial)  # type: ignore[arg-type]
    assert fresh.get_trial(trial._trial_id).system_attrs == {again.key: again.to_json()}
    fresh.engine.dispose()


def test_what_only_finished_meanwhile_is_not_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = desk.running()
    old = desk.save(trial)
    read = _writing.read_running_trial

    def finish_after(*args: Any) -> Any:
        found = read(*args)
        desk.study.tell(trial, 1.0)
        return found

    monkeypatch.setattr(_writing, "read_running_trial", finish_after)
    with pytest.raises(TakenOverError, match="Trial 0 has finished, so 'decay'"):
        desk.save(trial)
    assert [a.artifact_id for a in desk.stored()] == [old.blob]
    assert desk.store.load(old)


def test_one_wrong_byte_in_any_chunk_is_found(desk: Desk) -> None:
    rng = random.Random(0)
    pointer = desk.save(desk.running(), {"x": torch.randn(450_000)})  # 1.8 MB
    engine = desk.storage._backend.engine  # type: ignore[attr-defined]
    chunks = sa.table("hypergrad_chunks", sa.column("chunk"), sa.column("data", sa.LargeBinary))

    def put(chunk: int, data: bytes) -> None:
        with engine.begin() as connection:
            connection.execute(chunks.update().where(chunks.c.chunk == chunk).values(data=data))

    with engine.connect() as connection:
        rows = connection.execute(sa.select(chunks.c.chunk, chunks.c.data)).all()
    assert len(rows) == 4
    for chunk, data in rows:
        for place in (0, len(data) - 1, rng.randrange(len(data))):
            wrong = bytearray(data)
            wrong[place] ^= 1 << rng.randrange(8)
            put(chunk, bytes(wrong))
            with pytest.raises(CorruptTensorError, match="SHA-256"):
                desk.store.load(pointer)
        put(chunk, data)
    desk.store.load(pointer)


def test_a_trial_of_the_sampler_is_one_save(
    storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[list[tuple[str, str]]] = []
    save_all = TensorStore.save_all

    def watched(self: TensorStore, *args: Any, **kwargs: Any) -> list[Pointer]:
        saved.append(sorted(args[3]))
        return save_all(self, *args, **kwargs)

    monkeypatch.setattr(TensorStore, "save_all", watched)

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        x = trial.suggest_tensor("x", (3,), -1.0, 1.0, init=0.5)
        return (x**2).sum()

    study = optuna.create_study(storage=storage, sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=4)
    assert saved == [[("trajectory", "step_state"), ("x", "value")]] * 4
    assert ohg.load_tensors(study)["x"].shape == (3,)


# --- killed --------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
import optuna, torch
from optuna_hypergrad.stores import TensorStore
optuna.logging.set_verbosity(optuna.logging.ERROR)
path, kills = sys.argv[1], int(sys.argv[2])
rng = random.Random(0)

def open_study():
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    return optuna.create_study(study_name="s", storage=storage, load_if_exists=True), storage

open_study()[1].engine.dispose()
for _ in range(kills):
    started, starting = os.pipe()
    child = os.fork()
    if child == 0:
        study, _ = open_study()
        store = TensorStore.of_study(study)
        trial = study.ask()
        os.write(starting, b".")
        for step in range(10**9):
            tensors = {"w": torch.full((400_000,), float(step)), "m": torch.ones(3)}
            store.save(study._study_id, trial._trial_id, "w", "checkpoint", step, tensors)
    os.read(started, 1)
    time.sleep(rng.uniform(0.0, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(started), os.close(starting)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 and fork are POSIX")
def test_kill_9_leaves_no_pointer_to_a_missing_blob(tmp_path: Path) -> None:
    kills = 12
    subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "study.db"), str(kills)],
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    storage = RDBStorage(f"sqlite:///{tmp_path}/study.db")
    study = optuna.load_study(study_name="s", storage=storage)
    store = TensorStore.of_study(study)
    trials = study.get_trials(deepcopy=False)
    assert len(trials) == kills
    pointers = [p for t in trials for p in store.pointers(t)]
    for pointer in pointers:
        assert store.load(pointer)["w"].unique().tolist() == [float(pointer.step)]
    assert sum(p.step for p in pointers) > 0
    store.sweep(min_age=-60)
    assert isinstance(store.artifact_store, stores.AbstractArtifactStore)
    assert {a.artifact_id for a in store.artifact_store.stored()} == {p.blob for p in pointers}
    storage.engine.dispose()


@pytest.mark.parametrize("storage", ["in_memory", "journal", "sqlite_file"], indirect=True)
def test_eight_threads_write(desk: Desk) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work(k: int) -> None:
        try:
            barrier.wait()
            trial = desk.running()
            for step in range(4):
                tensors = {"w": torch.full((300_000,), float(100 * k + step))}
                desk.save(trial, tensors, name=f"w{k}", role="checkpoint", step=step)
            desk.study.tell(trial, float(k))
            desk.store.apply_retention(desk.study._study_id)
        except BaseException as error:
            errors.append(error)
        finally:
            desk.storage.remove_session()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(_identity.uuids_in(desk.study.user_attrs)) == 1
    pointers = [p for n in range(8) for p in desk.store.pointers(desk.frozen(n))]
    assert sorted(p.name for p in pointers) == [f"w{k}" for k in range(8)]
    alive = [p for p in pointers if p.blob in {a.artifact_id for a in desk.stored()}]
    assert len(alive) >= 2  # retention keeps the newest two
    for pointer in alive:
        expected = 100.0 * int(pointer.name[1:]) + 3
        assert desk.store.load(pointer)["w"].unique().tolist() == [expected]


# --- damage ----------------------------------------------------------------------------------------


def raw_blobs(desk: Desk) -> tuple[Callable[[str], bytes], Callable[[str, bytes], None]]:
    store = desk.store.artifact_store

    def read(blob: str) -> bytes:
        with store.open_reader(blob) as reader:
            return reader.read()

    return read, lambda blob, data: store.write(blob, io.BytesIO(data))


@every_storage
def test_every_damage_to_a_blob_is_found(desk: Desk) -> None:
    rng = random.Random(0)
    pointer = desk.save(
        desk.running(), {"a": torch.randn(30), "b": torch.zeros(3, dtype=torch.bool)}
    )
    read, write = raw_blobs(desk)
    good = read(pointer.blob)
    bits = [0, 7, 64, 8 * len(good) - 1] + [rng.randrange(8 * len(good)) for _ in range(40)]
    damaged = [
        bytes(byte ^ (1 << bit % 8) if i == bit // 8 else byte for i, byte in enumerate(good))
        for bit in bits
    ]
    damaged += [good[:n] for n in (0, 1, 7, 8, 50, len(good) - 1)]
    damaged += [good + b"\0", good[:100] + good[101:] + b"\0", good[::-1], b"\0" * len(good)]
    for data in damaged:
        write(pointer.blob, data)
        with pytest.raises(CorruptTensorError) as caught:
            desk.store.load(pointer)
        assert pointer.blob in str(caught.value)
        assert "'decay' (role 'value', step 0) of trial 0" in str(caught.value)
    write(pointer.blob, good)
    desk.store.load(pointer)


@every_storage
@pytest.mark.parametrize(
    "claim",
    [
        {"step": 4},
        {"trial": 1},
        {"name": "Decay"},
        {"role": "gradient"},
        {"study": "0" * 32},
        {"tensors": (encoding.TensorSpec("x", "F32", (4, 3)),)},
        {"tensors": (encoding.TensorSpec("x", "I32", (3, 4)),)},
        {"tensors": (encoding.TensorSpec("y", "F32", (3, 4)),)},
        {"tensors": None},
        {"sha256": "0" * 64},
    ],
    ids=lambda c: "-".join(c),
)
def test_a_pointer_cannot_claim_anything_else(desk: Desk, claim: dict[str, Any]) -> None:
    pointer = desk.save(desk.running(), {"x": torch.randn(3, 4)}, step=3)
    with pytest.raises(CorruptTensorError, match="The SHA-256 of the tensors"):
        desk.store.load(dataclasses.replace(pointer, **claim))


def test_a_blob_in_another_ones_place_is_found(desk: Desk) -> None:
    first, second = (desk.save(desk.running(), step=n) for n in range(2))
    read, write = raw_blobs(desk)
    write(second.blob, read(first.blob))
    assert read(first.blob) == read(second.blob)
    with pytest.raises(CorruptTensorError, match="SHA-256"):
        desk.store.load(dataclasses.replace(first, blob=second.blob))


def test_swapped_chunks_are_found(desk: Desk) -> None:
    pointer = desk.save(desk.running(), {"x": torch.randn(600_000)})
    with desk.storage._backend.engine.begin() as connection:  # type: ignore[attr-defined]
        for a, b in ((0, 9), (1, 0), (9, 1)):
            connection.execute(
                sa.text("UPDATE hypergrad_chunks SET chunk = :b WHERE chunk = :a"), {"a": a, "b": b}
            )
    with pytest.raises(CorruptTensorError, match="SHA-256"):
        desk.store.load(pointer)


def test_a_self_consistent_forgery_is_still_no_other_tensor(desk: Desk) -> None:
    pointer = desk.save(desk.running(), {"x": torch.randn(3, 4)})
    forged = dataclasses.replace(pointer, tensors=(encoding.TensorSpec("x", "F32", (4, 3)),))
    read, write = raw_blobs(desk)
    forged = dataclasses.replace(forged, sha256=forged.digest(read(pointer.blob)))
    with pytest.raises(CorruptTensorError, match="holds other tensors than its pointer says"):
        desk.store.load(forged)
    for data in (
        b"\xff" * 8 + b"{}",
        (10**6).to_bytes(8, "little") + b"{}" * 50,
        (2).to_bytes(8, "little") + b"{}" + b"extra",
        (4000).to_bytes(8, "little") + b"[" * 4000,
        (70).to_bytes(8, "little")
        + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'.ljust(70),
        (70).to_bytes(8, "little")
        + b'{"x":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'.ljust(70)
        + b"1234",
    ):
        write(pointer.blob, data)
        forged = dataclasses.replace(pointer, size=len(data), tensors=None)
        forged = dataclasses.replace(forged, sha256=forged.digest(data))
        with pytest.raises(CorruptTensorError, match="Cannot read the tensors"):
            desk.store.load(forged)


@every_storage
def test_memory_follows_what_is_there_not_what_is_claimed(desk: Desk) -> None:
    pointer = desk.save(desk.running())
    specs = (encoding.TensorSpec("x", "F32", (10**6, 10**6)),)
    liar = dataclasses.replace(pointer, size=4 * 10**12 + 80, tensors=specs)
    assert Pointer.from_json(liar.to_json(), liar.key, 0) == liar
    desk.store.load(pointer)
    tracemalloc.start()
    with pytest.raises(CorruptTensorError, match="and should have 4000000000080"):
        desk.store.load(liar)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


CHANGES: list[tuple[str, Any]] = [
    ("format", 0),
    ("format", "1"),
    ("study", "x"),
    ("trial", 1.5),
    ("trial", None),
    ("role", "../x"),
    ("name", ["decay"]),
    ("step", "3"),
    ("size", -1),
    ("size", 10**30),
    ("size", 20),
    ("blob", "hg-../../etc/passwd"),
    ("blob", None),
    ("sha256", "abc"),
    ("tensors", 5),
    ("tensors", [["x"]]),
    ("tensors", [["x", "F32", [-1]]]),
    ("tensors", [["x", "F32", [2.5]]]),
    ("tensors", [["x", ["F32"], [2]]]),
    ("tensors", [["x", "F32", [10**40]]]),
    ("tensors", {"x": 1}),
]


@pytest.mark.parametrize(("field", "value"), CHANGES, ids=lambda v: str(v)[:20])
def test_a_damaged_pointer_is_named(desk: Desk, field: str, value: Any) -> None:
    trial = desk.running()
    pointer = desk.save(trial)
    desk.storage.set_trial_system_attr(
        trial._trial_id, pointer.key, {**pointer.to_json(), field: value}
    )
    with pytest.raises(CorruptTensorError) as caught:
        desk.store.pointers(desk.frozen(0))
    assert f"The attribute '{pointer.key}' of trial 0" in str(caught.value)
    desk.store.sweep(min_age=-60)
    assert len(desk.stored()) == 1  # whose it was cannot be known any more


@pytest.mark.parametrize("value", [None, [], "x", 3, {}, {"format": 1}])
def test_an_attribute_that_is_no_pointer_is_named(desk: Desk, value: Any) -> None:
    trial = desk.running()
    pointer = desk.save(trial)
    desk.storage.set_trial_system_attr(trial._trial_id, pointer.key, value)
    for ask in (
        lambda: desk.store.pointers(desk.frozen(0)),
        lambda: desk.store.pointers(desk.frozen(0), "decay", "value"),
    ):
        with pytest.raises(CorruptTensorError, match="is not a pointer to tensors"):
            ask()
    desk.save(trial)  # and it can be written anew
    assert len(desk.store.pointers(desk.frozen(0))) == 1


def test_a_pointer_under_another_key_is_named(desk: Desk) -> None:
    trial = desk.running()
    pointer = desk.save(trial)
    desk.storage.set_trial_system_attr(trial._trial_id, pointer.key + "0", pointer.to_json())
    with pytest.raises(CorruptTensorError, match="belongs under another key"):
        desk.store.pointers(desk.frozen(0))


def test_a_newer_format_says_so(desk: Desk) -> None:
    trial = desk.running()
    pointer = desk.save(trial)
    newer = {**pointer.to_json(), "format": 2, "tensors": "in another way"}
    desk.storage.set_trial_system_attr(trial._trial_id, pointer.key, newer)
    with pytest.raises(CorruptTensorError, match=r"has format 2 .* reads up to 1"):
        desk.store.pointers(desk.frozen(0))


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    st.sampled_from([f.name for f in dataclasses.fields(Pointer)]),
)
def test_hostile_json_is_refused_in_one_way(value: Any, field: str) -> None:
    good = Pointer("0" * 32, 0, "x", "value", 0, f"hg-{'0' * 32}-{'1' * 32}", 100, (), "0" * 64)
    for candidate in (value, {**good.to_json(), field: value}):
        try:
            found = Pointer.from_json(candidate, good.key, 0)
        except CorruptTensorError:
            continue
        assert found.key == good.key


# --- what is not there any more --------------------------------------------------------------------


@every_storage
def test_a_missing_blob_names_the_rule(desk: Desk) -> None:
    pointer = desk.save(desk.running(), role="value")
    state = desk.save(desk.running(), role="step_state")
    desk.store.retention = Retention(newest=3, best=2, every=7)
    desk.store.discard(pointer, state)
    desk.store.discard(pointer)
    with pytest.raises(MissingTensorError) as caught:
        desk.store.load(pointer)
    message = str(caught.value)
    assert "the tensors 'decay' (role 'value', step 0) of trial 0" in message
    assert (
        "the newest 3 trials, the best 2 and every trial whose number is divisible by 7" in message
    )
    with pytest.raises(MissingTensorError, match="newest 3 trials of each open trajectory"):
        desk.store.load(state)
    assert isinstance(caught.value, KeyError)


@with_sqlite_memory
def test_retention_keeps_the_newest_the_best_and_every_kth(desk: Desk) -> None:
    for value in (5.0, 3.0, 9.0, 1.0, 4.0, 8.0, 7.0, 6.0, 2.5, 2.0):
        desk.finished(value)
    removed = desk.retain(newest=2, best=2, every=5)
    assert desk.survivors() == [0, 3, 5, 8, 9]
    assert sorted(p.trial for p in removed) == [1, 2, 4, 6, 7]
    assert desk.store.apply_retention(desk.study._study_id) == ()
    assert (
        TensorStore.of_study(desk.study, retention=Retention(2, 2, 5)).apply_retention(
            desk.study._study_id
        )
        == ()
    )
    assert len(desk.stored()) == 5
    desk.retain(newest=1, best=1, every=0)
    assert desk.survivors() == [3, 9]


def test_retention_keeps_a_bounded_number_that_is_spread_over_the_study() -> None:
    def kept(count: int, **settings: Any) -> list[int]:
        trials = [create_trial(value=0.0) for _ in range(count)]
        for number, trial in enumerate(trials):
            trial.number = number
        policy = Retention(newest=1, best=0, **settings)
        return sorted(policy.keeps("value", trials, [StudyDirection.MINIMIZE]))

    assert kept(31) == [0, 10, 20, 30]
    assert kept(201, at_most=20) == [*range(0, 200, 20), 200]
    before: list[int] = []
    for count in range(1, 3000, 37):
        now = kept(count)
        assert 10 <= len(now) <= 21 or count < 200
        assert set(now) - {count - 1} <= set(before) | set(range(count - 37, count))
        before = now
    assert len(kept(3000, at_most=None)) == 301
    assert len(kept(3000, every=1)) == 3000
    assert kept(3000, every=0) == [2999]


def test_retention_maximizes_where_the_study_does(storage: BaseStorage) -> None:
    desk = Desk(storage, direction="maximize")
    for value in (1.0, 9.0, math.inf, 2.0, -math.inf, 3.0):
        desk.finished(value)
    desk.retain(newest=1, best=2, every=0)
    assert desk.survivors() == [1, 2, 5]


def test_retention_keeps_the_best_that_is_allowed_too(desk: Desk) -> None:
    for value, excess in ((1.0, 0.5), (4.0, -1.0), (3.0, 0.0), (2.0, 1e-9), (9.0, -1.0)):
        desk.finished(value, limit=excess)
    assert desk.study.best_trial.number == 2
    desk.retain(newest=1, best=1, every=0)
    assert desk.survivors() == [0, 2, 4]


def test_retention_with_two_objectives() -> None:
    keeps = Retention(newest=1, best=1, every=0).keeps
    trials = [
        create_trial(values=values) for values in ([1.0, 1.0], [0.0, 2.0], [3.0, 9.0], [4.0, 0.0])
    ]
    for number, trial in enumerate(trials):
        trial.number = number
    both = [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]
    assert keeps("value", trials, both) == {1, 2, 3}


def test_unfinished_and_lately_failed_trials_keep_theirs(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = desk.running()
    desk.save(running)
    for value in (1.0, None, 2.0, 3.0):
        desk.finished(value)
    desk.retain(newest=1, best=0, every=0)
    assert desk.survivors() == [0, 2, 4]

    monkeypatch.setattr(stores._retention, "_GRACE", datetime.timedelta(0))  # an hour later
    desk.retain(newest=1, best=0, every=0)
    assert desk.survivors() == [0, 4]


def test_states_are_kept_for_each_open_trajectory(desk: Desk) -> None:
    for value in (1.0, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0):
        desk.finished(value, role="step_state")
    group = {0: "a", 1: "a", 2: "b", 3: "a", 4: None, 5: "c", 6: "b", 7: None}
    desk.store.retention = Retention(newest=1)
    desk.store.apply_retention(desk.study._study_id, lambda trial: group[trial.number])
    assert desk.survivors("step_state") == [3, 5, 6]
    desk.store.apply_retention(desk.study._study_id)
    assert desk.survivors("step_state") == [6]


@pytest.mark.parametrize(
    "bad", [{"newest": 0}, {"best": -1}, {"every": 1.5}, {"newest": True}, {"at_most": 0}]
)
def test_a_policy_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Retention: {next(iter(bad))} must be an integer"):
        Retention(**bad)


def test_the_database_does_not_grow_with_the_checkpoints(desk: Desk, tmp_path: Path) -> None:
    trial = desk.running()
    tensors = {"w": torch.randn(100_000)}
    sizes = []
    for step in range(12):
        desk.save(trial, tensors, role="checkpoint", step=step)
        sizes.append((tmp_path / "study.db").stat().st_size)
    assert sizes[-1] == sizes[2]
    for _ in range(6):
        desk.finished(1.0, role="step_state")
        desk.store.apply_retention(desk.study._study_id)
    assert len(desk.stored()) == 1 + 2


def test_a_damaged_pointer_does_not_stop_retention(desk: Desk) -> None:
    trial = desk.running()
    pointer = desk.save(trial)
    desk.storage.set_trial_system_attr(trial._trial_id, pointer.key, {"blob": ["x"]})
    desk.study.tell(trial, 0.0)
    for value in (1.0, 2.0, 3.0):
        desk.finished(value)
    desk.retain(newest=1, best=0, every=0)
    assert [a.artifact_id for a in desk.stored()].count(pointer.blob) == 1
    assert len(desk.stored()) == 2


@with_sqlite_memory
def test_a_sweep_removes_orphans_only(desk: Desk) -> None:
    pointer = desk.save(desk.running())
    store = desk.store.artifact_store
    own, stranger = pointer.study, "f" * 32
    for study in (own, stranger):
        store.write(f"hg-{study}-{'0' * 32}", io.BytesIO(b"12345"))
    store.write("somebody-elses", io.BytesIO(b"x"))
    assert desk.store.sweep().orphans == ()  # too young
    dry = desk.store.sweep(dry_run=True, min_age=-60)
    assert sorted(o.artifact_id[3:35] for o in dry.orphans) == sorted([own, stranger])
    assert (dry.removed, dry.num_bytes) == (False, 10)
    assert str(dry) == "Would remove 2 blobs (0.0 MB)."
    assert len(desk.stored()) == 4
    shared = TensorStore(store, desk.storage)  # may hold the blobs of other databases
    assert [o.artifact_id[3:35] for o in shared.sweep(min_age=-60).orphans] == [own]
    assert [o.artifact_id[3:35] for o in desk.store.sweep(min_age=-60).orphans] == [stranger]
    assert {a.artifact_id for a in desk.stored()} == {pointer.blob, "somebody-elses"}
    desk.store.load(pointer)


def test_a_sweep_of_unfinished_files(tmp_path: Path) -> None:
    desk = Desk(JournalStorage(JournalFileBackend(str(tmp_path / "study.log"))))
    pointer = desk.save(desk.running())
    left = tmp_path / "study.log.hypergrad" / f"hg-{pointer.study}-{'0' * 32}.{'1' * 32}.tmp"
    left.write_bytes(b"half")
    assert [o.artifact_id for o in desk.store.sweep(min_age=-60).orphans] == [left.name]
    assert not left.exists()


def test_a_store_that_cannot_list_cannot_be_swept(desk: Desk, tmp_path: Path) -> None:
    store = TensorStore(FileSystemArtifactStore(str(tmp_path)), desk.storage)
    with pytest.raises(StorageError, match="FileSystemArtifactStore cannot list its artifacts"):
        store.sweep()


# --- which store, which study ----------------------------------------------------------------------


def test_optunas_own_stores_will_do(storage: BaseStorage, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    desk = Desk(storage, artifact_store=FileSystemArtifactStore(str(tmp_path / "artifacts")))
    for value in (3.0, 2.0, 1.0, 4.0):
        desk.finished(value)
    desk.retain(newest=1, best=1, every=0)
    assert desk.survivors() == [2, 3]
    assert len(list((tmp_path / "artifacts").iterdir())) == 2
    trial = desk.running()
    for step in range(3):
        desk.save(trial, step=step)
    assert len(list((tmp_path / "artifacts").iterdir())) == 3


def test_a_directory_will_do(storage: BaseStorage, tmp_path: Path) -> None:
    desk = Desk(storage, artifact_store=tmp_path / "tensors")
    pointer = desk.save(desk.running())
    assert (tmp_path / "tensors" / pointer.blob).stat().st_size == pointer.size
    assert TensorStore.of_study(desk.study, str(tmp_path / "tensors")).load(pointer)


def test_something_else_will_not_do(desk: Desk) -> None:
    with pytest.raises(StorageError, match="dict lacks open_reader, write, remove"):
        TensorStore.of_study(desk.study, artifact_store={})  # type: ignore[arg-type]


def test_storages_without_a_place_say_what_to_give() -> None:
    proxy = object.__new__(optuna.storages.GrpcStorageProxy)
    with pytest.raises(StorageError, match=r"GrpcStorageProxy has no place .*tensor_store='"):
        stores.default_artifact_store(proxy)

    class Elsewhere(BaseJournalBackend):  # such as Redis
        def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
            return iter(())

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            pass

    with pytest.raises(StorageError, match=r"JournalStorage has no place .*tensor_store='"):
        stores.default_artifact_store(JournalStorage(Elsewhere()))


def test_a_study_without_a_wrapper_around_its_database(storage: BaseStorage) -> None:
    desk = Desk(storage)
    trial = desk.running()
    bare = TensorStore.of_study(_study_over(storage._backend, desk.study))  # type: ignore[attr-defined]
    pointer = bare.save(
        desk.study._study_id, trial._trial_id, "x", "value", 0, {"x": torch.ones(2)}
    )
    assert desk.store.load(pointer)["x"].tolist() == [1.0, 1.0]


def _study_over(storage: BaseStorage, study: optuna.Study) -> optuna.Study:
    other = optuna.load_study(study_name=study.study_name, storage=storage)
    other._storage = storage
    return other


def test_a_hyperband_bracket_is_study_enough(desk: Desk) -> None:
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9)
    desk.study.pruner = pruner
    trial = desk.running()
    trial.report(1.0, 1)
    trial.should_prune()
    bracket = pruner._create_bracket_study(desk.study, 0)
    pointer = desk.save(trial)
    assert TensorStore.of_study(bracket).load(pointer)["decay"].shape == (5,)


def test_a_reused_study_id_is_another_study(desk: Desk) -> None:
    old = desk.save(desk.running())
    name, study_id = desk.study.study_name, desk.study._study_id
    optuna.delete_study(study_name=name, storage=desk.storage)
    desk.study = optuna.create_study(study_name=name, storage=desk.storage)
    assert desk.study._study_id == study_id
    new = desk.save(desk.running())
    assert new.study != old.study
    assert [o.artifact_id for o in desk.store.sweep(min_age=-60).orphans] == [old.blob]
    desk.store.load(new)


def test_two_workers_that_start_at_once_agree(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    find = _identity._find

    def blind(*args: Any) -> tuple[str, dict[str, Any]]:
        seen.append(1)
        found, own = find(*args)
        return "" if len(seen) <= 2 else found, own

    first = desk.save(desk.running())
    monkeypatch.setattr(_identity, "_find", blind)
    monkeypatch.setattr(_writing, "own_uuid", lambda *_: "")
    second = desk.save(desk.running())
    third = TensorStore.of_study(desk.study).save(
        desk.study._study_id, desk.running()._trial_id, "x", "value", 0, {}
    )
    uuids = _identity.uuids_in(desk.study.user_attrs)
    assert len(uuids) == 2
    assert third.study == second.study == min(uuids)
    for pointer in (first, second, third):
        desk.store.load(pointer)
    assert desk.store.sweep(min_age=-60).orphans == ()
    desk.study.tell(0, 1.0), desk.study.tell(1, 1.0), desk.study.tell(2, 2.0)
    desk.retain(newest=1, best=0, every=0)
    assert len(desk.stored()) == 1


def test_a_copied_study_shares_and_keeps_its_tensors(desk: Desk) -> None:
    for value in (4.0, 3.0, 2.0, 1.0):
        desk.finished(value)
    optuna.copy_study(
        from_study_name=desk.study.study_name,
        from_storage=desk.storage,
        to_storage=desk.storage,
        to_study_name="copy",
    )
    copy = Desk.__new__(Desk)
    copy.study = optuna.load_study(study_name="copy", storage=desk.storage)
    copy.storage, copy.store = desk.storage, TensorStore.of_study(copy.study)
    assert copy.survivors() == [0, 1, 2, 3]
    desk.retain(newest=1, best=0, every=0)
    copy.retain(newest=1, best=0, every=0)
    assert copy.survivors() == desk.survivors() == [0, 1, 2, 3]  # each may be the other's
    new = copy.finished(0.5)
    assert new.study not in {p.study for p in desk.store.pointers(desk.frozen(0))}
    optuna.delete_study(study_name=desk.study.study_name, storage=desk.storage)
    assert copy.store.sweep(min_age=-60).orphans == ()
    copy.retain(newest=1, best=0, every=0)
    assert copy.survivors() == [4]
    assert len(copy.stored()) == 1


def test_a_retried_trial_goes_on_and_leaves_the_failed_one_alone(desk: Desk) -> None:
    trial = desk.running()
    old = desk.save(trial, {"w": torch.ones(2)}, role="checkpoint", step=3)
    desk.study.tell(trial, state=TrialState.FAIL)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
    retry(desk.study, desk.frozen(0))
    again = desk.running()
    assert again.number == 1
    [inherited] = desk.store.pointers(desk.frozen(1), role="checkpoint")
    assert inherited == old
    assert desk.store.load(inherited)["w"].tolist() == [1.0, 1.0]
    new = desk.save(again, {"w": torch.zeros(2)}, role="checkpoint", step=4)
    assert desk.store.pointers(desk.frozen(1)) == [new]
    assert new.trial == 1
    assert desk.store.load(old)["w"].tolist() == [1.0, 1.0]


def test_a_waiting_retry_keeps_the_checkpoint_of_the_failed_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer = desk.finished(None, role="checkpoint")
    for value in (1.0, 2.0):
        desk.finished(value, role="checkpoint")
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
    retry(desk.study, desk.frozen(0))
    monkeypatch.setattr(stores._retention, "_GRACE", datetime.timedelta(0))
    assert [p.trial for p in desk.retain(newest=1, best=0, every=0)] == [1]
    assert desk.store.load(pointer)
    assert desk.survivors("checkpoint") == [0, 2, 3]
    assert desk.running().number == 3
    desk.study.tell(3, 0.0)
    desk.store.apply_retention(desk.study._study_id)
    assert desk.survivors("checkpoint") == [0, 3]  # one blob, of which 3 is the newest trial


def test_trials_added_to_another_study_can_still_be_read(desk: Desk) -> None:
    desk.finished(1.0)
    other = Desk(desk.storage)
    other.study.add_trials(desk.study.trials)
    assert other.survivors() == [0]
    other.retain(newest=1, best=0, every=0)
    other.finished(2.0)
    other.finished(3.0)
    other.store.apply_retention(other.study._study_id)
    assert desk.survivors() == [0]


def test_a_copy_in_another_place_says_why_nothing_is_there(desk: Desk) -> None:
    desk.finished(1.0)
    elsewhere = Desk(InMemoryStorage())
    elsewhere.study.add_trials(desk.study.trials)
    [pointer] = elsewhere.store.pointers(elsewhere.frozen(0))
    with pytest.raises(MissingTensorError, match="copied from a storage whose tensors were not"):
        elsewhere.store.load(pointer)


def test_the_store_of_a_custom_protocol_is_asked_for_nothing_else(desk: Desk) -> None:
    class Dict:
        def __init__(self) -> None:
            self.data: dict[str, bytes] = {}

        def open_reader(self, artifact_id: str) -> BinaryIO:
            if artifact_id not in self.data:
                raise ArtifactNotFound
            return io.BytesIO(self.data[artifact_id])

        def write(self, artifact_id: str, content_body: BinaryIO) -> None:
            self.data[artifact_id] = content_body.read()

        def remove(self, artifact_id: str) -> None:
            if self.data.pop(artifact_id, None) is None:
                raise ArtifactNotFound

    desk.store = TensorStore.of_study(desk.study, Dict())
    for value in (2.0, 1.0, 3.0):
        desk.finished(value)
    assert [p.trial for p in desk.retain(newest=1, best=1, every=0)] == [0]
    assert desk.survivors() == [1, 2]
    assert desk.store.apply_retention(desk.study._study_id) == ()


def test_waiting_for_other_writers_has_an_end() -> None:
    assert _retrying.BUSY_TIMEOUT == 60.0
    with pytest.raises(ZeroDivisionError):
        _retrying.retry_while_busy(lambda: 1 // 0)


@pytest.mark.parametrize(("code", "name"), [(1213, ""), ("", "sqlstate"), ("", "pgcode")])
def test_the_loser_of_a_deadlock_tries_again(code: Any, name: str) -> None:
    cause = Exception(code, "deadlock")
    if name:
        setattr(cause, name, "40P01")
    errors: list[Exception] = [sa.exc.OperationalError("INSERT", {}, cause)]

    def action() -> int:
        if errors:
            raise errors.pop()
        return 3

    assert _retrying.retry_while_busy(action) == 3
    errors = [KeyError(1213)]
    with pytest.raises(KeyError):
        _retrying.retry_while_busy(action)


_LATE = """
import atexit, sys, threading
import optuna, torch
import optuna_hypergrad as ohg

study = optuna.create_study(storage=sys.argv[1], sampler=ohg.HypergradientSampler(seed=0))
store = ohg.TensorStore.of_study(study)

def save():
    trial = study.ask()
    large = {"": torch.ones(300_000)}
    pointer = store.save(study._study_id, trial._trial_id, "x", "value", 0, large)
    [later] = store.save_all_soon(study._study_id, trial._trial_id, 1, {("y", "value"): large}).result()
    assert all(torch.equal(store.load(p)[""], large[""]) for p in (pointer, later))
    print("saved")

def when_main_has_ended():
    threading.main_thread().join()
    save()

atexit.register(save)
threading.Thread(target=when_main_has_ended).start()
"""


def test_tensors_are_saved_when_the_main_thread_has_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LATE, f"sqlite:///{tmp_path / 'study.db'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "saved\n" * 2, done.stderr
