"""Multiplication by fractions that can be undone, of whole numbers below 2^52 in float64, which is exact.

As in ``_fixed_point``; there for 64-bit integers. All is done in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 16
DENOMINATOR = 1 << SHIFT


def multiply(v: Tensor, buffer: Tensor, n: int | Tensor, above: Tensor) -> None:
    """``v <- v n / d``. ``above`` is overwritten."""
    torch.mul(v, 1 / DENOMINATOR, out=above).floor_()
    v.sub_(above, alpha=DENOMINATOR).add_(buffer, alpha=DENOMINATOR)  # B d + (v mod d)
    torch.div(v, _divisor(n, v), out=buffer).floor_()
    add_times(v, buffer, -n, out=v)
    add_times(v, above, n, out=v)


def divide(v: Tensor, buffer: Tensor, n: int | Tensor, above: Tensor) -> None:
    """``v <- v d / n``: undoes :func:`multiply`."""
    torch.div(v, _divisor(n, v), out=above).floor_()
    add_times(v, above, -n, out=v)
    add_times(v, buffer, n, out=v)  # B n + (v mod n)
    torch.mul(v, 1 / DENOMINATOR, out=buffer).floor_()
    v.sub_(buffer, alpha=DENOMINATOR).add_(above, alpha=DENOMINATOR)


def add_times(x: Tensor, y: Tensor, n: int | Tensor, out: Tensor) -> Tensor:
    """``out <- x + n y``."""
    return torch.add(x, y, alpha=n, out=out) if isinstance(n, int) else torch.add(x, y * n, out=out)


def _divisor(n: int | Tensor, like: Tensor) -> Tensor:
    """In a tensor: by a number, a GPU would multiply by the reciprocal, and might miss the last bit."""
    return n if isinstance(n, Tensor) else torch.full((), n, dtype=like.dtype, device=like.device)
