"""Second derivatives of an inner step: rows of directions through its graph, and words where there is no way through."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _tree
from .._errors import RequirementError
from .._twice import goes_through_once_differentiable, other_ways, own_functions
from .._typing import Params
from ..kept_graph import VjpsOfRows
from ..problem import BilevelProblem
from ._rewind import Point


class SecondDerivatives:
    """Of the steps of one inner solve.

    Args:
        label: The estimator's name, for messages.
    """

    def __init__(self, problem: BilevelProblem, outer_params: Params, label: str) -> None:
        self._problem, self._lam, self._label = problem, outer_params, label
        self._here = Point({}, {}), 0
        self._vjps_of_rows = VjpsOfRows()
        self._warned = False

    def at(self, before: Point, index: int) -> None:
        """Which step it is: from ``before``, on inner batch ``index``."""
        self._here = before, index

    def of_rows(
        self, outputs: Sequence[Tensor], inputs: tuple[Tensor, ...], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        """For each row of ``directions``, the gradient of ``<outputs, row>``: ``(B, *shape)`` for each input."""
        pairs = [
            (o, d.to(o.dtype)) for o, d in zip(outputs, directions, strict=True) if o.requires_grad
        ]
        rows = len(directions[0])
        if not pairs:
            return [t.new_zeros(rows, *t.shape) for t in inputs]
        alive, cotangents = [o for o, _ in pairs], [d for _, d in pairs]
        found = self._vjps_of_rows(alive, inputs, cotangents) if rows > 1 else None
        if found is not None:
            return [
                t.new_zeros(rows, *t.shape) if f is None else f
                for t, f in zip(inputs, found, strict=True)
            ]
        one_by_one = self._one_by_one(alive, inputs, cotangents)
        if (reason := self._vjps_of_rows.failure) is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._label} takes its columns of tangents one by one, which costs small problems the "
                f"most (up to {rows} times): an operation of the inner objective cannot be batched "
                f"({_first_line(reason)}). Replace it, or set width=1 if this is meant.",
                stacklevel=2,
            )
        return one_by_one

    def _one_by_one(
        self, outputs: list[Tensor], inputs: tuple[Tensor, ...], cotangents: list[Tensor]
    ) -> list[Tensor]:
        rows: list[tuple[Tensor, ...]] = []
        for i in range(len(cotangents[0])):
            try:
                rows.append(
                    torch.autograd.grad(
                        outputs, inputs, [c[i] for c in cotangents], True, materialize_grads=True
                    )
                )
            except RuntimeError as error:
                raise self.refusal(error) from error
        if len(rows) == 1:
            return [t[None] for t in rows[0]]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def refuse_dead_ends(self, tensors: list[Tensor], value: Tensor | None = None) -> None:
        """``torch.autograd.grad`` goes around them, and then its answer is wrong."""
        if goes_through_once_differentiable(tensors, value):
            raise self.refusal("once_differentiable")

    def refusal(self, error: RuntimeError | str) -> RequirementError:
        if "modified by an inplace operation" in str(error):
            return RequirementError(
                f"{self._label} differentiates each inner step, and inner_objective writes to a tensor that its derivatives "
                f"need ({_first_line(error)}). Make a new tensor instead: w['a'].clamp(...) in place of w['a'].clamp_(...)."
            )
        before, index = self._here
        with torch.enable_grad():
            value = self._problem.inner_objective(
                _tree.leaves(before.inner_params), dict(self._lam), self._problem.inner_batch(index)
            )
        custom = ", ".join(own_functions(value))
        return RequirementError(
            f"{self._label} differentiates each inner step, which takes two derivatives of inner_objective, and "
            f"one of its operations has no second one ({_first_line(error)}"
            f"{'; its own autograd functions: ' if custom else ''}{custom}). {other_ways(str(error))}"
        )


def _first_line(error: BaseException | str) -> str:
    return str(error).strip().partition("\n")[0][:200].rstrip(".")
