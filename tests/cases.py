"""The tables: every registered method, the problems it is held against, and how close it must come.

A new method is one row here. ``test_tables.py`` runs the rows; a guard there fails while a registered
class has none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import problems

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator
from optuna_hypergrad.ihvp import AbstractLinearSolver
from optuna_hypergrad.inner import AbstractInnerSolver


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
]


INNER_SOLVERS: list[tuple[AbstractInnerSolver, str, float]] = [
    (ohg.GradientDescent(0.3, max_steps=5000, rtol=1e-11), "ridge", 1e-9),
    (ohg.GradientDescent(0.25, max_steps=5000, atol=1e-10), "quadratic", 1e-8),
    (ohg.HeavyBall(0.3, max_steps=5000, momentum=0.8, rtol=1e-11), "ridge", 1e-9),
    (ohg.HeavyBall(0.2, max_steps=5000, momentum=0.8, rtol=1e-11), "quadratic", 1e-9),
    (ohg.Adam(lambda lam, t: 0.05 * 0.995**t, max_steps=4000), "ridge", 1e-6),
    (ohg.Adam(lambda lam, t: 0.2 * 0.995**t, max_steps=4000), "quadratic", 1e-6),
    (ohg.AdamW(lambda lam, t: 0.05 * 0.995**t, 4000, weight_decay=0.0), "ridge", 1e-6),
    (ohg.NewtonCG(atol=1e-11), "ridge", 1e-9),
    (ohg.NewtonCG(atol=1e-11), "quadratic", 1e-9),
    (ohg.BlackBox(lambda lam: case("ridge").solution(lam)), "ridge", 1e-15),
    (ohg.LBFGS(atol=1e-11), "ridge", 1e-9),
    (ohg.LBFGS(atol=1e-11), "quadratic", 1e-9),
]
