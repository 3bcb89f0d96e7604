"""Settings of the whole process that searches change while they run, whatever the threads that they run in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class ProcessWide(Generic[T]):
    """A setting that the first one who enters changes, and the last one who leaves restores.

    Without that, of two searches that overlap, the second would restore what the first had set.

    Args:
        read: The setting now.
        write: Changes it.
    """

    def __init__(self, read: Callable[[], T], write: Callable[[T], object]) -> None:
        self._read, self._write = read, write
        self._lock, self._before = threading.Lock(), list[T]()

    @contextmanager
    def changed(self, to: Callable[[T], T]) -> Iterator[None]:
        """As long as anybody is inside, it is what ``to`` makes of it."""
        with self._lock:
            now = self._read()
            self._before.append(self._before[0] if self._before else now)
            self._set(to(now))
        try:
            yield
        finally:
            with self._lock:
                before = self._before.pop()
                if not self._before:
                    self._set(before)

    def _set(self, value: T) -> None:
        if value != self._read():
            self._write(value)
