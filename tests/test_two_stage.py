"""Pre-train, then fine-tune (GT6), and longer chains; what each part of the hypergradient is worth."""

from __future__ import annotations

import cases
import optuna
import pytest
import torch
from problems import F64, randn, relative_error

import optuna_hypergrad as ohg

Params = dict[str, torch.Tensor]
EXACT = ohg.NewtonCG(atol=1e-12)
DIRECT = ohg.Implicit(ohg.Direct())


def cosine(found: Params, exact: Params) -> float:
    a, b = (torch.cat([v[k].reshape(-1) for k in exact]) for v in (found, exact))
    return float(torch.cosine_similarity(a, b, dim=0))


def of(problem: ohg.BilevelProblem, w0: Params, lam: Params, estimator=DIRECT, solver=EXACT):
    return ohg.hypergradient(problem, w0, lam, estimator=estimator, inner_solver=solver)


def test_both_terms_are_needed() -> None:
    """Cosines flatter: the relative error says what is missing without either of them."""
    case, exact = cases.case("two_stage"), cases.truth("two_stage")
    at = case.problem, case.inner_params, case.outer_params
    whole = of(*at)
    assert relative_error(whole.value, exact) < 1e-9
    without_inverse = of(*at, ohg.Implicit(ohg.Identity(1.0)))
    assert relative_error(without_inverse.value, exact) > 0.1
    solved = ohg.inner_solve(case.problem, EXACT, case.inner_params, case.outer_params)
    lam = {k: v.clone().requires_grad_(True) for k, v in case.outer_params.items()}
    direct = torch.autograd.grad(
        case.problem.outer_objective(solved.inner_params, lam, None), list(lam.values())
    )
    indirect = {k: whole.value[k] - d for k, d in zip(lam, direct, strict=True)}
    assert relative_error(indirect, exact) > 0.02
    assert cosine(indirect, exact) > 0.9


def test_the_check_finds_nothing_wrong() -> None:
    case = cases.case("two_stage")
    report = ohg.check_hypergradient(
        case.problem,
        case.inner_params,
        case.outer_params,
        estimator=DIRECT,
        inner_solver=EXACT,
        rtol=1e-7,
    )
    assert report.ok, report
    assert report.conclusive, report


def chain(estimator: ohg.Unroll | ohg.Reversible = ohg.Unroll()):
    """Three stages: the last has a new head and a step size of its own."""
    x, y = randn(12, 3, seed=1), randn(12, seed=2)

    def pretraining(w: Params, lam: Params, batch) -> torch.Tensor:
        weights = lam["weight"].sigmoid()
        each = ((x @ w["body"]).tanh() @ w["head"] - y[:, None]) ** 2
        return (weights[:, None] * each).mean() + 0.05 * (w["body"] ** 2).sum()

    def fine(w: Params, lam: Params, batch) -> torch.Tensor:
        out = (x @ w["body"]).tanh() @ w["new"]
        return ((out - y.sin()) ** 2).mean() + lam["decay"] * (w["new"] ** 2).sum()

    second = ohg.FineTuning(
        fine,
        ohg.HeavyBall(0.1, max_steps=3, momentum=0.5),
        estimator,
        start=lambda w, lam: {"body": w["body"], "new": lam["head"]},
    )
    third = ohg.FineTuning(fine, ohg.GradientDescent("lr", max_steps=2))

    def outer(w: Params, lam: Params, batch) -> torch.Tensor:
        w = third(w, lam)
        return (((x @ w["body"]).tanh() @ w["new"] - y.cos()) ** 2).mean()

    w0 = {"body": 0.4 * randn(3, 4, seed=3), "head": 0.4 * randn(4, 2, seed=4)}
    lam = {
        "weight": randn(12, seed=5),
        "head": 0.5 * randn(4, seed=6),
        "decay": torch.tensor(0.1, dtype=F64),
        "lr": torch.tensor(0.2, dtype=F64),
    }

    def plain(lam: Params) -> torch.Tensor:
        """By autograd through everything, pre-training included."""
        w = {k: v.clone().requires_grad_(True) for k, v in w0.items()}
        for _ in range(5):
            slopes = torch.autograd.grad(
                pretraining(w, lam, None), list(w.values()), create_graph=True
            )
            w = {k: v - 0.2 * g for (k, v), g in zip(w.items(), slopes, strict=True)}
        u = {"body": w["body"], "new": lam["head"]}
        velocity = {k: torch.zeros_like(v) for k, v in u.items()}
        for _ in range(3):
            slopes = torch.autograd.grad(fine(u, lam, None), list(u.values()), create_graph=True)
            velocity = {k: 0.5 * velocity[k] + g for k, g in zip(u, slopes, strict=True)}
            u = {k: v - 0.1 * velocity[k] for k, v in u.items()}
        for _ in range(2):
            slopes = torch.autograd.grad(fine(u, lam, None), list(u.values()), create_graph=True)
            u = {k: v - lam["lr"] * g for (k, v), g in zip(u.items(), slopes, strict=True)}
        return (((x @ u["body"]).tanh() @ u["new"] - y.cos()) ** 2).mean()

    return ohg.two_stage(pretraining, outer, second), w0, lam, plain


@pytest.mark.parametrize(
    "estimator", [ohg.Unroll(), ohg.Reversible()], ids=["unroll", "reversible"]
)
def test_three_stages_with_a_new_head_equal_plain_autograd(estimator) -> None:
    problem, w0, lam, plain = chain(estimator)
    found = of(problem, w0, lam, ohg.Unroll(), ohg.GradientDescent(0.2, max_steps=5))
    leaves = {k: v.clone().requires_grad_(True) for k, v in lam.items()}
    exact = dict(zip(lam, torch.autograd.grad(plain(leaves), list(leaves.values())), strict=True))
    assert relative_error(found.value, exact) < (1e-12 if estimator == ohg.Unroll() else 1e-7)


def test_the_call_gives_the_fine_tuned_parameters() -> None:
    case = cases.case("two_stage")
    fine = ohg.FineTuning(
        lambda w, lam, batch: ((w["w"] - batch) ** 2).sum(),
        ohg.GradientDescent(0.5, max_steps=1),
        batch=lambda step: 3.0 + step,
    )
    assert torch.allclose(
        fine(case.inner_params, case.outer_params)["w"], torch.full((6,), 3.0).to(F64)
    )


def test_a_hyperparameter_of_no_stage_is_an_error() -> None:
    case = cases.case("two_stage")
    lam = {**case.outer_params, "idle": torch.ones(2, dtype=F64)}
    with pytest.raises(
        ohg.ZeroHypergradientError, match="hypergradient of 'idle' under Implicit is zero"
    ):
        of(case.problem, case.inner_params, lam)


def test_fine_tuning_that_diverges_is_an_error() -> None:
    fine = ohg.FineTuning(
        lambda w, lam, batch: (w["w"] ** 4).sum(), ohg.GradientDescent(10.0, max_steps=30)
    )
    problem = ohg.two_stage(
        lambda w, lam, batch: ((w["w"] - lam["x"]) ** 2).sum(),
        lambda w, lam, batch: w["w"].sum(),
        fine,
    )
    with pytest.raises(ohg.SolverError, match="ended in NaN or infinite"):
        of(problem, {"w": torch.ones(2, dtype=F64)}, {"x": torch.ones(2, dtype=F64)})


def test_the_outer_loop_and_the_sampler_take_it() -> None:
    case = cases.case("two_stage")
    found = ohg.minimize_bilevel(
        case.problem,
        case.inner_params,
        case.outer_params,
        inner_solver=EXACT,
        estimator=DIRECT,
        num_steps=10,
        bounds={"decay": ohg.Domain(1e-3, 10.0, log=True)},
    )
    assert found.outer_value < 0.9 * found.history[0]["outer_value"]

    @ohg.differentiable
    def objective(trial):
        lam = {
            "mix": trial.suggest_tensor("mix", (4,), -5.0, 5.0, init=case.outer_params["mix"]),
            "decay": trial.suggest_float("decay", 1e-3, 10.0, log=True),
        }
        w = ohg.solve(case.problem.inner_objective, case.inner_params, lam)
        return case.problem.outer_objective(w, lam, None)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=6)
    assert study.best_value < study.trials[0].value


def loss(w: Params, lam: Params, batch) -> torch.Tensor:
    return (w["w"] ** 2).sum()


STEPS = ohg.GradientDescent(0.1, max_steps=2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ohg.FineTuning(None, STEPS), "a function as objective"),
        (lambda: ohg.FineTuning(loss, STEPS, batch=3), "a function as batch"),
        (lambda: ohg.FineTuning(loss, STEPS, start=3), "as start, or None"),
        (lambda: ohg.FineTuning(loss, ohg.LBFGS()), "needs a step solver"),
        (lambda: ohg.FineTuning(loss, ohg.GradientDescent(0.1, max_steps=0)), "max_steps >= 1"),
        (
            lambda: ohg.FineTuning(loss, STEPS, ohg.Implicit()),
            "does not see where fine-tuning starts",
        ),
        (lambda: ohg.FineTuning(loss, STEPS, ohg.Unroll(truncation=1)), "without truncation"),
        (lambda: ohg.FineTuning(loss, STEPS, ohg.ZerothOrder()), "differentiates steps"),
        (lambda: ohg.two_stage(loss, loss, STEPS), "needs FineTuning"),
    ],
)
def test_what_makes_no_sense_is_refused(build, message: str) -> None:
    with pytest.raises(ohg.ProblemError, match=message):
        build()
