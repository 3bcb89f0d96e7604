"""What makes SQLite quick to write megabytes: its settings, and rows written in place."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

_TABLE, _COLUMN = "hypergrad_chunks", "data"
_INSERT = f"INSERT INTO {_TABLE} (artifact_id, chunk, {_COLUMN}) VALUES (?, ?, zeroblob(?))"
CHUNK_BYTES = 1 << 19
"""Of a row of data."""
_CACHE = f"-{CHUNK_BYTES * 9 // 8 * 2 // 1000}"  # KiB: a chunk, the zeros that it replaces, and what points to it


@contextmanager
def set_for_writing(connection: Connection) -> Iterator[None]:
    """Settings of a connection for one transaction; those of other databases are left alone.

    Deleted pages are not filled with zeros, as Debian's SQLite does. A small cache, which holds a chunk and
    no more: pages go to the file while the next chunk is copied and hashed, rather than all of them at the end. A journal that
    would be deleted after each
    transaction is kept by this connection, with its header cleared: that spares two of four waits for the disk. The
    file, ``study.db-journal``, stays when the connection is closed, until somebody else's transaction deletes it.
    """
    if connection.dialect.name != "sqlite":
        yield
        return
    cursor: Any = connection.connection.cursor()  # this is no part of SQLAlchemy's transaction

    def pragma(setting: str) -> Any:
        found = cursor.execute(f"PRAGMA {setting}").fetchall()
        return found[0][0] if found else None

    before = pragma("secure_delete"), pragma("cache_size")
    pragma("secure_delete = FAST")
    pragma(f"cache_size = {_CACHE}")
    if pragma("journal_mode") == "delete":
        pragma("journal_mode = PERSIST")
    try:
        yield
    finally:
        with suppress(sqlite3.Error):  # a connection that broke has no settings left
            pragma(f"secure_delete = {('OFF', 'ON', 'FAST')[before[0]]}")
            pragma(f"cache_size = {before[1]}")


def can_write_in_place(connection: Connection) -> bool:
    """Whether it is SQLite, by a driver that opens blobs (Python's own does since 3.11)."""
    return connection.dialect.name == "sqlite" and hasattr(_driver(connection), "blobopen")


def insert_in_place(
    connection: Connection, artifact_id: str, chunk: int, parts: Sequence[memoryview]
) -> int:
    """Insert a row of ``hypergrad_chunks`` with ``parts``, one after the other, as its data.

    They are copied once, into SQLite's pages; a parameter of an INSERT is copied twice before.

    Returns:
        Their bytes in all.
    """
    size = sum(map(len, parts))
    row = connection.exec_driver_sql(_INSERT, (artifact_id, chunk, size)).lastrowid
    try:
        with _driver(connection).blobopen(_TABLE, _COLUMN, row) as blob:
            for part in parts:
                blob.write(part)
    except sqlite3.Error as error:
        what = f"write of {_TABLE}.{_COLUMN}"
        raise sa.exc.DBAPIError.instance(
            what, None, error, sqlite3.Error, dialect=connection.dialect
        ) from error
    return size


def _driver(connection: Connection) -> Any:
    pooled: Any = connection.connection
    return getattr(pooled, "driver_connection", None) or pooled.connection  # SQLAlchemy 1.4.2
