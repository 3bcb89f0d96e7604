"""A low-rank approximation of a positive semidefinite operator from a few products.

Reference: Frangella, Tropp & Udell (2023), "Randomized Nystrom preconditioning", algorithm 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import AbstractLinearOperator


@dataclass(frozen=True)
class Sketch:
    """``H`` on the span of ``r`` random vectors.

    Attributes:
        test: ``Omega^T``, ``(r, P)``, orthonormal rows.
        products: ``(H Omega)^T``, ``(r, P)``.
        core: ``Omega^T H Omega``, ``(r, r)``, float64 on the CPU, symmetric.
        rounding: A bound for the rounding errors of the core's eigenvalues.
    """

    test: Tensor
    products: Tensor
    core: Tensor
    rounding: float

    def finite(self) -> bool:
        return bool(torch.isfinite(self.core).all())

    def eigenvalues(self) -> Tensor:
        """Of the core, ascending; negative ones below ``-rounding`` are negative curvature of ``H``."""
        found: Tensor = torch.linalg.eigvalsh(self.core)
        return found

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """``U^T`` ``(r, P)``, orthonormal rows, ``L`` ``(r,)``, descending, all ``>= 0``, and a shift.

        ``U L U^T ~ H``, exact for an ``H`` of rank ``r``. The shift that gives the core a Cholesky factor is as large as
        rounding, and as the negative curvature that the sketch has met; what is approximated is ``H + shift I``, less
        the shift, negative values cut off.
        """
        shift = self.rounding + max(-float(self.eigenvalues()[0]), 0.0) * (1 + 1e-3)
        shifted = self.products.add(self.test, alpha=shift)
        eye = torch.eye(len(self.core), dtype=self.core.dtype, device=self.core.device)
        factor = torch.linalg.cholesky(self.core + shift * eye).to(shifted)
        rows = torch.linalg.solve_triangular(factor, shifted, upper=False)
        q, r = torch.linalg.qr(rows.mT)
        u, singular, _ = torch.linalg.svd(r)
        values = singular.square() - shift
        values[values <= 10 * torch.finfo(values.dtype).eps * shift] = (
            0.0  # the shift's own rounding
        )
        return (q @ u).mT.contiguous(), values, shift


def draw_sketch(
    operator: AbstractLinearOperator,
    rank: int,
    generator: torch.Generator,
    at_once: int | None = None,
) -> Sketch:
    """A sketch of ``operator`` from ``rank`` products, ``P`` at most.

    Args:
        operator: Symmetric ``(P,) -> (P,)``.
        rank: ``r``.
        generator: On the CPU, of the random vectors.
        at_once: Products that are computed together, each of which takes the activations' memory again; all by
            default.
    """
    rank = min(rank, operator.size)
    drawn = torch.randn(operator.size, rank, generator=generator, device="cpu", dtype=torch.float32)
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    test = torch.linalg.qr(drawn.to(like))[0].mT.contiguous()
    products = torch.cat([operator.many(part) for part in test.split(at_once or rank)])
    core = (test @ products.mT).double().cpu()
    eps, tiny = (float(getattr(torch.finfo(operator.dtype), k)) for k in ("eps", "tiny"))
    size = float(torch.linalg.matrix_norm(products.double()))
    return Sketch(
        test, products, 0.5 * (core + core.mT), max(math.sqrt(operator.size) * eps * size, tiny)
    )


def nystrom(
    operator: AbstractLinearOperator, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``U`` ``(P, r)``, orthonormal, and ``L`` ``(r,)``, descending, with ``U diag(L) U^T ~ H``, whatever ``H`` is.

    Where the sketch meets negative curvature, ``r`` more products give the Ritz values on the span of its products, and
    the negative ones count as 0. NaN where products are.

    Args:
        operator: Symmetric ``(P,) -> (P,)``.
        rank: ``r``, the number of products; at most ``P`` are made.
        generator: On the CPU, of the random vectors.
    """
    sketch = draw_sketch(operator, rank, generator)
    if not sketch.finite():
        nothing = torch.full_like(sketch.test.mT, torch.nan)
        return nothing, nothing.new_full((len(sketch.test),), torch.nan)
    if float(sketch.eigenvalues()[0]) < -10 * sketch.rounding:
        return _ritz(operator, sketch.products.mT)
    rows, values, _ = sketch.low_rank()
    return rows.mT.contiguous(), values


def _ritz(operator: AbstractLinearOperator, columns: Tensor) -> tuple[Tensor, Tensor]:
    basis, _ = torch.linalg.qr(columns)
    inside = basis.mT @ operator.many(basis.mT.contiguous()).mT
    values, vectors = torch.linalg.eigh(0.5 * (inside + inside.mT))
    return (basis @ vectors.flip(1)).contiguous(), values.flip(0).clamp_min(0.0)
