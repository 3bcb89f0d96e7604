"""Points in a box as flat vectors: layout, exact projection, the model minimized in a box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._typing import Params
from ..search_space import Domain
from ._abstract import Bounds

_SMALL = 65_536


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one vector.

    The vector is float64 up to 65,536 entries, and above where most entries are; otherwise float32.
    A small one is on the CPU, where it is faster and its sums do not depend on where tensors lie in memory; a
    large one is on the device of the largest tensor.
    """

    point: Params
    lower: Bounds
    upper: Bounds

    @property
    def size(self) -> int:
        return sum(v.numel() for v in self.point.values())

    @property
    def large(self) -> bool:
        return self.size > _SMALL

    @property
    def dtype(self) -> torch.dtype:
        if self.device.type == "mps":  # has no float64
            return torch.float32
        double = sum(v.numel() for v in self.point.values() if v.dtype == torch.float64)
        return torch.float64 if not self.large or 2 * double > self.size else torch.float32

    @property
    def device(self) -> torch.device:
        if not self.large:
            return torch.device("cpu")
        return max(self.point.values(), key=lambda v: v.numel()).device

    def flat(self, tree: Params) -> Tensor:
        """``tree`` (keyed and shaped like the point) as one vector."""
        parts = [tree[k].detach().reshape(-1).to(self.device, self.dtype) for k in self.point]
        return torch.cat(parts) if len(parts) != 1 else parts[0].clone()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of every entry, as its own dtype rounds them inwards."""
        ends = [Domain(self.lower[k], self.upper[k]).bounds_as(v) for k, v in self.point.items()]
        return tuple(  # type: ignore[return-value]
            torch.cat(
                [
                    torch.full((v.numel(),), end[side], dtype=self.dtype, device=self.device)
                    for end, v in zip(ends, self.point.values(), strict=True)
                ]
            )
            for side in (0, 1)
        )

    def tree(self, vector: Tensor) -> Params:
        """The vector as named tensors in their own dtypes and devices, inside the bounds exactly."""
        found, start = {}, 0
        for k, v in self.point.items():
            part = vector[start : start + v.numel()].reshape(v.shape).to(v.device, v.dtype)
            found[k] = Domain(self.lower[k], self.upper[k]).clamp(part)
            start += v.numel()
        return found


def floored(size: Tensor) -> Tensor:
    """Sizes that can be divided by: at least 1e-12 of the largest."""
    return size.clamp(min=max(1e-12 * float(size.max()), torch.finfo(size.dtype).tiny))


def projected(gradient: Tensor, point: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The gradient, zero where a bound stops a step against it."""
    stopped = ((point <= lower) & (gradient > 0)) | ((point >= upper) & (gradient < 0))
    return gradient.masked_fill(stopped, 0.0)


def secant_model(diagonal: Tensor, steps: Tensor, changes: Tensor) -> Callable[[Tensor], Tensor]:
    """Products with the BFGS matrix of a diagonal and of secant pairs, in compact form.

    Byrd, Nocedal & Schnabel 1994, "Representations of quasi-Newton matrices", eq. 2.17.

    Args:
        diagonal: (n,), positive. steps, changes: (m, n), ``steps[i] @ changes[i] > 0``.
    """
    if not len(steps):
        return lambda v: diagonal * v
    scaled = steps * diagonal
    inner = steps @ changes.T  # (m, m)
    lower = torch.tril(inner, -1)
    middle = torch.cat(
        [
            torch.cat([scaled @ steps.T, lower], 1),
            torch.cat([lower.T, -torch.diag(torch.diagonal(inner))], 1),
        ]
    )
    size = torch.diagonal(middle).abs().sqrt()
    evened = middle / size / size[:, None]
    if not bool(torch.isfinite(evened).all()):  # products of the pairs overflow, or vanish
        return lambda v: diagonal * v
    inverse = torch.linalg.pinv(evened, rtol=1e-12) / size / size[:, None]
    both = torch.cat([scaled, changes])
    left = inverse @ both
    return lambda v: diagonal * v - both.T @ (left @ v)


def minimize_in_box(
    slope: Tensor,
    product: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    low: Tensor,
    high: Tensor,
    max_steps: int = 80,
    rtol: float = 1e-8,
) -> tuple[Tensor, float]:
    """A minimizer of ``slope @ s + 0.5 s @ B s`` over ``low <= s <= high``, and the decrease.

    Spectral projected gradients in the metric of the diagonal, with exact line searches
    (Birgin, Martinez & Raydan 2000).
    """
    s = torch.clamp(-slope / diagonal, low, high)
    residual = slope + product(s)
    model = float(0.5 * (slope + residual) @ s)
    best, lowest, length = s, model, 1.0
    for _ in range(max_steps):
        d = torch.clamp(s - length * residual / diagonal, low, high) - s
        bent = product(d)
        downhill, curvature, size = torch.stack(
            [d @ residual, d @ bent, d @ (diagonal * d)]
        ).tolist()
        if not downhill < -rtol * abs(model):
            break
        reach = min(1.0, -downhill / curvature) if curvature > 0 else 1.0
        s, residual = s + reach * d, residual + reach * bent
        model += reach * downhill + 0.5 * reach**2 * curvature
        if model < lowest:
            best, lowest = s, model
        length = min(max(size / curvature, 1e-3), 1e3) if curvature > 0 else 1e3
    decrease = -lowest if lowest < 0.0 else 0.0  # of a model that is NaN, none
    return best, min(decrease, torch.finfo(torch.float64).max)
