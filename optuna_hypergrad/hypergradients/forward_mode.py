"""Forward differentiation of the inner steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import _tree
from .._typing import Params
from ..inner import AbstractInnerSolver, InnerSolution, inner_solve
from ..problem import BilevelProblem
from ._base import AbstractPullbackEstimator
from ._columns import (
    check_repeated,
    check_step_solver,
    check_width,
    contract,
    passes,
    room,
    width_of,
)
from ._directions import shaped, unit_rows
from ._estimate import EstimatorState, Pulled, Solved
from ._tangents import Pushforward


@dataclass(frozen=True)
class ForwardMode(AbstractPullbackEstimator):
    """``y_t = A_t y_{t-1} + B_t`` for each entry of ``lam``: the exact derivative of the inner *iterate*.

    ``A = dPhi/dw`` and ``B = dPhi/dlam`` of a step ``Phi``. Sees the inner solver's own hyperparameters, and
    needs no tape: memory does not grow with the number of inner steps. For few hyperparameters: an entry costs
    about 1.5-2.5 gradient evaluations a step, and one column of ``w`` and of the solver's memory. Under warm
    starts the columns begin at zero.

    Reference: Franceschi, Donini, Frasconi & Pontil (2017), "Forward and reverse gradient-based
    hyperparameter optimization", algorithm 2.

    Args:
        width: Columns that are pushed in one batched product, at most; ``None`` for 8, and up to 64 where ``w``
            is small.
        memory_budget: Bytes for columns and for the graph of one step. Where only ``c`` of ``N`` columns fit,
            the inner problem is run once without columns, and then ``ceil(N / c)`` times with a part of them:
            that many gradient evaluations a step more; the columns' cost stays what it is.
    """

    name: ClassVar[str] = "forward_mode"
    requires: ClassVar[frozenset[str]] = frozenset({"differentiable_step", "second_derivatives"})
    sees: ClassVar[str] = (
        "ForwardMode sees what the objectives, or the inner solver's step size and momentum, use in the inner "
        "steps."
    )

    width: int | None = None
    memory_budget: float = 256e6

    def __post_init__(self) -> None:
        check_width("ForwardMode", self.width, self.memory_budget)

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        check_step_solver("ForwardMode", inner_solver)

    def solve(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        state: EstimatorState | None = None,
    ) -> Solved:
        solver = check_step_solver("ForwardMode", inner_solver)
        state = EstimatorState() if state is None else state
        index, memory = state.inner_index, state.solver_state
        where = problem, solver, inner_params, outer_params
        size, width = _tree.num_entries(outer_params), width_of(self.width, inner_params)
        fits = room(*where, memory, index, width, self.memory_budget, "ForwardMode")
        plan = passes(range(size), width, fits)

        def run(blocks: list[range]) -> tuple[InnerSolution, Pushforward]:
            columns = [
                shaped(unit_rows(torch.tensor(b, device="cpu"), size), outer_params) for b in blocks
            ]
            pushed = Pushforward(*where, columns, "ForwardMode")
            solution = inner_solve(*where, start=index, state=memory, take=pushed.take)
            return solution, pushed

        whole = len(plan) == 1
        solution, first = run(plan[0] if whole else [])

        def pullback(cotangent: Params) -> Pulled:
            found = [torch.zeros(0, dtype=torch.float64, device="cpu")]
            for blocks in plan:
                again, pushed = (solution, first) if whole else run(blocks)
                check_repeated("ForwardMode", again, solution, inner_params)
                found += [contract(cotangent, y) for y in pushed.columns()]
                del pushed  # its columns, before there are others
            cotangent.clear()
            by_name = shaped(torch.cat(found), outer_params)
            outer = {k: v if k in first.seen else None for k, v in by_name.items()}
            stats = {"num_columns": float(size), "num_passes": float(len(plan))}
            return Pulled(outer, dict.fromkeys(inner_params), stats=stats)

        return Solved(solution, pullback)
