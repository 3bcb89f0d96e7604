"""Have the k-th statement that writes into the database fail, for each k from 1 to ``--last``.

Once in a study whose trials have tensors, and once in a run with a checkpoint at every step, in SQLite. Then
the study goes on: in the same process for even k, with everything opened anew for odd k. All that trials
point to must be sound at once after the failure and at the end, no trial may be left running, and the
numbers must be those of a study that nothing happened to, bit for bit. The error is, in turn, an I/O error,
a full disk, and a file that cannot be opened.

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
import failing_writes
from _table import write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--last", type=int, default=100)
    last = parser.parse_args().last
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    rows, notes = [], []
    with tqdm(total=last * len(failing_writes.WITH_FAILING_WRITE), desc="k-th write") as bar:
        for what, run in failing_writes.WITH_FAILING_WRITE.items():
            count = failures = 0
            for k in range(1, last + 1):
                bar.update()
                with tempfile.TemporaryDirectory() as directory:
                    template = Path(tempfile.gettempdir()) / f"kth-write-{optuna.__version__}.db"
                    path = failing_writes.new_database(template, Path(directory))
                    try:
                        wrong = run(path, k)
                    except failing_writes.WriteError as error:
                        notes.append(f"{what}, k = {k}: {error}")
                        break
                count += 1
                failures += bool(wrong)
                notes += [f"{what}, k = {k}: {w}" for w in wrong]
            rows.append(
                {"of what": what, "k": f"1 to {count}", "count": count, "failures": failures}
            )
    claim = "The k-th write fails: what was stored is sound, and it goes on to the same numbers"
    write_table(__file__, claim, rows, notes)
    sys.exit(any(row["failures"] or row["count"] < last for row in rows))


if __name__ == "__main__":
    main()
