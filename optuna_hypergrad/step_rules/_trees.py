"""Points in a box as named tensors: projection, free entries, prefixed names for states."""

from __future__ import annotations

import math

import torch

from .._typing import Params
from ..search_space import Domain
from ._abstract import Bounds


def project(point: Params, lower: Bounds, upper: Bounds) -> Params:
    """The nearest point inside the bounds, exactly, in each entry's own dtype."""
    return {k: Domain(lower[k], upper[k]).clamp(v) for k, v in point.items()}


def free(point: Params, gradient: Params, lower: Bounds, upper: Bounds) -> Params:
    """Where a step against the gradient is not stopped by a bound. Boolean tensors."""
    masks = {}
    for k, x in point.items():
        low, high = Domain(lower[k], upper[k]).bounds_as(x)
        g = gradient[k]
        masks[k] = ~(((x <= low) & (g >= 0)) | ((x >= high) & (g <= 0)))
    return masks


def usable(value: float, point: Params, gradient: Params) -> bool:
    """Whether the value is finite and the gradient covers ``point`` with finite entries."""
    if not math.isfinite(value) or gradient.keys() != point.keys():
        return False
    return all(bool(torch.isfinite(g).all()) for g in gradient.values())


def pack(prefix: str, tree: Params) -> Params:
    """Name the entries of ``tree`` ``prefix/name``."""
    return {f"{prefix}/{k}": v for k, v in tree.items()}


def unpack(prefix: str, tensors: Params) -> Params:
    """The entries that :func:`pack` named."""
    cut = len(prefix) + 1
    return {k[cut:]: v for k, v in tensors.items() if k.startswith(prefix + "/")}


def largest(tree: Params) -> float:
    """Largest absolute entry; 0 for no entries."""
    return max((float(v.abs().max()) for v in tree.values() if v.numel()), default=0.0)
