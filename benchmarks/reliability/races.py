"""Let many processes want the next step of one trajectory at once, and let owners of a step be late.

Races: three processes, released by a barrier, each ask for a trial of a study that has one trajectory to go on
with. Exactly one may get its next step; it takes it, the others give their trials back, and the next race is
for the step after that one.

Paused owners: a process is stopped (SIGSTOP) at a random moment of its trial at which it has no transaction
open, for longer than its lease. A successor does the step, and the owner is woken up (SIGCONT): it must be
refused, and nothing that is stored may have changed.

    python benchmarks/reliability/races.py [--races 1000] [--paused 50] [--racers 3] [--seed 0]

takes about ten minutes on two cores and fails if any step had two owners, or none.
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

from conftest import DATABASES
from crowds import PausedOwners, races_with_no_single_winner

A_STUDY = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--races", type=int, default=1000, help="over all databases")
    parser.add_argument("--paused", type=int, default=50, help="owners, over all databases")
    parser.add_argument("--racers", type=int, default=3, help="processes in a race")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, rows = random.Random(given.seed), []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=given.races + given.paused, desc="races and paused owners") as bar,
    ):
        for i, kind in enumerate(DATABASES):
            races = share(given.races, i)
            paused = share(given.paused, i)
            rows.append(hold_races(kind, races, given.racers, Path(folder), bar))
            rows.append(pause_owners(kind, paused, rng, Path(folder), bar))
    write_table(
        __file__,
        "Exactly one worker owns a trajectory's next step, and an owner who was taken over can write nothing.",
        rows,
        [
            f"races: {given.racers} processes want the same step. failures: races that not exactly one of "
            "them won, and studies in which a step was taken twice or a trial was lost.",
            "paused owners: stopped for longer than their lease. failures: those that were not refused, "
            "or changed what was stored, or whose step was not done by the successor.",
        ],
    )
    return int(any(row["failures"] for row in rows))


def share(total: int, i: int) -> int:
    return total * (i + 1) // len(DATABASES) - total * i // len(DATABASES)


def hold_races(kind: str, races: int, racers: int, folder: Path, bar: Any) -> dict[str, Any]:
    failed = held = 0
    while held < races:
        count = min(A_STUDY, races - held)
        directory = folder / kind / f"races {held}"
        bad, wrong = races_with_no_single_winner(kind, directory, racers, count)
        failed += max(bad, bool(wrong))
        held += count
        bar.update(count)
        for line in wrong:
            bar.write(f"{kind}: {line}")
    return {"database": kind, "what": "races", "count": held, "failures": failed}


def pause_owners(
    kind: str, count: int, rng: random.Random, folder: Path, bar: Any
) -> dict[str, Any]:
    owners = PausedOwners(kind, folder / kind / "paused")
    failed = paused = 0
    while paused < count:
        late, wrong = owners.pause(rng)
        paused += late
        failed += bool(wrong)
        bar.update(late)
        for line in wrong:
            bar.write(f"{kind}: {line}")
    return {"database": kind, "what": "paused owners", "count": paused, "failures": failed}


if __name__ == "__main__":
    raise SystemExit(main())
