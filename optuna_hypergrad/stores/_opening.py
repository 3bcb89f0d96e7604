"""A storage that exists, opened to look at it: nothing is created, and no migration is run."""

from __future__ import annotations

import sqlite3
import urllib.parse
from pathlib import Path

import optuna
import sqlalchemy as sa
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from .._errors import StorageError
from ._retrying import causes, is_busy
from ._secrets import Secrets, without_password

_TABLES = ("studies", "trials")
_VERSIONS = ("version_info", "alembic_version")
_SQLITE = b"SQLite format 3\0"


def open_existing(location: str) -> BaseStorage:
    """The storage at a SQLAlchemy URL, or in a Journal file.

    Raises:
        StorageError: if there is none, it cannot be reached, or this version of Optuna cannot read
            it. No password is in the message.
    """
    if "://" in location:
        return _open_database(location)
    return _open_journal(Path(location))


def reason(error: Exception) -> str:
    """What went wrong, in one line: of a database's error, what its driver said."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, sa.exc.DBAPIError):
        cause = cause.__cause__
    original = getattr(cause, "orig", None) or error
    numbered = len(original.args) == 2 and isinstance(original.args[0], int)  # MySQL, OSError
    text = str(original.args[1] if numbered else original)
    return " ".join(text.split()).rstrip(".?!") or type(error).__name__


def is_damaged_file(error: Exception) -> bool:
    """Whether SQLite has found a page that is not what it must be."""
    return any(
        isinstance(e, sqlite3.DatabaseError) and "malformed" in str(e).lower()
        for e in causes(error)
    )


def how_to_recover(shown: str) -> str:
    """What to say of a file for which :func:`is_damaged_file` holds."""
    return (
        f"The file of the database {shown!r} is damaged: a page of it is not what SQLite wrote (database disk "
        "image is malformed). Stop all workers, copy the file, and save what can be read with `sqlite3 "
        "study.db .recover | sqlite3 recovered.db`, or restore a backup."
    )


def _open_journal(path: Path) -> BaseStorage:
    if path.is_dir():
        raise StorageError(f"{str(path)!r} is a directory. Give a Journal file, or a database URL.")
    try:
        with open(path, "rb") as file:
            if file.read(len(_SQLITE)) == _SQLITE:
                url = f"sqlite:///{path.absolute()}"
                raise StorageError(f"{str(path)!r} is an SQLite database. Give its URL, {url!r}.")
    except OSError as error:
        raise StorageError(
            f"There is no Journal file {str(path)!r} that can be read ({reason(error)}). Give the path "
            "of one, or the URL of a database (sqlite:///study.db)."
        ) from error
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except Exception as error:  # whatever the lines of the file may be
        raise StorageError(
            f"{str(path)!r} is not a Journal file, or it is damaged ({type(error).__name__}: "
            f"{reason(error)}). Give another file, or use a backup."
        ) from error


def _open_database(url: str) -> BaseStorage:
    shown, secrets = without_password(url), Secrets(url)
    problem: str
    try:
        parsed = sa.engine.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        # Not chained: the error that is being handled quotes the URL, or a part of it.
        raise StorageError(
            f"{shown!r} cannot be read as a URL. Write dialect+driver://user:password@host/database, "
            "with %40 for @, %3A for : and %2F for / inside the password."
        ) from None
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed, shown)
    try:
        _check_tables(url, shown)
        return optuna.storages.get_storage(RDBStorage(url, skip_table_creation=True))
    except sa.exc.NoSuchModuleError:
        problem = f"SQLAlchemy knows no database {parsed.drivername!r}"
    except ImportError as error:
        problem = (
            f"its driver is not installed ({secrets.hide(reason(error))}). For PostgreSQL, install "
            "psycopg and write postgresql+psycopg://; for MySQL and MariaDB, pymysql and mysql+pymysql://"
        )
    except (sa.exc.SQLAlchemyError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        if is_damaged_file(error):
            raise StorageError(how_to_recover(shown)) from None
        if is_busy(error):
            raise StorageError(
                f"Another process has been writing to {shown!r} for so long that it cannot be opened. Nothing is wrong "
                "with it: try again."
            ) from None
        is_file = parsed.get_backend_name() == "sqlite"
        advice = "Check the file" if is_file else "Check the URL, and that the server runs"
        problem = f"{secrets.hide(reason(error))}. {advice}"
    raise StorageError(f"The storage {shown!r} cannot be opened: {problem}.")


def _check_file(url: sa.engine.URL, shown: str) -> None:
    database = url.database or ""
    if database in ("", ":memory:"):
        raise StorageError(
            f"{shown!r} is a database in memory, which holds nothing. Give the file of one: "
            "sqlite:///study.db."
        )
    path = Path(database)
    if database.startswith("file:"):
        path = Path(urllib.parse.unquote(urllib.parse.urlsplit(database).path))
    if not path.is_file():
        raise StorageError(
            f"There is no file {str(path.absolute())!r}. Check the path: sqlite:/// is followed by a "
            "relative one, sqlite://// by an absolute one."
        )


def _check_tables(url: str, shown: str) -> None:
    """Optuna writes its tables and their versions wherever they are missing: refuse to let it."""
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            present = set(sa.inspect(connection).get_table_names())
            if not present.issuperset(_TABLES):
                raise StorageError(
                    f"There are no Optuna studies in {shown!r}, and nothing was created. Check the URL."
                )
            if not all(
                table in present
                and connection.execute(sa.text(f"SELECT COUNT(*) FROM {table}")).scalar()
                for table in _VERSIONS
            ):
                raise StorageError(
                    f"The tables in {shown!r} have no version: another version of Optuna, or a worker "
                    "that was cut off, made them. Open it with optuna.load_study once; nothing was changed."
                )
    finally:
        engine.dispose()
