"""An estimator that writes down where it is, and ends its run when its CPU time is used up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optuna_hypergrad as ohg
from optuna_hypergrad import _tree
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator

Params = dict[str, Any]


class Moment(NamedTuple):
    seconds: float
    steps: int
    samples: int
    inner_params: Params
    outer_params: Params


class OutOfTime(Exception):
    """The budget of a run is used up."""


@dataclass
class Record:
    """Of one run.

    Args:
        budget: CPU seconds.
        num_moments: How often to write down, evenly over the budget.

    Attributes:
        samples: Drawn for gradients so far, counted by :meth:`counting`.
    """

    budget: float
    num_moments: int
    moments: list[Moment] = field(default_factory=list)
    samples: int = 0
    steps: int = 0
    start: float = field(default_factory=time.process_time)

    def note(self, inner_params: Params, outer_params: Params) -> None:
        seconds = time.process_time() - self.start
        self.steps += 1
        due = len(self.moments) * self.budget / self.num_moments
        if seconds >= due:
            where = (_tree.detach(x) for x in (inner_params, outer_params))
            self.moments.append(Moment(seconds, self.steps - 1, self.samples, *where))
        if seconds >= self.budget:
            raise OutOfTime

    def counting(self, problem: ohg.BilevelProblem) -> ohg.BilevelProblem:
        """``problem``, with its samples counted."""

        def counted(draw: Any) -> Any:
            def drawn(step: int) -> Any:
                batch = draw(step)
                self.samples += len(batch[1])
                return batch

            return drawn

        return ohg.BilevelProblem(
            problem.inner_objective,
            problem.outer_objective,
            counted(problem.inner_batch),
            counted(problem.outer_batch),
        )


@dataclass(frozen=True)
class Recorded(AbstractHypergradientEstimator):
    """``of``, which does all the work; ``record`` is told of each point before its estimate."""

    of: AbstractHypergradientEstimator
    record: Record

    def __getattribute__(self, name: str) -> Any:
        if name in ("solves", "carries", "requires", "name"):
            return getattr(object.__getattribute__(self, "of"), name)
        return object.__getattribute__(self, name)

    def check(self, *arguments: Any) -> None:
        self.of.check(*arguments)

    def estimate(
        self,
        problem: Any,
        inner_solver: Any,
        inner_params: Any,
        outer_params: Any,
        step: int = 0,
        state: Any = None,
    ) -> Any:
        self.record.note(inner_params, outer_params)
        return self.of.estimate(problem, inner_solver, inner_params, outer_params, step, state)
