"""How many bytes tensors take, and what a graph keeps alive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages behind ``tensors``, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@contextmanager
def saved_storages() -> Iterator[dict[int, int]]:
    """Bytes of the storages that graphs which are built inside keep alive, by address."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
