"""Truncated Newton on the full batch, to a tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._results import SUCCESS, Result, Status
from .._typing import Params
from ..curvature import ritz_values
from ..dense import cholesky
from ..operators import Flattener, HessianOperator, InnerGraph
from ._base import AbstractMinimizer, InnerObjective, InnerSolution, gradient_of, verdict

_LONG_SOLVE = 100
_NUM_PROBES = 8
_FACTORIZED = 2048
_ARMIJO = 1e-4
_MAX_HALVINGS = 30
_IDLE_STEPS = 3
Preconditioner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NewtonCG(AbstractMinimizer):
    """Newton steps by conjugate gradients, with a backtracking line search.

    For deterministic inner objectives (full batch), twice differentiable. It needs no step size, and
    keeps converging where decays of very different sizes stall first-order methods: a linear solve
    that takes long (100 products; ``P // 4`` if that is more and ``P`` at most 2,048) is given a
    preconditioner, which later ones keep: the factorized Hessian for up to 2,048 parameters (``P``
    products, done together), else a diagonal that 8 random products estimate. Negative curvature ends
    a linear solve with the descent direction found so far.

    Reference: Nocedal & Wright (2006), "Numerical optimization", algorithm 7.1; diagonal: Bekas,
    Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix".

    Args:
        max_steps: At most this many Newton steps.
        rtol: Stop when the gradient norm falls below ``rtol`` times its first value.
        atol: Stop when the gradient norm falls below ``atol``; ``None`` for 1e-8 in float64, 1e-5 in
            float32. A step too small for the dtype to resolve also counts as converged, and so do three
            steps that promise less than the value's rounding and do not halve the gradient.
        max_products: At most this many products in one linear solve.
    """

    name: ClassVar[str] = "newton_cg"
    max_steps: int = 100
    rtol: float = 0.0
    atol: float | None = None
    max_products: int = 2000

    def __post_init__(self) -> None:
        tolerances = (self.rtol, 0.0 if self.atol is None else self.atol)
        if self.max_steps < 1 or self.max_products < 1 or not all(t >= 0 for t in tolerances):
            raise ValueError("NewtonCG needs max_steps, max_products >= 1 and rtol, atol >= 0.")

    def minimize(
        self, objective: InnerObjective, inner_params: Params, max_steps: int | None
    ) -> InnerSolution:
        layout = Flattener(inner_params)
        atol = default_atol(layout.dtype) if self.atol is None else self.atol
        budget = self.max_steps if max_steps is None else max_steps
        w, taken, idle, resolved = inner_params, 0, 0, False
        eps = float(torch.finfo(layout.dtype).eps)
        precondition: Preconditioner | None = None
        settled = False
        value, gradient = _measure(objective, w, layout)
        norm = float(torch.linalg.vector_norm(gradient))
        target = max(atol, self.rtol * norm) if max_steps is None else 0.0
        while norm > target and taken < budget and math.isfinite(norm):
            graph = InnerGraph(lambda w, _, __: objective(w), w, {}, None)
            rtol = min(0.1, norm**0.5)
            patience = self.max_products if settled else _patience(layout.size, self.max_products)
            step, products = _descent(graph, gradient, precondition, rtol, patience)
            if products >= patience and not settled:
                precondition, settled = _preconditioner(graph)
                step, _ = _descent(graph, gradient, precondition, rtol, self.max_products)
            del graph
            moved = _line_search(objective, layout, w, step, value, gradient, norm)
            size = float(torch.linalg.vector_norm(step))
            unseen = 0.5 * float(torch.dot(gradient, step)) <= 100 * eps * abs(value)
            if moved is None:
                reach = float(torch.linalg.vector_norm(layout.flatten(list(w.values()))))
                resolved = unseen or size <= eps ** (2 / 3) * (1 + reach)
                break
            (w, value, gradient), before = moved, norm
            norm = float(torch.linalg.vector_norm(gradient))
            taken += 1
            idle = idle + 1 if unseen and norm > 0.5 * before else 0
            if idle == _IDLE_STEPS and max_steps is None:
                resolved = True
                break
        converged = norm <= target or resolved or max_steps is not None
        result = verdict(self, w, value, norm, converged)
        if result and not taken and max_steps is None:
            result = _judge_start(objective, w, norm)
        return InnerSolution(
            inner_params=_tree.detach(w),
            state={},
            num_steps=taken,
            value=value,
            gradient_norm=norm,
            result=result,
        )


def _judge_start(objective: InnerObjective, w: Params, norm: float) -> Result:
    """A start with a zero gradient is a solution only where nothing curves downwards."""
    operator = HessianOperator(InnerGraph(lambda w, _, __: objective(w), w, {}, None))
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    values, _ = ritz_values(operator, like, _NUM_PROBES)
    least, largest = float(values[0]), float(values.abs().max())
    if not least < -1e-4 * largest:
        return SUCCESS
    return Result(
        Status.NEGATIVE_CURVATURE,
        f"NewtonCG: the gradient at the start is zero (norm {norm:.1e}), and the inner objective curves "
        f"downwards there ({least:.1e}): a saddle or a maximum, no solution. Start elsewhere, for a network "
        f"from small random weights instead of zeros.",
    )


def default_atol(dtype: torch.dtype) -> float:
    """The gradient norm at which a minimizer stops by default."""
    return 1e-8 if dtype == torch.float64 else 1e-5


def _measure(objective: InnerObjective, w: Params, layout: Flattener) -> tuple[float, Tensor]:
    value, gradient = gradient_of(objective, w, create_graph=False)
    return float(value.detach()), layout.flatten(list(gradient.values()))


def _descent(
    graph: InnerGraph,
    gradient: Tensor,
    precondition: Preconditioner | None,
    rtol: float,
    max_products: int,
) -> tuple[Tensor, int]:
    """``d ~ H^-1 g`` by (preconditioned) CG, and the products spent."""
    x, r = torch.zeros_like(gradient), gradient.clone()
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rz = float(torch.dot(r, z))
    stop = rtol * float(torch.linalg.vector_norm(gradient))
    for count in range(1, max_products + 1):
        hp = graph.hvp(p)
        curvature = float(torch.dot(p, hp))
        if not curvature > 0:
            return (p if count == 1 else x), count
        alpha = rz / curvature
        x.add_(p, alpha=alpha)
        r.sub_(hp, alpha=alpha)
        if float(torch.linalg.vector_norm(r)) <= stop:
            return x, count
        z = r if precondition is None else precondition(r)
        rz, before = float(torch.dot(r, z)), rz
        p.mul_(rz / before).add_(z)
    return x, max_products


def _patience(size: int, max_products: int) -> int:
    """Products after which a linear solve is given a (new) preconditioner."""
    return min(max(_LONG_SOLVE, size // 4 if size <= _FACTORIZED else 0), max_products)


def _preconditioner(graph: InnerGraph) -> tuple[Preconditioner, bool]:
    """The factorized Hessian where there is one, else a diagonal; and whether that is for good."""
    size = graph.layout.size
    found = cholesky(HessianOperator(graph), size) if size <= _FACTORIZED else None
    if found is not None:
        factor = found[1]
        return lambda r: torch.cholesky_solve(r.to(factor)[:, None], factor)[:, 0].to(r), False
    diagonal = _estimated_diagonal(graph)
    return lambda r: r / diagonal, True


def _estimated_diagonal(graph: InnerGraph) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    layout = graph.layout
    total = torch.zeros(layout.size, dtype=layout.dtype, device=layout.device)
    for _ in range(_NUM_PROBES):
        signs = (
            torch.randint(0, 2, (layout.size,), generator=generator, device="cpu").to(total) * 2 - 1
        )
        total += signs * graph.hvp(signs)
    total = total.abs_()
    return total.clamp_min_(max(1e-3 * float(total.median()), float(torch.finfo(total.dtype).tiny)))


def _line_search(
    objective: InnerObjective,
    layout: Flattener,
    w: Params,
    step: Tensor,
    value: float,
    gradient: Tensor,
    norm: float,
) -> tuple[Params, float, Tensor] | None:
    """The first halving of ``step`` with sufficient decrease; ``None`` if rounding leaves none.

    Near the solution the objective's differences drown in rounding; there a full step that shrinks
    the gradient is taken.
    """
    slope = float(torch.dot(gradient, step))
    length = 1.0
    for _ in range(_MAX_HALVINGS):
        parts = layout.split(step)
        ahead = {k: v - length * d for (k, v), d in zip(w.items(), parts, strict=True)}
        new_value, new_gradient = _measure(objective, ahead, layout)
        if new_value <= value - _ARMIJO * length * slope:
            return ahead, new_value, new_gradient
        near = abs(new_value - value) <= 1e3 * float(torch.finfo(layout.dtype).eps) * abs(value)
        if near and float(torch.linalg.vector_norm(new_gradient)) < norm:
            return ahead, new_value, new_gradient
        if near and length == 1.0:
            return None
        length /= 2
    return None
