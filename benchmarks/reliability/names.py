"""Give studies, numbers, tensors and entries of dicts of tensors every kind of name.

Each example is a study with three or four odd names, made by hypothesis. It is optimized for a trial by one
sampler and for another one by a new sampler, its tensors are loaded, it is shown by the command line, and it is
deleted. Every name must come back as it was; or this library or Optuna must refuse it, with an error that names it
and before a tensor is stored.

Takes 20 minutes on one core with the default of 5,000 names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from _table import write_table
from optuna.storages import RDBStorage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from hypothesis import HealthCheck, Phase, given, settings
from naming import Names, all_names, try_names
from servers import SERVERS
from specimen import Specimen, command_in_haste, opened


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=5_000, help="on SQLite")
    parser.add_argument("--on-servers", type=int, default=300, help="on each server")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    rows = []
    for kind in ("sqlite", *SERVERS):
        count = options.names if kind == "sqlite" else options.on_servers
        with _storage(kind) as storage, command_in_haste():
            found = _try(kind, storage, count)
        outcomes = ("stored", "refused", "failures")
        rows.append({"database": kind, "names": found.total(), **{o: found[o] for o in outcomes}})
    write_table(
        __file__,
        "Any text is a name and comes back as it was, or is refused before anything is stored under it",
        rows,
        [
            "names: odd ones, three or four in a study, in any of seven places; counted with what became of their "
            "study.",
            "refused: by this library (no UTF-8 encoding, empty, reserved, longer than an attribute) or by Optuna "
            "(longer than a column, NUL on PostgreSQL, more than the character set of MariaDB's default).",
        ],
    )
    return 1 if any(row["failures"] for row in rows) else 0


def _try(kind: str, storage: RDBStorage, count: int) -> Counter[str]:
    found = Counter[str]()
    bar = tqdm(total=count, desc=kind)

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(all_names())
    def check(names: Names) -> None:
        if found.total() >= count:
            return
        try:
            outcome = try_names(storage, names)
        except Exception as error:
            tqdm.write(f"{kind}: {names}: {error!r}"[:2000])
            outcome = "failures"
        found[outcome] += names.num_odd
        bar.update(names.num_odd)

    check()
    bar.close()
    return found


@contextmanager
def _storage(kind: str) -> Iterator[RDBStorage]:
    with tempfile.TemporaryDirectory() as directory:
        if kind == "sqlite":
            with opened(Specimen(Path(directory)).path) as storage:
                yield storage
            return
        server = SERVERS[kind]()
        try:
            storage = RDBStorage(server.new_database())
            Specimen.fill(Specimen.__new__(Specimen), storage)
            yield storage
            storage.engine.dispose()
        finally:
            server.close()


if __name__ == "__main__":
    sys.exit(main())
