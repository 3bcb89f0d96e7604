"""``check_hypergradient``: silent for what is right, and says what is wrong; noise is not taken for an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import cases
import pytest
import torch
from problems import F64, randn

import optuna_hypergrad as ohg
from optuna_hypergrad._differences import directional_derivative, noise_level
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator

Params = dict[str, torch.Tensor]
DESCENT = ohg.HeavyBall("lr", max_steps=12, momentum="momentum")
RIGHT = [
    ("ridge", ohg.Implicit(ohg.CG(200, 1e-12)), cases.EXACT),
    ("quadratic", ohg.Implicit(ohg.Direct()), cases.EXACT),
    ("logistic", ohg.Implicit(), cases.EXACT),
    ("network", ohg.Implicit(ohg.Direct()), cases.EXACT),
    ("quadratic", ohg.Unroll(), ohg.GradientDescent(0.25, 7)),
    ("logistic", ohg.Unroll(), ohg.HeavyBall(0.5, 9, nesterov=True)),
    ("network", ohg.Unroll(), ohg.GradientDescent(0.05, 15)),
    ("momentum_descent", ohg.Unroll(), DESCENT),
    ("momentum_descent", ohg.Reversible(), DESCENT),
]


def check(problem: str, estimator: Any, solver: Any, **more: Any) -> ohg.HypergradientReport:
    case = cases.case(problem)
    given = {"inner_params": case.inner_params, "outer_params": case.outer_params, **more}
    return ohg.check_hypergradient(case.problem, estimator=estimator, inner_solver=solver, **given)


@pytest.mark.parametrize(("problem", "estimator", "solver"), RIGHT)
def test_right_estimators_pass(problem: str, estimator: Any, solver: Any) -> None:
    report = check(problem, estimator, solver)
    assert report
    assert report.ok
    assert report.conclusive
    assert report.max_relative_error < 2e-4
    assert "agrees with finite differences" in report.diagnosis
    assert {r.hyperparameter for r in report.rows} == {
        *cases.case(problem).outer_params,
        "(all together)",
    }
    report.raise_if_wrong()


@dataclass(frozen=True)
class Spoiled(AbstractHypergradientEstimator):
    """An estimator whose result passes through a function."""

    name: ClassVar[str] = "spoiled"
    base: AbstractHypergradientEstimator
    spoil: Callable[[Params, int], Params]
    seed: int = 0
    requires: frozenset[str] = field(default=frozenset())  # type: ignore[misc]

    def estimate(self, *arguments: Any, **more: Any) -> ohg.HypergradientEstimate:
        found = self.base.estimate(*arguments, **more)
        return dataclasses.replace(found, value=self.spoil(dict(found.value), self.seed))


def without_direct_term_twice(value: Params, seed: int) -> Params:
    lam = cases.case("ridge").outer_params["log_decay"]
    return {"log_decay": value["log_decay"] - 2 * 0.02 * lam}


WRONG = [
    (
        "ridge",
        without_direct_term_twice,
        cases.EXACT,
        r"no constant factor: a term is missing or has the wrong sign",
    ),
    (
        "logistic",
        lambda value, _: {k: 2 * v for k, v in value.items()},
        cases.EXACT,
        r"Wrong in 4 of 4 directions.* off by a constant factor of 2 in all directions",
    ),
    (
        "quadratic",
        lambda value, _: {k: -v for k, v in value.items()},
        cases.EXACT,
        "has the wrong sign in all directions",
    ),
    (
        "momentum_descent",
        lambda value, _: {**value, "lr": torch.zeros_like(value["lr"])},
        DESCENT,
        r"off only for 'lr', and right for 'decay', 'momentum'\. It is zero for 'lr'",
    ),
    (
        "logistic",
        lambda value, _: {**value, "weight": value["weight"].flip(0)},
        cases.EXACT,
        r"off only for 'weight', and right for 'log_decay'\.",
    ),
]


@pytest.mark.parametrize(("problem", "spoil", "solver", "message"), WRONG)
def test_wrong_estimators_are_caught_and_described(
    problem: str, spoil: Any, solver: Any, message: str
) -> None:
    base = ohg.Unroll() if solver is DESCENT else ohg.Implicit(ohg.CG(200, 1e-12))
    report = check(problem, Spoiled(base, spoil), solver)
    assert not report
    assert report.max_relative_error > 1e-2
    with pytest.raises(ohg.RequirementError, match=message):
        report.raise_if_wrong()
    with pytest.raises(ohg.RequirementError, match=message):
        check(problem, Spoiled(base, spoil), solver, throw=True)


def test_a_bias_that_was_asked_for_is_named() -> None:
    report = check("momentum_descent", ohg.Unroll(truncation=3), DESCENT)
    assert not report
    assert "truncation=3 of Unroll is a bias" in report.diagnosis
    report = check("ridge", ohg.Implicit(ohg.Direct(), damping=0.1), cases.EXACT)
    assert not report
    assert "damping=0.1 of Implicit is a bias" in report.diagnosis
    for estimator, named in (
        (ohg.T1T2(), "T1T2 puts the step of the inner solver in the place"),
        (ohg.SAMA(), "SAMA puts the step of the inner solver in the place"),
        (ohg.FixedPointImplicit(ohg.Phantom(2, 0.5)), "solver=Phantom(2, 0.5) of FixedPoint"),
    ):
        report = check("ridge", estimator, cases.TO_THE_END["ridge"], reference_solver=cases.EXACT)
        assert not report
        assert named in report.diagnosis
        assert "missing" not in report.diagnosis


def test_an_inner_problem_that_is_not_solved_is_told_from_a_wrong_gradient() -> None:
    report = check("logistic", ohg.Implicit(), ohg.GradientDescent(0.5, 20))
    assert not report
    assert "another inner solve moves w by 7 %. Raise max_steps" in report.diagnosis
    report = check(
        "logistic", ohg.Implicit(), ohg.GradientDescent(0.5, 20), reference_solver=cases.EXACT
    )
    assert not report, (
        "the estimate at an unsolved point is not the gradient of the solution, either"
    )
    assert check("logistic", ohg.Unroll(), ohg.GradientDescent(0.5, 20))


def test_a_solution_found_elsewhere_is_checked_with_a_reference_solver() -> None:
    case = cases.case("ridge")
    more = {"inner_params": case.solution(case.outer_params)}
    assert check("ridge", ohg.Implicit(), None, reference_solver=cases.EXACT, **more)
    with pytest.raises(ohg.RequirementError, match="reference_solver="):
        check("ridge", ohg.Implicit(), None, **more)


def test_noise_is_not_taken_for_a_wrong_gradient() -> None:
    case = cases.case("quadratic")
    generator = torch.Generator().manual_seed(0)

    def noisy(w: Params, lam: Params, batch: Any) -> torch.Tensor:
        noise = 10 * torch.randn((), generator=generator, dtype=F64)
        return case.problem.outer_objective(w, lam, batch) + noise

    problem = dataclasses.replace(case.problem, outer_objective=noisy)
    report = ohg.check_hypergradient(
        problem,
        case.inner_params,
        case.outer_params,
        estimator=ohg.Implicit(),
        inner_solver=cases.EXACT,
    )
    assert report.ok
    assert not report.conclusive
    assert "too noisy to tell" in report.diagnosis


def test_where_differences_do_not_converge_nothing_is_concluded() -> None:
    """From a stationary point, Adam's first steps are a sign, and its derivative there is enormous."""
    report = check("network", ohg.Unroll(), ohg.Adam(0.01, 15))
    assert report.ok
    assert not report.conclusive
    assert "too noisy to tell" in report.diagnosis


def test_single_precision_is_said_and_allowed_for() -> None:
    x, y = randn(40, 5, seed=0).float(), randn(40, seed=1).float()
    problem = ohg.BilevelProblem(
        lambda w, lam, _: ((x @ w["w"] - y) ** 2).mean() + (lam["decay"].exp() * w["w"] ** 2).sum(),
        lambda w, lam, _: ((x @ w["w"] + y) ** 2).mean(),
    )
    w0, lam = {"w": torch.zeros(5)}, {"decay": torch.full((5,), -1.0)}
    solver = ohg.GradientDescent(0.1, 300)
    for scale in (1.0, 2.0):
        spoiled = Spoiled(
            ohg.Unroll(), lambda value, _, s=scale: {k: s * v for k, v in value.items()}
        )
        report = ohg.check_hypergradient(problem, w0, lam, estimator=spoiled, inner_solver=solver)
        assert report.ok == (scale == 1.0)
        assert any("float64" in note for note in report.notes)


def test_estimates_that_are_random_are_averaged() -> None:
    def shaken(value: Params, seed: int) -> Params:
        generator = torch.Generator().manual_seed(seed)
        noise = {k: torch.randn(v.shape, generator=generator, dtype=F64) for k, v in value.items()}
        return {k: v + 0.3 * v.norm() * noise[k] / v.numel() ** 0.5 for k, v in value.items()}

    report = check("quadratic", Spoiled(ohg.Implicit(), shaken), cases.EXACT, num_estimates=64)
    assert report.ok
    assert all(r.standard_error > 0 for r in report.rows)
    assert report.max_relative_error < 0.1

    def shaken_twice(value: Params, seed: int) -> Params:
        return {k: 2 * v for k, v in shaken(value, seed).items()}

    assert not check(
        "quadratic", Spoiled(ohg.Implicit(), shaken_twice), cases.EXACT, num_estimates=64
    )


def test_points_that_the_inner_solver_refuses_are_left_out() -> None:
    """A momentum that a step of the differences moves above 1."""
    lam = {**cases.case("momentum_descent").outer_params, "momentum": torch.tensor(0.99, dtype=F64)}
    report = check("momentum_descent", ohg.Reversible(), DESCENT, outer_params=lam)
    assert report.ok
    assert report.conclusive


def test_the_report_is_a_table_with_a_sentence() -> None:
    lines = str(check("momentum_descent", ohg.Unroll(), DESCENT, num_directions=1)).splitlines()
    assert len(lines) == 6
    assert lines[0].split("  ")[0] == "direction"
    assert lines[1].startswith("lr ")
    assert lines[1].endswith("right")
    assert len({line.index("right") for line in lines[1:5]}) == 1, "aligned"
    assert lines[-1].startswith("The estimate agrees")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"num_directions": -1}, ValueError, "num_directions >= 0"),
        ({"num_estimates": 0}, ValueError, "num_estimates >= 1"),
        ({"num_estimates": "8"}, ValueError, "num_estimates >= 1, an integer"),
        ({"rtol": "0.1"}, ValueError, "rtol between 0 and 1"),
        ({"rtol": 0.0}, ValueError, "rtol between 0 and 1"),
        ({"estimator": "implicit"}, ohg.RequirementError, "checks an estimator"),
        ({"inner_solver": None}, ohg.RequirementError, "no solver was given"),
        ({"outer_params": {}}, ohg.HyperparameterError, "non-empty dict"),
        ({"inner_params": {"w": 1.0}}, ohg.ProblemError, "not a tensor"),
        ({"estimator": ohg.Implicit()}, ohg.ZeroHypergradientError, "'lr', 'momentum' steers"),
    ],
)
def test_bad_input_is_refused(more: dict[str, Any], error: type[Exception], message: str) -> None:
    case = cases.case("momentum_descent")
    given = {
        "inner_params": case.inner_params,
        "outer_params": case.outer_params,
        "estimator": ohg.Unroll(),
        "inner_solver": DESCENT,
        **more,
    }
    with pytest.raises(error, match=message):
        ohg.check_hypergradient(case.problem, **given)


def test_an_estimate_that_is_not_finite_is_no_estimate() -> None:
    with pytest.raises(ohg.SolverError, match=r"no estimate to check.* NaN or infinite"):
        check("quadratic", ohg.Unroll(), ohg.GradientDescent(100.0, 400))


ONE = {"x": torch.tensor(1.0, dtype=F64)}


def test_derivatives_come_with_their_error() -> None:
    def sine(lam: Params) -> float:
        return float((3 * lam["x"]).sin())

    assert noise_level(sine, ONE, ONE, 2e-16) < 1e-15
    found, error = directional_derivative(
        sine, ONE, ONE, middle=sine(ONE), epsilon=2e-16, rtol=1e-12
    )
    exact = 3 * float(torch.tensor(3.0, dtype=F64).cos())
    assert abs(found - exact) <= error < 1e-8
    found, error = directional_derivative(
        lambda lam: float("nan"), ONE, ONE, middle=0.0, epsilon=2e-16
    )
    assert found != found
    assert error == float("inf")


@pytest.mark.parametrize("seed", range(20))
def test_the_error_of_a_noisy_derivative_covers_it(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def noisy(lam: Params) -> float:
        return float(lam["x"] ** 3 + 1e-4 * torch.randn((), generator=generator, dtype=F64))

    noise = noise_level(noisy, ONE, ONE, 2e-16)
    assert 1e-5 < noise < 1e-3
    found, error = directional_derivative(noisy, ONE, ONE, middle=1.0, epsilon=2e-16, noise=noise)
    assert abs(found - 3) < error < 3


def test_a_kink_is_no_derivative() -> None:
    def kinked(lam: Params) -> float:
        return 2 * abs(float(lam["x"]) - 1) + float(lam["x"]) ** 2

    found, error = directional_derivative(kinked, ONE, ONE, middle=1.0, epsilon=2e-16)
    assert found == pytest.approx(2)
    assert error == pytest.approx(2)


RANDOM = ohg.ForwardGradient(1, directions="rademacher")


@pytest.mark.parametrize(
    "estimator",
    [
        RANDOM,
        ohg.TwoPhase(ohg.Unroll(), RANDOM, switch=0),
        ohg.ForwardGradient(1, control_variate=dataclasses.replace(RANDOM, seed=1)),
    ],
)
def test_random_estimators_are_judged_by_several_estimates(estimator: Any) -> None:
    one = check("momentum_descent", estimator, DESCENT)
    assert one.ok
    assert not one.conclusive
    assert "is random, and 1 of its estimates tell nothing: pass num_estimates=16" in str(one)
    several = check("momentum_descent", estimator, DESCENT, num_estimates=48)
    assert several.ok, several
    assert all(r.standard_error > 0 for r in several.rows)


@pytest.mark.parametrize(
    "estimator",
    [
        ohg.ForwardGradient(None),
        ohg.ForwardGradient(50, directions="coordinate"),
        ohg.TwoPhase(ohg.Unroll(), RANDOM),
        ohg.Auto(),
    ],
)
def test_estimators_that_are_not_random_need_one_estimate(estimator: Any) -> None:
    report = check("momentum_descent", estimator, DESCENT)
    assert report.ok
    assert report.conclusive
    assert not report.notes


def test_hyperparameters_without_entries_are_passed_over() -> None:
    case = cases.case("momentum_descent")
    outer = case.problem.outer_objective
    problem = dataclasses.replace(
        case.problem, outer_objective=lambda w, lam, b: outer(w, lam, b) + lam["none"].sum()
    )
    report = ohg.check_hypergradient(
        problem,
        case.inner_params,
        {**case.outer_params, "none": torch.zeros(0, dtype=F64)},
        estimator=ohg.Unroll(),
        inner_solver=DESCENT,
    )
    assert report.ok
    assert report.conclusive


@pytest.mark.parametrize("seed", range(4))
def test_the_noise_of_many_hyperparameters_is_not_taken_for_an_error(seed: int) -> None:
    x, y = randn(200, 5, seed=0), randn(200, seed=1)
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (lam["weight"].exp() * (x @ w["w"] - y) ** 2).mean(),
        lambda w, lam, _: ((x[:50] @ w["w"] - 1) ** 2).mean(),
    )
    report = ohg.check_hypergradient(
        problem,
        {"w": torch.zeros(5, dtype=F64)},
        {"weight": 0.1 * randn(200, seed=2)},
        estimator=ohg.ForwardGradient(8, seed=seed),
        inner_solver=ohg.GradientDescent(0.1, 10),
        num_estimates=16,
        seed=seed,
    )
    assert report.ok, str(report)
