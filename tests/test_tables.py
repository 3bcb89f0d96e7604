"""Every cell of the tables in ``cases.py``, and the guard that no method goes without a row."""

from __future__ import annotations

import inspect

import cases
import problems
import pytest
import torch

import optuna_hypergrad as ohg
from optuna_hypergrad import hypergradients, ihvp, inner
from optuna_hypergrad.operators import MatrixOperator, undamped


@pytest.mark.parametrize("row", cases.HYPERGRADIENTS, ids=str)
def test_estimator_matches_the_truth_or_names_the_mismatch(row: cases.Row) -> None:
    case = cases.case(row.problem)

    def run() -> ohg.HypergradientEstimate:
        return ohg.hypergradient(
            case.problem,
            case.inner_params,
            case.outer_params,
            estimator=row.estimator,
            inner_solver=row.inner_solver,
        )

    if row.error is not None:
        with pytest.raises(row.error, match=row.message):
            run()
        return
    estimate = run()
    exact = cases.truth(row.problem)
    assert problems.relative_error(estimate.value, exact) < row.rtol
    for k, v in case.outer_params.items():
        assert estimate.value[k].shape == v.shape
        assert estimate.value[k].dtype == v.dtype


@pytest.mark.parametrize("row", cases.SINGLE_LOOP, ids=str)
def test_single_loop_reaches_the_truth_or_names_the_mismatch(row: cases.SingleLoopRow) -> None:
    case = cases.case(row.problem)
    where = case.problem, row.inner_solver

    def first() -> ohg.HypergradientEstimate:
        return ohg.hypergradient(
            case.problem,
            case.inner_params,
            case.outer_params,
            estimator=row.estimator,
            inner_solver=row.inner_solver,
        )

    if row.error is not None:
        with pytest.raises(row.error, match=row.message):
            first()
        return
    found = first()
    for t in range(1, row.num_steps):
        found = row.estimator.estimate(
            *where, found.inner_params, case.outer_params, t, found.state
        )
        assert found.result.success, found.result.message
    assert problems.relative_error(found.value, cases.truth(row.problem)) < row.rtol


@pytest.mark.parametrize("row", cases.LINEAR_SOLVERS, ids=lambda r: f"{r.solver.name}-{r.matrix}")
def test_linear_solver_converges_or_says_why_not(row: cases.SolverRow) -> None:
    matrix = make_matrix(row.matrix)
    b = problems.randn(len(matrix), seed=7)
    operator = MatrixOperator(matrix)
    if row.rtol is None:
        with pytest.raises((ohg.SolverError, ohg.RequirementError), match=row.message):
            ohg.linear_solve(row.solver, operator, b)
        return
    found = ohg.linear_solve(row.solver, operator, b)
    exact = torch.linalg.solve(matrix, b)
    assert float((found.x - exact).norm() / exact.norm()) < row.rtol
    assert found.num_products == operator.num_products


@pytest.mark.parametrize(
    "row", cases.PRECONDITIONERS, ids=lambda r: f"{r.preconditioner.name}-{r.operator}"
)
def test_preconditioner_saves_steps_or_says_why_not(row: cases.PreconditionerRow) -> None:
    operator = cases.OPERATORS[row.operator]()
    b = problems.randn(operator.size, seed=7)
    solver = ohg.CG(3000, 1e-8, require_convergence=True, preconditioner=row.preconditioner)
    if row.most is None:
        with pytest.raises((ohg.SolverError, ohg.RequirementError), match=row.message):
            ohg.linear_solve(solver, operator, b)
        return
    plain = ohg.linear_solve(ohg.CG(3000, 1e-8, require_convergence=True), operator, b)
    found = ohg.linear_solve(solver, operator, b)
    assert float((operator(found.x) - b).norm() / b.norm()) < 1e-7
    base, _ = undamped(operator)
    before = base.num_products
    inverse = row.preconditioner.build(operator)
    own = base.num_products - before
    assert found.num_products - own <= row.most * plain.num_products
    u, v = problems.randn(2, operator.size, seed=8)
    kept = u.clone()
    assert float(torch.dot(v, inverse(u)) / torch.dot(u, inverse(v)) - 1) == pytest.approx(
        0, abs=1e-8
    )
    assert float(torch.dot(u, inverse(u))) > 0
    assert torch.equal(u, kept)


@pytest.mark.parametrize(
    ("solver", "problem", "rtol"),
    cases.INNER_SOLVERS,
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_inner_solver_reaches_the_solution(
    solver: inner.AbstractInnerSolver, problem: str, rtol: float
) -> None:
    case = cases.case(problem)
    found = ohg.inner_solve(case.problem, solver, case.inner_params, case.outer_params)
    assert found.result.success, found.result.message
    assert problems.relative_error(found.inner_params, case.solution(case.outer_params)) < rtol


@pytest.mark.parametrize(
    ("registered", "table"),
    [
        (
            hypergradients.REGISTRY,
            [type(r.estimator) for r in (*cases.HYPERGRADIENTS, *cases.SINGLE_LOOP)],
        ),
        (ihvp.REGISTRY, [type(r.solver) for r in cases.LINEAR_SOLVERS]),
        (ihvp.PRECONDITIONERS, [type(r.preconditioner) for r in cases.PRECONDITIONERS]),
        (inner.REGISTRY, [type(r[0]) for r in cases.INNER_SOLVERS]),
    ],
    ids=["hypergradients", "ihvp", "preconditioners", "inner"],
)
def test_every_registered_method_has_a_row_and_a_reference(registered, table) -> None:
    for name, cls in registered.items():
        assert cls in table, f"{name} has no row in tests/cases.py"
        assert "Reference" in (inspect.getdoc(cls) or ""), (
            f"{name} does not say where it comes from"
        )


def make_matrix(kind: str, size: int = 40) -> torch.Tensor:
    eye = torch.eye(size, dtype=problems.F64)
    q, _ = torch.linalg.qr(problems.randn(size, size, seed=3))
    if kind == "identity":
        return eye
    if kind == "low_rank_plus_identity":
        u = problems.randn(size, 3, seed=4)
        return symmetric(u @ u.T + eye)
    if kind == "nonsymmetric":
        return eye + 0.3 * problems.randn(size, size, seed=5) / size**0.5
    if kind.startswith("radius_"):  # GT8: I - J of a fixed point
        jacobian = problems.randn(size, size, seed=6)
        radius = float(torch.linalg.eigvals(jacobian).abs().max())
        return eye - float(kind[len("radius_") :]) / radius * jacobian
    spectra = {
        "spd": torch.logspace(-1, 1, size, dtype=problems.F64),
        "indefinite": torch.linspace(-0.5, 5, size, dtype=problems.F64),
        "negative": -torch.linspace(0.5, 5, size, dtype=problems.F64),
        "ill_conditioned": torch.logspace(-9, 1, size, dtype=problems.F64),
        "singular": torch.linspace(0, 5, size, dtype=problems.F64),
    }
    return symmetric(q @ torch.diag(spectra[kind]) @ q.T)


def symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return 0.5 * (matrix + matrix.T)
