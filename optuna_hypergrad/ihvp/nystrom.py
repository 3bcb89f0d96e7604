"""Nystrom's low-rank approximation: as an inverse by itself, and as a preconditioner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._arguments import check_count, is_number
from .._errors import RequirementError, SolverError
from .._nystrom import draw_sketch
from .._results import SUCCESS, Result, Status
from ..operators import AbstractLinearOperator, undamped
from ._base import AbstractLinearSolver, LinearSolution
from ._preconditioner import AbstractPreconditioner, Factors, Inverse

_ROWS = 8
"""Products that are computed at once: each takes the activations' memory again."""


def sketch(operator: AbstractLinearOperator, rank: int, seed: int) -> Factors:
    """``H ~ U diag(L) U^T`` from ``rank`` products: :meth:`Sketch.low_rank`, with failures in words.

    Returns:
        ``basis`` ``U^T`` (rank, P) with orthonormal rows, ``values`` ``L`` (rank,) in descending order, all
        ``>= 0``; ``preconditioner_shift`` in the stats.

    Raises:
        SolverError: if the products hold NaN, or show no positive curvature at all.
    """
    drawn = draw_sketch(operator, rank, torch.Generator().manual_seed(seed), _ROWS)
    if not drawn.finite():
        raise _failure(
            Status.NONFINITE,
            "The products of the Nystrom sketch hold NaN; check that the inner objective is twice differentiable at "
            "the inner solution (sqrt, norm and abs at 0 are not).",
        )
    largest = float(drawn.eigenvalues()[-1])
    if not largest > 0:
        raise _failure(
            Status.NEGATIVE_CURVATURE,
            f"The Nystrom sketch found no positive curvature (at most {largest:.1e}): the inner Hessian is "
            f"zero or negative here. Solve the inner problem further, or use the GaussNewton curvature.",
        )
    basis, values, shift = drawn.low_rank()
    return Factors({"basis": basis, "values": values}, {"preconditioner_shift": shift})


@dataclass(frozen=True)
class NystromPreconditioner(AbstractPreconditioner):
    """The ``rank`` largest eigenvalues of ``H``, about, taken out of the spectrum that CG sees.

    ``P^-1 x = U (L + delta)^-1 U^T x + (x - U U^T x) / (tail + delta)`` with the operator's damping
    ``delta`` and, for the eigenvalues that the sketch leaves, ``tail``. Costs ``rank`` products and
    ``rank`` vectors of memory; worth it where the spectrum falls quickly.

    Reference: Frangella, Tropp & Udell (2023), "Randomized Nystrom preconditioning", equation 1.3.

    Args:
        rank: Products to spend.
        rho: ``tail``; by default the smallest eigenvalue of the sketch.
        seed: Of the sketch.
        refresh_every: Outer steps for which a sketch is kept.
    """

    name: ClassVar[str] = "nystrom"
    rank: int = 30
    rho: float | None = None
    seed: int = 0
    refresh_every: int = 1

    def __post_init__(self) -> None:
        check_count("NystromPreconditioner", "rank", self.rank, 1)
        check_count("NystromPreconditioner", "seed", self.seed, 0)
        self.check_refresh()
        if self.rho is not None and not (is_number(self.rho) and 0 < self.rho < math.inf):
            raise ValueError(
                f"NystromPreconditioner needs rho > 0, finite, or None, got {self.rho!r}."
            )

    def factorize(self, operator: AbstractLinearOperator) -> Factors:
        return sketch(undamped(operator)[0], self.rank, self.seed)

    def inverse(self, factors: Factors, operator: AbstractLinearOperator) -> Inverse:
        values, damping = factors.tensors["values"], undamped(operator)[1]
        tail = float(values[-1]) if self.rho is None else self.rho
        # Where the sketch has found the whole range there is no tail to speak of: any scale is right.
        least = float(torch.finfo(values.dtype).eps) * float(values[0])
        return woodbury(factors, max(tail + damping, least), damping)


def woodbury(factors: Factors, tail: float, damping: float) -> Inverse:
    """``x -> U (L + damping)^-1 U^T x + (x - U U^T x) / tail``."""
    basis, values = factors.tensors["basis"], factors.tensors["values"]
    least = float(torch.finfo(values.dtype).eps) * float(values[0])
    weights = 1.0 / (values + damping).clamp_min(least) - 1.0 / tail

    def apply(vector: Tensor) -> Tensor:
        return torch.addmv(vector, basis.mT, weights * (basis @ vector), beta=1.0 / tail)

    return apply


@dataclass(frozen=True)
class Nystrom(AbstractLinearSolver):
    """``x = (U L U^T + (rho + damping) I)^-1 b`` from ``rank`` products, done together: no iteration.

    Exact where ``H`` has rank ``rank`` at most and damping makes up for the rest (then ``rho=0``). On
    **flat spectra it fails**: whatever the sketch leaves of ``H`` is treated as if it were zero, and
    ``x`` may be wrong by a factor of hundreds. One further product measures the true residual, which
    is reported; above 1, where ``x = 0`` would be nearer, the solve fails. For an answer that does not
    hang on the spectrum use ``CG(preconditioner=NystromPreconditioner(rank))``.

    Reference: Hataya & Yamada (2023), "Nystrom method for accurate and scalable implicit
    differentiation", equation 6; the sketch after Frangella, Tropp & Udell (2023), algorithm 2.1.

    Args:
        rank: Products to spend on the sketch.
        rho: Added to the damping, for this inverse only: a bias. 0 needs a damped operator.
        seed: Of the sketch.
        rtol: Largest residual that is a success, where convergence is required.
        require_convergence: Whether a residual above ``rtol`` is a failure.
    """

    name: ClassVar[str] = "nystrom"
    requires: ClassVar[frozenset[str]] = frozenset({"symmetric"})
    rank: int = 30
    rho: float = 1e-2
    seed: int = 0
    rtol: float = 1e-2
    require_convergence: bool = False

    def __post_init__(self) -> None:
        check_count("Nystrom", "rank", self.rank, 1)
        check_count("Nystrom", "seed", self.seed, 0)
        if not (is_number(self.rho) and 0 <= self.rho < math.inf):
            raise ValueError(f"Nystrom needs rho >= 0, finite, got {self.rho!r}.")
        if not (is_number(self.rtol) and 0 < self.rtol < 1):
            raise ValueError(f"Nystrom needs 0 < rtol < 1, got {self.rtol!r}.")

    def compute(
        self, operator: AbstractLinearOperator, vector: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        base, damping = undamped(operator)
        diagonal = self.rho + damping
        if not diagonal > 0:
            raise RequirementError(
                "Nystrom(rho=0) inverts a matrix of low rank, which needs damping: give rho > 0 or the estimator "
                "damping."
            )
        try:
            factors = sketch(base, self.rank, self.seed)
        except SolverError as error:
            result = error.result or Result(Status.STALLED, str(error))
            return LinearSolution(torch.zeros_like(vector), math.nan, result=result)
        apply = woodbury(factors, diagonal, diagonal)
        x = apply(vector) if x0 is None else x0 + apply(vector - operator(x0))
        norm = torch.linalg.vector_norm
        residual = float(norm(vector - operator(x)) / norm(vector))
        top = float(factors.tensors["values"][0])
        return LinearSolution(
            x, residual, result=self._judge(residual), curvature=top, stats=factors.stats
        )

    def _judge(self, residual: float) -> Result:
        if not residual > (self.rtol if self.require_convergence else 1.0):
            return SUCCESS
        worse = " (x = 0 would be nearer)" if residual > 1 else ""
        return Result(
            Status.DIVERGED if residual > 1 else Status.STALLED,
            f"Nystrom(rank={self.rank}, rho={self.rho:.1e}) leaves a relative residual of {residual:.1e}{worse}: the "
            f"spectrum of the inner Hessian has more than {self.rank} eigenvalues that matter. Raise rank, or rho to the "
            f"size of the eigenvalues left out, or use CG(preconditioner=NystromPreconditioner({self.rank})).",
        )


def _failure(status: Status, message: str) -> SolverError:
    return SolverError(message, Result(status, message))
