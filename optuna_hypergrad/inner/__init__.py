"""Inner solvers, one file per method."""

from .._registry import registry
from ._base import (
    AbstractBlackBox,
    AbstractCurvatureSolver,
    AbstractInnerSolver,
    AbstractMinimizer,
    AbstractStepSolver,
    InnerSolution,
    inner_solve,
)
from .adam import Adam, AdamW
from .black_box import BlackBox
from .gradient_descent import GradientDescent
from .heavy_ball import HeavyBall
from .lbfgs import LBFGS
from .lookahead import Lookahead
from .newton_cg import NewtonCG
from .sketchy_sgd import SketchySGD

REGISTRY = registry(AbstractInnerSolver, globals())

__all__ = [
    "LBFGS",
    "REGISTRY",
    "AbstractBlackBox",
    "AbstractCurvatureSolver",
    "AbstractInnerSolver",
    "AbstractMinimizer",
    "AbstractStepSolver",
    "Adam",
    "AdamW",
    "BlackBox",
    "GradientDescent",
    "HeavyBall",
    "InnerSolution",
    "Lookahead",
    "NewtonCG",
    "SketchySGD",
    "inner_solve",
]
