"""The command ``optuna-hypergrad``: look at the tensors and trajectories of studies.

Exit status: 0; 1 where ``verify`` finds damage; 2 where something cannot be done, with one sentence on
stderr that says why. No password of a database is ever printed.

A new subcommand: one file with ``add`` and ``run``, and one line in ``_COMMANDS``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .._errors import HypergradError, StorageError
from ..stores._opening import how_to_recover, is_damaged_file, reason
from ..stores._secrets import Secrets, without_password
from . import dashboard, export, plot, show, sweep, verify
from ._opened import opened_storage, opened_store
from ._parsing import STORAGE_VARIABLE, Parser, UsageError, common, examples, one_study
from ._text import FAILURE, fail, log_to_stderr, show_lines
from .verify import DAMAGE

__all__ = ["DAMAGE", "FAILURE", "STORAGE_VARIABLE", "main"]

_COMMANDS = (show, plot, export, verify, sweep, dashboard)


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
        with log_to_stderr(secrets):
            try:
                options = _parser(default).parse_args(arguments)
                return _run(options)
            except UsageError as error:
                return fail(str(error), secrets)
            except HypergradError as error:
                return fail(str(error), secrets)
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                return fail(f"{type(error).__name__}: {error}.", secrets)
            except Exception as error:  # a traceback could show what must not be seen
                return fail(f"{type(error).__name__}: {reason(error)}.", secrets)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed at the end
        return 128 + 13
    except KeyboardInterrupt:
        return 128 + 2


def _run(options: argparse.Namespace) -> int:
    options.place(options)
    if not options.storage:
        raise UsageError(
            f"Say which storage: a URL such as sqlite:///study.db, the path of a Journal file, or the "
            f"environment variable {STORAGE_VARIABLE}."
        )
    with opened_storage(options.storage) as storage:
        try:
            with opened_store(storage, options.tensor_store) as store:
                status: int = options.run(options, storage, store)
        except Exception as error:
            if not is_damaged_file(error):
                raise
            sentence = how_to_recover(without_password(options.storage))
            if options.run is not verify.run:
                raise StorageError(sentence) from None
            show_lines([f"Damaged: {sentence}"])
            status = DAMAGE
        if sys.stdout is not None:  # it was closed before this began
            sys.stdout.flush()
        return status


def _parser(storage: str | None) -> Parser:
    parser = Parser(
        "optuna-hypergrad",
        description="Look at the trajectories and tensors of Optuna studies.",
        epilog="Nothing is created by looking, and no table of a database is migrated.\n\n"
        + examples(
            "show sqlite:///study.db", "plot sqlite:///study.db trajectories", "COMMAND --help"
        ),
    )
    parser.add_argument("--version", action="version", version=f"optuna-hypergrad {__version__}")
    parser.set_defaults(place=_place)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = one_study()
    for command in _COMMANDS:
        command.add(commands, common(storage, positional=command is not plot), one)
    return parser


def _place(options: argparse.Namespace) -> None:
    """The storage, in either way to give it."""
    if options.storage_option is not None:
        options.storage = options.storage_option
