"""Two estimators, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from .._arguments import check_count, is_number
from .._typing import Params
from ..inner import AbstractInnerSolver
from ..problem import BilevelProblem
from ._base import AbstractHypergradientEstimator
from ._estimate import EstimatorState, HypergradientEstimate

_OWN = ("phase", "sum", "count", "before")


@dataclass(frozen=True)
class Stalled:
    """A condition: the outer objective has stopped improving.

    Its mean over the last ``patience`` outer steps is not lower than the mean over the ``patience`` steps before
    them by more than ``rtol`` of the latter's size. Means, because single values are of different batches.
    """

    patience: int = 10
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        check_count("Stalled", "patience", self.patience, 1)
        if not (is_number(self.rtol) and 0 <= self.rtol < 1):
            raise ValueError(f"Stalled needs 0 <= rtol < 1, got {self.rtol!r:.80}.")


@dataclass(frozen=True)
class TwoPhase(AbstractHypergradientEstimator):
    """``first`` until ``switch``, and ``second`` from where it ends.

    A cheap and biased estimator finds the region in which a dear and unbiased one is worth its price. Once it has
    switched it stays with ``second``, also when a run is continued from a checkpoint. It remembers the phase in
    the ``state`` of its estimates: outside of ``minimize_bilevel``, hand that on from step to step.

    Reference: Shen, Wang, Yang & Xu (2024), "Memory-efficient gradient unrolling for large-scale bi-level
    optimization", section 3.3 (the two-phase paradigm).

    Args:
        first: For example ``Unroll(truncation=10)`` or ``Implicit(Neumann(...))``.
        second: For example ``ForwardGradient(...)``.
        switch: The outer step from which ``second`` is used, or a condition on the outer objective.
    """

    name: ClassVar[str] = "two_phase"

    first: AbstractHypergradientEstimator
    second: AbstractHypergradientEstimator
    switch: int | Stalled = Stalled()

    def __post_init__(self) -> None:
        for label in ("first", "second"):
            given = getattr(self, label)
            if not isinstance(given, AbstractHypergradientEstimator):
                raise ValueError(
                    f"TwoPhase needs an estimator such as Unroll(truncation=10) as {label}=, got {given!r:.80}."
                )
        if isinstance(self.switch, Stalled):
            return
        if isinstance(self.switch, bool) or not isinstance(self.switch, int) or self.switch < 0:
            raise ValueError(
                f"TwoPhase needs switch= to be an outer step (an integer from 0 on) or Stalled(...), got "
                f"{self.switch!r:.80}."
            )

    @property
    def solves(self) -> bool:  # type: ignore[override]
        """As ``second``, with which a run ends."""
        return self.second.solves

    @property
    def carries(self) -> str | None:
        if isinstance(self.switch, Stalled):
            return "the outer values that Stalled looks at (pass an outer step as switch=)"
        return self.first.carries or self.second.carries

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        for estimator in (self.first, self.second):
            estimator.check(problem, inner_solver, inner_params, outer_params)

    def estimate(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
    ) -> HypergradientEstimate:
        state = EstimatorState() if state is None else state
        own = {k: state.numbers[k] for k in _OWN if k in state.numbers}
        due = isinstance(self.switch, int) and step >= self.switch
        second = due or own.get("phase", 1.0) > 1.0
        estimator, prefix = (self.second, "second/") if second else (self.first, "first/")
        found = estimator.estimate(
            problem, inner_solver, inner_params, outer_params, step, _part(state, prefix)
        )
        numbers = {"phase": 2.0} if second else self._watched(own, float(found.outer_value))
        numbers |= {prefix + k: v for k, v in found.state.numbers.items()}
        tensors = {prefix + k: v for k, v in found.state.tensors.items()}
        return replace(
            found,
            stats={**found.stats, "phase": 2.0 if second else 1.0},
            state=replace(found.state, tensors=tensors, numbers=numbers),
        )

    def _watched(self, own: dict[str, float], value: float) -> dict[str, float]:
        """The phase to come, and the mean over a window of steps beside the one before it."""
        if not isinstance(self.switch, Stalled):
            return {"phase": 1.0}
        total, count = own.get("sum", 0.0) + value, own.get("count", 0.0) + 1.0
        now = {"phase": 1.0, "sum": total, "count": count}
        if "before" in own:
            now["before"] = own["before"]
        if count < self.switch.patience:
            return now
        mean = total / count
        if "before" in own and not mean < own["before"] - self.switch.rtol * abs(own["before"]):
            return {"phase": 2.0}
        return {"phase": 1.0, "before": mean}


def _part(state: EstimatorState, prefix: str) -> EstimatorState:
    """What belongs to one of the two."""
    return replace(
        state,
        tensors={k[len(prefix) :]: v for k, v in state.tensors.items() if k.startswith(prefix)},
        numbers={k[len(prefix) :]: v for k, v in state.numbers.items() if k.startswith(prefix)},
    )
