"""What an estimator is given, what it returns, and the checks that hold for all of them.

d f(w*(lam), lam) / d lam  =  direct term (df/dlam)  +  indirect term (through w*)
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import check_count
from .._errors import ObjectiveError, RequirementError, ZeroHypergradientError
from .._results import SUCCESS, Result, Status
from .._typing import Params
from ..inner import AbstractInnerSolver, AbstractStepSolver, InnerSolution, inner_solve
from ..inner._base import InnerState
from ..operators import scalar
from ..problem import AbstractProblem, BilevelProblem, check_problem

_LARGE = 100_000
"""Entries of a direct term from which memory is worth more than one evaluation of ``f``."""

Cotangents = dict[str, Tensor | None]
"""By name; ``None`` where there is no path, which is not the same as zero."""


@dataclass(frozen=True)
class EstimatorState:
    """What one outer step hands to the next.

    Attributes:
        inner_index: Index of the next inner batch.
        solver_state: The inner solver's memory; ``None`` for a fresh one.
        tensors: The estimator's own memory; whoever is given none begins anew.
        numbers: Likewise.
    """

    inner_index: int = 0
    solver_state: InnerState | None = None
    tensors: Params = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)

    def cold(self) -> EstimatorState:
        """What is handed on where each inner solve begins anew: the estimator's own memory."""
        return EstimatorState(tensors=self.tensors, numbers=self.numbers)


@dataclass(frozen=True)
class HypergradientEstimate:
    """A hypergradient and how it was come by.

    Attributes:
        value: ``df/dlam``: keys, shapes, dtypes, device of ``outer_params``.
        outer_value: ``f(w, lam)``, a 0-d tensor.
        inner_params: ``w`` after the inner solve: the caller's next warm start.
        result: Success, or a sentence that says what to change.
        stats: ``num_inner_steps``, ``num_hvps``, ``residual``, ``inner_gradient_norm``,
            ``curvature``, ``seconds_inner``, ``seconds_backward`` where they apply.
        state: For the next outer step under warm starts.
    """

    value: Params
    outer_value: Tensor
    inner_params: Params
    result: Result = SUCCESS
    stats: dict[str, float] = field(default_factory=dict)
    state: EstimatorState = EstimatorState()


@dataclass(frozen=True)
class Pulled:
    """A cotangent of the inner solution, pulled back.

    Attributes:
        outer: Cotangents of ``lam``.
        initial: Cotangents of ``w_0``.
        result: Of the linear solve, where there is one.
        stats: Counts and residuals.
        tensors: What the estimator wants back at the next outer step, as ``EstimatorState.tensors``.
        numbers: Likewise.
    """

    outer: Cotangents
    initial: Cotangents
    result: Result = SUCCESS
    stats: dict[str, float] = field(default_factory=dict)
    tensors: Params = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Solved:
    """An inner solution and the map that pulls its cotangents back (and takes them: the dict is emptied)."""

    solution: InnerSolution
    pullback: Callable[[Params], Pulled]
    last_pullback: Callable[[Params], Pulled] | None = None
    """The same for the last time and without ``initial``, where that lets it leave out work or give back memory."""


class AbstractHypergradientEstimator(abc.ABC):
    """Settings of a method for hypergradients. Frozen; it drives the inner solver.

    ``requires`` names what the problem must offer; ``check`` enforces it before any work.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    solves: ClassVar[bool] = True
    """Whether it solves the inner problem, so that a run ends with a solve at its last ``lam``; otherwise it moves ``w``."""

    @property
    def resumed_as(self) -> str:
        """What a run that goes on from a checkpoint must have in common with the one that began: what its state means."""
        return type(self).__name__

    @property
    def carries(self) -> str | None:
        """In words, what its state hands on from step to step beside the inner solver's memory; ``None`` for nothing."""
        return None

    def check(  # noqa: B027
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        """Refuse, before any work, what this method cannot do.

        Raises:
            RequirementError: naming the mismatch and a method without it.
        """

    @abc.abstractmethod
    def estimate(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
    ) -> HypergradientEstimate:
        """Solve the inner problem from ``inner_params``, and estimate ``df/dlam`` there."""


class AbstractPullbackEstimator(AbstractHypergradientEstimator):
    """An estimator that splits into "solve" and "pull a cotangent back", so that stages compose."""

    sees: ClassVar[str]
    """In words, which hyperparameters this method can see; for error messages."""

    @abc.abstractmethod
    def solve(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        state: EstimatorState | None = None,
    ) -> Solved:
        """Solve the inner problem and return the pullback of its solution map."""

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
        if "stationary_point" in self.requires:
            problem = problem.without_start()
        begun = time.perf_counter()
        solved = self.solve(problem, inner_solver, inner_params, outer_params, state)
        solution = solved.solution
        solved_at = time.perf_counter()
        after = EstimatorState(state.inner_index + solution.num_steps, solution.state or None)
        if not _tree.all_finite(solution.inner_params):
            stats = {"num_inner_steps": float(solution.num_steps)}
            return nothing_found(solution, outer_params, stats, after)
        outer_value, cotangent, direct = outer_gradients(
            problem, solution.inner_params, outer_params, step
        )
        large = sum(d.numel() for d in direct.values() if d is not None) >= _LARGE
        if large:
            direct = {}
        pulled = (solved.last_pullback or solved.pullback)(cotangent)
        if large:  # cheaper to compute again than to hold through the solve
            _, _, direct = outer_gradients(problem, solution.inner_params, outer_params, step)
        value = combine(direct, pulled.outer, outer_params, type(self).__name__, self.sees)
        result = _first_failure(solution.result, pulled.result, _finite(value, outer_value))
        stats = {
            "num_inner_steps": float(solution.num_steps),
            **pulled.stats,
            "seconds_inner": solved_at - begun,
            "seconds_backward": time.perf_counter() - solved_at,
        }
        after = replace(after, tensors=pulled.tensors, numbers=pulled.numbers)
        return HypergradientEstimate(
            value, outer_value, solution.inner_params, result, stats, after
        )


def hypergradient(
    problem: AbstractProblem,
    inner_params: Params,
    outer_params: Params,
    *,
    estimator: AbstractHypergradientEstimator,
    inner_solver: AbstractInnerSolver | None = None,
    step: int = 0,
    state: EstimatorState | None = None,
    throw: bool = True,
) -> HypergradientEstimate:
    """The hypergradient ``d f(w*(lam), lam) / d lam`` at ``outer_params``.

    Args:
        problem: Objectives and batches: a :class:`BilevelProblem`, or :class:`Episodes`.
        inner_params: ``w_0``; or the inner solution itself where ``inner_solver`` is ``None``.
        outer_params: ``lam``, external values (``dict`` of floating-point tensors of any shape).
        estimator: The method, e.g. ``Implicit()`` or ``Unroll()``.
        inner_solver: What solves the inner problem from ``inner_params``; ``None`` if it is solved.
        step: Index of the outer batch.
        state: What an earlier call returned, under warm starts.
        throw: Raise on failure; otherwise the failure is in ``result``.

    Raises:
        RequirementError: if the method cannot see a hyperparameter or use the solver.
        SolverError: if a solve failed and ``throw`` is set.
    """
    check_count("hypergradient", "step", step, 0)
    check_methods("hypergradient", estimator, inner_solver)
    check_problem(problem, inner_params, outer_params, step)
    now = problem.at(step)
    estimator.check(now, inner_solver, inner_params, outer_params)
    estimate = estimator.estimate(now, inner_solver, inner_params, outer_params, step, state)
    if throw:
        estimate.result.raise_if_failed()
    return estimate


def check_methods(caller: str, estimator: object, inner_solver: object) -> None:
    """Refuse anything but an estimator and an inner solver, or none.

    Raises:
        RequirementError: naming ``caller``.
    """
    if not isinstance(estimator, AbstractHypergradientEstimator):
        raise RequirementError(
            f"{caller} needs an estimator such as Implicit() or Unroll() as estimator=, not {estimator!r:.80}."
        )
    if not (inner_solver is None or isinstance(inner_solver, AbstractInnerSolver)):
        raise RequirementError(
            f"{caller} needs an inner solver such as HeavyBall(0.1, max_steps=100) as inner_solver=, not "
            f"{inner_solver!r:.80}."
        )


def run_inner(
    problem: BilevelProblem,
    inner_solver: AbstractInnerSolver | None,
    inner_params: Params,
    outer_params: Params,
    state: EstimatorState,
) -> InnerSolution:
    """The inner solve without a graph; none at all where ``inner_solver`` is ``None``."""
    if inner_solver is None:
        return InnerSolution(_tree.detach(inner_params), {}, 0, torch.nan, torch.nan)
    return inner_solve(
        problem,
        inner_solver,
        inner_params,
        outer_params,
        start=state.inner_index,
        state=state.solver_state,
    )


def outer_value_at(
    problem: BilevelProblem, inner_params: Params, outer_params: Params, step: int
) -> float:
    """``f`` on outer batch ``step``, as a number."""
    w, lam = _tree.detach(inner_params), _tree.detach(outer_params)
    with torch.enable_grad():  # it may take derivatives of its own
        value = problem.outer_objective(w, lam, problem.outer_batch(step))
        return float(scalar(value, "outer_objective").detach())


def outer_gradients(
    problem: BilevelProblem, inner_params: Params, outer_params: Params, step: int
) -> tuple[Tensor, Params, Cotangents]:
    """``f``, ``b = df/dw`` and the direct term ``df/dlam`` on outer batch ``step``."""
    w, lam = _tree.leaves(inner_params), _tree.leaves(outer_params)
    with torch.enable_grad():
        value = scalar(
            problem.outer_objective(w, lam, problem.outer_batch(step)), "outer_objective"
        )
        if not value.requires_grad:
            raise ObjectiveError(
                "outer_objective depends neither on inner_params nor on outer_params through "
                "differentiable torch operations; compute it from the arguments that it is given."
            )
        gradients = torch.autograd.grad(value, (*w.values(), *lam.values()), allow_unused=True)
    by_w = {
        k: torch.zeros_like(v) if g is None else g
        for (k, v), g in zip(w.items(), gradients, strict=False)
    }
    return value.detach(), by_w, dict(zip(lam, gradients[len(w) :], strict=True))


def combine(
    direct: Cotangents, indirect: Cotangents, outer_params: Params, method: str, sees: str
) -> Params:
    """Direct plus indirect term; refuses a hypergradient that is zero by construction.

    Raises:
        ZeroHypergradientError: naming the hyperparameter and the methods that can see it.
    """
    total: Params = {}
    for name, like in outer_params.items():
        parts = [p for p in (direct[name], indirect[name]) if p is not None]
        if not parts:
            raise ZeroHypergradientError(
                f"The hypergradient of {name!r} under {method} is zero by construction: neither the outer "
                f"objective nor what {method} differentiates depends on it. {sees} Use {name!r} in an "
                f"objective (the tensor in its second argument: not one from outside, and no float(...) or "
                f"detach() of it), take it out of outer_params, or choose another estimator."
            )
        value = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        total[name] = value.detach().to(like.dtype)
    return total


def nothing_found(
    solution: InnerSolution, outer_params: Params, stats: dict[str, float], state: EstimatorState
) -> HypergradientEstimate:
    """The estimate where the inner solve has left nothing to estimate at: NaN, with its result."""
    nan = _tree.tree_map(lambda v: torch.full_like(v, torch.nan), outer_params)
    return HypergradientEstimate(
        nan,
        torch.tensor(torch.nan, device="cpu"),
        solution.inner_params,
        solution.result,
        stats,
        state,
    )


def sees_objectives(method: str) -> str:
    """The ``sees`` of a method that looks at objectives alone."""
    return (
        f"{method} sees what the inner or outer objective uses, not how the inner solver moves (learning rates, schedules, "
        f"initializations): Unroll sees those."
    )


def _finite(value: Params, outer_value: Tensor) -> Result:
    if not math.isfinite(outer_value.item()):
        return Result(
            Status.NONFINITE,
            f"The outer objective is {float(outer_value)} at the inner solution; keep the hyperparameters "
            f"where the inner problem has a usable solution (tighter bounds, more inner steps).",
        )
    for name, v in value.items():
        if not _tree.finite(v):
            return Result(
                Status.NONFINITE,
                f"The hypergradient of {name!r} holds NaN or infinite entries; check that both objectives are "
                f"differentiable at the inner solution (sqrt, norm and log at 0 are not).",
            )
    return SUCCESS


def _first_failure(*results: Result) -> Result:
    return next((r for r in results if not r), SUCCESS)


def refuse_solver_hyperparameters(
    method: str, inner_solver: AbstractInnerSolver | None, outer_params: Params
) -> None:
    """Raise if an outer parameter steers the inner solver, which ``method`` cannot see.

    Raises:
        ZeroHypergradientError: naming it.
        RequirementError: if the solver adds a weight decay to what the inner objective says.
    """
    if isinstance(inner_solver, AbstractStepSolver) and inner_solver.weight_decay != 0.0:
        raise RequirementError(
            f"{type(inner_solver).__name__}(weight_decay=...) ends where the inner objective plus its decay is "
            f"smallest, and {method} differentiates the solution of the inner objective alone. Write the decay "
            f"into inner_objective, or use Unroll."
        )
    steering = sorted(
        (inner_solver.hyperparameters() if inner_solver is not None else frozenset())
        & outer_params.keys()
    )
    if steering:
        named = ", ".join(repr(n) for n in steering)
        raise ZeroHypergradientError(
            f"{named} steers the inner solver ({type(inner_solver).__name__}), and the inner solution that "
            f"{method} differentiates does not depend on how it was reached: its hypergradient would be "
            f"zero by construction. Use Unroll, which differentiates the steps themselves."
        )
