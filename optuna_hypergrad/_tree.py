"""Vector algebra on ``dict[str, Tensor]``. All functions return new dicts and never mutate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ._typing import Params


def tree_map(function: Callable[..., Tensor], first: Params, *rest: Mapping[str, Tensor]) -> Params:
    """Apply ``function`` entry by entry; every tree has the keys of the first."""
    return {k: function(v, *(r[k] for r in rest)) for k, v in first.items()}


def from_list(like: Iterable[str], tensors: Sequence[Tensor]) -> Params:
    """Name a flat list of tensors by the keys of ``like``, in order."""
    return dict(zip(like, tensors, strict=True))


def detach(tree: Params) -> Params:
    return {k: v.detach() for k, v in tree.items()}


def clone(tree: Params) -> Params:
    return {k: v.detach().clone() for k, v in tree.items()}


def leaves(tree: Params) -> Params:
    """Fresh leaves that require grad and share memory with ``tree``."""
    return {k: v.detach().requires_grad_(True) for k, v in tree.items()}


def zeros_like(tree: Params) -> Params:
    return {k: torch.zeros_like(v) for k, v in tree.items()}


def add(a: Params, b: Params) -> Params:
    return tree_map(torch.add, a, b)


def sub(a: Params, b: Params) -> Params:
    return tree_map(torch.sub, a, b)


def scale(a: Params, factor: float | Tensor) -> Params:
    return {k: v * factor for k, v in a.items()}


def dot(a: Params, b: Params) -> Tensor:
    """Inner product, accumulated in at least float32. A 0-d tensor."""
    parts = [
        torch.dot(_accumulable(v).reshape(-1), _accumulable(b[k]).reshape(-1)) for k, v in a.items()
    ]
    return torch.stack([p.to(parts[0]) for p in parts]).sum()


def norm(a: Params) -> Tensor:
    """Euclidean norm over all entries. A 0-d tensor."""
    return dot(a, a).sqrt()


def num_entries(a: Params) -> int:
    return sum(v.numel() for v in a.values())


def all_finite(a: Params) -> bool:
    return all(finite(v) for v in a.values())


def finite(v: Tensor) -> bool:
    """Whether all entries are. A finite sum proves it in one pass; an infinite one may be overflow."""
    return math.isfinite(v.detach().sum().item()) or bool(torch.isfinite(v).all())


def _accumulable(v: Tensor) -> Tensor:
    return v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
