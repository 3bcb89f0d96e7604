"""What a linear solve hands to that of the next outer step: its solution, and its preconditioner."""

from __future__ import annotations

import functools

import cases
import networks
import optuna
import problems
import pytest
import torch
from problems import F64, relative_error

import optuna_hypergrad as ohg

ADAM = functools.partial(torch.optim.Adam, lr=0.05)
INNER = ohg.LBFGS(max_steps=200, atol=1e-7)
WARM = ohg.Implicit(ohg.CG(200, 1e-10), warm_start_solver=True)
KEPT = ohg.Implicit(ohg.CG(6, 0.0, preconditioner=ohg.NystromPreconditioner(4, refresh_every=4)))
BOTH = ohg.Implicit(
    ohg.CG(6, 0.0, preconditioner=ohg.DiagonalPreconditioner(4, refresh_every=3)),
    warm_start_solver=True,
)


def run(estimator: ohg.Implicit, num_steps: int = 8, **settings: object) -> ohg.BilevelResult:
    case = cases.case("logistic")
    return ohg.minimize_bilevel(
        case.problem,
        case.inner_params,
        case.outer_params,
        inner_solver=INNER,
        estimator=estimator,
        num_steps=num_steps,
        **{"optimizer": ADAM, **settings},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("warm_start", [True, False])
def test_a_warm_solve_takes_fewer_products_to_the_same_answer(warm_start: bool) -> None:
    case, solver = problems.ridge(80, 60), ohg.CG(200, 1e-4)
    warm, cold = (
        ohg.minimize_bilevel(
            case.problem,
            case.inner_params,
            case.outer_params,
            inner_solver=INNER,
            estimator=estimator,
            optimizer=functools.partial(torch.optim.Adam, lr=0.003),
            num_steps=6,
            warm_start=warm_start,
        )
        for estimator in (ohg.Implicit(solver, warm_start_solver=True), ohg.Implicit(solver))
    )
    assert relative_error(warm.outer_params, cold.outer_params) < 1e-4
    products = [[h["num_hvps"] for h in found.history] for found in (warm, cold)]
    assert products[0][0] == products[1][0]
    assert sum(products[0][1:]) < 0.8 * sum(products[1][1:])


def test_a_fixed_number_of_steps_gets_nearer_from_the_last_solution() -> None:
    case = cases.case("ridge")
    exact = case.truth(case.outer_params)
    w = case.solution(case.outer_params)
    estimator = ohg.Implicit(ohg.Neumann(3), warm_start_solver=True)
    state, errors = None, []
    for _ in range(6):
        found = ohg.hypergradient(
            case.problem, w, case.outer_params, estimator=estimator, state=state
        )
        state = found.state
        errors.append(relative_error(found.value, exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_a_preconditioner_is_made_every_kth_outer_step() -> None:
    products = [h["num_hvps"] for h in run(KEPT, num_steps=9).history]
    assert products == [10, 6, 6, 6, 10, 6, 6, 6, 10]


@pytest.mark.parametrize("estimator", [WARM, KEPT, BOTH], ids=["warm", "kept", "both"])
@pytest.mark.parametrize("warm_start", [True, False])
def test_an_interrupted_run_goes_on_bit_for_bit(
    estimator: ohg.Implicit, warm_start: bool, tmp_path
) -> None:
    straight = run(estimator, warm_start=warm_start)
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    run(estimator, 5, trial=trial, checkpoint_every=3, warm_start=warm_start)
    loaded = optuna.load_study(study_name=study.study_name, storage=storage)
    again = optuna.trial.Trial(loaded, trial._trial_id)
    resumed = run(estimator, trial=again, checkpoint_every=3, warm_start=warm_start)
    for k in ("outer_value", "num_hvps", "residual"):
        assert [h[k] for h in resumed.history] == [h[k] for h in straight.history]
    for k, v in straight.outer_params.items():
        assert torch.equal(resumed.outer_params[k], v)


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (cases.kfac, "kfac_passes"),
        (functools.partial(cases.gauss_newton, rank=40), "gauss_newton_passes"),
    ],
    ids=["kfac", "gauss_newton"],
)
def test_factors_of_a_network_are_kept_and_resumed_too(make, passes: str, tmp_path) -> None:
    net = networks.perceptron()
    lam = {"decay": torch.tensor(1e-3, dtype=F64)}
    given = make(net, refresh_every=3)

    def outer(w, lam, batch):
        outputs = torch.func.functional_call(net.model, w, (net.x[:50],))
        return (outputs - net.y[:50]).square().mean()

    problem = ohg.BilevelProblem(net.inner_objective, outer)

    def go(num_steps: int, **settings: object) -> ohg.BilevelResult:
        return ohg.minimize_bilevel(
            problem,
            net.inner_params,
            lam,
            inner_solver=ohg.LBFGS(max_steps=5),
            estimator=ohg.Implicit(ohg.CG(5, 0.0, preconditioner=given), damping=1e-2),
            bounds={"decay": ohg.Domain(1e-6, 1.0, log=True)},
            num_steps=num_steps,
            **settings,  # type: ignore[arg-type]
        )

    straight = go(5)
    made = [passes in h for h in straight.history]
    assert made == [True, False, False, True, False]
    trial = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db").ask()
    go(2, trial=trial, checkpoint_every=1)
    resumed = go(5, trial=optuna.trial.Trial(trial.study, trial._trial_id), checkpoint_every=1)
    assert torch.equal(resumed.outer_params["decay"], straight.outer_params["decay"])


def test_other_estimators_pass_the_memory_on() -> None:
    wrapped = ohg.TwoPhase(ohg.Implicit(ohg.Identity()), WARM, 1)
    case = cases.case("ridge")
    w, state, products = case.solution(case.outer_params), None, []
    for step in range(3):
        found = ohg.hypergradient(
            case.problem, w, case.outer_params, estimator=wrapped, step=step, state=state
        )
        state = found.state
        products.append(found.stats["num_hvps"])
    assert products[0] == 0
    assert products[2] == 1  # the residual of the last solution, which is the same here


def test_the_state_of_another_problem_is_refused() -> None:
    one, other = cases.case("ridge"), cases.case("quadratic")
    state = ohg.hypergradient(
        one.problem, one.solution(one.outer_params), one.outer_params, estimator=WARM
    ).state
    w = other.solution(other.outer_params)
    with pytest.raises(ohg.RequirementError, match=r"state of another problem.* state=None"):
        ohg.hypergradient(other.problem, w, other.outer_params, estimator=WARM, state=state)


def test_compiled_solves_take_neither() -> None:
    solver = ohg.CG(preconditioner=ohg.NystromPreconditioner())
    for settings in ({"solver": solver}, {"warm_start_solver": True}):
        with pytest.raises(ValueError, match="use compile=False"):
            ohg.Implicit(compile=True, **settings)
    with pytest.raises(ohg.RequirementError, match="cannot be compiled; use Implicit"):
        solver.traced(lambda v: v, [torch.ones(2)], torch.ones(()))


def test_damping_that_hides_the_inner_hessian_is_said() -> None:
    case = cases.case("ridge")
    w = case.solution(case.outer_params)
    with pytest.warns(UserWarning, match=r"damping makes up 99.* Lower damping"):
        found = ohg.hypergradient(
            case.problem, w, case.outer_params, estimator=ohg.Implicit(damping=1e3)
        )
    assert found.stats["damping_share"] > 0.99
