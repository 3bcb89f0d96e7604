"""The k-th statement that writes into a database fails, once."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faults
import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage

WRITES = ("INSERT", "UPDATE", "DELETE", "CREATE")
CAUSES = ("disk I/O error", "database or disk is full", "unable to open database file")
STEPS = 13
ENTRIES = 50


def new_database(template: Path, directory: Path) -> Path:
    """A copy of ``template``, which is made on first use: Optuna takes half a second for its tables."""
    if not template.exists():
        RDBStorage(f"sqlite:///{template}").engine.dispose()
    shutil.copy(template, directory / "study.db")
    return directory / "study.db"


def open_database(path: Path) -> RDBStorage:
    storage = RDBStorage(f"sqlite:///{path}", skip_table_creation=True)

    def without_waiting_for_the_disk(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    sa.event.listen(storage.engine, "connect", without_waiting_for_the_disk)
    return storage


class WriteError(Exception):
    """No write has failed, though one should have."""


@contextmanager
def failing(storage: RDBStorage, k: int, writes: str | tuple[str, ...] = WRITES) -> Iterator[None]:
    """Have the ``k``-th of the ``writes`` of ``storage`` fail, counted from 1.

    Raises:
        WriteError: at the end, if there were fewer.
    """
    lock, count = threading.Lock(), 0

    def count_and_fail(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        nonlocal count
        if statement.lstrip().upper().startswith(writes):
            with lock:
                count += 1
                now = count == k
            if now:
                cause = sqlite3.OperationalError(CAUSES[k % len(CAUSES)])
                raise sa.exc.OperationalError(statement, parameters, cause) from cause

    sa.event.listen(storage.engine, "before_cursor_execute", count_and_fail)
    try:
        yield
    finally:
        sa.event.remove(storage.engine, "before_cursor_execute", count_and_fail)
    if count < k:
        raise WriteError(f"there were {count} writes, and {k} wanted")


def _fails(
    study: optuna.Study,
    objective: Any,
    trials: int,
    k: int,
    writes: str | tuple[str, ...] = WRITES,
) -> list[str]:
    """Run until the ``k``-th write has failed; what is wrong with how it did."""
    with failing(study._storage._backend, k, writes):
        try:
            study.optimize(objective, n_trials=trials)
        except Exception as error:
            seen: BaseException | None = error
            while seen is not None and not isinstance(seen, sqlite3.OperationalError):
                seen = seen.__cause__ or seen.__context__
            return [] if seen is not None else [f"another error: {error!r}"]
    return []  # tried again, by Optuna or here


def study_with_failing_write(
    path: Path, k: int, writes: str | tuple[str, ...] = WRITES
) -> list[str]:
    """Trials with tensors, of which one write fails, and further trials; what was wrong.

    They go on in the same study object where ``k`` is even, and in a new one where it is odd.
    """
    study = faults.study_in(open_database(path))
    wrong = _fails(study, faults.small_objective, STEPS, k, writes)
    faults.stored(study)
    if k % 2:
        study._storage._backend.engine.dispose()
        study = faults.study_in(open_database(path))
    for _ in range(STEPS):
        missing = STEPS - len(faults.steps_of(study))
        if missing > 0:
            study.optimize(faults.small_objective, n_trials=missing)
    wrong += faults.differences(study, faults.whole_study(16, ENTRIES))
    faults.stored(study)
    if any(t.state.name == "RUNNING" for t in study.trials):
        wrong.append("a trial is running for ever")
    study._storage._backend.engine.dispose()
    return wrong


def run_with_failing_write(path: Path, k: int) -> list[str]:
    """A run with checkpoints, of which one write fails, continued; what was wrong."""
    study = faults.study_in(open_database(path))
    run = faults.Run(STEPS, entries=ENTRIES)
    wrong = _fails(study, run, 1, k)
    faults.stored(study)
    done = len(run.begun)
    if k % 2:
        study._storage._backend.engine.dispose()
        study = faults.study_in(open_database(path))
    wrong += faults.retry(study, run)
    if len(run.begun) > STEPS - done + 3:
        wrong.append(f"{len(run.begun)} steps of {STEPS} were done again after {done}")
    faults.stored(study)
    if any(t.state.name == "RUNNING" for t in study.trials):
        wrong.append("a trial is running for ever")
    study._storage._backend.engine.dispose()
    return wrong


WITH_FAILING_WRITE = {"study": study_with_failing_write, "run": run_with_failing_write}
