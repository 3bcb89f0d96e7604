"""(FG)^2U: forward gradients through the inner steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from .. import _tree
from .._typing import Params
from ..inner import AbstractInnerSolver, InnerSolution, inner_solve
from ..problem import BilevelProblem
from ._base import AbstractHypergradientEstimator
from ._columns import (
    check_repeated,
    check_step_solver,
    check_width,
    contract,
    passes,
    room,
    width_of,
)
from ._directional import AbstractDirectionalEstimator, PartialEstimate
from ._directions import flat
from ._estimate import EstimatorState
from ._outer_gradients import combine, nothing_found, outer_gradients
from ._tangents import Pushforward
from .compiled import check_compilable


@dataclass(frozen=True)
class ForwardGradient(AbstractDirectionalEstimator):
    """``(1/b) sum_i s_i v_i`` with ``s_i = f_w . y_T``: unbiased, in memory that grows with neither ``T`` nor ``N``.

    ``y_t = A_t y_{t-1} + B_t v_i`` is the tangent of the inner iterate in direction ``v_i``. Only the indirect
    term is random: the direct term ``f_lam`` is taken exactly, by autograd, and so are the zeros of
    hyperparameters that no inner step depends on. Sees the inner solver's own hyperparameters. Cost: a
    direction takes about 1.5-2.5 gradient evaluations a step, and one column of ``w``, of the solver's memory
    and of ``lam``; a step itself about one, however many directions it carries. Under warm starts the columns
    begin at zero.

    Reference: Shen, Wang, Yang & Xu (2024), "Memory-efficient gradient unrolling for large-scale bi-level
    optimization", NeurIPS, equation 6; orthogonal directions are an addition.

    Args:
        width: Directions that are pushed in one batched product, at most; ``None`` for 8, and up to 64 where
            ``w`` is small.
        memory_budget: Bytes for columns and for the graph of one step. Directions that do not fit are taken in
            further runs of the inner problem.
        compile: Compile the inner gradient and its tangents with ``torch.compile``, once for each inner objective, width
            and shapes of tensors (a minute or two on a CPU): a direction then costs about half as much, a
            third as much where tensors are small. Define the inner objective once, not anew in every trial, and make numbers in a batch tensors. Needs a solver whose step is
            one gradient at ``w`` and algebra, and an inner objective without a ``torch.autograd.Function`` of its own.
        control_variate: A cheap estimator of the same thing (truncated unrolling, ``Implicit(Identity())``), biased
            or not: the directions then only correct it. The estimate stays unbiased, and its variance is that of
            estimating the difference.
    """

    name: ClassVar[str] = "forward_gradient"
    requires: ClassVar[frozenset[str]] = frozenset({"differentiable_step", "second_derivatives"})
    sees: ClassVar[str] = (
        "ForwardGradient sees what the objectives, or the inner solver's step size and momentum, use in the "
        "inner steps."
    )

    width: int | None = None
    memory_budget: float = 256e6
    compile: bool = False
    control_variate: AbstractHypergradientEstimator | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width("ForwardGradient", self.width, self.memory_budget)
        if not isinstance(self.compile, bool):
            raise ValueError(
                f"ForwardGradient needs compile True or False, got {self.compile!r:.80}."
            )
        control = self.control_variate
        if control is not None and not isinstance(control, AbstractHypergradientEstimator):
            raise ValueError(
                f"ForwardGradient needs an estimator such as Unroll(truncation=5), or None, as control_variate=, got "
                f"{control!r:.80}."
            )
        if control is not None and self.seed in _seeds(control):
            raise ValueError(
                f"ForwardGradient and its control_variate both have seed={self.seed}: their directions would be "
                f"the same, and the estimate biased. Give one of them another seed."
            )

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        check_step_solver("ForwardGradient", inner_solver)
        if self.compile:
            check_compilable("ForwardGradient", problem.inner_objective)
        if self.control_variate is not None:
            self.control_variate.check(problem, inner_solver, inner_params, outer_params)

    def group(self, inner_params: Params) -> int:
        return width_of(self.width, inner_params)

    def partial(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
        directions: range | None = None,
    ) -> PartialEstimate:
        solver = check_step_solver("ForwardGradient", inner_solver)
        state = EstimatorState() if state is None else state
        index, memory, begun = state.inner_index, state.solver_state, time.perf_counter()
        where = problem, solver, inner_params, outer_params
        sampled, width = self._sampled(outer_params, step), self.group(inner_params)
        numbers = self._numbers(sampled, directions, width)
        fits = room(*where, memory, index, width, self.memory_budget, "ForwardGradient")
        plan = passes(numbers, width, fits) or [[]]

        def run(blocks: list[range]) -> tuple[InnerSolution, Pushforward]:
            columns = [sampled.columns(b) for b in blocks]
            pushed = Pushforward(*where, columns, "ForwardGradient", self.compile)
            return inner_solve(*where, start=index, state=memory, take=pushed.take), pushed

        solution, pushed = run(plan[0])
        known = nothing_found(
            solution,
            outer_params,
            {"num_inner_steps": float(solution.num_steps), "num_passes": float(len(plan))},
            EstimatorState(index + solution.num_steps, solution.state or None),
        )
        if not _tree.all_finite(solution.inner_params):
            nothing = torch.full((len(numbers),), torch.nan, dtype=torch.float64, device="cpu")
            return PartialEstimate(nothing, numbers, step, known)
        value, slope, direct = outer_gradients(problem, solution.inner_params, outer_params, step)
        moving = {
            k: torch.zeros_like(v) if k in pushed.seen else None for k, v in outer_params.items()
        }
        exact = combine(direct, moving, outer_params, "ForwardGradient", self.sees)
        scalars = [contract(slope, y) for y in pushed.columns()]
        for blocks in plan[1:]:
            del pushed  # its columns, before there are others
            again, pushed = run(blocks)
            check_repeated("ForwardGradient", again, solution, inner_params)
            scalars += [contract(slope, y) for y in pushed.columns()]
        known = replace(
            known,
            value=exact,
            outer_value=value,
            stats={**known.stats, "seconds_forward": time.perf_counter() - begun},
        )
        control = None
        if self.control_variate is not None:
            cheap = self.control_variate.estimate(*where, step, state)
            control = flat(cheap.value) - flat(exact)
            known = replace(known, result=cheap.result if known.result else known.result)
        return PartialEstimate(
            torch.cat([torch.zeros(0, dtype=torch.float64, device="cpu"), *scalars]),
            numbers,
            step,
            known,
            control,
            pushed.seen,
        )


def _seeds(estimator: AbstractHypergradientEstimator) -> set[int]:
    """Of an estimator and of those in it."""
    settings = vars(estimator)
    found = {settings["seed"]} if "seed" in settings else set()
    for value in settings.values():
        if isinstance(value, AbstractHypergradientEstimator):
            found |= _seeds(value)
    return found
