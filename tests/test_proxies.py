"""DeltaSTN and Hypernetwork: what their responses tend to, where they lead, and how they go on after a stop."""

from __future__ import annotations

import math
from typing import Any

import cases
import optuna
import pytest
import torch
from problems import F64, randn, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.closed_form import ridge
from optuna_hypergrad.hypergradients._around import Around

FIT = ohg.GradientDescent(0.02, max_steps=1200)
SHORT = ohg.Adam(0.05, max_steps=5)


def estimate(estimator: Any, name: str = "quadratic", **given: Any) -> ohg.HypergradientEstimate:
    case = cases.case(name)
    return ohg.hypergradient(
        case.problem,
        given.pop("inner_params", case.inner_params),
        case.outer_params,
        estimator=estimator,
        **given,
    )


def response(estimator: Any, found: ohg.HypergradientEstimate, size: int) -> Tensor:
    """``d w_hat / d delta``, ``(P, N)``."""
    fitted = {k[6:]: v for k, v in found.state.tensors.items() if k.startswith("proxy/")}
    zero = torch.zeros(size, dtype=F64)

    def flat(delta: Tensor) -> Tensor:
        w = estimator.respond(fitted, found.inner_params, zero, delta)
        return torch.cat([v.reshape(-1) for v in w.values()])

    return torch.autograd.functional.jacobian(flat, zero)


@pytest.mark.parametrize("method", ["delta_stn", "hypernetwork"])
def test_the_response_tends_to_the_implicit_one(method: str) -> None:
    """``-H^-1 M``; for DeltaSTN also where ``w_0`` has not been moved at all."""
    case = cases.case("quadratic")

    def solution(flat: Tensor) -> Tensor:
        lam = {"vector": flat[:6].reshape(2, 3), "number": flat[6]}
        return torch.cat([v.reshape(-1) for v in case.solution(lam).values()])

    lam = torch.cat([v.reshape(-1) for v in case.outer_params.values()])
    exact = torch.autograd.functional.jacobian(solution, lam)
    if method == "delta_stn":
        estimator: Any = ohg.DeltaSTN(FIT, rank=2)
        started = {k: v + 1.0 for k, v in case.inner_params.items()}
        found = estimate(estimator, inner_params=started)
        assert all(torch.equal(found.inner_params[k], v) for k, v in started.items())
    else:
        estimator = ohg.Hypernetwork(FIT, scale=1.0)
        found = estimate(estimator)
        assert relative_error(found.inner_params, case.solution(case.outer_params)) < 1e-5
    error = (response(estimator, found, 7) - exact).norm() / exact.norm()
    assert float(error) < 1e-5


def six_decays() -> tuple[ohg.BilevelProblem, ohg.Params, ohg.Params, Tensor]:
    """A decay for each input of two outputs: the problem, its solution, the decays and ``-H^-1 M``, ``(12, 6)``."""
    x = randn(30, 6, seed=1)
    y = x @ randn(6, 2, seed=2) + randn(30, 2, seed=3)

    def inner(w: ohg.Params, lam: ohg.Params, batch: object) -> Tensor:
        fit = (x @ w["w"].mT - y).square().sum() / 60
        return fit + 0.5 * (lam["decay"] * w["w"].square()).sum()

    decay = torch.linspace(0.5, 1.5, 6, dtype=F64)
    inverse = torch.linalg.inv(x.mT @ x / 30 + torch.diag(decay))
    w = (inverse @ x.mT @ y / 30).mT
    exact = torch.cat([-inverse * row for row in w])
    return ohg.BilevelProblem(inner, inner), {"w": w}, {"decay": decay}, exact


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_many_gates_as_hyperparameters_express_any_response(seed: int) -> None:
    problem, w, lam, exact = six_decays()
    fit = ohg.GradientDescent(0.05, max_steps=300)
    estimator = ohg.DeltaSTN(fit, scale=1e-2, rank=6, seed=seed)
    found = ohg.hypergradient(problem, w, lam, estimator=estimator)
    error = (response(estimator, found, 6) - exact).norm() / exact.norm()
    assert float(error) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 6, 12])
def test_gates_are_orthonormal_before_any_fit(rank: int) -> None:
    _, w, lam, _ = six_decays()
    estimator = ohg.DeltaSTN(rank=rank)
    gates = estimator.start(w, Around(lam, ()))["gates/w"].movedim(1, 0)  # (rows, rank, N)
    assert gates.shape == (2, rank, 6)
    expected = max(1.0, rank / 6) ** 0.5 * torch.ones(2, min(rank, 6), dtype=F64)
    torch.testing.assert_close(torch.linalg.svdvals(gates), expected)
    if rank <= 6:
        torch.testing.assert_close(gates[:, 0].abs(), torch.full((2, 6), 6**-0.5, dtype=F64))


def falling(first: float, rate: float) -> Any:
    return lambda lam, t: first * rate**t


def one_penalty(outputs: int = 3) -> tuple[ohg.BilevelProblem, ohg.Params, Any]:
    """Ridge with several outputs and one penalty; and its outer objective in closed form."""
    x, xv = randn(24, 6, seed=1), randn(40, 6, seed=2)
    truth = randn(6, outputs, seed=3)
    y = x @ truth + 2.0 * randn(24, outputs, seed=4)
    yv = xv @ truth + 2.0 * randn(40, outputs, seed=5)

    def inner(w: ohg.Params, lam: ohg.Params, batch: object) -> Tensor:
        fit = ((x @ w["w"] - y) ** 2).sum() / 48
        return fit + lam["penalty"] * (w["w"] ** 2).sum() / 48

    def outer(w: ohg.Params, lam: ohg.Params, batch: object) -> Tensor:
        return ((xv @ w["w"] - yv) ** 2).mean()

    def exact(penalty: Tensor) -> Tensor:
        return outer({"w": ridge(x, y, penalty).coefficients}, {}, None)

    return ohg.BilevelProblem(inner, outer), {"w": torch.zeros(6, outputs, dtype=F64)}, exact


@pytest.mark.parametrize(("rows", "log"), [(0, ()), (1, ("penalty",))])
def test_one_gate_is_enough_for_one_hyperparameter(rows: int, log: tuple[str, ...]) -> None:
    problem, w0, exact = one_penalty()
    penalty = torch.tensor(3.0, dtype=F64, requires_grad=True)
    (truth,) = torch.autograd.grad(exact(penalty), penalty)
    found = ohg.hypergradient(
        problem,
        w0,
        {"penalty": penalty.detach()},
        estimator=ohg.DeltaSTN(
            ohg.GradientDescent(0.3, max_steps=600), scale=1e-2, rows=rows, log=log
        ),
        inner_solver=ohg.LBFGS(atol=1e-11),
    )
    assert float(found.value["penalty"]) == pytest.approx(float(truth), rel=1e-4)
    assert float(found.outer_value) == pytest.approx(float(exact(penalty.detach())), rel=1e-8)


def test_the_bias_falls_with_the_square_of_the_scale() -> None:
    problem, w0, exact = one_penalty()
    penalty = torch.tensor(3.0, dtype=F64, requires_grad=True)
    (truth,) = torch.autograd.grad(exact(penalty), penalty)
    errors = []
    for scale in (0.2, 0.1):
        found = ohg.hypergradient(
            problem,
            w0,
            {"penalty": penalty.detach()},
            estimator=ohg.DeltaSTN(
                ohg.GradientDescent(falling(0.4, 0.996), max_steps=900),
                scale=scale,
                log=("penalty",),
            ),
            inner_solver=ohg.LBFGS(atol=1e-11),
        )
        errors.append(abs(float(found.value["penalty"] - truth)))
    assert 2.5 < errors[0] / errors[1] < 6.0


LOG = ("penalty",)
IN_TURN: dict[str, tuple[Any, int]] = {
    "delta_stn": (ohg.DeltaSTN(ohg.GradientDescent(0.2, max_steps=5), log=LOG), 120),
    "hypernetwork": (
        ohg.Hypernetwork(ohg.Adam(falling(0.05, 0.9985), 20), scale=0.3, log=LOG, hidden=8),
        100,
    ),
}


@pytest.mark.parametrize("method", IN_TURN)
def test_training_and_tuning_in_turn_finds_the_best_penalty(method: str) -> None:
    estimator, num_steps = IN_TURN[method]
    problem, w0, exact = one_penalty()
    best = 1.0
    for width in (100.0, 1.1):  # a coarse grid, then a fine one
        grid = best * torch.logspace(-1, 1, 61, base=width, dtype=F64)
        best = float(grid[torch.stack([exact(p) for p in grid]).argmin()])
    assert best == pytest.approx(12.6, rel=0.01)
    found = ohg.minimize_bilevel(
        problem,
        w0,
        {"penalty": torch.tensor(best * 3, dtype=F64)},
        inner_solver=ohg.HeavyBall(0.2, max_steps=5),
        estimator=estimator,
        bounds={"penalty": ohg.Domain(1e-3, 1e3, log=True)},
        num_steps=num_steps,
    )
    assert float(found.outer_params["penalty"]) == pytest.approx(best, rel=0.05)


def test_the_scale_is_where_entropy_and_curvature_balance() -> None:
    """``E f`` grows by ``scale^2 f'' / 2``: the best scale is ``sqrt(entropy / f'')``."""
    problem = ohg.BilevelProblem(
        lambda w, lam, _: 0.5 * ((w["w"] - lam["x"]) ** 2).sum(),
        lambda w, lam, _: 2.0 * (w["w"] ** 2).sum(),
    )
    estimator = ohg.DeltaSTN(ohg.GradientDescent(0.1, max_steps=1), scale=0.3, entropy=0.01)
    state, w, scales = None, {"w": torch.zeros(1, dtype=F64)}, []
    for step in range(500):
        found = estimator.estimate(problem, None, w, {"x": torch.zeros(1, dtype=F64)}, step, state)
        state = found.state
        scales.append(float(state.tensors["log_scale"]))
    average = math.exp(sum(scales[-250:]) / 250)
    assert average == pytest.approx(math.sqrt(0.01 / 4), rel=0.15)


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize(
    "estimator",
    [
        ohg.DeltaSTN(SHORT, entropy=1e-3, rank=2),
        ohg.Hypernetwork(SHORT, hidden=4),
        ohg.TwoPhase(ohg.DeltaSTN(SHORT), ohg.Hypernetwork(SHORT), 3),
    ],
    ids=["delta_stn", "hypernetwork", "two_phase"],
)
def test_a_run_that_is_continued_is_the_same_run(estimator: Any, warm_start: bool) -> None:
    case = cases.case("quadratic")

    def run(trial: optuna.Trial, num_steps: int) -> ohg.BilevelResult:
        return ohg.minimize_bilevel(
            case.problem,
            case.inner_params,
            case.outer_params,
            inner_solver=ohg.Adam(0.05, max_steps=3),
            estimator=estimator,
            num_steps=num_steps,
            warm_start=warm_start,
            trial=trial,
            checkpoint_every=1,
            progress=False,
        )

    study = optuna.create_study()
    whole, trial = run(study.ask(), 7), study.ask()
    run(trial, 4)
    again = run(optuna.trial.Trial(study, trial._trial_id), 7)
    assert all(torch.equal(again.outer_params[k], v) for k, v in whole.outer_params.items())
    assert all(torch.equal(again.inner_params[k], v) for k, v in whole.inner_params.items())


@pytest.mark.parametrize("method", [ohg.DeltaSTN, ohg.Hypernetwork])
def test_equal_seeds_give_equal_bits_and_others_do_not(method: Any) -> None:
    found = [estimate(method(SHORT, seed=seed)).value for seed in (0, 0, 1)]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert not torch.equal(found[0]["vector"], found[2]["vector"])


def test_what_was_learned_is_handed_on() -> None:
    case = cases.case("quadratic")
    estimator = ohg.DeltaSTN(ohg.GradientDescent(0.02, max_steps=100), rank=2)
    state, errors = None, []
    for step in range(8):
        found = estimate(
            estimator, inner_params=case.solution(case.outer_params), step=step, state=state
        )
        state = found.state
        errors.append(relative_error(found.value, cases.truth("quadratic")))
    assert state.numbers["num_fits"] == 800
    assert errors[-1] < 0.1 * errors[0]


SMALL = ohg.DeltaSTN(SHORT)
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "too many": (
        lambda: estimate(ohg.DeltaSTN(SHORT, max_hyperparameters=6)),
        ohg.RequirementError,
        "each of 7 hyperparameters; it is refused above 6 .* Use Implicit or Unroll",
    ),
    "too large": (
        lambda: estimate(ohg.Hypernetwork(SHORT, max_size=69)),
        ohg.RequirementError,
        "would have 70 entries .* Use DeltaSTN",
    ),
    "a black box": (
        lambda: estimate(SMALL, inner_solver=ohg.BlackBox(len)),
        ohg.RequirementError,
        "use ZerothOrder",
    ),
    "a learning rate": (
        lambda: estimate(SMALL, "momentum_descent", inner_solver=ohg.HeavyBall("lr")),
        ohg.ZeroHypergradientError,
        "'lr' steers the inner solver .* Use Unroll",
    ),
    "one that nobody uses": (
        lambda: estimate(SMALL, "momentum_descent"),
        ohg.ZeroHypergradientError,
        "hypergradient of 'lr' under DeltaSTN is zero by construction",
    ),
    "no such name": (
        lambda: estimate(ohg.DeltaSTN(SHORT, log=("decay",))),
        ohg.HyperparameterError,
        "names 'decay', which is not among",
    ),
    "no logarithm": (
        lambda: estimate(ohg.Hypernetwork(SHORT, log=("vector",))),
        ohg.HyperparameterError,
        "only a positive hyperparameter has a logarithm",
    ),
    "another response": (
        lambda: estimate(ohg.DeltaSTN(SHORT, rank=2), state=estimate(SMALL).state),
        ohg.RequirementError,
        "Begin anew",
    ),
    "too long steps": (
        lambda: estimate(ohg.DeltaSTN(ohg.GradientDescent(10.0, max_steps=500))),
        ohg.SolverError,
        "DeltaSTN, fitting its response: .* lower its step size",
    ),
    "a minimizer": (lambda: ohg.DeltaSTN(ohg.LBFGS()), ValueError, "needs a step solver"),  # type: ignore[arg-type]
    "a rate by name": (lambda: ohg.DeltaSTN(ohg.Adam("lr")), ValueError, "needs a step solver"),
    "no scale": (lambda: ohg.DeltaSTN(scale=0.0), ValueError, "scale > 0"),
    "NaN scale": (lambda: ohg.Hypernetwork(scale=math.nan), ValueError, "scale > 0"),
    "one name": (lambda: ohg.DeltaSTN(log="decay"), ValueError, "a tuple of names"),  # type: ignore[arg-type]
    "no rank": (lambda: ohg.DeltaSTN(rank=0), ValueError, "rank >= 1"),
    "depth": (lambda: ohg.DeltaSTN(rows=2), ValueError, "rows=0 or rows=1"),
    "no entropy": (lambda: ohg.DeltaSTN(entropy=0.0), ValueError, "entropy > 0 or None"),
    "half a unit": (lambda: ohg.Hypernetwork(hidden=1.5), ValueError, "hidden >= 0"),  # type: ignore[arg-type]
    "a seed": (lambda: ohg.Hypernetwork(seed=-1), ValueError, "seed >= 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_in_words(what: str) -> None:
    call, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message):
        call()
