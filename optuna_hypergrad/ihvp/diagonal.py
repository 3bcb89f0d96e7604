"""Diagonal (Jacobi) preconditioner, with the diagonal estimated or given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._arguments import check_count, is_number
from .._errors import RequirementError, SolverError
from .._results import Result, Status
from ..operators import AbstractLinearOperator, undamped
from ._preconditioner import AbstractPreconditioner, Factors, Inverse

_ROWS = 8
"""Products that are computed at once: each takes the activations' memory again."""


@dataclass(frozen=True)
class DiagonalPreconditioner(AbstractPreconditioner):
    """``P^-1 = diag(H + damping I)^-1``: for inner parameters of very different scales.

    The diagonal is estimated as the mean of ``z * H z`` over random signs ``z``: exact for a diagonal
    ``H``, and with a standard deviation of the length of a row's other entries over the square root of
    ``num_probes``. Estimates below their own standard error are raised to it, and entries of the damped
    diagonal below ``floor`` times its largest one to that; the stats say for what share of the entries either
    was done (``preconditioner_clamped``).

    Reference: Bekas, Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix"; after
    Hutchinson (1990).

    Args:
        num_probes: Products to spend.
        seed: Of the random signs.
        diagonal: ``operator -> (P,)``, the diagonal of ``H`` without its damping, in place of the
            estimate; the operator of an inner problem has its parameters as ``operator.graph``.
        floor: Least entry of the damped diagonal, in parts of the largest.
        refresh_every: Outer steps for which a diagonal is kept.
    """

    name: ClassVar[str] = "diagonal"
    num_probes: int = 16
    seed: int = 0
    diagonal: Callable[[AbstractLinearOperator], Tensor] | None = None
    floor: float = 1e-4
    refresh_every: int = 1

    def __post_init__(self) -> None:
        check_count("DiagonalPreconditioner", "num_probes", self.num_probes, 1)
        check_count("DiagonalPreconditioner", "seed", self.seed, 0)
        self.check_refresh()
        if not (is_number(self.floor) and 0 < self.floor <= 1):
            raise ValueError(f"DiagonalPreconditioner needs 0 < floor <= 1, got {self.floor!r}.")
        if self.diagonal is not None and not callable(self.diagonal):
            raise ValueError(
                "DiagonalPreconditioner needs diagonal= to be a function operator -> tensor (P,), got "
                f"{self.diagonal!r:.80}."
            )

    def factorize(self, operator: AbstractLinearOperator) -> Factors:
        base, damping = undamped(operator)
        if self.diagonal is None:
            found, error = self._estimate(base)
        else:
            found, error = self._given(base), None
        top = float(found.max()) + damping
        if not 0 < top < float("inf"):
            message = (
                f"DiagonalPreconditioner: the largest entry of the diagonal of the inner Hessian is {top:.1e}, so it "
                f"makes no positive definite map. Add damping, solve the inner problem further, or leave it out."
            )
            raise SolverError(message, Result(Status.NEGATIVE_CURVATURE, message))
        raised = found if error is None else torch.maximum(found, error)
        clamped = (raised > found) | (raised + damping < self.floor * top)
        return Factors(
            {"diagonal": raised}, {"preconditioner_clamped": float(clamped.double().mean())}
        )

    def inverse(self, factors: Factors, operator: AbstractLinearOperator) -> Inverse:
        diagonal = factors.tensors["diagonal"] + undamped(operator)[1]
        diagonal = diagonal.clamp_min_(self.floor * float(diagonal.max()))
        return lambda vector: vector / diagonal

    def _estimate(self, base: AbstractLinearOperator) -> tuple[Tensor, Tensor]:
        """The mean over probes, and its standard error."""
        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros(base.size, dtype=base.dtype, device=base.device)
        squares = torch.zeros_like(total)
        for begin in range(0, self.num_probes, _ROWS):
            rows = min(_ROWS, self.num_probes - begin)
            signs = torch.randint(
                2, (rows, base.size), generator=generator, device="cpu", dtype=torch.int8
            )
            z = signs.to(total).mul_(2).sub_(1)
            each = z.mul_(base.many(z))
            total += each.sum(0)
            squares += each.square_().sum(0)
        mean = total / self.num_probes
        spread = (squares / self.num_probes - mean.square()).clamp_min_(0)
        return mean, spread.div_(max(self.num_probes - 1, 1)).sqrt_()

    def _given(self, base: AbstractLinearOperator) -> Tensor:
        assert self.diagonal is not None
        found = self.diagonal(base)
        if not isinstance(found, Tensor) or found.shape != (base.size,):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RequirementError(
                f"DiagonalPreconditioner: diagonal(operator) must return a tensor of shape ({base.size},), the inner "
                f"parameters one after the other; it returned {shape}."
            )
        return found.detach().to(dtype=base.dtype, device=base.device)
