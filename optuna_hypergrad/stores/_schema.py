"""The tables of the tensors in a study's database: their columns, their version, and how they are made.

No foreign key to Optuna's tables: one without CASCADE makes ``delete_study`` silently do nothing on
PostgreSQL and MySQL. Code for the common subset of SQLAlchemy 1.4.2 and 2.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from optuna.storages import RDBStorage
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from .. import _optuna
from .._errors import StorageError
from ._database import read, transaction
from ._retrying import is_busy, is_lost, patience_of, retry_while_busy
from ._secrets import without_password

SCHEMA_VERSION = 1
_ATTEMPTS = 20
_PAGE_BYTES = 1 << 16
_SMALL_BYTES = 1 << 24  # written anew in an instant


def _for_mysql(base: Any, variant: Any) -> Any:
    return base.with_variant(variant, "mysql").with_variant(variant, "mariadb")


TABLES = sa.MetaData()
_options: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"))
}
# Identifiers differ in case on every database, also on MySQL.
_Id = _for_mysql(sa.String(255), mysql.VARCHAR(255, charset="utf8mb4", collation="utf8mb4_bin"))
version = sa.Table(
    "hypergrad_version",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("schema_version", sa.Integer, nullable=False),
    **_options,
)
blobs = sa.Table(
    "hypergrad_blobs",
    TABLES,
    sa.Column("artifact_id", _Id, primary_key=True),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("written", sa.BigInteger, nullable=False),
    **_options,
)
chunks = sa.Table(
    "hypergrad_chunks",
    TABLES,
    sa.Column("artifact_id", _Id, primary_key=True),
    sa.Column("chunk", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("data", _for_mysql(sa.LargeBinary(), mysql.LONGBLOB()), nullable=False),
    **_options,
)

_prepared: weakref.WeakSet[Engine] = weakref.WeakSet()
_preparing = threading.Lock()


def has_tables(rdb: RDBStorage) -> bool:
    """Whether they are there.

    Raises:
        StorageError: if a newer version of this library has made them, or some are missing or are not as it
            makes them.
    """
    engine = rdb.engine
    if engine in _prepared:
        return True
    present = read(rdb, _columns)
    if not {blobs.name, chunks.name} <= present.keys() and version.name not in present:
        return False  # or another worker is making them
    _check_columns(rdb, present)
    if version.name in present and _has_version(rdb):
        _prepared.add(engine)
    return True


def make_tables(rdb: RDBStorage) -> None:
    """Make those that are missing, and say so.

    Raises:
        StorageError: as :func:`has_tables`; if they cannot be made.
    """
    with _preparing:
        if has_tables(rdb) and rdb.engine in _prepared:
            return
        if rdb.engine.dialect.name == "sqlite":
            _enlarge_pages(rdb.engine)
        retry_while_busy(lambda: _create_tables(rdb), patience=patience_of(rdb))
        if not has_tables(rdb):
            raise StorageError(
                f"The table {version.name} is still missing after it was made. Check that "
                "this database user may create tables."
            )


def _create_tables(rdb: RDBStorage) -> None:
    for left in reversed(range(_ATTEMPTS)):
        try:
            # The version comes last: where it is, everything is.
            TABLES.create_all(rdb.engine, tables=[blobs, chunks])
            TABLES.create_all(rdb.engine, tables=[version])
        except (OperationalError, ProgrammingError, IntegrityError) as error:
            # Another worker makes them in this very moment, or we may not.
            if not left or is_lost(error) or is_busy(error):
                raise
            time.sleep(0.1)
        else:
            break
    try:
        with transaction(rdb.engine) as connection:
            connection.execute(version.insert(), {"id": 1, "schema_version": SCHEMA_VERSION})
    except IntegrityError:
        return  # another worker's row
    _optuna.logger.info(
        f"Made the tables {', '.join(TABLES.tables)} in {without_password(rdb.engine.url)}."
    )


def _enlarge_pages(engine: Engine) -> None:
    """Have a SQLite database that is still small written in larger pages.

    It writes page by page, and tensors of megabytes twice as fast in these. What is refused (another worker is
    writing, the disk is full) is left as it is: that costs time and nothing else.
    """
    with engine.connect() as connection, suppress(OperationalError):
        facts = ("page_size", "page_count", "journal_mode")
        size, count, journal = (
            connection.exec_driver_sql(f"PRAGMA {fact}").scalar_one() for fact in facts
        )
        if size >= _PAGE_BYTES or size * count > _SMALL_BYTES or journal in ("wal", "memory"):
            return
        connection.exec_driver_sql(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.exec_driver_sql("VACUUM")
        _optuna.logger.info(
            f"Wrote {without_password(engine.url)} anew in pages of {_PAGE_BYTES} bytes, for large tensors."
        )


def _columns(connection: Connection) -> dict[str, set[str]]:
    """Names of the columns of those tables that are there."""
    inspector = sa.inspect(connection)
    return {
        name: {column["name"] for column in inspector.get_columns(name)}
        for name in TABLES.tables
        if inspector.has_table(name)
    }


def _check_columns(rdb: RDBStorage, present: Mapping[str, set[str]]) -> None:
    for table in (blobs, chunks, version):
        lacking = sorted({c.name for c in table.columns} - present.get(table.name, set()))
        if table.name not in present and table is not version:
            problem = "is missing, although the other tensor tables are there"
        elif table.name in present and lacking:
            problem = f"has no column {', '.join(map(repr, lacking))}"
        else:
            continue
        raise StorageError(
            f"The table {table.name} in {without_password(rdb.engine.url)} {problem}. Something else than "
            "optuna_hypergrad has changed the database, or a copy of it is incomplete; restore it from a backup."
        )


def _has_version(rdb: RDBStorage) -> bool:
    """Not if whoever made the tables has been cut off before the last row."""
    query = sa.select(version.c.schema_version)
    found = read(rdb, lambda connection: connection.execute(query).scalar())
    if found is None:
        return False
    if type(found) is not int or found < 1:
        raise StorageError(
            f"The schema version in the table {version.name} is {str(found)[:60]!r} and not a number from 1 "
            "on. Something has changed the row; restore it from a backup."
        )
    if found > SCHEMA_VERSION:
        raise StorageError(
            f"The tensor tables in {without_password(rdb.engine.url)} have schema version "
            f"{found} and this version of optuna_hypergrad knows {SCHEMA_VERSION}. Install a "
            "newer optuna_hypergrad; nothing was changed."
        )
    return True
