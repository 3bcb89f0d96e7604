"""The value of a black box: ``loss.backward()`` through it takes differences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._errors import HyperparameterError, RequirementError
from ._typing import Params
from .hypergradients import ZerothOrder
from .inner import BlackBox, InnerSolution
from .problem import check_params

DEFAULT_ESTIMATOR = ZerothOrder(num_directions=None)


def evaluate(
    function: Callable[[Params], Any] | BlackBox,
    outer_params: Params,
    *,
    estimator: ZerothOrder = DEFAULT_ESTIMATOR,
    step: int = 0,
) -> Tensor:
    """``h(lam)`` by code that nothing is known about, as a tensor through which gradients flow to ``lam``.

    The backward pass calls ``h`` again at displaced ``lam``, once a direction (twice for central differences);
    the value is not computed again. Nothing is displaced that requires no grad, and without a backward pass
    there is one call. So an objective around a simulation is::

        @ohg.differentiable
        def objective(trial):
            viscosity = trial.suggest_float("viscosity", 1e-4, 1e-1, log=True)
            return ohg.evaluate(misfit, {"log_viscosity": viscosity.log()})

    Displacements are absolute: pass logarithms, or whatever else has entries of order 1, as there.

    Args:
        function: ``h``. Is given copies of the outer parameters, tensors (``np.asarray(lam["x"])`` is an
            array), and returns a number: equal ones for equal ``lam``.
        outer_params: ``lam``: tensors of any shape, leaves or not.
        estimator: By default forward differences, as many as ``lam`` has entries.
        step: Of the random directions, where there are fewer than entries: give it another one each time
            (``trial.number``), or the same few directions are taken for ever.

    Returns:
        A 0-d float64 tensor on the CPU. Once differentiable.

    Raises:
        SolverError: if ``h`` is not finite; in the backward pass, also if it is not at a displaced ``lam``, or
            stays the same to the last bit.
        ObjectiveError: if it returns anything but a number.
        RequirementError: if ``mu`` is lost in the rounding of ``lam``.
    """
    if not isinstance(estimator, ZerothOrder):
        raise RequirementError(
            f"ohg.evaluate takes differences, and {estimator!r:.80} is not ZerothOrder(...): a black box gives "
            f"nothing else to work with."
        )
    check_params(outer_params, "outer_params", HyperparameterError)
    box = function if isinstance(function, BlackBox) else BlackBox(function)
    moving = {k: v for k, v in outer_params.items() if v.requires_grad and torch.is_grad_enabled()}
    if moving:
        estimator.check(box.problem(), box, box.start(), moving)
    context = {
        "box": box,
        "estimator": estimator,
        "step": step,
        "fixed": {k: v.detach() for k, v in outer_params.items() if k not in moving},
        "moving": list(moving),
        "order": list(outer_params),
    }
    return _Evaluate.apply(context, *moving.values())  # type: ignore[no-untyped-call, no-any-return]


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: dict[str, Any], *tensors: Tensor) -> Tensor:
        lam = dict(zip(context["moving"], (v.detach() for v in tensors), strict=True))
        solution = _whole(context)(lam)
        solution.result.raise_if_failed()
        ctx.context, ctx.lam, ctx.solution = context, lam, solution
        (value,) = solution.inner_params.values()
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        context, lam = ctx.context, ctx.lam
        box, whole = context["box"], _whole(context)

        @functools.wraps(box.function)
        def remembered(asked: Params) -> Params:
            known = all(torch.equal(asked[k], v) for k, v in lam.items())
            solution = ctx.solution if known else whole(asked)
            solution.result.raise_if_failed()
            return solution.inner_params

        again = BlackBox(remembered)
        estimate = context["estimator"].estimate(
            again.problem(), again, again.start(), lam, context["step"]
        )
        estimate.result.raise_if_failed()
        return None, *(float(cotangent) * estimate.value[k] for k in context["moving"])


def _whole(context: dict[str, Any]) -> Callable[[Params], InnerSolution]:
    """The black box with what is not displaced, in the order in which it was given."""
    box: BlackBox = context["box"]

    def solution(moving: Params) -> InnerSolution:
        named = {**context["fixed"], **moving}
        return box.solution(box.start(), {k: named[k] for k in context["order"]})

    return solution
