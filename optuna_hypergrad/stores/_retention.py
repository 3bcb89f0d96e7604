"""Which trials' tensors stay in the store."""

from __future__ import annotations

import datetime
import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

Trajectory = Callable[[FrozenTrial], Hashable]
"""Which trajectory a finished trial belongs to; ``None`` if that trajectory is over."""

_GRACE = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Retention:
    """Keep the tensors of the newest trials, of the best, and of every k-th.

    The tensors of a trial that has not finished are always kept, and those of a failed trial for an
    hour, so that a retry finds them.

    Args:
        newest: how many of the newest finished trials keep theirs.
        best: how many of the best completed trials keep theirs: the best of all, and the best
            among those that satisfy the constraints. For each objective.
        every: trials whose number is divisible by this keep theirs; 1 keeps all, 0 turns it off.
        transient: roles that only serve to go on from: of these, ``best`` and ``every`` keep
            nothing, and ``newest`` counts within each trajectory that is not over.
    """

    newest: int = 2
    best: int = 1
    every: int = 10
    transient: frozenset[str] = frozenset({"gradient", "step_state", "checkpoint"})

    def __post_init__(self) -> None:
        for name, least in (("newest", 1), ("best", 0), ("every", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"Retention: {name} must be an integer >= {least}, not {value!r}.")
        object.__setattr__(self, "transient", frozenset(self.transient))

    def keeps(
        self,
        role: str,
        trials: Sequence[FrozenTrial],
        directions: Sequence[StudyDirection],
        trajectory: Trajectory | None = None,
    ) -> frozenset[int]:
        """Numbers of the ``trials`` (those that have stored something as ``role``) that keep it."""
        kept = {t.number for t in trials if not _is_settled(t)}
        if role not in self.transient:
            kept.update(_newest(trials, self.newest))
            kept.update(t.number for t in trials if self.every and t.number % self.every == 0)
            kept.update(_best(trials, directions, self.best))
            return frozenset(kept)
        groups: dict[Hashable, list[FrozenTrial]] = {}
        for trial in trials:
            group = "the study" if trajectory is None else trajectory(trial)
            if group is not None:
                groups.setdefault(group, []).append(trial)
        for members in groups.values():
            kept.update(_newest(members, self.newest))
        return frozenset(kept)

    def explain(self, role: str) -> str:
        """One clause: what this policy keeps of ``role``."""
        newest = "the newest trial" if self.newest == 1 else f"the newest {self.newest} trials"
        if role in self.transient:
            return f"keeps {role!r} of {newest} of each open trajectory (Retention(newest=...))"
        best = f", the best {self.best}" if self.best else ""
        every = f" and every trial whose number is divisible by {self.every}" if self.every else ""
        return f"keeps {role!r} of {newest}{best}{every} (Retention(newest=, best=, every=))"


def _is_settled(trial: FrozenTrial) -> bool:
    if trial.state is TrialState.FAIL and trial.datetime_complete is not None:
        now = datetime.datetime.now(trial.datetime_complete.tzinfo)
        return now - trial.datetime_complete > _GRACE
    return trial.state.is_finished()


def _newest(trials: Iterable[FrozenTrial], count: int) -> list[int]:
    return heapq.nlargest(count, (t.number for t in trials))


def _best(
    trials: Iterable[FrozenTrial], directions: Sequence[StudyDirection], count: int
) -> set[int]:
    complete = [t for t in trials if t.state is TrialState.COMPLETE]
    feasible = [t for t in complete if all(c <= 0.0 for c in t.constraints.values())]
    best: set[int] = set()
    for candidates in (complete, feasible):
        for objective, direction in enumerate(directions):
            sign = -1.0 if direction is StudyDirection.MAXIMIZE else 1.0
            ranked = [
                (sign * t.values[objective], t.number)
                for t in candidates
                if t.values is not None
                and len(t.values) == len(directions)
                and not math.isnan(t.values[objective])
            ]
            best.update(number for _, number in heapq.nsmallest(count, ranked))
    return best
