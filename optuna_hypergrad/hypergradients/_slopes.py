"""Objectives with their first derivatives at a point, and sums over such derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import ObjectiveError
from .._typing import Batch, Objective, Params
from ..operators import scalar
from ._estimate import Cotangents


class Slopes(NamedTuple):
    """An objective and its first derivatives at one point."""

    value: Tensor
    inner: Params
    outer: Cotangents


def slopes(
    objective: Objective, inner_params: Params, outer_params: Params, batch: Batch, label: str
) -> Slopes:
    """The objective and its derivatives with respect to both; ``None`` where it ignores a hyperparameter."""
    return _slopes(objective, inner_params, outer_params, batch, label, True)


def outer_slopes(
    objective: Objective, inner_params: Params, outer_params: Params, batch: Batch, label: str
) -> Slopes:
    """The same without ``inner``, which is empty: what leads to ``w`` alone is not gone back."""
    return _slopes(objective, inner_params, outer_params, batch, label, False)


def _slopes(
    objective: Objective,
    inner_params: Params,
    outer_params: Params,
    batch: Batch,
    label: str,
    both: bool,
) -> Slopes:
    w, lam = _tree.leaves(inner_params), _tree.leaves(outer_params)
    with torch.enable_grad():
        value = scalar(objective(dict(w), dict(lam), batch), label)
        if not value.requires_grad:
            raise ObjectiveError(
                f"{label} depends neither on inner_params nor on outer_params through differentiable torch operations; "
                f"compute it from the arguments that it is given."
            )
        wanted = {**w, **lam} if both else lam
        found = torch.autograd.grad(value, tuple(wanted.values()), allow_unused=True)
    by_lam: Cotangents = dict(zip(lam, found[-len(lam) :], strict=True))
    if not both:
        return Slopes(value.detach(), {}, by_lam)
    by_w = {
        k: torch.zeros_like(v) if g is None else g
        for (k, v), g in zip(w.items(), found, strict=False)
    }
    return Slopes(value.detach(), by_w, by_lam)


def difference(a: Cotangents, b: Cotangents) -> Cotangents:
    """``a - b``, ``None`` where both are."""
    found: Cotangents = {}
    for k, x in a.items():
        y = b[k]
        if x is None:
            found[k] = None if y is None else -y
        else:
            found[k] = x if y is None else x - y
    return found


def squared(parts: Mapping[str, Tensor | None]) -> float:
    """The sum of squares of all entries."""
    return sum(float(p.double().square().sum()) for p in parts.values() if p is not None)


def product(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> float:
    """The inner product over all entries that both have."""
    total = 0.0
    for k, x in a.items():
        y = b[k]
        if x is not None and y is not None:
            total += float((x.double() * y.double()).sum())
    return total
