"""The state of a trajectory that has tensors, out of the store: what a step left, or why it is none."""

from __future__ import annotations

import torch
from optuna.trial import FrozenTrial

from .._errors import CorruptTensorError, MissingTensorError
from ..step_rules import AbstractStepRule, StepState, TorchOptimizer
from ..stores import TensorStore
from .events import OUTCOME, Outcome, damaged
from .points import place
from .trajectory import Cursor, Trajectory


class LostTrajectoryError(Exception):
    """A trajectory that has tensors cannot go on."""


def name_of(rule: AbstractStepRule) -> str:
    """Of a step rule, as outcomes say whose state is stored."""
    name = type(rule).__name__
    if not isinstance(rule, TorchOptimizer):
        return name
    optimizer = rule.factory([torch.zeros(1, requires_grad=True, device="cpu")])
    return f"{name} ({type(optimizer).__name__})"


def cursor_after(
    trajectory: Trajectory,
    trial: FrozenTrial,
    rule: AbstractStepRule,
    store: TensorStore,
    name: str,
) -> Cursor:
    """Where ``trajectory`` goes after ``trial``, one of its steps.

    Args:
        rule: Takes the next step; asked whether it can do so from what is stored.
        name: Under which the state is stored, as ``"step_state"``.

    Raises:
        LostTrajectoryError: if the state is another step rule's.
        StorageError: naming the row, if the state is damaged, not there, or no state of this trajectory.
    """
    outcome = Outcome.of(trial)
    before = None if outcome is None else outcome.rule
    if before is not None and before != name_of(rule):
        raise LostTrajectoryError(
            f"Its steps were taken by {before[:60]!r}, and optimizer= of this sampler is {name_of(rule)!r}, "
            "which cannot continue them, so another trajectory begins. To go on with it, give the "
            "optimizer of before."
        )
    pointers = store.pointers(trial, name, "step_state")
    if not pointers:
        raise MissingTensorError(
            f"Trial {trial.number} has stored no state of its trajectory, or the row that points to it is "
            "gone."
        )
    (pointer,) = pointers
    if pointer.trial != trial.number:
        raise CorruptTensorError(
            f"The attribute {pointer.key!r} of trial {trial.number} points to {pointer}: the row was "
            "copied from there. Restore it from a backup of the storage."
        )
    blob = store.load(pointer)
    point = {k.removeprefix("point/"): v for k, v in blob.items() if k.startswith("point/")}
    state = {k.removeprefix("state/"): v for k, v in blob.items() if k.startswith("state/")}
    difference = trajectory.space.why_not(point)
    if difference is not None:
        raise CorruptTensorError(
            f"What is stored as {pointer} is no state of trajectory {trajectory.id}: {difference}."
        )
    numbers = {} if outcome is None or outcome.numbers is None else outcome.numbers
    cursor = Cursor(trial.number, point, StepState(place(state, point), numbers))
    _try_out(rule, trajectory, cursor, trial)
    return cursor


def _try_out(
    rule: AbstractStepRule, trajectory: Trajectory, cursor: Cursor, trial: FrozenTrial
) -> None:
    """Take a step that is thrown away: the numbers of the state are in a row without a checksum."""
    flat = {k: torch.zeros_like(v) for k, v in cursor.point.items()}
    space = trajectory.space
    try:
        rule.step(cursor.state, cursor.point, 0.0, flat, space.lower, space.upper)
    except Exception as error:
        cause = f"{type(rule).__name__} cannot go on from its 'numbers' ({error!r})"
        raise damaged(trial, OUTCOME, cause) from error
