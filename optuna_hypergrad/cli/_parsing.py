"""The command line, read: what every subcommand takes, and errors that quote nothing that was typed."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

STORAGE_VARIABLE = "OPTUNA_STORAGE"
STORAGE_HELP = (
    "SQLAlchemy URL of a database, or path of a Journal file. Default: the environment variable "
    f"{STORAGE_VARIABLE}, where a password is not seen by other users of the machine."
)


class UsageError(Exception):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:  # argparse would print what was typed, passwords too
        raise UsageError(f"{message} (try {self.prog} --help)")


def common(default: str | None, *, positional: bool = True) -> Parser:
    """What every subcommand takes.

    Args:
        default: The storage, if none is given.
    """
    parser = Parser(add_help=False)
    if positional:
        parser.add_argument(
            "storage", nargs="?", default=default, metavar="STORAGE", help=STORAGE_HELP
        )
    else:
        parser.set_defaults(storage=default)
    parser.add_argument(
        "--storage",
        dest="storage_option",
        metavar="URL",
        help="The same, as in Optuna's own command.",
    )
    parser.add_argument(
        "--tensor-store",
        metavar="DIR",
        help="Directory of the tensors, or URL of a database, if the sampler was given one.",
    )
    return parser


def one_study() -> Parser:
    """What those take that look at one study."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--study",
        "--study-name",
        dest="study",
        metavar="NAME",
        help="Needed where there are several.",
    )
    return parser


def examples(*lines: str) -> str:
    """The end of a help text."""
    return "\n".join(["examples:", *(f"  optuna-hypergrad {line}" for line in lines)])
