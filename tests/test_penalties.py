"""Methods with two inner problems and first derivatives only: F2SA, PBGD, BOME."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import cases
import optuna
import pytest
import torch
from problems import F64, Params, randn, relative_error
from test_single_loop import OnlyOnce, resumed

import optuna_hypergrad as ohg

EXACT = ohg.LBFGS(max_steps=3000, atol=1e-11)
A, T = 0.5 * randn(6, 4, seed=1), randn(6, seed=2)
W, LAM = {"w": torch.zeros(6, dtype=F64)}, {"x": torch.ones(4, dtype=F64)}


def inner(w: Params, lam: Params, _: object) -> torch.Tensor:
    return 0.5 * ((w["w"] - A @ lam["x"]) ** 2).sum() + 0.1 * (w["w"] ** 2).sum()


def outer(w: Params, lam: Params, _: object) -> torch.Tensor:
    return 0.5 * ((w["w"] - T) ** 2).sum() + 0.25 * (lam["x"] ** 2).sum()


PROBLEM = ohg.BilevelProblem(inner, outer)
BEST = torch.linalg.solve(A.T @ A / 1.44 + 0.5 * torch.eye(4, dtype=F64), A.T @ T / 1.2)


def minimized(estimator, num_steps: int, lr: float, max_steps: int) -> Params:
    return ohg.minimize_bilevel(
        PROBLEM,
        W,
        LAM,
        inner_solver=ohg.GradientDescent(0.5, max_steps=max_steps),
        estimator=estimator,
        optimizer=functools.partial(torch.optim.SGD, lr=lr),
        num_steps=num_steps,
    ).outer_params


@pytest.mark.parametrize("problem", ["quadratic", "ridge"])
@pytest.mark.parametrize(("central", "order"), [(False, 1), (True, 2)])
def test_the_bias_falls_with_its_order(problem: str, central: bool, order: int) -> None:
    case, errors = cases.case(problem), []
    for s in (100.0, 1000.0):
        found = ohg.hypergradient(
            case.problem,
            case.inner_params,
            case.outer_params,
            estimator=ohg.F2SA(s, central=central),
            inner_solver=EXACT,
        )
        errors.append(relative_error(found.value, cases.truth(problem)))
    assert math.log10(errors[0] / errors[1]) == pytest.approx(order, abs=0.03)


@pytest.mark.parametrize("central", [False, True])
def test_penalized_solutions_equal_the_closed_form(central: bool) -> None:
    s, lam = 7.0, LAM["x"]

    def solution(share: float) -> torch.Tensor:  # argmin g + share f
        return (A @ lam + share * T) / (1.2 + share)

    y, z = solution(1 / s), solution(-1 / s if central else 0.0)
    exact = 0.5 * lam + (0.5 if central else 1.0) * s * (-A.T @ (y - z))  # g_lam = -A^T (w - A lam)
    found = ohg.hypergradient(
        PROBLEM, W, LAM, estimator=ohg.F2SA(s, central=central), inner_solver=EXACT
    )
    assert relative_error(found.value, {"x": exact}) < 1e-8
    assert relative_error(found.inner_params, {"w": A @ lam / 1.2}) < 1e-8
    assert float(found.outer_value) == pytest.approx(float(outer(found.inner_params, LAM, None)))


def test_penalties_of_a_coupled_outer_objective_equal_the_closed_form() -> None:
    """``f_lam`` depends on ``w``, so it matters at which of the solutions it is taken."""
    s, lam = 7.0, LAM["x"]
    coupled = ohg.BilevelProblem(inner, lambda w, lam, _: w["w"] @ (A @ lam["x"] - T))
    z = A @ lam / 1.2
    y = z - (A @ lam - T) / (1.2 * s)
    found = ohg.hypergradient(coupled, W, LAM, estimator=ohg.F2SA(s), inner_solver=EXACT)
    assert relative_error(found.value, {"x": A.T @ y - s * A.T @ (y - z)}) < 1e-8


@pytest.mark.parametrize(
    "estimator",
    [
        ohg.PBGD(5.0),
        ohg.PBGD(5.0, same_batch=True),
        ohg.BOME(0.3),
        ohg.BOME(0.7, barrier_on="gap"),
        ohg.BOME(0.3, same_batch=False),
    ],
    ids=["pbgd", "pbgd on one batch", "bome", "bome on the gap", "bome on two batches"],
)
@pytest.mark.parametrize("returns", ["inner", "penalized"])
def test_both_variables_move_from_the_same_point(returns: str, estimator) -> None:
    """Five steps against the formulas, a new ``lam`` each, two inner steps between."""
    estimator = dataclasses.replace(estimator, returns=returns)
    one, is_bome = estimator.same_batch, isinstance(estimator, ohg.BOME)
    solver = ohg.GradientDescent(0.4, max_steps=2)

    def batch(step: int) -> torch.Tensor:
        return A @ randn(4, seed=80 + step)

    def moved(w: Params, lam: Params, batch: torch.Tensor) -> torch.Tensor:
        return inner(w, lam, batch) + 0.3 * ((w["w"] - batch) ** 2).sum()

    problem = ohg.BilevelProblem(moved, outer, batch)
    y = z = 3 * randn(6, seed=3)  # so far off that the barrier is not needed at first
    found, penalties = None, []
    for step in range(5):
        lam = randn(4, seed=40 + step)
        z = y if is_bome else z
        for i in range(2):
            z = z - 0.4 * (1.8 * z - A @ lam - 0.6 * batch(step if one else 2 * step + i))
        last = batch(step if one else 2 * step + 2)
        f_y, g_y = y - T, 1.8 * y - A @ lam - 0.6 * last
        gap = -A.T @ (y - z)
        f = float(outer({"w": y}, {"x": lam}, None))
        if is_bome:
            both = gap @ gap + g_y @ g_y
            q = moved({"w": y}, {"x": lam}, last) - moved({"w": z}, {"x": lam}, last)
            barrier = estimator.barrier * (both if estimator.barrier_on == "gradient" else q)
            s = max(0.0, float((barrier - f_y @ g_y - 0.5 * lam @ gap) / both))
            change = 0.4 * (f_y + s * g_y)
        else:
            s, change = 5.0, 0.4 * (f_y / 5.0 + g_y)
        penalties.append(s)
        found = estimator.estimate(
            problem,
            solver,
            {"w": y} if found is None else found.inner_params,
            {"x": lam},
            step,
            None if found is None else found.state,
        )
        y = y - change
        assert relative_error(found.value, {"x": 0.5 * lam + s * gap}) < 1e-12
        assert found.stats["penalty"] == pytest.approx(s, rel=1e-12)
        kept = found.state.tensors
        if returns == "inner":
            assert relative_error({"y/w": kept["y/w"]}, {"y/w": y}) < 1e-12
            assert relative_error(found.inner_params, {"w": z}) < 1e-12
            assert kept.keys() == {"y/w"}
        else:
            assert relative_error(found.inner_params, {"w": y}) < 1e-12
            assert float(found.outer_value) == pytest.approx(f, rel=1e-12)
            assert kept.keys() == (set() if is_bome else {"z/w"})
    assert not is_bome or min(penalties) == 0.0 < max(penalties)


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("warm_start", [True, False])
def test_the_penalized_solution_is_returned_where_asked_for(
    central: bool, warm_start: bool
) -> None:
    """``lam`` moves alike; ``w``, and where ``outer_value`` is taken, are those of ``argmin g + f/s``."""
    runs = {
        returns: ohg.minimize_bilevel(
            PROBLEM,
            W,
            LAM,
            inner_solver=EXACT,
            estimator=ohg.F2SA(7.0, central=central, returns=returns),
            num_steps=3,
            warm_start=warm_start,
        )
        for returns in ("inner", "penalized")
    }
    assert relative_error(runs["penalized"].outer_params, runs["inner"].outer_params) < 1e-7
    found = ohg.hypergradient(
        PROBLEM,
        W,
        LAM,
        estimator=ohg.F2SA(7.0, central=central, returns="penalized"),
        inner_solver=EXACT,
    )
    y = {"w": (A @ LAM["x"] + T / 7.0) / (1.2 + 1 / 7.0)}
    assert relative_error(found.inner_params, y) < 1e-8
    assert float(found.outer_value) == pytest.approx(float(outer(y, LAM, None)), rel=1e-8)


@pytest.mark.parametrize(
    "estimator", [ohg.F2SA(7.0), ohg.PBGD(7.0), ohg.BOME()], ids=lambda e: e.name
)
def test_a_run_ends_with_the_variable_that_it_was_asked_for(estimator) -> None:
    """A solve of the inner problem at the end would lead ``y`` away from what it has of ``f``."""
    solver, states, found = ohg.GradientDescent(0.4, max_steps=2), {}, None
    for returns in ("inner", "penalized"):
        of_kind = dataclasses.replace(estimator, returns=returns)
        states[returns] = ohg.minimize_bilevel(
            PROBLEM,
            W,
            LAM,
            inner_solver=solver,
            estimator=of_kind,
            num_steps=4,
            optimizer=functools.partial(torch.optim.SGD, lr=0.0),
        )
    for step in range(4):
        found = of_kind.estimate(
            PROBLEM,
            solver,
            W if found is None else found.inner_params,
            LAM,
            step,
            None if found is None else found.state,
        )
    assert torch.equal(states["penalized"].inner_params["w"], found.inner_params["w"])
    assert states["penalized"].outer_value < states["inner"].outer_value


def test_runs_end_at_the_solution_but_for_their_bias() -> None:
    best = {"x": BEST}
    assert relative_error(minimized(ohg.F2SA(1000.0), 50, 0.5, 20), best) < 1e-3
    assert relative_error(minimized(ohg.F2SA(100.0, central=True), 50, 0.5, 20), best) < 1e-4
    s, c = 10.0, 1.2 + 0.1  # the minimum over lam of min f + s (g - min g)
    penalized = torch.linalg.solve(
        0.5 * torch.eye(4, dtype=F64) - s * A.T @ A * (1 / c - 1 / 1.2), A.T @ T / c
    )
    assert relative_error(minimized(ohg.PBGD(s), 500, 0.02, 5), {"x": penalized}) < 1e-3
    errors = [
        relative_error(minimized(ohg.BOME(step_size=lr), round(15 / lr), lr, 15), best)
        for lr in (0.12, 0.06)
    ]
    assert errors[1] < 0.06
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.25)


def test_the_penalty_rises_by_itself() -> None:
    found = ohg.minimize_bilevel(
        PROBLEM, W, LAM, inner_solver=EXACT, estimator=ohg.F2SA(), num_steps=3
    )
    seen = [r["penalty"] for r in found.history]
    assert seen == pytest.approx([10.0, 10.0 * 2 ** (1 / 7), 10.0 * 3 ** (1 / 7)])


@pytest.mark.parametrize("warm_start", [True, False])
def test_cold_runs_begin_both_inner_problems_anew(warm_start: bool) -> None:
    """Three steps of descent leave ``y`` where it began, and that tells the two apart."""
    solver = ohg.GradientDescent(0.2, max_steps=3)
    settings = {"inner_solver": solver, "estimator": ohg.F2SA(10.0), "warm_start": warm_start}
    still = functools.partial(torch.optim.SGD, lr=0.0)
    found = ohg.minimize_bilevel(PROBLEM, W, LAM, num_steps=4, optimizer=still, **settings)
    norms = [r["hypergradient_norm"] for r in found.history]
    assert (norms[0] == norms[3]) is not warm_start


@pytest.mark.parametrize("returns", ["inner", "penalized"])
def test_a_second_phase_ends_with_the_variable_that_it_was_asked_for(returns: str) -> None:
    estimator = ohg.F2SA(2.0, returns=returns)
    settings = {"inner_solver": ohg.GradientDescent(0.2, max_steps=3), "num_steps": 5}
    expected = ohg.minimize_bilevel(PROBLEM, W, LAM, estimator=estimator, **settings)
    phases = ohg.TwoPhase(ohg.T1T2(), estimator, switch=0)
    found = ohg.minimize_bilevel(PROBLEM, W, LAM, estimator=phases, **settings)
    assert torch.equal(found.inner_params["w"], expected.inner_params["w"])


@pytest.mark.parametrize("returns", ["inner", "penalized"])
@pytest.mark.parametrize("central", [False, True])
def test_a_burn_in_is_where_all_inner_problems_begin(returns: str, central: bool) -> None:
    settings = {
        "inner_solver": ohg.GradientDescent(0.2, max_steps=3),
        "estimator": ohg.F2SA(10.0, central=central, returns=returns),
        "num_steps": 3,
    }
    found = ohg.minimize_bilevel(PROBLEM, W, LAM, burn_in=4, **settings)
    w = W["w"]
    for _ in range(4):
        w = w - 0.2 * (1.2 * w - A @ LAM["x"])
    expected = ohg.minimize_bilevel(PROBLEM, {"w": w}, LAM, **settings)
    assert relative_error(found.outer_params, expected.outer_params) < 1e-12
    assert relative_error(found.inner_params, expected.inner_params) < 1e-12


@pytest.mark.parametrize(
    ("estimator", "inner_solver"),
    [
        (ohg.F2SA(central=True), ohg.HeavyBall(0.2, max_steps=3)),
        (ohg.F2SA(lambda t: 5.0 + t), ohg.Adam(0.05, max_steps=3)),
        (ohg.PBGD(step_size=0.1), ohg.HeavyBall(0.2, max_steps=3)),
        (ohg.BOME(), ohg.GradientDescent(0.2, max_steps=3)),
        (ohg.F2SA(central=True, returns="penalized"), ohg.HeavyBall(0.2, max_steps=3)),
        (ohg.PBGD(step_size=0.1, returns="penalized"), ohg.HeavyBall(0.2, max_steps=3)),
        (ohg.BOME(returns="penalized"), ohg.GradientDescent(0.2, max_steps=3)),
    ],
    ids=lambda v: v.name,
)
def test_a_run_is_continued_bit_for_bit(estimator, inner_solver) -> None:
    resumed(estimator, inner_solver, PROBLEM, W, LAM)


@pytest.mark.parametrize(
    ("estimator", "rtol"),
    [(ohg.F2SA(1e3), 2e-2), (ohg.F2SA(1e2, central=True), 2e-2), (ohg.PBGD(1e3), 2e-2)],
    ids=lambda v: getattr(v, "name", ""),
)
def test_operations_without_second_derivatives_will_do(estimator, rtol: float) -> None:
    def once(w: Params, lam: Params, _: object) -> torch.Tensor:
        return (
            0.5 * OnlyOnce.apply(w["w"] - A @ lam["x"]).sum() + 0.1 * OnlyOnce.apply(w["w"]).sum()
        )

    problem = ohg.BilevelProblem(once, outer)
    solver, found = ohg.GradientDescent(0.5, max_steps=30), None
    for step in range(30):
        found = estimator.estimate(
            problem,
            solver,
            W if found is None else found.inner_params,
            LAM,
            step,
            None if found is None else found.state,
        )
    w = A @ LAM["x"] / 1.2
    exact = 0.5 * LAM["x"] + A.T @ (w - T) / 1.2
    assert relative_error(found.value, {"x": exact}) < rtol


def test_a_penalty_that_is_too_small_is_named() -> None:
    with pytest.raises(ohg.SolverError, match=r"F2SA, g - f/s with s=0\.5 \(raise penalty= if"):
        ohg.hypergradient(
            PROBLEM,
            W,
            LAM,
            estimator=ohg.F2SA(0.5, central=True),
            inner_solver=ohg.GradientDescent(0.3, max_steps=3000),
        )


def test_a_hyperparameter_that_is_in_neither_objective_is_named() -> None:
    lam = LAM | {"y": torch.ones(2, dtype=F64)}
    for estimator in (ohg.F2SA(), ohg.F2SA(central=True), ohg.PBGD(), ohg.BOME()):
        with pytest.raises(
            ohg.ZeroHypergradientError, match=f"'y' under {type(estimator).__name__}"
        ):
            ohg.hypergradient(
                PROBLEM, W, lam, estimator=estimator, inner_solver=ohg.GradientDescent(0.1)
            )


def test_cold_starts_of_joint_descent_are_refused() -> None:
    for estimator in (ohg.PBGD(), ohg.BOME()):
        with pytest.raises(ohg.RequirementError, match="use warm_start=True, or F2SA"):
            ohg.minimize_bilevel(
                PROBLEM,
                W,
                LAM,
                inner_solver=ohg.GradientDescent(0.1, max_steps=2),
                estimator=estimator,
                num_steps=3,
                warm_start=False,
            )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ohg.F2SA(0.0), "F2SA needs penalty to be a finite number > 0"),
        (lambda: ohg.F2SA("10"), "F2SA needs penalty to be a finite number > 0"),
        (lambda: ohg.PBGD(float("nan")), "PBGD needs penalty to be a finite number > 0"),
        (lambda: ohg.PBGD(step_size=-1.0), "PBGD needs step_size to be a finite number > 0"),
        (
            lambda: ohg.BOME(barrier_on="loss"),
            "BOME needs barrier_on to be one of 'gradient', 'gap'",
        ),
        (lambda: ohg.PBGD(returns="y"), "PBGD needs returns to be 'inner' .* or 'penalized'"),
        (lambda: ohg.F2SA(returns=None), "F2SA needs returns to be 'inner'"),
        (lambda: ohg.BOME(0.0), "BOME needs a finite barrier > 0"),
        (lambda: ohg.BOME(step_size=float("inf")), "BOME needs step_size to be a finite"),
    ],
)
def test_bad_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_check_of_the_penalized_variable_says_how_to_check() -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: ((w["w"] - lam["c"]) ** 2).sum(), lambda w, lam, _: w["w"].sum()
    )
    with pytest.raises(ohg.RequirementError, match="check it with returns='inner'"):
        ohg.check_hypergradient(
            problem,
            {"w": randn(3, seed=1)},
            {"c": randn(3, seed=2)},
            estimator=ohg.BOME(returns="penalized"),
            inner_solver=ohg.GradientDescent(0.1, 5),
        )


def test_a_checkpoint_is_not_gone_on_from_with_the_other_variable() -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: ((w["w"] - lam["c"]) ** 2).sum(), lambda w, lam, _: w["w"].square().sum()
    )
    study = optuna.create_study()
    number = study.ask()._trial_id

    def run(num_steps: int, estimator: Any) -> Any:
        return ohg.minimize_bilevel(
            problem,
            {"w": torch.zeros(3, dtype=F64)},
            {"c": torch.ones(3, dtype=F64)},
            estimator=estimator,
            inner_solver=ohg.GradientDescent(0.1, 2),
            num_steps=num_steps,
            trial=optuna.Trial(study, number),
            checkpoint_every=1,
        )

    run(2, ohg.F2SA())
    with pytest.raises(ohg.HyperparameterError, match=r"estimator .then F2SA.returns='inner'."):
        run(4, ohg.F2SA(returns="penalized"))
    assert len(run(4, ohg.F2SA()).history) == 4
