"""What cannot be differentiated twice, and would be left out without a word."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ._errors import RequirementError


def goes_through_once_differentiable(gradients: Iterable[Tensor]) -> bool:
    """Whether a ``torch.autograd.Function`` that is marked ``once_differentiable`` took part in ``gradients``.

    Torch then ends their graph in a node that raises; but a derivative with respect to given inputs walks around
    it, and is wrong.
    """
    pending = [g.grad_fn for g in gradients if g.grad_fn is not None]
    known = set(pending)
    while pending:
        node = pending.pop()
        if node.name().split("::")[-1] == "Error":
            return True
        for follower, _ in node.next_functions:
            if follower is not None and follower not in known:
                known.add(follower)
                pending.append(follower)
    return False


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
