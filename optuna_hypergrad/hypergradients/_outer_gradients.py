"""Gradients of the outer objective at an inner solution, and the hypergradient that they and the indirect term add up to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _tree
from .._errors import ObjectiveError, ZeroHypergradientError
from .._results import SUCCESS, Result, Status
from .._twice import saying_what_has_no_derivative
from .._typing import Params
from ..inner import InnerSolution
from ..operators import scalar
from ..problem import BilevelProblem
from ._estimate import Cotangents, EstimatorState, HypergradientEstimate


def outer_value_at(
    problem: BilevelProblem, inner_params: Params, outer_params: Params, step: int
) -> float:
    """``f`` on outer batch ``step``, as a number."""
    w, lam = _tree.detach(inner_params), _tree.detach(outer_params)
    with torch.enable_grad():  # it may take derivatives of its own
        value = problem.outer_objective(w, lam, problem.outer_batch(step))
        return float(scalar(value, "outer_objective").detach())


def outer_gradients(
    problem: BilevelProblem, inner_params: Params, outer_params: Params, step: int
) -> tuple[Tensor, Params, Cotangents]:
    """``f``, ``b = df/dw`` and the direct term ``df/dlam`` on outer batch ``step``."""
    w, lam = _tree.leaves(inner_params), _tree.leaves(outer_params)
    with torch.enable_grad():
        with saying_what_has_no_derivative("outer_objective"):
            value = problem.outer_objective(dict(w), dict(lam), problem.outer_batch(step))
        value = scalar(value, "outer_objective")
        if not value.requires_grad:
            raise ObjectiveError(
                "outer_objective depends neither on inner_params nor on outer_params through "
                "differentiable torch operations; compute it from the arguments that it is given."
            )
        gradients = torch.autograd.grad(value, (*w.values(), *lam.values()), allow_unused=True)
    by_w = {
        k: torch.zeros_like(v) if g is None else g
        for (k, v), g in zip(w.items(), gradients, strict=False)
    }
    return value.detach(), by_w, dict(zip(lam, gradients[len(w) :], strict=True))


def combine(
    direct: Cotangents, indirect: Cotangents, outer_params: Params, method: str, sees: str
) -> Params:
    """Direct plus indirect term; refuses a hypergradient that is zero by construction.

    Raises:
        ZeroHypergradientError: naming the hyperparameter and the methods that can see it.
    """
    total: Params = {}
    for name, like in outer_params.items():
        parts = [p for p in (direct[name], indirect[name]) if p is not None]
        if not parts:
            raise ZeroHypergradientError(
                f"The hypergradient of {name!r} under {method} is zero by construction: neither the outer "
                f"objective nor what {method} differentiates depends on it. {sees} Use {name!r} in an "
                f"objective (the tensor in its second argument: not one from outside, and no float(...) or "
                f"detach() of it), take it out of outer_params, or choose another estimator."
            )
        value = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        total[name] = value.detach().to(like.dtype)
    return total


def nothing_found(
    solution: InnerSolution, outer_params: Params, stats: dict[str, float], state: EstimatorState
) -> HypergradientEstimate:
    """The estimate where the inner solve has left nothing to estimate at: NaN, with its result."""
    nan = _tree.tree_map(lambda v: torch.full_like(v, torch.nan), outer_params)
    return HypergradientEstimate(
        nan,
        torch.tensor(torch.nan, device="cpu"),
        solution.inner_params,
        solution.result,
        stats,
        state,
    )


def _finite(value: Params, outer_value: Tensor) -> Result:
    if not math.isfinite(outer_value.item()):
        return Result(
            Status.NONFINITE,
            f"The outer objective is {float(outer_value)} at the inner solution; keep the hyperparameters "
            f"where the inner problem has a usable solution (tighter bounds, more inner steps).",
        )
    for name, v in value.items():
        if not _tree.finite(v):
            return Result(
                Status.NONFINITE,
                f"The hypergradient of {name!r} holds NaN or infinite entries; check that both objectives are "
                f"differentiable at the inner solution (sqrt, norm and log at 0 are not).",
            )
    return SUCCESS


def _first_failure(*results: Result) -> Result:
    return next((r for r in results if not r), SUCCESS)
