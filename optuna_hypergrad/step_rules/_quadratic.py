"""A quadratic model of the loss from secant pairs, and where it is least in a box."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._box import Vector, is_finite

Product = Callable[[Vector], Vector]

_LARGEST = float(np.finfo(np.float64).max)
_DENSE = 64


def secant_model(diagonal: Vector, steps: Vector, changes: Vector) -> Product:
    """Products with the BFGS matrix of a diagonal and of secant pairs, in compact form.

    Byrd, Nocedal & Schnabel 1994, "Representations of quasi-Newton matrices", eq. 2.17.

    Args:
        diagonal: (n,), positive. steps, changes: (m, n), ``steps[i] @ changes[i] > 0``.
    """
    if not len(steps):
        return lambda v: diagonal * v
    if len(diagonal) == 1:
        slope = changes[-1] / steps[-1]
        return lambda v: slope * v
    xp: Any = torch if isinstance(diagonal, Tensor) else np
    scaled = steps * diagonal
    inner = steps @ changes.T  # (m, m)
    lower = xp.tril(inner, -1)
    middle = xp.concatenate(
        [
            xp.concatenate([scaled @ steps.T, lower], 1),
            xp.concatenate([lower.T, -xp.diag(xp.diagonal(inner))], 1),
        ]
    )
    size = abs(xp.diagonal(middle)) ** 0.5
    evened = middle / size / size[:, None]
    if not is_finite(evened):  # products of the pairs overflow, or vanish
        return lambda v: diagonal * v
    inverse = xp.linalg.pinv(evened, rtol=1e-12) / size / size[:, None]
    both = xp.concatenate([scaled, changes])
    left = inverse @ both
    if len(diagonal) <= _DENSE:
        matrix = xp.diag(diagonal) - both.T @ left
        return lambda v: matrix @ v
    return lambda v: diagonal * v - both.T @ (left @ v)


def minimize_in_box(
    slope: Vector,
    product: Product,
    diagonal: Vector,
    low: Vector,
    high: Vector,
    max_steps: int = 80,
    rtol: float = 1e-8,
) -> tuple[Vector, float]:
    """A minimizer of ``slope @ s + 0.5 s @ B s`` over ``low <= s <= high``, and the decrease.

    Spectral projected gradients in the metric of the diagonal, with exact line searches
    (Birgin, Martinez & Raydan 2000).
    """
    s = _between(-slope / diagonal, low, high)
    residual = slope + product(s)
    model = float(0.5 * (slope + residual) @ s)
    best, lowest, length = s, model, 1.0
    for _ in range(max_steps):
        d = _between(s - length * residual / diagonal, low, high) - s
        bent = product(d)
        downhill, curvature, size = _numbers(d @ residual, d @ bent, d @ (diagonal * d))
        if not downhill < -rtol * abs(model):
            break
        reach = min(1.0, -downhill / curvature) if curvature > 0 else 1.0
        s, residual = s + reach * d, residual + reach * bent
        model += reach * downhill + 0.5 * reach**2 * curvature
        if model < lowest:
            best, lowest = s, model
        length = min(max(size / curvature, 1e-3), 1e3) if curvature > 0 else 1e3
    decrease = -lowest if lowest < 0.0 else 0.0  # of a model that is NaN, none
    return best, min(decrease, _LARGEST)


def _between(v: Vector, low: Vector, high: Vector) -> Vector:
    if isinstance(v, Tensor):
        return v.clip(low, high)
    return np.minimum(np.maximum(v, low), high)  # half the time of clip


def _numbers(*given: Any) -> list[float]:
    """0-d results as numbers, fetched from a device at once."""
    return torch.stack(given).tolist() if isinstance(given[0], Tensor) else list(map(float, given))
