"""The progress bar of a bilevel run, in a terminal or a notebook, below that of its study."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


@contextmanager
def progress_bar(shown: bool, total: int, done: int, name: str, trial: int | None) -> Iterator[Any]:
    """A bar that is gone at its end. While it is shown, what Optuna's logger says goes above it.

    Args:
        total: Outer steps.
        done: Of them, at the beginning.
        name: Of the run.
        trial: Number of the trial that it is.
    """
    text = name if trial is None else f"trial {trial}, {name}"
    with tqdm(
        total=total, initial=done, desc=text, unit="step", disable=not shown, leave=False
    ) as bar:
        # Handlers are the process's: another thread's bar may be in the middle of giving them back.
        if not shown or threading.current_thread() is not threading.main_thread():
            yield bar
            return
        with logging_redirect_tqdm([logging.getLogger("optuna")], type(bar)):
            yield bar


def advance(bar: Any, record: Mapping[str, float]) -> None:
    """One outer step further."""
    bar.set_postfix_str(
        f"value {record['outer_value']:.5g}, |hypergradient| {record['hypergradient_norm']:.2g}, "
        f"|step| {record['step_length']:.2g}",
        refresh=False,
    )
    bar.update()
