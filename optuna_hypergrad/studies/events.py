"""What a trial leaves behind in its system attributes: a claim, its gradient, its outcome.

The three together are one event; a study's trajectories are the fold of its events in the order of
their trial numbers, and nothing else is kept anywhere (except tensors, in the tensor store).

Attributes can be changed by anybody who can write to the database: each is read as what it must be, or
refused with a :class:`StorageError` that names it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._errors import StorageError, TakenOverError
from ..stores import long_attribute, set_long_trial_attribute

CLAIM, GRADIENT, OUTCOME = "hypergrad:claim", "hypergrad:gradient", "hypergrad:outcome"
T = TypeVar("T")


def write_event(study: Study, trial: FrozenTrial, key: str, payload: dict[str, Any]) -> None:
    """One of the three, for a running trial.

    Raises:
        TakenOverError: if it is not running any more.
    """
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    try:
        set_long_trial_attribute(storage, trial_id, key, payload)
    except UpdateFinishedTrialError as error:
        raise TakenOverError(
            f"Trial {trial.number} is finished already, so nothing more is stored for it. Another worker has "
            "taken it over because this process had not renewed its lease (was it paused? see lease=), "
            "or it was told twice."
        ) from error


@dataclass(frozen=True)
class Claim:
    """Which step a trial works on, written before the work.

    Args:
        trajectory: Number of the trial that opened the trajectory; its own for a new one.
        parent: Number of the trial whose step this one follows; ``None`` for a start.
        source: Where a start came from: ``"init"``, ``"enqueued"``, ``"base"``, or a trial's number.
    """

    trajectory: int
    parent: int | None
    source: str = "init"

    @classmethod
    def of(cls, trial: FrozenTrial) -> Claim | None:
        """That of a trial; ``None`` for a damaged one too, of which the :class:`Ledger` tells."""
        try:
            return cls.read(trial)
        except StorageError:
            return None

    @classmethod
    def read(cls, trial: FrozenTrial) -> Claim | None:
        """That of a trial, if it has one.

        Raises:
            StorageError: naming trial and attribute, if it is damaged.
        """
        return _read(trial, CLAIM, lambda data: cls(**_checked(data, _CLAIM_FIELDS)))

    def to_json(self) -> dict[str, Any]:
        return {**vars(self)}


@dataclass(frozen=True)
class Outcome:
    """How a step ended, written before the trial is finished.

    Args:
        kind: ``"good"``: a value and a gradient; ``"bad"``: an evaluation that failed, so the step is
            taken back; ``"void"``: nothing was evaluated (bad input, interruption): it never happened.
        trajectory: As claimed; the trial's own number where it turned out to be a new start.
        parent: As claimed, ``None`` for a start.
        value: What the objective returned; ``None`` unless it is finite.
        stop: Why the trajectory is over, if it is.
        numbers: Numbers of the step rule's state, where the trajectory has tensors.
        definitions: Hyperparameters that are tensors, in the trial that opened the trajectory.
        held: Numbers that a sampler around ours kept in place, and that therefore do not move.
        rule: The step rule that ``numbers`` are of; ``None`` in rows of earlier versions.
    """

    kind: Literal["good", "bad", "void"]
    trajectory: int = -1
    parent: int | None = None
    value: float | None = None
    stop: str | None = None
    numbers: dict[str, Any] | None = None
    definitions: dict[str, Any] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    rule: str | None = None

    @classmethod
    def of(cls, trial: FrozenTrial) -> Outcome | None:
        """That of a trial, if it has one.

        Raises:
            StorageError: naming trial and attribute, if it is damaged.
        """
        return _read(trial, OUTCOME, cls._parse)

    @classmethod
    def _parse(cls, data: dict[str, Any]) -> Outcome:
        found = cls(**_checked({"rule": None, **data}, _OUTCOME_FIELDS))
        if (found.kind == "good") != (found.value is not None):
            raise ValueError(f"its kind is {found.kind!r} and its value {found.value}")
        return found

    def to_json(self) -> dict[str, Any]:
        data = {**vars(self)}
        if self.rule is None:
            del data["rule"]
        return data


def damaged(trial: FrozenTrial, key: str, cause: object) -> StorageError:
    """What to say of an attribute that is not what it must be."""
    return StorageError(
        f"The attribute {key!r} of trial {trial.number} is damaged: {cause}. Something else than "
        "optuna_hypergrad has changed the row; restore it from a backup."
    )


def _read(trial: FrozenTrial, key: str, parse: Callable[[dict[str, Any]], T]) -> T | None:
    try:
        data = long_attribute(trial.system_attrs, key)
        return None if data is None else parse(data)
    except ValueError as error:
        raise damaged(trial, key, error) from error


def _checked(
    data: Mapping[str, Any], fields: Mapping[str, tuple[Callable[[Any], bool], str]]
) -> dict[str, Any]:
    for name, (fits, what) in fields.items():
        if name not in data:
            raise ValueError(f"it has no {name!r}")
        if not fits(data[name]):
            raise ValueError(f"its {name!r} is not {what}")
    return {name: data[name] for name in fields}


def _is_number(value: Any) -> bool:
    return type(value) is int and -1 <= value < 2**31


def _is_finite(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, bool)) or _is_finite(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_object(value: Any, entry: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(entry, value.values()))


_CLAIM_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "trajectory": (_is_number, "the number of a trial"),
    "parent": (lambda v: v is None or _is_number(v), "the number of a trial or null"),
    "source": (_is_text, "text"),
}
_OUTCOME_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda v: _is_text(v) and v in ("good", "bad", "void"), "'good', 'bad' or 'void'"),
    "trajectory": (_is_number, "the number of a trial"),
    "parent": (lambda v: v is None or _is_number(v), "the number of a trial or null"),
    "value": (lambda v: v is None or _is_finite(v), "a finite number or null"),
    "stop": (lambda v: v is None or _is_text(v), "text or null"),
    "numbers": (
        lambda v: v is None or _is_object(v, _is_plain),
        "an object of finite numbers, booleans and text",
    ),
    "definitions": (
        lambda v: _is_object(v, lambda d: isinstance(d, dict)),
        "an object of objects",
    ),
    "held": (_is_texts, "a list of text"),
    "rule": (lambda v: v is None or _is_text(v), "text or null"),
}


def encode_gradient(gradient: dict[str, float], names: list[str]) -> dict[str, Any]:
    """``names`` (sorted) are left out where they are exactly the gradient's."""
    ordered = sorted(gradient)
    packed = np.array([gradient[n] for n in ordered], dtype="<f8").tobytes()
    return {
        "names": None if ordered == names else ordered,
        "float64": base64.b64encode(packed).decode("ascii"),
    }


def gradient_of(trial: FrozenTrial) -> tuple[list[str], np.ndarray] | None:
    """Names (sorted) and d(objective)/d(value) of a trial's numbers, or ``None``.

    Raises:
        StorageError: naming trial and attribute, if it is damaged.
    """

    def parse(data: dict[str, Any]) -> tuple[list[str], np.ndarray]:
        found = _checked(data, _GRADIENT_FIELDS)
        known = continuous_names(trial)
        names = known if found["names"] is None else found["names"]
        packed = base64.b64decode(found["float64"], validate=True)
        if len(packed) != 8 * len(names):
            raise ValueError(f"it has {len(packed)} bytes for {len(names)} names")
        if names != sorted(set(names)) or not set(names) <= set(known):
            raise ValueError("its names are not, in order, parameters of the trial with a gradient")
        return list(names), np.frombuffer(packed, dtype="<f8").astype(np.float64)

    return _read(trial, GRADIENT, parse)


_GRADIENT_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "names": (lambda v: v is None or _is_texts(v), "a list of text or null"),
    "float64": (_is_text, "text"),
}


def continuous_names(trial: FrozenTrial) -> list[str]:
    """Names of a trial's floats without a step, sorted."""
    return sorted(n for n, d in trial.distributions.items() if _optuna.is_continuous(d))
