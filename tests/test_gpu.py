"""On a GPU: the tables of ``cases.py``, memory by the number of inner steps, studies that are resumed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import cases
import networks
import optuna
import problems
import pytest
import torch
from sklearn.datasets import load_digits
from test_tables import make_matrix
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator
from optuna_hypergrad.inner import AbstractInnerSolver
from optuna_hypergrad.operators import MatrixOperator

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
MATCHING = [r for r in cases.HYPERGRADIENTS if r.error is None]
REACHING = [r for r in cases.SINGLE_LOOP if r.error is None]


@functools.cache
def case(name: str) -> problems.Case:
    with GPU:
        return getattr(problems, name)()


def error_on_the_cpu(found: ohg.Params, name: str) -> float:
    assert all(v.device.type == GPU.type for v in found.values())
    return problems.relative_error({k: v.cpu() for k, v in found.items()}, cases.truth(name))


@pytest.mark.parametrize("default", [False, True], ids=["tensors", "default device"])
@pytest.mark.parametrize("row", MATCHING, ids=str)
def test_estimator_matches_the_truth(row: cases.Row, default: bool) -> None:
    """With tensors on the GPU alone; and with the GPU as torch's default device."""
    on_gpu = case(row.problem)
    with GPU if default else torch.device("cpu"):
        found = ohg.hypergradient(
            on_gpu.problem,
            on_gpu.inner_params,
            on_gpu.outer_params,
            estimator=row.estimator,
            inner_solver=row.inner_solver,
        )
    assert error_on_the_cpu(found.value, row.problem) < row.rtol


@pytest.mark.parametrize("row", REACHING, ids=str)
def test_single_loop_reaches_the_truth(row: cases.SingleLoopRow) -> None:
    on_gpu = case(row.problem)
    where = on_gpu.problem, row.inner_solver
    w, state = on_gpu.inner_params, None
    for t in range(row.num_steps):
        found = row.estimator.estimate(*where, w, on_gpu.outer_params, t, state)
        assert found.result.success, found.result.message
        w, state = found.inner_params, found.state
    assert error_on_the_cpu(found.value, row.problem) < row.rtol


@pytest.mark.parametrize("row", cases.INNER_SOLVERS, ids=lambda r: f"{r[0].name}-{r[1]}")
def test_inner_solver_reaches_the_solution(row: tuple[AbstractInnerSolver, str, float]) -> None:
    solver, name, rtol = row
    if isinstance(solver, ohg.BlackBox):
        pytest.skip("its function is one of the CPU's")
    on_gpu = case(name)
    found = ohg.inner_solve(on_gpu.problem, solver, on_gpu.inner_params, on_gpu.outer_params)
    assert found.result.success, found.result.message
    exact = cases.case(name).solution(cases.case(name).outer_params)
    on_cpu = {k: v.cpu() for k, v in found.inner_params.items()}
    assert problems.relative_error(on_cpu, exact) < rtol


@pytest.mark.parametrize("row", [r for r in cases.LINEAR_SOLVERS if r.rtol is not None], ids=str)
def test_linear_solver_converges(row: cases.SolverRow) -> None:
    matrix = make_matrix(row.matrix)
    b = problems.randn(len(matrix), seed=7)
    found = ohg.linear_solve(row.solver, MatrixOperator(matrix.to(GPU)), b.to(GPU))
    exact = torch.linalg.solve(matrix, b)
    assert float((found.x.cpu() - exact).norm() / exact.norm()) < row.rtol


@pytest.mark.parametrize("build", [cases.kfac, cases.gauss_newton], ids=["kfac", "gauss_newton"])
def test_layerwise_preconditioner_is_that_of_the_cpu(build: Callable[..., object]) -> None:
    on_cpu = networks.perceptron()
    on_gpu = networks.Network(
        copy.deepcopy(on_cpu.model).to(GPU),
        on_cpu.x.to(GPU),
        on_cpu.y.to(GPU),
        {k: v.to(GPU) for k, v in on_cpu.inner_params.items()},
    )
    found = []
    for network, device in ((on_cpu, torch.device("cpu")), (on_gpu, GPU)):
        solver = ohg.CG(500, 1e-10, require_convergence=True, preconditioner=build(network))
        with device:
            operator = network.operator(0.1)
        b = problems.randn(operator.size, seed=7).to(device)
        found.append(ohg.linear_solve(solver, operator, b))
    assert found[0].num_products == found[1].num_products
    assert float((found[1].x.cpu() - found[0].x).norm() / found[0].x.norm()) < 1e-8


FLAT = {
    "ForwardGradient": (ohg.ForwardGradient(8, width=8, memory_budget=1e9), 1.1),
    "Reversible": (ohg.Reversible(), 1.3),
    "tree": (ohg.Unroll(recompute="tree"), 3.0),
}


@pytest.mark.parametrize("name", FLAT)
def test_memory_hardly_grows_with_the_inner_steps(name: str) -> None:
    """By torch's allocator, from 10 to 300 inner steps; the tape of all of them grows thirtyfold."""
    estimator, most = FLAT[name]
    few, many = (peak(estimator, steps) for steps in (10, 300))
    assert many < most * few
    if name == "tree":
        tape = ohg.Unroll(recompute="never")
        assert peak(tape, 300) > 15 * peak(tape, 10)


def peak(estimator: AbstractHypergradientEstimator, num_steps: int) -> int:
    """Bytes above what there was before, of a decay per weight of a network of 100,000."""
    x = problems.randn(256, 300, seed=0).float().to(GPU)
    w = {
        "first": 0.05 * problems.randn(300, 300, seed=1).float().to(GPU),
        "last": 0.05 * problems.randn(300, 10, seed=2).float().to(GPU),
    }
    lam = {k: torch.full_like(v, -6.0) for k, v in w.items()}

    def loss(w: ohg.Params, lam: ohg.Params, batch: object) -> Tensor:
        decay = sum((lam[k].exp() * v**2).sum() for k, v in w.items())
        return ((x @ w["first"]).tanh() @ w["last"]).square().mean() + decay

    def run() -> None:
        problem = ohg.BilevelProblem(loss, loss)
        solver = ohg.HeavyBall(1e-3, momentum=0.9, max_steps=num_steps)
        ohg.hypergradient(problem, w, lam, estimator=estimator, inner_solver=solver)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def test_compiled_solve_and_tape_are_the_eager_ones() -> None:
    on_gpu = case("logistic")
    where = on_gpu.problem, on_gpu.inner_params, on_gpu.outer_params
    steps = ohg.GradientDescent(0.5, max_steps=20)
    for eager, compiled in (
        (ohg.Unroll(recompute="never"), ohg.Unroll(recompute="never", compile=True)),
        (ohg.Implicit(ohg.CG(20, 1e-10)), ohg.Implicit(ohg.CG(20, 1e-10), compile=True)),
    ):
        a, b = (
            ohg.hypergradient(*where, estimator=e, inner_solver=steps).value
            for e in (eager, compiled)
        )
        assert problems.relative_error(b, a) < 1e-8


@pytest.mark.parametrize("size", [50, 100_000])
def test_a_study_of_tensors_on_the_gpu_is_resumed_bit_for_bit(size: int, tmp_path: Path) -> None:
    target = problems.randn(size, seed=3).to(GPU)

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        x = trial.suggest_tensor("x", (size,), -3.0, 3.0, dtype=problems.F64, device=GPU)
        shift = trial.suggest_float("shift", -1.0, 1.0)
        assert x.device.type == GPU.type
        return ((x - target).pow(4) + (x * shift.to(GPU)).sin()).sum()

    def run(name: str, *parts: int) -> optuna.Study:
        for num_trials in parts:
            study = optuna.create_study(
                storage=f"sqlite:///{tmp_path / name}.db",
                study_name="s",
                load_if_exists=True,
                sampler=ohg.HypergradientSampler(seed=0),
            )
            study.optimize(objective, n_trials=num_trials)
        return study

    whole, resumed = run("whole", 12), run("parts", 5, 7)
    assert whole.best_value < whole.trials[0].value
    assert [t.value for t in whole.trials] == [t.value for t in resumed.trials]
    a, b = (ohg.load_tensors(s)["x"] for s in (whole, resumed))
    assert torch.equal(a, b)


def test_a_long_run_on_the_gpu_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    on_gpu = case("logistic")

    def objective(trial: optuna.Trial, num_steps: int) -> ohg.BilevelResult:
        return ohg.minimize_bilevel(
            on_gpu.problem,
            on_gpu.inner_params,
            on_gpu.outer_params,
            inner_solver=ohg.HeavyBall(0.2, momentum=0.8, max_steps=5),
            estimator=ohg.Implicit(ohg.Neumann(10)),
            num_steps=num_steps,
            checkpoint_every=4,
            trial=trial,
        )

    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}")
    straight = objective(study.ask(), 12)
    trial = study.ask()
    objective(trial, 8)
    resumed = objective(optuna.trial.Trial(study, trial._trial_id), 12)
    for k, v in straight.outer_params.items():
        assert v.device.type == GPU.type
        assert torch.equal(resumed.outer_params[k], v)
    assert [h["outer_value"] for h in resumed.history] == [
        h["outer_value"] for h in straight.history
    ]


def test_a_network_trains_on_the_gpu_by_itself_and_comes_back() -> None:
    x, y = load_digits(return_X_y=True)
    network = ohg.HypergradientClassifier(hidden_layer_sizes=(64,), max_iter=20, random_state=0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert network.fit(x[:1000] / 16, y[:1000]).score(x[1000:] / 16, y[1000:]) > 0.85
    assert torch.cuda.max_memory_allocated() > before + x[:1000].size * 4
    assert next(network.module_.parameters()).device.type == "cpu"
