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
    """Keep the tensors of the newest trials, of the best, and of some that are spread over the study.

    The tensors of a trial that has not finished are always kept, and those of a failed trial for an
    hour, so that a retry finds them.

    Args:
        newest: how many of the newest finished trials keep theirs.
        best: how many of the best completed trials keep theirs: the best of all, and the best
            among those that satisfy the constraints. For each objective.
        every: trials whose number is divisible by this keep theirs; 1 keeps all, 0 turns it off.
        at_most: keep no more than so many because of ``every`` (unless that is 1): when there would be
            more, only those whose number is divisible by twice as much, and so on. ``None`` for no limit.
        transient: roles that only serve to go on from: of these, ``best`` and ``every`` keep
            nothing, and ``newest`` counts within each trajectory that is not over.
    """

    newest: int = 2
    best: int = 1
    every: int = 10
    at_most: int | None = 20
    transient: frozenset[str] = frozenset({"gradient", "step_state", "checkpoint"})

    def __post_init__(self) -> None:
        for name, least in (("newest", 1), ("best", 0), ("every", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"Retention: {name} must be an integer >= {least}, not {value!r}.")
        if self.at_most is not None and (type(self.at_most) is not int or self.at_most < 1):
            raise ValueError(
                f"Retention: at_most must be an integer >= 1 or None, not {self.at_most!r}."
            )
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
            spacing = self._spacing(max((t.number for t in trials), default=0))
            kept.update(t.number for t in trials if spacing and t.number % spacing == 0)
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

    def _spacing(self, last: int) -> int:
        spacing = self.every
        if self.at_most is not None and spacing > 1:
            while last // spacing + 1 > self.at_most:
                spacing *= 2
        return spacing

    def explain(self, role: str) -> str:
        """One clause: what this policy keeps of ``role``."""
        newest = "the newest trial" if self.newest == 1 else f"the newest {self.newest} trials"
        if role in self.transient:
            return f"keeps {role!r} of {newest} of each open trajectory (Retention(newest=...))"
        best = f", the best {self.best}" if self.best else ""
        every = f" and every trial whose number is divisible by {self.every}" if self.every else ""
        if self.every > 1 and self.at_most is not None:
            every += f" (or, above {self.at_most} of them, by twice as much, and so on)"
        return f"keeps {role!r} of {newest}{best}{every} (Retention(newest=, best=, every=))"


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether all its constraints hold; they do not where they are no numbers."""
    try:
        return all(c <= 0.0 for c in trial.constraints.values())
    except TypeError:  # also of Optuna, for attributes whose keys are no text
        return False


def _is_settled(trial: FrozenTrial) -> bool:
    if trial.state is TrialState.FAIL and trial.datetime_complete is not None:
        now = datetime.datetime.now(trial.datetime_complete.tzinfo)
        return now - trial.datetime_complete > _GRACE
    return trial.state.is_finished()


def _is_number(value: object) -> bool:
    """SQLite lets any type into any column."""
    return isinstance(value, (int, float)) and not math.isnan(value)


def _newest(trials: Iterable[FrozenTrial], count: int) -> list[int]:
    return heapq.nlargest(count, (t.number for t in trials))


def _best(
    trials: Iterable[FrozenTrial], directions: Sequence[StudyDirection], count: int
) -> set[int]:
    complete = [t for t in trials if t.state is TrialState.COMPLETE]
    feasible = [t for t in complete if is_feasible(t)]
    best: set[int] = set()
    for candidates in (complete, feasible):
        for objective, direction in enumerate(directions):
            sign = -1.0 if direction is StudyDirection.MAXIMIZE else 1.0
            ranked = [
                (sign * t.values[objective], t.number)
                for t in candidates
                if t.values is not None
                and len(t.values) == len(directions)
                and _is_number(t.values[objective])
            ]
            best.update(number for _, number in heapq.nsmallest(count, ranked))
    return best
