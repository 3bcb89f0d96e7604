"""The inner gradient and its tangents in many directions, as one compiled function.

What many directions move through memory is mostly intermediate results of elementwise operations, which compiled code
does not write; and the operations, several hundred for each inner step of a small network, are no longer called one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _tree
from .._typing import Batch, Objective, Params
from .compiled import compiled_whole, in_one_graph

_CACHE_SIZE = 16

Bent = tuple[Tensor, Params, Params]
"""``(g, dg/dw, tangents of dg/dw)``; the last ``(B, *shape)``."""


def bent_by_columns(
    label: str,
    inner_objective: Objective,
    inner_params: Params,
    outer_params: Params,
    batch: Batch,
    of_inner: Params,
    of_outer: Params,
) -> Bent:
    """The inner gradient, and its tangent for each row of ``of_inner`` and ``of_outer``, ``(B, *shape)``.

    The first call compiles (tens of seconds), and so does one with other shapes.

    Raises:
        RequirementError: naming ``label``, if ``torch.compile`` cannot trace the inner objective as one graph.
    """
    run = _compiled(inner_objective)
    with in_one_graph(label, "the inner objective and its tangents"), torch.no_grad():
        w, lam = _tree.detach(inner_params), _tree.detach(outer_params)
        return run(w, lam, batch, of_inner, of_outer)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _compiled(inner_objective: Objective) -> Callable[..., Bent]:
    def run(w: Params, lam: Params, batch: Batch, of_w: Params, of_lam: Params) -> Bent:
        def slopes(w: Params) -> tuple[tuple[Params, Params], tuple[Tensor, Params]]:
            found, value = torch.func.grad_and_value(inner_objective, argnums=(0, 1))(w, lam, batch)
            return found, (value, found[0])

        _, pull, (value, gradient) = torch.func.vjp(slopes, w, has_aux=True)  # type: ignore[misc]
        bent = torch.func.vmap(lambda y, v: pull((y, v))[0])(of_w, of_lam)
        return value, gradient, bent

    return compiled_whole(run)
