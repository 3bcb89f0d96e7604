"""Adam with the step lengths that suit internal coordinates."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from .._typing import Params
from ._abstract import AbstractStepRule, Bounds, Proposal, StepState
from .torch_optimizer import TorchOptimizer


@dataclass(frozen=True)
class Adam(AbstractStepRule):
    """Adam (Kingma & Ba 2015), projected on the bounds; see :class:`TorchOptimizer`.

    Args:
        lr: Step length, in internal units.
        beta1: Decay of the average gradient.
        beta2: Decay of the average squared gradient.
        patience: Evaluations without a better value that end the trajectory.
    """

    name: ClassVar[str] = "adam"

    lr: float = 0.5
    beta1: float = 0.7
    beta2: float = 0.99
    patience: int = 30

    @property
    def _rule(self) -> TorchOptimizer:
        factory = functools.partial(
            torch.optim.Adam, lr=self.lr, betas=(self.beta1, self.beta2), eps=1e-30
        )
        return TorchOptimizer(factory, patience=self.patience)

    def init(self, point: Params, lower: Bounds, upper: Bounds) -> StepState:
        return self._rule.init(point, lower, upper)

    def step(
        self,
        state: StepState,
        point: Params,
        value: float,
        gradient: Params,
        lower: Bounds,
        upper: Bounds,
    ) -> Proposal:
        return self._rule.step(state, point, value, gradient, lower, upper)
