"""Fixed points ``z* = F(z*)``: what finds them, and what pulls cotangents back through them."""

from .._registry import registry
from ._base import AbstractFixedPointSolver, FixedPointSolution, find_fixed_point
from .adjoint import AdjointOperator, AdjointSolver, check_adjoint_solver, solve_adjoint
from .anderson import Anderson
from .phantom import Phantom
from .picard import Picard

REGISTRY = registry(AbstractFixedPointSolver, globals())  # type: ignore[type-abstract]

__all__ = [
    "REGISTRY",
    "AbstractFixedPointSolver",
    "AdjointOperator",
    "AdjointSolver",
    "Anderson",
    "FixedPointSolution",
    "Phantom",
    "Picard",
    "check_adjoint_solver",
    "find_fixed_point",
    "solve_adjoint",
]
