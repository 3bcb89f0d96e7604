"""Reverse differentiation through momentum descent that runs backwards, exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from .. import _tree
from .._errors import RequirementError
from .._results import Result, Status
from .._typing import Params
from ..inner import AbstractInnerSolver, HeavyBall, inner_solve
from ..problem import BilevelProblem
from ._base import AbstractPullbackEstimator
from ._estimate import EstimatorState, Pulled, Solved
from ._fixed_point import OutOfRangeError
from ._reversing import Descent, rational

_FEW_LEVELS = 2.0**20
"""Multiples of the resolution below which rounding shows in the hypergradient."""


@dataclass(frozen=True)
class Reversible(AbstractPullbackEstimator):
    """Momentum descent in whole numbers, undone step by step on the way back instead of being kept.

    What ``Unroll()`` gives for an inner ``HeavyBall``, in the memory of one step: beside it ``T P log2(1 /
    momentum)`` bits (0.18 bits for each inner parameter and step at a momentum of 0.9). Cost: the inner steps,
    and about 3 gradient evaluations a step on the way back. The momentum is rounded to a multiple of ``2^-16``,
    and the hypergradient is the one at the rounded momentum.

    ``w`` is held in multiples of ``2^-fraction_bits``; velocities keep 39 bits below the largest that there has
    been, 30 where all is float32 or narrower (a CPU then takes half the time for the whole numbers, as long as ``w``
    stays below ``2^(52 - fraction_bits)``). The way back must arrive at the start, bit for bit: an error says so if
    the gradients of ``inner_objective`` were not the same twice.

    Reference: Maclaurin, Duvenaud & Adams (2015), "Gradient-based hyperparameter optimization through
    reversible learning", algorithms 2 and 3.

    Args:
        fraction_bits: Inner parameters must stay below ``2^(61 - fraction_bits)`` in magnitude: 131,072 by default,
            at a resolution of 5.7e-14. Growing out of it is a failure that says so; so small that they would be
            rounded away, they are refused.
    """

    name: ClassVar[str] = "reversible"
    requires: ClassVar[frozenset[str]] = frozenset(
        {"differentiable_step", "second_derivatives", "deterministic_gradient"}
    )
    sees: ClassVar[str] = (
        "Reversible sees what the objectives, or the inner solver's step size, momentum and weight decay, use in "
        "any step."
    )

    fraction_bits: int = 44

    def __post_init__(self) -> None:
        if type(self.fraction_bits) is not int or not 8 <= self.fraction_bits <= 60:
            raise ValueError(
                f"Reversible needs fraction_bits from 8 to 60, got {self.fraction_bits!r:.80}."
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
                "Reversible undoes the steps of an inner solver, and none was given; pass inner_solver=HeavyBall(...), "
                "or use Implicit at a solution found elsewhere."
            )
        if type(inner_solver) is not HeavyBall:
            raise RequirementError(
                f"{type(inner_solver).__name__} cannot be undone step by step; use Reversible with HeavyBall, whose "
                f"velocity remembers where it came from, or Unroll."
            )
        if inner_solver.nesterov:
            raise RequirementError(
                "HeavyBall(nesterov=True) cannot be undone: its last step can only be taken back with the gradient "
                "at the point before it. Use nesterov=False, or Unroll."
            )
        if inner_solver.momentum == 0:
            raise RequirementError(
                "HeavyBall(momentum=0) cannot be undone: nothing remembers the last gradient. Use a momentum above "
                "0, or Unroll."
            )
        if inner_solver.max_steps < 1:
            raise RequirementError(
                "Reversible needs at least one inner step to differentiate; raise max_steps."
            )
        rational(inner_solver, outer_params, 0, inner_params)

    def solve(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        state: EstimatorState | None = None,
    ) -> Solved:
        self.check(problem, inner_solver, inner_params, outer_params)
        assert isinstance(inner_solver, HeavyBall)
        state = EstimatorState() if state is None else state
        memory = state.solver_state or inner_solver.init(_tree.detach(inner_params))
        start, velocity = state.inner_index, memory["velocity"]
        try:
            descent = Descent(
                problem,
                inner_solver,
                inner_params,
                velocity,
                outer_params,
                self.fraction_bits,
                start,
            )
        except OutOfRangeError as error:
            raise RequirementError(
                f"inner_params reach {error.value:.3g}. {self._out_of_range()}"
            ) from None
        solution = inner_solve(
            problem,
            inner_solver,
            inner_params,
            outer_params,
            start=start,
            state=memory,
            take=descent.take,
        )
        solution = replace(solution, state=descent.memory())
        if descent.levels < _FEW_LEVELS and not descent.failed:
            resolution = 2.0**-self.fraction_bits
            raise RequirementError(
                f"inner_params stay below {descent.levels * resolution:.3g} in magnitude, and Reversible(fraction_bits="
                f"{self.fraction_bits}) holds them in multiples of {resolution:.3g}: they would be rounded away. Raise "
                f"fraction_bits, rescale them, or use Unroll."
            )
        if descent.too_large:
            message = (
                f"The inner parameters reached {descent.too_large:.3g} at inner step {descent.num_steps}. Lower the step "
                f"size if the inner solve diverges. {self._out_of_range()}"
            )
            solution = replace(solution, result=Result(Status.DIVERGED, message))

        def pullback(to_start: bool, cotangent: Params) -> Pulled:
            if descent.failed:
                solution.result.raise_if_failed()
            before = descent.num_recomputed
            outer, initial = descent.pull(cotangent, to_start)
            cotangent.clear()
            stats = {
                "num_differentiated_steps": float(descent.num_steps),
                "num_recomputed_steps": float(descent.num_recomputed - before),
                "bytes_aside": float(descent.bytes_aside),
            }
            return Pulled(outer, initial, stats=stats)

        return Solved(solution, partial(pullback, True), partial(pullback, False))

    def _out_of_range(self) -> str:
        return (
            f"Reversible(fraction_bits={self.fraction_bits}) holds inner parameters below "
            f"{2.0 ** (61 - self.fraction_bits):.6g} in magnitude; lower fraction_bits, rescale them, or use Unroll."
        )
