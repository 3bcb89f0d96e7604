"""``optuna-hypergrad verify``: read everything, and compare its checksum."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from optuna.storages import BaseStorage

from .. import _optuna
from ..stores import TensorStore
from ._opened import study_of
from ._parsing import Parser, examples
from ._text import show_lines

DAMAGE = 1


def add(commands: Any, common: Parser, one: Parser) -> None:
    parser = commands.add_parser(
        "verify",
        parents=[common, one],
        help="Read every tensor and compare its checksum.",
        description="Read every tensor and compare its checksum. Exit status 1 if any is damaged.",
        epilog=examples("verify sqlite:///study.db", "verify sqlite:///study.db --study decays"),
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    ids = None
    if options.study is not None:
        ids = [_optuna.study_id_of(study_of(options.study, storage))]
    report = store.verify(ids, progress=sys.stderr.isatty())
    for problem in report.damaged:
        show_lines([f"Damaged: {problem}"])
    show_lines([str(report)])
    return DAMAGE if report.damaged else 0
