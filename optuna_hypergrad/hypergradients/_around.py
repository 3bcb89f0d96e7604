"""The hyperparameters around a point, and what the inner objective sees of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._typing import Params
from ..operators import scalar
from ..problem import BilevelProblem


@dataclass(frozen=True)
class Around:
    """Coordinates around ``lam``: displacements, of the logarithm where ``log`` says so. Flat, ``(N,)``."""

    outer_params: Params
    log: tuple[str, ...]

    @property
    def size(self) -> int:
        return _tree.num_entries(self.outer_params)

    def zeros(self) -> Tensor:
        widest = max(
            (v.dtype for v in self.outer_params.values()), key=lambda d: torch.finfo(d).bits
        )
        return next(iter(self.outer_params.values())).new_zeros(self.size, dtype=widest)

    def drawn(self, *key: int) -> Tensor:
        """Standard normal; a function of its arguments alone."""
        mixed = np.random.SeedSequence(key).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]) >> 1)
        return torch.randn(self.size, generator=generator, device="cpu", dtype=torch.float64).to(
            self.zeros()
        )

    def position(self) -> Tensor:
        """Of ``lam`` itself."""
        lam = _tree.detach(self.outer_params)
        parts = (v.log() if k in self.log else v for k, v in lam.items())
        return torch.cat([p.reshape(-1).to(self.zeros()) for p in parts])

    def moved(self, delta: Tensor) -> Params:
        """``lam`` at a displacement."""
        there = {}
        for (k, v), part in self._parts(delta):
            there[k] = v.detach() * part.exp() if k in self.log else v.detach() + part
        return there

    def pulled(self, slope: Tensor) -> Params:
        """A gradient with respect to the displacement as one with respect to ``lam``."""
        return {
            k: part / v.detach() if k in self.log else part for (k, v), part in self._parts(slope)
        }

    def _parts(self, flat: Tensor) -> list[tuple[tuple[str, Tensor], Tensor]]:
        named = list(self.outer_params.items())
        parts = torch.split(flat, [v.numel() for _, v in named])
        return [
            ((k, v), part.reshape(v.shape).to(v.dtype))
            for (k, v), part in zip(named, parts, strict=True)
        ]


def names_seen(
    problem: BilevelProblem, inner_params: Params, outer_params: Params, index: int
) -> frozenset[str]:
    """Hyperparameters that the inner objective depends on, by its graph."""
    lam = _tree.leaves(outer_params)
    with torch.enable_grad():
        batch = problem.inner_batch(index)
        value = problem.inner_objective(_tree.detach(inner_params), dict(lam), batch)
        value = scalar(value, "inner_objective")
        if not value.requires_grad:
            return frozenset()
        gradients = torch.autograd.grad(value, tuple(lam.values()), allow_unused=True)
    return frozenset(k for k, g in zip(lam, gradients, strict=True) if g is not None)
