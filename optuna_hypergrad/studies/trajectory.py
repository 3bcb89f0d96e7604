"""Trajectories: their steps, and where they go next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution

from .._typing import Params
from ..step_rules import AbstractStepRule, StepState
from .points import PointSpace


@dataclass(frozen=True)
class Step:
    """One finished trial of a trajectory. ``value`` is to be minimized; infinite for a failure."""

    number: int
    value: float
    good: bool


@dataclass(frozen=True)
class Cursor:
    """Where a trajectory goes next: what the step rule said after trial ``after``."""

    after: int
    point: Params
    state: StepState
    stop: str | None = None


@dataclass
class Trajectory:
    """Outer steps from one start under one setting of the other hyperparameters.

    Args:
        id: Number of the trial that opened it.
        setting: Values of the hyperparameters that have no gradient.
        space: Its continuous hyperparameters.
        distributions: Of everything that its first trial suggested by number.
        source: Where its start came from.
        first: Numbers at its start, external.
    """

    id: int
    trial_id: int
    setting: dict[str, Any]
    space: PointSpace
    distributions: dict[str, BaseDistribution]
    source: str
    first: dict[str, float]
    steps: list[Step] = field(default_factory=list)
    stop: str | None = None
    best: Step | None = None
    curve: list[float] = field(default_factory=list)
    cursor: Cursor | None = None

    @property
    def key(self) -> str:
        return setting_key(self.setting)

    @property
    def last(self) -> int:
        """Number of its newest finished trial."""
        return self.steps[-1].number

    @property
    def since_best(self) -> int:
        """Steps since the last one that was the best so far."""
        number = self.best.number if self.best is not None else self.id
        return sum(1 for s in self.steps if s.number > number)

    def add(self, step: Step, stop: str | None) -> None:
        self.steps.append(step)
        self.stop = self.stop or stop
        if step.good and (self.best is None or step.value < self.best.value):
            self.best = step
        self.curve.append(math.inf if self.best is None else self.best.value)


def setting_key(setting: Mapping[str, Any]) -> str:
    return repr(sorted(setting.items()))


def advance(
    rule: AbstractStepRule,
    space: PointSpace,
    cursor: Cursor | None,
    number: int,
    floats: Mapping[str, float],
    tensors: Params,
    value: float,
    gradient: np.ndarray | None,
    tensor_gradient: Params,
    held: Sequence[str] = (),
) -> Cursor:
    """The step after trial ``number``, which was evaluated at ``floats`` and ``tensors``.

    It is taken on the CPU, where tensors are that come from the storage: on a GPU it would be rounded in another way, and
    a study that goes on in another process would not be the same.

    Args:
        cursor: After the trial before; ``None`` at the start of a trajectory.
        floats: What the trial's numbers were, external.
        tensors: What its tensors were, external, flat; not needed where ``cursor`` is given.
        value: Loss (minimized); not finite for a failed evaluation.
        gradient: Of the loss by the numbers in the order of ``space.names``; ``None`` for a failure.
        tensor_gradient: Of the loss by the tensors.
        held: Numbers that somebody else keeps in place.
    """
    lower, upper = space.lower, space.upper
    tensors, tensor_gradient = (
        {k: v.cpu() for k, v in tree.items()} for tree in (tensors, tensor_gradient)
    )
    actual = space.pack(space.array(floats))
    if cursor is None:
        external = {**actual, **tensors}
        point = space.to_internal(external)
        state = rule.init(point, lower, upper)
    else:
        point, state = cursor.point, cursor.state
        external = space.to_external(point)
        for name, vector in actual.items():
            moved = (vector - external[name]).abs() > 1e-12 * external[name].abs()
            if bool(moved.any()):
                shifted = space.domains[name].to_internal(vector)
                point = {**point, name: shifted.where(moved, point[name])}
                external[name] = vector
    if gradient is None:
        slope: Params = {}
    else:
        if held:
            gradient = np.where(np.isin(space.names, list(held)), 0.0, gradient)
        slope = space.internal_gradient({**space.pack(gradient), **tensor_gradient}, external)
    proposal = rule.step(state, point, value, slope, lower, upper)
    return Cursor(number, proposal.point, proposal.state, proposal.stop)
