"""Our tables in a database: made once, with a word about it, never by looking; a newer schema is left alone."""

from __future__ import annotations

import io
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import torch
from conftest import DATABASES, open_storage, url_of
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import RDBStorage

import optuna_hypergrad as ohg
from optuna_hypergrad import _optuna, cli
from optuna_hypergrad.stores import RDBArtifactStore, _schema

TABLES = {"hypergrad_version", "hypergrad_blobs", "hypergrad_chunks"}
every_database = pytest.mark.parametrize("kind", DATABASES)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What our logger says at INFO."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    handler, before = Handler(), _optuna.logger.level
    _optuna.logger.addHandler(handler)
    _optuna.logger.setLevel(logging.INFO)
    yield lines
    _optuna.logger.removeHandler(handler)
    _optuna.logger.setLevel(before)


def opened(kind: str, directory: Path) -> RDBStorage:
    found = open_storage(kind, directory)
    assert isinstance(found, RDBStorage)
    return found


def tables(storage: RDBStorage) -> set[str]:
    return {t for t in sa.inspect(storage.engine).get_table_names() if t.startswith("hypergrad")}


def rows(storage: RDBStorage) -> list[Any]:
    with storage.engine.connect() as connection:
        return [
            connection.execute(sa.text(f"SELECT * FROM {table}")).all()
            for table in (*sorted(TABLES), "trials", "trial_system_attributes")
        ]


def save(study: optuna.Study, trial: optuna.Trial) -> None:
    tensors = {"w": torch.arange(4.0)}
    store = ohg.TensorStore.of_study(study)
    store.save(study._study_id, trial._trial_id, "w", "value", 0, tensors)


def commands(url: str, directory: Path) -> list[list[str]]:
    return [
        ["show", url],
        ["verify", url],
        ["sweep", url, "--min-age", "0"],
        ["export", url, "--trial", "0", "-o", str(directory / "out")],
    ]


@every_database
def test_tables_are_made_by_the_first_write_which_says_so(
    kind: str, tmp_path: Path, told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    storage = opened(kind, tmp_path)
    study = optuna.create_study(study_name="s", storage=storage)
    trial = study.ask()
    store = RDBArtifactStore(storage)
    assert list(store.stored()) == []
    with pytest.raises(ArtifactNotFound):
        store.open_reader("a")
    ohg.TensorStore.of_study(study).sweep(min_age=-60)
    ohg.TensorStore.of_study(study).verify()
    for command in commands(url_of(kind, tmp_path), tmp_path):
        assert cli.main(command) in (0, 2), capsys.readouterr()
    assert tables(storage) == set()
    assert told == []
    save(study, trial)
    assert tables(storage) == TABLES
    expected = ["INFO Made the tables "]
    if kind == "sqlite":
        expected.insert(0, f"INFO Wrote {storage.engine.url.render_as_string()} anew in pages of ")
    assert len(told) == len(expected)
    assert all(line.startswith(start) for line, start in zip(told, expected, strict=True))
    assert storage.engine.url.render_as_string() in told[-1]
    again = opened(kind, tmp_path)
    RDBArtifactStore(again).write("b", io.BytesIO(b"x"))
    assert len(told) == len(expected)


def page_bytes(storage: RDBStorage) -> int:
    with storage.engine.connect() as connection:
        return int(connection.exec_driver_sql("PRAGMA page_size").scalar_one())


def test_a_small_sqlite_database_gets_large_pages(tmp_path: Path) -> None:
    storage = opened("sqlite", tmp_path)
    study = optuna.create_study(study_name="s", storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    before = study.trials
    assert page_bytes(storage) == 4096
    save(study, study.ask())
    assert page_bytes(opened("sqlite", tmp_path)) == 65536
    assert (
        optuna.load_study(study_name="s", storage=opened("sqlite", tmp_path)).trials[:3] == before
    )


@pytest.mark.parametrize("why", ["large", "wal", "busy"])
def test_other_sqlite_databases_keep_their_pages(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.db"
    impatient = {"connect_args": {"timeout": 0.1}}
    storage = RDBStorage(f"sqlite:///{path}", engine_kwargs=impatient)
    study = optuna.create_study(study_name="s", storage=storage)
    trial = study.ask()
    if why == "large":
        monkeypatch.setattr(_schema, "_SMALL_BYTES", 50_000)
    if why == "wal":
        with storage.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    enlarge = _schema._enlarge_pages
    with closing(sqlite3.connect(path)) as reader:

        def while_somebody_reads(engine: sa.engine.Engine) -> None:
            reader.execute("BEGIN").execute("SELECT * FROM trials").fetchone()
            enlarge(engine)
            reader.rollback()

        if why == "busy":
            monkeypatch.setattr(_schema, "_enlarge_pages", while_somebody_reads)
        save(study, trial)
    storage.engine.dispose()
    assert page_bytes(RDBStorage(f"sqlite:///{path}")) == 4096
    (saved,) = study.trials
    store = ohg.TensorStore.of_study(study)
    assert torch.equal(store.load(store.pointers(saved)[0])["w"], torch.arange(4.0))


@every_database
def test_a_newer_schema_is_neither_read_nor_written(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opened(kind, tmp_path)
    study = optuna.create_study(study_name="s", storage=first)
    trial = study.ask()
    save(study, trial)
    with first.engine.begin() as connection:
        connection.execute(sa.text("UPDATE hypergrad_version SET schema_version = 99"))
    before = rows(first)
    study = optuna.load_study(study_name="s", storage=opened(kind, tmp_path))
    store = ohg.TensorStore.of_study(study)
    uses = (
        lambda: save(study, trial),
        lambda: store.load(store.pointers(study.trials[0])[0]),
        lambda: ohg.load_tensors(study.trials[0], study=study),
        lambda: store.discard(*store.pointers(study.trials[0])),
        lambda: store.sweep(min_age=-60),
        store.verify,
    )
    complaint = r"schema version 99 and this version .* knows 1\. Install a newer"
    for use in uses:
        with pytest.raises(ohg.StorageError, match=complaint):
            use()
    capsys.readouterr()
    for command in commands(url_of(kind, tmp_path), tmp_path):
        assert cli.main(command) == cli.FAILURE
        output, error = capsys.readouterr()
        assert output == ""
        assert "schema version 99" in error
    assert rows(first) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("DROP TABLE hypergrad_blobs", "hypergrad_blobs .* is missing"),
        ("DROP TABLE hypergrad_chunks", "hypergrad_chunks .* is missing"),
        (
            "ALTER TABLE hypergrad_blobs RENAME num_bytes TO x",
            "hypergrad_blobs .* no column 'num_b",
        ),
        ("ALTER TABLE hypergrad_version RENAME schema_version TO x", "no column 'schema_version'"),
        ("UPDATE hypergrad_version SET schema_version = 0", "hypergrad_version is '0' and not a"),
    ],
)
def test_tables_that_are_half_there(tmp_path: Path, statement: str, complaint: str) -> None:
    first = opened("sqlite", tmp_path)
    study = optuna.create_study(study_name="s", storage=first)
    trial = study.ask()
    save(study, trial)
    with first.engine.begin() as connection:
        connection.execute(sa.text(statement))
    study = optuna.load_study(study_name="s", storage=opened("sqlite", tmp_path))
    store = ohg.TensorStore.of_study(study)
    for use in (
        lambda: save(study, trial),
        lambda: store.load(store.pointers(study.trials[0])[0]),
        store.verify,
    ):
        with pytest.raises(ohg.StorageError, match=complaint):
            use()


@pytest.mark.parametrize("statement", ["DELETE FROM", "DROP TABLE"])
def test_a_missing_version_is_read_and_made_again(tmp_path: Path, statement: str) -> None:
    """As by a worker that was cut off while it made the tables."""
    first = opened("sqlite", tmp_path)
    study = optuna.create_study(study_name="s", storage=first)
    trial = study.ask()
    save(study, trial)
    with first.engine.begin() as connection:
        connection.execute(sa.text(f"{statement} hypergrad_version"))
    study = optuna.load_study(study_name="s", storage=opened("sqlite", tmp_path))
    assert len(ohg.TensorStore.of_study(study).verify().sound) == 1
    save(study, trial)
    with first.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT * FROM hypergrad_version")).all() == [(1, 1)]
