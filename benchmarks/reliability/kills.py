"""Kill workers with SIGKILL at random, let others go on, and compare with a study that nobody disturbed.

Two kinds of work: 12 trials of a differentiable objective with tensors under ``HypergradientSampler``, and
one trial that is a run of ``minimize_bilevel`` of 12 outer steps with a checkpoint at each. A worker is a
process of its own. Half of the kills come after a delay that is uniform over the length of the work, half
when the worker is about to talk, or has just talked, to the database for the n-th time, n uniform over the
work. Each study is cut off up to twice, and then finished; its trials, values, hyperparameters, optimizer
states and checkpoints are compared bit for bit with those of the undisturbed one.

    python benchmarks/reliability/kills.py [--kills 204] [--seed 0]

takes about ten minutes on two cores and fails if any study is not what it should be.
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

import cut_off
from conftest import DATABASES

TITLES = {"trials": "trials with tensors", "run": "`minimize_bilevel` with checkpoints"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=204, help="of all rows together")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    cells = [(kind, name) for kind in DATABASES for name in cut_off.WORKS]
    least = -(-given.kills // len(cells))
    rng, rows = random.Random(given.seed), []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=least * len(cells), desc="kills", unit="kill") as bar,
    ):
        for kind, name in cells:
            rows.append(measure(kind, name, least, Path(folder), rng, bar))
    failures = sum(row["failures"] for row in rows)
    notes = [
        "failures: studies that differ from the undisturbed one in any trial, value, hyperparameter, "
        "optimizer state or checkpoint, repeated more than one outer step per kill, or left a trial of a "
        "killed worker unmarked.",
        "repeated: outer steps (for trials: evaluations) that were finished and had to be done again, "
        "in all.",
    ]
    write_table(
        __file__,
        "Killed at a random instant, a study goes on bit for bit as if it had not been; at most one outer "
        "step is done again.",
        rows,
        notes,
    )
    return int(failures > 0)


def measure(
    kind: str, name: str, least: int, folder: Path, rng: random.Random, bar: Any
) -> dict[str, Any]:
    whole = cut_off.Whole(kind, folder / kind / name / "whole", name)
    killed = studies = failed = repeated = 0
    while killed < least:
        studies += 1
        directory = folder / kind / name / str(studies)
        kills, wrong = whole.cut_off(directory, rng, 2)
        killed += kills
        failed += bool(wrong)
        repeated += whole.repeated(directory)
        bar.update(kills)
        for line in wrong:
            bar.write(f"{kind}, {name}, study {studies}: {line}")
    return {
        "database": kind,
        "work": TITLES[name],
        "kills": killed,
        "studies": studies,
        "repeated": repeated,
        "failures": failed,
    }


if __name__ == "__main__":
    raise SystemExit(main())
