"""Reverse differentiation through the inner steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .. import _tree
from .._errors import RequirementError
from .._typing import Params
from ..inner import AbstractInnerSolver, AbstractStepSolver, inner_solve
from ..problem import BilevelProblem
from ._base import AbstractPullbackEstimator, Cotangents, EstimatorState, Pulled, Solved


@dataclass(frozen=True)
class Unroll(AbstractPullbackEstimator):
    """``w_{t+1} = Phi_t(w_t, lam)``, differentiated step by step; truncated to the last steps if asked.

    Sees the inner solver's own hyperparameters and the initialization, and is exact for the inner
    *iterate*, solved or not. Memory grows with the number of differentiated steps.

    References: Domke (2012); Franceschi, Donini, Frasconi & Pontil (2017), "Forward and reverse
    gradient-based hyperparameter optimization", algorithm 1; truncation: Shaban, Cheng, Hatch & Boots
    (2019), "Truncated back-propagation for bilevel optimization".

    Args:
        truncation: Differentiate only the last ``truncation`` steps; ``None`` for all. The bias is
            ``O((1 - eta mu)^truncation)`` for gradient descent.
    """

    name: ClassVar[str] = "unroll"
    requires: ClassVar[frozenset[str]] = frozenset({"differentiable_step", "second_derivatives"})
    sees: ClassVar[str] = (
        "Unroll sees what the objectives, or the inner solver's step size and momentum, use in the "
        "differentiated steps."
    )

    truncation: int | None = None

    def __post_init__(self) -> None:
        if self.truncation is not None and self.truncation < 1:
            raise ValueError(f"Unroll needs truncation >= 1 or None, got {self.truncation}.")

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        if inner_solver is None:
            raise RequirementError(
                "Unroll differentiates the steps of an inner solver, and none was given; pass inner_solver=, or "
                "use Implicit at a solution found elsewhere."
            )
        if not isinstance(inner_solver, AbstractStepSolver):
            raise RequirementError(
                f"{type(inner_solver).__name__} cannot be unrolled: its steps branch on values. Use Implicit "
                f"with it, or a step solver (GradientDescent, HeavyBall, Adam) with Unroll."
            )
        if inner_solver.max_steps < 1:
            raise RequirementError(
                "Unroll needs at least one inner step to differentiate; raise max_steps."
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
        lam = _tree.leaves(outer_params)
        index, memory, start, skipped = state.inner_index, state.solver_state, inner_params, 0
        if self.truncation is not None and self.truncation < inner_solver.max_steps:
            lead = inner_solver.max_steps - self.truncation
            head = inner_solve(
                problem,
                replace(inner_solver, max_steps=lead),
                inner_params,
                outer_params,
                start=index,
                state=memory,
            )
            index, memory, start, skipped = (
                index + head.num_steps,
                head.state,
                head.inner_params,
                head.num_steps,
            )
        w0 = _tree.leaves(start)
        with torch.enable_grad():
            tail = inner_solve(
                problem,
                inner_solver,
                w0,
                lam,
                start=index,
                state=memory,
                num_steps=self.truncation if skipped else None,
                create_graph=True,
            )
        graph = tail.inner_params
        truncated = skipped > 0

        def pullback(cotangent: Params) -> Pulled:
            alive = [k for k, v in graph.items() if v.requires_grad]
            gradients = torch.autograd.grad(
                [graph[k] for k in alive],
                (*lam.values(), *w0.values()),
                [cotangent[k].to(graph[k].dtype) for k in alive],
                allow_unused=True,
                retain_graph=True,
            )
            initial: Cotangents = dict(zip(w0, gradients[len(lam) :], strict=True))
            cotangent.clear()
            return Pulled(
                outer=dict(zip(lam, gradients, strict=False)),
                initial={k: None for k in w0} if truncated else initial,
                stats={"num_differentiated_steps": float(tail.num_steps)},
            )

        solution = replace(
            tail,
            inner_params=_tree.detach(graph),
            state={role: _tree.detach(v) for role, v in tail.state.items()},
            num_steps=skipped + tail.num_steps,
        )
        return Solved(solution, pullback)
