"""What a checkpoint costs, next to writing the same bytes to a file with fsync.

``TensorStore.save`` of one float32 tensor into SQLite as Optuna opens it (rollback journal,
``synchronous=FULL``), into a trial that has none yet (fresh) and in place of the one before (overwriting);
for information also with ``journal_mode=WAL``. Each save is paired with a file written in the same moment,
in turn before and after it; the ratio is the median of the pairs. It is to be at most 2 with Optuna's
settings. Beside it the same bytes in the same rows, written by Python's ``sqlite3`` and nothing else: where a
disk is fast, that alone is more than 2.

Takes some minutes, and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
import torch
from optuna.storages import RDBStorage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from _table import write_table

import optuna_hypergrad as ohg
from optuna_hypergrad.stores.rdb import CHUNK_BYTES

LIMIT = 2.0


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def write_file(path: Path, data: Any) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, data: Any) -> None:
    """Into a database of their own, in one transaction, as ``TensorStore`` cuts them."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA secure_delete=FAST")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS t (a TEXT, k INTEGER, d BLOB, PRIMARY KEY (a, k))"
    )
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM t")
    for k, start in enumerate(range(0, len(data), CHUNK_BYTES)):
        connection.execute(
            "INSERT INTO t VALUES ('a', ?, ?)", (k, data[start : start + CHUNK_BYTES])
        )
    connection.execute("COMMIT")
    connection.close()


def measure(
    directory: Path, megabytes: int, wal: bool, pairs: int, bar: tqdm
) -> dict[str, list[tuple[float, float, float]]]:
    """Seconds of (save, file, rows by sqlite3 alone) for fresh and overwriting saves."""
    storage = RDBStorage(f"sqlite:///{directory}/{megabytes}{wal}.db")
    if wal:
        with storage.engine.connect() as connection:
            connection.execute(sa.text("PRAGMA journal_mode=WAL"))
    study = optuna.create_study(storage=storage)
    store, tensor = ohg.TensorStore.of_study(study), torch.rand(megabytes * 250_000)
    data, path = memoryview(tensor.numpy()).cast("B"), directory / "plain"
    rows = directory / "rows.db"
    found: dict[str, list[tuple[float, float, float]]] = {"fresh": [], "overwriting": []}
    trial = study.ask()
    store.save(study._study_id, trial._trial_id, "t", "value", 0, {"": tensor[:10]})  # the tables
    for i in range(pairs):
        for how in found:
            if how == "fresh":
                trial = study.ask()
                path.unlink(missing_ok=True)
                rows.unlink(missing_ok=True)
            trial_id = trial._trial_id

            def save(trial_id: int = trial_id, step: int = i) -> None:
                store.save(study._study_id, trial_id, "t", "checkpoint", step, {"": tensor})

            def plain() -> None:
                write_file(path, data)

            def bare() -> None:
                write_rows(rows, data)

            took = {f: seconds(f) for f in ((save, plain, bare) if i % 2 else (bare, plain, save))}
            found[how].append((took[save], took[plain], took[bare]))
            bar.update()
        store.discard(*store.pointers(study.trials[trial.number], role="checkpoint"))
    storage.engine.dispose()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[4, 400])
    parser.add_argument("--pairs", type=int, nargs="+", default=[30, 5])
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    rows = []
    failed = False
    with (
        tempfile.TemporaryDirectory() as directory,
        tqdm(total=4 * sum(args.pairs), desc="checkpoint cost") as bar,
    ):
        for megabytes, pairs in zip(args.megabytes, args.pairs, strict=True):
            for wal in (False, True):
                for how, times in measure(Path(directory), megabytes, wal, pairs, bar).items():
                    ratio = statistics.median(a / b for a, b, _ in times)
                    failed |= ratio > LIMIT and not wal
                    rows.append(
                        {
                            "MB": megabytes,
                            "SQLite": "WAL" if wal else "as Optuna opens it",
                            "save": how,
                            "pairs": len(times),
                            "save, ms": 1e3 * statistics.median(a for a, _, _ in times),
                            "file, ms": 1e3 * statistics.median(b for _, b, _ in times),
                            "ratio": ratio,
                            "sqlite3 alone / file": statistics.median(c / b for _, b, c in times),
                            "failures": int(ratio > LIMIT) if not wal else "-",
                        }
                    )
    load = os.getloadavg()[0]
    notes = [f"Load average of the {os.cpu_count()} cores at the end: {load:.1f}."]
    write_table(
        __file__, "A checkpoint costs at most twice its bytes in a file with fsync", rows, notes
    )
    sys.exit(failed)


if __name__ == "__main__":
    main()
