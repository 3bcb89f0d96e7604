"""What cannot be differentiated twice, and would be left out without a word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import Node

from ._errors import RequirementError


def nodes_of(*roots: Tensor) -> set[Node]:
    """All of the graph behind some tensors."""
    known: set[Node] = set()
    ahead = [t.grad_fn for t in roots]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in known:
            known.add(node)
            ahead += [follower for follower, _ in node.next_functions]
    return known


def goes_through_once_differentiable(gradients: Iterable[Tensor]) -> bool:
    """Whether a ``torch.autograd.Function`` that is marked ``once_differentiable`` took part in ``gradients``.

    Torch then ends their graph in a node that raises; but a derivative with respect to given inputs walks around
    it, and is wrong.
    """
    return any(node.name() == "torch::autograd::Error" for node in nodes_of(*gradients))


def check_differentiable_twice(gradients: Iterable[Tensor]) -> None:
    """Refuse gradients of the inner objective whose own derivatives would lack something.

    Raises:
        RequirementError: saying what to do.
    """
    if goes_through_once_differentiable(gradients):
        raise RequirementError(
            "inner_objective uses a torch.autograd.Function whose backward is marked once_differentiable, so its "
            "second derivatives would be left out. Write its backward with differentiable operations and without "
            "the mark, use an operation of torch in its place, or use ZerothOrder, or a penalty method (F2SA, PBGD, "
            "BOME), which takes first derivatives only."
        )


def other_ways(said: str) -> str:
    """What to do about an operation of which torch has ``said`` that it has no second derivative."""
    math = " (attention: under torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
    return (
        f"Write it with operations that torch can differentiate twice{math if 'scaled_dot_product' in said else ''}, "
        f"or use ZerothOrder, which differentiates nothing, or a penalty method (F2SA, PBGD, BOME), which takes first "
        f"derivatives only."
    )


@contextmanager
def saying_what_has_no_second_derivative() -> Iterator[None]:
    """Turns what torch says where it cannot go through the graph of a gradient into advice."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        if not re.search(r"derivative for .*not implemented", said):
            raise
        raise RequirementError(
            f"inner_objective must be differentiable twice, and one of its operations is not ({said:.200}). "
            f"{other_ways(said)}"
        ) from error
