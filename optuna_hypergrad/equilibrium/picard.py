"""Plain iteration, relaxed if asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._base import AbstractFixedPointSolver


@dataclass(frozen=True)
class Picard(AbstractFixedPointSolver):
    """``z <- tau F(z) + (1 - tau) z``.

    Converges where the eigenvalues of ``tau J + (1 - tau) I`` at the fixed point lie in the unit circle, and contracts
    by the largest of them. As ``backward=`` of :func:`fixed_point` it is the Neumann series, to a tolerance.

    References: Picard (1890); Mann (1953), "Mean value methods in iteration".
    """

    name: ClassVar[str] = "picard"

    def init(self) -> None:
        return None

    def step(self, point: Tensor, image: Tensor, memory: None) -> tuple[Tensor, None]:
        return torch.lerp(point, image, self.relaxation), None
