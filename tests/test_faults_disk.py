"""There is no room left: a clear error, nothing lost, and on it goes when there is.

The full counts are those of ``benchmarks/reliability/disk_full.py``.
"""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import faults
import optuna
import pytest
import sqlalchemy as sa
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import optuna_hypergrad as ohg
from optuna_hypergrad import NoSpaceError
from optuna_hypergrad.stores import saying_what_has_no_room
from optuna_hypergrad.stores._full import is_full


@pytest.mark.parametrize("what", faults.WITHOUT_ROOM)
@pytest.mark.parametrize("place", ["page limit", "file-size limit"])
def test_no_room_is_said_and_nothing_is_lost(what: str, place: str, tmp_path: Path) -> None:
    kind = "sqlite" if place == "page limit" else "journal"
    assert not faults.WITHOUT_ROOM[what](faults.PLACES[place](tmp_path), kind, 40_000)


def test_half_a_line_in_a_journal_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "study.log"

    def opened(kind: type[JournalFileBackend]) -> optuna.Study:
        return faults.study_in(JournalStorage(kind(str(path))))

    opened(JournalFileBackend).optimize(faults.objective, n_trials=2)
    with open(path, "ab") as file:
        file.write(b'{"op_code": 4, "worker_id": ' + b"1" * 100_000)
    opened(ohg.AtomicJournalFileBackend).optimize(faults.objective, n_trials=2)
    assert not faults.differences(opened(JournalFileBackend), faults.whole_study(16))


class DriverError(Exception):
    """What a server's driver raises."""


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (sqlite3.OperationalError("database or disk is full"), True),
        (sqlite3.OperationalError("disk I/O error"), True),
        (sqlite3.OperationalError("database is locked"), False),
        (DriverError(1114, "The table 'hypergrad_chunks' is full"), True),
        (DriverError(1021, "Disk full"), True),
        (DriverError(1030, 'Got error 28 "No space left on device" from storage engine'), True),
        (DriverError(1030, 'Got error 168 "Unknown" from storage engine'), False),
        (DriverError(1205, "Lock wait timeout exceeded"), False),
    ],
    ids=str,
)
def test_what_counts_as_no_room(error: Exception, full: bool) -> None:
    wrapped = error
    if isinstance(error, (sqlite3.Error, DriverError)):
        wrapped = sa.exc.OperationalError("INSERT", {}, error)
    assert is_full(wrapped) == full
    with pytest.raises(NoSpaceError if full else type(wrapped)), saying_what_has_no_room("It"):
        raise wrapped


def test_postgresql_says_no_room_by_its_code() -> None:
    error = DriverError("could not extend file")
    error.sqlstate = "53100"
    assert is_full(sa.exc.OperationalError("INSERT", {}, error))
