"""The tables: every registered method, the problems it is held against, and how close it must come.

A new method is one row here. ``test_tables.py`` runs the rows; a guard there fails while a registered
class has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import networks
import problems
import torch

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator
from optuna_hypergrad.ihvp import AbstractLinearSolver, AbstractPreconditioner
from optuna_hypergrad.inner import AbstractInnerSolver
from optuna_hypergrad.operators import AbstractLinearOperator, DampedOperator, MatrixOperator


@functools.cache
def case(name: str) -> problems.Case:
    return getattr(problems, name)()


@functools.cache
def truth(name: str) -> problems.Params:
    return case(name).truth(case(name).outer_params)


@dataclass(frozen=True)
class Row:
    """One cell: an estimator with its inner solver on a problem; a tolerance, or the error it must raise."""

    estimator: AbstractHypergradientEstimator
    inner_solver: AbstractInnerSolver | None
    problem: str
    rtol: float | None = None
    error: type[Exception] | None = None
    message: str = ""

    def __str__(self) -> str:
        settings = type(getattr(self.estimator, "solver", None)).__name__
        return f"{type(self.estimator).__name__}-{settings}-{type(self.inner_solver).__name__}-{self.problem}"


EXACT = ohg.LBFGS(max_steps=3000, atol=1e-11)
TO_THE_END = {
    "ridge": ohg.GradientDescent(0.3, max_steps=1500),
    "quadratic": ohg.GradientDescent(0.25, max_steps=600),
    "logistic": ohg.HeavyBall(0.5, max_steps=900, momentum=0.8),
    "episodes": ohg.GradientDescent(0.2, max_steps=300),
    "two_stage": ohg.GradientDescent(0.2, max_steps=300),
}
WITH_MOMENTUM = {
    "ridge": ohg.HeavyBall(0.3, max_steps=300, momentum=0.8),
    "quadratic": ohg.HeavyBall(0.2, max_steps=300, momentum=0.8),
    "logistic": ohg.HeavyBall(0.5, max_steps=900, momentum=0.8),
}
SMOOTH = ("ridge", "quadratic", "logistic", "network")
CONVEX = ("ridge", "quadratic", "logistic")

HYPERGRADIENTS = [
    *(Row(ohg.Implicit(ohg.CG(200, 1e-12)), EXACT, p, rtol=1e-8) for p in SMOOTH),
    *(Row(ohg.Implicit(ohg.Direct()), EXACT, p, rtol=1e-8) for p in SMOOTH),
    *(Row(ohg.Implicit(ohg.Neumann(6000)), EXACT, p, rtol=1e-6) for p in CONVEX),
    *(
        Row(ohg.Implicit(ohg.Neumann(1500, alpha="inner_lr")), TO_THE_END[p], p, rtol=1e-5)
        for p in ("ridge", "quadratic")
    ),
    *(Row(ohg.Unroll(), TO_THE_END[p], p, rtol=1e-5) for p in CONVEX),
    *(Row(ohg.Unroll(truncation=500), TO_THE_END[p], p, rtol=1e-4) for p in CONVEX),
    Row(ohg.ForwardMode(), TO_THE_END["quadratic"], "quadratic", rtol=1e-5),
    Row(ohg.ForwardGradient(None), TO_THE_END["quadratic"], "quadratic", rtol=1e-5),
    *(Row(ohg.ZerothOrder(None, central=True), EXACT, p, rtol=1e-5) for p in CONVEX),
    *(Row(ohg.Reversible(), WITH_MOMENTUM[p], p, rtol=1e-7) for p in CONVEX),
    *(
        Row(ohg.TwoPhase(ohg.Unroll(truncation=1), ohg.Unroll(), 0), TO_THE_END[p], p, rtol=1e-5)
        for p in CONVEX
    ),
    *(Row(ohg.Auto(), EXACT, p, rtol=1e-5) for p in CONVEX),
    *(
        Row(ohg.FixedPointImplicit(solver), WITH_MOMENTUM[p], p, rtol=rtol)
        for p in CONVEX
        for solver, rtol in (
            (ohg.Direct(), 1e-7),
            (ohg.Anderson(300, 1e-11, memory=15), 1e-7),
            (ohg.Picard(900, 1e-9), 1e-6),
            (ohg.Phantom(900, 1.0), 1e-6),
        )
    ),
    Row(ohg.FixedPointImplicit(ohg.Direct()), ohg.HeavyBall(0.05), "network", rtol=1e-6),
    *(
        Row(ohg.FixedPointImplicit(), solver, "ridge", error=ohg.RequirementError, message=message)
        for solver, message in (
            (None, "none was given"),
            (EXACT, "LBFGS has no step"),
            (ohg.Adam(0.1), "Adam takes another step each time"),
            (ohg.HeavyBall(lambda lam, t: 0.1), "HeavyBall with a schedule"),
        )
    ),
    Row(
        ohg.FixedPointImplicit(),
        ohg.HeavyBall("lr", max_steps=12, momentum="momentum"),
        "momentum_descent",
        error=ohg.ZeroHypergradientError,
        message=r"'lr', 'momentum' steers the inner solver .* Use Unroll",
    ),
    Row(
        ohg.FixedPointImplicit(ohg.Phantom(200, 1.0)),
        ohg.GradientDescent(20.0, max_steps=1),
        "ridge",
        error=ohg.SolverError,
        message="the terms of the series grew",
    ),
    # A multiple of the identity in place of the inverse Hessian: exact where it is one.
    Row(ohg.T1T2(), ohg.GradientDescent(0.25, max_steps=3), "isotropic", rtol=1e-12),
    Row(ohg.T1T2(0.25), EXACT, "isotropic", rtol=1e-8),
    Row(ohg.SAMA(), ohg.GradientDescent(0.25, max_steps=3), "isotropic", rtol=1e-8),
    *(
        Row(ohg.T1T2(), solver, "ridge", error=ohg.RequirementError, message=message)
        for solver, message in (
            (None, "no inner solver was given"),
            (EXACT, "LBFGS has not one fixed step size"),
            (ohg.Adam(0.1), "Adam has not one fixed step size .* SAMA"),
            (ohg.GradientDescent(lambda lam, t: 0.1), "has not one fixed step size"),
        )
    ),
    *(
        Row(ohg.SAMA(), solver, "ridge", error=ohg.RequirementError, message=message)
        for solver, message in (
            (None, "no inner solver was given"),
            (EXACT, "LBFGS has none"),
            (ohg.GradientDescent(0.1, max_steps=0), "raise max_steps"),
        )
    ),
    *(
        Row(
            estimator,
            ohg.HeavyBall(0.1, max_steps=12),
            "momentum_descent",
            error=ohg.ZeroHypergradientError,
            message=f"hypergradient of 'lr' under {type(estimator).__name__} is zero by construction",
        )
        for estimator in (ohg.SAMA(), ohg.T1T2(0.1), ohg.FixedPointImplicit())
    ),
    *(
        Row(
            estimator,
            ohg.HeavyBall("lr", max_steps=12, momentum="momentum"),
            "momentum_descent",
            error=ohg.ZeroHypergradientError,
            message=r"'lr', 'momentum' steers the inner solver .* Use Unroll",
        )
        for estimator in (ohg.SAMA(), ohg.T1T2(0.1))
    ),
    *(
        Row(estimator, EXACT, p, rtol=1e-8)
        for p in ("episodes", "two_stage")
        for estimator in (ohg.Implicit(ohg.CG(200, 1e-12)), ohg.Implicit(ohg.Direct()))
    ),
    *(Row(ohg.Unroll(), TO_THE_END[p], p, rtol=1e-7) for p in ("episodes", "two_stage")),
    *(Row(ohg.ForwardMode(), TO_THE_END[p], p, rtol=1e-7) for p in ("episodes", "two_stage")),
    Row(ohg.PerTask(ohg.Implicit(ohg.CG(6, 1e-12))), EXACT, "episodes", rtol=1e-8),
    Row(ohg.PerTask(ohg.Unroll()), TO_THE_END["episodes"], "episodes", rtol=1e-7),
    Row(
        ohg.PerTask(),
        EXACT,
        "ridge",
        error=ohg.RequirementError,
        message="takes the tasks of Episodes one by one, .* has none; use Implicit itself",
    ),
    # Proxies, fitted to the end in one estimate; ridge is curved in its hyperparameters: O(scale^2).
    Row(
        ohg.DeltaSTN(ohg.GradientDescent(0.02, max_steps=1200), rank=2),
        EXACT,
        "quadratic",
        rtol=1e-4,
    ),
    Row(
        ohg.DeltaSTN(ohg.GradientDescent(0.05, max_steps=600), scale=1e-2),
        EXACT,
        "ridge",
        rtol=1e-3,
    ),
    Row(
        ohg.Hypernetwork(ohg.GradientDescent(0.02, max_steps=1200), scale=1.0),
        EXACT,
        "quadratic",
        rtol=1e-4,
    ),
    Row(
        ohg.DeltaSTN(max_hyperparameters=11),
        EXACT,
        "ridge",
        error=ohg.RequirementError,
        message="each of 12 hyperparameters; it is refused above 11",
    ),
    Row(
        ohg.Hypernetwork(),
        EXACT,
        "momentum_descent",
        error=ohg.ZeroHypergradientError,
        message="hypergradient of 'lr' under Hypernetwork is zero by construction",
    ),
    # The inner solver's own hyperparameters: seen by unrolling, an error for the rest.
    *(
        Row(
            estimator,
            ohg.HeavyBall("lr", max_steps=12, momentum="momentum"),
            "momentum_descent",
            rtol=1e-8,
        )
        for estimator in (
            ohg.Unroll(),
            ohg.Auto(),
            ohg.ForwardMode(),
            ohg.ForwardGradient(num_directions=None),
            ohg.ForwardGradient(num_directions=None, directions="coordinate"),
        )
    ),
    Row(
        ohg.Reversible(),
        ohg.HeavyBall("lr", max_steps=12, momentum="momentum"),
        "momentum_descent",
        rtol=1e-4,  # the momentum is rounded to 2^-17
    ),
    Row(
        ohg.Implicit(),
        ohg.HeavyBall("lr", max_steps=12, momentum="momentum"),
        "momentum_descent",
        error=ohg.ZeroHypergradientError,
        message=r"'lr', 'momentum' steers the inner solver .* Use Unroll",
    ),
    Row(
        ohg.Implicit(),
        EXACT,
        "momentum_descent",
        error=ohg.ZeroHypergradientError,
        message="hypergradient of 'lr' under Implicit is zero by construction",
    ),
    *(
        Row(ohg.Unroll(), EXACT, p, error=ohg.RequirementError, message="LBFGS cannot be unrolled")
        for p in (*SMOOTH, "momentum_descent")
    ),
    *(
        Row(
            estimator,
            ohg.SketchySGD(),
            "ridge",
            error=ohg.RequirementError,
            message="SketchySGD",
        )
        for estimator in (ohg.Unroll(), ohg.ForwardMode(), ohg.Reversible())
    ),
    Row(ohg.Implicit(ohg.CG(200, 1e-12)), ohg.SketchySGD(3000, 1e-11), "quadratic", rtol=1e-8),
    *(
        Row(ohg.Unroll(), None, p, error=ohg.RequirementError, message="none was given")
        for p in (*SMOOTH, "momentum_descent")
    ),
    *(
        Row(estimator, solver, "ridge", error=ohg.RequirementError, message=message)
        for estimator in (ohg.ForwardMode(), ohg.ForwardGradient())
        for solver, message in (
            (EXACT, "cannot differentiate LBFGS: .* Use ZerothOrder"),
            (ohg.BlackBox(len), "cannot differentiate BlackBox: .* Use ZerothOrder"),
            (None, "none was given"),
        )
    ),
    Row(
        ohg.ZerothOrder(num_directions=None, central=True),
        ohg.HeavyBall("lr", max_steps=12, momentum="momentum"),
        "momentum_descent",
        rtol=1e-6,
    ),
    Row(
        ohg.ZerothOrder(),
        None,
        "ridge",
        error=ohg.RequirementError,
        message="no inner solver was given",
    ),
    *(
        Row(ohg.Reversible(), solver, "ridge", error=ohg.RequirementError, message=message)
        for solver, message in (
            (None, "none was given"),
            (EXACT, "LBFGS cannot be undone"),
            (ohg.GradientDescent(0.3), "GradientDescent cannot be undone"),
        )
    ),
    Row(
        ohg.Implicit(ohg.Neumann(5, alpha="inner_lr")),
        EXACT,
        "ridge",
        error=ohg.RequirementError,
        message="needs an inner GradientDescent",
    ),
    Row(
        ohg.Implicit(ohg.Neumann(50, alpha=50.0)),
        EXACT,
        "ridge",
        error=ohg.SolverError,
        message="converges only for alpha < 2 / lambda_max",
    ),
    Row(
        ohg.Implicit(ohg.Direct(max_size=5)),
        EXACT,
        "ridge",
        error=ohg.RequirementError,
        message="12 parameters; a dense matrix is refused above 5",
    ),
]


@dataclass(frozen=True)
class SolverRow:
    """A linear solver on one kind of matrix; a tolerance on ``x``, or a failure it must report."""

    solver: AbstractLinearSolver
    matrix: str
    rtol: float | None = None
    message: str = ""


LINEAR_SOLVERS = [
    SolverRow(ohg.CG(60, 1e-14), "spd", rtol=1e-10),
    SolverRow(ohg.CG(60, 1e-14), "identity", rtol=1e-14),
    SolverRow(ohg.CG(60, 1e-14), "low_rank_plus_identity", rtol=1e-10),
    SolverRow(ohg.CG(60), "indefinite", message="direction of curvature"),
    SolverRow(
        ohg.CG(300, 1e-13, require_convergence=True), "ill_conditioned", message="stopped after 300"
    ),
    SolverRow(
        ohg.CG(60, 1e-9, require_convergence=True, factorize_up_to=40),
        "ill_conditioned",
        rtol=1e-6,
    ),
    SolverRow(ohg.CG(60, factorize_up_to=40), "indefinite", message="direction of curvature"),
    SolverRow(ohg.CG(60), "nonsymmetric", message="needs a symmetric operator"),
    SolverRow(
        ohg.CG(3, 1e-10, require_convergence=True), "spd", message="stopped after 3 products"
    ),
    SolverRow(ohg.Neumann(3000), "spd", rtol=1e-8),
    SolverRow(ohg.Neumann(0, alpha=1.0), "identity", rtol=1e-14),
    SolverRow(ohg.Neumann(2000), "low_rank_plus_identity", rtol=1e-8),
    SolverRow(ohg.Neumann(400), "indefinite", message="Neumann series grew"),
    SolverRow(ohg.Neumann(50), "negative", message="largest eigenvalue"),
    SolverRow(ohg.Direct(), "spd", rtol=1e-10),
    SolverRow(ohg.Direct(), "identity", rtol=1e-14),
    SolverRow(ohg.Direct(), "indefinite", rtol=1e-10),
    SolverRow(ohg.Direct(), "nonsymmetric", rtol=1e-10),
    SolverRow(ohg.Direct(), "singular", message="singular"),
    SolverRow(ohg.Identity(), "identity", rtol=1e-14),
    *(
        SolverRow(ohg.GMRES(400, 1e-12, restart=None, require_convergence=True), m, rtol=1e-9)
        for m in (
            *("spd", "identity", "low_rank_plus_identity", "indefinite", "negative"),
            *("nonsymmetric", "radius_0.5", "radius_0.9", "radius_0.99"),
        )
    ),
    SolverRow(
        ohg.GMRES(3000, 1e-11, restart=10, require_convergence=True), "indefinite", rtol=1e-9
    ),
    SolverRow(
        ohg.GMRES(3000, 1e-11, restart=10, require_convergence=True), "radius_0.9", rtol=1e-9
    ),
    SolverRow(ohg.GMRES(60, 1e-10, require_convergence=True), "singular", message="standstill"),
    SolverRow(
        ohg.GMRES(500, 1e-10, restart=5, require_convergence=True),
        "ill_conditioned",
        message="standstill",
    ),
    SolverRow(
        ohg.GMRES(3, 1e-10, require_convergence=True), "spd", message="stopped after 3 steps"
    ),
    SolverRow(ohg.GMRES(restart=None, memory_budget=3_000), "spd", message="Use restart=8 or less"),
    *(
        SolverRow(ohg.MINRES(400, 1e-12, require_convergence=True), m, rtol=1e-9)
        for m in ("spd", "identity", "low_rank_plus_identity", "indefinite", "negative")
    ),
    SolverRow(ohg.MINRES(400, 1e-12, True, ohg.DiagonalPreconditioner()), "indefinite", rtol=1e-9),
    SolverRow(ohg.MINRES(), "nonsymmetric", message="needs a symmetric operator.* Use GMRES"),
    SolverRow(
        ohg.MINRES(400, require_convergence=True), "singular", message="does not lie in its range"
    ),
    SolverRow(
        ohg.MINRES(100, 1e-10, require_convergence=True), "ill_conditioned", message="stopped at"
    ),
    SolverRow(ohg.Nystrom(40, rho=1e-7), "spd", rtol=1e-6),
    SolverRow(ohg.Nystrom(10, rho=1e-2), "identity", message="x = 0 would be nearer"),
    SolverRow(ohg.Nystrom(10, rho=1e-2), "spd", message="eigenvalues that matter"),
    SolverRow(
        ohg.Nystrom(39, rho=1e-2, require_convergence=True), "spd", message="relative residual of"
    ),
    SolverRow(ohg.Nystrom(10), "negative", message="no positive curvature"),
    SolverRow(ohg.Nystrom(rho=0), "spd", message="needs damping"),
    SolverRow(ohg.Nystrom(), "nonsymmetric", message="needs a symmetric operator"),
]


@dataclass(frozen=True)
class PreconditionerRow:
    """A preconditioner of CG on one operator: the share of plain CG's steps, its own products left out,
    that it may take at most; or a failure that it must report."""

    preconditioner: AbstractPreconditioner
    operator: str
    most: float | None = None
    message: str = ""


def power_law(size: int = 300) -> AbstractLinearOperator:
    """Eigenvalues ``i^-2``, and a damping that the smallest of them do not reach."""
    q, _ = torch.linalg.qr(problems.randn(size, size, seed=3))
    matrix = q * torch.arange(1, size + 1, dtype=problems.F64) ** -2.0 @ q.T
    return DampedOperator(MatrixOperator(0.5 * (matrix + matrix.T)), 3e-6)


def scales(size: int = 60) -> AbstractLinearOperator:
    """A well conditioned matrix between diagonal ones of a wide range."""
    d = torch.logspace(0, -2, size, dtype=problems.F64)
    coupling = problems.randn(size, size, seed=4) / size
    matrix = torch.eye(size, dtype=problems.F64) + 0.2 * (coupling + coupling.T)
    return MatrixOperator(d[:, None] * matrix * d, symmetric=True)


def indefinite() -> AbstractLinearOperator:
    return MatrixOperator(-scales().matrix, symmetric=True)  # type: ignore[attr-defined]


OPERATORS: dict[str, Callable[[], AbstractLinearOperator]] = {
    "power_law": power_law,
    "scales": scales,
    "negative": indefinite,
    "layer": lambda: networks.layer().operator(),
    "perceptron": lambda: networks.perceptron().operator(),
}


def kfac(network: networks.Network, **settings: object) -> ohg.KFAC:
    given = {"loss": "squared", "damping": lambda lam: lam["decay"], **settings}
    return ohg.KFAC(network.model, lambda batch: network.x, **given)  # type: ignore[arg-type]


def gauss_newton(network: networks.Network, **settings: object) -> ohg.GaussNewtonPreconditioner:
    given = {"loss": "squared", "damping": lambda lam: lam["decay"], **settings}
    return ohg.GaussNewtonPreconditioner(network.model, lambda batch: network.x, **given)  # type: ignore[arg-type]


PRECONDITIONERS = [
    PreconditionerRow(gauss_newton(networks.layer()), "layer", most=1 / 6),
    PreconditionerRow(gauss_newton(networks.untrained_perceptron()), "perceptron", most=1 / 3),
    PreconditionerRow(
        gauss_newton(
            networks.untrained_perceptron(), targets=lambda batch: networks.untrained_perceptron().y
        ),
        "perceptron",
        most=1 / 3,
    ),
    PreconditionerRow(
        gauss_newton(networks.layer()), "scales", message="use NystromPreconditioner"
    ),
    *(
        PreconditionerRow(ohg.NystromPreconditioner(rank), "power_law", most=1.15 * steps / 260)
        for rank, steps in ((10, 152), (30, 87), (60, 52))
    ),
    PreconditionerRow(ohg.NystromPreconditioner(30, rho=1e-3), "power_law", most=0.5),
    PreconditionerRow(ohg.NystromPreconditioner(5), "negative", message="no positive curvature"),
    PreconditionerRow(
        ohg.DiagonalPreconditioner(diagonal=lambda operator: operator.matrix.diagonal()),
        "scales",
        most=0.2,
    ),
    PreconditionerRow(ohg.DiagonalPreconditioner(16), "scales", most=0.5),
    PreconditionerRow(
        ohg.DiagonalPreconditioner(), "negative", message="largest entry of the diagonal"
    ),
    PreconditionerRow(
        ohg.DiagonalPreconditioner(diagonal=lambda operator: torch.ones(3)),
        "scales",
        message=r"must return a tensor of shape \(60,\)",
    ),
    PreconditionerRow(kfac(networks.layer(), num_samples=None), "layer", most=1 / 6),
    PreconditionerRow(kfac(networks.untrained_perceptron()), "perceptron", most=1 / 3),
    PreconditionerRow(
        kfac(networks.untrained_perceptron(), num_samples=None), "perceptron", most=1 / 3
    ),
    PreconditionerRow(kfac(networks.layer()), "scales", message="use NystromPreconditioner"),
    PreconditionerRow(
        kfac(networks.layer(), prefix="body."),
        "layer",
        message="covers none of the inner parameters",
    ),
]


INNER_SOLVERS: list[tuple[AbstractInnerSolver, str, float]] = [
    (ohg.GradientDescent(0.3, max_steps=5000, rtol=1e-11), "ridge", 1e-9),
    (ohg.GradientDescent(0.25, max_steps=5000, atol=1e-10), "quadratic", 1e-8),
    (ohg.HeavyBall(0.3, max_steps=5000, momentum=0.8, rtol=1e-11), "ridge", 1e-9),
    (ohg.HeavyBall(0.2, max_steps=5000, momentum=0.8, rtol=1e-11), "quadratic", 1e-9),
    (ohg.Adam(lambda lam, t: 0.05 * 0.995**t, max_steps=4000), "ridge", 1e-6),
    (ohg.Adam(lambda lam, t: 0.2 * 0.995**t, max_steps=4000), "quadratic", 1e-6),
    (ohg.AdamW(lambda lam, t: 0.05 * 0.995**t, 4000, weight_decay=0.0), "ridge", 1e-6),
    (ohg.Lookahead(ohg.GradientDescent(0.3, max_steps=5000, rtol=1e-11)), "ridge", 1e-9),
    (ohg.Lookahead(ohg.HeavyBall(0.2, max_steps=5000, rtol=1e-11), 4), "quadratic", 1e-9),
    (ohg.NewtonCG(atol=1e-11), "ridge", 1e-9),
    (ohg.NewtonCG(atol=1e-11), "quadratic", 1e-9),
    (ohg.SketchySGD(max_steps=3000, rtol=1e-11, rank=4), "ridge", 1e-9),
    (ohg.SketchySGD(max_steps=3000, rtol=1e-11, refresh_every=7), "quadratic", 1e-9),
    (ohg.BlackBox(lambda lam: case("ridge").solution(lam)), "ridge", 1e-15),
    (ohg.LBFGS(atol=1e-11), "ridge", 1e-9),
    (ohg.LBFGS(atol=1e-11), "quadratic", 1e-9),
]


@dataclass(frozen=True)
class SingleLoopRow:
    """A single-loop or penalty method on a problem whose ``lam`` is held: near the truth after ``num_steps``."""

    estimator: AbstractHypergradientEstimator
    inner_solver: AbstractInnerSolver | None
    problem: str
    num_steps: int = 1
    rtol: float | None = None
    error: type[Exception] | None = None
    message: str = ""

    def __str__(self) -> str:
        return f"{type(self.estimator).__name__}-{type(self.inner_solver).__name__}-{self.problem}"


ONE_STEP = {
    "ridge": ohg.GradientDescent(0.5, max_steps=1),
    "quadratic": ohg.GradientDescent(0.25, max_steps=1),
    "logistic": ohg.GradientDescent(2.0, max_steps=1),
}
ONE_BATCH = {"num_inner_batches": 1, "num_outer_batches": 1}

SINGLE_LOOP = [
    *(
        SingleLoopRow(estimator, ONE_STEP[p], p, 400, rtol=1e-4)
        for estimator in (ohg.SOBA(), ohg.MASOBA(theta=0.3), ohg.SABA(**ONE_BATCH))
        for p in CONVEX
    ),
    SingleLoopRow(
        ohg.SOBA(0.25), ohg.HeavyBall(0.2, max_steps=1, momentum=0.8), "quadratic", 400, rtol=1e-7
    ),
    SingleLoopRow(
        ohg.MASOBA(lambda t: 0.25),
        ohg.Adam(lambda lam, t: 0.3 * 0.985**t, 1),
        "quadratic",
        600,
        1e-4,
    ),
    *(
        SingleLoopRow(estimator, solver, "quadratic", error=error, message=message)
        for estimator in (ohg.SOBA(), ohg.MASOBA(), ohg.SABA(**ONE_BATCH))
        for solver, error, message in (
            (None, ohg.RequirementError, "none was given that takes steps"),
            (EXACT, ohg.RequirementError, "LBFGS is none that takes steps"),
            (
                ohg.GradientDescent(0.1),
                ohg.RequirementError,
                "has max_steps=100.* pass max_steps=1",
            ),
            (ohg.Adam(0.1, max_steps=1), ohg.RequirementError, r"\(step_size=0\.1\)"),
            (
                ohg.GradientDescent(0.1, max_steps=1, weight_decay=0.1),
                ohg.RequirementError,
                "Write the decay into inner_objective",
            ),
        )
    ),
    *(
        SingleLoopRow(
            estimator,
            ohg.HeavyBall("lr", max_steps=1, momentum="momentum"),
            "momentum_descent",
            error=ohg.ZeroHypergradientError,
            message=r"'lr', 'momentum' steers the inner solver .* Use Unroll",
        )
        for estimator in (ohg.SOBA(0.1), ohg.MASOBA(0.1), ohg.SABA(0.1, **ONE_BATCH))
    ),
    SingleLoopRow(
        ohg.SABA(num_inner_batches=7, num_outer_batches=5, memory_budget=1000),
        ONE_STEP["quadratic"],
        "quadratic",
        error=ohg.RequirementError,
        message=r"7 x \(2 x 10 \+ 7\) \+ 5 x \(10 \+ 7\) numbers, 0\.0 MB.* use MASOBA",
    ),
    SingleLoopRow(
        ohg.SABA(num_inner_batches=2, num_outer_batches=1),
        ONE_STEP["quadratic"],
        "quadratic",
        error=ohg.RequirementError,
        message="draws from 2 batches, and the problem has no inner_batch",
    ),
    *(SingleLoopRow(ohg.F2SA(1e4), EXACT, p, rtol=1e-2) for p in CONVEX),
    *(SingleLoopRow(ohg.F2SA(1e3, central=True), EXACT, p, rtol=1e-4) for p in CONVEX),
    *(SingleLoopRow(ohg.PBGD(1e4), ONE_STEP[p], p, 400, rtol=1e-2) for p in CONVEX),
    *(
        SingleLoopRow(estimator, solver, "quadratic", error=error, message=message)
        for estimator in (ohg.F2SA(), ohg.PBGD(), ohg.BOME())
        for solver, error, message in (
            (None, ohg.RequirementError, "none was given"),
            (ohg.BlackBox(len), ohg.RequirementError, r"\(BlackBox\).* takes ZerothOrder"),
            (
                ohg.GradientDescent(0.1, max_steps=1, weight_decay=0.1),
                ohg.RequirementError,
                "Write the decay into inner_objective",
            ),
        )
    ),
    *(
        SingleLoopRow(estimator, EXACT, "quadratic", error=ohg.RequirementError, message=message)
        for estimator, message in (
            (ohg.PBGD(), r"given LBFGS, whose step size .*PBGD\(step_size=0\.1\)"),
            (ohg.BOME(), r"given LBFGS, whose step size .*BOME\(step_size=0\.1\)"),
        )
    ),
    *(
        SingleLoopRow(
            estimator,
            ohg.HeavyBall("lr", max_steps=1, momentum="momentum"),
            "momentum_descent",
            error=ohg.ZeroHypergradientError,
            message=r"'lr', 'momentum' steers the inner solver .* Use Unroll",
        )
        for estimator in (ohg.F2SA(), ohg.PBGD(step_size=0.1), ohg.BOME(step_size=0.1))
    ),
    SingleLoopRow(ohg.BROS(rank=0.5, theta=0.05), ONE_STEP["quadratic"], "quadratic", 400, 1e-3),
    SingleLoopRow(
        ohg.BROS(rank=3, law="orthonormal", theta=0.05), ONE_STEP["logistic"], "logistic", 400, 1e-2
    ),
    SingleLoopRow(
        ohg.BROS(),
        ONE_STEP["ridge"],
        "ridge",
        error=ohg.RequirementError,
        message="no matrix among the inner parameters, and leaves vectors whole; use MASOBA",
    ),
]
