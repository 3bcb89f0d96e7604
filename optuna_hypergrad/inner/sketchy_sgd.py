"""Stochastic gradient descent, preconditioned by a sketch of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._arguments import check_count, is_number
from .._errors import SolverError
from .._nystrom import nystrom
from .._results import Result, Status
from .._typing import Params
from ..curvature import largest_eigenvalue
from ..operators import AbstractLinearOperator, Flattener, HessianOperator, InnerGraph
from ._base import AbstractCurvatureSolver, InnerObjective, InnerState, gradient_of

_PROBES = 10


@dataclass(frozen=True)
class SketchySGD(AbstractCurvatureSolver):
    """``w <- w - eta P^-1 g_w(w)`` on minibatches; ``P = U L U^T + rho I`` sketches the Hessian, ``eta`` is found.

    Every ``refresh_every`` steps, ``rank`` products on the batch at hand renew ``P`` (a randomized Nystrom
    approximation), and 10 products on the batch after it find ``eta = relative_step / lambda_max(P^-1/2 H
    P^-1/2)``. No learning rate is to be tuned. For convex objectives; where one is not, negative curvature
    counts as none. Cost: a gradient a step, and about ``2 rank + 22`` more at each refresh; memory: ``rank`` vectors
    and, for a refresh, the graph of one batch. At a fixed ``relative_step`` the iterates end in a ball around the
    solution whose radius the batches' noise sets: let it fall, or use large batches, for implicit differentiation at
    its end. It cannot be unrolled.

    Reference: Frangella, Rathore, Zhao & Udell (2024), "SketchySGD: reliable stochastic optimization via randomized
    curvature estimates".

    Args:
        max_steps: At most this many steps; exactly this many where ``rtol = atol = 0``.
        rtol: Stop when the gradient norm on a batch falls below ``rtol`` times its first value.
        atol: Stop when the gradient norm on a batch falls below ``atol``.
        rank: ``r``, of the sketch.
        damping: The least ``rho``, in units of the Hessian. Where the smallest eigenvalue of the sketch is larger, that
            is ``rho`` (the paper has ``damping``): what lies outside of the sketch may curve as much, and less damping
            would only slow down what lies inside.
        relative_step: In (0, 2), in units of ``1 / lambda_max``: from 2 on, descent diverges. A number, or a function
            of the step, which may let it fall.
        refresh_every: Steps from one sketch to the next; an epoch is usual.
        seed: Of the sketches.
    """

    name: ClassVar[str] = "sketchy_sgd"
    rank: int = 10
    damping: float = 1e-3
    relative_step: float | Callable[[int], float] = 0.5
    refresh_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rank", 1), ("refresh_every", 1), ("seed", 0)):
            check_count("SketchySGD", name, getattr(self, name), least)
        if not (is_number(self.damping) and 0 < self.damping < math.inf):
            raise ValueError(
                f"SketchySGD needs damping > 0, got {self.damping!r:.80}: without it, directions outside of the "
                f"sketch would have no bound."
            )
        if not callable(self.relative_step):
            self._check_step(self.relative_step)

    def init(self, inner_params: Params) -> InnerState:
        layout = Flattener(inner_params)
        zeros = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
        rank = min(self.rank, layout.size)
        return {
            "basis": {"columns": zeros[:, None].repeat(1, rank)},
            "spectrum": {"eigenvalues": zeros[:rank].clone()},
            "numbers": {
                "largest": torch.zeros((), dtype=torch.float64, device="cpu"),
                "age": torch.zeros((), dtype=torch.int64, device="cpu"),
            },
        }

    def take(
        self,
        objective_at: Callable[[int], InnerObjective],
        inner_params: Params,
        state: InnerState,
        index: int,
    ) -> tuple[Params, InnerState, Tensor, Params]:
        objective, layout = objective_at(index), Flattener(inner_params)
        age = int(state["numbers"]["age"])
        if age == 0:
            state = self._renewed(objective, objective_at(index + 1), inner_params, index)
        sketch = self._sketch(state)
        value, gradient = gradient_of(objective, inner_params, create_graph=False)
        direction = sketch.power(layout.flatten(list(gradient.values())), -1.0)
        relative = self.relative_step(index) if callable(self.relative_step) else self.relative_step
        self._check_step(relative)
        step = layout.unflatten(direction * (-relative / float(state["numbers"]["largest"])))
        numbers = {
            **state["numbers"],
            "age": torch.tensor((age + 1) % self.refresh_every, device="cpu"),
        }
        return _tree.add(inner_params, step), {**state, "numbers": numbers}, value, gradient

    def _renewed(
        self, objective: InnerObjective, other: InnerObjective, inner_params: Params, index: int
    ) -> InnerState:
        mixed = np.random.SeedSequence((self.seed, index)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]) >> 1)
        basis, eigenvalues = nystrom(_hessian(objective, inner_params), self.rank, generator)
        sketch = _Sketch.above(basis, eigenvalues, self.damping)
        operator = _Preconditioned(_hessian(other, inner_params), sketch)
        top = largest_eigenvalue(operator, eigenvalues, _PROBES, int(mixed[0]) >> 1)
        if top <= 0:
            message = (
                f"SketchySGD found no direction in which inner batch {index + 1} curves upwards (largest eigenvalue, "
                f"preconditioned: {top:.1e}), so that no step size fits. Start elsewhere, or use Adam."
            )
            raise SolverError(message, Result(Status.NEGATIVE_CURVATURE, message))
        return {
            "basis": {"columns": basis},
            "spectrum": {"eigenvalues": eigenvalues},
            "numbers": {"largest": torch.tensor(top, dtype=torch.float64, device="cpu")},
        }

    def _check_step(self, relative: object) -> None:
        if not (is_number(relative) and 0 < relative < 2):  # type: ignore[operator]
            raise ValueError(
                f"SketchySGD needs 0 < relative_step < 2 (at 2 descent diverges), got {relative!r:.80}."
            )

    def _sketch(self, state: InnerState) -> _Sketch:
        columns, eigenvalues = state["basis"]["columns"], state["spectrum"]["eigenvalues"]
        return _Sketch.above(columns, eigenvalues, self.damping)


@dataclass(frozen=True)
class _Sketch:
    """``P = U L U^T + rho I``."""

    basis: Tensor
    eigenvalues: Tensor
    damping: float

    @classmethod
    def above(cls, basis: Tensor, eigenvalues: Tensor, least: float) -> _Sketch:
        """Damped by the smallest eigenvalue of the sketch, which what is outside of it may have, too."""
        return cls(basis, eigenvalues, max(least, float(eigenvalues[-1])))

    def power(self, vector: Tensor, exponent: float) -> Tensor:
        """``P^exponent v``: ``(P,) -> (P,)``."""
        rest = self.damping**exponent
        factors = (self.eigenvalues + self.damping) ** exponent - rest
        return torch.addmv(vector * rest, self.basis, factors * (self.basis.mT @ vector))


class _Preconditioned(AbstractLinearOperator):
    """``P^-1/2 H P^-1/2``."""

    def __init__(self, base: AbstractLinearOperator, sketch: _Sketch) -> None:
        self.base, self.sketch = base, sketch
        self.size, self.dtype, self.device = base.size, base.dtype, base.device

    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor:
        return self.sketch.power(self.base(self.sketch.power(vector, -0.5)), -0.5)


def _hessian(objective: InnerObjective, inner_params: Params) -> HessianOperator:
    return HessianOperator(InnerGraph(lambda w, _, __: objective(w), inner_params, {}, None))
