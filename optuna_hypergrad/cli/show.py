"""``optuna-hypergrad show``: studies at a glance."""

from __future__ import annotations

import argparse
import json
from typing import Any

import optuna
from optuna.storages import BaseStorage

from .._show import overview, study_at_a_glance, to_json
from ..stores import TensorStore
from ..studies.inspection import summarize
from ._opened import meant, sizes_in, study_names
from ._parsing import Parser, examples
from ._text import show_lines


def add(commands: Any, common: Parser, one: Parser) -> None:
    parser = commands.add_parser(
        "show",
        parents=[common, one],
        help="Studies at a glance.",
        description="Trials, trajectories and tensors of a study; or a line for each, where there are several.",
        epilog=examples(
            "show sqlite:///study.db",
            "show sqlite:///study.db --study decays --all",
            "show sqlite:///study.db --json > study.json",
        ),
    )
    parser.add_argument("--json", action="store_true", help="The same, in full, as JSON.")
    parser.add_argument(
        "--all", action="store_true", help="Also tensors that retention has removed."
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    names = study_names(storage)
    if options.study is not None or len(names) == 1:
        names = [meant(options.study, names)]
    stored = sizes_in(store)
    summaries = [summarize(optuna.load_study(study_name=n, storage=storage), stored) for n in names]
    alone = len(summaries) == 1
    if options.json:
        found = [to_json(summary) for summary in summaries]
        print(
            json.dumps(
                found[0] if alone else {"studies": found}, indent=2, allow_nan=False, default=str
            )
        )
    elif alone:
        show_lines(study_at_a_glance(summaries[0], stored, options.all))
    else:
        show_lines(overview(summaries, stored))
    return 0
