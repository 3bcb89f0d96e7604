"""One step of everything at a time: ``w``, ``v ~ H^-1 f_w`` and ``lam`` move from the same point."""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .. import _tree
from .._arguments import is_number
from .._errors import RequirementError
from .._twice import check_differentiable_twice
from .._typing import Params
from ..inner import AbstractInnerSolver, AbstractStepSolver, GradientDescent
from ..inner._base import verdict
from ..kept_graph import vjp_through_kept_graph
from ..operators import Flattener, scalar
from ..problem import BilevelProblem
from ._base import AbstractHypergradientEstimator, refuse_solver_hyperparameters, sees_objectives
from ._estimate import Cotangents, EstimatorState, HypergradientEstimate
from ._outer_gradients import _finite, _first_failure, combine, outer_gradients
from ._pace import Schedule, check_schedule, paced, scheduled


class Directions(NamedTuple):
    """What one inner and one outer batch say at one point ``(w, v, lam)``.

    Attributes:
        inner_value: ``g``.
        outer_value: ``f``.
        slope: ``g_w``.
        product: ``H v``, ``(P,)``.
        cotangent: ``f_w``, ``(P,)``.
        value: ``f_lam - M^T v``.
        tensors: What the method carries on, beside ``v``.
    """

    inner_value: Tensor
    outer_value: Tensor
    slope: Params
    product: Tensor
    cotangent: Tensor
    value: Params
    tensors: Params


class Derivatives(NamedTuple):
    """As :class:`Directions`, with the two parts of the hypergradient apart."""

    inner_value: Tensor
    outer_value: Tensor
    slope: list[Tensor]
    product: Tensor
    cotangent: Tensor
    direct: Cotangents
    indirect: Cotangents


@dataclass(frozen=True)
class AbstractOneStep(AbstractHypergradientEstimator):
    """Settings of all methods that take one step of the linear system for each step of ``w`` and ``lam``.

    The inner solver moves ``w``, by one step (``max_steps=1``), with whatever momentum it has; the outer
    optimizer of ``minimize_bilevel`` moves ``lam``. The estimates of the first steps are far off, as ``v``
    begins at zero: ``residual`` in the stats says how far ``v`` has come. They need warm starts.

    A step size of ``v`` under which ``v`` keeps growing by itself is shortened, with a warning that names
    the curvature; where the inner Hessian is not positive semidefinite along ``v``, no step size
    will do, and the estimate fails in words.

    Args:
        step_size: Of ``v``: a number, or ``t -> number`` where ``t`` counts the estimator's steps from 0.
            It must be below ``2 / lambda_max(H)``. ``None`` for that of an inner ``GradientDescent`` (a number or
            a schedule): the papers use one for both.
        damping: Added to the diagonal of ``H``. A bias; what makes singular problems solvable.
    """

    solves: ClassVar[bool] = False

    step_size: Schedule | None = None
    damping: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        label = type(self).__name__
        check_schedule(label, "step_size", self.step_size, none=True)
        if not (is_number(self.damping) and 0 <= self.damping < math.inf):
            raise ValueError(f"{label} needs a finite damping >= 0, got {self.damping!r:.80}.")

    @property
    def carries(self) -> str:
        return "its estimate of the linear system's solution"

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
        single_step(label, inner_solver)
        refuse_solver_hyperparameters(label, inner_solver, outer_params)
        if self.step_size is None and not (
            isinstance(inner_solver, GradientDescent)
            and not isinstance(inner_solver.step_size, str)
        ):
            raise RequirementError(
                f"{label}() moves v with the step size of an inner GradientDescent, and was given "
                f"{type(inner_solver).__name__}, whose step size means something else; give v one of its own, below "
                f"2 / lambda_max of the inner Hessian: {label}(step_size=0.1)."
            )

    def _step_size(
        self, solver: AbstractStepSolver, outer_params: Params, index: int, count: int
    ) -> float:
        if self.step_size is None:
            found: Any = solver.setting("step_size", outer_params, index)
            if isinstance(found, dict):
                raise RequirementError(
                    f"{type(self).__name__}() moves v with the inner solver's step size, which is a factor for each "
                    f"inner parameter; give v one of its own: {type(self).__name__}(step_size=0.1)."
                )
            return float(found)
        return scheduled(type(self).__name__, "step_size", self.step_size, count)


@dataclass(frozen=True)
class AbstractSingleLoop(AbstractOneStep):
    """A method of that kind with full-size directions: :meth:`_directions` is all that it has of its own."""

    def estimate(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
    ) -> HypergradientEstimate:
        label = type(self).__name__
        solver = single_step(label, inner_solver)
        state = EstimatorState() if state is None else state
        count = steps_taken(label, state)
        layout = Flattener(inner_params)
        v = state.tensors.get("v")
        if v is None:
            v = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
        w = _tree.detach(inner_params)
        inner_value, outer_value, slope, product, cotangent, value, tensors = self._directions(
            problem, w, outer_params, v, step, count, state
        )

        memory = solver.init(w) if state.solver_state is None else state.solver_state
        moved, memory, _, _ = solver.step(
            functools.partial(_known, w, (inner_value, slope), label, type(solver).__name__),
            w,
            outer_params,
            memory,
            state.inner_index,
        )
        del slope  # vectors of the size of w go as soon as they can
        if self.damping:
            product = product.add(v, alpha=self.damping)
        pace = paced(
            label,
            self._step_size(solver, outer_params, state.inner_index, count),
            (
                float(torch.dot(v, v)),
                float(torch.dot(v, product)),
                float(torch.dot(product, product)),
            ),
            state.numbers,
        )
        residual, scale = product - cotangent, float(cotangent.norm())
        del product, cotangent
        value, average = self._averaged(value, state)
        result = _first_failure(
            verdict(solver, moved, float(inner_value), math.nan, True),
            pace.result,
            _finite(value, outer_value),
        )
        return HypergradientEstimate(
            value,
            outer_value,
            moved,
            result,
            {
                "num_inner_steps": 1.0,
                "num_hvps": 1.0,
                "residual": float(residual.norm()) / scale if scale > 0 else math.nan,
                "step_size": pace.step_size,
            },
            EstimatorState(
                state.inner_index + 1,
                memory or None,
                {**tensors, **average, "v": v.sub(residual, alpha=pace.step_size)},
                {**pace.numbers, "count": count + 1.0},
            ),
        )

    @abc.abstractmethod
    def _directions(
        self,
        problem: BilevelProblem,
        inner_params: Params,
        outer_params: Params,
        v: Tensor,
        step: int,
        count: int,
        state: EstimatorState,
    ) -> Directions:
        """The directions of this step."""

    def _averaged(self, value: Params, state: EstimatorState) -> tuple[Params, Params]:
        """The estimate, from this step's direction, and what is remembered for it."""
        return value, {}


def _known(
    at: Params, known: tuple[Tensor, Params], label: str, solver: str, asked: Params
) -> tuple[Tensor, Params]:
    """What a solver asks for, which is known at one point only."""
    if asked is not at:
        raise RequirementError(
            f"{solver} asks for the inner gradient at another point than w, and {label} knows it at w only; use "
            f"GradientDescent, HeavyBall or Adam."
        )
    return known


def single_step(label: str, inner_solver: AbstractInnerSolver | None) -> AbstractStepSolver:
    """The inner solver, if it is one that takes a single step between outer steps.

    Raises:
        RequirementError: saying what to pass.
    """
    if not isinstance(inner_solver, AbstractStepSolver):
        given = (
            "none was given" if inner_solver is None else f"{type(inner_solver).__name__} is none"
        )
        raise RequirementError(
            f"{label} moves w by one step of an inner solver between outer steps, and {given} that takes steps; pass "
            f"inner_solver=GradientDescent(0.1, max_steps=1), or HeavyBall or Adam."
        )
    if inner_solver.max_steps != 1 or inner_solver.rtol > 0 or inner_solver.atol > 0:
        raise RequirementError(
            f"{label} moves w by exactly one step between outer steps, and {type(inner_solver).__name__} has "
            f"max_steps={inner_solver.max_steps}, rtol={inner_solver.rtol:g}, atol={inner_solver.atol:g}; pass "
            f"max_steps=1 and no tolerance (and burn_in=... for steps before the first outer one)."
        )
    return inner_solver


def steps_taken(label: str, state: EstimatorState) -> int:
    """How many steps the estimator has taken in this run.

    Raises:
        RequirementError: under cold starts.
    """
    count = int(state.numbers.get("count", 0.0))
    if count and not state.inner_index:
        raise RequirementError(
            f"{label} takes one step of the inner problem at a time, and this run begins it anew at every outer step; use "
            f"warm_start=True."
        )
    return count


def derivatives(
    problem: BilevelProblem,
    inner_params: Params,
    outer_params: Params,
    v: Tensor,
    inner_index: int,
    outer_index: int,
    check_twice: bool,
) -> Derivatives:
    """All five on one inner and one outer batch: two gradients and one walk of the graph of one of them."""
    layout = Flattener(inner_params)
    w, lam = _tree.leaves(inner_params), _tree.leaves(outer_params)
    with torch.enable_grad():
        objective = problem.inner_objective(dict(w), dict(lam), problem.inner_batch(inner_index))
        value = scalar(objective, "inner_objective")
        if not value.requires_grad:
            raise RequirementError(
                "inner_objective does not depend on inner_params through differentiable torch operations."
            )
        slopes = torch.autograd.grad(
            value, tuple(w.values()), create_graph=True, materialize_grads=True
        )
    if check_twice:
        check_differentiable_twice(value, slopes, w.values())
    alive = [
        (get_gradient_edge(s), p)
        for s, p in zip(slopes, layout.split(v), strict=True)
        if s.requires_grad
    ]
    found: tuple[Tensor | None, ...] = (None,) * (len(w) + len(lam))
    if alive:
        found = vjp_through_kept_graph(
            [edge for edge, _ in alive], (*w.values(), *lam.values()), [part for _, part in alive]
        )
    hv = [torch.zeros_like(x) if h is None else h for x, h in zip(w.values(), found, strict=False)]
    indirect = {k: None if c is None else -c for k, c in zip(lam, found[len(w) :], strict=True)}
    inner_value, slope = value.detach(), [s.detach() for s in slopes]
    product = layout.flatten(hv)
    del objective, value, slopes, alive, found, hv  # the graph goes before the outer one comes
    outer_value, by_w, direct = outer_gradients(problem, inner_params, outer_params, outer_index)
    cotangent = layout.flatten(list(by_w.values()))
    return Derivatives(inner_value, outer_value, slope, product, cotangent, direct, indirect)


def directions(
    seen: Derivatives, outer_params: Params, names: Params, label: str, sees: str
) -> Directions:
    """The directions that single batches give.

    Raises:
        ZeroHypergradientError: for a hyperparameter that is in neither objective.
    """
    return Directions(
        seen.inner_value,
        seen.outer_value,
        _tree.from_list(names, seen.slope),
        seen.product,
        seen.cotangent,
        combine(seen.direct, seen.indirect, outer_params, label, sees),
        {},
    )


def moving_average(value: Params, state: EstimatorState, theta: float) -> tuple[Params, Params]:
    """``h <- (1 - theta) h + theta value``, begun with the first ``value``, and its memory."""
    before = {k: state.tensors.get(f"average/{k}") for k in value}
    averaged = {
        k: d if (h := before[k]) is None else torch.lerp(h, d, theta) for k, d in value.items()
    }
    return averaged, {f"average/{k}": h for k, h in averaged.items()}


def check_theta(label: str, theta: object) -> None:
    """Refuse a weight outside of (0, 1].

    Raises:
        ValueError: naming ``label``.
    """
    if not (is_number(theta) and 0 < theta <= 1):  # type: ignore[operator]
        raise ValueError(f"{label} needs 0 < theta <= 1, got {theta!r:.80}.")
