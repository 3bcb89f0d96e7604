"""Directions in the space of the outer parameters, ``E[v v^T] = I``, each a function of (seed, step, number)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._typing import Params

Law = Literal["orthogonal", "rademacher", "gaussian", "coordinate"]
LAWS: tuple[Law, ...] = ("orthogonal", "rademacher", "gaussian", "coordinate")
WITHOUT_REPLACEMENT = ("orthogonal", "coordinate")


@dataclass(frozen=True)
class Directions:
    """The directions of one outer step.

    ``"orthogonal"``: rows of the Hartley matrix, drawn without replacement, their columns' signs random: any
    two are orthogonal, each has the norm ``sqrt(N)``, and one costs ``O(N)``, however many there are.
    ``"coordinate"``: ``sqrt(N) e_k``, ``k`` drawn without replacement.

    Reference: Bracewell (1983), "Discrete Hartley transform".

    Args:
        law: One of ``LAWS``.
        seed: Of the estimator.
        step: Outer step.
        outer_params: For their layout.
    """

    law: Law
    seed: int
    step: int
    outer_params: Params

    @property
    def size(self) -> int:
        return _tree.num_entries(self.outer_params)

    def most(self, asked: int | None) -> int:
        """How many directions there are to take: all that were asked for, unless fewer are exact already."""
        if asked is None:
            return self.size
        return min(asked, self.size) if self.law in WITHOUT_REPLACEMENT else asked

    def each(self, numbers: range) -> Iterator[Tensor]:
        """One after the other, ``(N,)`` in float64 on the CPU."""
        size = self.size
        if self.law not in WITHOUT_REPLACEMENT:
            draw = _signs if self.law == "rademacher" else _normals
            yield from (draw(size, self._generator(1 + i)) for i in numbers)
            return
        generator = self._generator(0)
        order = torch.randperm(size, generator=generator, device="cpu")[
            numbers.start : numbers.stop
        ]
        if self.law == "coordinate":
            yield from (
                math.sqrt(size) * unit_rows(order[i : i + 1], size)[0] for i in range(len(order))
            )
            return
        signs, positions = _signs(size, generator), torch.arange(size, device="cpu")
        for row in order:
            angles = (row * positions % size).double() * (2 * math.pi / size)
            yield (angles.cos() + angles.sin()) * signs

    def columns(self, numbers: range) -> Params:
        """As tensors ``(B, *shape)`` by name."""
        made = {k: v.new_empty(len(numbers), *v.shape) for k, v in self.outer_params.items()}
        for i, row in enumerate(self.each(numbers)):
            for k, part in shaped(row, self.outer_params).items():
                made[k][i] = part
        return made

    def _generator(self, number: int) -> torch.Generator:
        mixed = np.random.SeedSequence((self.seed, self.step, number)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(mixed[0]) >> 1)


def unit_rows(indices: Tensor, size: int) -> Tensor:
    """``e_k`` for each index: ``(B, N)``."""
    rows = torch.zeros(len(indices), size, dtype=torch.float64, device="cpu")
    rows[torch.arange(len(indices), device="cpu"), indices] = 1.0
    return rows


def flat(tree: Params) -> Tensor:
    """``(N,)`` in float64 on the CPU."""
    return torch.cat([v.detach().reshape(-1).to("cpu", torch.float64) for v in tree.values()])


def shaped(rows: Tensor, like: Params) -> Params:
    """``(..., N)`` as tensors ``(..., *shape)``, in the dtypes and on the devices of ``like``."""
    parts = torch.split(rows, [v.numel() for v in like.values()], dim=-1)
    return {
        k: p.reshape((*rows.shape[:-1], *v.shape)).to(v)
        for (k, v), p in zip(like.items(), parts, strict=True)
    }


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, (size,), generator=generator, device="cpu").double() - 1.0


def _normals(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device="cpu", dtype=torch.float64)
