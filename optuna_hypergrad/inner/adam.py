"""Adam and AdamW, differentiable everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import is_number
from .._errors import RequirementError
from .._typing import Params
from ._base import AbstractStepSolver, Evaluate, InnerState
from ._settings import Setting, check_number, times


@dataclass(frozen=True)
class Adam(AbstractStepSolver):
    """Adam with ``eps`` inside the square root, so that it can be unrolled through a zero gradient.

    ``m <- b1 m + (1-b1) g;  s <- b2 s + (1-b2) g^2;  w <- w - eta m_hat / sqrt(s_hat + eps^2)``. The
    estimates are unbiased by the product of the betas so far (``b^t`` where they do not change).

    Reference: Kingma & Ba (2015), "Adam: a method for stochastic optimization", algorithm 1.

    Args:
        beta1: Of the mean; a number in [0, 1), the name of an outer parameter, or a schedule.
        beta2: Of the mean square, likewise.
    """

    name: ClassVar[str] = "adam"
    settings: ClassVar[tuple[str, ...]] = ("step_size", "weight_decay", "beta1", "beta2")
    beta1: Setting = 0.9
    beta2: Setting = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        label = type(self).__name__
        check_number(f"{label}: beta1", self.beta1, 0.0, 1.0)
        check_number(f"{label}: beta2", self.beta2, 0.0, 1.0)
        if not (is_number(self.eps) and self.eps > 0):
            raise ValueError(f"{label} needs eps > 0, got {self.eps!r:.80}.")

    def init(self, inner_params: Params) -> InnerState:
        device = next(iter(inner_params.values())).device
        one = torch.ones((), dtype=torch.float64, device=device)
        return {
            "mean": _tree.zeros_like(inner_params),
            "square": _tree.zeros_like(inner_params),
            "products": {"beta1": one, "beta2": one.clone()},
        }

    def step(
        self,
        evaluate: Evaluate,
        inner_params: Params,
        outer_params: Params,
        state: InnerState,
        index: int,
    ) -> tuple[Params, InnerState, Tensor, Params]:
        value, gradient = evaluate(inner_params)
        direction = self.adjusted(gradient, inner_params, outer_params, index)
        moments = {"beta1": state["mean"], "beta2": state["square"]}
        products: Params = {}
        for name, new in ("beta1", direction), ("beta2", _tree.tree_map(torch.square, direction)):
            beta = self.setting(name, outer_params, index)
            if isinstance(beta, dict):
                raise RequirementError(
                    f"{name} of Adam must be one number for all inner parameters."
                )
            products[name] = state["products"][name] * beta
            moments[name] = {
                k: (beta * m + (1 - beta) * new[k]).to(m.dtype) for k, m in moments[name].items()
            }
        unbias1, unbias2 = 1 - products["beta1"], 1 - products["beta2"]
        scaled = {
            k: ((m / unbias1) / (moments["beta2"][k] / unbias2 + self.eps**2).sqrt()).to(m.dtype)
            for k, m in moments["beta1"].items()
        }
        eta = self.setting("step_size", outer_params, index)
        moved = _tree.sub(self.decayed(inner_params, outer_params, index), times(scaled, eta))
        memory = {"mean": moments["beta1"], "square": moments["beta2"], "products": products}
        return moved, memory, value, gradient

    def adjusted(
        self, gradient: Params, inner_params: Params, outer_params: Params, index: int
    ) -> Params:
        """What the moments are of."""
        return self.regularized(gradient, inner_params, outer_params, index)

    def decayed(self, inner_params: Params, outer_params: Params, index: int) -> Params:
        """The point from which the step is taken."""
        return inner_params


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: ``w <- (1 - eta weight_decay) w - eta m_hat / sqrt(s_hat + eps^2)``.

    Reference: Loshchilov & Hutter (2019), "Decoupled weight decay regularization", algorithm 2, as in
    ``torch.optim.AdamW``.
    """

    name: ClassVar[str] = "adamw"
    weight_decay: Setting = 1e-2

    def adjusted(
        self, gradient: Params, inner_params: Params, outer_params: Params, index: int
    ) -> Params:
        return self.clipped(gradient)

    def decayed(self, inner_params: Params, outer_params: Params, index: int) -> Params:
        if self.weight_decay == 0.0:
            return inner_params
        decay = times(inner_params, self.setting("weight_decay", outer_params, index))
        return _tree.sub(inner_params, times(decay, self.setting("step_size", outer_params, index)))
