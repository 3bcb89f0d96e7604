"""How many bytes tensors take, and what a graph keeps alive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._twice import nodes_of

Built = TypeVar("Built")


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages behind ``tensors``, by address."""
    found = (part.untyped_storage() for t in tensors for part in _dense(t))
    return {s.data_ptr(): s.nbytes() for s in found}


def with_saved_storages(
    build: Callable[[], Built], roots: Callable[[Built], Iterable[Tensor]]
) -> tuple[Built, dict[int, int]]:
    """What ``build()`` gives, and the bytes of the storages that its graph keeps alive, by address.

    An objective that calls ``torch.func`` cannot run under hooks on what is saved: then it is built once more, and its
    graph, which ends in ``roots``, is looked through.
    """
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found.update(storages([tensor]))
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return build(), found
    except RuntimeError as error:
        if "support saved tensor hooks" not in str(error):
            raise
    built = build()
    return built, storages(t for n in nodes_of(*roots(built)) for t in _saved(n))


def _saved(node: Node) -> Iterator[Tensor]:
    names = [n for n in dir(node) if n == "saved_tensors" or n.startswith("_saved_")]
    for value in (getattr(node, name) for name in names):
        several = value if isinstance(value, (tuple, list)) else [value]
        yield from (v for v in several if isinstance(v, Tensor))


def _dense(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor consists of."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def at_least(number: float) -> str:
    """In three digits, and not below it."""
    unit = 10.0 ** (math.floor(math.log10(max(number, 1.0))) - 2)
    return f"{math.ceil(number / unit) * unit:.3g}"
