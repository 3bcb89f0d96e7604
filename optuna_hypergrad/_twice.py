"""What cannot be differentiated twice, and would be left out without a word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node

from ._errors import RequirementError


def nodes_of(*roots: Tensor) -> set[Node]:
    """All of the graph behind some tensors."""
    return _reached([t.grad_fn for t in roots])


def _reached(ahead: list[Node | None]) -> set[Node]:
    known: set[Node] = set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in known:
            known.add(node)
            ahead += [follower for follower, _ in node.next_functions]
    return known


def own_functions(value: Tensor) -> list[str]:
    """Names of the ``torch.autograd.Function`` that somebody has written, in the graph behind ``value``."""
    kinds = {type(n): n for n in nodes_of(value) if issubclass(type(n), BackwardCFunction)}
    return sorted({n.name().removesuffix("Backward") for n in kinds.values()})


_MARK = getattr(once_differentiable(lambda ctx: None), "__code__", None)
"""What the backward passes of all functions with the mark have in common: the code that wraps them."""


def goes_through_once_differentiable(
    gradients: Iterable[Tensor],
    value: Tensor | None = None,
    leaves: Iterable[Tensor] | None = None,
) -> bool:
    """Whether a ``torch.autograd.Function`` that is marked ``once_differentiable`` was differentiated in ``gradients``.

    Torch ends their graph in a node that raises; but a derivative with respect to given inputs walks around it, and is
    wrong. Where the function was given a constant cotangent there is no such node, either: it is known by the graph of the
    ``value`` that ``gradients`` are of, between it and the ``leaves`` that they are taken by (everywhere in it, if those are
    not given).
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes_of(*gradients)):
        return True
    if value is None:
        return False
    marked = [node for node in nodes_of(value) if _is_marked(node)]
    if leaves is None:
        return bool(marked)
    ends = {id(leaf) for leaf in leaves}
    return any(
        id(getattr(behind, "variable", None)) in ends
        for node in marked
        for behind in _reached([follower for follower, _ in node.next_functions])
    )


def _is_marked(node: Node) -> bool:
    function = getattr(node, "_forward_cls", None)
    code = getattr(getattr(function, "backward", None), "__code__", None)
    return code is not None and code is _MARK


def check_differentiable_twice(
    value: Tensor, gradients: Iterable[Tensor], leaves: Iterable[Tensor] | None = None
) -> None:
    """Refuse gradients of the inner objective's ``value`` whose own derivatives would lack something.

    Args:
        value: The inner objective.
        gradients: What was made of it.
        leaves: By which it was differentiated; anything in its graph if they are not given.

    Raises:
        RequirementError: saying what to do.
    """
    if goes_through_once_differentiable(gradients, value, leaves):
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


NO_ARGUMENT = "is not differentiable with respect to argument"
"""What torch says of an argument of an operation that has no derivative at all."""


@contextmanager
def saying_what_has_no_derivative(label: str) -> Iterator[None]:
    """Turns what torch says of an argument of an operation that has no derivative into advice.

    Args:
        label: Of the objective.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        if NO_ARGUMENT not in said:
            raise
        raise RequirementError(
            f"{label} uses a hyperparameter or inner parameter where torch has no derivative ({said:.200}). Write that part "
            f"with operations that have one (class weights c: c[y] * cross_entropy(..., reduction='none'), over c[y].sum()), "
            f"or use ZerothOrder, which differentiates nothing."
        ) from error
