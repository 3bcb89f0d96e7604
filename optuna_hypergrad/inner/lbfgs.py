"""L-BFGS on the full batch, to a tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._typing import Params
from ._base import AbstractMinimizer, InnerObjective, InnerSolution, gradient_of, verdict
from .newton_cg import NewtonCG, default_atol

_ITERATIONS_PER_CHECK = 20


@dataclass(frozen=True)
class LBFGS(AbstractMinimizer):
    """``torch.optim.LBFGS`` with its strong-Wolfe line search; finished by :class:`NewtonCG`
    where that one stalls or runs out of steps.

    For deterministic inner objectives (full batch). Implicit differentiation through it is as exact
    as its tolerance.

    Reference: Liu & Nocedal (1989), "On the limited memory BFGS method for large scale optimization".

    Args:
        max_steps: At most this many L-BFGS iterations.
        rtol: Stop when the gradient norm falls below ``rtol`` times its first value.
        atol: Stop when the gradient norm falls below ``atol``; ``None`` for what the dtype can hold
            (1e-8 in float64, 1e-5 in float32).
        history: Pairs kept.
    """

    name: ClassVar[str] = "lbfgs"
    max_steps: int = 500
    rtol: float = 0.0
    atol: float | None = None
    history: int = 20

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.rtol < 0 or (self.atol or 0) < 0 or self.history < 1:
            raise ValueError("LBFGS needs max_steps, history >= 1 and rtol, atol >= 0.")

    def minimize(
        self, objective: InnerObjective, inner_params: Params, max_steps: int | None
    ) -> InnerSolution:
        dtype = next(iter(inner_params.values())).dtype
        atol = default_atol(dtype) if self.atol is None else self.atol
        run = _Run(objective, inner_params, self.history)
        budget = self.max_steps if max_steps is None else max_steps
        target = max(atol, self.rtol * run.norm) if max_steps is None else 0.0
        while run.norm > target and run.taken < budget and math.isfinite(run.norm):
            wanted = min(_ITERATIONS_PER_CHECK, budget - run.taken)
            if run.iterate(wanted) < wanted:
                break
        if run.norm > target and math.isfinite(run.norm) and max_steps is None:
            polished = NewtonCG(atol=target).minimize(objective, run.w, None)
            return replace(polished, num_steps=run.taken + polished.num_steps)
        return InnerSolution(
            inner_params=_tree.detach(run.w),
            state={},
            num_steps=run.taken,
            value=run.value,
            gradient_norm=run.norm,
            result=verdict(
                self, run.w, run.value, run.norm, run.norm <= target or max_steps is not None
            ),
        )


class _Run:
    def __init__(self, objective: InnerObjective, inner_params: Params, history: int) -> None:
        self.w = {k: v.clone() for k, v in inner_params.items()}
        self.taken = 0
        self._objective = objective
        self._optimizer = torch.optim.LBFGS(
            list(self.w.values()),
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=history,
            line_search_fn="strong_wolfe",
        )
        self._measure()

    def _measure(self) -> None:
        value, gradient = gradient_of(self._objective, self.w, create_graph=False)
        self.value, self.norm = float(value.detach()), float(_tree.norm(gradient))

    def _closure(self) -> Tensor:
        value, gradient = gradient_of(self._objective, self.w, create_graph=False)
        for k, v in self.w.items():
            v.grad = gradient[k]
        return value.detach()

    def iterate(self, num_iterations: int) -> int:
        """Up to so many iterations; fewer where the line search finds no progress."""
        group = self._optimizer.param_groups[0]
        group["max_iter"], group["max_eval"] = num_iterations, 5 * num_iterations
        before = self._count()
        self._optimizer.step(self._closure)  # type: ignore[no-untyped-call]
        made = self._count() - before
        self.taken += made
        self._measure()
        return made

    def _count(self) -> int:
        state = self._optimizer.state[next(iter(self.w.values()))]
        return int(state.get("n_iter", 0))
