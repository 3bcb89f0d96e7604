"""What a rule works on during one step: state and evaluation as flat vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._typing import Params
from ._abstract import Proposal, StepState
from ._box import Layout, Vector
from ._trees import usable

_ROUGH = ("size", "steps", "changes")
"""What only shapes the model, and is stored in bfloat16 above 65,536 entries."""


@dataclass
class Work:
    """One evaluation and the state, unpacked; lives for one call.

    ``tensors["point"]``, ``tensors["gradient"]`` and ``numbers["value"]`` are the last evaluation
    that was kept; ``slope`` is ``None`` for an evaluation that gave nothing finite.
    """

    layout: Layout
    numbers: dict[str, float]
    tensors: dict[str, Vector]
    point: Vector
    value: float
    slope: Vector | None
    low: Vector
    high: Vector
    stop: str | None = None

    @classmethod
    def of(
        cls, state: StepState, layout: Layout, point: Params, value: float, gradient: Params
    ) -> Work:
        numbers = {k: v for k, v in state.numbers.items() if not isinstance(v, str)}
        return cls(
            layout,
            numbers,
            {k: layout.own(v) for k, v in state.tensors.items()},
            layout.flat(point),
            value,
            layout.flat(gradient) if usable(value, point, gradient) else None,
            *layout.bounds(),
        )

    def begin(self) -> None:
        """Keep the first evaluation."""
        self.numbers |= {"first": self.value, "best": self.value, "since_best": 0, "suspicious": 0}
        self.keep()

    def keep(self) -> None:
        """Make this evaluation the one that the next steps start from."""
        assert self.slope is not None
        self.numbers["value"] = self.value
        self.tensors |= {"point": self.point, "gradient": self.slope}

    def count(self) -> None:
        """Count evaluations since the best value."""
        n = self.numbers
        n["since_best"] += 1
        if self.slope is not None and self.value < n["best"]:
            n["best"], n["since_best"] = self.value, 0

    def progress(self) -> float:
        """How much better the best value is than the first."""
        return self.numbers["first"] - self.numbers["best"]

    def proposal(self, ahead: Vector) -> Proposal:
        tensors = {
            k: v if isinstance(v, Tensor) else torch.from_numpy(v) for k, v in self.tensors.items()
        }
        if self.layout.large:
            tensors |= {k: v.bfloat16() for k, v in tensors.items() if k in _ROUGH}
        return Proposal(self.layout.tree(ahead), StepState(tensors, {**self.numbers}), self.stop)
