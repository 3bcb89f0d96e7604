"""Implicit differentiation at the inner solution."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from .. import _tree
from .._arguments import check_count
from .._errors import RequirementError
from .._typing import Batch, Objective, Params
from ..ihvp import CG, AbstractLinearSolver, LinearSolution, Neumann, linear_solve
from ..ihvp._base import without_products
from ..inner import AbstractInnerSolver, GradientDescent
from ..operators import (
    AbstractCurvature,
    DampedOperator,
    Flattener,
    Hessian,
    InnerGraph,
    mean_objective,
)
from ..problem import BilevelProblem, full_batch
from ._base import (
    AbstractPullbackEstimator,
    Cotangents,
    EstimatorState,
    Pulled,
    Solved,
    refuse_solver_hyperparameters,
    run_inner,
)
from .compiled import compiled_solve


@dataclass(frozen=True)
class Implicit(AbstractPullbackEstimator):
    """``d_lam = f_lam - M^T H^-1 f_w`` at a point where ``g_w = 0`` (implicit function theorem).

    Cost: the inner solve, then 2 gradient evaluations, the linear solver's products and one mixed
    product. Memory: one double-backward graph and about 4 vectors of the inner size, however many
    inner steps there were. The error is at most proportional to ``inner_gradient_norm`` (in the
    stats) and to the linear solver's residual. All products of a solve are with one matrix: dropout masks are
    drawn once for all of them, and batch normalization in ``train()`` mode moves its running statistics once.
    Parameters in half precision are multiplied in half precision, and everything between the products is float32:
    expect an error of about a percent in bfloat16, and a tenth of that in float16.

    References: Bengio (2000), "Gradient-based optimization of hyperparameters"; Pedregosa (2016);
    Lorraine, Vicol & Duvenaud (2020), equations 3-5.

    Args:
        solver: Of ``H v = f_w``.
        damping: Added to the diagonal of ``H``. A bias; what makes singular problems solvable.
        curvature: ``Hessian()``, or ``GaussNewton(...)`` or ``Fisher(...)`` in its place.
        num_batches: ``H`` and ``M`` are means over so many inner batches, those that would come next; for
            ``g_w = 0`` on all data and ``inner_batch`` that gives parts of it. Cost and memory: the graphs of all
            of them at once, and products that go through each.
        compile: Compile the whole loop of products with ``torch.compile``, once per inner objective
            (tens of seconds, more for long loops); then 2-4 times faster where tensors are small.
            ``inner_gradient_norm`` is then the inner solver's own, where it has one.
    """

    name: ClassVar[str] = "implicit"
    requires: ClassVar[frozenset[str]] = frozenset({"stationary_point", "second_derivatives"})
    sees: ClassVar[str] = (
        "Implicit sees what the inner or outer objective uses, not how the inner solver moves "
        "(learning rates, schedules, initializations): Unroll sees those."
    )

    solver: AbstractLinearSolver = field(default_factory=CG)
    damping: float = 0.0
    curvature: AbstractCurvature = field(default_factory=Hessian)
    compile: bool = False
    num_batches: int = 1

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"Implicit needs damping >= 0, got {self.damping}.")
        check_count("Implicit", "num_batches", self.num_batches, 1)
        if not isinstance(self.curvature, AbstractCurvature):
            raise ValueError(
                f"Implicit needs Hessian(), GaussNewton(...) or Fisher(...) as curvature, got {self.curvature!r:.80}."
            )
        if self.compile and self.num_batches > 1:
            raise ValueError(
                "Implicit(compile=True) compiles products with one batch; use compile=False with num_batches > 1."
            )
        if self.compile and not isinstance(self.curvature, Hessian):
            raise ValueError(
                "Implicit(compile=True) compiles products with the Hessian only; use compile=False with "
                "another curvature."
            )

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        refuse_solver_hyperparameters("Implicit", inner_solver, outer_params)
        self._resolved_solver(inner_solver)
        if self.num_batches > 1 and problem.inner_batch is full_batch:
            raise RequirementError(
                f"Implicit(num_batches={self.num_batches}): this problem has no inner_batch, so that its inner objective "
                f"sees all data at once; use num_batches=1."
            )

    def solve(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        state: EstimatorState | None = None,
    ) -> Solved:
        state = EstimatorState() if state is None else state
        linear_solver = self._resolved_solver(inner_solver)
        solution = run_inner(problem, inner_solver, inner_params, outer_params, state)
        batch_index = state.inner_index + solution.num_steps

        def pullback(cotangent: Params) -> Pulled:
            objective, batch = problem.inner_objective, problem.inner_batch(batch_index)
            if self.num_batches > 1:
                following = range(batch_index + 1, batch_index + self.num_batches)
                objective = mean_objective(objective)
                batch = (batch, *map(problem.inner_batch, following))
            where = objective, solution.inner_params, outer_params, batch
            b = Flattener(inner_params).flatten(
                [cotangent.pop(k) for k in list(cotangent)], copy=True
            )
            if self.compile and without_products(b) is None:
                found, outer = compiled_solve(linear_solver, self.damping, b, *where)
                norm = solution.gradient_norm
            else:
                found, outer, norm = self._solve_kept(linear_solver, b, *where)
            stats = {
                "num_hvps": float(found.num_products),
                "residual": found.residual,
                "damping": self.damping,
                "exact_hessian": float(isinstance(self.curvature, Hessian)),
            }
            known = {"inner_gradient_norm": norm, "curvature": found.curvature}
            stats |= {k: v for k, v in known.items() if not math.isnan(v)}
            return Pulled(outer, {k: None for k in inner_params}, found.result, stats)

        return Solved(replace(solution, inner_params=_tree.detach(solution.inner_params)), pullback)

    def _solve_kept(
        self,
        solver: AbstractLinearSolver,
        b: Tensor,
        inner_objective: Objective,
        inner_params: Params,
        outer_params: Params,
        batch: Batch,
    ) -> tuple[LinearSolution, Cotangents, float]:
        graph = InnerGraph(inner_objective, inner_params, outer_params, batch)
        several = self.num_batches > 1
        operator = (self.curvature.average if several else self.curvature.build)(graph, batch)
        if self.damping:
            operator = DampedOperator(operator, self.damping)
        found = linear_solve(solver, operator, b, overwrite_vector=True, throw=False)
        return found, graph.cross_vjp(found.x.neg_()), graph.gradient_norm

    def _resolved_solver(self, inner_solver: AbstractInnerSolver | None) -> AbstractLinearSolver:
        if not (isinstance(self.solver, Neumann) and self.solver.alpha == "inner_lr"):
            return self.solver
        step_size = inner_solver.fixed_step_size() if inner_solver is not None else None
        if not isinstance(inner_solver, GradientDescent) or step_size is None:
            raise RequirementError(
                "Neumann(alpha='inner_lr') needs an inner GradientDescent with a fixed step size (the series is "
                "then that descent, differentiated); give alpha a number, or use alpha='lanczos'."
            )
        return replace(self.solver, alpha=step_size)
