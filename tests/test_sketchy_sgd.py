"""SketchySGD and its Nystrom sketch: exact where they must be, the same when continued, refusals in words."""

from __future__ import annotations

import functools
from typing import Any

import cases
import optuna
import pytest
import torch
from problems import F64, randn, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad._nystrom import nystrom
from optuna_hypergrad.inner.sketchy_sgd import _Sketch
from optuna_hypergrad.operators import MatrixOperator

Params = dict[str, Tensor]


def matrix_of(spectrum: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(randn(len(spectrum), len(spectrum), seed=seed))
    found = q @ torch.diag(spectrum) @ q.T
    return (found + found.T) / 2


def sketched(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return nystrom(MatrixOperator(matrix), rank, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_sketch_of_a_matrix_of_its_rank_is_exact(dtype: torch.dtype) -> None:
    spectrum = torch.cat([torch.tensor([50.0, 7.0, 2.0, 0.5], dtype=F64), torch.zeros(36)])
    matrix = matrix_of(spectrum).to(dtype)
    basis, eigenvalues = sketched(matrix, 6)
    error = (basis @ torch.diag(eigenvalues) @ basis.T - matrix).norm() / matrix.norm()
    assert float(error) < 1e3 * torch.finfo(dtype).eps
    assert float((basis.T @ basis - torch.eye(6)).norm()) < 100 * torch.finfo(dtype).eps
    assert torch.allclose(eigenvalues[:4], spectrum[:4].to(dtype), rtol=1e-3)


def test_the_sketch_is_below_the_matrix_and_near_its_top() -> None:
    matrix = matrix_of(torch.arange(1, 61, dtype=F64).pow(-2.0))
    basis, eigenvalues = sketched(matrix, 15)
    approximation = basis @ torch.diag(eigenvalues) @ basis.T
    assert float(torch.linalg.eigvalsh(matrix - approximation)[0]) > -1e-12
    assert float(torch.linalg.matrix_norm(matrix - approximation, 2)) < 0.04
    assert sketched(matrix, 100)[0].shape == (60, 60)


def test_negative_curvature_counts_as_none_and_nothing_is_sketched_as_nothing() -> None:
    spectrum = torch.cat([torch.tensor([9.0, 4.0, -3.0], dtype=F64), torch.zeros(27)])
    basis, eigenvalues = sketched(matrix_of(spectrum), 10)
    assert torch.allclose(eigenvalues, spectrum[:10].clamp_min(0.0), atol=1e-10)
    assert float((basis.T @ basis - torch.eye(10)).norm()) < 1e-10
    assert torch.equal(sketched(torch.zeros(8, 8, dtype=F64), 3)[1], torch.zeros(3, dtype=F64))
    assert sketched(torch.full((8, 8), torch.nan, dtype=F64), 3)[0].isnan().all()


def test_the_damping_is_the_smallest_eigenvalue_of_the_sketch_or_more() -> None:
    basis, eigenvalues = sketched(matrix_of(torch.linspace(1, 20, 20, dtype=F64)), 5)
    assert _Sketch.above(basis, eigenvalues, 1e-3).damping == float(eigenvalues[-1]) > 1
    assert _Sketch.above(basis, eigenvalues, 100.0).damping == 100.0


def test_powers_of_the_preconditioner_are_those_of_its_matrix() -> None:
    basis, eigenvalues = sketched(matrix_of(torch.logspace(-2, 2, 20, dtype=F64)), 5)
    sketch = _Sketch(basis, eigenvalues, 0.1)
    dense = basis @ torch.diag(eigenvalues) @ basis.T + 0.1 * torch.eye(20, dtype=F64)
    v = randn(20, seed=4)
    assert torch.allclose(sketch.power(v, -1.0), torch.linalg.solve(dense, v), rtol=1e-10)
    half = sketch.power(sketch.power(v, -0.5), -0.5)
    assert torch.allclose(half, torch.linalg.solve(dense, v), rtol=1e-10)


def stretched(condition: float, seed: int = 0) -> tuple[ohg.BilevelProblem, Params, Params, Tensor]:
    """Least squares on minibatches that all have the same solution, and few large eigenvalues."""
    x = randn(400, 40, seed=seed)
    scales = torch.ones(40, dtype=F64)
    scales[:6] = condition**0.5
    x = x * scales
    solution = randn(40, seed=seed + 1) / scales
    y = x @ solution

    def inner(w: Params, lam: Params, batch: Tensor) -> Tensor:
        return 0.5 * ((x[batch] @ w["w"] - y[batch]) ** 2).mean() + 0 * lam["c"]

    def batch(step: int) -> Tensor:
        return torch.randperm(400, generator=torch.Generator().manual_seed(step))[:80]

    problem = ohg.BilevelProblem(inner, lambda w, lam, _: w["w"].sum() * lam["c"], batch)
    return problem, {"w": torch.zeros(40, dtype=F64)}, {"c": torch.ones((), dtype=F64)}, solution


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_its_pace_does_not_depend_on_few_large_eigenvalues(condition: float) -> None:
    problem, w0, lam, solution = stretched(condition)
    solver = ohg.SketchySGD(max_steps=150, refresh_every=50)
    found = ohg.inner_solve(problem, solver, w0, lam)
    assert found.result.success
    assert float((found.inner_params["w"] - solution).norm() / solution.norm()) < 1e-3
    if condition > 1:
        top = condition * 2.2
        plain = ohg.inner_solve(problem, ohg.GradientDescent(1 / top, max_steps=1000), w0, lam)
        assert float((plain.inner_params["w"] - solution).norm() / solution.norm()) > 1e-2


def test_a_falling_step_comes_closer_where_batches_are_noisy() -> None:
    problem, w0, lam, solution = stretched(10.0)
    noise = {step: 0.5 * randn(40, seed=step) for step in range(1200)}
    noisy = ohg.BilevelProblem(
        lambda w, lam, b: problem.inner_objective(w, lam, b[0]) + b[1] @ w["w"],
        problem.outer_objective,
        lambda step: (problem.inner_batch(step), noise.get(step, 0 * noise[0])),
    )
    fixed, falling = (
        ohg.inner_solve(noisy, ohg.SketchySGD(1200, relative_step=r), w0, lam).inner_params["w"]
        for r in (0.5, lambda step: 0.5 / (1 + step / 20))
    )
    assert float((falling - solution).norm()) < 0.4 * float((fixed - solution).norm())
    with pytest.raises(ValueError, match="0 < relative_step < 2"):
        ohg.inner_solve(noisy, ohg.SketchySGD(relative_step=lambda step: 3.0), w0, lam)


@pytest.mark.parametrize("cut", [3, 4, 6])
def test_a_solve_in_two_parts_is_the_same_solve(cut: int) -> None:
    problem, w0, lam, _ = stretched(100.0)
    solver = ohg.SketchySGD(refresh_every=4, seed=3)
    whole = ohg.inner_solve(problem, solver, w0, lam, num_steps=10)
    first = ohg.inner_solve(problem, solver, w0, lam, num_steps=cut)
    rest = ohg.inner_solve(
        problem, solver, first.inner_params, lam, start=cut, state=first.state, num_steps=10 - cut
    )
    assert torch.equal(rest.inner_params["w"], whole.inner_params["w"])
    for role, tree in whole.state.items():
        for k, v in tree.items():
            assert torch.equal(rest.state[role][k], v)
    other = ohg.inner_solve(problem, ohg.SketchySGD(refresh_every=4), w0, lam, num_steps=10)
    assert not torch.equal(other.inner_params["w"], whole.inner_params["w"])


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    case, study = cases.case("logistic"), optuna.create_study()

    def go(num_steps: int, trial: optuna.Trial) -> ohg.BilevelResult:
        return ohg.minimize_bilevel(
            case.problem,
            case.inner_params,
            case.outer_params,
            inner_solver=ohg.SketchySGD(max_steps=3, refresh_every=5, rank=4),
            estimator=ohg.Implicit(),
            optimizer=functools.partial(torch.optim.Adam, lr=0.1),
            num_steps=num_steps,
            warm_start=True,
            trial=trial,
            checkpoint_every=1,
        )

    straight, trial = go(7, study.ask()), study.ask()
    go(3, trial)
    resumed = go(7, optuna.trial.Trial(study, trial._trial_id))
    for k, v in straight.outer_params.items():
        assert torch.equal(resumed.outer_params[k], v)
    for k, v in straight.inner_params.items():
        assert torch.equal(resumed.inner_params[k], v)


def test_it_is_trained_again_with_as_many_steps_as_the_run_took() -> None:
    problem, w0, lam, _ = stretched(10.0)
    asked: list[int] = []

    def batch(step: int) -> Tensor:
        asked.append(step)
        return problem.inner_batch(step)

    seen = ohg.BilevelProblem(
        lambda w, lam, b: (
            problem.inner_objective(w, lam, b) + 0.1 * lam["c"] ** 2 * (w["w"] ** 2).sum()
        ),
        lambda w, lam, _: ((w["w"] - 1) ** 2).sum(),
        batch,
    )
    found = ohg.minimize_bilevel(
        seen,
        w0,
        lam,
        inner_solver=ohg.SketchySGD(max_steps=4, refresh_every=8),
        estimator=ohg.Implicit(num_batches=3),
        num_steps=3,
        warm_start=True,
        final_eval="retrain",
    )
    assert found.value_kind == "warm"
    assert found.retrained_value is not None
    again = asked[len(asked) - asked[::-1].index(0) - 1 :]
    assert set(range(12)) <= set(again)


def test_single_precision_with_a_few_tensors_reaches_the_solution() -> None:
    case = cases.case("quadratic")
    w0, lam = ({k: v.float() for k, v in p.items()} for p in (case.inner_params, case.outer_params))
    problem = ohg.BilevelProblem(
        lambda w, lam, _: case.problem.inner_objective(
            {k: v.double() for k, v in w.items()}, {k: v.double() for k, v in lam.items()}, None
        ),
        lambda w, lam, _: w["b"].sum(),
    )
    found = ohg.inner_solve(problem, ohg.SketchySGD(max_steps=300, rank=3), w0, lam)
    assert all(v.dtype == torch.float32 for v in found.inner_params.values())
    exact = case.solution(case.outer_params)
    double = {k: v.double() for k, v in found.inner_params.items()}
    assert relative_error(double, exact) < 1e-4


def test_where_nothing_curves_upwards_it_says_so() -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: -(w["w"] ** 2).sum() - w["w"].sum(), lambda w, lam, _: w["w"].sum()
    )
    w0, lam = {"w": torch.zeros(3, dtype=F64)}, {"c": torch.ones((), dtype=F64)}
    with pytest.raises(ohg.SolverError, match="no direction in which inner batch 1 curves upwards"):
        ohg.inner_solve(problem, ohg.SketchySGD(), w0, lam)
    broken = ohg.BilevelProblem(
        lambda w, lam, _: (w["w"] ** 2).sum() * torch.nan, lambda w, lam, _: w["w"].sum()
    )
    assert ohg.inner_solve(broken, ohg.SketchySGD(), w0, lam).result.status.value == "nonfinite"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank >= 1"),
        ({"refresh_every": 1.5}, "refresh_every >= 1, an integer"),
        ({"seed": -1}, "seed >= 0"),
        ({"damping": 0.0}, "damping > 0"),
        ({"damping": float("nan")}, "damping > 0"),
        ({"relative_step": 2.0}, "0 < relative_step < 2"),
        ({"relative_step": "lr"}, "0 < relative_step < 2"),
        ({"max_steps": -1}, "max_steps >= 0"),
        ({"rtol": -1.0}, "rtol >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ohg.SketchySGD(**settings)
