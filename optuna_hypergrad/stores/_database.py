"""The database of a study, and transactions in it.

All that goes through a study's own engine goes through here, so that it waits for a database that is away
as long as the user has said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import NullPool, QueuePool

from .. import _optuna
from ._retrying import BUSY_TIMEOUT, patience_of, retry_while_busy
from ._sqlite import set_for_writing

T = TypeVar("T")


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


def read(rdb: RDBStorage, action: Callable[[Connection], T]) -> T:
    """What ``action`` reads; again while the database is busy or away.

    Raises:
        ConnectionLostError: if the database does not come back.
    """

    def attempt() -> T:
        with rdb.engine.connect() as connection:
            return action(connection)

    return retry_while_busy(attempt, patience=patience_of(rdb))


def write(
    rdb: RDBStorage,
    action: Callable[[Connection], T],
    settle: Callable[[], T | None] | None = None,
) -> T:
    """Do ``action`` in one transaction; again while the database is busy or away.

    Args:
        action: Must be idempotent, or else be settled by ``settle``, as in :func:`retry_while_busy`.

    Raises:
        ConnectionLostError: if the database does not come back.
    """

    def attempt() -> T:
        with transaction(rdb.engine) as connection:
            return action(connection)

    return retry_while_busy(attempt, BUSY_TIMEOUT, patience_of(rdb), settle)


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Committed at the end, rolled back on an error. Nothing is tried again: for use in ``settle``."""
    with engine.connect() as connection, set_for_writing(connection), connection.begin():
        yield connection
