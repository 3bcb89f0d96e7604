"""The database of a study, and transactions in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import NullPool, QueuePool

from .. import _optuna


def unwrap_rdb(storage: object) -> RDBStorage | None:
    """The ``RDBStorage`` that ``storage`` is or wraps as ``_backend``, if any."""
    while isinstance(storage, BaseStorage):
        if isinstance(storage, RDBStorage):
            return storage
        storage = _optuna.wrapped_by(storage)
    return None


def is_for_threads(storage: BaseStorage) -> bool:
    """Whether any thread may use it (SQLite in memory belongs to one)."""
    rdb = unwrap_rdb(storage)
    return rdb is None or isinstance(rdb.engine.pool, (QueuePool, NullPool))


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Committed at the end, rolled back on an error."""
    with engine.connect() as connection, _without_wiping(connection), connection.begin():
        yield connection


@contextmanager
def _without_wiping(connection: Connection) -> Iterator[None]:
    """Do not fill deleted pages with zeros: Debian's SQLite does, for a third of the cost."""
    if connection.dialect.name != "sqlite":
        yield
        return
    settings = {0: "OFF", 1: "ON", 2: "FAST"}
    with connection.begin():
        before = int(connection.exec_driver_sql("PRAGMA secure_delete").scalar() or 0)
        connection.exec_driver_sql("PRAGMA secure_delete=FAST")
    try:
        yield
    finally:
        with connection.begin():
            connection.exec_driver_sql(f"PRAGMA secure_delete={settings[before]}")
