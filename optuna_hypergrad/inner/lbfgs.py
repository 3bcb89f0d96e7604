"""L-BFGS on the full batch, to a tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._typing import Params
from ..ihvp import CG, linear_solve
from ..operators import HessianOperator, InnerGraph
from ._base import AbstractMinimizer, InnerObjective, InnerSolution, gradient_of, verdict

_ITERATIONS_PER_CHECK = 20
_NEWTON = CG(max_steps=200, rtol=1e-6)


@dataclass(frozen=True)
class LBFGS(AbstractMinimizer):
    """``torch.optim.LBFGS`` with its strong-Wolfe line search; Newton steps by CG where that one ends.

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
    max_steps: int = 1000
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
        atol = (1e-8 if dtype == torch.float64 else 1e-5) if self.atol is None else self.atol
        run = _Run(objective, inner_params, self.history)
        budget = self.max_steps if max_steps is None else max_steps
        target = max(atol, self.rtol * run.norm) if max_steps is None else 0.0
        while run.norm > target and run.taken < budget and math.isfinite(run.norm):
            wanted = min(_ITERATIONS_PER_CHECK, budget - run.taken)
            if run.iterate(wanted) < wanted:
                run.polish(target, budget)
                break
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
        value, self._gradient = gradient_of(self._objective, self.w, create_graph=False)
        self.value, self.norm = float(value.detach()), float(_tree.norm(self._gradient))

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

    def polish(self, target: float, budget: int) -> None:
        """Newton steps by CG, judged by the gradient.

        Near the solution the objective's differences drown in rounding, and with them the line
        search and the curvature pairs; products with the Hessian still tell.
        """
        while self.norm > target and self.taken < budget:
            graph = InnerGraph(lambda w, _, __: self._objective(w), self.w, {}, None)
            gradient = graph.layout.flatten(list(self._gradient.values()))
            step = linear_solve(_NEWTON, HessianOperator(graph), gradient, throw=False)
            if not step.result:
                return
            best, norm, value = _tree.clone(self.w), self.norm, self.value
            for v, d in zip(self.w.values(), graph.layout.split(step.x), strict=True):
                v.sub_(d)
            self.taken += 1
            self._measure()
            if not self.norm < norm:
                for k, v in self.w.items():
                    v.copy_(best[k])
                self.norm, self.value = norm, value
                return

    def _count(self) -> int:
        state = self._optimizer.state[next(iter(self.w.values()))]
        return int(state.get("n_iter", 0))
