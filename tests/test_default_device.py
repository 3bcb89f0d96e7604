"""Nothing that the library makes for itself lies on torch's default device, whatever that is.

Where it is the meta device, a tensor made without a device has no values, and whatever reads it fails.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import optuna
import problems
import pytest
import torch
from test_tables import make_matrix
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.operators import MatrixOperator

META, CPU = torch.device("meta"), torch.device("cpu")


def shortened(row: Any) -> Any:
    steps = getattr(row.inner_solver, "max_steps", 0)
    if steps <= 30 or isinstance(row.inner_solver, ohg.LBFGS | ohg.SketchySGD):
        return row.inner_solver
    return dataclasses.replace(row.inner_solver, max_steps=30)


def kind(row: Any) -> tuple[str, ...]:
    parts = row.estimator, getattr(row.estimator, "solver", None), row.inner_solver
    return tuple(type(p).__name__ for p in parts)


MATCHING = {kind(r): r for r in reversed(cases.HYPERGRADIENTS) if r.error is None}
SOLVERS = {type(r.solver): r for r in cases.LINEAR_SOLVERS if r.rtol is not None}
SINGLE_LOOP = {kind(r): r for r in cases.SINGLE_LOOP if r.error is None}


@pytest.mark.parametrize("row", MATCHING.values(), ids=str)
def test_estimator(row: cases.Row) -> None:
    case, found = cases.case(row.problem), []
    for device in (CPU, META):
        with device:
            found.append(
                ohg.hypergradient(
                    case.problem,
                    case.inner_params,
                    case.outer_params,
                    estimator=row.estimator,
                    inner_solver=shortened(row),
                ).value
            )
    assert all(torch.equal(found[1][k], v) for k, v in found[0].items())


@pytest.mark.parametrize("row", SINGLE_LOOP.values(), ids=str)
def test_two_steps_of_a_single_loop(row: cases.SingleLoopRow) -> None:
    case, found = cases.case(row.problem), []
    for device in (CPU, META):
        at = row.inner_solver, case.inner_params
        state = None
        for t in range(2):
            with device:
                estimate = row.estimator.estimate(case.problem, *at, case.outer_params, t, state)
            at, state = (row.inner_solver, estimate.inner_params), estimate.state
        found.append(estimate.value)
    assert all(torch.equal(found[1][k], v) for k, v in found[0].items())


@pytest.mark.parametrize("row", SOLVERS.values(), ids=lambda r: r.solver.name)
def test_linear_solver(row: cases.SolverRow) -> None:
    matrix = make_matrix(row.matrix)
    operator, b = MatrixOperator(matrix), problems.randn(len(matrix), seed=7)
    found = []
    for device in (CPU, META):
        with device:
            found.append(ohg.linear_solve(row.solver, operator, b).x)
    assert torch.equal(*found)


def test_study() -> None:
    def values(device: torch.device) -> list[float]:
        @ohg.differentiable
        def objective(trial: ohg.DifferentiableTrial) -> Tensor:
            x = trial.suggest_tensor("x", (3,), 1e-3, 1e3, log=True, device=CPU)
            return (x.log() - 1).pow(2).sum() + trial.suggest_float("y", -1.0, 1.0) ** 2

        study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
        with device:
            study.optimize(objective, n_trials=6)
        return [t.value for t in study.trials]

    assert values(META) == values(CPU)
