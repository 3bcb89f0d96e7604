"""Names of processes, among all that ever ran on any machine, and whether one is known to be gone."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path


def this_process() -> str:
    """Names this process among all that ever ran, where the system can tell: machine, PID and birth.

    The machine is its host name and, where there is one, the identifier of its boot: copies of a virtual
    machine share the name.
    """
    boot = _boot()
    machine = socket.gethostname() + (f"/{boot}" if boot else "")
    return f"{machine}|{os.getpid()}|{_birth()}"


def is_dead(process: str) -> bool:
    """Whether the process that wrote a lease is known to be gone. When in doubt, it lives."""
    parts = process.split("|")
    if len(parts) != 3 or not parts[1].isdigit():
        return False
    host, _, boot = parts[0].partition("/")
    begun, _, space = parts[2].partition("@")
    if host != socket.gethostname() or (boot and boot != _boot()):
        return False
    if not begun or not space or space != _space():
        return False
    return _has_ended(parts[1], begun)


def _has_ended(pid: str, begun: str) -> bool:
    """Whether no process with that PID and start time is left.

    A process that was killed stays a zombie until its parent asks for its end. One that this user may not
    look at (``hidepid``) is there.
    """
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return True
    except PermissionError:  # another user's
        pass
    stat = _stat(pid)
    return stat is not None and (stat[0] in "ZX" or stat[1] != begun)


def _stat(pid: int | str) -> tuple[str, str] | None:
    """State and start time of a process; ``None`` where they cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        state, *others = stat.rsplit(")", 1)[1].split()
        return state, others[18]
    except (OSError, IndexError, ValueError):
        return None


def _birth() -> str:
    """Start time and PID namespace of this process; empty where there is no /proc."""
    stat, space = _stat(os.getpid()), _space()
    return f"{stat[1]}@{space}" if stat is not None and space else ""


def _space() -> str:
    try:
        return os.readlink(f"/proc/{os.getpid()}/ns/pid")
    except OSError:
        return ""


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
