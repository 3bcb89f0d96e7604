"""What the command prints, and what it logs: nothing in it acts on the terminal, and no secret is in it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator

from .. import _terminal
from ..stores._secrets import Secrets

FAILURE = 2
_LONGEST = 2000


def show_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(_terminal.plain(line))


def fail(message: str, secrets: Secrets) -> int:
    text = _terminal.plain(secrets.hide(message))
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    print(f"optuna-hypergrad: {text}", file=sys.stderr)
    return FAILURE


@contextlib.contextmanager
def log_to_stderr(secrets: Secrets) -> Iterator[None]:
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
