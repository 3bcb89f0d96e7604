"""Gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import _tree
from .._typing import Params
from ._base import AbstractStepSolver, Evaluate, InnerState, StepSize, resolve


@dataclass(frozen=True)
class HeavyBall(AbstractStepSolver):
    """``v <- momentum * v + g_w(w);  w <- w - eta v``, as ``torch.optim.SGD`` does.

    Reference: Polyak (1964), "Some methods of speeding up the convergence of iteration methods".

    Args:
        momentum: A number in [0, 1), the name of an outer parameter, or
            ``(outer_params, step) -> tensor``.
    """

    name: ClassVar[str] = "heavy_ball"
    momentum: StepSize = 0.9

    def hyperparameters(self) -> frozenset[str]:
        own = {self.momentum} if isinstance(self.momentum, str) else set()
        return super().hyperparameters() | own

    def init(self, inner_params: Params) -> InnerState:
        return {"velocity": _tree.zeros_like(inner_params)}

    def step(
        self,
        evaluate: Evaluate,
        inner_params: Params,
        outer_params: Params,
        state: InnerState,
        index: int,
    ) -> tuple[Params, InnerState, Tensor, Params]:
        eta = resolve(self.step_size, outer_params, index)
        beta = resolve(self.momentum, outer_params, index)
        value, gradient = evaluate(inner_params)
        velocity = {k: beta * v + gradient[k] for k, v in state["velocity"].items()}
        moved = {k: w - eta * velocity[k] for k, w in inner_params.items()}
        return moved, {"velocity": velocity}, value, gradient
