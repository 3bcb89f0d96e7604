"""Tasks that share outer variables: MAML, iMAML, shared features; their memory, batches and refusals."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import cases
import optuna
import pytest
import torch
from problems import F64, differences, randn, relative_error

import optuna_hypergrad as ohg
from optuna_hypergrad import closed_form as cf
from optuna_hypergrad.episodes import EpisodeBatch

Params = dict[str, torch.Tensor]
ADAM = functools.partial(torch.optim.Adam, lr=0.05)


def loss(w: Params, lam: Params, batch) -> torch.Tensor:
    x, y = batch
    return (((x @ w["hidden"]).tanh() @ w["head"] - y) ** 2).mean()


def tasks_of(step: int, num_tasks: int = 3, n: int = 6):
    """Tasks drawn from the step, three inputs each."""
    found = []
    for i in range(num_tasks):
        seed = 1000 * step + 10 * i
        w = randn(3, seed=7) + 0.3 * randn(3, seed=seed)
        x, xq = randn(n, 3, seed=seed + 1), randn(n, 3, seed=seed + 2)
        found.append(((x, (x @ w).sin()), (xq, (xq @ w).sin())))
    return found


def theta() -> Params:
    return {"theta.hidden": 0.7 * randn(3, 4, seed=1), "theta.head": 0.7 * randn(4, seed=2)}


def maml(**settings) -> ohg.Episodes:
    return ohg.Episodes(loss, loss, tasks_of, "theta.", **settings)


def imaml(strength: str | float = "strength", **settings) -> ohg.Episodes:
    return ohg.Episodes(ohg.proximal(loss, strength), loss, tasks_of, "theta.", **settings)


WITH_STRENGTH = {**theta(), "strength": torch.tensor(1.5, dtype=F64)}
STEPS = ohg.HeavyBall(0.1, max_steps=4, momentum=0.6)
EXACT = ohg.LBFGS(max_steps=2000, atol=1e-11)


def test_finite_differences_agree_with_the_closed_form_of_gt4() -> None:
    case = cases.case("episodes")

    def value(lam: Params) -> torch.Tensor:
        w = ohg.inner_solve(
            case.problem.at(0), ohg.NewtonCG(atol=1e-13), case.inner_params, lam
        ).inner_params
        return case.problem.at(0).outer_objective(w, lam, case.problem.at(0).outer_batch(0))

    assert relative_error(differences(value, case.outer_params), cases.truth("episodes")) < 1e-8


@pytest.mark.parametrize("vectorize", [False, True])
def test_unrolled_steps_from_the_shared_start_are_maml(vectorize: bool) -> None:
    lam = theta()
    problem = maml(vectorize=vectorize)
    found = ohg.hypergradient(
        problem, problem.start(lam), lam, estimator=ohg.Unroll(), inner_solver=STEPS
    )
    leaves = {k: v.clone().requires_grad_(True) for k, v in lam.items()}
    total = 0.0
    for support, query in tasks_of(0):
        w = {k: leaves[f"theta.{k}"] for k in ("hidden", "head")}
        velocity = {k: torch.zeros_like(v) for k, v in w.items()}
        for _ in range(4):
            slopes = torch.autograd.grad(loss(w, {}, support), list(w.values()), create_graph=True)
            velocity = {k: 0.6 * velocity[k] + g for k, g in zip(w, slopes, strict=True)}
            w = {k: v - 0.1 * velocity[k] for k, v in w.items()}
        total = total + loss(w, {}, query) / 3
    exact = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert relative_error(found.value, exact) < 1e-12
    assert float(found.outer_value) == pytest.approx(float(total.detach()), rel=1e-12)


@pytest.mark.parametrize(
    "estimator",
    [ohg.Implicit(ohg.CG(200, 1e-12)), ohg.PerTask(ohg.Implicit(ohg.CG(200, 1e-12)))],
)
@pytest.mark.parametrize("vectorize", [False, True])
def test_implicit_gradients_of_networks_match_finite_differences(estimator, vectorize) -> None:
    problem = imaml(vectorize=vectorize)
    report = ohg.check_hypergradient(
        problem,
        problem.start(WITH_STRENGTH),
        WITH_STRENGTH,
        estimator=estimator,
        inner_solver=ohg.NewtonCG(atol=1e-10),
        num_directions=1,
        rtol=1e-5,
        step=2,
    )
    assert report.ok, report
    assert report.conclusive, report


def test_implicit_uses_the_proximal_term_alone() -> None:
    """``strength * v`` with ``(H + strength) v = b``, so that a linear solve of no use gives nothing, not ``b``."""
    problem, lam = imaml(), WITH_STRENGTH
    w0 = problem.start(lam)
    batch = problem.at(0)
    w = ohg.inner_solve(batch, EXACT, w0, lam).inner_params
    leaves = {k: v.clone().requires_grad_(True) for k, v in w.items()}
    b = torch.autograd.grad(
        batch.outer_objective(leaves, lam, batch.outer_batch(0)), list(leaves.values())
    )
    found = ohg.hypergradient(problem, w, lam, estimator=ohg.Implicit(ohg.Identity(0.25)))
    for k, slope in zip(w, b, strict=True):
        expected = float(lam["strength"]) * 0.25 * slope.sum(0)
        assert torch.allclose(found.value[f"theta.{k}"], expected, rtol=1e-10)


def test_damping_is_a_bias_and_is_reported_as_one() -> None:
    case, d = cases.case("episodes"), 0.4
    found = ohg.hypergradient(
        case.problem,
        case.inner_params,
        case.outer_params,
        estimator=ohg.Implicit(ohg.CG(200, 1e-12), damping=d),
        inner_solver=cases.EXACT,
    )
    assert found.stats["damping"] == d
    assert relative_error(found.value, cases.truth("episodes")) > 0.05
    tasks = [
        (torch.cat([x, torch.ones(8, 1, dtype=F64)], 1), y) for (x, y), _ in case.problem.tasks(0)
    ]
    asked = [
        (torch.cat([x, torch.ones(8, 1, dtype=F64)], 1), y) for _, (x, y) in case.problem.tasks(0)
    ]
    s, eye = case.outer_params["strength"], torch.eye(6, dtype=F64)
    start = torch.cat([case.outer_params["theta.slope"], case.outer_params["theta.offset"][None]])
    expected = torch.zeros(6, dtype=F64)
    for (a, y), (aq, yq) in zip(tasks, asked, strict=True):
        w = torch.linalg.solve(a.T @ a / 8 + s * eye, a.T @ y / 8 + s * start)
        b = aq.T @ (aq @ w - yq) / 8
        expected += s * torch.linalg.solve(a.T @ a / 8 + (s + d) * eye, b) / 3
    assert torch.allclose(found.value["theta.slope"], expected[:5], rtol=1e-8)


def test_implicit_does_not_see_a_start_without_a_proximal_term() -> None:
    problem, lam = maml(), theta()
    with pytest.raises(
        ohg.ZeroHypergradientError, match=r"'theta.hidden' under Implicit is zero by"
    ):
        ohg.hypergradient(
            problem, problem.start(lam), lam, estimator=ohg.Implicit(), inner_solver=STEPS
        )


def test_one_go_one_by_one_and_per_task_are_equal() -> None:
    lam = WITH_STRENGTH
    found = []
    for vectorize in (False, True):
        problem = imaml(vectorize=vectorize)
        for estimator in (ohg.Unroll(), ohg.PerTask(ohg.Unroll())):
            found.append(
                ohg.hypergradient(
                    problem, problem.start(lam), lam, estimator=estimator, inner_solver=STEPS
                )
            )
    for other in found[1:]:
        assert relative_error(other.value, found[0].value) < 1e-12
        assert relative_error(other.inner_params, found[0].inner_params) < 1e-12
        assert float(other.outer_value) == pytest.approx(float(found[0].outer_value), rel=1e-12)
    assert found[1].stats["num_inner_steps"] == 12


def test_per_task_names_the_task_that_failed() -> None:
    def inner(w, lam, batch):
        return (w["w"] ** 2).sum() * batch + lam["x"] * w["w"].sum()

    problem = ohg.Episodes(inner, inner, lambda step: [(1.0, 1.0), (1.0, 1.0), (-1.0, 1.0)])
    lam = {"x": torch.tensor(0.5, dtype=F64)}
    w0 = problem.start({"w": torch.ones(2, dtype=F64)})
    with pytest.raises(ohg.SolverError, match="Task 2: CG met a direction of curvature"):
        ohg.hypergradient(problem, w0, lam, estimator=ohg.PerTask())


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("per_task", [False, True])
def test_gauss_newton_is_exact_for_linear_models(vectorize: bool, per_task: bool) -> None:
    case = cases.case("episodes")
    problem = replace(case.problem, vectorize=vectorize)
    curvature = problem.gauss_newton(
        lambda w, lam, b: b[0] @ w["slope"] + w["offset"],
        lambda out, lam, b: 0.5 * ((out - b[1]) ** 2).mean(),
    )
    estimator = ohg.Implicit(ohg.CG(200, 1e-12), curvature=curvature)
    found = ohg.hypergradient(
        problem,
        case.inner_params,
        case.outer_params,
        estimator=ohg.PerTask(estimator) if per_task else estimator,
        inner_solver=cases.EXACT,
    )
    assert relative_error(found.value, cases.truth("episodes")) < 1e-8


def test_gauss_newton_is_positive_where_the_hessian_is_not() -> None:
    problem, lam = imaml(0.1), theta()
    w = {k: v + randn(*v.shape, seed=3) for k, v in problem.start(lam).items()}
    with pytest.raises(ohg.SolverError, match="not positive definite"):
        ohg.hypergradient(problem, w, lam, estimator=ohg.Implicit())
    curvature = problem.gauss_newton(
        lambda w, lam, b: (b[0] @ w["hidden"]).tanh() @ w["head"],
        lambda out, lam, b: ((out - b[1]) ** 2).mean(),
    )
    found = ohg.hypergradient(problem, w, lam, estimator=ohg.Implicit(curvature=curvature))
    assert found.stats["exact_hessian"] == 0


# Shared features (Franceschi et al. 2018) -------------------------------------------------------


def features(lam: Params, x: torch.Tensor) -> torch.Tensor:
    return (x @ lam["features"]).tanh()


def head_loss(w: Params, lam: Params, batch) -> torch.Tensor:
    x, y = batch
    return ((features(lam, x) @ w["head"] - y) ** 2).mean()


def ridge_head(w: Params, lam: Params, batch) -> torch.Tensor:
    return head_loss(w, lam, batch) + 0.1 * (w["head"] ** 2).sum()


@pytest.mark.parametrize(
    ("inner", "solver", "estimator"),
    [
        (ridge_head, ohg.NewtonCG(atol=1e-12), ohg.Implicit(ohg.CG(100, 1e-12))),
        (ridge_head, ohg.NewtonCG(atol=1e-12), ohg.PerTask(ohg.Implicit(ohg.Direct()))),
        (head_loss, ohg.GradientDescent(0.3, max_steps=5), ohg.Unroll()),
    ],
    ids=["closed form", "closed form, per task", "steps"],
)
def test_shared_features_match_finite_differences(inner, solver, estimator) -> None:
    problem = ohg.Episodes(inner, head_loss, tasks_of)
    report = ohg.check_hypergradient(
        problem,
        problem.start({"head": torch.zeros(4, dtype=F64)}),
        {"features": 0.5 * randn(3, 4, seed=5)},
        estimator=estimator,
        inner_solver=solver,
        rtol=1e-6,
    )
    assert report.ok, report
    assert report.conclusive, report


# Outer runs -------------------------------------------------------------------------------------


def run(problem: ohg.Episodes, num_steps: int, trial: optuna.Trial | None = None):
    lam = WITH_STRENGTH
    return ohg.minimize_bilevel(
        problem,
        problem.start(lam),
        lam,
        inner_solver=ohg.HeavyBall(0.1, max_steps=20, momentum=0.8),
        estimator=ohg.PerTask(ohg.Implicit(ohg.CG(10), damping=0.5)),
        optimizer=ADAM,
        bounds={"strength": ohg.Domain(1e-2, 1e2, log=True)},
        num_steps=num_steps,
        warm_start=False,
        trial=trial,
        checkpoint_every=4 if trial else None,
    )


def test_each_outer_step_has_other_tasks_and_the_loss_falls() -> None:
    seen: list[int] = []

    def tasks(step: int):
        seen.append(step)
        return tasks_of(step)

    problem = ohg.Episodes(ohg.proximal(loss), loss, tasks, "theta.")
    found = run(problem, 30)
    assert set(seen) == set(range(31))

    def on_new_tasks(lam: Params) -> float:
        estimates = [
            ohg.hypergradient(
                problem,
                problem.start(lam),
                lam,
                estimator=ohg.Implicit(damping=1.0),
                inner_solver=ohg.HeavyBall(0.1, max_steps=20, momentum=0.8),
                step=100 + i,
                throw=False,
            )
            for i in range(5)
        ]
        return sum(float(e.outer_value) for e in estimates)

    assert on_new_tasks(found.outer_params) < 0.8 * on_new_tasks(WITH_STRENGTH)
    assert found.value_kind == "cold"
    adapted = problem.adapted(found.inner_params, found.outer_params)
    assert adapted["hidden"].shape == (3, 3, 4)
    shared = found.outer_params["theta.head"]
    assert torch.equal(adapted["head"], found.inner_params["head"] + shared)


def test_a_run_over_episodes_goes_on_bit_for_bit(tmp_path) -> None:
    straight = run(imaml(), 8)
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    trial = study.ask()
    run(imaml(), 4, trial)
    resumed = run(imaml(), 8, optuna.trial.Trial(study, trial._trial_id))
    assert len(resumed.history) == 8
    for k, v in straight.outer_params.items():
        assert torch.equal(resumed.outer_params[k], v)
    for k, v in straight.inner_params.items():
        assert torch.equal(resumed.inner_params[k], v)


def test_the_sampler_takes_steps_through_the_tasks_of_each_trial() -> None:
    problem = imaml(0.5)

    @ohg.differentiable
    def objective(trial):
        start = {k: trial.suggest_tensor(k, v.shape, -3.0, 3.0, init=v) for k, v in theta().items()}
        batch = problem.at(trial.number % 2)
        w = ohg.solve(
            batch.inner_objective,
            problem.start(start),
            start,
            solver=ohg.HeavyBall(0.1, max_steps=10, momentum=0.8),
            estimator=ohg.Unroll(),
            inner_batch=batch.inner_batch,
        )
        return batch.outer_objective(w, start, batch.outer_batch(0))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=8)
    assert study.best_value < study.trials[0].value


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from Linux's /proc")
def test_memory_of_implicit_gradients_does_not_grow_with_the_inner_steps() -> None:
    """16 and 256 inner steps: equal within 5 % under Implicit, more than 8 times as much unrolled."""
    script = textwrap.dedent(
        """
        import torch
        import optuna_hypergrad as ohg
        torch.set_num_threads(1)

        def memory(field):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field))

        rng = torch.Generator().manual_seed(0)
        x = torch.randn(1500, 40, generator=rng)

        def loss(w, lam, batch):
            return ((x @ w["w"]).tanh() @ w["v"] - batch).square().mean()

        problem = ohg.Episodes(
            ohg.proximal(loss, 1.0), loss, lambda step: [(0.1, 0.2), (0.3, 0.1)], "theta."
        )
        lam = {"theta.w": torch.randn(40, 60, generator=rng) / 6}
        lam["theta.v"] = torch.randn(60, generator=rng) / 8
        w0 = problem.start(lam)
        for estimator in (ohg.Implicit(ohg.CG(3)), ohg.Unroll(recompute="never")):
            for steps in (16, 16, 256):  # once before measuring: libraries keep workspaces of their own
                open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
                before = memory("VmRSS")
                solver = ohg.GradientDescent(0.1, max_steps=steps)
                ohg.hypergradient(problem, w0, lam, estimator=estimator, inner_solver=solver)
                print(memory("VmHWM") - before)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, few, many, _, unrolled_few, unrolled_many = map(int, done.stdout.split())
    assert abs(many - few) < 0.05 * few
    assert unrolled_many > 8 * unrolled_few


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: ohg.Episodes(None, loss, tasks_of),
            ohg.ProblemError,
            "a function as inner_objective",
        ),
        (lambda: ohg.Episodes(loss, loss, [1]), ohg.ProblemError, "a function as tasks"),
        (lambda: ohg.Episodes(loss, loss, tasks_of, 3), ohg.ProblemError, "a prefix of outer"),
        (lambda: ohg.proximal(3), ohg.ProblemError, "proximal needs an objective"),
        (lambda: ohg.proximal(loss, 0.0), ohg.ProblemError, "strength > 0, .* got 0.0"),
        (lambda: ohg.proximal(loss, -1), ohg.ProblemError, "strength > 0"),
        (lambda: ohg.proximal(loss, float("nan")), ohg.ProblemError, "strength > 0"),
        (lambda: ohg.proximal(loss, True), ohg.ProblemError, "strength > 0"),
        (lambda: ohg.proximal(loss, 1.0, None), ohg.ProblemError, "as center"),
        (lambda: ohg.PerTask("implicit"), ValueError, "PerTask needs an estimator"),
        (lambda: maml().start(theta(), 0), ValueError, "num_tasks >= 1"),
        (
            lambda: maml().start({"w": randn(2, seed=0)}),
            ohg.HyperparameterError,
            "begins with 'theta.'",
        ),
        (
            lambda: ohg.Episodes(loss, loss, lambda step: []).at(0),
            ohg.ProblemError,
            r"tasks\(0\) is empty",
        ),
        (
            lambda: ohg.Episodes(loss, loss, lambda step: [(1, 2, 3)]).at(0),
            ohg.ProblemError,
            r"task 0 of step 0 is .*give a pair",
        ),
        (
            lambda: ohg.Episodes(loss, loss, lambda step: [(1, 2)], vectorize=True).at(0),
            ohg.ProblemError,
            "must be tensors",
        ),
        (
            lambda: ohg.Episodes(
                loss, loss, lambda s: [*tasks_of(0, 1, 4), *tasks_of(1, 1, 5)], vectorize=True
            ).at(0),
            ohg.ProblemError,
            r"supports have different shapes, \(4, 3\) and \(5, 3\)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(build, error, message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("estimator", "carried"),
    [
        (ohg.DeltaSTN(), "its fitted response"),
        (ohg.Hypernetwork(), "its fitted response"),
        (ohg.Auto(), "the method that it chose"),
        (ohg.SOBA(0.1), "the linear system's solution"),
        (ohg.F2SA(), "its second inner variable"),
        (ohg.BOME(step_size=0.1), "its second inner variable"),
        (ohg.Implicit(warm_start_solver=True), "warm_start_solver=True; pass False"),
        (
            ohg.Implicit(ohg.CG(preconditioner=ohg.NystromPreconditioner(2, refresh_every=5))),
            "refresh_every=5; pass 1",
        ),
        (
            ohg.TwoPhase(ohg.Unroll(), ohg.Implicit(), ohg.Stalled()),
            "pass an outer step as switch=",
        ),
        (ohg.TwoPhase(ohg.Unroll(), ohg.Implicit(warm_start_solver=True), 3), "pass False"),
    ],
)
def test_what_hands_something_on_is_refused_for_one_task_at_a_time(estimator, carried) -> None:
    lam = theta()
    problem = maml()
    with pytest.raises(ohg.RequirementError, match=f"PerTask starts its estimator anew.*{carried}"):
        ohg.hypergradient(
            problem,
            problem.start(lam),
            lam,
            estimator=ohg.PerTask(estimator),
            inner_solver=ohg.GradientDescent(0.1, max_steps=1),
        )


def test_a_preconditioner_that_is_made_anew_each_time_hands_nothing_on() -> None:
    kept = ohg.NystromPreconditioner(2, refresh_every=1)
    assert ohg.Implicit(ohg.CG(preconditioner=kept)).carries is None
    assert ohg.TwoPhase(ohg.Unroll(), ohg.Implicit(), 3).carries is None


def changing():
    calls = iter(range(100))
    return ohg.Episodes(loss, loss, lambda step: tasks_of(next(calls)), "theta.")


@pytest.mark.parametrize(
    ("problem", "inner_params", "outer_params", "error", "message"),
    [
        (maml(), None, {"x": randn(2, seed=0)}, ohg.HyperparameterError, "has no 'theta.hidden'"),
        (
            maml(),
            None,
            {**theta(), "theta.head": randn(5, seed=0)},
            ohg.HyperparameterError,
            r"'theta.head'\] has shape \(5,\), and the inner parameter 'head' of one task \(4,\)",
        ),
        (
            maml(),
            {"hidden": randn(2, 3, 4, seed=0), "head": randn(3, 4, seed=0)},
            theta(),
            ohg.ProblemError,
            r"'hidden'\] has shape \(2, 3, 4\), and there are 3 tasks",
        ),
        (changing(), None, theta(), ohg.ProblemError, "gave different tasks when called twice"),
        (imaml(), None, theta(), ohg.HyperparameterError, "no such outer parameter"),
        (
            imaml(),
            None,
            {**theta(), "strength": torch.tensor(-0.5, dtype=F64)},
            ohg.HyperparameterError,
            "needs a positive strength, and .* is -0.5",
        ),
        (
            imaml(),
            None,
            {**theta(), "strength": torch.ones(2, dtype=F64)},
            ohg.HyperparameterError,
            "needs one number",
        ),
    ],
)
def test_a_problem_that_does_not_fit_is_refused(
    problem, inner_params, outer_params, error, message: str
) -> None:
    w0 = maml().start(theta()) if inner_params is None else inner_params
    with pytest.raises(error, match=message):
        ohg.hypergradient(problem, w0, outer_params, estimator=ohg.Unroll(), inner_solver=STEPS)


@pytest.mark.parametrize("vectorize", [False, True])
def test_another_number_of_tasks_at_a_later_step_is_refused(vectorize: bool) -> None:
    lam = theta()
    problem = ohg.Episodes(
        loss, loss, lambda step: tasks_of(step, 3 - step), "theta.", vectorize=vectorize
    )
    with pytest.raises(
        ohg.ProblemError, match=r"there are 2 tasks; .* each outer step must have as many"
    ):
        ohg.minimize_bilevel(
            problem,
            problem.start(lam),
            lam,
            inner_solver=STEPS,
            estimator=ohg.Unroll(),
            num_steps=2,
            warm_start=False,
        )


@pytest.mark.parametrize("vectorize", [False, True])
def test_an_objective_of_a_task_must_be_a_scalar(vectorize: bool) -> None:
    def residuals(w, lam, batch):
        return (batch[0] @ w["w"] - batch[1]) ** 2

    problem = ohg.Episodes(residuals, residuals, tasks_of, vectorize=vectorize)
    w0 = problem.start({"w": randn(3, seed=0)})
    with pytest.raises(
        ohg.ObjectiveError, match=r"inner_objective returned a tensor of shape \(6,\) for a"
    ):
        ohg.hypergradient(problem, w0, theta(), estimator=ohg.Unroll(), inner_solver=STEPS)


def by_ridge(w, lam, batch):
    return cf.ridge(batch[0] * w["w"], batch[1], 0.5).predict(batch[0])


def by_head(w, lam, batch):
    return cf.ridge_head(batch[0] * w["w"], batch[1][:, None], 0.5).predict(batch[0])[:, 0]


def by_equilibrium(w, lam, batch):
    return ohg.fixed_point(lambda z: 0.3 * z.tanh() + batch[0] @ w["w"], torch.zeros_like(batch[1]))


@pytest.mark.parametrize("model", [by_ridge, by_head, by_equilibrium])
def test_what_cannot_be_vectorized_says_so(model) -> None:
    def squares(w, lam, batch):
        return ((model(w, lam, batch) - batch[1]) ** 2).mean() + lam["decay"] * w[
            "w"
        ].square().sum()

    lam = {"decay": torch.tensor(0.1, dtype=F64)}
    for vectorize in (True, False):
        problem = ohg.Episodes(squares, squares, tasks_of, vectorize=vectorize)
        w0 = problem.start({"w": torch.ones(3, dtype=F64)})
        now = problem.at(0)
        if not vectorize:
            assert now.inner_objective(w0, lam, now.inner_batch(0)).isfinite()
            continue
        with pytest.raises(ohg.RequirementError, match=r"one of the operations .*vectorize=False"):
            now.inner_objective(w0, lam, now.inner_batch(0))


def test_an_error_of_the_objective_itself_is_not_translated() -> None:
    def wrong(w, lam, batch):
        raise RuntimeError("the data are gone")

    problem = ohg.Episodes(wrong, wrong, tasks_of, vectorize=True)
    now = problem.at(0)
    with pytest.raises(RuntimeError, match="the data are gone"):
        now.inner_objective(problem.start({"w": randn(3, seed=0)}), {}, now.inner_batch(0))


def test_warm_starts_over_episodes_are_refused_unless_the_tasks_stay() -> None:
    problem, lam = imaml(1.0), theta()
    settings = {"inner_solver": STEPS, "estimator": ohg.Unroll(), "num_steps": 2}
    with pytest.raises(
        ohg.RequirementError, match=r"another inner problem at each outer step.*at\(0\)"
    ):
        ohg.minimize_bilevel(problem, problem.start(lam), lam, **settings)
    fixed = problem.at(0)
    assert isinstance(fixed, EpisodeBatch)
    assert ohg.minimize_bilevel(fixed, problem.start(lam), lam, **settings).value_kind == "warm"
    with pytest.raises(ohg.ProblemError, match="there are 3 tasks"):
        ohg.minimize_bilevel(fixed, problem.start(lam, 2), lam, **settings)
