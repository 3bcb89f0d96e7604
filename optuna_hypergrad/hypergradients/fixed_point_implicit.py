"""Implicit differentiation of the inner solver's fixed point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._errors import RequirementError, ZeroHypergradientError
from .._twice import check_differentiable_twice, saying_what_has_no_second_derivative
from .._typing import Params
from ..equilibrium import (
    AdjointOperator,
    AdjointSolver,
    Phantom,
    check_adjoint_solver,
    solve_adjoint,
)
from ..inner import AbstractInnerSolver, AbstractStepSolver, Adam, Lookahead
from ..inner._base import InnerState, take_step
from ..problem import BilevelProblem
from ._base import AbstractPullbackEstimator, run_inner
from ._estimate import EstimatorState, Pulled, Solved


@dataclass(frozen=True)
class FixedPointImplicit(AbstractPullbackEstimator):
    """``d_lam = f_lam + (d_lam Phi)^T (I - J^T)^-1 (f_w, 0)`` where the inner solver's step has ``s = Phi(s, lam)``.

    ``s`` is ``w`` and the solver's memory (a velocity), and ``J = d_s Phi``, which momentum makes non-symmetric. A phantom
    gradient of it is the Neumann series, accelerated by the momentum; for gradient descent it is ``Implicit(Neumann(k - 1,
    alpha=tau * step_size))``. Unlike ``Implicit`` it knows the solver's weight decay.

    Cost: the inner solve, one step with its graph, and one product with ``J^T`` (about a Hessian-vector product) for each
    step of the solve; and one more. Memory: one double-backward graph. The error is at most proportional to
    ``fixed_point_residual`` (``|Phi(s) - s|``, in the stats) and to ``residual``.

    References: Geng, Zhang, Bai, Wang & Lin (2021), "On training implicit models"; Grazzi, Franceschi, Pontil & Salzo
    (2020), "On the iteration complexity of hypergradient computation" (fixed-point and conjugate gradient methods).

    Args:
        solver: Of ``(I - J^T) u = b``: ``Phantom(k, tau)`` for ``k`` steps and no more, ``Anderson(rtol=...)`` or
            ``Picard(...)`` for a tolerance, or a linear solver for matrices that are not symmetric.
    """

    name: ClassVar[str] = "fixed_point_implicit"
    requires: ClassVar[frozenset[str]] = frozenset(
        {"stationary_point", "differentiable_step", "second_derivatives"}
    )
    sees: ClassVar[str] = (
        "FixedPointImplicit sees what the inner or outer objective, or the inner solver's weight decay, uses, not how fast "
        "the inner solver moves: Unroll sees that."
    )

    solver: AdjointSolver = field(default_factory=lambda: Phantom(20, 1.0))

    def __post_init__(self) -> None:
        check_adjoint_solver("FixedPointImplicit: solver", self.solver)
        if isinstance(self.solver, Phantom) and self.solver.unrolled:
            raise RequirementError(
                "FixedPointImplicit differentiates one step of the inner solver, and Phantom(unrolled=True) needs several. "
                "Use Phantom(...) without it, or Unroll(truncation=k), which differentiates the last k steps."
            )

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        if inner_solver is None:
            raise RequirementError(
                "FixedPointImplicit differentiates the step of an inner solver, and none was given; pass inner_solver=, or "
                "use Implicit at a solution found elsewhere."
            )
        label = type(inner_solver).__name__
        if not isinstance(inner_solver, AbstractStepSolver):
            raise RequirementError(
                f"{label} has no step that could be differentiated. Use Implicit with it, or a step solver "
                f"(GradientDescent, HeavyBall) with FixedPointImplicit."
            )
        cause = _why_steps_differ(inner_solver)
        if cause:
            raise RequirementError(
                f"{cause}, so that there is no map of which the inner solution is the fixed point. Use Implicit, "
                f"or GradientDescent or HeavyBall without a schedule."
            )
        named = {
            getattr(part, s)
            for part in _layers(inner_solver)
            for s in part.settings
            if s != "weight_decay" and isinstance(getattr(part, s), str)
        }
        steering = sorted(named & outer_params.keys())
        if steering:
            raise ZeroHypergradientError(
                f"{', '.join(map(repr, steering))} steers the inner solver ({label}), and its fixed point does not depend "
                f"on how fast it is reached: the hypergradient would be zero by construction. Use Unroll, which "
                f"differentiates the steps themselves."
            )

    def solve(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        state: EstimatorState | None = None,
    ) -> Solved:
        self.check(problem, inner_solver, inner_params, outer_params)
        assert isinstance(inner_solver, AbstractStepSolver)
        state = EstimatorState() if state is None else state
        solution = run_inner(problem, inner_solver, inner_params, outer_params, state)
        index = state.inner_index + solution.num_steps

        def pullback(cotangent: Params) -> Pulled:
            w, lam = _tree.leaves(solution.inner_params), _tree.leaves(outer_params)
            memory = {role: _tree.leaves(tree) for role, tree in solution.state.items()}
            with torch.enable_grad():
                moved, after, value, gradient = take_step(
                    problem, inner_solver, lam, True, w, memory, index
                )
            before, image = _flat(w, memory), _flat(moved, after)
            check_differentiable_twice(value, image.values())
            operator = AdjointOperator(before, image)
            padded = [cotangent.pop(k) for k in list(cotangent)]
            padded += [torch.zeros_like(v) for v in list(before.values())[len(w) :]]
            b = operator.layout.flatten(padded, copy=True)
            with saying_what_has_no_second_derivative():
                found = solve_adjoint(self.solver, operator, b)
                outer = _pulled(image, operator.layout.split(found.x), lam)
            away = {k: v.detach() - before[k].detach() for k, v in image.items()}
            stats = {
                "num_hvps": float(found.num_products),
                "residual": found.residual,
                "inner_gradient_norm": float(_tree.norm(_tree.detach(gradient))),
                "fixed_point_residual": float(_tree.norm(away)),
            }
            return Pulled(outer, {k: None for k in inner_params}, found.result, stats)

        return Solved(replace(solution, inner_params=_tree.detach(solution.inner_params)), pullback)


def _layers(solver: AbstractStepSolver) -> Iterator[AbstractStepSolver]:
    """The solver, and those that it goes around."""
    yield solver
    for inside in vars(solver).values():
        if isinstance(inside, AbstractStepSolver):
            yield from _layers(inside)


def _why_steps_differ(solver: AbstractStepSolver) -> str | None:
    """What makes one step of a solver another map than the next; ``None`` if nothing does."""
    for part in _layers(solver):
        label = type(part).__name__
        if part.has_schedule():
            return f"{label} with a schedule takes another step each time"
        if isinstance(part, Adam):
            return f"{label} takes another step each time (its moments and their corrections go on changing)"
        if isinstance(part, Lookahead) and part.period > 1:
            return (
                f"{label}(period={part.period}) takes another step each time (its state counts the steps of a period, "
                f"and only the last one moves the inner parameters)"
            )
    return None


def _flat(inner_params: Params, state: InnerState) -> Params:
    """``s``: ``w`` first, then the solver's memory."""
    found = {f"w/{k}": v for k, v in inner_params.items()}
    return found | {
        f"{role}/{k}": v for role, tree in sorted(state.items()) for k, v in tree.items()
    }


def _pulled(image: Params, cotangents: list[Tensor], lam: Params) -> dict[str, Tensor | None]:
    alive = [(v, u) for v, u in zip(image.values(), cotangents, strict=True) if v.requires_grad]
    found = torch.autograd.grad(
        [v for v, _ in alive],
        list(lam.values()),
        [u.to(v.dtype) for v, u in alive],
        allow_unused=True,
    )
    return dict(zip(lam, found, strict=True))
