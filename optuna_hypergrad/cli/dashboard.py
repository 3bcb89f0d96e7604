"""``optuna-hypergrad dashboard``: optuna-dashboard, with the studies' tensor store behind it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from optuna.storages import BaseStorage

from ..dashboard.server import HOST, PORT, run_server
from ..stores import TensorStore
from ._parsing import Parser, examples
from ._text import show_lines


def add(commands: Any, common: Parser, one: Parser) -> None:
    parser = commands.add_parser(
        "dashboard",
        parents=[common],
        help="Look at the studies in a browser.",
        description="Start optuna-dashboard so that it also serves what lies in the studies' own\n"
        "database. Ctrl-C ends it. Whoever can reach the port can change and delete studies.",
        epilog=examples(
            "dashboard sqlite:///study.db", "dashboard sqlite:///study.db --host 0.0.0.0 --port 80"
        ),
    )
    parser.add_argument(
        "--host", default=HOST, help=f"Address to listen at: {HOST}, this machine alone."
    )
    parser.add_argument(
        "--port", type=_port, default=PORT, metavar="N", help=f"{PORT}; 0 for any that is free."
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, storage: BaseStorage, store: TensorStore) -> int:
    def started(address: str) -> None:
        show_lines([f"Look at {address} (Ctrl-C ends this)."])
        sys.stdout.flush()

    run_server(storage, options.host, options.port, store.artifact_store, started=started)
    return 0


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)
