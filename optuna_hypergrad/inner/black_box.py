"""Anything that turns hyperparameters into a solution, or into the outer value itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._errors import ObjectiveError
from .._results import SUCCESS, Result, Status
from .._typing import Batch, Objective, Params
from ..problem import BilevelProblem, full_batch
from ._base import AbstractBlackBox, InnerSolution

_VALUE = "value"


@dataclass(frozen=True)
class BlackBox(AbstractBlackBox):
    """``lam -> f(w*(lam), lam)`` or ``lam -> w*(lam)`` by code that nothing is known about; for ``ZerothOrder``.

    It may be NumPy, another language, a simulation. It should give equal results for equal ``lam``::

        box = ohg.BlackBox(validation_error)
        ohg.minimize_bilevel(
            box.problem(), box.start(), lam, inner_solver=box, estimator=ohg.ZerothOrder(), num_steps=50
        )

    Reference: black-box inner solvers in Shen, Wang, Yang & Xu (2024), section 3.2.

    Args:
        function: Is given copies of the outer parameters, tensors (``np.asarray(lam["x"])`` is an array). It
            returns the outer value, a number; or the inner solution, a dict of tensors or arrays with the keys,
            shapes and dtypes of ``inner_params``.
    """

    name: ClassVar[str] = "black_box"
    function: Callable[[Params], Any]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(
                f"BlackBox needs a function of the outer parameters, got {self.function!r:.80}."
            )

    def problem(
        self,
        outer_objective: Objective | None = None,
        outer_batch: Callable[[int], Batch] = full_batch,
    ) -> BilevelProblem:
        """The problem that it is the inner solver of.

        Args:
            outer_objective: Of the solutions that it returns; ``None`` where it returns outer values.
        """
        outer = _value_itself if outer_objective is None else outer_objective
        return BilevelProblem(_no_inner_objective, outer, outer_batch=outer_batch)

    def start(self) -> Params:
        """The ``inner_params`` of one that returns outer values: room for one."""
        return {_VALUE: torch.zeros((), dtype=torch.float64, device="cpu")}

    def solution(self, inner_params: Params, outer_params: Params) -> InnerSolution:
        found = self.function(_tree.clone(outer_params))
        w = self._named(found, inner_params)
        return InnerSolution(w, {}, 0, torch.nan, torch.nan, self._verdict(w, outer_params))

    def _named(self, found: Any, inner_params: Params) -> Params:
        if not isinstance(found, Mapping):
            try:
                found = {_VALUE: torch.tensor(float(found), dtype=torch.float64, device="cpu")}
            except (TypeError, ValueError, RuntimeError) as error:
                raise ObjectiveError(
                    f"{self._label} returned {found!r:.80}; return a number, or a dict of tensors."
                ) from error
        w = {
            k: (v if isinstance(v, Tensor) else torch.as_tensor(v, device="cpu")).detach()
            for k, v in found.items()
        }
        if _kinds(w) != _kinds(inner_params):
            raise ObjectiveError(
                f"{self._label} returned {_kinds(w)}, and inner_params are {_kinds(inner_params)}. A function "
                f"that returns outer values goes with black_box.problem() and black_box.start(); one that "
                f"returns solutions, with inner_params of their names, shapes and dtypes."
            )
        return w

    def _verdict(self, w: Params, outer_params: Params) -> Result:
        for k, v in w.items():
            if not _tree.finite(v):
                named = ", ".join(
                    f"{n!r} in [{float(v.min()):.6g}, {float(v.max()):.6g}]"
                    for n, v in outer_params.items()
                )
                what = f"{float(v)}" if v.dim() == 0 else f"NaN or infinite entries in {k!r}"
                return Result(
                    Status.NONFINITE,
                    f"{self._label} returned {what} for {named}; keep the hyperparameters where it has an "
                    f"answer (tighter bounds), or return a large number there.",
                )
        return SUCCESS

    @property
    def _label(self) -> str:
        return f"The black box {getattr(self.function, '__name__', repr(self.function)):.60}"


def _kinds(w: Params) -> dict[str, tuple[tuple[int, ...], str]]:
    return {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in w.items()}


def _value_itself(inner_params: Params, outer_params: Params, batch: Batch) -> Tensor:
    return inner_params[_VALUE]


def _no_inner_objective(inner_params: Params, outer_params: Params, batch: Batch) -> Tensor:
    raise ObjectiveError(
        "A black box has no inner objective that could be differentiated; use ZerothOrder."
    )
