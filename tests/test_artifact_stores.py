"""Every kind of artifact store behaves alike; what only the database has to show comes after."""

from __future__ import annotations

import io
import pickle
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import optuna
import pytest
import sqlalchemy as sa
from conftest import open_storage
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from servers import SERVERS
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateTable

from optuna_hypergrad import CorruptTensorError, StorageError, stores
from optuna_hypergrad.stores import AbstractArtifactStore, RDBArtifactStore, _schema, _sqlite, rdb
from optuna_hypergrad.stores import file_system as fs
from optuna_hypergrad.stores._database import transaction
from optuna_hypergrad.stores._schema import make_tables

CHUNK = rdb.CHUNK_BYTES
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 12345]
STORES = {
    "rdb": ["sqlite_file", "cached_sqlite", "sqlite_memory", "postgresql", "mariadb"],
    "file_system": ["journal"],
    "memory": ["in_memory"],
}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: Optuna takes half a second to make its tables."""
    path = tmp_path_factory.mktemp("empty") / "study.db"
    RDBStorage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, empty_database: Path
) -> Iterator[BaseStorage]:
    kind = request.param
    if kind == "in_memory":
        yield InMemoryStorage()
    elif kind == "journal":
        yield JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    elif kind in SERVERS:
        found = open_storage(kind, tmp_path)
        yield found
        found.engine.dispose()
    else:
        shutil.copy(empty_database, tmp_path / "s.db")
        found = RDBStorage("sqlite://" if kind == "sqlite_memory" else f"sqlite:///{tmp_path}/s.db")
        yield optuna.storages.get_storage(found) if kind == "cached_sqlite" else found
        found.engine.dispose()


@pytest.fixture
def store(storage: BaseStorage) -> AbstractArtifactStore:
    return stores.default_artifact_store(storage)


@pytest.fixture
def database(tmp_path: Path, empty_database: Path) -> Iterator[RDBStorage]:
    shutil.copy(empty_database, tmp_path / "study.db")
    found = RDBStorage(f"sqlite:///{tmp_path}/study.db")
    yield found
    found.engine.dispose()


every_store = pytest.mark.parametrize(
    "storage", [kind for kinds in STORES.values() for kind in kinds], indirect=True
)


def content(store: AbstractArtifactStore, artifact_id: str) -> bytes:
    with store.open_reader(artifact_id) as reader:
        return reader.read()


def blob(size: int) -> bytes:
    return bytes(i * 31 % 251 for i in range(min(size, 5000))) * (size // 5000 + 1)


def test_every_registered_store_is_tested_and_says_what_it_follows() -> None:
    assert set(stores.REGISTRY) == set(STORES)
    for kind in stores.REGISTRY.values():
        assert "Optuna" in (kind.__doc__ or "") or "optuna/" in (kind.__doc__ or "")


@pytest.mark.parametrize(
    ("name", "storage"),
    [(n, k) for n, kinds in STORES.items() for k in kinds],
    indirect=["storage"],
)
def test_each_storage_gets_its_own_kind(name: str, storage: BaseStorage) -> None:
    store = stores.default_artifact_store(storage)
    assert store.name == name
    store.write("a", io.BytesIO(b"seen by the next one"))
    assert content(stores.default_artifact_store(storage), "a") == b"seen by the next one"


@every_store
@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read(store: AbstractArtifactStore, size: int) -> None:
    data = blob(size)[:size]
    store.write("a-1", io.BytesIO(data))
    with store.open_reader("a-1") as reader:
        assert reader.read() == data
    with store.open_reader("a-1") as reader:
        assert b"".join(iter(lambda: reader.read(700_001), b"")) == data
    [entry] = store.stored("a-")
    assert (entry.artifact_id, entry.size) == ("a-1", size)
    assert entry.written > 1.7e9


@every_store
def test_reading_starts_where_the_body_stands(store: AbstractArtifactStore) -> None:
    body = io.BytesIO(b"skipped, kept")
    body.seek(9)
    store.write("a", body)
    assert content(store, "a") == b"kept"


@every_store
def test_a_body_that_cannot_seek(store: AbstractArtifactStore) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.left = [b"one ", b"two"]

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            if size < 0:
                return b"".join(iter(lambda: self.read(1), b""))
            return self.left.pop(0) if self.left else b""

    store.write("a", Pipe())  # type: ignore[arg-type]
    assert content(store, "a") == b"one two"


@every_store
def test_an_artifact_can_be_replaced_and_removed(store: AbstractArtifactStore) -> None:
    store.write_many({"a": b"old" * CHUNK, "b": b"other"})
    store.write("a", io.BytesIO(b"new"))
    assert content(store, "a") == b"new"
    store.remove("a")
    with pytest.raises(ArtifactNotFound):
        store.remove("a")
    with pytest.raises(ArtifactNotFound):
        store.open_reader("a")
    store.remove_many(["a", "b", "never-there"])
    assert list(store.stored()) == []


@every_store
def test_what_was_never_there_is_not_found(store: AbstractArtifactStore) -> None:
    with pytest.raises(ArtifactNotFound):
        store.open_reader("a")
    with pytest.raises(ArtifactNotFound):
        store.remove("a")
    store.remove_many(["a"])
    assert list(store.stored("x")) == []


@every_store
def test_a_write_that_fails_leaves_nothing(store: AbstractArtifactStore) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 2 * CHUNK or size in (-1, None):
                raise OSError("the disk is gone")
            return super().read(size)

    with pytest.raises(OSError, match="disk is gone"):
        store.write("a", Broken(bytes(4 * CHUNK)))
    with pytest.raises(ArtifactNotFound):
        store.open_reader("a")
    assert list(store.stored()) == []


@every_store
def test_optuna_can_use_it_for_its_artifacts(
    store: AbstractArtifactStore, storage: BaseStorage, tmp_path: Path
) -> None:
    study = optuna.create_study(storage=storage)
    (tmp_path / "note.txt").write_text("hello")
    artifact_id = optuna.artifacts.upload_artifact(
        artifact_store=store, file_path=str(tmp_path / "note.txt"), study_or_trial=study
    )
    optuna.artifacts.download_artifact(
        artifact_store=store, artifact_id=artifact_id, file_path=str(tmp_path / "back.txt")
    )
    assert (tmp_path / "back.txt").read_text() == "hello"


def test_memory_goes_with_its_storage() -> None:
    storage = InMemoryStorage()
    stores.default_artifact_store(storage).write("a", io.BytesIO(b"x"))
    assert list(stores.default_artifact_store(InMemoryStorage()).stored()) == []
    count = len(stores.memory._of_storage)
    del storage
    assert len(stores.memory._of_storage) < count


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "a\\b", "", ".", "a\0", "x" * 300])
def test_a_file_never_lands_outside_the_directory(tmp_path: Path, name: str) -> None:
    store = fs.AtomicFileSystemArtifactStore(tmp_path / "d")
    with pytest.raises(ValueError, match="cannot be a file name"):
        store.write(name, io.BytesIO(b"x"))
    assert not (tmp_path / "d").exists()


def test_a_half_written_file_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fs.AtomicFileSystemArtifactStore(tmp_path)
    store.write("a", io.BytesIO(b"old"))

    def crash(*_: object) -> None:
        assert (tmp_path / "a").read_bytes() == b"old"
        raise KeyboardInterrupt

    monkeypatch.setattr(fs.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        store.write("a", io.BytesIO(b"new"))
    assert content(store, "a") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_file_store_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = fs.AtomicFileSystemArtifactStore("here")
    store.write("a", io.BytesIO(b"x"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert content(store, "a") == b"x"


def test_looking_does_not_change_the_database(database: RDBStorage) -> None:
    store = RDBArtifactStore(database)
    assert list(store.stored()) == []
    store.remove_many(["a"])
    with pytest.raises(ArtifactNotFound):
        store.open_reader("a")
    assert not [t for t in sa.inspect(database.engine).get_table_names() if "hypergrad" in t]
    store.write("a", io.BytesIO(b"x"))
    assert {t for t in sa.inspect(database.engine).get_table_names() if "hypergrad" in t} == {
        "hypergrad_version",
        "hypergrad_blobs",
        "hypergrad_chunks",
    }


def test_a_newer_schema_is_refused_and_left_alone(database: RDBStorage) -> None:
    RDBArtifactStore(database).write("a", io.BytesIO(b"x"))
    with database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE hypergrad_version SET schema_version = 2"))
    other = pickle.loads(pickle.dumps(database))
    store = RDBArtifactStore(other)
    for use in (
        lambda: store.write("b", io.BytesIO(b"y")),
        lambda: store.open_reader("a"),
        lambda: store.remove("a"),
        lambda: list(store.stored()),
    ):
        with pytest.raises(
            StorageError, match=r"schema version 2 .* knows 1.*newer optuna_hypergrad"
        ):
            use()
    assert content(RDBArtifactStore(database), "a") == b"x"
    other.engine.dispose()


def test_no_foreign_keys_and_optuna_can_delete_the_study(database: RDBStorage) -> None:
    study = optuna.create_study(storage=database)
    RDBArtifactStore(database).write("a", io.BytesIO(b"x"))
    for table in ("hypergrad_blobs", "hypergrad_chunks", "hypergrad_version"):
        assert sa.inspect(database.engine).get_foreign_keys(table) == []
    optuna.delete_study(study_name=study.study_name, storage=database)
    assert database.get_all_studies() == []


def test_a_pickled_storage_comes_back_with_its_artifacts(database: RDBStorage) -> None:
    store = RDBArtifactStore(optuna.storages.get_storage(database))
    store.write("a", io.BytesIO(b"x"))
    again = pickle.loads(pickle.dumps(store))
    assert content(again, "a") == b"x"
    assert again._engine is not store._engine
    again._engine.dispose()


def test_a_storage_without_a_database_is_refused() -> None:
    with pytest.raises(StorageError, match="InMemoryStorage holds none"):
        RDBArtifactStore(InMemoryStorage())


def test_nothing_stays_open_between_calls(database: RDBStorage) -> None:
    held: list[int] = []
    sa.event.listen(database.engine, "checkout", lambda *_: held.append(1))
    sa.event.listen(database.engine, "checkin", lambda *_: held.pop())
    store = RDBArtifactStore(database)
    store.write("a", io.BytesIO(bytes(3 * CHUNK)))
    reader = store.open_reader("a")
    reader.read(10)
    assert held == []
    store.remove("a")
    with pytest.raises(CorruptTensorError, match=r"artifact_id='a', chunk=1\) is missing"):
        reader.read()


def test_secure_delete_is_as_before(database: RDBStorage) -> None:
    url = database.engine.url
    database.engine.dispose()
    database.engine = sa.create_engine(  # and we never need two connections at once
        url, poolclass=sa.pool.QueuePool, pool_size=1, max_overflow=0, pool_timeout=5
    )
    store = RDBArtifactStore(database)
    for setting, name in enumerate(("OFF", "ON", "FAST")):
        with database.engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA secure_delete={name}")
        store.write("a", io.BytesIO(b"x"))
        store.remove("a")
        with database.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA secure_delete").scalar() == setting


@pytest.mark.parametrize(
    ("found", "left"), [("DELETE", "persist"), ("WAL", "wal"), ("TRUNCATE", "truncate")]
)
def test_settings_of_sqlite(database: RDBStorage, found: str, left: str) -> None:
    """The journal that would be deleted is kept; another one is somebody's choice. The cache is as before."""
    url = database.engine.url
    database.engine.dispose()
    database.engine = sa.create_engine(
        url, poolclass=sa.pool.QueuePool, pool_size=1, max_overflow=0
    )
    store = RDBArtifactStore(database)
    with database.engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA journal_mode = {found}")
        connection.exec_driver_sql("PRAGMA cache_size = -1234")
    store.write("b", io.BytesIO(bytes(3_000_000)))
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == left
        assert connection.exec_driver_sql("PRAGMA cache_size").scalar() == -1234


def test_a_driver_that_opens_no_blobs_writes_the_same_rows(
    database: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = (b"header", memoryview(bytes(range(256)) * 5000), b"", b"x" * (1 << 20), b"end")
    table = _schema.chunks.c
    query = sa.select(table.chunk, table.data).order_by(table.chunk)
    make_tables(database)
    rows = {}
    for name, in_place in (("in place", True), ("copied", False)):
        monkeypatch.setattr(rdb, "can_write_in_place", lambda _, found=in_place: found)
        with transaction(database.engine) as connection:
            rdb._insert(connection, {name: rdb._Content.of(pieces)})
        with database.engine.connect() as connection:
            rows[name] = connection.execute(query.where(table.artifact_id == name)).all()
    assert rows["in place"] == rows["copied"]
    assert b"".join(data for _, data in rows["copied"]) == b"".join(pieces)
    assert {type(data) for _, data in rows["in place"]} == {bytes}


@pytest.mark.skipif(
    not hasattr(sqlite3.Connection, "blobopen"), reason="Python 3.10 opens no blobs of SQLite"
)
def test_a_blob_that_cannot_be_written_is_an_error_of_the_database(
    database: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadOnly:
        def __init__(self, driver: Any) -> None:
            self._driver = driver

        def blobopen(self, table: str, column: str, row: int) -> Any:
            return self._driver.blobopen(table, column, row, readonly=True)

    driver_of = _sqlite._driver
    monkeypatch.setattr(_sqlite, "_driver", lambda connection: ReadOnly(driver_of(connection)))
    with pytest.raises(sa.exc.OperationalError, match="readonly"):
        RDBArtifactStore(database).write("a", io.BytesIO(b"abc"))
    monkeypatch.undo()
    assert not list(RDBArtifactStore(database).stored())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("DELETE FROM hypergrad_chunks WHERE chunk = 1", f"hold {CHUNK + 10} bytes"),
        ("DELETE FROM hypergrad_chunks", "its 0 rows in hypergrad_chunks hold 0 bytes"),
        ("DELETE FROM hypergrad_blobs", "says None bytes"),
        ("UPDATE hypergrad_blobs SET num_bytes = 9000000000000", "says 9000000000000 bytes"),
        ("UPDATE hypergrad_blobs SET num_bytes = 'many'", "says many bytes"),
        ("UPDATE hypergrad_chunks SET chunk = 7 WHERE chunk = 2", "the last numbered 7"),
        (
            "UPDATE hypergrad_chunks SET data = 'text 0123' WHERE chunk = 2",
            f"hold {2 * CHUNK + 9} bytes",
        ),
        ("UPDATE hypergrad_chunks SET data = 'text 01234' WHERE chunk = 2", "does not hold bytes"),
    ],
)
def test_rows_that_do_not_add_up_are_named(database: RDBStorage, damage: str, message: str) -> None:
    store = RDBArtifactStore(database)
    store.write("a-b", io.BytesIO(bytes(2 * CHUNK + 10)))
    with database.engine.begin() as connection:
        connection.execute(sa.text(damage))
    with pytest.raises(CorruptTensorError, match=message) as caught:
        content(store, "a-b")
    assert "artifact_id='a-b'" in str(caught.value)


def test_a_giant_row_is_not_read(database: RDBStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RDBArtifactStore(database)
    store.write("a", io.BytesIO(bytes(CHUNK)))
    monkeypatch.setattr(rdb, "_MAX_CHUNK_BYTES", CHUNK - 1)
    with pytest.raises(CorruptTensorError, match="Rows were lost, added or changed"):
        store.open_reader("a")


def test_odd_rows_can_still_be_listed(database: RDBStorage) -> None:
    store = RDBArtifactStore(database)
    store.write("a", io.BytesIO(b"x"))
    with database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE hypergrad_blobs SET written = 'long ago'"))
    assert [s.artifact_id for s in store.stored()] == ["a"]


def test_percent_and_underscore_in_a_prefix_are_letters(database: RDBStorage) -> None:
    store = RDBArtifactStore(database)
    store.write_many({"a_b": b"", "axb": b"", "a%b": b""})
    assert [s.artifact_id for s in store.stored("a_")] == ["a_b"]
    assert [s.artifact_id for s in store.stored("a%")] == ["a%b"]


@pytest.mark.parametrize("identifier", ["'; DROP TABLE studies; --", '"quoted"', "\N{SNOWMAN}"])
def test_identifiers_are_data(database: RDBStorage, identifier: str) -> None:
    store = RDBArtifactStore(database)
    store.write(identifier, io.BytesIO(b"x"))
    assert content(store, identifier) == b"x"
    store.remove(identifier)
    assert database.get_all_studies() == []


def test_threads_that_start_at_once_make_the_tables_once(database: RDBStorage) -> None:
    others = [pickle.loads(pickle.dumps(database)) for _ in range(4)]
    errors: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work(k: int) -> None:
        try:
            store = RDBArtifactStore(others[k % 4])
            barrier.wait()
            for i in range(3):
                store.write(f"t-{k}-{i}", io.BytesIO(bytes([k]) * (CHUNK + k)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    store = RDBArtifactStore(database)
    assert len(list(store.stored("t-"))) == 24
    for k in range(8):
        assert content(store, f"t-{k}-2") == bytes([k]) * (CHUNK + k)
    with database.engine.connect() as connection:
        assert connection.execute(
            sa.text("SELECT id, schema_version FROM hypergrad_version")
        ).all() == [(1, 1)]
    for other in others:
        other.engine.dispose()


def test_a_locked_database_is_waited_for(
    database: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RDBArtifactStore(database)
    store.write("a", io.BytesIO(b"x"))
    impatient = RDBStorage(
        str(database.engine.url), engine_kwargs={"connect_args": {"timeout": 0.01}}
    )
    blocker = database.engine.connect()
    blocker.exec_driver_sql("BEGIN IMMEDIATE")
    slept: list[float] = []

    def release(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            blocker.exec_driver_sql("ROLLBACK")

    monkeypatch.setattr(stores._retrying.time, "sleep", release)
    RDBArtifactStore(impatient).write("b", io.BytesIO(b"y"))
    blocker.close()
    assert len(slept) == 3
    assert content(store, "b") == b"y"
    impatient.engine.dispose()


def test_a_database_that_stays_locked_is_an_error(
    database: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def locked() -> None:
        calls.append(1)
        raise sa.exc.OperationalError(
            "INSERT", {}, __import__("sqlite3").OperationalError("locked")
        )

    with pytest.raises(sa.exc.OperationalError):
        stores.retry_while_busy(locked, timeout=0.0)
    assert len(calls) == 1


def test_the_tables_of_the_servers() -> None:
    def ddl(dialect: sa.engine.Dialect) -> str:
        return "".join(
            str(CreateTable(t).compile(dialect=dialect)) for t in _schema.TABLES.tables.values()
        )

    for dialect in (mysql.dialect(), mysql.dialect(is_mariadb=True)):
        assert "data LONGBLOB NOT NULL" in ddl(dialect)
        assert ddl(dialect).count("ENGINE=InnoDB") == 3
        assert "artifact_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" in ddl(dialect)
        assert "FOREIGN" not in ddl(dialect)
    assert "data BYTEA NOT NULL" in ddl(postgresql.dialect())


def test_readers_satisfy_the_protocol(database: RDBStorage) -> None:
    store = RDBArtifactStore(database)
    store.write("a", io.BytesIO(b"abc\ndef\n"))
    reader: BinaryIO = store.open_reader("a")
    assert reader.readable()
    assert list(reader) == [b"abc\n", b"def\n"]
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read()
