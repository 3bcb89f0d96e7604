"""A low-rank approximation of a positive semidefinite operator from a few products."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import AbstractLinearOperator


def nystrom(
    operator: AbstractLinearOperator, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``U`` ``(P, r)``, orthonormal, and ``L`` ``(r,)``, descending, with ``U diag(L) U^T ~ H``; exact for rank ``r``.

    ``Y = H Omega`` by ``r`` products done together, shifted by rounding so that ``Omega^T Y`` has a Cholesky
    factor. Where it has none because ``H`` has negative curvature, ``r`` more products give the Ritz values on the
    span of ``Y``, and the negative ones count as 0. NaN where products are.

    Args:
        operator: Symmetric ``(P,) -> (P,)``.
        rank: ``r``, the number of products; at most ``P`` are made.
        generator: On the CPU, of ``Omega``.

    Reference: Frangella, Tropp & Udell (2023), "Randomized Nystrom preconditioning", algorithm 2.1.
    """
    size, rank = operator.size, min(rank, operator.size)
    draw = torch.randn(size, rank, generator=generator, dtype=torch.float32)
    omega, _ = torch.linalg.qr(draw.to(dtype=operator.dtype, device=operator.device))  # (P, r)
    sketch = operator.many(omega.mT).mT
    if not bool(torch.isfinite(sketch).all()):
        return torch.full_like(omega, torch.nan), omega.new_full((rank,), torch.nan)
    eps = float(torch.finfo(operator.dtype).eps)
    size_of = float(torch.linalg.matrix_norm(sketch))
    shift = max(size**0.5 * eps * size_of, torch.finfo(sketch.dtype).tiny)
    core = omega.mT @ sketch
    core = 0.5 * (core + core.mT)
    if float(torch.linalg.eigvalsh(core)[0]) < -10 * shift:
        return _ritz(operator, sketch)
    eye = torch.eye(rank, dtype=core.dtype, device=core.device)
    factor, info = torch.linalg.cholesky_ex(core + shift * eye)
    while int(info):
        shift *= 10
        factor, info = torch.linalg.cholesky_ex(core + shift * eye)
    shifted = sketch + shift * omega  # (H + shift I) Omega
    root = torch.linalg.solve_triangular(factor, shifted.mT, upper=False).mT  # (P, r)
    basis, singular, _ = torch.linalg.svd(root, full_matrices=False)
    return basis.contiguous(), (singular.square() - shift).clamp_min(0.0)


def _ritz(operator: AbstractLinearOperator, sketch: Tensor) -> tuple[Tensor, Tensor]:
    basis, _ = torch.linalg.qr(sketch)
    inside = basis.mT @ operator.many(basis.mT.contiguous()).mT
    values, vectors = torch.linalg.eigh(0.5 * (inside + inside.mT))
    return (basis @ vectors.flip(1)).contiguous(), values.flip(0).clamp_min(0.0)
