"""Restarted GMRES (Saad & Schultz 1986)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._arguments import check_budget
from .._errors import RequirementError
from .._results import SUCCESS, Result, Status
from ..operators import AbstractLinearOperator
from ._base import AbstractLinearSolver, LinearSolution, check_steps, smallest_residual

_STAGNANT = 0.999
"""A cycle that leaves more than this of the residual would not be followed by a better one."""


@dataclass(frozen=True)
class GMRES(AbstractLinearSolver):
    """The least residual over a Krylov space, for any invertible operator, symmetric or not.

    One product a step, and one more at the end of each cycle, so that the residual that is reported is
    the true one. A cycle of ``m`` steps holds ``m + 1`` vectors of the inner size. Arnoldi vectors are
    orthogonalized twice. For symmetric operators ``CG`` and ``MINRES`` need no such memory.

    Reference: Saad & Schultz (1986), "GMRES: a generalized minimal residual algorithm for solving
    nonsymmetric linear systems", algorithm 4.

    Args:
        max_steps: At most this many steps in all.
        rtol: Stop when ``|b - A x| <= rtol |b|``.
        restart: Steps of one cycle, ``None`` for no restart. Short cycles may come to a standstill where
            the operator is far from normal, or its spectrum lies around zero.
        require_convergence: Whether stopping above ``rtol`` is a failure. Off by default, as in ``CG``.
        memory_budget: Bytes that the vectors of one cycle may take; a solve that needs more is refused.
    """

    name: ClassVar[str] = "gmres"
    lowers_residual: ClassVar[bool] = True
    max_steps: int = 1000
    rtol: float = 1e-6
    restart: int | None = 50
    require_convergence: bool = False
    memory_budget: float = 4e9

    def __post_init__(self) -> None:
        check_steps("GMRES", self.max_steps, self.rtol)
        if self.restart is not None and (type(self.restart) is not int or self.restart < 1):
            raise ValueError(f"GMRES needs an integer restart >= 1 or None, got {self.restart!r}.")
        check_budget("GMRES", self.memory_budget)

    def compute(
        self, operator: AbstractLinearOperator, vector: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        cycle = min(self.restart or self.max_steps, self.max_steps, operator.size)
        self._check_memory(cycle, vector)
        size = float(torch.linalg.vector_norm(vector))
        target = max(self.rtol, smallest_residual(vector)) * size
        x = torch.zeros_like(vector) if x0 is None else x0.clone()
        r = vector.clone() if x0 is None else vector - operator(x)
        norm, count, stagnant = float(torch.linalg.vector_norm(r)), 0, False
        while norm > target and count < self.max_steps and not stagnant:
            step, spent = _cycle(operator, r, norm, min(cycle, self.max_steps - count), target)
            ahead = x + step
            torch.sub(vector, operator(ahead), out=r)
            count, before = count + spent, norm
            norm = float(torch.linalg.vector_norm(r))
            stagnant = not norm < _STAGNANT * before
            if norm < before:
                x = ahead
            else:
                norm = before if math.isfinite(norm) else norm
        residual = norm / size
        return LinearSolution(x, residual, result=self._judge(norm <= target, residual, stagnant))

    def _check_memory(self, cycle: int, vector: Tensor) -> None:
        each = vector.numel() * vector.element_size()
        needed = (cycle + 1) * each
        if needed <= self.memory_budget:
            return
        fits = int(self.memory_budget // each) - 1
        advice = f"Use restart={fits} or less" if fits >= 1 else f"One vector takes {each:.3g}"
        raise RequirementError(
            f"GMRES would hold {cycle + 1} vectors of {vector.numel()} entries, {needed:.3g} bytes, and "
            f"memory_budget is {self.memory_budget:.3g}. {advice}, or raise memory_budget; CG and MINRES need "
            f"five vectors, where the operator is symmetric."
        )

    def _judge(self, converged: bool, residual: float, stagnant: bool) -> Result:
        if math.isnan(residual) or math.isinf(residual):
            return Result(
                Status.NONFINITE,
                "GMRES met NaN or infinite entries in a product; check that the inner objective is twice "
                "differentiable at the inner solution (sqrt, norm and abs at 0 are not).",
            )
        if converged or not self.require_convergence:
            return SUCCESS
        reached = f"at a relative residual of {residual:.1e} (asked for {self.rtol:.1e})"
        if stagnant:
            return Result(
                Status.STALLED,
                f"GMRES came to a standstill {reached}: the operator is singular or nearly so, rounding "
                f"allows no less, or cycles of {self.restart} steps are too short. Raise restart, add "
                f"damping, or loosen rtol.",
            )
        return Result(
            Status.MAX_STEPS_REACHED,
            f"GMRES stopped after {self.max_steps} steps {reached}; raise max_steps or restart, add damping, "
            f"or loosen rtol.",
        )


def _cycle(
    operator: AbstractLinearOperator, r: Tensor, norm: float, most: int, target: float
) -> tuple[Tensor, int]:
    """The correction of least residual after at most ``most`` steps from ``r``, and the steps taken."""
    basis = torch.empty(most + 1, len(r), dtype=r.dtype, device=r.device)
    torch.div(r, norm, out=basis[0])
    upper = torch.zeros(
        most + 1, most, dtype=torch.float64, device="cpu"
    )  # R of the QR of the Hessenberg matrix
    right = torch.zeros(most + 1, dtype=torch.float64, device="cpu")
    right[0] = norm
    rotations: list[tuple[float, float]] = []
    k = 0
    while k < most:
        w = operator(basis[k]).clone()
        length = float(torch.linalg.vector_norm(w))
        known = basis[: k + 1]
        column = torch.zeros(k + 1, dtype=torch.float64, device="cpu")
        for _ in range(2):
            part = known @ w
            w.addmv_(known.mT, part, alpha=-1)
            column += part.double().cpu()
        below = float(torch.linalg.vector_norm(w))
        last = below <= 10 * float(torch.finfo(w.dtype).eps) * length  # the space is invariant
        entries = [*column.tolist(), 0.0 if last else below]
        for i, (c, s) in enumerate(rotations):  # Givens
            entries[i], entries[i + 1] = (
                c * entries[i] + s * entries[i + 1],
                c * entries[i + 1] - s * entries[i],
            )
        height = math.hypot(entries[k], entries[k + 1])
        if not height > 10 * float(torch.finfo(w.dtype).eps) * length:
            if math.isnan(height):
                return torch.full_like(r, math.nan), k + 1
            return _combine(basis, upper, right, k), k + 1  # singular: the space holds no more
        c, s = entries[k] / height, entries[k + 1] / height
        rotations.append((c, s))
        entries[k], entries[k + 1] = height, 0.0
        upper[: k + 2, k] = torch.tensor(entries, dtype=torch.float64, device="cpu")
        right[k + 1] = -s * right[k]
        right[k] = c * right[k]
        k += 1
        if last or abs(float(right[k])) <= target:
            break
        torch.div(w, below, out=basis[k])
    return _combine(basis, upper, right, k), k


def _combine(basis: Tensor, upper: Tensor, right: Tensor, k: int) -> Tensor:
    if k == 0:
        return torch.zeros_like(basis[0])
    u, s, vh = torch.linalg.svd(
        upper[:k, :k]
    )  # a singular operator shows here, not on the diagonal
    kept = s > 10 * float(torch.finfo(basis.dtype).eps) * s[0]
    y = vh.mT @ torch.where(kept, (u.mT @ right[:k]) / s, 0.0)
    return torch.mv(basis[:k].mT, y.to(basis))
