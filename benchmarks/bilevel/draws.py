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
