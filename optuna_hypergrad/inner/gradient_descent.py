"""Gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._typing import Params
from ._base import AbstractStepSolver, Evaluate, InnerState
from ._settings import less


@dataclass(frozen=True)
class GradientDescent(AbstractStepSolver):
    """``w <- w - eta g_w(w)`` (stochastic where ``inner_batch`` gives minibatches).

    Reference: Cauchy (1847); unrolled by Domke (2012), "Generic methods for optimization-based
    modeling".
    """

    name: ClassVar[str] = "gradient_descent"

    def depends_on_index(self, outer_params: Params) -> bool:
        return type(self) is not GradientDescent or self.has_entry_for_each_step(outer_params)

    def is_linear(self) -> bool:
        return type(self) is GradientDescent and self.has_constant_settings()

    def init(self, inner_params: Params) -> InnerState:
        return {}

    def step(
        self,
        evaluate: Evaluate,
        inner_params: Params,
        outer_params: Params,
        state: InnerState,
        index: int,
    ) -> tuple[Params, InnerState, Tensor, Params]:
        value, gradient = evaluate(inner_params)
        direction = self.regularized(gradient, inner_params, outer_params, index)
        moved = less(inner_params, direction, self.setting("step_size", outer_params, index))
        return moved, state, value, gradient
