"""First-order differences in place of the mixed derivative, adapted to the inner optimizer (SAMA)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import is_number
from .._errors import RequirementError, ZeroHypergradientError
from .._results import SUCCESS, Result, Status
from .._typing import Params
from ..inner import AbstractInnerSolver, AbstractStepSolver, inner_solve
from ..inner._base import InnerState, take_step
from ..operators import Flattener, scalar
from ..problem import BilevelProblem
from ._base import AbstractPullbackEstimator, sees_objectives
from ._estimate import Cotangents, EstimatorState, Pulled, Solved


@dataclass(frozen=True)
class _Step:
    """What the last inner step that moved ``w`` began with."""

    inner_params: Params
    state: InnerState
    index: int
    gradient: Params


@dataclass(frozen=True)
class SAMA(AbstractPullbackEstimator):
    """``d_lam = f_lam - [g_lam(w + eps v) - g_lam(w - eps v)] / (2 eps)`` with ``v = D f_w``, ``eps = r / |v|``.

    ``D = -(dw'/dg)^T`` is how the inner solver's last step reacts to the gradient that it is given, its memory held fixed:
    ``eta`` for gradient descent and momentum, a diagonal for Adam. With gradient descent this is T1-T2, and so is
    its bias: the inverse Hessian is replaced by ``D``. Exact in ``eps`` where the inner objective is quadratic in ``w``.
    Adam's ``D`` grows up to ``eta / eps`` (of Adam) in entries whose gradients have vanished.

    Cost: the inner steps and 3 gradient evaluations, all of first order: operations without a second derivative will do.
    Memory: one graph of ``g``, and ``w`` and the solver's memory before the last step.

    Reference: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell & Xing (2023), "Making scalable meta learning practical".

    Args:
        displacement: ``r`` over ``|w|`` (over 1 where ``w = 0``): how far ``w`` is moved each way. ``None`` for the cube root
            of the rounding error, at which that of the differences and their curvature are about equal: 5e-3 in
            float32 (which keeps about three digits), 6e-6 in float64. (The paper's ``alpha`` is ``r``.)
    """

    name: ClassVar[str] = "sama"
    requires: ClassVar[frozenset[str]] = frozenset({"step_solver"})
    sees: ClassVar[str] = sees_objectives("SAMA")

    displacement: float | None = None

    def __post_init__(self) -> None:
        r = self.displacement
        if not (r is None or (is_number(r) and 0 < r <= 1)):
            raise ValueError(f"SAMA needs 0 < displacement <= 1 or None, got {r!r:.80}.")

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        label = type(inner_solver).__name__
        if not isinstance(inner_solver, AbstractStepSolver):
            who = "no inner solver was given" if inner_solver is None else f"{label} has none"
            raise RequirementError(
                f"SAMA is adapted to the step of an inner optimizer, and {who}. Use GradientDescent, HeavyBall, Adam or "
                f"AdamW with it, or T1T2(step_size), which needs no solver."
            )
        if inner_solver.max_steps < 1:
            raise RequirementError("SAMA is adapted to the last inner step; raise max_steps.")
        steering = sorted(inner_solver.hyperparameters() & outer_params.keys())
        if steering:
            raise ZeroHypergradientError(
                f"{', '.join(map(repr, steering))} steers the inner solver ({label}), and SAMA differentiates the inner "
                f"objective alone: its hypergradient would be zero by construction. Use Unroll, which differentiates the "
                f"steps themselves."
            )

    def solve(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        state: EstimatorState | None = None,
    ) -> Solved:
        self.check(problem, inner_solver, inner_params, outer_params)
        assert isinstance(inner_solver, AbstractStepSolver)
        state = EstimatorState() if state is None else state
        take = partial(take_step, problem, inner_solver, _tree.detach(outer_params), False)
        last: list[_Step] = []

        def watched(
            w: Params, memory: InnerState, index: int
        ) -> tuple[Params, InnerState, Tensor, Params]:
            moved = take(w, memory, index)
            if inner_solver.has_moved(moved[1]):
                last[:] = [_Step(w, memory, index, moved[3])]
            return moved

        solution = inner_solve(
            problem,
            inner_solver,
            inner_params,
            outer_params,
            start=state.inner_index,
            state=state.solver_state,
            take=watched,
        )
        w = _tree.detach(solution.inner_params)

        def pullback(cotangent: Params) -> Pulled:
            nowhere: Cotangents = dict.fromkeys(inner_params)
            if not last and solution.result.status is Status.NONFINITE:
                nothing = _tree.tree_map(lambda x: torch.full_like(x, torch.nan), outer_params)
                return Pulled({**nothing}, nowhere, solution.result)
            if not last:
                raise ZeroHypergradientError(
                    f"SAMA is adapted to the last inner step that moves the inner parameters, and none of the "
                    f"{solution.num_steps} steps of this {type(inner_solver).__name__} did: the hypergradient would be zero. "
                    f"Raise max_steps to its period or more, lower the period, or tighten the tolerance that stops it earlier."
                )
            v = adapted(inner_solver, last[-1], outer_params, cotangent)
            cotangent.clear()
            index = state.inner_index + solution.num_steps
            outer, result, length = self._difference(problem, w, outer_params, v, index)
            stats = {
                "inner_gradient_norm": float(_tree.norm(_tree.detach(last[-1].gradient))),
                "displacement": length,
            }
            return Pulled(outer, nowhere, result, stats)

        return Solved(replace(solution, inner_params=w), pullback)

    def _difference(
        self, problem: BilevelProblem, w: Params, lam: Params, v: Params, index: int
    ) -> tuple[Cotangents, Result, float]:
        """``-M^T v``, whether it is one, and how far ``w`` was moved."""
        size = float(_tree.norm(v))
        if not size < float("inf"):
            message = (
                "The gradient of the outer objective, adapted to the inner solver's step, holds NaN or infinite entries; "
                "check the outer loss at the inner solution."
            )
            nothing = _tree.tree_map(lambda x: torch.full_like(x, torch.nan), lam)
            return {**nothing}, Result(Status.NONFINITE, message), 0.0
        if size == 0.0:
            touched = _partial(problem, w, lam, index)
            return (
                {k: None if g is None else torch.zeros_like(g) for k, g in touched.items()},
                SUCCESS,
                0.0,
            )
        rounding = torch.finfo(Flattener(w).dtype).eps
        relative = rounding ** (1 / 3) if self.displacement is None else self.displacement
        length = relative * (float(_tree.norm(w)) or 1.0)
        eps = length / size
        ahead, behind = (
            _partial(problem, {k: x + sign * eps * v[k] for k, x in w.items()}, lam, index)
            for sign in (1.0, -1.0)
        )
        outer: Cotangents = {}
        for k, a in ahead.items():
            b = behind[k]
            if a is None and b is None:
                outer[k] = None
                continue
            a, b = (torch.zeros_like(lam[k]) if g is None else g for g in (a, b))
            moved, known = float((a - b).norm()), float(a.norm())
            if 0 < moved < 20 * torch.finfo(a.dtype).eps * known:
                warnings.warn(
                    f"SAMA: the gradient of the inner objective by {k!r} moves by {moved:.1g} where w is moved by {length:.1g} "
                    f"each way, and is rounded by about {torch.finfo(a.dtype).eps * known:.1g} in {a.dtype}: raise "
                    f"displacement, or use float64.",
                    stacklevel=4,
                )
            outer[k] = (b - a) / (2 * eps)
        return outer, SUCCESS, length


def adapted(
    solver: AbstractStepSolver, last: _Step, outer_params: Params, cotangent: Params
) -> Params:
    """``D f_w``: minus the cotangent of the new ``w``, pulled back to the gradient that the last step was given."""
    gradient = _tree.leaves(last.gradient)
    at, lam = _tree.detach(last.inner_params), _tree.detach(outer_params)
    value = torch.zeros((), device=next(iter(at.values())).device)
    with torch.enable_grad():
        moved, _, _, _ = solver.step(lambda _: (value, gradient), at, lam, last.state, last.index)
        pulled = torch.autograd.grad(
            [moved[k] for k in gradient],
            list(gradient.values()),
            [cotangent[k].to(moved[k].dtype) for k in gradient],
            materialize_grads=True,
        )
    return {k: -p for k, p in zip(gradient, pulled, strict=True)}


def _partial(problem: BilevelProblem, w: Params, outer_params: Params, index: int) -> Cotangents:
    """``dg/dlam``; ``None`` where ``g`` ignores a hyperparameter."""
    lam = _tree.leaves(outer_params)
    with torch.enable_grad():
        value = scalar(
            problem.inner_objective(_tree.detach(w), dict(lam), problem.inner_batch(index)),
            "inner_objective",
        )
        if not value.requires_grad:
            return dict.fromkeys(lam)
        found = torch.autograd.grad(value, list(lam.values()), allow_unused=True)
    return dict(zip(lam, found, strict=True))
