"""Solving the inner problem. One loop, ``inner_solve``; one file per method."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import check_count, is_number
from .._errors import RequirementError
from .._results import SUCCESS, Result, Status
from .._twice import saying_what_has_no_derivative
from .._typing import Params
from ..operators import scalar
from ..problem import BilevelProblem
from ._settings import Setting, Value, check_number, check_setting, resolve, times

InnerState = dict[str, Params]
"""A solver's memory between steps, by role (``{"velocity": {...}}``). Empty for none."""

InnerObjective = Callable[[Params], Tensor]
"""``w -> g(w)`` on one batch at one ``lam``."""

StepFunction = Callable[[Params, InnerState, int], tuple[Params, InnerState, Tensor, Params]]
"""``(w, state, index) -> (w', state', g(w), dg/dw)``: one step, taken in some way."""

Evaluate = Callable[[Params], tuple[Tensor, Params]]
"""``w -> (g(w), dg/dw)`` on the current batch; differentiable where the loop asked for it."""


@dataclass(frozen=True)
class InnerSolution:
    """Where an inner solve ended.

    Attributes:
        inner_params: ``w``; carries a graph where ``create_graph`` was set.
        state: The solver's memory, for a warm start.
        num_steps: Steps taken.
        value: Inner objective before the last step (after it, for solvers that know it). Detached.
        gradient_norm: Norm of its gradient at the same point; NaN if nothing asked for it.
        result: Success, or a sentence that says what to change.
    """

    inner_params: Params
    state: InnerState
    num_steps: int
    value: float
    gradient_norm: float
    result: Result = SUCCESS


class AbstractInnerSolver(abc.ABC):
    """Settings of a method for the inner problem. Frozen; ``inner_solve`` runs it."""

    name: ClassVar[str]

    def hyperparameters(self) -> frozenset[str]:
        """Names of outer parameters that steer the solver itself (a learning rate)."""
        return frozenset()

    def fixed_step_size(self) -> float | None:
        """The step size, if it is one number."""
        return None


class AbstractMinimizer(AbstractInnerSolver):
    """A solver that runs to a tolerance on one batch in one go. It cannot be unrolled."""

    @abc.abstractmethod
    def minimize(
        self, objective: InnerObjective, inner_params: Params, max_steps: int | None
    ) -> InnerSolution:
        """Minimize; ``max_steps`` overrides the solver's own limit (and its tolerance)."""


@dataclass(frozen=True)
class AbstractCurvatureSolver(AbstractInnerSolver):
    """A solver that takes steps on batches, and looks at the objective itself and other batches too.

    It cannot be unrolled: what it makes of the curvature is not differentiated.

    Args:
        max_steps: At most this many steps; exactly this many where ``rtol = atol = 0``.
        rtol: Stop when the gradient norm falls below ``rtol`` times its first value.
        atol: Stop when the gradient norm falls below ``atol``.
    """

    max_steps: int = 100
    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_limits(self)

    @abc.abstractmethod
    def init(self, inner_params: Params) -> InnerState:
        """The memory before the first step."""

    @abc.abstractmethod
    def take(
        self,
        objective_at: Callable[[int], InnerObjective],
        inner_params: Params,
        state: InnerState,
        index: int,
    ) -> tuple[Params, InnerState, Tensor, Params]:
        """One step on batch ``index``, without a graph: ``(w', state', g(w), dg/dw)``."""


class AbstractBlackBox(AbstractInnerSolver):
    """A solver that uses no inner objective. Only zeroth-order estimators can differentiate through it."""

    @abc.abstractmethod
    def solution(self, inner_params: Params, outer_params: Params) -> InnerSolution:
        """The inner solution at ``outer_params``, with the names, shapes and dtypes of ``inner_params``."""


@dataclass(frozen=True)
class AbstractStepSolver(AbstractInnerSolver):
    """A solver that is a step: torch operations only, no branches on values, so it can be unrolled.

    Args:
        step_size: ``eta``.
        max_steps: At most this many steps; exactly this many where ``rtol = atol = 0``.
        rtol: Stop when the gradient norm falls below ``rtol`` times its first value.
        atol: Stop when the gradient norm falls below ``atol``.
        weight_decay: Times ``w``, added to the gradient, as ``torch.optim`` does. It belongs to the solver
            and not to the inner objective, so methods for inner *solutions* refuse it.
        max_norm: The gradient is scaled down to this norm, over all entries, before anything is added.
    """

    settings: ClassVar[tuple[str, ...]] = ("step_size", "weight_decay")
    """Names of the fields that may be hyperparameters."""

    step_size: Setting = 0.1
    max_steps: int = 100
    rtol: float = 0.0
    atol: float = 0.0
    weight_decay: Setting = field(default=0.0, kw_only=True)
    max_norm: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        label = type(self).__name__
        check_limits(self)
        for name in self.settings:
            check_setting(f"{label}: {name}", getattr(self, name))
        if isinstance(self.step_size, (int, float)) and not (
            self.step_size > 0 and math.isfinite(self.step_size)
        ):
            raise ValueError(f"{label} needs a positive finite step_size, got {self.step_size}.")
        check_number(f"{label}: weight_decay", self.weight_decay, 0.0)
        if self.max_norm is not None and not (is_number(self.max_norm) and self.max_norm > 0):
            raise ValueError(f"{label} needs max_norm > 0 or None, got {self.max_norm!r:.80}.")

    def hyperparameters(self) -> frozenset[str]:
        return frozenset(v for s in self.settings if isinstance(v := getattr(self, s), str))

    def fixed_step_size(self) -> float | None:
        return float(self.step_size) if isinstance(self.step_size, (int, float)) else None

    def has_schedule(self) -> bool:
        """Whether one of its settings is a function, which may depend on outer parameters."""
        return any(callable(getattr(self, s)) for s in self.settings)

    def depends_on_index(self, outer_params: Params) -> bool:
        """Whether the same step would be another one at another index, its batch aside."""
        return True

    def is_linear(self) -> bool:
        """Whether the step is linear in point and gradient, and in nothing else: its tangent is then itself."""
        return False

    def has_constant_settings(self) -> bool:
        """Whether no setting is a hyperparameter or a schedule, and no gradient is scaled down."""
        settings = (getattr(self, s) for s in self.settings)
        return self.max_norm is None and all(isinstance(v, (int, float)) for v in settings)

    def setting(self, name: str, outer_params: Params, index: int) -> Value:
        """The value at a step of one of :attr:`settings`."""
        return resolve(getattr(self, name), outer_params, index, name)

    def has_entry_for_each_step(self, outer_params: Params) -> bool:
        """Whether one of its settings is a function, or the name of a hyperparameter with more than one entry."""
        named = (outer_params[n] for n in self.hyperparameters() if n in outer_params)
        return self.has_schedule() or any(v.dim() > 0 for v in named)

    def clipped(self, gradient: Params) -> Params:
        """The gradient after ``max_norm``; differentiable where its norm is zero, too."""
        if self.max_norm is None:
            return gradient
        square = torch.stack([g.square().sum() for g in gradient.values()]).sum()
        too_long = square > self.max_norm**2
        shrink = self.max_norm * torch.where(too_long, square, torch.ones_like(square)).rsqrt()
        factor = torch.where(too_long, shrink, torch.ones_like(shrink))
        return {k: g * factor.to(g.dtype) for k, g in gradient.items()}

    def regularized(
        self, gradient: Params, inner_params: Params, outer_params: Params, index: int
    ) -> Params:
        """The gradient after ``max_norm`` and ``weight_decay``."""
        gradient = self.clipped(gradient)
        if self.weight_decay == 0.0:
            return gradient
        decay = times(inner_params, self.setting("weight_decay", outer_params, index))
        return _tree.add(gradient, decay)

    def has_moved(self, state: InnerState) -> bool:
        """Whether the step that led to this memory let its gradient move the inner parameters."""
        return True

    @abc.abstractmethod
    def init(self, inner_params: Params) -> InnerState:
        """The memory before the first step."""

    @abc.abstractmethod
    def step(
        self,
        evaluate: Evaluate,
        inner_params: Params,
        outer_params: Params,
        state: InnerState,
        index: int,
    ) -> tuple[Params, InnerState, Tensor, Params]:
        """One step: ``(w', state', g(w), dg/dw)``."""


def check_limits(solver: AbstractStepSolver | AbstractCurvatureSolver) -> None:
    """Refuse ``max_steps``, ``rtol`` and ``atol`` that make no sense.

    Raises:
        ValueError: naming the solver.
    """
    label = type(solver).__name__
    check_count(label, "max_steps", solver.max_steps, 0)
    for name in ("rtol", "atol"):
        tolerance = getattr(solver, name)
        if not (is_number(tolerance) and tolerance >= 0):
            raise ValueError(f"{label} needs {name} >= 0, got {tolerance!r:.80}.")


def gradient_of(
    objective: InnerObjective, inner_params: Params, create_graph: bool
) -> tuple[Tensor, Params]:
    """``g`` and ``dg/dw`` at ``inner_params``; as a function of ``w`` and ``lam`` if ``create_graph``."""
    with torch.enable_grad():
        at = inner_params if create_graph else _tree.leaves(inner_params)
        with saying_what_has_no_derivative("inner_objective"):
            value = scalar(objective(at), "inner_objective")
        if not value.requires_grad:
            raise RequirementError(
                "inner_objective does not depend on inner_params through differentiable torch operations."
            )
        gradients = torch.autograd.grad(
            value, tuple(at.values()), create_graph=create_graph, materialize_grads=True
        )
    return value, _tree.from_list(at, gradients)


def inner_solve(
    problem: BilevelProblem,
    solver: AbstractInnerSolver,
    inner_params: Params,
    outer_params: Params,
    *,
    start: int = 0,
    state: InnerState | None = None,
    num_steps: int | None = None,
    create_graph: bool = False,
    take: StepFunction | None = None,
) -> InnerSolution:
    """Run an inner solver: ``max_steps`` steps, or fewer where a tolerance is met.

    Args:
        problem: Its ``inner_batch(start + t)`` is the batch of step ``t``.
        solver: The method.
        inner_params: ``w_0``.
        outer_params: ``lam``.
        start: Index of the first step.
        state: The solver's memory from an earlier call; ``None`` for a fresh one.
        num_steps: Exactly this many steps instead of the solver's own limits.
        create_graph: Keep the graph from ``w_0`` and ``lam`` to the result.
        take: How a step solver's steps are taken, in place of :func:`take_step`.

    Raises:
        RequirementError: if ``create_graph`` is asked of a solver that cannot be unrolled.
    """
    if isinstance(solver, AbstractMinimizer):
        if create_graph:
            raise RequirementError(
                f"{type(solver).__name__} cannot be unrolled: its steps branch on values. Use Implicit with "
                f"it, or a step solver (GradientDescent, HeavyBall, Adam) with Unroll."
            )
        objective = objective_at(problem, _tree.detach(outer_params), start)
        return solver.minimize(objective, _tree.detach(inner_params), num_steps)
    if isinstance(solver, AbstractBlackBox):
        if create_graph:
            raise RequirementError("A black box cannot be unrolled; use ZerothOrder with it.")
        return solver.solution(_tree.detach(inner_params), _tree.detach(outer_params))
    if isinstance(solver, AbstractCurvatureSolver):
        if create_graph:
            raise RequirementError(
                f"{type(solver).__name__} cannot be unrolled: what it makes of the curvature is not differentiated. Use "
                f"Implicit with it, or a step solver (GradientDescent, HeavyBall, Adam) with Unroll."
            )
        take = partial(solver.take, partial(objective_at, problem, _tree.detach(outer_params)))
    elif not isinstance(solver, AbstractStepSolver):
        raise RequirementError(
            f"inner_solver must be an AbstractStepSolver, AbstractCurvatureSolver, AbstractMinimizer or "
            f"AbstractBlackBox, not {solver!r:.80}."
        )
    w = inner_params if create_graph else _tree.detach(inner_params)
    lam = outer_params if create_graph else _tree.detach(outer_params)
    memory = solver.init(_tree.detach(inner_params)) if state is None else state
    if take is None:
        assert isinstance(solver, AbstractStepSolver)
        take = partial(take_step, problem, solver, lam, create_graph)
    budget = solver.max_steps if num_steps is None else num_steps
    tolerant = num_steps is None and (solver.rtol > 0 or solver.atol > 0)
    taken, norm, first = 0, math.nan, math.nan
    value = torch.tensor(math.nan, device="cpu")
    converged = not tolerant
    while taken < budget and not (tolerant and converged):
        w, memory, value, gradient = take(w, memory, start + taken)
        taken += 1
        if tolerant:
            norm = float(_tree.norm(_tree.detach(gradient)))
            first = norm if math.isnan(first) else first
            converged = norm <= max(solver.atol, solver.rtol * first)
            if not math.isfinite(norm):
                break
    return InnerSolution(
        inner_params=w,
        state=memory,
        num_steps=taken,
        value=float(value.detach()),
        gradient_norm=norm,
        result=verdict(solver, w, float(value.detach()) if taken else 0.0, norm, converged),
    )


def take_step(
    problem: BilevelProblem,
    solver: AbstractStepSolver,
    outer_params: Params,
    create_graph: bool,
    inner_params: Params,
    state: InnerState,
    index: int,
) -> tuple[Params, InnerState, Tensor, Params]:
    """One step on inner batch ``index``: ``(w', state', g(w), dg/dw)``."""
    objective = objective_at(problem, outer_params, index)
    evaluate = partial(gradient_of, objective, create_graph=create_graph)
    return solver.step(evaluate, inner_params, outer_params, state, index)


def objective_at(problem: BilevelProblem, outer_params: Params, index: int) -> InnerObjective:
    """The inner objective on the batch of step ``index``."""
    batch = problem.inner_batch(index)
    return lambda at: problem.inner_objective(dict(at), dict(outer_params), batch)


def verdict(
    solver: AbstractInnerSolver, w: Params, value: float, norm: float, converged: bool
) -> Result:
    """How a solve ended, in words."""
    if not _tree.all_finite(_tree.detach(w)) or not math.isfinite(value):
        return Result(
            Status.NONFINITE,
            f"The inner solve by {type(solver).__name__} ended in NaN or infinite values (inner objective "
            f"{value:.3g}); lower its step size, or tighten the bounds of the hyperparameters that it diverges at.",
        )
    if not converged:
        return Result(
            Status.MAX_STEPS_REACHED,
            f"{type(solver).__name__} stopped at a gradient norm of {norm:.1e}, above its tolerance; raise its "
            f"max_steps, or loosen atol or rtol.",
        )
    return SUCCESS
