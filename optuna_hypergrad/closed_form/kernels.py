"""Kernels as plain functions: their settings get gradients like anything else."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_count
from .._errors import HyperparameterError, ProblemError
from ._inputs import checked_positive, checked_tensor

_LOST = {torch.float32: 1e-5, torch.float64: 1e-9}
"""What a squared distance, in length scales, may be wrong by."""


def linear_kernel(a: Tensor, b: Tensor | None = None) -> Tensor:
    """``a_i . b_j``.

    Args:
        a: ``(..., n, p)``.
        b: ``(..., m, p)``; ``a`` by default.

    Returns:
        ``(..., n, m)``.
    """
    a, b = _checked("linear_kernel", a, b)
    return a @ b.mT


def polynomial_kernel(
    a: Tensor,
    b: Tensor | None = None,
    *,
    degree: int = 3,
    scale: Tensor | float = 1.0,
    offset: Tensor | float = 1.0,
) -> Tensor:
    """``(scale a_i . b_j + offset)^degree``.

    Args:
        a: ``(..., n, p)``.
        b: ``(..., m, p)``; ``a`` by default.
        degree: From 1 on.
        scale: Positive: a number, or ``(p,)`` for one per feature.
        offset: A number, not negative.

    Returns:
        ``(..., n, m)``.
    """
    a, b = _checked("polynomial_kernel", a, b)
    check_count("polynomial_kernel", "degree", degree, 1)
    scale = checked_positive("polynomial_kernel", "scale", scale, a)
    _check_per_feature("polynomial_kernel", "scale", scale, a)
    offset = torch.as_tensor(offset, dtype=a.dtype, device=a.device)
    if offset.dim() or not float(offset) >= 0:
        raise HyperparameterError(
            f"polynomial_kernel: offset must be a number from 0 on, and is {offset.tolist()!r:.80}; otherwise the "
            f"kernel is not positive semidefinite."
        )
    return ((scale * a) @ b.mT + offset) ** degree


def rbf_kernel(a: Tensor, b: Tensor | None = None, *, length_scale: Tensor | float = 1.0) -> Tensor:
    """``exp(-sum_f ((a_if - b_jf) / length_scale_f)^2 / 2)`` (scikit-learn's ``gamma`` is ``1 / (2 length_scale^2)``).

    Args:
        a: ``(..., n, p)``.
        b: ``(..., m, p)``; ``a`` by default.
        length_scale: Positive: a number, or ``(p,)`` for one per feature ("automatic relevance determination").

    Returns:
        ``(..., n, m)``, at most 1. Points of float32 that lie more than about 9 length scales from their mean are compared in
        float64; those more than about 2,000 away one by one, in memory for ``n m p`` numbers.
    """
    a, b = _checked("rbf_kernel", a, b)
    length_scale = checked_positive("rbf_kernel", "length_scale", length_scale, a)
    _check_per_feature("rbf_kernel", "length_scale", length_scale, a)
    exponent = _exponent(a, b, length_scale)
    above = exponent.detach().clamp_min(0.0)  # by rounding; derivatives are those of what is exact
    return (exponent - above).exp().to(a.dtype)


def _exponent(a: Tensor, b: Tensor, length_scale: Tensor) -> Tensor:
    """``-|a_i - b_j|^2 / 2`` in units of ``length_scale``; float64 where float32 would lose it, by differences where both would.

    Distances do not know the common mean, and squares of large numbers cancel.
    """
    middle = b.detach().mean(-2, keepdim=True)
    x, z = (a - middle) / length_scale, (b - middle) / length_scale
    squares = [v.square().sum(-1) for v in (x, z)]
    largest = max(float(v.detach().max()) for v in squares)
    if largest * torch.finfo(a.dtype).eps <= _LOST[a.dtype]:
        return x @ z.mT - 0.5 * (squares[0].unsqueeze(-1) + squares[1].unsqueeze(-2))
    if a.dtype == torch.float32:
        return _exponent(a.double(), b.double(), length_scale.double())
    return -0.5 * ((a.unsqueeze(-2) - b.unsqueeze(-3)) / length_scale).square().sum(-1)


def _checked(owner: str, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    a = checked_tensor(owner, "a", a, least_dim=2)
    if b is None:
        return a, a
    b = checked_tensor(owner, "b", b, least_dim=2)
    if a.shape[-1] != b.shape[-1] or a.dtype != b.dtype:
        raise ProblemError(
            f"{owner}: a has {a.shape[-1]} features of {a.dtype}, b {b.shape[-1]} of {b.dtype}; they must be the same."
        )
    return a, b


def _check_per_feature(owner: str, name: str, value: Tensor, a: Tensor) -> None:
    if value.shape not in ((), (1,), a.shape[-1:]):
        raise HyperparameterError(
            f"{owner}: {name} has shape {tuple(value.shape)}; give a number, or {(a.shape[-1],)} for one per feature."
        )
