"""Which trajectory gets the next step: a race in which clearly bad ones wait."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from .trajectory import Trajectory


@dataclass(frozen=True)
class Race:
    """Settings of the race between trajectories (after Li et al. 2020, "A system for massively parallel
    hyperparameter tuning": successive halving that never waits).

    Args:
        slice_steps: Steps of a trajectory's first slice; each further slice doubles the total.
        reduction: A trajectory gets its next slice at once if it is among the best one in so many of
            those that got as far; otherwise a new setting is tried.
        max_steps: Steps after which a trajectory is over; ``None`` for no limit.
        patience: Steps without a better value after which a trajectory is over; ``None`` leaves that
            to the step rule.
    """

    slice_steps: int = 3
    reduction: int = 3
    max_steps: int | None = None
    patience: int | None = None

    def is_over(self, trajectory: Trajectory) -> bool:
        if trajectory.stop is not None:
            return True
        if self.max_steps is not None and len(trajectory.steps) >= self.max_steps:
            return True
        return self.patience is not None and trajectory.since_best >= self.patience

    def choose(
        self, trajectories: Mapping[int, Trajectory], taken: Collection[int]
    ) -> Trajectory | None:
        """The trajectory to continue, or ``None``: ask the base sampler for a setting."""
        free = [t for t in trajectories.values() if t.id not in taken and not self.is_over(t)]
        begun = [t for t in reversed(free) if len(t.steps) not in self.rungs(len(t.steps))]
        if begun:
            return min(begun, key=final_value)
        for rung in reversed(self.rungs(max((len(t.steps) for t in free), default=0))):
            waiting = [t for t in free if len(t.steps) == rung]
            for t in sorted(waiting, key=final_value):
                if self.rank(t, trajectories, rung) < 1.0 / self.reduction:
                    return t
        return None

    def comparable(self, trajectories: Iterable[Trajectory]) -> dict[int, float]:
        """What a trajectory is worth beside the others, by id: its best value among its first steps, as
        many as every one has had a turn to take; among all of them once all trajectories are over."""
        known = [t for t in trajectories if t.best is not None]
        count = None if all(map(self.is_over, known)) else self.slice_steps
        return {
            t.id: next((v for v in t.curve[:count][-1:] if v < math.inf), t.best.value)
            for t in known
            if t.best is not None
        }

    def best_of(
        self,
        some: Iterable[Trajectory],
        trajectories: Mapping[int, Trajectory],
        taken: Collection[int],
        share: float = 0.5,
    ) -> Trajectory | None:
        """The best of ``some`` that can be continued and is not clearly bad among all."""
        free = [t for t in some if t.id not in taken and not self.is_over(t)]
        good = [t for t in free if self.rank(t, trajectories, len(t.steps)) <= share]
        return min(good, key=final_value, default=None)

    def rungs(self, upto: int) -> list[int]:
        """Numbers of steps after which the race is decided anew."""
        rungs = [self.slice_steps]
        while rungs[-1] < upto:
            rungs.append(2 * rungs[-1])
        return rungs

    def rank(
        self, trajectory: Trajectory, trajectories: Mapping[int, Trajectory], rung: int
    ) -> float:
        """Share of the trajectories that got as far that are better, counting this one as half."""
        rivals = [t for t in trajectories.values() if len(t.steps) >= rung or self.is_over(t)]
        better = sum(1 for t in rivals if final_value(t) < final_value(trajectory))
        return (better + 0.5) / max(len(rivals), 1)


def final_value(trajectory: Trajectory) -> float:
    return trajectory.curve[-1] if trajectory.curve else math.inf
