"""``ohg.solve``: hypergradients by ``loss.backward()``."""

from __future__ import annotations

import cases
import pytest
import torch
from problems import F64, relative_error

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
    )
    with pytest.raises(ohg.SolverError, match=r"damping of at least 2\.0e"):
        (w["a"] * torch.tensor([0.0, 1.0], dtype=F64)).sum().backward()


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
