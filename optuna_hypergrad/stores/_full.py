"""A disk, a file system's quota or a database that has no room left, said in words."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from optuna.exceptions import StorageInternalError

from .._errors import HypergradError, NoSpaceError
from ._retrying import causes, codes_of, kind_of

_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SQLITE = ("database or disk is full", "disk i/o error")
_POSTGRESQL = frozenset({"53100"})
_MYSQL = frozenset({1021, 1114})
_MYSQL_FILE_ERRORS = frozenset({3, 1026, 1030})  # with the errno of the server in their text
_MYSQL_ERRNOS = tuple(
    f"{word} {number}" for word in ("errno:", "error") for number in (28, 122, 27)
)


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room. (SQLite calls a file-size limit an I/O error, as it does a
    broken disk.)"""
    return any(map(_is_full, causes(error)))


def is_of_storage(error: BaseException) -> bool:
    """Whether it is the study's storage that failed, and not what was computed."""
    kinds = (StorageInternalError, sa.exc.SQLAlchemyError)
    return any(isinstance(e, kinds) for e in causes(error)) or is_full(error)


@contextmanager
def saying_what_has_no_room(what: str) -> Iterator[None]:
    """Have a write that finds no room raise :class:`NoSpaceError`; ``what`` begins the sentence."""
    try:
        yield
    except Exception as error:
        typed = isinstance(error, HypergradError) and not isinstance(error, NoSpaceError)
        if typed or not is_full(error):
            raise
        raise NoSpaceError(
            f"{what} cannot be stored: there is no room left on the disk or in the database "
            f"({kind_of(error)}: {_cause(error)}). What was stored before is still there. Free some space, or "
            "raise the limit (a quota, a file-size limit, max_page_count), and run again; "
            "`optuna-hypergrad sweep` removes tensors that nothing refers to."
        ) from error


def _is_full(error: BaseException) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return any(words in str(error).lower() for words in _SQLITE)
    if isinstance(error, OSError):
        return error.errno in _ERRNOS
    original = getattr(error, "orig", None)
    if not isinstance(error, sa.exc.DBAPIError) or original is None:
        return False
    if isinstance(original, sqlite3.OperationalError):
        return _is_full(original)
    codes = codes_of(original)
    if codes & (_POSTGRESQL | _MYSQL):
        return True
    return bool(codes & _MYSQL_FILE_ERRORS) and any(n in str(original) for n in _MYSQL_ERRNOS)


def _cause(error: BaseException) -> str:
    found = next(e for e in causes(error) if _is_full(e))
    original = getattr(found, "orig", None) or found
    return getattr(original, "strerror", None) or str(original.args[-1] if original.args else "")
