"""Shared by all tests. Keep it small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

pytest.register_assert_rewrite("optuna.testing.pytest_samplers")
optuna.logging.set_verbosity(optuna.logging.ERROR)

STORAGES = ("memory", "sqlite", "journal")


def open_storage(kind: str, directory: Path) -> BaseStorage:
    """A storage of one of ``STORAGES``; opened again, it holds what it held (memory excepted)."""
    if kind == "memory":
        return InMemoryStorage()
    if kind == "sqlite":
        opened = RDBStorage(f"sqlite:///{directory}/study.db")
        opened.engine.dispose()
        sa.event.listen(opened.engine, "connect", _without_waiting_for_the_disk)
        return opened
    return JournalStorage(JournalFileBackend(str(directory / "study.log")))


def _without_waiting_for_the_disk(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BaseStorage]:
    opened = open_storage(request.param, tmp_path)
    yield opened
    opened.remove_session()
    if isinstance(opened, RDBStorage):
        opened.engine.dispose()
