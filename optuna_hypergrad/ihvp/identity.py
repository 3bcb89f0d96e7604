"""Identity in place of the inverse Hessian (T1-T2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..operators import AbstractLinearOperator
from ._base import AbstractLinearSolver, LinearSolution


@dataclass(frozen=True)
class Identity(AbstractLinearSolver):
    """``H^-1 ~ scale * I``: no products, a bias that only its sign survives.

    Reference: Luketina, Berglund, Greff & Raiko (2016), "Scalable gradient-based tuning of continuous
    regularization hyperparameters" (T1-T2).

    Args:
        scale: Stands for the inverse of a typical eigenvalue; the inner step size is the usual choice.
    """

    name: ClassVar[str] = "identity"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"Identity needs a positive finite scale, got {self.scale}.")

    def compute(
        self, operator: AbstractLinearOperator, vector: Tensor, x0: Tensor | None
    ) -> LinearSolution:
        return LinearSolution(vector * self.scale, math.nan)
