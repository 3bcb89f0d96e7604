"""Walks back through a graph that is kept for more of them: with one cotangent, or with rows of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ._twice import saying_what_has_no_second_derivative

_Ends = Sequence[Tensor] | Sequence[GradientEdge]


def vjp_through_kept_graph(
    outputs: Sequence[GradientEdge], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad(..., retain_graph=True, allow_unused=True)`` without its argument checks.

    On small problems those checks cost a tenth of a product, so the engine is called as
    ``torch.autograd.grad`` calls it, where this version of torch has that entry.
    """
    if _run_backward is None:
        return torch.autograd.grad(
            tuple(outputs), tuple(inputs), tuple(cotangents), retain_graph=True, allow_unused=True
        )
    with saying_what_has_no_second_derivative():
        found: tuple[Tensor | None, ...] = _run_backward(
            tuple(outputs),
            tuple(cotangents),
            True,
            False,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )
    return found


_engine = getattr(torch.autograd.Variable, "_execution_engine", None)
_run_backward = getattr(_engine, "run_backward", None)


class VjpsOfRows:
    """Rows of cotangents, pulled back in one walk of a graph; one of these for each solve.

    Of torch's two ways, ``torch.func.vmap`` knows more operations: the older one takes convolutions, pooling and
    normalizations one row after the other. That one goes through autograd functions without a rule for ``vmap``, and is
    taken where the other one fails. What has failed is not tried again.

    Attributes:
        failure: Why neither way was possible, in torch's words; ``None`` as long as one is.
    """

    def __init__(self) -> None:
        self._ways = [_by_vmap, _by_older_batching]
        self.failure: str | None = None

    def __call__(
        self, outputs: _Ends, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor | None] | None:
        """For ``cotangents``, ``(B, *shape)`` of each output, those of each input, likewise; ``None`` for one without a path.

        Returns:
            ``None`` in place of the list where an operation cannot be batched.
        """
        reason = self.failure
        for way in tuple(self._ways):
            try:
                return way(outputs, inputs, cotangents)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._ways.remove(way)
                reason = str(error)
        self.failure = reason
        return None


def _by_vmap(
    outputs: _Ends, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    dead: list[bool] = []

    def pull(*row: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True)
        dead[:] = [f is None for f in found]
        return tuple(f for f in found if f is not None)

    alive = iter(torch.func.vmap(pull)(*cotangents))
    return [None if d else next(alive) for d in dead]


def _by_older_batching(
    outputs: _Ends, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(
            outputs, inputs, cotangents, True, allow_unused=True, is_grads_batched=True
        )
    )
