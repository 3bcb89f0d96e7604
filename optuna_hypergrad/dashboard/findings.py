"""What there is to tell about a study, read from its trials."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .. import _optuna
from .._errors import StorageError
from ..stores import Pointer
from ..stores._pointer import pointers_in
from ..stores._retention import is_feasible
from ..studies.events import Claim
from ..studies.inspection import TrajectorySummary, trajectories_of
from ..studies.ranking import ranked
from ..trial_attributes import (
    ESTIMATOR,
    NUM_HYPERPARAMETERS,
    OUTER_STEPS,
    RETRAINED_VALUE,
    WARM_VALUE,
    summaries_in,
    value_kind_of,
)

_AT_A_BOUND = 0.2
"""Share of a tensor's entries at a bound from which on the note says so."""
_WORSE = 0.1
"""How much worse, of the warm value, a retrained one must be to be worth a warning."""


@dataclass(frozen=True)
class Findings:
    """Of one study.

    Args:
        trials: By state, as many as there are.
        best: The best complete trial; feasible ones come first.
        estimators: In words, the most frequent first.
        summaries: Of the best trial's largest tensors, by flat name.
        stored: What the best trial points to: names of tensors, with shapes by entry.
        gap: Warm and retrained value of the best trial.
        median_gap: Retrained minus warm, over all trials that have both.
    """

    name: str
    maximizes: bool
    trials: dict[str, int]
    best: FrozenTrial | None
    trajectories: tuple[TrajectorySummary, ...] = ()
    estimators: tuple[str, ...] = ()
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    gap: tuple[float, float] | None = None
    median_gap: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether any trial had a hypergradient."""
        return bool(self.trajectories or self.estimators or self.summaries)

    @property
    def best_trajectory(self) -> TrajectorySummary | None:
        """The one that the best trial is a step of."""
        claim = None if self.best is None else Claim.of(self.best)
        if claim is None:
            return None
        return next((t for t in self.trajectories if t.id == claim.trajectory), None)


def find(study: Study, trials: Sequence[FrozenTrial]) -> Findings:
    """Look at all of its trials. A study with several objectives has no best trial, and no trajectories."""
    odd: list[str] = []
    one = not _optuna.is_multi_objective(study)
    sign = _optuna.sign_of(study) if one else 1.0
    trajectories: list[TrajectorySummary] = []
    if one:
        with contextlib.suppress(StorageError):
            trajectories = trajectories_of(sign, trials, odd.append)
    best = next(iter(ranked(trials, sign)), None) if one else None
    shown = best if best is not None else next(reversed(trials), None)
    attributes = {} if shown is None else shown.user_attrs
    estimators = Counter(t.user_attrs[ESTIMATOR] for t in trials if _is_text(t, ESTIMATOR))
    pairs = [pair for t in trials if (pair := gap_of(t)) is not None]
    gap = None if best is None else gap_of(best)
    summaries = summaries_in(attributes)
    states = Counter(t.state.name.lower() for t in trials)
    return Findings(
        name=study.study_name,
        maximizes=sign < 0,
        trials={s.name.lower(): states[s.name.lower()] for s in TrialState},
        best=best,
        trajectories=tuple(trajectories),
        estimators=tuple(e for e, _ in estimators.most_common(5)),
        summaries=summaries,
        stored={} if shown is None else stored_shapes(shown),
        gap=gap,
        median_gap=statistics.median(r - w for w, r in pairs) if pairs else None,
        warnings=(
            *_warnings(trials, best, gap, sign, summaries),
            *odd[:3],
        ),
    )


def gap_of(trial: FrozenTrial) -> tuple[float, float] | None:
    """The values of a bilevel run, warm-started and retrained."""
    warm, retrained = trial.user_attrs.get(WARM_VALUE), trial.user_attrs.get(RETRAINED_VALUE)
    if not _is_finite(warm) or not _is_finite(retrained):
        return None
    return float(warm), float(retrained)  # type: ignore[arg-type]


def stored_shapes(trial: FrozenTrial) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the tensors that a trial points to, by name and entry; without what cannot be read."""
    found = {}
    for key, value in pointers_in(trial.system_attrs, "value").items():
        with contextlib.suppress(StorageError):
            pointer = Pointer.from_json(value, key, trial.number)
            found[pointer.name] = {s.name: tuple(s.shape) for s in pointer.tensors or ()}
    return dict(sorted(found.items()))


def count_of(findings: Findings) -> int | None:
    """How many numbers the best trial moved by hypergradients."""
    if findings.best is None:
        return None
    count = findings.best.user_attrs.get(NUM_HYPERPARAMETERS)
    return count if type(count) is int else None


def _warnings(
    trials: Sequence[FrozenTrial],
    best: FrozenTrial | None,
    gap: tuple[float, float] | None,
    sign: float,
    summaries: dict[str, dict[str, Any]],
) -> list[str]:
    found = []
    if best is not None and not is_feasible(best):
        found.append(
            "No trial is feasible: each violates a constraint. The best trial here is the best of them, and "
            "study.best_trial has none to give."
        )
    failed = sum(t.state is TrialState.FAIL for t in trials)
    if failed:
        found.append(f"{failed} of {len(trials)} trials failed; their steps were taken back.")
    for name, summary in summaries.items():
        for side, key in (("lower", "at_low"), ("upper", "at_high")):
            share = summary.get(key)
            if _is_finite(share) and share > _AT_A_BOUND:  # type: ignore[operator]
                percent = 100.0 * share  # type: ignore[operator]
                found.append(
                    f"{percent:.0f} % of {name} are at their {side} bound: widen it, unless that is where they belong."
                )
    if gap is not None and sign * (gap[1] - gap[0]) > _WORSE * abs(gap[0]):
        found.append(
            f"The best trial is worse when it is trained again from scratch ({gap[1]:.6g}) than it was at the end of "
            f"its warm-started run ({gap[0]:.6g}). Compare retrained values."
        )
    elif best is not None and value_kind_of(best) == "warm":
        found.append(
            "The best value is that of a warm-started run, which flatters: have the objective return retrained_value "
            "of minimize_bilevel(final_eval='retrain')."
        )
    return found


def outer_steps(trial: FrozenTrial) -> int | None:
    steps = trial.user_attrs.get(OUTER_STEPS)
    return steps if type(steps) is int else None


def _is_text(trial: FrozenTrial, key: str) -> bool:
    return isinstance(trial.user_attrs.get(key), str)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
