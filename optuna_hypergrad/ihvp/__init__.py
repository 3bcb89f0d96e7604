"""Inverse-Hessian-vector products: linear solvers, one file per method."""

from .._registry import registry
from ._base import AbstractLinearSolver, LinearSolution, linear_solve
from .cg import CG
from .direct import Direct
from .identity import Identity
from .neumann import Neumann

REGISTRY = registry(AbstractLinearSolver, globals())  # type: ignore[type-abstract]

__all__ = [
    "CG",
    "REGISTRY",
    "AbstractLinearSolver",
    "Direct",
    "Identity",
    "LinearSolution",
    "Neumann",
    "linear_solve",
]
