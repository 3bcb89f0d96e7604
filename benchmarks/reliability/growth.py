"""The size of the database over many checkpoints under the default retention: it stops growing.

One run of ``minimize_bilevel`` with a checkpoint at every outer step, and a study whose trials have tensors,
both in SQLite, whose file is looked at on the way. A checkpoint replaces the last but one, so the run's
database must not grow by more than the history that each checkpoint carries; the study keeps the newest and
best trials' tensors and those of every tenth, so it grows by a tenth of the tensors, plus Optuna's rows.

Takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import optuna
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import growing
from _table import write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", type=int, nargs="+", default=[100, 300, 1000])
    at = parser.parse_args().at
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    rows = []
    for what, sizes_of in growing.SIZES.items():
        with tempfile.TemporaryDirectory() as directory, tqdm(total=at[-1], desc=what) as bar:
            sizes = sizes_of(Path(directory), at, bar.update)
        rows.append(
            {
                "of what": what,
                "count": at[-1],
                **{f"MB after {n}": size / 1e6 for n, size in zip(at, sizes, strict=True)},
                "MB if all were kept": growing.everything(what, at[-1]) / 1e6,
                "failures": len(growing.too_large(what, at, sizes)),
            }
        )
    write_table(__file__, "Under the default retention the database stops growing", rows)
    sys.exit(any(row["failures"] for row in rows))


if __name__ == "__main__":
    main()
