"""Points in a box as flat vectors: layout, exact projection."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._typing import Params
from ..search_space import Domain
from ._abstract import Bounds

_SMALL = 65_536

Vector = Any
"""A NumPy array up to 65,536 entries (an operation takes a fraction of torch's time there), above a tensor."""


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one vector.

    The vector is a float64 array up to 65,536 entries. Above, it is a tensor on the device of the largest one, float64 where
    most entries are and otherwise float32.
    """

    point: Params
    lower: Bounds
    upper: Bounds

    @functools.cached_property
    def size(self) -> int:
        return sum(v.numel() for v in self.point.values())

    @functools.cached_property
    def large(self) -> bool:
        return self.size > _SMALL

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Of a large vector."""
        if self.device.type == "mps":  # has no float64
            return torch.float32
        double = sum(v.numel() for v in self.point.values() if v.dtype == torch.float64)
        return torch.float64 if 2 * double > self.size else torch.float32

    @functools.cached_property
    def device(self) -> torch.device:
        """Of a large vector."""
        return max(self.point.values(), key=lambda v: v.numel()).device

    def own(self, tensor: Tensor) -> Vector:
        """A tensor of a state as what is worked on."""
        if self.large:
            return tensor.to(self.device, self.dtype)
        return tensor.cpu().to(torch.float64).numpy()

    def flat(self, tree: Params) -> Vector:
        """``tree`` (keyed and shaped like the point) as one vector."""
        if self.large:
            parts = [tree[k].detach().reshape(-1).to(self.device, self.dtype) for k in self.point]
            return torch.cat(parts) if len(parts) != 1 else parts[0].clone()
        arrays = [self.own(tree[k].detach()).reshape(-1) for k in self.point]
        return np.concatenate(arrays) if len(arrays) != 1 else arrays[0].copy()

    def bounds(self) -> tuple[Vector, Vector]:
        """Lower and upper bound of every entry, as its own dtype rounds them inwards."""
        ends = [Domain(self.lower[k], self.upper[k]).bounds_as(v) for k, v in self.point.items()]
        sizes = [v.numel() for v in self.point.values()]
        if not self.large:
            return tuple(np.repeat([end[side] for end in ends], sizes) for side in (0, 1))  # type: ignore[return-value]
        return tuple(  # type: ignore[return-value]
            torch.cat(
                [
                    torch.full((n,), end[side], dtype=self.dtype, device=self.device)
                    for end, n in zip(ends, sizes, strict=True)
                ]
            )
            for side in (0, 1)
        )

    def tree(self, vector: Vector) -> Params:
        """The vector as named tensors in their own dtypes and devices, inside the bounds exactly."""
        found, start = {}, 0
        whole = vector if isinstance(vector, Tensor) else torch.from_numpy(vector)
        for k, v in self.point.items():
            part = whole[start : start + v.numel()].reshape(v.shape).to(v.device, v.dtype)
            found[k] = Domain(self.lower[k], self.upper[k]).clamp(part)
            start += v.numel()
        return found


def largest(vector: Vector) -> float:
    """Absolute value of the largest entry."""
    return float(abs(vector).max())


def larger(a: Vector, b: Vector) -> Vector:
    """Entry by entry."""
    return torch.maximum(a, b) if isinstance(a, Tensor) else np.maximum(a, b)


def is_finite(vector: Vector) -> bool:
    return bool(
        (torch.isfinite(vector) if isinstance(vector, Tensor) else np.isfinite(vector)).all()
    )


def least(vector: Vector) -> float:
    """The smallest positive number of its dtype that can be divided by."""
    limits = torch.finfo(vector.dtype) if isinstance(vector, Tensor) else np.finfo(vector.dtype)
    return float(limits.tiny)


def floored(size: Vector) -> Vector:
    """Sizes that can be divided by: at least 1e-12 of the largest."""
    return size.clip(min=max(1e-12 * float(size.max()), least(size)))


def projected(gradient: Vector, point: Vector, lower: Vector, upper: Vector) -> Vector:
    """The gradient, zero where a bound stops a step against it."""
    stopped = ((point <= lower) & (gradient > 0)) | ((point >= upper) & (gradient < 0))
    if isinstance(gradient, Tensor):
        return gradient.masked_fill(stopped, 0.0)
    return np.where(stopped, 0.0, gradient)
