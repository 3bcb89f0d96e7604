"""Tensors that are kept for long, in large blocks of memory."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_BLOCK = 48 * 2**20
"""Bytes. An allocator maps so much by itself, and gives it back at once, while a small tensor that is kept among those that
come and go, however small, holds on to the memory around it: with glibc's, a third more than is kept."""

_ALIGNED = 64


def room_for(tensors: Iterable[Tensor]) -> int:
    """Bytes that copies of them take."""
    return sum(math.ceil(t.numel() * t.element_size() / _ALIGNED) * _ALIGNED for t in tensors)


class Shelf:
    """Copies tensors into blocks; a block is given back with the last of its copies.

    Args:
        num_bytes: Of all that will be put on it, roughly; blocks are no larger.
    """

    def __init__(self, num_bytes: float) -> None:
        self._left = num_bytes
        self._block = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def put(self, tensor: Tensor) -> Tensor:
        """A copy; ``tensor`` itself where it is empty, elsewhere than in main memory, or not contiguous."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or size == 0 or not tensor.is_contiguous():
            return tensor
        room = room_for([tensor])
        if self._used + room > len(self._block):
            length = max(room, min(_BLOCK, int(self._left)))
            self._block, self._used = torch.empty(length, dtype=torch.uint8, device="cpu"), 0
        self._left -= room
        place = self._block[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += room
        return place.copy_(tensor)
