"""Differences of outer values: their bias, black boxes, and what is never a silent zero."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import cases
import numpy as np
import optuna
import problems
import pytest
import torch
from problems import F64, relative_error
from torch import Tensor

import optuna_hypergrad as ohg

Params = dict[str, Tensor]
LAM = {
    "x": torch.tensor([0.3, -0.2], dtype=F64),
    "y": torch.tensor([[0.5], [0.1], [-0.4]], dtype=F64),
}
N = 5


def value(lam: Params) -> float:
    """In NumPy."""
    x, y = np.asarray(lam["x"]), np.asarray(lam["y"])
    return float(np.exp(x).prod() + np.sin(y).sum() ** 2 + np.sin(3 * y * x[0]).sum())


def truth(lam: Params) -> Params:
    at = {k: v.clone().requires_grad_() for k, v in lam.items()}
    x, y = at.values()
    (x.exp().prod() + y.sin().sum() ** 2 + (3 * y * x[0]).sin().sum()).backward()
    return {k: v.grad for k, v in at.items()}


BOX = ohg.BlackBox(value)


def found(box: ohg.BlackBox = BOX, lam: Params = LAM, throw: bool = True, **settings: Any) -> Any:
    return ohg.hypergradient(
        box.problem(),
        box.start(),
        lam,
        estimator=ohg.ZerothOrder(**settings),
        inner_solver=box,
        throw=throw,
    )


@pytest.mark.parametrize(("central", "order"), [(False, 1), (True, 2)])
def test_the_bias_falls_with_its_order(central: bool, order: int) -> None:
    sizes = [0.08, 0.04, 0.02, 0.01, 0.005]
    errors = [
        relative_error(found(num_directions=None, mu=mu, central=central).value, truth(LAM))
        for mu in sizes
    ]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("central", [False, True])
def test_coordinates_are_plain_finite_differences(central: bool) -> None:
    mu = 1e-3
    step = mu * math.sqrt(N)  # a scaled direction
    estimate = found(num_directions=None, directions="coordinate", mu=mu, central=central)
    for k, v in LAM.items():
        for i in range(v.numel()):
            unit = torch.zeros(v.numel(), dtype=F64)
            unit[i] = step
            ahead = value({**LAM, k: v + unit.reshape(v.shape)})
            behind = value({**LAM, k: v - unit.reshape(v.shape)}) if central else value(LAM)
            plain = (ahead - behind) / (step * (2 if central else 1))
            assert float(estimate.value[k].reshape(-1)[i]) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("central", [False, True])
def test_orthogonal_directions_agree_with_plain_finite_differences(central: bool) -> None:
    estimate = found(num_directions=100, mu=1e-6, central=central)
    assert relative_error(estimate.value, truth(LAM)) < (1e-8 if central else 1e-5)
    assert estimate.stats["num_inner_solves"] == 1 + N * (2 if central else 1)
    assert float(estimate.outer_value) == value(LAM)


def test_any_inner_solver_will_do() -> None:
    """The steps that it takes as well: what is seen is the iterate."""
    case = cases.case("logistic")
    solver = ohg.Adam("lr", 20)
    lam = {**case.outer_params, "lr": torch.tensor(0.1, dtype=F64)}
    exact, estimate = (
        ohg.hypergradient(case.problem, case.inner_params, lam, estimator=e, inner_solver=solver)
        for e in (ohg.Unroll(), ohg.ZerothOrder(None, central=True))
    )
    assert relative_error(estimate.value, exact.value) < 1e-5
    assert relative_error(estimate.inner_params, exact.inner_params) < 1e-12
    assert estimate.state.inner_index == 20


def test_the_same_directions_as_forward_gradients() -> None:
    case = cases.case("logistic")
    solver = ohg.HeavyBall(0.3, 10)
    forward, differences = (
        ohg.hypergradient(
            case.problem,
            case.inner_params,
            case.outer_params,
            estimator=e,
            inner_solver=solver,
            step=4,
        )
        for e in (ohg.ForwardGradient(3, seed=8), ohg.ZerothOrder(3, seed=8, central=True))
    )
    assert relative_error(differences.value, forward.value) < 1e-5


def test_processes_share_directions() -> None:
    estimator = ohg.ZerothOrder(4)
    problem, w = BOX.problem(), BOX.start()
    parts = [
        estimator.partial(problem, BOX, w, LAM, 2, directions=numbers)
        for numbers in estimator.shares(w, LAM, 3)
    ]
    together = estimator.combine(LAM, parts[1], torch.cat([p.scalars for p in parts]))
    alone = estimator.estimate(problem, BOX, w, LAM, 2)
    for k in LAM:
        assert torch.equal(together.value[k], alone.value[k])


# black boxes ------------------------------------------------------------------------------------


def ridge_box(convert: Any = lambda v: v.numpy()) -> ohg.BlackBox:
    case = cases.case("ridge")
    return ohg.BlackBox(lambda lam: {k: convert(v) for k, v in case.solution(lam).items()})


def test_a_black_box_may_return_the_inner_solution() -> None:
    case = cases.case("ridge")
    box = ridge_box()
    estimate = ohg.hypergradient(
        box.problem(case.problem.outer_objective),
        case.inner_params,
        case.outer_params,
        estimator=ohg.ZerothOrder(None, central=True),
        inner_solver=box,
    )
    assert relative_error(estimate.value, cases.truth("ridge")) < 1e-6
    assert relative_error(estimate.inner_params, case.solution(case.outer_params)) < 1e-14


def test_a_black_box_cannot_change_the_hyperparameters() -> None:
    def careless(lam: Params) -> float:
        result = value(lam)
        lam["x"] += 1.0
        return result

    estimate = found(ohg.BlackBox(careless), num_directions=None, central=True)
    assert relative_error(estimate.value, truth(LAM)) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("central", [False, True])
def test_values_that_are_not_finite_fail_and_name_the_black_box(bad: float, central: bool) -> None:
    def fragile(lam: Params) -> float:
        seen.append(lam)
        return bad if len(seen) == 3 else value(lam)

    seen: list[Params] = []
    estimate = found(ohg.BlackBox(fragile), central=central, throw=False)
    assert estimate.result.status is ohg.Status.NONFINITE
    assert "The black box fragile returned" in estimate.result.message
    assert f"{bad}" in estimate.result.message
    assert "'x' in [" in estimate.result.message
    assert all(v.isnan().all() for v in estimate.value.values())
    assert len(seen) == 3


def test_a_solution_that_is_not_finite_fails_too() -> None:
    case = cases.case("ridge")
    box = ridge_box(lambda v: torch.full_like(v, math.nan))
    with pytest.raises(ohg.SolverError, match="NaN or infinite entries in 'w' for 'log_decay' in"):
        ohg.hypergradient(
            box.problem(case.problem.outer_objective),
            case.inner_params,
            case.outer_params,
            estimator=ohg.ZerothOrder(),
            inner_solver=box,
        )


def test_an_outer_value_that_is_not_finite_names_the_direction() -> None:
    case = cases.case("ridge")
    box = ridge_box()

    def outer(w: Params, lam: Params, batch: Any) -> Tensor:
        start = torch.equal(lam["log_decay"], case.outer_params["log_decay"])
        return w["w"].sum() * (1.0 if start else math.nan)

    with pytest.raises(ohg.SolverError, match=r"is nan at lam \+ 0.0001 v, v being direction 0"):
        ohg.hypergradient(
            box.problem(outer),
            case.inner_params,
            case.outer_params,
            estimator=ohg.ZerothOrder(),
            inner_solver=box,
        )


@pytest.mark.parametrize("central", [False, True])
def test_values_that_stay_the_same_are_no_silent_zero(central: bool) -> None:
    box = ohg.BlackBox(lambda lam: round(value(lam), 1))
    with pytest.raises(ohg.SolverError, match=r"to the last bit .* piecewise constant"):
        found(box, central=central)


def test_a_minimum_is_a_zero() -> None:
    box = ohg.BlackBox(lambda lam: float((lam["x"] ** 2).sum()))
    lam = {"x": torch.zeros(2, dtype=F64)}
    assert torch.equal(
        found(box, lam, num_directions=1, central=True).value["x"], torch.zeros(2, dtype=F64)
    )


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "<lambda> returned None; return a number"),
        (np.zeros(3), r"returned array\(\[0., 0., 0.\]\); return a number"),
        ({"w": np.zeros(2)}, r"returned \{'w'.*problem\(\) and black_box.start\(\)"),
        ({"value": np.float32(1.0)}, r"float32.*and inner_params are .*float64"),
    ],
)
def test_what_is_no_answer_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(ohg.ObjectiveError, match=message):
        found(ohg.BlackBox(lambda lam: returned))


@pytest.mark.parametrize("estimator", [ohg.Unroll(), ohg.ForwardMode(), ohg.Implicit()])
def test_other_estimators_refuse_black_boxes(estimator: Any) -> None:
    with pytest.raises(ohg.HypergradError, match=r"BlackBox|ZerothOrder"):
        ohg.hypergradient(BOX.problem(), BOX.start(), LAM, estimator=estimator, inner_solver=BOX)
    with pytest.raises(ohg.RequirementError, match="cannot be unrolled; use ZerothOrder"):
        ohg.inner_solve(BOX.problem(), BOX, BOX.start(), LAM, create_graph=True)


# rounding and settings --------------------------------------------------------------------------


def test_a_mu_below_the_rounding_of_a_hyperparameter_is_refused() -> None:
    single = {k: 1e3 * v.float() for k, v in LAM.items()}
    with pytest.raises(ohg.RequirementError, match=r"rounding of 'x'.*4e-05 apart.*raise mu"):
        found(lam=single, mu=1e-4)
    found(lam={k: v.float() for k, v in LAM.items()}, mu=1e-2)


def test_differences_that_drown_in_rounding_are_warned_of() -> None:
    case = cases.case("ridge")
    single = {k: v.float() for k, v in case.outer_params.items()}

    def outer(w: Params, lam: Params, batch: Any) -> Tensor:
        return 1e3 + w["w"].sum() + lam["log_decay"].sum()

    problem = ohg.BilevelProblem(lambda w, lam, _: ((w["w"] - 1) ** 2).sum(), outer)
    w = {"w": torch.zeros(3)}
    with pytest.warns(UserWarning, match=r"rounded by about 0.0001 in torch.float32: raise mu"):
        ohg.hypergradient(
            problem,
            w,
            single,
            estimator=ohg.ZerothOrder(mu=1e-4),
            inner_solver=ohg.GradientDescent(0.1, 3),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 0.0}, "finite mu > 0, got 0.0"),
        ({"mu": -1e-4}, "finite mu > 0"),
        ({"mu": math.nan}, "finite mu > 0"),
        ({"mu": "1e-4"}, "finite mu > 0, got '1e-4'"),
        ({"num_directions": 0}, "ZerothOrder needs num_directions >= 1"),
        ({"directions": "hadamard"}, "ZerothOrder needs directions to be one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ohg.ZerothOrder(**settings)


# the outer loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["black box", "LBFGS"])
def test_an_interrupted_run_goes_on_bit_for_bit(inner: str, tmp_path: Path) -> None:
    case = cases.case("ridge")

    def go(num_steps: int, trial: optuna.Trial | None = None) -> ohg.BilevelResult:
        settings: dict[str, Any] = {"num_steps": num_steps, "trial": trial, "checkpoint_every": 3}
        if inner == "black box":
            return ohg.minimize_bilevel(
                BOX.problem(),
                BOX.start(),
                LAM,
                inner_solver=BOX,
                estimator=ohg.ZerothOrder(2),
                bounds={"x": (-1.0, 1.0), "y": (-1.0, 1.0)},
                **settings,
            )
        return ohg.minimize_bilevel(
            case.problem,
            case.inner_params,
            case.outer_params,
            inner_solver=dataclasses.replace(cases.EXACT),
            estimator=ohg.ZerothOrder(2, "rademacher", central=True),
            **settings,
        )

    straight = go(12)
    assert straight.outer_value < straight.history[0]["outer_value"]
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    trial = study.ask()
    go(6, trial)
    resumed = go(12, optuna.trial.Trial(study, trial._trial_id))
    assert [h["outer_value"] for h in resumed.history] == [
        h["outer_value"] for h in straight.history
    ]
    for k in straight.outer_params:
        assert torch.equal(resumed.outer_params[k], straight.outer_params[k])


@pytest.mark.parametrize("which", ["inner", "outer"])
def test_objectives_that_are_not_the_same_twice_are_refused(which: str) -> None:
    case = problems.ridge()

    def noisy(objective: Any) -> Any:
        return lambda w, lam, batch: objective(w, lam, batch) * (1 + 0.1 * torch.rand(()))

    objectives = {"inner": case.problem.inner_objective, "outer": case.problem.outer_objective}
    objectives[which] = noisy(objectives[which])
    with pytest.raises(
        ohg.RequirementError, match=rf"{which}_objective gave .* and then .*dropout"
    ):
        ohg.hypergradient(
            ohg.BilevelProblem(*objectives.values()),
            case.inner_params,
            case.outer_params,
            estimator=ohg.ZerothOrder(2),
            inner_solver=ohg.GradientDescent(0.1, 5),
        )


def test_an_outer_objective_may_take_derivatives_of_its_own() -> None:
    """As a residual of a differential equation does."""

    def residual(w: Any, lam: Any, _: Any) -> Any:
        x = torch.linspace(0, 1, 5, dtype=torch.float64, requires_grad=True)
        u = (w["w"] * x.sin()).sum()
        (slope,) = torch.autograd.grad(u, x, create_graph=True)
        return (slope - 1).square().mean()

    problem = ohg.BilevelProblem(lambda w, lam, _: ((w["w"] - lam["x"]) ** 2).sum(), residual)
    given = [{k: torch.full((), 0.3, dtype=torch.float64)} for k in "wx"]
    solver = ohg.GradientDescent(0.1, 5)
    for estimator in ohg.ZerothOrder(), ohg.Unroll():
        found = ohg.minimize_bilevel(
            problem, *given, inner_solver=solver, estimator=estimator, num_steps=2
        )
        assert found.result


def test_hyperparameters_smaller_than_the_step_are_pointed_out() -> None:
    box = ohg.BlackBox(lambda lam: float(lam["x"].square().sum()))
    given = box.problem(), box.start(), {"x": torch.full((3,), 1e-6, dtype=torch.float64)}
    with pytest.warns(
        UserWarning, match=r"moves 'x' by more than its largest entry, 1e-06.*lower mu"
    ):
        ohg.hypergradient(*given, estimator=ohg.ZerothOrder(), inner_solver=box)
    ohg.hypergradient(*given, estimator=ohg.ZerothOrder(mu=1e-7), inner_solver=box)


def test_running_statistics_that_leak_into_the_outer_value_are_refused() -> None:
    torch.manual_seed(0)
    net, x = torch.nn.BatchNorm1d(3, affine=False).double(), torch.randn(8, 3, dtype=F64)

    def train(w: Any, lam: Any, _: Any) -> Tensor:
        return ((net.train()(x @ w["w"]) - lam["x"]) ** 2).mean() + (w["w"] ** 2).mean()

    problem = ohg.BilevelProblem(train, lambda w, lam, _: (net.eval()(x @ w["w"]) ** 2).mean())
    with pytest.raises(ohg.RequirementError, match=r"outer_objective gave .*running statistics"):
        ohg.hypergradient(
            problem,
            {"w": torch.eye(3, dtype=F64)},
            {"x": torch.ones(3, dtype=F64)},
            estimator=ohg.ZerothOrder(),
            inner_solver=ohg.GradientDescent(0.1, 3),
        )
