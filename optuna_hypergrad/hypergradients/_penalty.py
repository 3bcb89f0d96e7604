"""Value-function penalties: ``f(y) + s (g(y) - min g)``. First derivatives only."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import ObjectiveError, RequirementError
from .._typing import Batch, Objective, Params
from ..inner import (
    AbstractInnerSolver,
    AbstractMinimizer,
    AbstractStepSolver,
    GradientDescent,
    InnerSolution,
)
from ..inner._base import InnerState
from ..operators import scalar
from ..problem import BilevelProblem
from ._base import (
    AbstractHypergradientEstimator,
    Cotangents,
    EstimatorState,
    HypergradientEstimate,
    _finite,
    _first_failure,
    combine,
    outer_value_at,
    refuse_solver_hyperparameters,
    sees_objectives,
)
from ._pace import Schedule, check_schedule, scheduled


class Slopes(NamedTuple):
    """An objective and its first derivatives at one point."""

    value: Tensor
    inner: Params
    outer: Cotangents


@dataclass(frozen=True)
class AbstractPenalty(AbstractHypergradientEstimator):
    """What the methods with two inner problems share. ``w`` (here ``z``) is the caller's; ``y`` is in the state."""

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
        parts: tuple[Cotangents, Cotangents],
        stats: dict[str, float],
        results: tuple[Any, ...],
        tensors: Params,
    ) -> HypergradientEstimate:
        label = type(self).__name__
        value = combine(*parts, outer_params, label, self.sees)
        outer_value = torch.tensor(outer_value_at(problem, z.inner_params, outer_params, step))
        result = _first_failure(z.result, *results, _finite(value, outer_value))
        numbers = {"count": state.numbers.get("count", 0.0) + 1.0}
        after = EstimatorState(
            state.inner_index + z.num_steps, z.state or None, _tree.detach(tensors), numbers
        )
        return HypergradientEstimate(
            value, outer_value, _tree.detach(z.inner_params), result, stats, after
        )


@dataclass(frozen=True)
class AbstractJointPenalty(AbstractPenalty):
    """A penalty method that moves ``y`` by one step at a time, from the point at which ``lam`` moves.

    Args:
        step_size: Of ``y``: a number, or ``t -> number`` where ``t`` counts the estimator's steps from 0; ``None``
            for that of an inner ``GradientDescent``.
    """

    step_size: Schedule | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
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
        y = part(state.tensors, "y/") or _tree.detach(inner_params)
        z = self._inner(problem, inner_solver, inner_params, outer_params, y, state)
        batch = problem.inner_batch(state.inner_index + z.num_steps)
        f = slopes(
            problem.outer_objective, y, outer_params, problem.outer_batch(step), "outer_objective"
        )
        above, below = (
            slopes(problem.inner_objective, at, outer_params, batch, "inner_objective")
            for at in (y, _tree.detach(z.inner_params))
        )
        gap = difference(above.outer, below.outer)
        s = self._weight(f, above.inner, gap, count)
        eta = self._step_size(inner_solver, count)
        after = {
            k: v - self._direction(f.inner[k], above.inner[k], s).mul_(eta) for k, v in y.items()
        }
        stats = {
            "num_inner_steps": float(z.num_steps + 1),
            "penalty": s,
            "gap": float(above.value - below.value),
        }
        scaled = {k: None if d is None else s * d for k, d in gap.items()}
        return self._estimate(
            problem,
            outer_params,
            step,
            state,
            z,
            (f.outer, scaled),
            stats,
            (),
            {f"y/{k}": v for k, v in after.items()},
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
    def _weight(self, f: Slopes, slope: Params, gap: Cotangents, count: int) -> float:
        """``s``, from ``f`` at ``y``, ``g_w(y)`` and ``g_lam(y) - g_lam(z)``."""

    @abc.abstractmethod
    def _direction(self, f: Tensor, g: Tensor, s: float) -> Tensor:
        """Along which ``y`` falls, from ``f_w(y)`` and ``g_w(y)``: fresh memory."""


def slopes(
    objective: Objective, inner_params: Params, outer_params: Params, batch: Batch, label: str
) -> Slopes:
    """The objective and its derivatives with respect to both; ``None`` where it ignores a hyperparameter."""
    w, lam = _tree.leaves(inner_params), _tree.leaves(outer_params)
    with torch.enable_grad():
        value = scalar(objective(w, lam, batch), label)
        if not value.requires_grad:
            raise ObjectiveError(
                f"{label} depends neither on inner_params nor on outer_params through differentiable torch operations; "
                f"compute it from the arguments that it is given."
            )
        found = torch.autograd.grad(value, (*w.values(), *lam.values()), allow_unused=True)
    by_w = {
        k: torch.zeros_like(v) if g is None else g
        for (k, v), g in zip(w.items(), found, strict=False)
    }
    return Slopes(value.detach(), by_w, dict(zip(lam, found[len(w) :], strict=True)))


def difference(a: Cotangents, b: Cotangents) -> Cotangents:
    """``a - b``, ``None`` where both are."""
    found: Cotangents = {}
    for k, x in a.items():
        y = b[k]
        if x is None:
            found[k] = None if y is None else -y
        else:
            found[k] = x if y is None else x - y
    return found


def squared(parts: Mapping[str, Tensor | None]) -> float:
    """The sum of squares of all entries."""
    return sum(float(p.double().square().sum()) for p in parts.values() if p is not None)


def product(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> float:
    """The inner product over all entries that both have."""
    total = 0.0
    for k, x in a.items():
        y = b[k]
        if x is not None and y is not None:
            total += float((x.double() * y.double()).sum())
    return total


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
