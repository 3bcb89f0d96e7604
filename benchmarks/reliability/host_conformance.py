"""Optuna's own tests of a storage, on databases in which there are a study and tensors of ours.

Runs ``tests/storage_conformance.py`` (a study of ours is filled in first, hidden from lists of studies, and
compared in the end) on SQLite, PostgreSQL, MariaDB and the gRPC proxy: on a plain database, on one with our
study, and through RetryingStorage. Takes about five minutes. A test that fails on the plain database too is
Optuna's own: MariaDB keeps no microseconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from _table import write_table
from tqdm import tqdm

TESTS = Path(__file__).parents[2] / "tests"
KINDS = {"SQLite": "SQLite", "PostgreSQL": "PostgreSQL", "MariaDB": "MariaDB", "Grpc": "gRPC"}
VARIANTS = {"Plain": "plain", "": "with our study", "Retrying": "with our study, RetryingStorage"}


def outcome(name: str) -> tuple[int, set[str]]:
    """How many tests of a class were run, and which of them failed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        where = f"{TESTS / 'storage_conformance.py'}::{name}"
        command = [sys.executable, "-m", "pytest", "-q", "--junit-xml", str(report), where]
        done = subprocess.run(
            command, cwd=TESTS.parent, capture_output=True, text=True, check=False
        )
        if not report.exists():
            raise SystemExit(f"{name} could not be run:\n{done.stdout}{done.stderr}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {
        str(c.get("name"))
        for c in cases
        if any(c.find(t) is not None for t in ("failure", "error"))
    }
    return sum(c.find("skipped") is None for c in cases), failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    chosen = parser.parse_args().kinds
    rows: list[dict[str, Any]] = []
    failures = 0
    with tqdm(total=len(chosen) * len(VARIANTS)) as bar:
        for kind in chosen:
            on_plain: set[str] = set()
            for variant, shown in VARIANTS.items():
                count, failed = outcome(f"Test{variant}{kind}")
                on_plain = failed if variant == "Plain" else on_plain
                ours = failed - on_plain
                failures += len(ours) + (count == 0)
                rows.append(
                    {
                        "storage": KINDS[kind],
                        "database": shown,
                        "tests": count,
                        "failures": len(failed),
                        "failures that a plain database does not have": len(ours),
                    }
                )
                bar.update()
    write_table(
        __file__,
        "Optuna's StorageTestCase passes on databases that carry our studies and tensors",
        rows,
        [
            "In the end our study and its tensors are compared bit for bit with what they were.",
            "The gRPC proxy stands before PostgreSQL; the tests of the order of parameters are left out, "
            "because a protobuf map has none.",
            "What fails on a plain MariaDB: four tests that compare times, which it keeps without microseconds.",
        ],
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
