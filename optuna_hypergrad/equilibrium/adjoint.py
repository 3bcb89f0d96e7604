"""``(I - J^T) u = b``: the linear system behind the derivative of a fixed point. ``J`` need not be symmetric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .. import _tree
from .._errors import RequirementError
from .._results import SUCCESS, Result, Status
from ..ihvp import AbstractLinearSolver, LinearSolution, Neumann, linear_solve
from ..ihvp._base import without_products
from ..kept_graph import VjpsOfRows, vjp_through_kept_graph
from ..operators import AbstractLinearOperator, Flattener
from ._base import AbstractFixedPointSolver, find_fixed_point
from .phantom import Phantom

AdjointSolver = Phantom | AbstractLinearSolver | AbstractFixedPointSolver
"""What solves ``(I - J^T) u = b``. It is a fixed point itself, ``u = J^T u + b``."""

_GROWTH = 10.0
"""From here on, a phantom gradient consists of its last terms, which have left the direction of the exact one."""


class AdjointOperator(AbstractLinearOperator):
    """``I - J^T`` from one kept graph of ``z -> F(z)``.

    Args:
        points: The tensors ``z``, or what they became in the graph.
        images: ``F(z)``, with their graph, by the same names.
    """

    symmetric = False

    def __init__(self, points: dict[str, Tensor], images: dict[str, Tensor]) -> None:
        self.layout = Flattener(points)
        self.size, self.dtype, self.device = (
            self.layout.size,
            self.layout.dtype,
            self.layout.device,
        )
        self._points = tuple(points.values())
        names = list(points)
        alive = [k for k in names if images[k].requires_grad]
        self._alive = [names.index(k) for k in alive]
        self._images = tuple(get_gradient_edge(images[k]) for k in alive)
        self._dtypes = [images[k].dtype for k in alive]
        self._vjps_of_rows = VjpsOfRows()

    def transposed(self, vector: Tensor) -> Tensor:
        """``J^T u``: ``(P,) -> (P,)``."""
        self.num_products += 1
        return self._pulled(vector)

    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor:
        return vector - self._pulled(vector)

    def _apply_many(self, vectors: Tensor) -> Tensor:
        parts = torch.split_with_sizes(vectors, self.layout.sizes, dim=1)
        rows = len(vectors)
        cotangents = [
            parts[i].reshape(rows, *self.layout.shapes[i]).to(dtype)
            for i, dtype in zip(self._alive, self._dtypes, strict=True)
        ]
        found: Sequence[Tensor | None] | None = self._without_path
        if self._images:
            found = self._vjps_of_rows(self._images, self._points, cotangents)
        if found is None:
            return torch.stack([self._apply(v, None) for v in vectors])
        flat = [
            vectors.new_zeros(rows, p.numel())
            if g is None
            else g.reshape(rows, -1).to(vectors.dtype)
            for g, p in zip(found, self._points, strict=True)
        ]
        return vectors - torch.cat(flat, dim=1)

    def _pulled(self, vector: Tensor) -> Tensor:
        parts = self.layout.split(vector)
        cotangents = [parts[i].to(d) for i, d in zip(self._alive, self._dtypes, strict=True)]
        found: Sequence[Tensor | None] = self._without_path
        if self._images:
            found = vjp_through_kept_graph(self._images, self._points, cotangents)
        return self.layout.flatten(
            [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(found, self._points, strict=True)
            ]
        )

    @property
    def _without_path(self) -> Sequence[None]:
        """What is pulled back where no image depends on the point."""
        return (None,) * len(self._points)


def check_adjoint_solver(label: str, solver: object) -> None:
    """Refuse what cannot solve with a matrix that is not symmetric.

    Raises:
        RequirementError: naming ``label`` and what can.
    """
    if isinstance(solver, Phantom | AbstractFixedPointSolver):
        return
    if not isinstance(solver, AbstractLinearSolver):
        raise RequirementError(
            f"{label} must be Phantom(...), a fixed-point solver such as Anderson(rtol=1e-6), or a linear solver such as "
            f"Direct(), got {solver!r:.80}."
        )
    name = type(solver).__name__
    others = "GMRES, Anderson(rtol=1e-6), Phantom(...) or, for small ones, Direct()"
    if "symmetric" in solver.requires:
        raise RequirementError(
            f"{label}: {name} needs a symmetric matrix, and I - J^T (J: the Jacobian of the map) is none. Use {others}. "
            f"({name} on the normal equations would square the condition number, and need products with J as well.)"
        )
    if isinstance(solver, Neumann) and isinstance(solver.alpha, str):
        raise RequirementError(
            f"{label}: Neumann(alpha={solver.alpha!r}) measures the curvature of a symmetric matrix, and I - J^T is none. "
            f"Give alpha a number: 1.0 where the map contracts, less for relaxation. Or use {others}."
        )


def solve_adjoint(
    solver: AdjointSolver, operator: AdjointOperator, vector: Tensor
) -> LinearSolution:
    """``u ~ (I - J^T)^-1 vector``, with the products it took and how it went."""
    if isinstance(solver, Phantom):
        return _phantom(solver, operator, vector)
    if isinstance(solver, AbstractLinearSolver):
        return _renamed(solver, linear_solve(solver, operator, vector, throw=False))
    known = without_products(vector)
    if known is not None:
        return known
    layout, before = operator.layout, operator.num_products

    def step(u: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = layout.flatten(list(u.values()))
        return wide(vector + operator.transposed(flat))

    def wide(flat: Tensor) -> dict[str, Tensor]:
        """In the dtype of the solve, also where the parameters are in half precision."""
        parts = torch.split(flat, layout.sizes)
        return {
            k: part.view(shape)
            for k, part, shape in zip(layout.names, parts, layout.shapes, strict=True)
        }

    found = find_fixed_point(solver, step, wide(vector))
    end = layout.flatten(list((found.point if found.image is None else found.image).values()))
    scale = float(torch.linalg.vector_norm(end) / torch.linalg.vector_norm(vector))
    products = operator.num_products - before
    return _renamed(solver, LinearSolution(end, found.residual * scale, products, found.result))


def _phantom(solver: Phantom, operator: AdjointOperator, vector: Tensor) -> LinearSolution:
    """The series, which is cut off on purpose: only terms that run away are a failure."""
    found = linear_solve(solver.series(), operator, vector, throw=False)
    if found.result.status is not Status.DIVERGED:
        return found
    if found.residual <= _GROWTH and _tree.finite(found.x):
        return replace(found, result=SUCCESS)
    return replace(
        found,
        result=Result(
            Status.DIVERGED,
            f"Phantom({solver.num_steps}, {solver.relaxation:g}): the terms of the series grew by a factor of "
            f"{found.residual:.1e}, so that their sum says little about the gradient. Lower relaxation, take fewer steps, or bound "
            f"the map (a normalization, smaller weights).",
        ),
    )


def _renamed(
    solver: AbstractLinearSolver | AbstractFixedPointSolver, found: LinearSolution
) -> LinearSolution:
    """The failure of a solver that speaks of other things, put into the place where it was met."""
    if found.result:
        return found
    message = (
        f"The solve of (I - J^T) u = b, J being the Jacobian of the map at the fixed point, by {type(solver).__name__} "
        f"failed. ({found.result.message})"
    )
    return replace(found, result=Result(found.result.status, message))
