"""Put NaN, infinity or minus infinity into one step of a study or a run, at a random one of six places.

The places are the inner loss, the outer loss, one entry of the hypergradient, a Hessian-vector product, the
result of the linear solver and that of the inner solver; the estimators are implicit differentiation by CG
and by a Neumann series, and unrolling. Half of the cases are studies, half are runs of
``minimize_bilevel`` with a checkpoint at every step. Whatever comes out of it must be a failed trial, a step
taken back or an error of this library; everything stored must be finite, and what follows must succeed.

Takes some minutes.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

import optuna
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import poisons
from _table import write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    r = random.Random(args.seed)
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    notes: list[str] = []
    for i in tqdm(range(args.count), desc="NaN"):
        what, poison = list(poisons.SURVIVES)[i % 2], poisons.Poison.draw(r)
        try:
            found = poisons.SURVIVES[what](poison)
        except Exception as error:
            found = [repr(error)]
        counts[poison.place] += 1
        failures[poison.place] += bool(found)
        notes += [f"{what}, {poison}: {f}" for f in found[:1]]
    rows = [
        {"place": place, "cases": counts[place], "failures": failures[place]}
        for place in poisons.PLACES
    ]
    write_table(
        __file__, "NaN and infinity: what is stored stays finite, and it goes on", rows, notes
    )
    sys.exit(any(failures.values()))


if __name__ == "__main__":
    main()
