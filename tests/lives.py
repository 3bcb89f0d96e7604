"""Processes that live and die: what a worker does, how it is begun and killed, and what it leaves.

Workers are forked from a server that has imported everything already, so that a life costs milliseconds.
Each appends a line to a log for everything it evaluates.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
import torch
from optuna.storages import RDBStorage

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", "alembic.context", "cut_off", "crowds"])

_LONG = 600.0


class Log:
    """A file to which any number of processes append lines at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *words: Any) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, (" ".join(map(str, words)) + "\n").encode())
        finally:
            os.close(file)

    def lines(self) -> list[list[str]]:
        return [x.split() for x in self.path.read_text().splitlines()] if self.path.exists() else []


class Life:
    """A process that runs ``work(*args)``. It is over at the end of the ``with`` block, come what may."""

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        self._begun, theirs = _context.Pipe(duplex=False)
        self.process: ForkServerProcess = _context.Process(target=_live, args=(theirs, work, *args))
        with _importable():
            self.process.start()
        theirs.close()

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def has_begun(self) -> None:
        """Wait until it is about to do its work."""
        with suppress(EOFError):
            assert self._begun.poll(_LONG), "a worker does not begin"
            self._begun.recv()

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, number)

    def is_paused(self) -> bool:
        """Whether it has stopped; waits until it has, or has ended."""
        deadline = time.monotonic() + _LONG
        while time.monotonic() < deadline and self.process.exitcode is None:
            with suppress(OSError):
                stat = Path(f"/proc/{self.process.pid}/stat").read_text(errors="replace")
                if stat.rsplit(")", 1)[1].split()[0] == "T":
                    return True
            time.sleep(0.005)
        return False

    def kill(self) -> bool:
        """Whether it was alive, and was killed by this."""
        if self.process.exitcode is None:
            self.process.kill()
        return self.end() == -signal.SIGKILL

    def end(self) -> int:
        """Its exit status, once it has one."""
        self.process.join(_LONG)
        assert self.process.exitcode is not None, "a worker hangs"
        return self.process.exitcode


def barrier(parties: int) -> Any:
    """Behind which so many lives wait for each other."""
    return _context.Barrier(parties)


@contextmanager
def _importable() -> Iterator[None]:
    """This directory is on the path of the server that is started in here, if none was before."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def _live(begun: Connection, work: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    begun.send(os.getpid())
    begun.close()
    work(*args)


class Striker:
    """Sends its own process a signal at the n-th moment at which it talks to a database: before a statement,
    after one, before a commit, or when a connection is given back. Without ``at`` it only counts them.

    Args:
        between: Only at the last of these, when it has no transaction open.
    """

    def __init__(
        self,
        storage: RDBStorage,
        at: int | None,
        number: signal.Signals = signal.SIGKILL,
        *,
        between: bool = False,
    ) -> None:
        self.moments, self.at, self.number = 0, at, number
        for name in () if between else ("before_cursor_execute", "after_cursor_execute", "commit"):
            sa.event.listen(storage.engine, name, self._moment)
        sa.event.listen(storage.engine.pool, "checkin", self._moment)

    def _moment(self, *args: Any) -> None:
        self.moments += 1
        if self.moments == self.at:
            os.kill(os.getpid(), self.number)
