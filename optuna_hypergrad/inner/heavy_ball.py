"""Gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import _tree
from .._typing import Params
from ._base import AbstractStepSolver, Evaluate, InnerState
from ._settings import Setting, check_number, less, times


@dataclass(frozen=True)
class HeavyBall(AbstractStepSolver):
    """``v <- momentum * v + g_w(w);  w <- w - eta v``, as ``torch.optim.SGD`` does.

    Reference: Polyak (1964), "Some methods of speeding up the convergence of iteration methods";
    ``nesterov``: Nesterov (1983), in the form of Sutskever et al. (2013).

    Args:
        momentum: A number in [0, 1), the name of an outer parameter, or
            ``(outer_params, step) -> tensor``.
        nesterov: Step along ``g_w + momentum * v`` instead of ``v``.
    """

    name: ClassVar[str] = "heavy_ball"
    settings: ClassVar[tuple[str, ...]] = ("step_size", "weight_decay", "momentum")
    momentum: Setting = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("HeavyBall: momentum", self.momentum, 0.0, 1.0)

    def depends_on_index(self, outer_params: Params) -> bool:
        return type(self) is not HeavyBall or self.has_entry_for_each_step(outer_params)

    def is_linear(self) -> bool:
        return type(self) is HeavyBall and self.has_constant_settings()

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
        momentum = self.setting("momentum", outer_params, index)
        value, gradient = evaluate(inner_params)
        direction = self.regularized(gradient, inner_params, outer_params, index)
        velocity = _tree.add(times(state["velocity"], momentum), direction)
        if self.nesterov:
            direction = _tree.add(direction, times(velocity, momentum))
        else:
            direction = velocity
        eta = self.setting("step_size", outer_params, index)
        return (
            less(inner_params, direction, eta),
            {"velocity": velocity},
            value,
            gradient,
        )
