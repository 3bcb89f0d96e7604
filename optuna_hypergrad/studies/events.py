"""What a trial leaves behind in its system attributes: a claim, its gradient, its outcome.

The three together are one event; a study's trajectories are the fold of its events in the order of
their trial numbers, and nothing else is kept anywhere (except tensors, in the tensor store).
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._errors import TakenOverError
from ..stores import long_attribute, set_long_trial_attribute

CLAIM, GRADIENT, OUTCOME = "hypergrad:claim", "hypergrad:gradient", "hypergrad:outcome"


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
        data = long_attribute(trial.system_attrs, CLAIM)
        return None if data is None else cls(**{k: data[k] for k in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
    """

    kind: Literal["good", "bad", "void"]
    trajectory: int = -1
    parent: int | None = None
    value: float | None = None
    stop: str | None = None
    numbers: dict[str, Any] | None = None
    definitions: dict[str, Any] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, trial: FrozenTrial) -> Outcome | None:
        data = long_attribute(trial.system_attrs, OUTCOME)
        return None if data is None else cls(**{k: data[k] for k in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def encode_gradient(gradient: dict[str, float], names: list[str]) -> dict[str, Any]:
    """``names`` (sorted) are left out where they are exactly the gradient's."""
    ordered = sorted(gradient)
    packed = np.array([gradient[n] for n in ordered], dtype="<f8").tobytes()
    return {
        "names": None if ordered == names else ordered,
        "float64": base64.b64encode(packed).decode("ascii"),
    }


def gradient_of(trial: FrozenTrial) -> tuple[list[str], np.ndarray] | None:
    """Names (sorted) and d(objective)/d(value) of a trial's numbers, or ``None``."""
    data = long_attribute(trial.system_attrs, GRADIENT)
    if data is None:
        return None
    names = data["names"] if data["names"] is not None else continuous_names(trial)
    array = np.frombuffer(base64.b64decode(data["float64"]), dtype="<f8").astype(np.float64)
    if len(names) != len(array):
        raise ValueError(
            f"Trial {trial.number}: its stored gradient has {len(array)} numbers for {len(names)} names."
        )
    return list(names), array


def continuous_names(trial: FrozenTrial) -> list[str]:
    """Names of a trial's floats without a step, sorted."""
    return sorted(n for n, d in trial.distributions.items() if _optuna.is_continuous(d))
