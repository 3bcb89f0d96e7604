"""How often something may be done that costs time which belongs to the trials."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """Keeps what is done under it to a share of the time since the first time it was asked.

    Args:
        share: of the time.
        first: what it is assumed to take before it was done once, in seconds.
    """

    def __init__(
        self, share: float, first: float = 0.1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._share = share
        self._clock = clock
        self._began: float | None = None
        self._spent, self._is_new = first, True

    def begin(self) -> None:
        """From now on, time counts; once."""
        if self._began is None:
            self._began = self._clock()

    def allows(self) -> bool:
        """Whether there is room for one more."""
        if self._began is None:
            return False
        return self._spent <= self._share * (self._clock() - self._began)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Around what is done."""
        start = self._clock()
        try:
            yield
        finally:
            now = self._clock() - start
            self._spent = now if self._is_new else self._spent + now
            self._is_new = False
