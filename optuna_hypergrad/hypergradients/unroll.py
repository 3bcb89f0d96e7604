"""Reverse differentiation through the inner steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from .. import _tree
from .._arguments import check_budget, check_count
from .._errors import RequirementError
from .._typing import Params
from ..inner import AbstractBlackBox, AbstractInnerSolver, AbstractStepSolver, inner_solve
from ..inner._base import InnerState, StepFunction, take_step, verdict
from ..problem import BilevelProblem
from ._base import AbstractPullbackEstimator
from ._estimate import EstimatorState, Pulled, Solved
from ._rewind import Planner, Rewinder, square_root, tree, whole_tape, within


@dataclass(frozen=True)
class Unroll(AbstractPullbackEstimator):
    """``w_{t+1} = Phi_t(w_t, lam)``, differentiated step by step; truncated to the last steps if asked.

    Sees the inner solver's own hyperparameters and the initialization, and is exact for the inner
    *iterate*, solved or not. Cost: the inner steps, and about 1.4 gradient evaluations a step on the way back
    (2.4 where it is taken again).

    References: Domke (2012); Franceschi, Donini, Frasconi & Pontil (2017), "Forward and reverse
    gradient-based hyperparameter optimization", algorithm 1; truncation: Shaban, Cheng, Hatch & Boots
    (2019), "Truncated back-propagation for bilevel optimization".

    Args:
        truncation: Differentiate only the last ``truncation`` steps; ``None`` for all. The bias is
            ``O((1 - eta mu)^truncation)`` for gradient descent.
        recompute: What is kept for the way back. ``"never"``: the graphs of all steps, ``O(T)`` tapes;
            ``"sqrt"``: ``O(sqrt(T))`` states and graphs, and every step is taken twice; ``"tree"``: ``O(log
            T)``, and every step is taken about ``1 + log_8 T`` times; ``"auto"``: the first of them, or of what
            lies between, that fits into ``memory_budget``.
        memory_budget: Bytes for states and graphs, beside a few vectors of the size of ``w`` and ``lam``.
        compile: Compile the inner steps and their way back with ``torch.compile``, once for each inner objective, shapes of
            its batches, and solver (seconds to tens of seconds; define the objective once, not anew in every trial, tune
            the solver's settings as hyperparameters, by name, and make numbers in a batch tensors). With ``"never"``, and with ``"auto"`` where it fits into
            ``memory_budget``, each step keeps the results of its matrix products and convolutions for its way back, under
            half of what a graph keeps: 2.0 to 2.5 gradient evaluations a step in all. Otherwise (and with a version of torch that
            cannot be told what to keep) states only are kept: before every step, or before every ``k``-th with
            ``"auto"``. In all about 2.7 gradient evaluations a step with all states, 3.1 with every third, for
            ``GradientDescent`` and ``HeavyBall`` whose settings are numbers or 0-d hyperparameters; one more for the others
            (``Adam``, ``Lookahead``, schedules, solvers of your own). An inner objective with a ``torch.autograd.Function`` of
            its own is refused.
    """

    name: ClassVar[str] = "unroll"
    requires: ClassVar[frozenset[str]] = frozenset({"differentiable_step", "second_derivatives"})
    sees: ClassVar[str] = (
        "Unroll sees what the objectives, or the inner solver's step size and momentum, use in the "
        "differentiated steps."
    )

    truncation: int | None = None
    recompute: Literal["auto", "never", "sqrt", "tree"] = "auto"
    memory_budget: float = 256e6
    compile: bool = False

    def __post_init__(self) -> None:
        if self.recompute not in ("auto", "never", "sqrt", "tree"):
            raise ValueError(
                f'Unroll needs recompute "auto", "never", "sqrt" or "tree", got {self.recompute!r}.'
            )
        if not isinstance(self.compile, bool):
            raise ValueError(f"Unroll needs compile True or False, got {self.compile!r:.80}.")
        check_budget("Unroll", self.memory_budget)
        check_count("Unroll", "truncation", self.truncation, 1, none=True)

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
        if isinstance(inner_solver, AbstractBlackBox):
            raise RequirementError(
                f"{type(inner_solver).__name__} cannot be unrolled: nothing is known about its steps. Use ZerothOrder with it, "
                f"or a step solver (GradientDescent, HeavyBall, Adam) with Unroll."
            )
        if not isinstance(inner_solver, AbstractStepSolver):
            raise RequirementError(
                f"{type(inner_solver).__name__} cannot be unrolled: its steps branch on values. Use Implicit "
                f"or ZerothOrder with it, or a step solver (GradientDescent, HeavyBall, Adam) with Unroll."
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
        index, memory, start, skipped = state.inner_index, state.solver_state, inner_params, 0
        tolerant = inner_solver.rtol > 0 or inner_solver.atol > 0
        norms: list[float] = []
        converged = False

        def watched(take: StepFunction) -> StepFunction:
            """Steps after which the norm of the gradient is known."""

            def step(
                w: Params, memory: InnerState, index: int
            ) -> tuple[Params, InnerState, Tensor, Params]:
                moved = take(w, memory, index)
                norms.append(float(_tree.norm(_tree.detach(moved[3]))))
                return moved

            return step if tolerant and self.truncation is not None else take

        if self.truncation is not None and self.truncation < inner_solver.max_steps:
            lead = inner_solver.max_steps - self.truncation
            head = inner_solve(
                problem,
                replace(inner_solver, max_steps=lead),
                inner_params,
                outer_params,
                start=index,
                state=memory,
                take=watched(
                    partial(take_step, problem, inner_solver, _tree.detach(outer_params), False)
                ),
            )
            converged = bool(head.result)
            index, memory, start, skipped = (
                index + head.num_steps,
                head.state,
                head.inner_params,
                head.num_steps,
            )
        num_steps = self.truncation if skipped else None
        most = inner_solver.max_steps - skipped
        exact = bool(skipped) or not tolerant
        rewind = self._rewinder()
        rewinder = rewind(problem, inner_solver, outer_params, self._planner(), most, exact)
        tail = inner_solve(
            problem,
            inner_solver,
            start,
            outer_params,
            start=index,
            state=memory,
            num_steps=num_steps,
            take=watched(rewinder.take),
        )
        truncated = skipped > 0
        if truncated and tolerant and not converged and tail.result:
            met = norms[-1] <= max(inner_solver.atol, inner_solver.rtol * norms[0])
            result = verdict(inner_solver, tail.inner_params, tail.value, norms[-1], met)
            tail = replace(tail, gradient_norm=norms[-1], result=result)

        def pullback(keep: bool, cotangent: Params) -> Pulled:
            before = rewinder.num_recomputed
            outer, initial = rewinder.pull(cotangent, keep)
            cotangent.clear()
            stats = {
                "num_differentiated_steps": float(tail.num_steps),
                "num_recomputed_steps": float(rewinder.num_recomputed - before),
            }
            return Pulled(outer, {k: None for k in start} if truncated else initial, stats=stats)

        solution = replace(tail, num_steps=skipped + tail.num_steps)
        return Solved(solution, partial(pullback, True), partial(pullback, False))

    def _rewinder(self) -> Callable[..., Rewinder]:
        if not self.compile:
            return Rewinder
        from .compiled_steps import CompiledRewinder

        room = {"auto": self.memory_budget, "never": math.inf}
        return partial(CompiledRewinder, tapes_within=room.get(self.recompute, 0.0))

    def _planner(self) -> Planner:
        if self.compile:
            from .compiled_steps import all_states, states_within

            if self.recompute == "auto":
                return states_within(self.memory_budget)
            return {"never": all_states, "sqrt": square_root, "tree": tree}[self.recompute]
        if self.recompute == "auto":
            return within(self.memory_budget)
        return {"never": whole_tape, "sqrt": square_root, "tree": tree}[self.recompute]
