"""How large a database gets while it is written to again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import failing_writes
import faults

import optuna_hypergrad as ohg

ENTRIES = 5_000
TENSOR = 4 * ENTRIES
ROWS = 8_000
"""Bytes of Optuna's and our rows for one trial, at most; or of one step in the history of a run."""


def of_run(directory: Path, at: Sequence[int], done: Callable[[], object]) -> list[int]:
    """Sizes of the file after so many checkpoints of one run."""
    path = failing_writes.new_database(directory / "empty.db", directory)
    study = faults.study_in(failing_writes.open_database(path))
    run, sizes = faults.Run(at[-1], entries=ENTRIES), {0: 0}

    def look(step: int) -> None:
        done()
        sizes[step] = path.stat().st_size

    run.at = look
    study.optimize(run, n_trials=1)
    sizes[at[-1]] = path.stat().st_size
    study._storage._backend.engine.dispose()
    return [sizes[n] for n in at]


def of_study(directory: Path, at: Sequence[int], done: Callable[[], object]) -> list[int]:
    """Sizes of the file after so many trials with tensors."""
    path = failing_writes.new_database(directory / "empty.db", directory)
    study = faults.study_in(failing_writes.open_database(path))
    study.sampler = ohg.HypergradientSampler(seed=3, optimizer="adam")
    sizes = []
    for before, n in zip([0, *at], at, strict=False):
        study.optimize(
            lambda trial: faults.objective(trial, ENTRIES),
            n_trials=n - before,
            callbacks=[lambda study, trial: done()],
        )
        sizes.append(path.stat().st_size)
    study._storage._backend.engine.dispose()
    return sizes


def everything(what: str, count: int) -> int:
    """Bytes of all tensors that were ever stored."""
    return count * TENSOR * (5 if what == "run" else 1)


def too_large(what: str, at: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """Where the file has grown by more than what the default retention keeps.

    A run keeps nothing more. A study keeps the tensor of every tenth trial.
    """
    wrong = []
    for (n, before), (m, after) in zip(
        zip(at, sizes, strict=True), list(zip(at, sizes, strict=True))[1:], strict=False
    ):
        kept = 0 if what == "run" else (m - n) // 10 * TENSOR
        slack = 3 * (m - n) * 500 if what == "run" else (m - n) * ROWS + 8 * TENSOR
        if after > before + kept + slack:
            wrong.append(f"{what}: {before} bytes after {n}, {after} after {m}")
    return wrong


SIZES: dict[str, Callable[[Path, Sequence[int], Callable[[], object]], list[int]]] = {
    "run": of_run,
    "study": of_study,
}
