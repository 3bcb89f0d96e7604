"""Fill the place where a study lives, in three ways, and see what is left and how it goes on.

A study of trials with tensors, and a run with a checkpoint at every step, each in SQLite and in a Journal
file with its directory of tensors, run out of room: by SQLite's page limit, by the file-size limit of the
process, and on a tmpfs of 4 MB. Whatever room is left (``--rooms``, bytes), the error must be clear,
everything that was stored must still be there bit for bit, and when there is room again the study must go
on to the same numbers as one that nothing happened to. Where not even Optuna's own rows have room, the
error is Optuna's.

Takes about a minute. Needs to be root for the tmpfs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import optuna
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import faults
from _table import write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", type=int, nargs="+", default=[0, 5_000, 20_000, 40_000, 60_000])
    parser.add_argument("--repeats", type=int, default=2)
    rooms, repeats = (args := parser.parse_args()).rooms, args.repeats
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    cases = [
        (place, kind, what, room)
        for place in faults.PLACES.values()
        for kind in place.kinds
        for what in faults.WITHOUT_ROOM
        for room in rooms * repeats
    ]
    counts: Counter[tuple[str, str, str]] = Counter()
    wrong: Counter[tuple[str, str, str]] = Counter()
    notes: list[str] = []
    for place, kind, what, room in tqdm(cases, desc="disk full"):
        key = place.name, kind, what
        with tempfile.TemporaryDirectory() as directory:
            try:
                opened = place(Path(directory))
            except faults.UnavailableError as error:
                notes.append(f"{place.name}: {error}")
                continue
            try:
                found = faults.WITHOUT_ROOM[what](opened, kind, room)
            finally:
                opened.close()
        counts[key] += 1
        wrong[key] += bool(found)
        notes += [f"{' / '.join(key)}, {room} bytes: {f}" for f in found]
    rows = [
        {"way": p, "store": k, "of what": w, "times without room": n, "failures": wrong[p, k, w]}
        for (p, k, w), n in counts.items()
    ]
    claim = (
        "Without room the error is clear, nothing stored is lost, and it goes on when there is room"
    )
    write_table(__file__, claim, rows, sorted(set(notes)))
    sys.exit(bool(wrong.total()) or len({p for p, _, _ in counts}) < len(faults.PLACES))


if __name__ == "__main__":
    main()
