"""Values over outer steps, out of a study: the curve of each trajectory and of each bilevel run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .. import _optuna
from .._errors import RequirementError
from .._words import shortened
from ..stores._pointer import checkpoint_attributes, pointers_in
from ..studies.ledger import Ledger
from ..studies.ranking import ranked
from ..studies.trajectory import Trajectory
from ..trial_attributes import COLD_VALUE, WARM_VALUE

VALUES_OF_A_RUN = (WARM_VALUE, COLD_VALUE)
"""User attributes, of which a bilevel run leaves one at its end."""


def with_gaps(lines: Iterable[Sequence[Sequence[Any]]]) -> tuple[list[Any], ...]:
    """The coordinates of lines, ``(x, y, trials)`` each, as those of one trace that ends between two of them."""
    columns: tuple[list[Any], ...] = [], [], []
    for line in lines:
        for column, entries in zip(columns, line, strict=True):
            column += [*entries, None]
    return columns


@dataclass(frozen=True)
class Curve:
    """Outer steps of one trajectory, or of a bilevel run inside one trial.

    Args:
        id: Number of the trial that began it.
        setting: Values of the hyperparameters that have no gradient.
        steps: Outer steps from 0 on; those that failed are left out.
        trials: The trial of each.
        values: Finite.
        score: Its best value, to be minimized.
        is_run: Whether all of it is inside one trial, which reported it.
        returned: What the trial of a run returned, and after how many steps.
    """

    id: int
    setting: dict[str, Any]
    steps: list[int]
    trials: list[int]
    values: list[float]
    score: float
    is_run: bool = False
    returned: tuple[int, float] | None = None

    @property
    def label(self) -> str:
        """In a legend."""
        kind = "Run" if self.is_run else "Trajectory"
        return f"{kind} {self.id}" + (f": {shortened(self.words, 30)}" if self.setting else "")

    @property
    def words(self) -> str:
        """Its setting."""
        return ", ".join(f"{name}={number(value)}" for name, value in self.setting.items())


@dataclass(frozen=True)
class Curves:
    """All of a study.

    Args:
        curves: In order of their ids.
        others: Completed trials that are no step of any of them.
        best: The best trial of all.
        sign: +1 where the study minimizes, -1 where it maximizes.
    """

    curves: list[Curve]
    others: list[FrozenTrial]
    best: FrozenTrial | None
    sign: float
    ledger: Ledger = field(repr=False)
    trials: Sequence[FrozenTrial] = field(repr=False)

    def place_of_best(self) -> tuple[Curve, int, float] | None:
        """The curve, the step and the value of the best trial."""
        if self.best is None:
            return None
        for curve in self.curves:
            if curve.returned is not None and curve.id == self.best.number:
                return curve, *curve.returned
            if not curve.is_run and self.best.number in curve.trials:
                i = curve.trials.index(self.best.number)
                return curve, curve.steps[i], curve.values[i]
        return None

    def ranked(self) -> list[Curve]:
        """The best ones first, whatever is shown of them."""
        return sorted(self.curves, key=lambda curve: curve.score)


def read_curves(study: Study, target: Callable[[FrozenTrial], float] | None = None) -> Curves:
    """What a study's trials add up to; damaged ones are left out, with a warning.

    Args:
        target: What is shown of a trial, in place of its value.

    Raises:
        RequirementError: for a study with several objectives.
    """
    refuse_several_objectives(study)
    trials = _optuna.all_trials(study)
    sign = _optuna.sign_of(study)
    ledger = ledger_of(study, trials)
    curves, inside = [], set[int]()
    for trajectory in ledger.trajectories.values():
        trial = trials[trajectory.id]
        if len(trajectory.steps) == 1 and is_run(trial):
            continue
        inside.update(step.number for step in trajectory.steps)
        curve = _of_trajectory(trajectory, trials, target)
        if curve.steps:
            curves.append(curve)
    others = []
    for trial in (t for t in trials if t.number not in inside):
        run = _of_run(trial, target, sign) if is_run(trial) else None
        if run is not None:
            curves.append(run)
        elif trial.state is TrialState.COMPLETE and finite(_shown(trial, target)):
            others.append(trial)
    best = None
    if target is None:
        best = next((t for t in ranked(trials, sign) if finite(t.values[0])), None)
    return Curves(sorted(curves, key=lambda c: c.id), others, best, sign, ledger, trials)


def ledger_of(study: Study, trials: Sequence[FrozenTrial]) -> Ledger:
    """The trajectories of a study, as the sampler sees them."""
    ledger = Ledger(_optuna.sign_of(study))
    ledger.sync(trials)
    return ledger


def refuse_several_objectives(study: Study) -> None:
    if _optuna.is_multi_objective(study):
        raise RequirementError(
            f"Study {study.study_name!r} has {len(study.directions)} objectives, and trajectories follow one. Use "
            "optuna.visualization, or a study with one objective."
        )


def is_run(trial: FrozenTrial) -> bool:
    """Whether ``minimize_bilevel(..., trial=trial)`` ran in it."""
    ended = any(name in trial.user_attrs for name in VALUES_OF_A_RUN)
    return ended or bool(checkpoint_attributes(trial))


def _of_trajectory(
    trajectory: Trajectory,
    trials: Sequence[FrozenTrial],
    target: Callable[[FrozenTrial], float] | None,
) -> Curve:
    shown = [
        (i, step.number, _shown(trials[step.number], target))
        for i, step in enumerate(trajectory.steps)
        if step.good
    ]
    shown = [entry for entry in shown if finite(entry[2])]
    return Curve(
        trajectory.id,
        trajectory.setting,
        [i for i, _, _ in shown],
        [n for _, n, _ in shown],
        [v for _, _, v in shown],
        min((step.value for step in trajectory.steps), default=math.inf),
    )


def _of_run(
    trial: FrozenTrial, target: Callable[[FrozenTrial], float] | None, sign: float
) -> Curve | None:
    reported = {} if target is not None else trial.intermediate_values
    steps = sorted(s for s, v in reported.items() if finite(v))
    returned = None
    if trial.state is TrialState.COMPLETE and finite(_shown(trial, target)):
        returned = _length_of_run(trial, steps), _shown(trial, target)
    if not steps and returned is None:
        return None
    values = [reported[s] for s in steps]
    ends = list(trial.intermediate_values.values()) if not trial.values else trial.values
    score = min((sign * v for v in ends if finite(v)), default=math.inf)
    if not steps and returned is not None:
        steps, values = [returned[0]], [returned[1]]
    return Curve(
        trial.number,
        dict(trial.params),
        steps,
        [trial.number] * len(steps),
        values,
        score,
        is_run=True,
        returned=returned,
    )


def _length_of_run(trial: FrozenTrial, steps: list[int]) -> int:
    stored = pointers_in(trial.system_attrs, "value").values()
    ends = [p["step"] for p in stored if isinstance(p, dict) and type(p.get("step")) is int]
    return max([*ends, *(s + 1 for s in steps[-1:])], default=0)


def _shown(trial: FrozenTrial, target: Callable[[FrozenTrial], float] | None) -> float:
    if target is not None:
        return float(target(trial)) if trial.state is TrialState.COMPLETE else math.nan
    return math.nan if not trial.values else trial.values[0]


def finite(value: object) -> bool:
    """SQLite lets any type into any column."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: object) -> str:
    """A value of a setting, in short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


POINTS, LEAST_POINTS = 420, 12
"""Of all lines with a color together, where they are thinned out; and of each at least."""
OTHERS, OTHER_TRIALS = 20, 80
"""So many lines without a color, and trials without a hypergradient, are drawn."""


def points_of_each(lines: int) -> int:
    return max(POINTS // max(lines, 1), LEAST_POINTS)


def name_of_others(shown: int, total: int) -> str:
    """In a legend, of lines without a color."""
    return "Others" if shown == total else f"{shown} of {total} others"


def thinned(count: int, most: int, keep: Iterable[int] = ()) -> list[int]:
    """Indices of about ``most`` of ``count`` entries, evenly spread; the ends and ``keep`` are among them."""
    if count <= most:
        return list(range(count))
    spread = np.linspace(0, count - 1, max(most, 2)).round().astype(int).tolist()
    return sorted({*spread, *keep})
