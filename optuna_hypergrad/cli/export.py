"""``optuna-hypergrad export``: tensors of a trial to a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._errors import StorageError
from ..stores import TensorStore
from ..studies.exporting import export_tensors
from ..studies.tensors import best_with_tensors, say_infeasible
from ._opened import sizes_in, study_of
from ._parsing import Parser, UsageError, examples
from ._text import show_lines


def add(commands: Any, common: Parser, one: Parser) -> None:
    parser = commands.add_parser(
        "export",
        parents=[common, one],
        help="Tensors of a trial to a .safetensors file.",
        description="Tensors of a trial to a .safetensors file. An entry of a dict of tensors is\n"
        "named NAME.ENTRY in it; its metadata says the study, the trial and the value.",
        epilog=examples(
            "export sqlite:///study.db -o best.safetensors",
            "export sqlite:///study.db --trial 3 --name decay -o decay.safetensors",
        ),
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="Written atomically.")
    parser.add_argument(
        "--trial", type=int, metavar="N", help="Default: the best one whose tensors are stored."
    )
    parser.add_argument(
        "--name", action="append", default=[], metavar="NAME", help="Only this one; repeatable."
    )
    parser.add_argument("--force", action="store_true", help="Overwrite FILE.")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    study = study_of(options.study, storage)
    if not options.output:
        raise UsageError("-o needs the name of a file, and was given an empty one.")
    trial = _chosen_trial(options.trial, study, store)
    path = Path(options.output)
    tensors = export_tensors(study, trial, path, store, options.name, options.force)
    size = path.stat().st_size
    count = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
    value = (
        "" if trial.values is None else f" (value {', '.join(f'{v:.6g}' for v in trial.values)})"
    )
    show_lines([f"Wrote {count} of trial {trial.number}{value} to {path}: {size / 1e6:.3f} MB."])
    return 0


def _chosen_trial(number: int | None, study: Study, store: TensorStore) -> FrozenTrial:
    trials = _optuna.all_trials(study)
    if number is not None:
        if not 0 <= number < len(trials):
            raise StorageError(
                f"There is no trial {number} in study {study.study_name!r}, which has {len(trials)}."
            )
        return trials[number]
    chosen = best_with_tensors(study, store, sizes_in(store))
    try:
        best = study.best_trial
    except ValueError:
        say_infeasible(study, chosen)
        return chosen
    if best.number != chosen.number and best.value != chosen.value:
        _optuna.logger.warning(
            f"Trial {best.number} is better, but not all of its tensors are in the store (any more)."
        )
    return chosen
