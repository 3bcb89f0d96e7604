"""What a few products tell of an operator's spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import AbstractLinearOperator


@dataclass(frozen=True)
class Ritz:
    """What Lanczos found from one start vector ``v`` of length 1.

    Attributes:
        values: The Ritz values, ascending: ``(m,)``, float64.
        bounds: By how much each is at most away from an eigenvalue: ``(m,)``.
        weights: Of each in ``v``; with the values, a quadrature of ``v^T f(H) v``: ``(m,)``, of sum 1.
    """

    values: Tensor
    bounds: Tensor
    weights: Tensor


def lanczos(operator: AbstractLinearOperator, start: Tensor, num_products: int) -> Ritz:
    """Ritz values of a symmetric operator, by Lanczos with full reorthogonalization.

    Args:
        operator: Symmetric, acting on ``(P,)``.
        start: Non-zero start vector ``(P,)``.
        num_products: At most this many products; fewer where an invariant subspace is found.

    NaN where a product is not finite.

    Reference: Golub & Van Loan (2013), "Matrix computations", section 10.1; as a probe for training,
    Granziol, Zohren & Roberts (2022), "Learning rates as a function of batch size".
    """
    num_products = min(num_products, operator.size)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    q = start / torch.linalg.vector_norm(start)
    beta = 0.0
    for _ in range(num_products):
        basis.append(q)
        w = operator(q)
        diagonal.append(float(torch.dot(w, q)))
        for _ in range(2):
            for column in basis:
                w = w.sub(column, alpha=float(torch.dot(w, column)))
        beta = float(torch.linalg.vector_norm(w))
        spread = max(abs(d) for d in diagonal) + sum(off_diagonal[-1:])
        if beta <= 10 * float(torch.finfo(w.dtype).eps) * spread:
            beta = 0.0
            break
        off_diagonal.append(beta)
        q = w / beta
    m = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    if m > 1:
        side = torch.tensor(off_diagonal[: m - 1], dtype=torch.float64, device="cpu")
        tridiagonal = tridiagonal + torch.diag(side, 1) + torch.diag(side, -1)
    if not bool(torch.isfinite(tridiagonal).all()):
        unknown = torch.full((m,), torch.nan, dtype=torch.float64, device="cpu")
        return Ritz(unknown, unknown, unknown)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return Ritz(values, beta * vectors[-1].abs(), vectors[0].square())


def ritz_values(
    operator: AbstractLinearOperator, like: Tensor, num_products: int = 10, seed: int = 0
) -> tuple[Tensor, float]:
    """The values of :func:`lanczos` from a standard normal start, and the bound of the largest.

    Args:
        operator: Symmetric, acting on ``(P,)``.
        like: Any tensor of the dtype and device to use.
        num_products: Products to spend.
        seed: Of the start vector.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(operator.size, generator=generator, device="cpu", dtype=torch.float32)
    found = lanczos(operator, start.to(like), num_products)
    return found.values, float(found.bounds[-1])


def largest_eigenvalue(
    operator: AbstractLinearOperator, like: Tensor, num_products: int = 10, seed: int = 0
) -> float:
    """An upper estimate of the largest eigenvalue of a symmetric operator.

    The largest Ritz value plus its residual bound: 1 over it is a step length at which gradient
    descent and the Neumann series converge. Start vector: standard normal, from ``seed``.

    Args:
        operator: Symmetric, acting on ``(P,)``.
        like: Any vector ``(P,)`` of the dtype and device to use.
        num_products: Products to spend.
        seed: Of the start vector.
    """
    values, bound = ritz_values(operator, like, num_products, seed)
    return float(values[-1]) + bound


def asymmetry(operator: AbstractLinearOperator, seed: int = 0) -> float:
    """``|u.Hv - v.Hu| / (|Hu| |v| + |Hv| |u|)`` for two random vectors: 0 for a symmetric operator.

    Costs two products. Rounding leaves about the dtype's epsilon.

    Args:
        operator: Acting on ``(P,)``.
        seed: Of the two vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, operator.size, generator=generator, device="cpu", dtype=torch.float32)
    u, v = pair.to(device=operator.device, dtype=operator.dtype)
    hu, hv = operator(u).clone(), operator(v)
    norm = torch.linalg.vector_norm
    scale = norm(hu) * norm(v) + norm(hv) * norm(u)
    return float((torch.dot(u, hv) - torch.dot(v, hu)).abs() / scale) if float(scale) else 0.0
