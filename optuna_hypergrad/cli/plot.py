"""``optuna-hypergrad plot``: a figure of a study, to a file."""

from __future__ import annotations

import argparse
import difflib
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from .. import _optuna
from .._errors import HypergradError, StorageError
from .._files import target_of, write_file
from ..dashboard.findings import find
from ..stores import TensorStore
from ._opened import study_of
from ._parsing import Parser, UsageError, examples
from ._text import show_lines

KINDS = (
    "trajectories",
    "hypergradient-norms",
    "tensor-evolution",
    "extreme-hyperparameters",
    "layers",
    "images",
    "warm-against-retrained",
)
_SUFFIXES = (".html", ".json", ".svg", ".png", ".pdf")


def add(commands: Any, common: Parser, one: Parser) -> None:
    parser = commands.add_parser(
        "plot",
        usage="optuna-hypergrad plot [-h] [-o FILE] [--name TENSOR] [--force] [STORAGE] [STUDY] KIND",
        parents=[common, one],
        help="A figure of a study.",
        description=f"A figure of a study. KIND is one of:{_lines(KINDS)}",
        epilog=examples(
            "plot sqlite:///study.db trajectories",
            "plot sqlite:///study.db decays tensor-evolution --name decay -o decay.svg",
            "plot --storage sqlite:///study.db --study decays layers -o layers.png",
        ),
    )
    parser.add_argument("words", nargs="+", metavar="[STORAGE] [STUDY] KIND", help="See above.")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="Default: KIND.html. Interactive .html or plotly's .json; by Matplotlib .svg, .png, .pdf.",
    )
    parser.add_argument("--name", metavar="TENSOR", help="Which one; by default the largest.")
    parser.add_argument("--force", action="store_true", help="Overwrite FILE.")
    parser.set_defaults(run=run, place=_place)


def _lines(kinds: tuple[str, ...]) -> str:
    return "\n  " + "\n  ".join(kinds) + "\n"


def _place(options: argparse.Namespace) -> None:
    """Say which of the words is the storage, and which the study."""
    *before, options.kind = options.words
    if options.storage_option is not None:
        options.storage = options.storage_option
    elif (
        len(before) == 2
        or (before and options.study)
        or (len(before) == 1 and (not options.storage or _is_storage(before[0])))
    ):
        options.storage = before.pop(0)
    if before and options.study is None:
        options.study = before.pop(0)
    if before:
        raise UsageError(
            "plot takes at most a storage, a study and a kind (try optuna-hypergrad plot --help)"
        )
    if options.kind not in KINDS:
        near = difflib.get_close_matches(
            options.kind.removeprefix("plot_").replace("_", "-"), KINDS, 1
        )
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"There is no figure {options.kind[:60]!r}; there are {', '.join(KINDS)}.{hint}"
        )


def _is_storage(word: str) -> bool:
    return "://" in word or Path(word).is_file()


def run(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    study = study_of(options.study, storage)
    path = Path(f"{options.kind}.html" if options.output is None else options.output)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(f"-o needs the name of a file that ends with {', '.join(_SUFFIXES)}.")
    target = target_of(path, options.force)
    findings = find(study, _optuna.all_trials(study))
    if not findings.is_ours:
        raise StorageError(
            f"No trial of study {study.study_name!r} has had a hypergradient, so there is nothing to draw. Optuna's own "
            "figures are in optuna.visualization."
        )
    by_matplotlib = suffix in (".svg", ".png", ".pdf")
    draw = _function(options.kind, by_matplotlib)
    takes = inspect.signature(draw).parameters
    given = {"name": options.name, "tensor_store": store}
    if options.name is not None and "name" not in takes:
        raise UsageError(
            f"--name means nothing for {options.kind}, which is about the whole study."
        )
    try:
        found = draw(study, **{k: v for k, v in given.items() if k in takes})
    except ImportError as error:
        raise HypergradError(
            f"{error}".splitlines()[0].rstrip(".") + ". Install plotly and matplotlib."
        ) from error
    write_file(target, _encoded(found, suffix), options.force)
    show_lines([f"Wrote {options.kind} of study {study.study_name!r} to {path}."])
    return 0


def _function(kind: str, by_matplotlib: bool) -> Callable[..., Any]:
    from .. import visualization

    module = visualization.matplotlib if by_matplotlib else visualization
    found: Callable[..., Any] = getattr(module, f"plot_{kind.replace('-', '_')}")
    return found


def _encoded(found: Any, suffix: str) -> bytes:
    if suffix == ".html":
        return str(found.to_html()).encode()
    if suffix == ".json":
        return str(found.to_json()).encode()
    axes = found if hasattr(found, "figure") else found.flat[0]
    written = io.BytesIO()
    axes.figure.savefig(written, format=suffix[1:], bbox_inches="tight", dpi=150)
    return written.getvalue()
