"""``optuna-hypergrad sweep``: remove what nothing refers to."""

from __future__ import annotations

import argparse
import math
from typing import Any

from optuna.storages import BaseStorage

from .. import _optuna
from .._errors import StorageError
from ..stores import SweepReport, TensorStore
from ._parsing import Parser, examples
from ._text import show_lines


def add(commands: Any, common: Parser, one: Parser) -> None:
    parser = commands.add_parser(
        "sweep",
        parents=[common],
        help="Remove tensors that no trial refers to.",
        description="Remove tensors that no trial of any study refers to: those of deleted studies\n"
        "and of writes that were cut off.",
        epilog=examples(
            "sweep sqlite:///study.db --dry-run", "sweep sqlite:///study.db --min-age 60"
        ),
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Also where all tensors belong to studies that are not in STORAGE.",
    )
    parser.add_argument("--dry-run", action="store_true", help="Only say what would be removed.")
    parser.add_argument(
        "--min-age",
        type=_seconds,
        default=3600.0,
        metavar="SECONDS",
        help="Leave younger ones: 3600.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    if not options.force:
        _refuse_strangers(store.sweep(dry_run=True, min_age=options.min_age), options.dry_run)
    report = store.sweep(options.dry_run, min_age=options.min_age)
    for problem in report.unreadable:
        _optuna.logger.warning(f"{problem} Nothing of its study was removed.")
    show_lines([str(report)])
    return 0


def _refuse_strangers(report: SweepReport, dry_run: bool) -> None:
    """Tensors of no study in the storage are those of deleted studies, unless another storage puts its own
    here.

    Raises:
        StorageError: if all are such, and not only a dry run was asked for.
    """
    if report.has_known or not report.strange:
        return
    listed = [
        f"{study} ({len(blobs)} blobs, {sum(b.size for b in blobs) / 1e6:.1f} MB)"
        for study, blobs in report.strange.items()
    ]
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    problem = (
        f"No study in this storage has tensors here, and all that would be removed belongs to studies that "
        f"are not in it: {', '.join(listed[:5])}{more}. If they are in another storage, sweep that one, "
        "and give this one as its --tensor-store; if they are deleted, say --force."
    )
    if not dry_run:
        raise StorageError(f"{problem} Nothing was removed.")
    _optuna.logger.warning(problem)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 on")
    return seconds
