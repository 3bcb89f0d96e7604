"""Errors as sentences: each names the hyperparameter, the cause and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._results import Result


class HypergradError(Exception):
    """Base of every error that this library raises on purpose."""


class HyperparameterError(HypergradError, ValueError):
    """A hyperparameter's name, bounds, shape, dtype or value cannot be used."""


class ObjectiveError(HypergradError, ValueError):
    """The objective returned or did something from which no hypergradient can be taken."""


class ProblemError(HypergradError, ValueError):
    """A bilevel problem is ill-posed: wrong shapes, or batches that cannot be replayed."""


class RequirementError(HypergradError, ValueError):
    """A method was asked for something that it cannot do on this problem."""


class ZeroHypergradientError(RequirementError):
    """A hypergradient would be zero by construction, not by optimality."""


class SolverError(HypergradError, RuntimeError):
    """A solver stopped without an answer. ``result`` holds its status and advice."""

    def __init__(self, message: str, result: Result | None = None) -> None:
        super().__init__(message)
        self.result = result


class StorageError(HypergradError, RuntimeError):
    """Tensors cannot be written to, or read from, where the study lives."""


class ConnectionLostError(StorageError):
    """The database went away and did not come back in time."""


class NoSpaceError(StorageError):
    """There is no room left on the disk or in the database. What was stored before is still there."""


class TakenOverError(StorageError):
    """Another worker has taken over the trial, because this one seemed to be gone."""


class CorruptTensorError(StorageError):
    """Stored bytes are not what was written, or not what their pointer says they are."""


class MissingTensorError(StorageError, KeyError):
    """A tensor was never stored, or a retention policy has removed it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""
