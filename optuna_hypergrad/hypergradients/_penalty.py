"""Value-function penalties: ``f(y) + s (g(y) - min g)``. First derivatives only."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import _tree
from .._errors import RequirementError
from .._typing import Params
from ..inner import (
    AbstractInnerSolver,
    AbstractMinimizer,
    AbstractStepSolver,
    GradientDescent,
    InnerSolution,
)
from ..inner._base import InnerState
from ..problem import BilevelProblem
from ._base import AbstractHypergradientEstimator, refuse_solver_hyperparameters, sees_objectives
from ._estimate import Cotangents, EstimatorState, HypergradientEstimate
from ._outer_gradients import _finite, _first_failure, combine, outer_value_at
from ._pace import Schedule, check_schedule, scheduled
from ._slopes import Slopes, difference, outer_slopes, slopes

Returned = Literal["inner", "penalized"]
RETURNED: tuple[Returned, ...] = ("inner", "penalized")


@dataclass(frozen=True)
class AbstractPenalty(AbstractHypergradientEstimator):
    """What the methods with two inner problems share: ``z`` minimizes ``g``, and ``y`` sees ``f``, too.

    Args:
        returns: Which of them is ``w``, for the caller, who keeps it and gives it back; the other one is in the state.
            ``"inner"``: ``z``, which solves the bilevel problem's lower level, and has learned nothing from ``f``.
            ``"penalized"``: ``y``, which has. It is the better model where ``f`` is a loss of samples that may be
            trained on; its ``outer_value`` is then one of training (PBGD, BOME: where the last step of ``y`` began).
    """

    begins_at_y: ClassVar[bool] = False
    """Whether ``z`` begins at ``y`` at each step, so that the state need not keep it."""

    returns: Returned = field(default="inner", kw_only=True)

    def __post_init__(self) -> None:
        if self.returns not in RETURNED:
            raise ValueError(
                f"{type(self).__name__} needs returns to be 'inner' (z, near argmin g) or 'penalized' (y, which the outer "
                f"objective moves, too), got {self.returns!r:.80}."
            )

    @property
    def solves(self) -> bool:  # type: ignore[override]
        """Whether a run ends with a solve at its last ``lam``. One would take ``y`` from what it has of ``f``."""
        return self.returns == "inner"

    @property
    def resumed_as(self) -> str:
        return f"{type(self).__name__}(returns={self.returns!r})"

    @property
    def carries(self) -> str:
        return "its second inner variable, and the number of steps that its penalty depends on"

    @property
    def sees(self) -> str:
        return sees_objectives(type(self).__name__)

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        label = type(self).__name__
        if not isinstance(inner_solver, (AbstractStepSolver, AbstractMinimizer)):
            given = "none was given" if inner_solver is None else type(inner_solver).__name__
            raise RequirementError(
                f"{label} minimizes the inner objective, and another one beside it, with the inner solver, which must be "
                f"one that can do so ({given}): HeavyBall(0.1, max_steps=10) or LBFGS(), for example. A black box takes "
                f"ZerothOrder."
            )
        refuse_solver_hyperparameters(label, inner_solver, outer_params)

    def _estimate(
        self,
        problem: BilevelProblem,
        outer_params: Params,
        step: int,
        state: EstimatorState,
        z: InnerSolution,
        y: Params,
        y_value: Tensor,
        parts: tuple[Cotangents, Cotangents],
        stats: dict[str, float],
        results: tuple[Any, ...],
        tensors: Params,
    ) -> HypergradientEstimate:
        """What ``returns`` asks for; ``tensors`` holds what the state keeps beside the other of ``y`` and ``z``."""
        value = combine(*parts, outer_params, type(self).__name__, self.sees)
        if self.returns == "penalized":
            w, outer_value = y, y_value
            kept = {} if self.begins_at_y else {f"z/{k}": v for k, v in z.inner_params.items()}
        else:
            w, kept = z.inner_params, {f"y/{k}": v for k, v in y.items()}
            outer_value = torch.tensor(outer_value_at(problem, w, outer_params, step), device="cpu")
        tensors = {**kept, **tensors}
        result = _first_failure(z.result, *results, _finite(value, outer_value))
        numbers = {"count": state.numbers.get("count", 0.0) + 1.0}
        after = EstimatorState(
            state.inner_index + z.num_steps, z.state or None, _tree.detach(tensors), numbers
        )
        return HypergradientEstimate(value, outer_value, _tree.detach(w), result, stats, after)

    def _both(self, inner_params: Params, state: EstimatorState) -> tuple[Params, Params]:
        """``y`` and ``z`` of the step before; at first, and where the inner problem begins anew, both are ``inner_params``."""
        given = _tree.detach(inner_params)
        if not state.inner_index:
            return given, given
        if self.returns == "penalized":
            return given, part(state.tensors, "z/") or given
        return part(state.tensors, "y/") or given, given


@dataclass(frozen=True)
class AbstractJointPenalty(AbstractPenalty):
    """A penalty method that moves ``y`` by one step at a time, from the point at which ``lam`` moves.

    Args:
        step_size: Of ``y``: a number, or ``t -> number`` where ``t`` counts the estimator's steps from 0; ``None``
            for that of an inner ``GradientDescent``.
        same_batch: ``z`` is moved, and ``g(y) - g(z)`` taken, on one inner batch: number ``t`` at the estimator's step
            ``t``, for all ``max_steps``. Otherwise batches go on with each inner step, and the gap has the next one.
            See each method.
    """

    step_size: Schedule | None = field(default=None, kw_only=True)
    same_batch: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(type(self).__name__, "step_size", self.step_size, none=True)

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        super().check(problem, inner_solver, inner_params, outer_params)
        known = isinstance(inner_solver, GradientDescent) and inner_solver.fixed_step_size()
        if self.step_size is None and not known:
            label = type(self).__name__
            raise RequirementError(
                f"{label}() moves its own inner variable with the step size of an inner GradientDescent, a number, and was "
                f"given {type(inner_solver).__name__}, whose step size means something else: {label}(step_size=0.1)."
            )

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
        count = int(state.numbers.get("count", 0.0))
        if count and not state.inner_index:
            raise RequirementError(
                f"{type(self).__name__} moves its own inner variable by one step at a time, and this run begins the inner "
                f"problem anew at every outer step; use warm_start=True, or F2SA, which solves both each time."
            )
        y, z_before = self._both(inner_params, state)
        if self.same_batch:
            batch = problem.inner_batch(count)
            below_problem = BilevelProblem(
                problem.inner_objective, problem.outer_objective, lambda _: batch
            )
            z = self._inner(below_problem, inner_solver, z_before, outer_params, y, state)
        else:
            z = self._inner(problem, inner_solver, z_before, outer_params, y, state)
            batch = problem.inner_batch(state.inner_index + z.num_steps)
        f = slopes(
            problem.outer_objective, y, outer_params, problem.outer_batch(step), "outer_objective"
        )
        above = slopes(problem.inner_objective, y, outer_params, batch, "inner_objective")
        below = outer_slopes(
            problem.inner_objective, z.inner_params, outer_params, batch, "inner_objective"
        )
        slope_outer, gap = difference(above.outer, below.outer), float(above.value - below.value)
        s = self._weight(f, above.inner, slope_outer, gap, count)
        eta = self._step_size(inner_solver, count)
        after = {
            k: v - self._direction(f.inner[k], above.inner[k], s).mul_(eta) for k, v in y.items()
        }
        stats = {
            "num_inner_steps": float(z.num_steps + 1),
            "penalty": s,
            "gap": gap,
        }
        scaled = {k: None if d is None else s * d for k, d in slope_outer.items()}
        return self._estimate(
            problem,
            outer_params,
            step,
            state,
            z,
            after,
            f.value,
            (f.outer, scaled),
            stats,
            (),
            {},
        )

    def _step_size(self, inner_solver: AbstractInnerSolver | None, count: int) -> float:
        if self.step_size is not None:
            return scheduled(type(self).__name__, "step_size", self.step_size, count)
        known = inner_solver.fixed_step_size() if inner_solver is not None else None
        assert known is not None  # see check
        return known

    @abc.abstractmethod
    def _inner(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        y: Params,
        state: EstimatorState,
    ) -> InnerSolution:
        """``z``, near ``argmin g``."""

    @abc.abstractmethod
    def _weight(
        self, f: Slopes, slope: Params, slope_outer: Cotangents, gap: float, count: int
    ) -> float:
        """``s``, from ``f`` at ``y``, ``g_w(y)``, ``g_lam(y) - g_lam(z)`` and ``g(y) - g(z)``."""

    @abc.abstractmethod
    def _direction(self, f: Tensor, g: Tensor, s: float) -> Tensor:
        """Along which ``y`` falls, from ``f_w(y)`` and ``g_w(y)``: fresh memory."""


def part(tensors: Params, prefix: str) -> Params:
    """The tensors whose names begin so, without that."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def packed(state: InnerState | None, prefix: str) -> Params:
    """A solver's memory as named tensors."""
    return {f"{prefix}{r}/{k}": v for r, tree in (state or {}).items() for k, v in tree.items()}


def unpacked(tensors: Params, prefix: str) -> InnerState | None:
    """What :func:`packed` has made."""
    found: InnerState = {}
    for name, v in part(tensors, prefix).items():
        role, _, key = name.partition("/")
        found.setdefault(role, {})[key] = v
    return found or None


def in_words(solution: InnerSolution, label: str, what: str) -> InnerSolution:
    """A solution whose failure says which of the inner problems it is of."""
    if solution.result:
        return solution
    said = f"{label}, {what}: {solution.result.message}"
    return replace(solution, result=replace(solution.result, message=said))
