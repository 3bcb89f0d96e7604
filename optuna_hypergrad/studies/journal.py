"""A Journal file that survives lines which were written in part."""

from __future__ import annotations

import io
import json
import os
from typing import Any

from optuna.storages.journal import JournalFileBackend

from .. import _optuna

_BLOCK = 1 << 16


class AtomicJournalFileBackend(JournalFileBackend):
    """Optuna's ``JournalFileBackend``, in which a line is there whole or not at all.

    A full disk, or a crash, leaves half a line. Optuna writes the next one behind it, and then nobody can
    open the study any more (``optuna/storages/journal/_file.py``). Here such a rest is cut off first.

    ::

        storage = JournalStorage(AtomicJournalFileBackend("study.log"))

    Args:
        file_path: Of the log; it may have been written by Optuna's class.
        lock_obj: As Optuna's class takes it.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        path = _optuna.path_of_journal(self)
        with _optuna.lock_of_journal(self), open(path, "r+b", buffering=0) as file:
            end = _end_of_last_line(file)
            file.truncate(end)
            file.seek(end)
            left = memoryview(lines.encode())
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise


def _end_of_last_line(file: io.FileIO) -> int:
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
