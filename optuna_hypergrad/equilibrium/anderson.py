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

History = tuple[list[Tensor], list[Tensor]]
"""Points and their residuals ``F(z) - z``, oldest first."""


@dataclass(frozen=True)
class Anderson(AbstractFixedPointSolver):
    """The step of :class:`Picard` from the combination of the last points at which the residual would be smallest.

    On a linear map it is GMRES, but for rounding and the limited memory: it converges where plain iteration does not.
    The least squares problem is solved in differences, each scaled to length 1, with a ridge of a few rounding errors.

    References: Anderson (1965), "Iterative procedures for nonlinear integral equations"; Walker & Ni (2011), "Anderson
    acceleration for fixed-point iterations", equation 2.2; Bai, Kolter & Koltun (2019), "Deep equilibrium models".

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

    def init(self) -> History:
        return [], []

    def step(self, point: Tensor, image: Tensor, memory: History) -> tuple[Tensor, History]:
        residual = image - point
        points, residuals = [*memory[0], point], [*memory[1], residual]
        points, residuals = points[-self.memory - 1 :], residuals[-self.memory - 1 :]
        moved = torch.add(point, residual, alpha=self.relaxation)
        if len(points) > 1:
            past = torch.stack(points, dim=2).diff(dim=2)  # (samples, entries, memory)
            changes = torch.stack(residuals, dim=2).diff(dim=2)
            gamma = _least_squares(changes, residual)
            way = torch.add(past, changes, alpha=self.relaxation)
            moved = moved - torch.bmm(way, gamma[:, :, None])[:, :, 0]
        return moved, (points, residuals)


def _least_squares(changes: Tensor, residual: Tensor) -> Tensor:
    """``argmin over gamma of |residual - changes gamma|`` for each sample: ``(samples, memory)``."""
    lengths = changes.norm(dim=1)  # (samples, memory)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    unit = changes / lengths[:, None, :]
    gram = torch.bmm(unit.mT, unit)
    right = torch.bmm(unit.mT, residual[:, :, None])
    ridge = 10 * torch.finfo(gram.dtype).eps
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    gamma: Tensor = torch.linalg.solve(gram + ridge * eye, right)[:, :, 0]
    return gamma / lengths
