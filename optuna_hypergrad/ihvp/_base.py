"""Solving ``H x = b`` with products only. One loop driver, ``linear_solve``; one file per method."""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import is_number
from .._errors import RequirementError, SolverError
from .._results import SUCCESS, Result, Status
from ..curvature import asymmetry
from ..operators import AbstractLinearOperator, undamped
from ._preconditioner import AbstractPreconditioner, Factors, Inverse

_LITTLE = 0.5
"""A relative residual above this is hardly better than that of ``x = 0``."""

Vector = list[Tensor]
"""A vector of ``P`` entries as the tensors that it is made of."""


@dataclass(frozen=True)
class LinearSolution:
    """What a linear solve found.

    Attributes:
        x: ``(P,)``; empty where the solve went on with it itself.
        residual: ``|b - H x| / |b|`` as the method knows it; NaN where it does not.
        num_products: Products with ``H``, those spent on estimating step sizes included.
        result: Success, or a sentence that says what to change.
        curvature: Estimate of the largest eigenvalue, where one was made.
        stats: What else there is to say: ``damping_share``, how a preconditioner was made.
        factors: Those of the preconditioner that was used, for the next solve; ``None`` without one.
    """

    x: Tensor
    residual: float
    num_products: int = 0
    result: Result = SUCCESS
    curvature: float = math.nan
    stats: dict[str, float] = field(default_factory=dict)
    factors: Factors | None = None


@dataclass(frozen=True)
class TracedSolution:
    """What a solver without branches found: tensors only, so that it can be compiled.

    Attributes:
        x: In the parameters' own shapes.
        residual: ``|b - H x| / |b|``, 0-d.
        least_curvature: Smallest ``p.Hp / p.p`` met, 0-d; infinite where none is measured.
    """

    x: Vector
    residual: Tensor
    least_curvature: Tensor


class AbstractLinearSolver(abc.ABC):
    """Settings of a method for ``H x = b``. Frozen; state lives in ``compute``'s locals."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    lowers_residual: ClassVar[bool] = False
    """Whether each step makes ``|b - H x|`` smaller, so that one near ``|b|`` means that nothing was achieved."""

    @abc.abstractmethod
    def compute(
        self, operator: AbstractLinearOperator, vector: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        """``x ~ H^-1 vector`` for a finite, non-zero ``vector`` of shape ``(P,)``, which it may overwrite."""

    def traced(
        self, product: Callable[[Vector], Vector], vector: Vector, alpha: Tensor
    ) -> TracedSolution:
        """The same without branches on values, for ``torch.compile``.

        Args:
            product: ``v -> H v``, on lists of tensors: one fused kernel each, no copies in between.
            vector: ``b``, not to be overwritten.
            alpha: Step length of the methods that have one, 0-d.

        Raises:
            RequirementError: if the method has no such form.
        """
        raise RequirementError(
            f"{self.name} cannot be compiled; use CG or Neumann, or Implicit(compile=False)."
        )

    def traced_verdict(self, solution: LinearSolution, least_curvature: float) -> Result:
        """How a traced solve ended, in words."""
        return solution.result

    def num_traced_products(self) -> int:
        """Products of the traced form."""
        return 0

    def fixed_alpha(self) -> float | None:
        """The step length that the traced form is given; ``None`` if ``step_length`` has to find it."""
        return 1.0

    def step_length(
        self, operator: AbstractLinearOperator, like: Tensor
    ) -> tuple[float, float, Result | None]:
        """A step length, the largest eigenvalue that it rests on, and a failure to find it or ``None``."""
        return 1.0, math.nan, None


class AbstractPreconditionedSolver(AbstractLinearSolver):
    """A method that takes a preconditioner: an approximate inverse, symmetric positive definite."""

    preconditioner: AbstractPreconditioner | None

    def compute(
        self, operator: AbstractLinearOperator, vector: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        return self.compute_with(operator, vector, x0, None)

    @abc.abstractmethod
    def compute_with(
        self,
        operator: AbstractLinearOperator,
        vector: Tensor,
        x0: Tensor | None,
        inverse: Inverse | None,
    ) -> LinearSolution:
        """:meth:`AbstractLinearSolver.compute`, with the map that the preconditioner has become."""

    def check_preconditioner(self) -> None:
        """Refuse anything but a preconditioner, or none.

        Raises:
            ValueError: naming the method.
        """
        if not (
            self.preconditioner is None or isinstance(self.preconditioner, AbstractPreconditioner)
        ):
            raise ValueError(
                f"{type(self).__name__} needs a preconditioner such as NystromPreconditioner(30), or None, got "
                f"{self.preconditioner!r:.80}."
            )


def linear_solve(
    solver: AbstractLinearSolver,
    operator: AbstractLinearOperator,
    vector: Tensor,
    x0: Tensor | None = None,
    *,
    factors: Factors | None = None,
    overwrite_vector: bool = False,
    throw: bool = True,
) -> LinearSolution:
    """Solve ``H x = vector``: checks, counts and verdict are made here, for every method.

    Args:
        solver: The method.
        operator: ``H``, acting on ``(P,)``.
        vector: ``b``, shape ``(P,)``.
        x0: First guess, or ``None`` for zero.
        factors: Of the solver's preconditioner, from an earlier solve; ``None`` to make them.
        overwrite_vector: Let the method use the memory of ``vector`` (it does not where the operator is
            damped: ``damping_share`` needs it).
        throw: Raise on failure; otherwise the failure is in ``result``.

    Warns:
        UserWarning: where MINRES or GMRES ends above half of ``|b|`` and convergence was not required.

    Raises:
        RequirementError: if the method cannot be used on this operator.
        SolverError: if it failed and ``throw`` is set.
    """
    if vector.shape != (operator.size,):
        raise RequirementError(
            f"{solver.name}: the right-hand side has shape {tuple(vector.shape)}, the operator acts on ({operator.size},)."
        )
    if "symmetric" in solver.requires and not operator.symmetric:
        raise RequirementError(
            f"{solver.name} needs a symmetric operator, and this one is not. Use GMRES, or Direct, or Neumann "
            f"if its spectral radius allows."
        )
    base, damping = undamped(operator)
    before = base.num_products
    solution = without_products(vector)
    if solution is None:
        scale = scale_of(vector)
        if scale != 1.0:
            vector, overwrite_vector = vector / scale, True
            x0 = None if x0 is None else x0 / scale
        spare = vector if overwrite_vector and not damping else vector.clone()
        solution = _compute(solver, operator, spare, x0, factors)
        if damping:
            solution = _with_damping_share(solution, vector, damping)
        if scale != 1.0:
            solution = replace(solution, x=solution.x * scale)
        if not solution.result and "symmetric" in solver.requires:
            solution = replace(solution, result=_said_of_asymmetry(solution.result, operator))
    solution = checked(solver, replace(solution, num_products=base.num_products - before))
    if throw:
        solution.result.raise_if_failed()
    if solver.lowers_residual and solution.result and solution.residual > _LITTLE:
        warnings.warn(
            f"{type(solver).__name__}: the linear solve ended at a relative residual of {solution.residual:.2g} after "
            f"{solution.num_products} products, where x = 0 has 1: what is made of it (a hypergradient) says little. Raise "
            f"max_steps, add damping (the matrix may be singular) or a preconditioner; require_convergence=True makes this a "
            f"failure.",
            stacklevel=3,
        )
    return solution


def _compute(
    solver: AbstractLinearSolver,
    operator: AbstractLinearOperator,
    vector: Tensor,
    x0: Tensor | None,
    factors: Factors | None,
) -> LinearSolution:
    if not isinstance(solver, AbstractPreconditionedSolver) or solver.preconditioner is None:
        return solver.compute(operator, vector, x0)
    preconditioner = solver.preconditioner
    try:
        if factors is None:
            factors = preconditioner.factorize(operator)
        inverse = preconditioner.inverse(factors, operator)
    except SolverError as error:
        result = error.result or Result(Status.STALLED, str(error))
        return LinearSolution(torch.zeros_like(vector), math.nan, result=result)
    solution = solver.compute_with(operator, vector, x0, inverse)
    return replace(solution, stats=solution.stats | factors.stats, factors=factors)


def _with_damping_share(solution: LinearSolution, vector: Tensor, damping: float) -> LinearSolution:
    """Of the curvature ``x.(H + damping) x`` along the solution, what the damping makes up.

    Above 1 where that of ``H`` itself is negative.
    """
    energy = float(torch.dot(solution.x, vector))
    share = damping * float(torch.dot(solution.x, solution.x)) / energy if energy else math.nan
    if not 0 < share < math.inf:
        return solution
    return replace(solution, stats=solution.stats | {"damping_share": share})


def _said_of_asymmetry(result: Result, operator: AbstractLinearOperator) -> Result:
    """A failure of a method for symmetric operators may mean that this one only says that it is."""
    found = asymmetry(operator)
    if not found > float(torch.finfo(operator.dtype).eps) ** 0.5:
        return result
    message = (
        f"{result.message} The operator says that it is symmetric, but u.Hv and v.Hu differ by {found:.1e} of "
        f"their size: use GMRES, or make its products deterministic (dropout, running statistics)."
    )
    return replace(result, message=message)


def check_steps(method: str, max_steps: object, rtol: object) -> None:
    """Refuse steps and tolerances that mean nothing.

    Raises:
        ValueError: naming the method.
    """
    if type(max_steps) is not int or max_steps < 1:
        raise ValueError(f"{method} needs an integer max_steps >= 1, got {max_steps!r}.")
    if not (is_number(rtol) and 0 <= rtol < 1):  # type: ignore[operator]
        raise ValueError(f"{method} needs 0 <= rtol < 1, got {rtol!r}.")


def smallest_residual(vector: Tensor) -> float:
    """Below this, a recurrence holds rounding errors only, and 0 / 0 is near."""
    return float(torch.finfo(vector.dtype).eps) * 1e-2


def inner(a: Vector, b: Vector) -> Tensor:
    """Inner product of two lists of tensors, 0-d."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def scale_of(vector: Tensor) -> float:
    """A power of 2 by which a finite, non-zero ``b`` is divided so that ``|b|^2`` is a number of its dtype.

    1 where it is one already; division by a power of 2 rounds nothing.
    """
    limits, bb = torch.finfo(vector.dtype), float(torch.dot(vector, vector))
    if limits.tiny**0.5 < bb < limits.max**0.5:
        return 1.0
    return 2.0 ** math.floor(math.log2(float(vector.abs().max())))


def without_products(vector: Tensor) -> LinearSolution | None:
    """The answer where it needs no product: ``b = 0``, or a ``b`` that cannot be solved for."""
    if 0.0 < float(torch.dot(vector, vector)) < math.inf:
        return None
    if not bool(torch.isfinite(vector).all()):
        message = (
            "The gradient of the outer objective holds NaN or infinite entries; check the outer loss at "
            "the inner solution."
        )
        nothing = torch.full_like(vector, torch.nan)
        return LinearSolution(nothing, math.nan, result=Result(Status.NONFINITE, message))
    return None if bool(vector.any()) else LinearSolution(torch.zeros_like(vector), 0.0)


def checked(solver: AbstractLinearSolver, solution: LinearSolution) -> LinearSolution:
    """A success that holds NaN is none."""
    if not solution.result or _tree.finite(solution.x):
        return solution
    message = (
        f"{solver.name} met NaN or infinite values; check the inner loss at the inner solution, or add "
        f"damping."
    )
    return replace(solution, result=Result(Status.NONFINITE, message))
