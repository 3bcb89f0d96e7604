"""Drive hyperparameters against their bounds and look at every value that is given out or stored.

A case is a range for each of three hyperparameters (decimal, logarithmic, a few units in the last place
wide, denormal, huge, half open, ...), a dtype (float64, float32, bfloat16, float16), an optimizer and a kind
of gradients (steep, flat, of mixed size, NaN). Most cases drive the rules and the domains directly: numbers
and tensors along a trajectory, and the outer loop of ``minimize_bilevel``. A share (``--studies``) are whole
studies in memory with ``suggest_float``, ``suggest_tensor`` and ``suggest_tensor_like``, in which
``trial.params`` and what ``load_tensors`` gives are looked at too. All are compared as float64, exactly.

Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import optuna
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import boundaries
from _table import write_table

_BATCH = 100


def batch(layer: str, seed: int, count: int) -> list[str]:
    """What went wrong in ``count`` cases."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    r = random.Random(f"{layer} {seed}")
    wrong = []
    for _ in range(count):
        case = boundaries.Case.draw(r)
        try:
            found = boundaries.LAYERS[layer](case)
        except Exception as error:
            found = [repr(error)]
        wrong += [f"{layer}, {case}: {found[0]}"] if found else []
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=28_000)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--studies", type=int, default=2_000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    counts = dict(zip(boundaries.LAYERS, (args.trajectories, args.runs, args.studies), strict=True))
    rows, notes = [], []
    with (
        ProcessPoolExecutor(args.processes) as pool,
        tqdm(total=sum(counts.values()), desc="bounds") as bar,
    ):
        for layer, count in counts.items():
            sizes = [min(_BATCH, count - i) for i in range(0, count, _BATCH)]
            wrong: list[str] = []
            for size, found in zip(
                sizes, pool.map(batch, [layer] * len(sizes), range(len(sizes)), sizes), strict=True
            ):
                wrong += found
                bar.update(size)
            rows.append({"driven": layer, "cases": count, "failures": len(wrong)})
            notes += wrong[:10]
    write_table(
        __file__, "Every value that is given out or stored is within its bounds", rows, notes
    )
    sys.exit(any(row["failures"] for row in rows))


if __name__ == "__main__":
    main()
