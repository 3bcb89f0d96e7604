"""Waiting: for other writers of a database, and for a server that is away.

Two kinds of errors pass by themselves. *Busy*: SQLite is locked, or a server has ended a deadlock; nothing
was written. *Lost*: the connection broke, or the server restarts; what was on its way may have been
written or not, so whatever is tried again must be idempotent.
"""

from __future__ import annotations

import random
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from .. import _optuna
from .._errors import ConnectionLostError

T = TypeVar("T")

BUSY_TIMEOUT = 60.0
"""Seconds for which a write waits for other writers."""

PATIENCE = 60.0
"""Seconds for which a server may be away, unless a :class:`RetryingStorage` says otherwise."""

_POSTGRESQL_LOST = frozenset({"57P01", "57P02", "57P03", "57P05", "53300"})
_MYSQL_LOST = frozenset({1040, 1053, 1079, 1152, 1158, 1159, 1160, 1161, 1927, 2002, 2003, 2006})
_MYSQL_LOST |= {2012, 2013, 2027, 2055, 4031}
_BUSY: frozenset[object] = frozenset({1205, 1213, "40P01"})
_NEVER = ("authentication", "does not exist", "pg_hba", "access denied", "unknown database")
_LONGEST_PAUSE = 2.0

_last_loss = -1e9
_patience: weakref.WeakKeyDictionary[BaseStorage, float] = weakref.WeakKeyDictionary()


def set_patience(rdb: RDBStorage, seconds: float) -> None:
    """Seconds for which the database of ``rdb`` may be away."""
    _patience[rdb] = seconds


def patience_of(storage: BaseStorage) -> float:
    """What :func:`set_patience` said last, or else ``PATIENCE``."""
    return _patience.get(storage, PATIENCE)


def seconds_since_loss() -> float:
    """How long ago this process last noticed that a connection was lost; or, in one, that it still is."""
    return time.monotonic() - _last_loss


def retry_while_busy(
    action: Callable[[], T],
    timeout: float = BUSY_TIMEOUT,
    patience: float = PATIENCE,
    settle: Callable[[], T | None] | None = None,
    away_since: float | None = None,
) -> T:
    """Do ``action``, again and again while the database is busy or away. Every other error passes.

    Args:
        action: Must be idempotent, or else be settled by ``settle``.
        timeout: Seconds for which the database may be busy.
        patience: Seconds for which it may be away; counted anew after each success.
        settle: Called before ``action`` is tried again after a lost connection, and when it then fails,
            because a server may carry out late what it was asked: the result, if it turns out that the
            lost attempt was carried out, or ``None``.
        away_since: By ``time.monotonic()``, if the database was away already when it was last asked.

    Raises:
        ConnectionLostError: if the database does not come back.
    """
    started = time.monotonic()
    lost_at = away_since
    refused: Exception | None = None
    pause = 0.05
    while True:
        try:
            found = settle() if settle is not None and lost_at is not None else None
            if found is None and refused is not None:
                raise refused
            found = action() if found is None else found
        except Exception as error:
            now = time.monotonic()
            if is_lost(error):
                lost_at = _note_loss(error, lost_at, patience)
            elif not is_busy(error) or now - started > timeout:
                if settle is None or lost_at is None or error is refused:
                    raise
                refused = error
                continue
            pause = min(2 * pause, _LONGEST_PAUSE) if lost_at is not None else 0.1
        else:
            if lost_at is not None:
                away = time.monotonic() - lost_at
                _optuna.logger.warning(f"The database answers again after {away:.1f} s.")
            return found
        time.sleep(random.uniform(0.05, 1.0) * pause)


def _note_loss(error: Exception, lost_at: float | None, patience: float) -> float:
    global _last_loss
    _last_loss = now = time.monotonic()
    if lost_at is None:
        lost_at = now
        if patience > 0:
            _optuna.logger.warning(
                f"The connection to the database is lost ({kind_of(error)}). Trying again for {patience:g} s."
            )
    if now - lost_at >= patience:
        raise ConnectionLostError(
            f"The database has not answered for {patience:g} s ({kind_of(error)}). Nothing that was stored "
            "is lost: run again when it is back, or wait longer with RetryingStorage(..., patience=...)."
        ) from error
    return lost_at


def is_busy(error: BaseException) -> bool:
    """Whether the database was only busy, and has written nothing."""
    for e in causes(error):
        if isinstance(e, sqlite3.OperationalError) and "locked" in str(e):
            return True
        if isinstance(e, DBAPIError) and e.orig is not None and _BUSY & codes_of(e.orig):
            return True
    return False


def is_lost(error: BaseException) -> bool:
    """Whether the connection to the database was lost, or could not be made at the moment."""
    errors = list(causes(error))
    given_up = any(isinstance(e, ConnectionLostError) for e in errors)
    return not given_up and any(map(_is_lost, errors))


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, PendingRollbackError)):
        return True
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or (
            isinstance(error, (OperationalError, InterfaceError, InternalError))
            and error.orig is not None
            and _driver_lost(error.orig)
        )
    code = getattr(error, "code", None)
    if type(error).__module__.startswith("grpc") and callable(code):
        return getattr(code(), "name", "") == "UNAVAILABLE"
    return False


def _driver_lost(error: BaseException) -> bool:
    driver = type(error).__module__.partition(".")[0]
    text = str(error).lower()
    if driver == "sqlite3" or any(words in text for words in _NEVER):
        return False
    codes = codes_of(error)
    if driver.startswith("psycopg"):
        states = {c for c in codes if isinstance(c, str) and len(c) == 5}
        return bool(states & _POSTGRESQL_LOST) or getattr(error, "sqlstate", "-") is None
    return bool(codes & _MYSQL_LOST) or "packet sequence" in text or 0 in codes


def codes_of(error: BaseException) -> set[object]:
    """What a driver calls an error: MySQL's number, PostgreSQL's SQLSTATE."""
    found = [*error.args[:1], *(getattr(error, a, None) for a in ("errno", "sqlstate", "pgcode"))]
    return {code for code in found if isinstance(code, (int, str))}


def causes(error: BaseException | None) -> Iterator[BaseException]:
    # Not what was being handled meanwhile: that may be an older loss, in the caller's own hands.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def kind_of(error: BaseException) -> str:
    """The driver's name for it; its text could show more than a log should have."""
    found = [type(e).__name__ for e in causes(error) if not isinstance(e, SQLAlchemyError)]
    return found[-1] if found else type(error).__name__
