"""The command ``optuna-hypergrad``: look at the tensors and trajectories of a study.

Exit status: 0; 1 where ``verify`` finds damage; 2 where something cannot be done, with one sentence on
stderr that says why. No password of a database is ever printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial

from . import __version__, _optuna, _terminal
from ._errors import HypergradError, StorageError
from ._show import overview, study_at_a_glance, to_json
from .stores import (
    AbstractArtifactStore,
    AtomicFileSystemArtifactStore,
    RDBArtifactStore,
    SweepReport,
    TensorStore,
)
from .stores import default_artifact_store as artifacts_of
from .stores._database import unwrap_rdb
from .stores._opening import how_to_recover, is_damaged_file, open_existing, reason
from .stores._secrets import Secrets, without_password
from .studies.exporting import export_tensors
from .studies.inspection import summarize
from .studies.tensors import best_with_tensors

STORAGE_VARIABLE = "OPTUNA_STORAGE"
DAMAGE, FAILURE = 1, 2
_LONGEST = 2000
_STORAGE_HELP = (
    "SQLAlchemy URL of a database, or path of a Journal file. Default: the environment variable "
    f"{STORAGE_VARIABLE}, where a password is not seen by other users of the machine."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: What follows its name on the command line; by default, that of this process.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    default = os.environ.get(STORAGE_VARIABLE) or None
    secrets = Secrets(*arguments, *([] if default is None else [default]))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _log_to_stderr(secrets):
            try:
                options = _parser(default).parse_args(arguments)
                return _run(options)
            except _UsageError as error:
                return _fail(str(error), secrets)
            except HypergradError as error:
                return _fail(str(error), secrets)
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                return _fail(f"{type(error).__name__}: {error}.", secrets)
            except Exception as error:  # a traceback could show what must not be seen
                return _fail(f"{type(error).__name__}: {reason(error)}.", secrets)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed at the end
        return 128 + 13
    except KeyboardInterrupt:
        return 128 + 2


def _run(options: argparse.Namespace) -> int:
    if not options.storage:
        raise _UsageError(
            f"Say which storage: a URL such as sqlite:///study.db, the path of a Journal file, or the "
            f"environment variable {STORAGE_VARIABLE}."
        )
    with _opened(options.storage) as storage:
        try:
            with _tensor_store(storage, options.tensor_store) as store:
                status: int = options.run(options, storage, store)
        except Exception as error:
            if not is_damaged_file(error):
                raise
            sentence = how_to_recover(without_password(options.storage))
            if options.run is not _verify:
                raise StorageError(sentence) from None
            _print([f"Damaged: {sentence}"])
            status = DAMAGE
        sys.stdout.flush()
        return status


def _show(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    names = _study_names(storage)
    if options.study is not None or len(names) == 1:
        names = [_name(options.study, names)]
    stored = _sizes(store)
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
        _print(study_at_a_glance(summaries[0], stored, options.all))
    else:
        _print(overview(summaries, stored))
    return 0


def _export(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    study = _study(options.study, storage)
    if not options.output:
        raise _UsageError("-o needs the name of a file, and was given an empty one.")
    trial = _chosen_trial(options.trial, study, store)
    path = Path(options.output)
    tensors = export_tensors(study, trial, path, store, options.name, options.force)
    size = path.stat().st_size
    count = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
    value = (
        "" if trial.values is None else f" (value {', '.join(f'{v:.6g}' for v in trial.values)})"
    )
    _print([f"Wrote {count} of trial {trial.number}{value} to {path}: {size / 1e6:.3f} MB."])
    return 0


def _chosen_trial(number: int | None, study: Study, store: TensorStore) -> FrozenTrial:
    trials = _optuna.all_trials(study)
    if number is not None:
        if not 0 <= number < len(trials):
            raise StorageError(
                f"There is no trial {number} in study {study.study_name!r}, which has {len(trials)}."
            )
        return trials[number]
    chosen = best_with_tensors(study, store, _sizes(store))
    with contextlib.suppress(ValueError):
        best = study.best_trial
        if best.number != chosen.number and best.value != chosen.value:
            _optuna.logger.warning(
                f"Trial {best.number} is better, but not all of its tensors are in the store (any more)."
            )
    return chosen


def _verify(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    ids = None
    if options.study is not None:
        ids = [_optuna.study_id_of(_study(options.study, storage))]
    report = store.verify(ids, progress=sys.stderr.isatty())
    for problem in report.damaged:
        _print([f"Damaged: {problem}"])
    _print([str(report)])
    return DAMAGE if report.damaged else 0


def _sweep(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    if not options.force:
        _refuse_strangers(store.sweep(dry_run=True, min_age=options.min_age), options.dry_run)
    report = store.sweep(options.dry_run, min_age=options.min_age)
    for problem in report.unreadable:
        _optuna.logger.warning(f"{problem} Nothing of its study was removed.")
    _print([str(report)])
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


@contextlib.contextmanager
def _opened(location: str) -> Iterator[BaseStorage]:
    storage = open_existing(location)
    try:
        yield storage
    finally:
        storage.remove_session()
        database = unwrap_rdb(storage)
        if isinstance(database, RDBStorage):
            database.engine.dispose()


@contextlib.contextmanager
def _tensor_store(storage: BaseStorage, location: str | None) -> Iterator[TensorStore]:
    if location is None:
        yield TensorStore(artifacts_of(storage), storage, exclusive=True)
    elif "://" in location:
        with _opened(location) as database:
            yield TensorStore(RDBArtifactStore(database), storage)
    elif location and Path(location).is_dir():
        yield TensorStore(AtomicFileSystemArtifactStore(location), storage)
    else:
        raise StorageError(
            f"There is no directory {location!r}. Give --tensor-store a directory, or the URL of a database."
        )


def _sizes(store: TensorStore) -> dict[str, int]:
    assert isinstance(store.artifact_store, AbstractArtifactStore)
    return {a.artifact_id: a.size for a in store.artifact_store.stored()}


def _study(name: str | None, storage: BaseStorage) -> Study:
    names = _study_names(storage)
    return optuna.load_study(study_name=_name(name, names), storage=storage)


def _study_names(storage: BaseStorage) -> list[str]:
    names = optuna.get_all_study_names(storage)
    odd = [
        name for name in names if not isinstance(name, str)
    ]  # SQLite lets any type into any column
    if odd:
        _optuna.logger.warning(
            f"The study named {str(odd[0])[:60]} is left out: its name is not text. Something has changed "
            "the row; restore it from a backup."
        )
    return sorted(name for name in names if isinstance(name, str))


def _name(name: str | None, names: list[str]) -> str:
    """The study that is meant."""
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        assert name is not None
        return name
    known = ", ".join(map(_quoted, names[:5]))
    known += f" and {len(names) - 5} more" if len(names) > 5 else ""
    if not names:
        raise StorageError("There is no study in this storage.")
    if name is None:
        raise StorageError(f"There are {len(names)} studies: {known}. Say which one: --study NAME.")
    raise StorageError(f"There is no study {_quoted(name)} in this storage; there is {known}.")


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")


class _UsageError(Exception):
    """The command line cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print what was typed, passwords too
        raise _UsageError(f"{message} (try {self.prog} --help)")


def _parser(storage: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        "optuna-hypergrad",
        description="Look at the trajectories and tensors of Optuna studies.",
        epilog="Nothing is created by looking, and no table of a database is migrated.",
    )
    parser.add_argument("--version", action="version", version=f"optuna-hypergrad {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    common = _Parser(add_help=False)
    common.add_argument(
        "storage", nargs="?", default=storage, metavar="STORAGE", help=_STORAGE_HELP
    )
    common.add_argument(
        "--tensor-store",
        metavar="DIR",
        help="Directory of the tensors, or URL of a database, if the sampler was given one.",
    )
    one = _Parser(add_help=False)
    one.add_argument("--study", metavar="NAME", help="Needed where there are several.")

    show = commands.add_parser("show", parents=[common, one], help="Studies at a glance.")
    show.add_argument("--json", action="store_true", help="The same, in full, as JSON.")
    show.add_argument("--all", action="store_true", help="Also tensors that retention has removed.")
    show.set_defaults(run=_show)

    export = commands.add_parser(
        "export",
        parents=[common, one],
        help="Tensors of a trial to a .safetensors file.",
        description="Tensors of a trial to a .safetensors file. An entry of a dict of tensors is "
        "named NAME.ENTRY in it; its metadata says the study, the trial and the value.",
    )
    export.add_argument("-o", "--output", required=True, metavar="FILE", help="Written atomically.")
    export.add_argument(
        "--trial", type=int, metavar="N", help="Default: the best one whose tensors are stored."
    )
    export.add_argument(
        "--name", action="append", default=[], metavar="NAME", help="Only this one; repeatable."
    )
    export.add_argument("--force", action="store_true", help="Overwrite FILE.")
    export.set_defaults(run=_export)

    verify = commands.add_parser(
        "verify",
        parents=[common, one],
        help="Read every tensor and compare its checksum.",
        description="Read every tensor and compare its checksum. Exit status 1 if any is damaged.",
    )
    verify.set_defaults(run=_verify)

    sweep = commands.add_parser(
        "sweep",
        parents=[common],
        help="Remove tensors that no trial refers to.",
        description="Remove tensors that no trial of any study refers to: those of deleted studies "
        "and of writes that were cut off.",
    )
    sweep.add_argument(
        "--force",
        action="store_true",
        help="Also where all tensors belong to studies that are not in STORAGE.",
    )
    sweep.add_argument("--dry-run", action="store_true", help="Only say what would be removed.")
    sweep.add_argument(
        "--min-age",
        type=_seconds,
        default=3600.0,
        metavar="SECONDS",
        help="Leave younger ones: 3600.",
    )
    sweep.set_defaults(run=_sweep)
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 on")
    return seconds


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(_terminal.plain(line))


def _fail(message: str, secrets: Secrets) -> int:
    text = _terminal.plain(secrets.hide(message))
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    print(f"optuna-hypergrad: {text}", file=sys.stderr)
    return FAILURE


@contextlib.contextmanager
def _log_to_stderr(secrets: Secrets) -> Iterator[None]:
    """While the command runs, all log records go through one handler that hides secrets."""

    class Handler(logging.StreamHandler):  # type: ignore[type-arg]
        def format(self, record: logging.LogRecord) -> str:
            return f"optuna-hypergrad: {_terminal.plain(secrets.hide(record.getMessage()))}"

    handler = Handler(sys.stderr)
    handler.setLevel(logging.WARNING)
    root, library = logging.getLogger(), logging.getLogger("optuna")
    before = list(library.handlers), library.propagate, library.level
    root.addHandler(handler)
    library.handlers, library.propagate = [], True
    library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        library.handlers, library.propagate = before[:2]
        library.setLevel(before[2])
