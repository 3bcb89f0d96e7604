"""The tasks of an episode one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from .._errors import RequirementError
from .._results import SUCCESS, Result
from .._typing import Params
from ..episodes import EpisodeBatch
from ..inner import AbstractInnerSolver
from ..problem import BilevelProblem
from ._base import AbstractHypergradientEstimator
from ._estimate import EstimatorState, HypergradientEstimate
from .implicit import Implicit


@dataclass(frozen=True)
class PerTask(AbstractHypergradientEstimator):
    """The mean of one estimate for each task of :class:`Episodes`.

    All tasks together are one inner problem with a block-diagonal Hessian: one inner solve and one linear solve, whose
    step lengths suit no task in particular, and the graphs of all tasks in memory. One by one, each solver adapts to
    its task (tolerances, line searches, CG), and memory does not grow with the number of tasks. Random estimators draw
    the same numbers for each.

    Reference: Rajeswaran, Finn, Kakade & Levine (2019), "Meta-learning with implicit gradients", algorithms 1 and 2.

    Args:
        estimator: For one task; one that hands nothing on from step to step (no proxy, single loop, penalty method
            or ``Auto``, and ``Implicit`` without ``warm_start_solver`` and with ``refresh_every=1``), as no task has a step before it.

    Raises:
        RequirementError: if the problem has no tasks, or ``estimator`` hands something on.
    """

    name: ClassVar[str] = "per_task"

    estimator: AbstractHypergradientEstimator = field(default_factory=Implicit)

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, AbstractHypergradientEstimator):
            raise ValueError(
                f"PerTask needs an estimator such as Implicit() as estimator=, got {self.estimator!r:.80}."
            )

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        if not isinstance(problem, EpisodeBatch):
            raise RequirementError(
                f"PerTask takes the tasks of Episodes one by one, and this problem, a {type(problem).__name__}, has "
                f"none; use {type(self.estimator).__name__} itself."
            )
        if self.estimator.carries is not None:
            label = type(self.estimator).__name__
            raise RequirementError(
                f"PerTask starts its estimator anew for each task, as the tasks of the next step are others, and {label} "
                f"hands on from step to step {self.estimator.carries}: that would have no effect, or start from nothing "
                f"each time. Use an estimator that carries nothing, such as Implicit() or Unroll()."
            )
        first = {k: v[:1] for k, v in inner_params.items()}
        self.estimator.check(problem.each()[0], inner_solver, first, outer_params)

    def estimate(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
    ) -> HypergradientEstimate:
        assert isinstance(problem, EpisodeBatch)
        found: list[HypergradientEstimate] = []
        result: Result = SUCCESS
        for i, task in enumerate(problem.each()):
            of_task = {k: v[i : i + 1] for k, v in inner_params.items()}
            found.append(self.estimator.estimate(task, inner_solver, of_task, outer_params, step))
            if result and not found[-1].result:
                result = replace(found[-1].result, message=f"Task {i}: {found[-1].result.message}")
        return HypergradientEstimate(
            {k: torch.stack([e.value[k] for e in found]).mean(0) for k in outer_params},
            torch.stack([e.outer_value for e in found]).mean(),
            {k: torch.cat([e.inner_params[k] for e in found]) for k in inner_params},
            result,
            _combined([e.stats for e in found]),
        )


def _combined(stats: list[dict[str, float]]) -> dict[str, float]:
    """Counts and times of all tasks; of anything else, the largest."""
    return {
        k: (sum if k.startswith(("num_", "seconds_")) else max)(s[k] for s in stats if k in s)
        for k in stats[0]
    }
