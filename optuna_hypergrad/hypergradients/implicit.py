"""Implicit differentiation at the inner solution."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from .. import _tree
from .._arguments import check_count
from .._errors import RequirementError
from .._typing import Batch, Objective, Params
from ..ihvp import (
    CG,
    AbstractLinearSolver,
    AbstractPreconditionedSolver,
    AbstractPreconditioner,
    Factors,
    LinearSolution,
    Neumann,
    linear_solve,
)
from ..ihvp._base import without_products
from ..inner import AbstractInnerSolver, GradientDescent
from ..operators import (
    AbstractCurvature,
    AbstractLinearOperator,
    DampedOperator,
    Flattener,
    Hessian,
    InnerGraph,
    mean_objective,
)
from ..problem import BilevelProblem, full_batch
from ._base import (
    AbstractPullbackEstimator,
    refuse_solver_hyperparameters,
    run_inner,
    sees_objectives,
)
from ._estimate import Cotangents, EstimatorState, Pulled, Solved
from .compiled import check_compilable, compiled_solve

_SOLUTION, _AGE = "solver/x", "preconditioner_age"
_VISIBLE = 0.01
"""Of the curvature along a solution: where the inner Hessian makes up less, damping hides it."""


@dataclass(frozen=True)
class _Carried:
    """What a linear solve is given by that of the last outer step.

    Attributes:
        x0: Its solution.
        factors: Of the preconditioner, while they are kept.
        age: Solves that they have served.
    """

    x0: Tensor | None
    factors: Factors | None
    age: int

    @classmethod
    def of(
        cls, state: EstimatorState, b: Tensor, preconditioner: AbstractPreconditioner | None
    ) -> _Carried:
        prefix = _prefix(preconditioner)
        tensors = {k[len(prefix) :]: v for k, v in state.tensors.items() if k.startswith(prefix)}
        x0 = state.tensors.get(_SOLUTION)
        if x0 is not None and (x0.shape != b.shape or x0.dtype != b.dtype):
            raise RequirementError(
                f"Implicit(warm_start_solver=True) was given the state of another problem: its solution has shape "
                f"{tuple(x0.shape)} and {x0.dtype}, the inner parameters have {tuple(b.shape)} and {b.dtype}. Begin with "
                f"state=None."
            )
        age = int(state.numbers.get(_AGE, 0))
        return cls(x0, Factors(tensors) if tensors else None, age)

    def after(
        self, found: LinearSolution, warm: bool, preconditioner: AbstractPreconditioner | None
    ) -> tuple[Params, dict[str, float]]:
        """``tensors`` and ``numbers`` for the next outer step; nothing of a solve that failed."""
        tensors: Params = {}
        numbers: dict[str, float] = {}
        if warm and found.result:
            tensors[_SOLUTION] = -found.x  # it has been negated in place
        if preconditioner is not None and found.factors is not None and found.result:
            age = self.age + 1 if self.factors is not None else 1
            if age < preconditioner.refresh_every:
                prefix = _prefix(preconditioner)
                tensors |= {prefix + k: v for k, v in found.factors.tensors.items()}
                numbers[_AGE] = float(age)
        return tensors, numbers


def _prefix(preconditioner: AbstractPreconditioner | None) -> str:
    return f"preconditioner/{getattr(preconditioner, 'name', None)}/"


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
        solver: Of ``H v = f_w``. Its preconditioner, if it has one, is kept for ``refresh_every`` outer steps.
    damping: Added to the diagonal of ``H``. A bias; what makes singular problems solvable. What it makes up of
        the curvature along the solution is ``damping_share`` in the stats (not where compiled): near 1 it
        hides the inner problem, which a warning says.
    curvature: ``Hessian()``, or ``GaussNewton(...)`` or ``Fisher(...)`` in its place.
    num_batches: ``H`` and ``M`` are means over so many inner batches, those that would come next; for
        ``g_w = 0`` on all data and ``inner_batch`` that gives parts of it. Cost and memory: the graphs of all
        of them at once, and products that go through each.
        warm_start_solver: Begin each linear solve from the solution of the last outer step, which the state
            carries (and a checkpoint): fewer products where outer steps are short. The answer is the same to
            the solver's tolerance; with a fixed number of steps it is nearer.
        compile: Compile the whole loop of products with ``torch.compile``, once per inner objective
            (tens of seconds, more for long loops; define it once, not anew in every trial, and without a
            ``torch.autograd.Function`` of its own); then 2-4 times faster where tensors are small.
            ``inner_gradient_norm`` is then the inner solver's own, where it has one.
    """

    name: ClassVar[str] = "implicit"
    requires: ClassVar[frozenset[str]] = frozenset({"stationary_point", "second_derivatives"})
    sees: ClassVar[str] = sees_objectives("Implicit")

    solver: AbstractLinearSolver = field(default_factory=CG)
    damping: float = 0.0
    curvature: AbstractCurvature = field(default_factory=Hessian)
    compile: bool = False
    num_batches: int = 1
    warm_start_solver: bool = False

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
        preconditioner = self._preconditioner()
        if self.num_batches > 1 and preconditioner is not None and preconditioner.takes_one_batch:
            raise ValueError(
                f"Implicit(num_batches={self.num_batches}): {type(preconditioner).__name__} looks at the inputs of one batch; "
                f"use num_batches=1, NystromPreconditioner, or an inner_batch that gives larger batches."
            )
        if self.compile and not isinstance(self.curvature, Hessian):
            raise ValueError(
                "Implicit(compile=True) compiles products with the Hessian only; use compile=False with "
                "another curvature."
            )
        if self.compile and (self.warm_start_solver or self._preconditioner() is not None):
            raise ValueError(
                "Implicit(compile=True) compiles a solve from zero, without a preconditioner; use compile=False with "
                "warm_start_solver=True or a preconditioner."
            )

    @property
    def carries(self) -> str | None:
        if self.warm_start_solver:
            return "the solution of its linear system (warm_start_solver=True; pass False)"
        kept = self._preconditioner()
        if kept is None or kept.refresh_every == 1:
            return None
        return f"its preconditioner's factors (refresh_every={kept.refresh_every}; pass 1)"

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        refuse_solver_hyperparameters("Implicit", inner_solver, outer_params)
        self._resolved_solver(inner_solver)
        if self.compile:
            check_compilable("Implicit", problem.inner_objective)
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
            objective, batch = self._inner_problem(problem, batch_index)
            where = objective, solution.inner_params, outer_params, batch
            b = Flattener(inner_params).flatten(
                [cotangent.pop(k) for k in list(cotangent)], copy=True
            )
            carried = _Carried.of(state, b, self._preconditioner())
            if self.compile and without_products(b) is None:
                found, outer = compiled_solve(linear_solver, self.damping, b, *where)
                norm = solution.gradient_norm
            else:
                found, outer, norm = self._solve_kept(linear_solver, b, carried, *where)
            stats = {
                "num_hvps": float(found.num_products),
                "residual": found.residual,
                "damping": self.damping,
                "exact_hessian": float(isinstance(self.curvature, Hessian)),
            }
            known = {"inner_gradient_norm": norm, "curvature": found.curvature}
            stats |= {k: v for k, v in known.items() if not math.isnan(v)} | found.stats
            self._say_if_hidden(found.stats.get("damping_share", 0.0))
            kept = carried.after(found, self.warm_start_solver, self._preconditioner())
            return Pulled(outer, {k: None for k in inner_params}, found.result, stats, *kept)

        return Solved(replace(solution, inner_params=_tree.detach(solution.inner_params)), pullback)

    def _inner_problem(self, problem: BilevelProblem, index: int) -> tuple[Objective, Batch]:
        """The inner objective, or its mean over ``num_batches``, and the batch or batches from ``index`` on."""
        objective, batch = problem.inner_objective, problem.inner_batch(index)
        if self.num_batches == 1:
            return objective, batch
        following = range(index + 1, index + self.num_batches)
        return mean_objective(objective), (batch, *map(problem.inner_batch, following))

    def _operator(self, graph: InnerGraph, batch: Batch) -> AbstractLinearOperator:
        """``H + damping`` of what :meth:`_inner_problem` gives."""
        several = self.num_batches > 1
        operator = (self.curvature.average if several else self.curvature.build)(graph, batch)
        if self.damping:
            operator = DampedOperator(operator, self.damping)
        return operator

    def _solve_kept(
        self,
        solver: AbstractLinearSolver,
        b: Tensor,
        carried: _Carried,
        inner_objective: Objective,
        inner_params: Params,
        outer_params: Params,
        batch: Batch,
    ) -> tuple[LinearSolution, Cotangents, float]:
        graph = InnerGraph(inner_objective, inner_params, outer_params, batch)
        operator = self._operator(graph, batch)
        found = linear_solve(
            solver,
            operator,
            b,
            carried.x0 if self.warm_start_solver else None,
            factors=carried.factors,
            overwrite_vector=True,
            throw=False,
        )
        return found, graph.cross_vjp(found.x.neg_()), graph.gradient_norm

    def _preconditioner(self) -> AbstractPreconditioner | None:
        solver = self.solver
        return solver.preconditioner if isinstance(solver, AbstractPreconditionedSolver) else None

    def _say_if_hidden(self, share: float) -> None:
        if abs(share - 1.0) < _VISIBLE:
            warnings.warn(
                f"Implicit(damping={self.damping:g}): damping makes up {share:.1%} of the curvature along the solution of "
                f"the linear system, so that the hypergradient is about what Identity(1 / damping) gives. Lower damping.",
                stacklevel=4,
            )

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
