"""Methods that take one step of everything at a time: SOBA, SABA, MA-SOBA."""

from __future__ import annotations

import functools
import math
import warnings

import optuna
import pytest
import torch
from problems import F64, Params, randn, relative_error

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import EstimatorState
from optuna_hypergrad.hypergradients._pace import paced

SGD = functools.partial(torch.optim.SGD, lr=0.01)
ONE = ohg.GradientDescent(0.1, max_steps=1)


def sampled(n: int, seed: int = 0, drawn: bool = False) -> tuple[ohg.BilevelProblem, Params]:
    """GT3 by single samples, and its optimal ``lam``: the batches of a step go round, or are drawn."""
    p, q = 6, 4
    x = randn(n, p, seed=seed)
    h = 0.5 * x[:, :, None] * x[:, None, :] + 0.5 * torch.eye(p, dtype=F64)
    b = 0.4 * randn(p, q, seed=seed + 1) + 0.1 * randn(n, p, q, seed=seed + 2)
    c, t = randn(n, p, seed=seed + 3), randn(n, p, seed=seed + 4)

    def inner(w: Params, lam: Params, i: int) -> torch.Tensor:
        return 0.5 * w["w"] @ (h[i] @ w["w"]) - w["w"] @ (b[i] @ lam["x"] + c[i])

    def outer(w: Params, lam: Params, j: int) -> torch.Tensor:
        return 0.5 * ((w["w"] - t[j]) ** 2).sum() + 0.25 * (lam["x"] ** 2).sum()

    def draw(step: int) -> int:
        return int(torch.randint(n, (), generator=torch.Generator().manual_seed(step)))

    a, d = (torch.linalg.solve(h.mean(0), r) for r in (b.mean(0), c.mean(0)))
    best = torch.linalg.solve(a.T @ a + 0.5 * torch.eye(q, dtype=F64), a.T @ (t.mean(0) - d))
    batches = (
        (lambda s: draw(2 * s), lambda s: draw(2 * s + 1)) if drawn else (lambda s: s % n,) * 2
    )
    return ohg.BilevelProblem(inner, outer, *batches), {"x": best}


def minimized(problem: ohg.BilevelProblem, estimator, num_steps: int, **settings) -> Params:
    return ohg.minimize_bilevel(
        problem,
        {"w": torch.zeros(6, dtype=F64)},
        {"x": torch.ones(4, dtype=F64)},
        **{"inner_solver": ONE, "optimizer": SGD, **settings},
        estimator=estimator,
        num_steps=num_steps,
    ).outer_params


@pytest.mark.parametrize("estimator", [ohg.SOBA(), ohg.MASOBA(theta=0.25)], ids=["soba", "ma_soba"])
def test_all_directions_are_taken_at_the_same_point(estimator) -> None:
    """Three steps against the formulas with dense matrices, a new ``lam`` each."""
    problem, _ = sampled(5)
    w, v = randn(6, seed=9), torch.zeros(6, dtype=F64)
    found, average = None, None
    for step in range(3):
        lam = {"x": randn(4, seed=30 + step)}

        def gradient(w, x, i=step % 5):
            return torch.func.grad(lambda w: problem.inner_objective({"w": w}, {"x": x}, i))(w)

        at = (w, lam["x"])
        h, m = torch.func.jacrev(gradient, argnums=(0, 1))(*at)
        b, direct = torch.func.grad(
            lambda w, x, j=step: problem.outer_objective({"w": w}, {"x": x}, j), argnums=(0, 1)
        )(*at)
        value = direct - m.T @ v
        average = value if average is None else 0.75 * average + 0.25 * value
        expected = value if type(estimator) is ohg.SOBA else average
        found = estimator.estimate(
            problem,
            ONE,
            {"w": w} if found is None else found.inner_params,
            lam,
            step,
            None if found is None else found.state,
        )
        w, v = w - 0.1 * gradient(*at), v - 0.1 * (h @ v - b)
        assert relative_error(found.value, {"x": expected}) < 1e-13
        assert relative_error(found.inner_params, {"w": w}) < 1e-13
        assert relative_error({"v": found.state.tensors["v"]}, {"v": v}) < 1e-13


def test_tables_of_past_gradients_take_the_noise_away() -> None:
    """GT3 with 8 samples."""
    problem, best = sampled(8)
    drawn, _ = sampled(8, drawn=True)
    saba = ohg.SABA(num_inner_batches=8, num_outer_batches=8)
    assert relative_error(minimized(problem, saba, 900), best) ** 2 < 1e-4
    assert relative_error(minimized(drawn, ohg.SOBA(), 900), best) ** 2 > 1e-3


def test_the_tables_are_means_at_the_points_where_their_batches_were_seen_last() -> None:
    problem, _ = sampled(4)
    saba = ohg.SABA(num_inner_batches=4, num_outer_batches=3, seed=3)
    problem = ohg.BilevelProblem(
        problem.inner_objective, problem.outer_objective, lambda s: s % 4, lambda s: s % 3
    )
    w, lam = {"w": randn(6, seed=1)}, {"x": randn(4, seed=2)}
    found = saba.estimate(problem, ONE, w, lam)
    whole = [
        torch.func.grad(lambda w, i=i: problem.inner_objective({"w": w}, lam, i))(w["w"])
        for i in range(4)
    ]
    mean = torch.stack(whole).mean(0)
    assert relative_error(found.inner_params, {"w": w["w"] - 0.1 * mean}) < 1e-13
    for step in range(1, 9):
        found = saba.estimate(problem, ONE, found.inner_params, lam, step, found.state)
        for name in ("slope", "product", "indirect", "cotangent", "direct"):
            table, mean = (found.state.tensors[f"{kind}/{name}"] for kind in ("table", "mean"))
            assert torch.allclose(table.mean(0), mean, rtol=1e-13, atol=1e-15)


def test_a_state_with_tables_is_gone_on_from_only_once() -> None:
    problem, _ = sampled(4)
    saba = ohg.SABA(num_inner_batches=4, num_outer_batches=4)
    w, lam = {"w": randn(6, seed=1)}, {"x": randn(4, seed=2)}
    first = saba.estimate(problem, ONE, w, lam)
    saba.estimate(problem, ONE, first.inner_params, lam, 1, first.state)
    with pytest.raises(ohg.RequirementError, match="gone on from only once"):
        saba.estimate(problem, ONE, first.inner_params, lam, 1, first.state)


def test_averages_and_small_steps_find_the_solution_at_the_rate_of_one_level() -> None:
    """MA-SOBA: the mean squared hypergradient over T steps falls as T^(-1/2), all steps and theta being so small.

    Both objectives are squared distances to points that are drawn anew, so the hypergradient is ``lam`` itself.
    """

    def drawn(step: int) -> torch.Tensor:
        return randn(30, seed=step)

    problem = ohg.BilevelProblem(
        lambda w, lam, at: 0.5 * ((w["w"] - lam["x"] - at) ** 2).sum(),
        lambda w, lam, at: 0.5 * ((w["w"] - at) ** 2).sum(),
        lambda t: drawn(2 * t),
        lambda t: drawn(2 * t + 1),
    )
    means = []
    for num_steps in (150, 1200):
        size, total = num_steps**-0.5, 0.0
        solver = ohg.GradientDescent(3.0 * size, max_steps=1)
        w, x, state = {"w": torch.zeros(30, dtype=F64)}, torch.zeros(30, dtype=F64), None
        for step in range(num_steps):
            found = ohg.MASOBA(theta=3.0 * size).estimate(problem, solver, w, {"x": x}, step, state)
            w, state = found.inner_params, found.state
            x = x - 0.6 * size * found.value["x"]
            total += float(x.square().sum()) if 2 * step >= num_steps else 0.0
        means.append(2 * total / num_steps)
    assert math.log(means[1] / means[0]) / math.log(8) == pytest.approx(-0.5, abs=0.15)


def resumed(estimator, inner_solver, problem, inner_params, outer_params) -> None:
    """A run that is cut off in the middle and continued ends with the same bytes."""
    settings = {
        "estimator": estimator,
        "inner_solver": inner_solver,
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01),
    }
    whole = ohg.minimize_bilevel(problem, inner_params, outer_params, num_steps=9, **settings)
    study = optuna.create_study()
    trial = study.ask()
    part = functools.partial(
        ohg.minimize_bilevel, problem, inner_params, outer_params, checkpoint_every=1, **settings
    )
    part(num_steps=4, trial=trial)
    again = part(num_steps=9, trial=optuna.trial.Trial(study, trial._trial_id))
    assert again.history[:4] == whole.history[:4]
    for k, v in whole.outer_params.items():
        assert torch.equal(v, again.outer_params[k])
    for k, v in whole.inner_params.items():
        assert torch.equal(v, again.inner_params[k])


@pytest.mark.parametrize(
    ("estimator", "inner_solver"),
    [
        (ohg.SOBA(0.1), ohg.HeavyBall(0.1, max_steps=1)),
        (ohg.MASOBA(lambda t: 0.1 * (1 + t) ** -0.5), ohg.Adam(0.01, max_steps=1)),
        (ohg.SABA(num_inner_batches=3, num_outer_batches=3, seed=5), ONE),
    ],
    ids=lambda v: v.name,
)
def test_a_run_is_continued_bit_for_bit(estimator, inner_solver) -> None:
    problem, _ = sampled(3)
    resumed(
        estimator,
        inner_solver,
        problem,
        {"w": torch.zeros(6, dtype=F64)},
        {"x": torch.ones(4, dtype=F64)},
    )


def at_a_fixed_point(
    estimator, steps: int, curvature: float, solver=ONE
) -> ohg.HypergradientEstimate:
    """``H = diag(1, curvature)``, ``b = (1, 1)``, ``M = -I``, no matter where."""
    h = torch.tensor([1.0, curvature], dtype=F64)
    problem = ohg.BilevelProblem(
        lambda w, lam, _: 0.5 * (h * w["w"] ** 2).sum() - (lam["x"] * w["w"]).sum(),
        lambda w, lam, _: w["w"].sum(),
    )
    w, lam = {"w": torch.zeros(2, dtype=F64)}, {"x": torch.zeros(2, dtype=F64)}
    found = estimator.estimate(problem, solver, w, lam)
    for step in range(1, steps):
        if not found.result:
            break
        found = estimator.estimate(problem, solver, w, lam, step, found.state)
    return found


@pytest.mark.parametrize("curvature", [21.0, 300.0, 1e6])
def test_steps_under_which_the_linear_system_diverges_are_shortened(curvature: float) -> None:
    with pytest.warns(UserWarning, match=r"v grows at a step size of 0\.1, as the inner Hessian"):
        found = at_a_fixed_point(ohg.SOBA(0.1), 200, curvature)
    assert found.result.success
    assert found.stats["step_size"] < 2 / curvature
    top = found.value["x"][1]
    assert float(top) == pytest.approx(1 / curvature, rel=1e-3)


def test_negative_curvature_is_reported_and_damping_is_the_remedy() -> None:
    found = at_a_fixed_point(ohg.SOBA(0.1), 400, -0.5)
    assert found.result.status is ohg.Status.NEGATIVE_CURVATURE
    assert "Give damping=" in found.result.message
    assert bool(torch.isfinite(found.value["x"]).all())
    damped = at_a_fixed_point(ohg.SOBA(0.1, damping=1.0), 400, -0.5)
    exact = torch.tensor([0.5, 2.0], dtype=F64)
    assert relative_error(damped.value, {"x": exact}) < 1e-6


def test_noise_that_is_stable_in_the_mean_does_not_shorten_steps() -> None:
    """Single batches that lengthen ``v`` by themselves, and shorten it in the mean."""
    generator = torch.Generator().manual_seed(0)
    longer = 0
    for d in (3, 30):
        eta, numbers, v = 0.9 / (d + 2), {}, torch.ones(d, dtype=F64)
        for _ in range(4000):
            x = torch.randn(d, generator=generator, dtype=F64)
            product = x * (x @ v)
            products = [float(a @ b) for a, b in ((v, v), (v, product), (product, product))]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                pace = paced("X", eta, tuple(products), numbers)
            assert pace.step_size == eta
            numbers, before = pace.numbers, v.norm()
            v = v - eta * product
            longer += bool(v.norm() > before)
            v = v / v.norm()
    assert longer > 30


def test_an_overflow_is_said_in_words() -> None:
    found = at_a_fixed_point(ohg.SOBA(0.1), 3, 1e200)
    assert found.result.status is ohg.Status.NONFINITE
    assert "lower step_size (of v)" in found.result.message


def test_a_run_ends_after_its_last_step_without_another_of_the_inner_solver() -> None:
    problem, _ = sampled(3)
    w, lam = {"w": torch.zeros(6, dtype=F64)}, {"x": torch.ones(4, dtype=F64)}
    found = ohg.minimize_bilevel(
        problem, w, lam, inner_solver=ONE, estimator=ohg.SOBA(), num_steps=1
    )
    gradient = torch.func.grad(lambda w: problem.inner_objective(w, lam, 0))(w)
    assert relative_error(found.inner_params, {"w": -0.1 * gradient["w"]}) < 1e-13
    after = problem.outer_objective(found.inner_params, found.outer_params, 1)
    assert found.outer_value == pytest.approx(float(after), rel=1e-13)


def test_one_estimate_is_not_held_against_finite_differences() -> None:
    problem, _ = sampled(3)
    w, lam = {"w": torch.zeros(6, dtype=F64)}, {"x": torch.ones(4, dtype=F64)}
    with pytest.raises(ohg.RequirementError, match="SOBA comes near the hypergradient over many"):
        ohg.check_hypergradient(problem, w, lam, estimator=ohg.SOBA(), inner_solver=ONE)


def test_cold_starts_are_refused() -> None:
    problem, _ = sampled(3)
    with pytest.raises(ohg.RequirementError, match="use warm_start=True"):
        minimized(problem, ohg.SOBA(), 3, warm_start=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ohg.SOBA(-0.1), "step_size to be a finite number > 0"),
        (lambda: ohg.SOBA("0.1"), "step_size to be a finite number > 0"),
        (lambda: ohg.SOBA(float("nan")), "step_size to be a finite number > 0"),
        (lambda: ohg.SOBA(damping=-1.0), "damping >= 0"),
        (lambda: ohg.MASOBA(theta=0.0), "0 < theta <= 1"),
        (lambda: ohg.MASOBA(theta=1.5), "0 < theta <= 1"),
        (lambda: ohg.SABA(num_inner_batches=0, num_outer_batches=1), "num_inner_batches >= 1"),
        (lambda: ohg.SABA(num_inner_batches=1, num_outer_batches=2.5), "an integer"),
        (lambda: ohg.SABA(num_inner_batches=1, num_outer_batches=1, seed=-1), "seed >= 0"),
        (
            lambda: ohg.SABA(num_inner_batches=1, num_outer_batches=1, memory_budget=0),
            "memory_budget > 0",
        ),
    ],
)
def test_bad_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_that_gives_no_step_is_refused() -> None:
    problem, _ = sampled(3)
    with pytest.raises(ValueError, match=r"SOBA: step_size is 0\.0 at step 2"):
        minimized(problem, ohg.SOBA(lambda t: 0.1 * (t < 2)), 5)


def test_batches_that_do_not_go_round_are_refused() -> None:
    problem, _ = sampled(4)
    with pytest.raises(ohg.RequirementError, match=r"inner_batch\(0\) and inner_batch\(3\) differ"):
        minimized(problem, ohg.SABA(num_inner_batches=3, num_outer_batches=4), 2)


def test_a_hyperparameter_that_is_in_neither_objective_is_named() -> None:
    problem, _ = sampled(3)
    for estimator in (ohg.SOBA(), ohg.SABA(num_inner_batches=3, num_outer_batches=3)):
        with pytest.raises(
            ohg.ZeroHypergradientError, match=f"'y' under {type(estimator).__name__}"
        ):
            estimator.estimate(
                problem,
                ONE,
                {"w": torch.zeros(6, dtype=F64)},
                {"x": torch.ones(4, dtype=F64), "y": torch.ones(2, dtype=F64)},
                state=EstimatorState(),
            )


class OnlyOnce(torch.autograd.Function):
    """A square whose derivative is no operation of torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * slope.numpy() * x.numpy())


@pytest.mark.parametrize("operation", ["marked", "marked and last", "torch's own"])
def test_what_has_no_second_derivative_is_told_of_methods_that_need_none(operation: str) -> None:
    def inner(w, lam, _):
        if operation == "marked and last":  # its gradient has no graph
            return OnlyOnce.apply(w["w"]).sum() - (w["w"] * lam["x"]).sum()
        if operation == "marked":
            return (w["w"] * OnlyOnce.apply(w["w"] - lam["x"])).sum()
        return torch.nn.functional.pdist((w["w"] - lam["x"])[:, None]).sum() + w["w"].square().sum()

    problem = ohg.BilevelProblem(inner, lambda w, lam, _: w["w"].sum())
    for estimator, solver in ((ohg.SOBA(), ONE), (ohg.Implicit(), None)):
        with pytest.raises(ohg.RequirementError, match=r"penalty method \(F2SA, PBGD, BOME\)"):
            ohg.hypergradient(
                problem,
                {"w": randn(3, seed=1)},
                {"x": randn(3, seed=2)},
                estimator=estimator,
                inner_solver=solver,
            )


def test_a_derivative_of_hyperparameters_alone_need_not_be_differentiable_twice() -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: w["w"].square().sum() - w["w"] @ OnlyOnce.apply(lam["x"]),
        lambda w, lam, _: w["w"].sum(),
    )
    x = randn(3, seed=2)
    found = ohg.hypergradient(problem, {"w": x**2 / 2}, {"x": x}, estimator=ohg.Implicit())
    assert relative_error(found.value, {"x": x}) < 1e-12


def test_what_evaluates_elsewhere_is_refused() -> None:
    class Ahead(ohg.GradientDescent):
        def step(self, evaluate, inner_params, outer_params, state, index):
            moved = {k: v + 1 for k, v in inner_params.items()}
            return super().step(evaluate, moved, outer_params, state, index)

    problem, _ = sampled(3)
    with pytest.raises(ohg.RequirementError, match="asks for the inner gradient at another point"):
        minimized(problem, ohg.SOBA(), 1, inner_solver=Ahead(0.1, max_steps=1))
