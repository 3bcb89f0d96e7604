"""How much of an implicit hypergradient is due to an inner problem that is not solved to its end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from . import _tree
from ._arguments import check_count
from ._errors import RequirementError
from ._results import SUCCESS, Result
from ._typing import Params
from .hypergradients import EstimatorState, Implicit, hypergradient, run_inner
from .hypergradients._base import check_methods
from .ihvp import linear_solve
from .inner import AbstractInnerSolver
from .inner._base import gradient_of
from .operators import InnerGraph
from .problem import BilevelProblem, check_problem

_SMALL, _LARGE = 1e-2, 0.3


@dataclass(frozen=True)
class InnerBias:
    """What :func:`inner_bias` found; ``print`` it. Estimates of first order: good where they are small.

    Attributes:
        inner_gradient_norm: ``|g_w|``.
        distance: ``|H^-1 g_w|``: how far ``w`` is from the solution, by a Newton step.
        relative_distance: That over ``|w|``.
        relative_bias: ``|h(w - H^-1 g_w) - h(w)| / |h(w - H^-1 g_w)|`` of the hypergradient ``h``.
        by_hyperparameter: The same for each hyperparameter by itself.
        result: Success; or why there is no estimate (all others are NaN then).
    """

    inner_gradient_norm: float
    distance: float
    relative_distance: float
    relative_bias: float
    by_hyperparameter: dict[str, float]
    result: Result = SUCCESS

    def __str__(self) -> str:
        if not self.result:
            return f"The bias cannot be estimated. {self.result.message}"
        said = (
            f"The inner gradient has the norm {self.inner_gradient_norm:.1e}; a Newton step would move w by "
            f"{100 * self.relative_distance:.2g} %, and the hypergradient by {100 * self.relative_bias:.2g} %."
        )
        if self.relative_bias < _SMALL:
            return said
        worst = max(self.by_hyperparameter, key=lambda k: self.by_hyperparameter[k])
        trust = " (too much for the estimate to be trusted)" if self.relative_bias > _LARGE else ""
        return (
            f"{said[:-1]}{trust}, most in {worst!r}. Raise the inner solver's max_steps or tighten its tolerance, or use "
            f"Unroll, which differentiates the iterate."
        )


def inner_bias(
    problem: BilevelProblem,
    inner_params: Params,
    outer_params: Params,
    *,
    estimator: Implicit | None = None,
    inner_solver: AbstractInnerSolver | None = None,
    step: int = 0,
) -> InnerBias:
    """Estimate the error that an inner problem short of its solution leaves in an implicit hypergradient.

    One solve with the estimator's own linear solver finds the Newton step ``H^-1 g_w``; the hypergradient after it is compared
    with that before it. Cost: the inner solve, three linear solves, and a few gradient evaluations.

    Args:
        problem: Objectives and batches.
        inner_params: ``w_0``; or the inner iterate itself where ``inner_solver`` is ``None``.
        outer_params: ``lam``.
        estimator: ``Implicit()`` by default. Its damping shortens the Newton step, too; ``g_w`` is the mean over its
            ``num_batches``.
        inner_solver: What solves the inner problem from ``inner_params``.
        step: Index of the outer batch.

    Raises:
        RequirementError: if ``estimator`` is no ``Implicit``, or cannot be used here.
    """
    estimator = Implicit() if estimator is None else estimator
    if not isinstance(estimator, Implicit):
        raise RequirementError(
            f"inner_bias is about implicit differentiation: estimator must be Implicit(...), not {estimator!r:.80}. "
            f"check_hypergradient checks any."
        )
    check_count("inner_bias", "step", step, 0)
    check_methods("inner_bias", estimator, inner_solver)
    check_problem(problem, inner_params, outer_params, step)
    estimator.check(problem, inner_solver, inner_params, outer_params)
    estimator = replace(estimator, solver=estimator._resolved_solver(inner_solver))
    solution = run_inner(problem, inner_solver, inner_params, outer_params, EstimatorState())
    w, lam = _tree.detach(solution.inner_params), _tree.detach(outer_params)
    if not _tree.all_finite(w):
        return _nothing(solution.result)
    objective, batch = estimator._inner_problem(problem, solution.num_steps)
    graph = InnerGraph(objective, w, lam, batch)
    operator = estimator._operator(graph, batch)
    _, gradient = gradient_of(lambda at: objective(dict(at), dict(lam), batch), w, False)
    flat = graph.layout.flatten(list(gradient.values()), copy=True)
    newton = linear_solve(estimator.solver, operator, flat, throw=False)
    move = graph.layout.unflatten(newton.x)
    del graph, operator
    if not newton.result:
        return _nothing(newton.result)
    before, after = (
        hypergradient(
            problem,
            at,
            lam,
            estimator=estimator,
            step=step,
            state=EstimatorState(inner_index=solution.num_steps),
            throw=False,
        )
        for at in (w, _tree.sub(w, move))
    )
    for found in (before, after):
        if not found.result:
            return _nothing(found.result)
    change = _tree.sub(after.value, before.value)
    distance = float(_tree.norm(move))
    return InnerBias(
        inner_gradient_norm=float(_tree.norm(gradient)),
        distance=distance,
        relative_distance=_ratio(distance, float(_tree.norm(w))),
        relative_bias=_ratio(float(_tree.norm(change)), float(_tree.norm(after.value))),
        by_hyperparameter={
            k: _ratio(float(v.norm()), float(after.value[k].norm())) for k, v in change.items()
        },
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else math.inf)


def _nothing(result: Result) -> InnerBias:
    return InnerBias(math.nan, math.nan, math.nan, math.nan, {}, result)
