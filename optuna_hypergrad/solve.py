"""A differentiable inner solve: ``loss.backward()`` through it gives the hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _tree
from ._counting import current_count
from ._errors import ObjectiveError, RequirementError
from ._typing import Batch, Objective, Params
from .hypergradients import AbstractPullbackEstimator, Implicit, Solved
from .ihvp import CG
from .inner import AbstractInnerSolver, NewtonCG
from .problem import BilevelProblem, check_problem, full_batch
from .trial_attributes import described

DEFAULT_ESTIMATOR = Implicit(
    CG(max_steps=5000, rtol=1e-7, require_convergence=True, factorize_up_to=2048)
)


def solve(
    inner_objective: Objective,
    inner_params: Params,
    outer_params: Params,
    *,
    solver: AbstractInnerSolver | None = None,
    estimator: AbstractPullbackEstimator | None = None,
    inner_batch: Callable[[int], Batch] = full_batch,
) -> Params:
    """``w*(lam) = argmin over w of g(w, lam)``, as tensors through which gradients flow to ``lam``.

    The backward pass is the estimator's pullback, so ``f(w*(lam), lam).backward()`` gives the whole
    hypergradient: direct term by autograd, indirect term by the estimator. Once differentiable.

    Args:
        inner_objective: ``g(inner_params, outer_params, batch) -> scalar tensor``. Every hyperparameter
            must reach it through ``outer_params``, not through a closure.
        inner_params: ``w_0``. Under ``Unroll`` gradients flow to it as well.
        outer_params: ``lam``: tensors of any shape, leaves or not.
        solver: Of the inner problem; ``NewtonCG()`` by default.
        estimator: ``Implicit`` with CG to a relative residual of 1e-7 by default, and the factorized
            matrix for up to 2,048 inner parameters where CG is slow; it raises when that is not reached.
        inner_batch: ``step -> batch``; ``None`` is passed as the batch by default.

    Returns:
        ``w*`` with the keys, shapes and dtypes of ``inner_params``.

    Raises:
        SolverError: if the inner solve fails; in the backward pass, if the linear solve does.
        RequirementError: if the estimator cannot be used with this solver or these hyperparameters.
    """
    solver = NewtonCG() if solver is None else solver
    estimator = DEFAULT_ESTIMATOR if estimator is None else estimator
    if not isinstance(solver, AbstractInnerSolver):
        raise RequirementError(
            f"ohg.solve needs an inner solver such as NewtonCG() or HeavyBall(0.1, max_steps=100) as solver=, not "
            f"{solver!r:.80}."
        )
    if not isinstance(estimator, AbstractPullbackEstimator):
        raise RequirementError(
            f"ohg.solve needs an estimator with a pullback (Implicit, Unroll, ForwardMode, Reversible, "
            f"FixedPointImplicit, T1T2, SAMA), not "
            f"{estimator!r:.80}; ohg.minimize_bilevel and ohg.hypergradient take any."
        )
    problem = BilevelProblem(inner_objective, _no_outer_objective, inner_batch=inner_batch)
    check_problem(problem, inner_params, outer_params)
    estimator.check(problem, solver, inner_params, outer_params)
    context: dict[str, Any] = {
        "problem": problem,
        "solver": solver,
        "estimator": estimator,
        "inner_names": list(inner_params),
        "outer_names": list(outer_params),
        "count": current_count(),
    }
    outputs = _Solve.apply(  # type: ignore[no-untyped-call]
        context, *inner_params.values(), *outer_params.values()
    )
    return _tree.from_list(inner_params, outputs)


def _no_outer_objective(inner_params: Params, outer_params: Params, batch: Batch) -> Tensor:
    raise ObjectiveError("ohg.solve has no outer objective.")


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        inner_names, outer_names = context["inner_names"], context["outer_names"]
        w0 = dict(zip(inner_names, tensors, strict=False))
        lam = dict(zip(outer_names, tensors[len(inner_names) :], strict=True))
        solved: Solved = context["estimator"].solve(
            context["problem"], context["solver"], _tree.detach(w0), _tree.detach(lam)
        )
        solved.solution.result.raise_if_failed()
        ctx.solved, ctx.context, ctx.shapes = solved, context, [t.shape for t in tensors]
        return tuple(v.clone() for v in solved.solution.inner_params.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inner_names, outer_names = ctx.context["inner_names"], ctx.context["outer_names"]
        pulled = ctx.solved.pullback(dict(zip(inner_names, cotangents, strict=True)))
        pulled.result.raise_if_failed()
        if (count := ctx.context["count"]) is not None:
            count.add(described(ctx.context["estimator"]), pulled.stats)
        wants_initial = ctx.needs_input_grad[1 : 1 + len(inner_names)]
        for name, wanted in zip(inner_names, wants_initial, strict=True):
            if wanted and pulled.initial[name] is None:
                raise RequirementError(
                    f"A gradient was asked for the initial inner parameter {name!r}, but "
                    f"{type(ctx.context['estimator']).__name__} does not see where the inner solve starts; "
                    f"detach it, or use Unroll() without truncation."
                )
        return (
            None,
            *(pulled.initial[k] for k in inner_names),
            *(pulled.outer[k] for k in outer_names),
        )
