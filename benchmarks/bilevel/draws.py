"""Batches that all methods and peers see: functions of the seed and the step. Only NumPy and torch: peers import it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Part = tuple[Any, Any, Any]
"""Pixels, labels, numbers."""


def drawn(part: Part, size: int, key: tuple[int, int], step: int) -> Part:
    """``size`` samples of ``part``, with repetitions."""
    seed = int(np.random.SeedSequence((*key, step)).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(part[1]), (size,), generator=generator)
    return part[0][chosen], part[1][chosen], part[2][chosen]


class GoingRound:
    """All samples of ``part``, shuffled once, ``size`` at a time, and then the same batches again."""

    def __init__(self, part: Part, size: int, key: tuple[int, int]) -> None:
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
        order = torch.randperm(len(part[1]), generator=torch.Generator().manual_seed(seed))
        self._part = tuple(x[order] for x in part)
        self._size = size
        self.num_batches = -(-len(order) // size)

    def __call__(self, step: int) -> Part:
        start = step % self.num_batches * self._size
        x, y, numbers = (x[start : start + self._size] for x in self._part)
        return x, y, numbers
