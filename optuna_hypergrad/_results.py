"""How a solve ended, as a value: a status and one sentence that says what to change."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ._errors import SolverError


class Status(enum.Enum):
    """How a solve ended."""

    SUCCESS = "success"
    MAX_STEPS_REACHED = "max_steps_reached"
    NONFINITE = "nonfinite"
    DIVERGED = "diverged"
    NEGATIVE_CURVATURE = "negative_curvature"
    STALLED = "stalled"


@dataclass(frozen=True)
class Result:
    """A status with advice. Truthy exactly when the solve succeeded."""

    status: Status = Status.SUCCESS
    message: str = ""

    @property
    def success(self) -> bool:
        return self.status is Status.SUCCESS

    def __bool__(self) -> bool:
        return self.success

    def raise_if_failed(self) -> None:
        """Raise :class:`SolverError` with the message, unless the solve succeeded."""
        if not self.success:
            raise SolverError(self.message, self)


SUCCESS = Result()
