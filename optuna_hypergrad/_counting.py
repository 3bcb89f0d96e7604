"""What the hypergradients of one objective took: counted where they are taken, asked for where the trial ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Count:
    """Of one trial.

    Args:
        num_products: Hessian-vector products; ``None`` where no solve has said how many.
        estimators: In words, those that were used.
    """

    num_products: float | None = None
    estimators: list[str] = field(default_factory=list)

    def add(self, estimator: str, stats: Mapping[str, float]) -> None:
        if "num_hvps" in stats:
            self.num_products = (self.num_products or 0.0) + stats["num_hvps"]
        if estimator not in self.estimators:
            self.estimators.append(estimator)


_now: ContextVar[Count | None] = ContextVar("optuna_hypergrad_count", default=None)


@contextmanager
def counting() -> Iterator[Count]:
    """Count in this thread until the end of the block."""
    count = Count()
    token = _now.set(count)
    try:
        yield count
    finally:
        _now.reset(token)


def current_count() -> Count | None:
    """Where to count what is begun in this thread now, whichever thread ends it."""
    return _now.get()
