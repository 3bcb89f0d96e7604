"""``ohg.solve``: hypergradients by ``loss.backward()``."""

from __future__ import annotations

import cases
import pytest
import torch
from problems import F64, randn, relative_error

import optuna_hypergrad as ohg


@pytest.mark.parametrize("name", ["ridge", "quadratic", "logistic", "network"])
def test_backward_through_solve_is_the_hypergradient(name: str) -> None:
    case = cases.case(name)
    lam = {k: v.clone().requires_grad_() for k, v in case.outer_params.items()}
    w = ohg.solve(
        case.problem.inner_objective,
        case.inner_params,
        lam,
        solver=cases.EXACT,
        estimator=ohg.Implicit(ohg.CG(500, 1e-12)),
    )
    case.problem.outer_objective(w, lam, None).backward()
    assert relative_error({k: v.grad for k, v in lam.items()}, cases.truth(name)) < 1e-8
    for k, v in case.inner_params.items():
        assert w[k].shape == v.shape


def test_gradients_flow_on_through_functions_of_the_hyperparameters() -> None:
    case = cases.case("ridge")
    scalar = torch.tensor(0.3, dtype=F64, requires_grad=True)
    lam = {"log_decay": case.outer_params["log_decay"] * scalar}
    w = ohg.solve(
        case.problem.inner_objective,
        case.inner_params,
        lam,
        solver=cases.EXACT,
        estimator=ohg.Implicit(ohg.CG(500, 1e-12)),
    )
    case.problem.outer_objective(w, lam, None).backward()
    exact = (
        case.truth({"log_decay": lam["log_decay"].detach()})["log_decay"]
        * case.outer_params["log_decay"]
    ).sum()
    assert float(scalar.grad) == pytest.approx(float(exact), rel=1e-8)


def test_unrolled_solve_reaches_the_initialization() -> None:
    case = cases.case("quadratic")
    w0 = {k: v.clone().requires_grad_() for k, v in case.inner_params.items()}
    solver = ohg.GradientDescent(0.2, max_steps=3)
    w = ohg.solve(
        case.problem.inner_objective, w0, case.outer_params, solver=solver, estimator=ohg.Unroll()
    )
    w["b"].sum().backward()
    at = {k: v.detach().clone().requires_grad_() for k, v in w0.items()}
    moved = at
    for _ in range(3):
        g = torch.autograd.grad(
            case.problem.inner_objective(moved, case.outer_params, None),
            list(moved.values()),
            create_graph=True,
        )
        moved = {k: v - 0.2 * d for (k, v), d in zip(moved.items(), g, strict=True)}
    exact = torch.autograd.grad(moved["b"].sum(), list(at.values()))
    assert (
        relative_error({k: v.grad for k, v in w0.items()}, dict(zip(w0, exact, strict=True)))
        < 1e-12
    )


def test_implicit_solve_refuses_a_gradient_of_the_initialization() -> None:
    case = cases.case("ridge")
    w0 = {k: v.clone().requires_grad_() for k, v in case.inner_params.items()}
    w = ohg.solve(case.problem.inner_objective, w0, case.outer_params)
    with pytest.raises(ohg.RequirementError, match="does not see where the inner solve starts"):
        w["w"].sum().backward()


def test_solve_says_so_when_the_inner_problem_is_not_solved() -> None:
    case = cases.case("ridge")
    with pytest.raises(ohg.SolverError, match="raise its max_steps"):
        ohg.solve(
            case.problem.inner_objective,
            case.inner_params,
            case.outer_params,
            solver=ohg.GradientDescent(0.01, max_steps=5, rtol=1e-6),
        )


def test_negative_curvature_is_reported_in_the_backward_pass() -> None:
    x = torch.tensor(0.5, dtype=F64, requires_grad=True)
    saddle = {"a": torch.zeros(2, dtype=F64)}
    w = ohg.solve(
        lambda w, lam, _: w["a"][0] ** 2 - w["a"][1] ** 2 + lam["x"] * w["a"].sum() * 0,
        saddle,
        {"x": x},
        solver=ohg.LBFGS(),
    )
    with pytest.raises(ohg.SolverError, match=r"damping of at least 2\.0e"):
        (w["a"] * torch.tensor([0.0, 1.0], dtype=F64)).sum().backward()


def quadratic_solution(lam: torch.Tensor, rows: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    def inner_objective(w, lam, batch):
        return 0.5 * ((rows @ w["w"] - lam["l"] * y) ** 2).sum()

    w0 = {"w": torch.zeros(rows.shape[1], dtype=rows.dtype)}
    return ohg.solve(inner_objective, w0, {"l": lam})["w"]


@pytest.mark.parametrize("size", [3, 6, 40])
@pytest.mark.parametrize("seed", range(4))
def test_a_singular_inner_problem_is_refused_however_small(size: int, seed: int) -> None:
    """With one direction free, a factorization ends with a pivot of rounding errors, and huge numbers."""
    rows, y = randn(size - 1, size, seed=seed), randn(size - 1, seed=seed + 100)
    lam = torch.ones(size - 1, dtype=F64, requires_grad=True)
    free = randn(size, seed=seed + 200)
    with pytest.raises(ohg.SolverError, match=r"positive definite|stopped after"):
        (free @ quadratic_solution(lam, rows, y)).backward()
    determined = rows.T @ randn(size - 1, seed=seed + 300)
    (determined @ quadratic_solution(lam, rows, y)).backward()
    exact = (torch.linalg.pinv(rows).T @ determined) * y
    assert float((lam.grad - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("scale", [1e20, 1.0, 1e-25, 1e-30])
@pytest.mark.parametrize(
    "solver", [ohg.CG(10), ohg.Direct(), ohg.Neumann(10, alpha=1.0), None], ids=str
)
def test_gradients_beyond_the_square_root_of_the_dtype(scale: float, solver) -> None:
    lam = torch.ones(3, requires_grad=True)
    estimator = None if solver is None else ohg.Implicit(solver)

    def inner_objective(w, lam, batch):
        return 0.5 * ((w["w"] - lam["l"]) ** 2).sum()

    w = ohg.solve(inner_objective, {"w": torch.zeros(3)}, {"l": lam}, estimator=estimator)["w"]
    (scale * w.sum()).backward()
    assert torch.allclose(lam.grad, torch.full((3,), scale), rtol=1e-5, atol=0.0)


def test_a_start_on_a_maximum_is_not_taken_for_a_solution() -> None:
    lam = torch.tensor(1.0, dtype=F64, requires_grad=True)
    with pytest.raises(ohg.SolverError, match=r"curves downwards there .* Start elsewhere"):
        ohg.solve(
            lambda w, lam, _: ((w["w"] ** 2 - lam["l"]) ** 2).sum(),
            {"w": torch.zeros(2, dtype=F64)},
            {"l": lam},
        )


def test_float32_is_solved_as_far_as_it_goes() -> None:
    x = randn(80, 6, seed=1).float() * torch.logspace(-1, 2, 6)
    y = 150 + 70 * randn(80, seed=2).float()
    lam = torch.tensor(-3.0, requires_grad=True)

    def inner_objective(w, lam, batch):
        return ((x @ w["w"] + w["b"] - y) ** 2).mean() + lam["l"].exp() * (w["w"] ** 2).sum()

    w = ohg.solve(inner_objective, {"w": torch.zeros(6), "b": torch.zeros(())}, {"l": lam})
    w["w"].sum().backward()
    wide = torch.cat([x, torch.ones(80, 1)], 1).double()
    decay = torch.diag(torch.tensor([1.0] * 6 + [0.0], dtype=F64)) * lam.detach().double().exp()
    matrix = wide.T @ wide / 80 + decay
    solution = torch.linalg.solve(matrix, wide.T @ y.double() / 80)
    slope = -torch.linalg.solve(matrix, decay @ solution)[:6].sum()
    assert float(lam.grad) == pytest.approx(float(slope), rel=1e-3)


def test_what_is_no_solver_is_refused() -> None:
    with pytest.raises(ohg.RequirementError, match="needs an inner solver such as"):
        ohg.solve(lambda w, lam, _: w["w"].sum(), {"w": torch.zeros(1)}, {}, solver="newton")
    for settings in ({"rtol": float("nan")}, {"max_steps": 2.5}, {"factorize_up_to": -1}):
        with pytest.raises(ValueError, match="CG needs"):
            ohg.CG(**settings)
    with pytest.raises(ValueError, match="NewtonCG needs"):
        ohg.NewtonCG(rtol=float("nan"))


def test_solving_twice_gives_the_same_bits() -> None:
    case = cases.case("network")
    found = []
    for _ in range(2):
        lam = {k: v.clone().requires_grad_() for k, v in case.outer_params.items()}
        w = ohg.solve(case.problem.inner_objective, case.inner_params, lam)
        case.problem.outer_objective(w, lam, None).backward()
        found.append(lam)
    for k in found[0]:
        assert torch.equal(found[0][k].grad, found[1][k].grad)
