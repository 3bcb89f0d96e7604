"""Studies that are copied, renamed in optuna-dashboard, deleted, and retried by Optuna's heartbeat.

Runs ``tests/test_copies.py`` and ``tests/test_heartbeat.py`` on SQLite, PostgreSQL and MariaDB. Takes a minute
on two idle cores.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from _table import write_table
from host_conformance import TESTS, outcome
from tqdm import tqdm

DATABASES = ("sqlite", "postgresql", "mariadb")
EVENTS = {
    "copied by copy_study, then the first one deleted": "-copied]",
    "renamed in optuna-dashboard": "-renamed]",
    "deleted, then swept": "deleted_study",
    "copied to or from another storage": "another_storage",
    "worker killed, retried by the heartbeat": "retried_trial",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    chosen = parser.parse_args().databases
    rows: list[dict[str, Any]] = []
    names, failed = set[str](), set[str]()
    for file in tqdm(("test_copies.py", "test_heartbeat.py")):
        found = outcome(str(TESTS / file), "-k", " or ".join(chosen))
        names, failed = names | found[0], failed | found[1]
    for event, word in EVENTS.items():
        for database in chosen:
            here = {n for n in names | failed if word in n and database in n}
            row = {"study": event, "database": database, "tests": len(here)}
            rows.append({**row, "failures": len(here & failed)})
    write_table(
        __file__,
        "Tensors follow a study that is copied or renamed, and go with one that is deleted",
        rows,
        [
            "Under a new name, tensors of every trial are the same bits, also after a sweep, and the study goes on.",
            "Of a deleted study, a dry run lists exactly its blobs, and a sweep leaves none.",
            "Tensors are not copied to another storage: an error says so in a sentence, and the copy goes on.",
            "The retried trial ends in the same bits as one that was not killed.",
        ],
    )
    return int(bool(failed) or any(row["tests"] == 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
