"""What cannot be differentiated twice, and would be left out without a word."""

from __future__ import annotations

from collections.abc import Iterable

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
            "the mark, use an operation of torch in its place, or use ZerothOrder."
        )
