"""Watches what a process does: code, files, connections, programs, time and memory."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

_NEVER = frozenset(
    {
        "pickle.find_class",
        "marshal.loads",
        "marshal.load",
        "code.__new__",
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "subprocess.Popen",
        "pty.spawn",
        "socket.connect",
        "socket.bind",
        "socket.sendto",
        "socket.getaddrinfo",
        "urllib.Request",
        "ctypes.dlopen",
        "ctypes.dlsym",
        "webbrowser.open",
    }
)
_CHANGES = frozenset(
    {"os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate"}
    | {"os.chmod", "os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile", "sqlite3.connect"}
)
_GENERATORS = ("sqlalchemy/", "dataclasses.py", "collections/__init__.py", "typing.py", "enum.py")
"""Files whose own code makes and runs code, from no data."""


class Hang(BaseException):
    """It took too long."""


class Watch:
    """As a context manager, notes in ``violations`` what is done inside that must not be.

    Args:
        directory: The only one in which anything may be written.
        seconds: After so many, ``Hang`` is raised.
        megabytes: Of memory, beyond what was in use at the beginning.
    """

    def __init__(self, directory: Path, seconds: float, megabytes: int) -> None:
        self.violations: list[str] = []
        self._directory, self._seconds, self._megabytes = str(directory), seconds, megabytes
        self._armed = False
        sys.addaudithook(self._hook)

    def __enter__(self) -> Watch:
        self.violations = []
        signal.signal(signal.SIGALRM, self._expired)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        self._before = _resident("VmRSS")
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        self._armed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        used = _resident("VmHWM") - self._before
        if used > self._megabytes:
            self.violations.append(f"{used:.0f} MB of memory were taken")

    def _expired(self, number: int, frame: FrameType | None) -> None:
        self._armed = False
        raise Hang(f"not done after {self._seconds:g} s")

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        if event in _NEVER:
            if event == "marshal.loads" and _caller().startswith("<frozen importlib"):
                return  # an import
            self._note(event, arguments)
        elif event in ("compile", "exec"):
            if not _is_of_a_file(event, arguments):
                self._note(event, arguments)
        elif event in _CHANGES:
            if not self._is_inside(arguments[0]):
                self._note(event, arguments)
        elif event == "open":
            path, _, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if flags & writes and not self._is_inside(path):
                self._note(event, arguments)

    def _is_inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        return os.path.realpath(os.fsdecode(path)).startswith(self._directory + os.sep)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        text = f"{event}{str(arguments)[:300]} from {_caller()}"
        if text not in self.violations:
            self.violations.append(text)


def _is_of_a_file(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether code comes from a file, as in an import, or is made by a known generator of code."""
    name = getattr(arguments[0], "co_filename", None) if event == "exec" else arguments[1]
    if isinstance(name, (str, bytes)) and os.path.isfile(name):
        return True
    return any(part in _caller() for part in _GENERATORS)


def _caller() -> str:
    """The file of the code that did it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename in (__file__, "<string>"):
        frame = frame.f_back
    return "nowhere" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _resident(field: str) -> float:
    """Megabytes: ``VmRSS`` now, ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"There is no {field} in /proc/self/status.")
