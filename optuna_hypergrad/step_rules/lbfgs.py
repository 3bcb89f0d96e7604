"""Limited-memory BFGS in a box, with the safeguards of the default rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .._typing import Params
from ._abstract import AbstractStepRule, Bounds, Proposal, StepState
from .trust_region import TrustRegion


@dataclass(frozen=True)
class LBFGS(AbstractStepRule):
    """L-BFGS with a scalar initial matrix (Liu & Nocedal 1989), minimized in bounds and a cube.

    Best for smooth losses whose hyperparameters matter about equally; where many hardly matter
    at the start (a decay per weight), the default rule is faster.

    Args:
        radius: Half the side of the first cube, in internal units.
        history: Secant pairs; fewer above 57,000 entries, one above 400,000.
        patience: Evaluations without a better value that end the trajectory.
    """

    name: ClassVar[str] = "lbfgs"

    radius: float = 1.0
    history: int = 7
    patience: int = 30

    @property
    def _rule(self) -> TrustRegion:
        return TrustRegion(0.0, self.radius, self.history, patience=self.patience)

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
