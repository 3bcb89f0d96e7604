"""Adam, differentiable everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import _tree
from .._typing import Params
from ._base import AbstractStepSolver, Evaluate, InnerState, resolve


@dataclass(frozen=True)
class Adam(AbstractStepSolver):
    """Adam with ``eps`` inside the square root, so that it can be unrolled through a zero gradient.

    ``m <- b1 m + (1-b1) g;  s <- b2 s + (1-b2) g^2;  w <- w - eta m_hat / sqrt(s_hat + eps^2)``.

    Reference: Kingma & Ba (2015), "Adam: a method for stochastic optimization", algorithm 1.
    """

    name: ClassVar[str] = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise ValueError("Adam needs 0 <= beta1, beta2 < 1 and eps > 0.")

    def init(self, inner_params: Params) -> InnerState:
        some = next(iter(inner_params.values()))
        return {
            "mean": _tree.zeros_like(inner_params),
            "square": _tree.zeros_like(inner_params),
            "count": {"count": some.new_zeros(())},
        }

    def step(
        self,
        evaluate: Evaluate,
        inner_params: Params,
        outer_params: Params,
        state: InnerState,
        index: int,
    ) -> tuple[Params, InnerState, Tensor, Params]:
        eta = resolve(self.step_size, outer_params, index)
        value, gradient = evaluate(inner_params)
        count = state["count"]["count"] + 1
        mean = {
            k: self.beta1 * m + (1 - self.beta1) * gradient[k] for k, m in state["mean"].items()
        }
        square = {
            k: self.beta2 * s + (1 - self.beta2) * gradient[k] ** 2
            for k, s in state["square"].items()
        }
        unbias1, unbias2 = 1 - self.beta1**count, 1 - self.beta2**count
        moved = {
            k: w - eta * (mean[k] / unbias1) / (square[k] / unbias2 + self.eps**2).sqrt()
            for k, w in inner_params.items()
        }
        memory = {"mean": mean, "square": square, "count": {"count": count}}
        return moved, memory, value, gradient
