"""The bias of an inner problem that is not solved to its end, by a Newton step, against the truth."""

from __future__ import annotations

import cases
import pytest
import torch
from problems import F64, randn, relative_error

import optuna_hypergrad as ohg

TIGHT = ohg.Implicit(ohg.CG(200, 1e-12))


def found_and_true(name: str, solver, estimator: ohg.Implicit = TIGHT):
    case = cases.case(name)
    found = ohg.inner_bias(
        case.problem,
        case.inner_params,
        case.outer_params,
        estimator=estimator,
        inner_solver=solver,
    )
    estimate = ohg.hypergradient(
        case.problem,
        case.inner_params,
        case.outer_params,
        estimator=estimator,
        inner_solver=solver,
    )
    return found, relative_error(estimate.value, cases.truth(name)), estimate


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_it_is_exact_where_the_inner_objective_is_quadratic(num_steps) -> None:
    case = cases.case("quadratic")
    found, true, estimate = found_and_true(
        "quadratic", ohg.GradientDescent(0.1, max_steps=num_steps)
    )
    assert found.relative_bias == pytest.approx(true, rel=1e-7)
    w, optimum = estimate.inner_params, case.solution(case.outer_params)
    distance = sum(float(((w[k] - optimum[k]) ** 2).sum()) for k in w) ** 0.5
    assert found.distance == pytest.approx(distance, rel=1e-8)
    assert found.inner_gradient_norm == pytest.approx(
        estimate.stats["inner_gradient_norm"], rel=1e-12
    )
    for k, v in cases.truth("quadratic").items():
        true = float((estimate.value[k] - v).norm() / v.norm())
        assert found.by_hyperparameter[k] == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize(("num_steps", "rel"), [(20, 0.3), (60, 0.03)])
def test_it_is_close_where_the_inner_objective_is_not(num_steps, rel) -> None:
    found, true, _ = found_and_true("logistic", ohg.GradientDescent(0.5, max_steps=num_steps))
    assert found.relative_bias == pytest.approx(true, rel=rel)


def test_the_mean_over_all_batches_has_no_bias_at_the_solution_of_all_data() -> None:
    """One batch does, since its own gradient is not zero there."""
    x, y, held_out = randn(24, 4, seed=0), randn(24, seed=1), randn(4, seed=2)

    def inner(w, lam, rows):
        fit = ((x[rows] @ w["w"] - y[rows]) ** 2).mean()
        return fit + lam["decay"].exp() * (w["w"] ** 2).sum()

    def parts(step: int) -> slice:
        return slice(4 * (step % 6), 4 * (step % 6) + 4)

    problem = ohg.BilevelProblem(
        inner, lambda w, lam, _: ((w["w"] - held_out) ** 2).sum(), inner_batch=parts
    )
    lam = {"decay": torch.tensor(-2.0, dtype=F64)}
    matrix = x.T @ x / 24 + lam["decay"].exp() * torch.eye(4, dtype=F64)
    w = {"w": torch.linalg.solve(matrix, x.T @ y / 24)}
    six, one = (
        ohg.inner_bias(problem, w, lam, estimator=ohg.Implicit(ohg.Direct(), num_batches=n))
        for n in (6, 1)
    )
    assert six.relative_bias < 1e-12
    assert six.inner_gradient_norm < 1e-12
    assert one.relative_bias > 0.1
    away = {"w": w["w"] + randn(4, seed=3)}
    far = ohg.inner_bias(problem, away, lam, estimator=ohg.Implicit(ohg.Direct(), num_batches=6))
    assert far.distance == pytest.approx(float((away["w"] - w["w"]).norm()), rel=1e-10)


def test_what_it_says() -> None:
    far, *_ = found_and_true("quadratic", ohg.GradientDescent(0.1, max_steps=2))
    assert "too much" in str(far)
    assert "use Unroll" in str(far)
    assert "most in 'number'" in str(far) or "most in 'vector'" in str(far)
    near, *_ = found_and_true("quadratic", cases.EXACT)
    assert "Unroll" not in str(near)
    assert near.relative_bias < 1e-8
    series, *_ = found_and_true(
        "quadratic",
        ohg.GradientDescent(0.25, max_steps=20),
        ohg.Implicit(ohg.Neumann(400, alpha="inner_lr")),
    )
    exact, *_ = found_and_true("quadratic", ohg.GradientDescent(0.25, max_steps=20))
    assert series.relative_bias == pytest.approx(exact.relative_bias, rel=1e-3)


def test_failures_are_values_and_others_are_refused() -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (w["w"] ** 4 - lam["x"] * w["w"] ** 2).sum(),
        lambda w, lam, _: ((w["w"] - 1.0) ** 2).sum(),
    )
    one = torch.ones(3, dtype=F64)
    found = ohg.inner_bias(problem, {"w": 0.1 * one}, {"x": one})
    assert not found.result
    assert "cannot be estimated" in str(found)
    assert "curvature" in str(found)
    with pytest.raises(ohg.RequirementError, match="must be Implicit"):
        ohg.inner_bias(problem, {"w": one}, {"x": one}, estimator=ohg.Unroll())
    with pytest.raises(ohg.ProblemError, match="NaN"):
        ohg.inner_bias(problem, {"w": one / 0 * 0}, {"x": one})
