"""What an estimator is, how it is called, and the checks that hold for all of them.

d f(w*(lam), lam) / d lam  =  direct term (df/dlam)  +  indirect term (through w*)
"""

from __future__ import annotations

import abc
import time
from dataclasses import replace
from typing import ClassVar

import torch

from .. import _tree
from .._arguments import check_count
from .._errors import RequirementError, ZeroHypergradientError
from .._typing import Params
from ..inner import AbstractInnerSolver, AbstractStepSolver, InnerSolution, inner_solve
from ..problem import AbstractProblem, BilevelProblem, check_problem
from ._estimate import EstimatorState, HypergradientEstimate, Solved
from ._outer_gradients import _finite, _first_failure, combine, nothing_found, outer_gradients

_LARGE = 100_000
"""Entries of a direct term from which memory is worth more than one evaluation of ``f``."""


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


def sees_objectives(method: str) -> str:
    """The ``sees`` of a method that looks at objectives alone."""
    return (
        f"{method} sees what the inner or outer objective uses, not how the inner solver moves (learning rates, schedules, "
        f"initializations): Unroll sees those."
    )


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
