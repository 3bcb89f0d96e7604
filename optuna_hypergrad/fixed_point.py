"""An equilibrium as a layer: ``z* = F(z*)``, and gradients for everything that ``F`` uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from . import _tree
from ._errors import (
    ObjectiveError,
    ProblemError,
    RequirementError,
    SolverError,
    ZeroHypergradientError,
)
from ._results import Result
from ._typing import Params
from .equilibrium import (
    AbstractFixedPointSolver,
    AdjointOperator,
    AdjointSolver,
    Anderson,
    FixedPointSolution,
    Phantom,
    check_adjoint_solver,
    find_fixed_point,
    solve_adjoint,
)
from .equilibrium._base import Map, check_image
from .problem import check_params

Point = TypeVar("Point", Tensor, Params)

DEFAULT_FORWARD = Anderson()
DEFAULT_BACKWARD = Anderson(rtol=1e-5)


def fixed_point(
    map: Callable[[Point], Point],
    z0: Point,
    *,
    forward: AbstractFixedPointSolver = DEFAULT_FORWARD,
    backward: AdjointSolver = DEFAULT_BACKWARD,
    throw: bool = True,
    stats: dict[str, float] | None = None,
) -> Point:
    """``z* = map(z*)`` from ``z0``, through which gradients flow to everything that ``map`` uses.

    A deep equilibrium layer is ``ohg.fixed_point(lambda z: cell(z, x), torch.zeros(...))``: gradients reach ``x``, the
    parameters of ``cell``, and whatever else the function refers to. The search builds no graph; the map is evaluated once
    more with one, in which ``(I - J^T) u = b`` is solved on the way back. Memory: that one graph, however many steps there
    were. The map must be the same at each evaluation: fix dropout masks outside of it, and know that batch
    normalization in training mode counts every evaluation.

    Cost: ``forward.max_steps`` evaluations at most, then one with its graph; on the way back, one product with ``J^T`` (the
    backward pass of one evaluation) for each step, and one more. Without a graph (``torch.no_grad()``) only the search.

    References: Bai, Kolter & Koltun (2019), "Deep equilibrium models", theorem 1; Geng, Zhang, Bai, Wang & Lin (2021),
    "On training implicit models" (phantom gradients).

    Args:
        map: ``z -> F(z)``, from a tensor (or a dict of tensors) to another of the same shape and dtype.
        z0: Where the search starts. The fixed point does not depend on it.
        forward: ``Anderson(...)`` or ``Picard(...)``.
        backward: What solves ``(I - J^T) u = b``. ``Phantom(k, tau)``: ``k`` steps and no more, a bias; ``Anderson(...)``,
            ``Picard(...)``: to a tolerance; or a linear solver for matrices that are not symmetric, such as ``Direct()``.
        throw: Raise where a search or a backward solve fails, that is, does not reach its tolerance (a linear solver: by its
            own setting, ``require_convergence``); otherwise warn, and go on with what there is.
        stats: Is filled with ``num_steps`` and ``residual`` of the search and, once the backward pass has run, with
            ``num_products`` and ``backward_residual`` (relative to ``|b|``).

    Returns:
        ``F(z)`` at the fixed point found, shape and dtype of ``z0``. Differentiable once, but for
        ``Phantom(unrolled=True)``, whose ``k`` steps go on from there.

    Raises:
        SolverError: if the search fails, or the backward solve in the backward pass, and ``throw`` is set.
        ObjectiveError: if ``map`` returns something of another kind, shape or dtype, or writes to its argument.
        ProblemError: if ``z0`` is no floating-point tensor (or dict of them), or not finite.
        RequirementError: if ``backward`` needs a symmetric matrix, or if a second derivative is asked for.
        ZeroHypergradientError: if ``z0`` requires a gradient, which would be zero.
    """
    if not callable(map):
        raise ObjectiveError(f"fixed_point needs a function z -> F(z) as its map, got {map!r:.80}.")
    if not isinstance(forward, AbstractFixedPointSolver):
        raise RequirementError(
            f"fixed_point: forward must be Anderson(...) or Picard(...), got {forward!r:.80}."
        )
    check_adjoint_solver("fixed_point: backward", backward)
    function, start = _as_params(map, z0)
    if torch.is_grad_enabled() and any(v.requires_grad for v in start.values()):
        raise ZeroHypergradientError(
            "fixed_point: z0 requires a gradient, which would be zero by construction: a fixed point does not depend on "
            "where the search for it starts. Pass z0.detach(); what the fixed point shall depend on belongs into the map."
        )
    function, start = _checked(function), _tree.clone(_tree.detach(start))
    found = find_fixed_point(forward, function, start)
    _report(found.result, throw)
    if stats is not None:
        stats |= {"num_steps": float(found.num_steps), "residual": found.residual}
    end = _with_graph(function, found, backward, throw, stats)
    return end if isinstance(z0, dict) else end[""]


def _as_params(map: Callable[[Any], Any], z0: object) -> tuple[Map, Params]:
    """The map on dicts, whatever it is on, and ``z0`` as one."""
    if not isinstance(z0, Tensor):
        check_params(z0, "fixed_point: z0", ProblemError)  # type: ignore[arg-type]
        return map, dict(z0)  # type: ignore[call-overload]
    if not z0.is_floating_point() or not bool(torch.isfinite(z0).all()):
        raise ProblemError(
            f"fixed_point: z0 must be finite and of a floating-point dtype, and is {z0!r:.80}."
        )

    def function(z: Params) -> Params:
        image = map(z[""])
        if not isinstance(image, Tensor):
            raise ObjectiveError(
                f"fixed_point: the map was given a tensor and returned a {type(image).__name__}; it must return a tensor "
                f"of the same shape."
            )
        return {"": image}

    return function, {"": z0}


def _checked(function: Map) -> Map:
    """The map, refused where it writes to its argument: its image would be compared with itself."""

    def checked(z: Params) -> Params:
        # Tensors made in inference mode count no versions.
        copied = {k: v.clone() for k, v in z.items() if v.is_inference()}
        versions = {k: v._version for k, v in z.items() if k not in copied}
        given = dict(z)
        image = function(z)
        written = any(given[k]._version != n for k, n in versions.items())
        if written or not all(torch.equal(given[k], v) for k, v in copied.items()):
            raise ObjectiveError(
                "fixed_point: the map writes to its argument, so that there is nothing left to compare F(z) with. Return "
                "a new tensor (z.mul(0.5), not z.mul_(0.5); ReLU without inplace=True), or let the map begin with "
                "z.clone()."
            )
        return image

    return checked


def _with_graph(
    function: Map,
    found: FixedPointSolution,
    backward: AdjointSolver,
    throw: bool,
    stats: dict[str, float] | None,
) -> Params:
    """``F(z)`` at what was found; differentiable where torch records graphs."""
    if not torch.is_grad_enabled():
        return function(found.point) if found.image is None else found.image
    if isinstance(backward, Phantom) and backward.unrolled:
        return _unrolled(function, found.point, backward)
    gate = torch.zeros((), requires_grad=True, device="cpu")
    entered = _Enter.apply(gate, *found.point.values())  # type: ignore[no-untyped-call]
    points = _tree.from_list(found.point, entered)
    images = function(points)
    check_image(images, found.point)
    if not _depends_on_more(images, entered[0].grad_fn):
        return _tree.detach(images)
    operator = AdjointOperator(points, images)
    adjoint = _Adjoint(operator, backward, throw, stats)
    outputs = _Attach.apply(adjoint, *(images[k] for k in points))  # type: ignore[no-untyped-call]
    return _tree.from_list(points, outputs)


def _unrolled(function: Map, point: Params, phantom: Phantom) -> Params:
    tau, z = phantom.relaxation, point
    for _ in range(phantom.num_steps):
        image = function(z)
        z = {k: torch.lerp(v, image[k], tau) if tau < 1 else image[k] for k, v in z.items()}
    return z


def _report(result: Result, throw: bool) -> None:
    if throw:
        result.raise_if_failed()
    if not result:
        warnings.warn(f"fixed_point: {result.message}", stacklevel=3)


def _depends_on_more(images: Params, entry: Node | None) -> bool:
    """Whether a graph leads anywhere but to the point itself."""
    known = {entry}
    ahead = [v.grad_fn for v in images.values()]
    while ahead:
        node = ahead.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if not node.next_functions and node is not entry:  # a leaf
            return True
        ahead += [follower for follower, _ in node.next_functions]
    return False


class _Enter(torch.autograd.Function):
    """The point as tensors of a graph that ends here."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, *points: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(p.view_as(p) for p in points)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[None, ...]:
        return (None,) * (1 + len(cotangents))


@dataclass(frozen=True)
class _Adjoint:
    """What the backward pass of a fixed point needs."""

    operator: AdjointOperator
    solver: AdjointSolver
    throw: bool
    stats: dict[str, float] | None

    def solve(self, cotangents: tuple[Tensor, ...]) -> list[Tensor]:
        operator = self.operator
        b = operator.layout.flatten(cotangents, copy=True)
        found = solve_adjoint(self.solver, operator, b)
        if self.stats is not None:
            self.stats["num_products"] = float(found.num_products)
            self.stats["backward_residual"] = found.residual
        if not found.result and not bool(torch.isfinite(found.x).all()):
            raise SolverError(found.result.message, found.result)
        _report(found.result, self.throw)
        return operator.layout.split(found.x)


class _Attach(torch.autograd.Function):
    """The identity, whose backward pass turns ``b`` into ``(I - J^T)^-1 b``; torch then pulls that through ``F``."""

    @staticmethod
    def forward(ctx: Any, adjoint: _Adjoint, *images: Tensor) -> tuple[Tensor, ...]:
        ctx.adjoint = adjoint
        return tuple(v.clone() for v in images)  # the caller may write to them

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RequirementError(
                "A second derivative was asked for (create_graph=True) through ohg.fixed_point, whose backward pass is a "
                "solve without a graph. Use backward=Phantom(..., unrolled=True), which can be differentiated again."
            )
        parts = ctx.adjoint.solve(cotangents)
        return (None, *(p.to(c.dtype) for p, c in zip(parts, cotangents, strict=True)))
