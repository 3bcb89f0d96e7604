"""Many worker processes on one study, some of them killed: count what is lost, doubled, or left behind.

Each worker does its trials of a differentiable objective with a number, a tensor and a setting, under
``HypergradientSampler``. Killed ones (SIGKILL, at random) are replaced by new processes that do the rest.
Afterwards one more trial runs, and every trial is looked at: numbers without gaps, as many completed trials
as were asked for, each evaluated once, each a step of a trajectory, no step taken twice, none left running.

    python benchmarks/reliability/workers.py [--rows sqlite:16x20,postgresql:32x25,...] [--kills 50] [--seed 0]

takes about ten minutes on two cores and fails if anything is wrong. ``--kills`` is for all rows together.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from _table import write_table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from crowds import Crowd

ROWS = "sqlite:16x20,postgresql:32x25,mariadb:16x20,grpc:16x20"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=ROWS, help="storage:workersxtrials, with commas")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cells = given.rows.split(",")
    rng, rows = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as folder:
        for i, cell in enumerate(tqdm(cells, desc="studies")):
            kills = given.kills * (i + 1) // len(cells) - given.kills * i // len(cells)
            rows.append(measure(cell, kills, Path(folder), rng))
    notes = [
        "failures: trials lost or doubled, steps taken twice, completed trials without a place in a "
        "trajectory, workers that ended with an error or not at all.",
        "zombies: trials still running after one more trial, which takes those that were killed in the moment "
        "before they had a lease for a minute old.",
        "Every worker opens its storage as a RetryingStorage, which waits where SQLite is locked.",
    ]
    claim = (
        "Whatever becomes of the workers, no trial is lost, none doubled, and no step taken twice."
    )
    write_table(__file__, claim, rows, notes)
    return int(any(row["failures"] or row["zombies"] for row in rows))


def measure(cell: str, kills: int, folder: Path, rng: random.Random) -> dict[str, Any]:
    kind, size = cell.split(":")
    workers, trials = map(int, size.split("x"))
    crowd = Crowd(kind, folder / cell, workers, trials, kills)
    wrong = crowd.run(rng)
    for line in wrong:
        tqdm.write(f"{cell}: {line}")
    everything = crowd.study.get_trials(deepcopy=False)
    return {
        "storage": kind,
        "workers x trials": f"{workers} x {trials}",
        "completed": sum(t.state.name == "COMPLETE" for t in everything) - 1,
        "kills": crowd.killed,
        "failures": len(wrong),
        "zombies": sum(not t.state.is_finished() for t in everything),
    }


if __name__ == "__main__":
    raise SystemExit(main())
