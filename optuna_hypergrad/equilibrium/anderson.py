"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .._arguments import check_count
from .._errors import RequirementError
from .._typing import Params
from ._base import AbstractFixedPointSolver


@dataclass
class History:
    """The last point and its residual ``F(z) - z``, and what changed from step to step before it.

    Attributes:
        moves: Of the points, ``(samples, memory, entries)``, written round and round.
        changes: Of the residuals, likewise.
        count: Points seen.
    """

    point: Tensor
    residual: Tensor
    moves: Tensor
    changes: Tensor
    count: int = 1


@dataclass(frozen=True)
class Anderson(AbstractFixedPointSolver):
    """The step of :class:`Picard` from the combination of the last points at which the residual would be smallest.

    On a linear map it is GMRES, but for rounding and the limited memory: it converges where plain iteration does not.
    The least squares problem is solved in differences, each scaled to length 1, with a ridge of a few rounding errors.

    References: Anderson (1965), "Iterative procedures for nonlinear integral equations"; Walker & Ni (2011), "Anderson
    acceleration for fixed-point iterations", theorem 2.2 (GMRES); Bai, Kolter & Koltun (2019), "Deep equilibrium models".

    Args:
        memory: How many earlier points are combined; they and their residuals are held.
        per_sample: Whether the first dimension of all tensors counts samples, each of which then gets coefficients of its
            own: for maps that treat samples independently.
    """

    name: ClassVar[str] = "anderson"

    memory: int = field(default=5, kw_only=True)
    per_sample: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Anderson", "memory", self.memory, 1)

    def num_samples(self, like: Params) -> int:
        if not self.per_sample:
            return 1
        lengths = {v.shape[0] if v.dim() else 0 for v in like.values()}
        if len(lengths) != 1 or 0 in lengths:
            shapes = [tuple(v.shape) for v in like.values()]
            raise RequirementError(
                f"Anderson(per_sample=True) needs a first dimension that counts the samples, the same in all tensors of "
                f"the fixed point; their shapes are {shapes}. Use per_sample=False."
            )
        return lengths.pop()

    def init(self) -> None:
        return None

    def step(self, point: Tensor, image: Tensor, memory: History | None) -> tuple[Tensor, History]:
        residual = image - point
        moved = torch.add(point, residual, alpha=self.relaxation)
        if memory is None:
            shape = point.shape[0], self.memory, point.shape[1]
            return moved, History(point, residual, point.new_empty(shape), point.new_empty(shape))
        at = (memory.count - 1) % self.memory
        torch.sub(point, memory.point, out=memory.moves[:, at])
        torch.sub(residual, memory.residual, out=memory.changes[:, at])
        kept = min(memory.count, self.memory)
        moves, changes = memory.moves[:, :kept], memory.changes[:, :kept]
        gamma = _least_squares(changes, residual)
        moved.unsqueeze_(1).baddbmm_(gamma, moves, alpha=-1)
        moved.baddbmm_(gamma, changes, alpha=-self.relaxation).squeeze_(1)
        memory.point, memory.residual, memory.count = point, residual, memory.count + 1
        return moved, memory


def _least_squares(changes: Tensor, residual: Tensor) -> Tensor:
    """``argmin over gamma of |residual - gamma changes|`` for each sample: ``(samples, 1, memory)``."""
    gram = torch.bmm(changes, changes.mT)
    right = torch.bmm(changes, residual[:, :, None])
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()[:, :, None]  # (samples, memory, 1)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    ridge = 10 * torch.finfo(gram.dtype).eps
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    scaled = gram / lengths / lengths.mT + ridge * eye
    gamma: Tensor = torch.linalg.solve(scaled, right / lengths) / lengths
    return gamma.mT
