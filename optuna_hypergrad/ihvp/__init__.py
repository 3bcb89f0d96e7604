"""Inverse-Hessian-vector products: linear solvers and preconditioners, one file per method."""

from .._registry import registry
from ._base import (
    AbstractLinearSolver,
    AbstractPreconditionedSolver,
    LinearSolution,
    linear_solve,
)
from ._preconditioner import AbstractPreconditioner, Factors, Inverse
from .cg import CG
from .diagonal import DiagonalPreconditioner
from .direct import Direct
from .gauss_newton import GaussNewtonPreconditioner
from .gmres import GMRES
from .identity import Identity
from .kfac import KFAC
from .minres import MINRES
from .neumann import Neumann
from .nystrom import Nystrom, NystromPreconditioner

REGISTRY = registry(AbstractLinearSolver, globals())  # type: ignore[type-abstract]
PRECONDITIONERS = registry(AbstractPreconditioner, globals())  # type: ignore[type-abstract]

__all__ = [
    "CG",
    "GMRES",
    "KFAC",
    "MINRES",
    "PRECONDITIONERS",
    "REGISTRY",
    "AbstractLinearSolver",
    "AbstractPreconditionedSolver",
    "AbstractPreconditioner",
    "DiagonalPreconditioner",
    "Direct",
    "Factors",
    "GaussNewtonPreconditioner",
    "Identity",
    "Inverse",
    "LinearSolution",
    "Neumann",
    "Nystrom",
    "NystromPreconditioner",
    "linear_solve",
]
