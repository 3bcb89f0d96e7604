"""The Hessian's action on a vector from products in random subspaces, corrected so that it is unbiased."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .. import _tree
from .._typing import Params
from ._estimate import Cotangents
from ._sketches import Sketches, generator_of, signs
from ._slopes import difference


class SketchedAction(NamedTuple):
    """``g``, ``P^T g_w``, coordinates ``C`` of ``P C ~ H v``, and ``M^T v``."""

    value: Tensor
    slope: Params
    product: Params
    mixed: Cotangents


Along = Callable[[Params, bool], SketchedAction]
"""Of a tangent ``t``: ``P^T H t`` and ``M^T t``; and whether ``P^T g_w`` is wanted."""


def two_sketch(along: Along, v: Params, others: Sketches) -> SketchedAction:
    """``P P^T H R R^T v``, with ``others`` for ``R``."""
    return along({k: s.up(s.down(v[k])) for k, s in others.items()}, True)


def bi_probe(
    along: Along, v: Params, sketches: Sketches, rank: int, seed: tuple[int, ...]
) -> SketchedAction:
    """``r/(r-1) P [M c - e * M (e * c)]``, ``c = P^T v``, ``M = P^T H P``, and ``e`` random signs; what is whole as it is."""
    matrices = {k: s for k, s in sketches.items() if s.basis is not None}
    c = {k: s.down(v[k]) for k, s in matrices.items()}
    probe = signs((rank, 1), generator_of(seed))
    e = {k: probe.to(x) for k, x in c.items()}
    first = along({k: s.up(c[k]) for k, s in matrices.items()}, True)
    second = along({k: s.up(e[k] * c[k]) for k, s in matrices.items()}, False)
    correction = rank / (rank - 1)
    product = {
        k: correction * (x - e[k] * second.product[k]) if k in matrices else x
        for k, x in first.product.items()
    }
    if len(matrices) == len(v):
        return first._replace(product=product)
    rest = along({k: x for k, x in v.items() if k not in matrices}, False)
    added = {k: None if x is None else -x for k, x in rest.mixed.items()}
    return first._replace(
        product=_tree.add(product, rest.product), mixed=difference(first.mixed, added)
    )
