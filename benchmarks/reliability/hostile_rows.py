"""Write garbage into the rows of a database, and watch everybody who reads it.

Each case writes garbage of every kind (``tests/garbage.py``) into one to three rows of this library's tables
or Optuna's, and then runs the public readers: ``study.optimize`` with a ``HypergradientSampler``,
``minimize_bilevel`` that resumes, ``load_tensors``, the methods of ``TensorStore`` and the command line. Each
must succeed or raise a ``HypergradError``; or, where Optuna itself cannot read its own rows, what Optuna raises.
An audit hook watches for code, programs, connections and files; a timer for hangs; and the memory is measured.

Takes 20 minutes of two cores with the default of 5,000 cases.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from _table import write_table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from hostile import MEGABYTES, READERS, SECONDS, examine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1_000_000)
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {name: Counter() for round in READERS for name in round}
    failed, num_cases = 0, 0
    for case in tqdm(_cases(options), total=options.cases):
        num_cases += 1
        for name, outcome in case["outcomes"].items():
            counts[name]["success" if outcome == "success" else "error"] += 1
        if case["failures"]:
            failed += 1
            tqdm.write(f"seed {case['seed']}: {case['spoiled']}: {case['failures']}")
    rows: list[dict[str, Any]] = [
        {"reader": n, "runs": c.total(), "success": c["success"], "typed error": c["error"]}
        for n, c in counts.items()
    ]
    total = {k: sum(row[k] for row in rows) for k in ("runs", "success", "typed error")}
    write_table(
        __file__,
        "Garbage in the database leads to success or a typed error, never to code, a hang or a memory blow-up",
        [*rows, {"reader": f"all, in {num_cases:,} cases", **total}],
        [
            f"Cases with failures: {failed} of {num_cases:,}.",
            "A failure: an error that is neither a HypergradError nor what Optuna alone raises on the same rows; "
            "code of the database run, or pickle, exec, eval, a program, a connection, or a file written "
            f"elsewhere; more than {SECONDS:g} s; more than {MEGABYTES} MB of memory.",
            "A case runs the readers of one of three rounds.",
        ],
    )
    return 1 if failed or num_cases < options.cases else 0


def _cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    end = options.seed + options.cases
    queue: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def work(first: int) -> None:
        try:
            for case in examine(first, min(first + options.batch, end)):
                queue.put(case)
        finally:
            queue.put(None)

    batches = range(options.seed, end, options.batch)
    with ThreadPoolExecutor(options.workers) as pool:
        running = [pool.submit(work, first) for first in batches]
        for _ in running:
            while (case := queue.get()) is not None:
                yield case


if __name__ == "__main__":
    sys.exit(main())
