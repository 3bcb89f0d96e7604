"""SAMA and T1-T2: what they are equal to, and what they do without second derivatives."""

from __future__ import annotations

import warnings

import cases
import pytest
import torch
from problems import F64, randn, relative_error
from torch import Tensor
from torch.autograd.function import once_differentiable

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients.sama import _Step, adapted


def estimate(case, estimator, solver, **changes):
    return ohg.hypergradient(
        changes.get("problem", case.problem),
        changes.get("inner_params", case.inner_params),
        changes.get("outer_params", case.outer_params),
        estimator=estimator,
        inner_solver=solver,
    )


@pytest.mark.parametrize("solver", [ohg.GradientDescent(0.2, max_steps=9), ohg.HeavyBall(0.2, 9)])
def test_t1t2_is_the_identity_in_place_of_the_inverse_hessian(solver) -> None:
    case = cases.case("quadratic")
    found = estimate(case, ohg.T1T2(), solver)
    same = [
        estimate(case, ohg.T1T2(0.2), solver),
        estimate(case, ohg.Implicit(ohg.Identity(0.2)), solver),
        estimate(case, ohg.Implicit(ohg.Neumann(0, alpha=0.2)), solver),
    ]
    for other in same:
        assert relative_error(found.value, other.value) < 1e-14
    assert found.stats["inner_gradient_norm"] > 0


@pytest.mark.parametrize("problem", ["quadratic", "ridge"])
@pytest.mark.parametrize("displacement", [None, 0.5])
def test_sama_of_gradient_descent_is_t1t2_where_the_inner_objective_is_quadratic(
    problem, displacement
) -> None:
    """Central differences of a linear function have no error, however far they go."""
    case, solver = cases.case(problem), ohg.GradientDescent(0.2, max_steps=9)
    if (
        problem == "ridge"
    ):  # quadratic in w; g_lam of the decay as well, whose central difference is exact, too
        assert displacement is None or displacement < 1
    found = estimate(case, ohg.SAMA(displacement), solver)
    assert relative_error(found.value, estimate(case, ohg.T1T2(), solver).value) < 1e-9


def test_the_error_of_sama_falls_with_the_square_of_its_displacement() -> None:
    case, solver = cases.case("logistic"), ohg.GradientDescent(0.5, max_steps=20)
    exact = estimate(case, ohg.T1T2(), solver).value
    errors = [relative_error(estimate(case, ohg.SAMA(r), solver).value, exact) for r in (0.1, 0.05)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)


OPTIMIZERS = [
    ohg.GradientDescent(0.1, max_steps=6),
    ohg.HeavyBall(0.1, max_steps=6),
    ohg.HeavyBall(0.1, max_steps=6, nesterov=True),
    ohg.Adam(0.1, max_steps=6),
    ohg.AdamW(0.1, max_steps=6, weight_decay=0.1),
]


def by_hand(solver, gradients: list[Tensor]) -> Tensor:
    """``D`` as a vector, from the formulas of the optimizers."""
    g, t = gradients[-1], len(gradients)
    if isinstance(solver, ohg.GradientDescent):
        return torch.full_like(g, 0.1)
    if isinstance(solver, ohg.HeavyBall):
        return torch.full_like(g, 0.1 * (1 + 0.9) if solver.nesterov else 0.1)
    m, s = torch.zeros_like(g), torch.zeros_like(g)
    for each in gradients:
        m, s = 0.9 * m + 0.1 * each, 0.999 * s + 0.001 * each**2
    m, s = m / (1 - 0.9**t), s / (1 - 0.999**t) + 1e-16
    return 0.1 * (0.1 / (1 - 0.9**t) / s.sqrt() - 0.001 / (1 - 0.999**t) * m * g / s**1.5)


@pytest.mark.parametrize("solver", OPTIMIZERS, ids=lambda s: f"{s.name}-{vars(s).get('nesterov')}")
def test_the_adaptation_is_the_derivative_of_the_step_by_the_gradient(solver) -> None:
    """Against the formulas, and differences of the step itself."""
    gradients = [randn(7, seed=i) for i in range(6)]
    w, state = {"w": randn(7, seed=10)}, solver.init({"w": randn(7, seed=10)})
    value = torch.zeros(())
    for i, g in enumerate(gradients[:-1]):
        w, state, _, _ = solver.step(lambda _, g=g: (value, {"w": g}), w, {}, state, i)
    f_w = randn(7, seed=20)
    found = adapted(solver, _Step(w, state, 5, {"w": gradients[-1]}), {}, {"w": f_w})["w"]
    formula = by_hand(solver, gradients) * f_w
    assert float((found - formula).norm() / formula.norm()) < 1e-11

    def stepped(g: Tensor) -> Tensor:
        return solver.step(lambda _: (value, {"w": g}), w, {}, state, 5)[0]["w"]

    h = 1e-5
    columns = [
        (stepped(gradients[-1] + h * e) - stepped(gradients[-1] - h * e)) / (2 * h)
        for e in torch.eye(7, dtype=F64)
    ]
    differences = -torch.stack(columns) @ f_w
    assert float((found - differences).norm() / differences.norm()) < 1e-7


@pytest.mark.parametrize("solver", OPTIMIZERS, ids=lambda s: f"{s.name}-{vars(s).get('nesterov')}")
def test_sama_is_its_formula(solver) -> None:
    """``f_lam - M^T D f_w`` with ``M^T`` by double backward and ``D`` by hand from the gradients of a run of its own."""
    case = cases.case("logistic")
    w, lam = case.inner_params, case.outer_params
    state, gradients = solver.init(w), []

    def evaluate(at):
        leaf = at["w"].detach().requires_grad_()
        g = case.problem.inner_objective({"w": leaf}, lam, None)
        gradients.append(torch.autograd.grad(g, leaf)[0])
        return g.detach(), {"w": gradients[-1]}

    for i in range(6):
        w, state, _, _ = solver.step(evaluate, w, lam, state, i)
    leaf, leaves = w["w"].requires_grad_(), {k: v.clone().requires_grad_() for k, v in lam.items()}
    (f_w,) = torch.autograd.grad(case.problem.outer_objective({"w": leaf}, lam, None), leaf)
    g = case.problem.inner_objective({"w": leaf}, leaves, None)
    (g_w,) = torch.autograd.grad(g, leaf, create_graph=True)
    v = by_hand(solver, gradients) * f_w
    exact = dict(
        zip(leaves, torch.autograd.grad(g_w, list(leaves.values()), -v), strict=True)
    )  # f has no direct term
    assert relative_error(estimate(case, ohg.SAMA(), solver).value, exact) < 1e-8


@pytest.mark.parametrize("solver", OPTIMIZERS, ids=lambda s: f"{s.name}-{vars(s).get('nesterov')}")
@pytest.mark.parametrize("problem", ["ridge", "quadratic", "logistic"])
def test_single_precision_has_three_digits(problem, solver) -> None:
    """Differences of gradients lose half of the digits: the default displacement keeps three of seven."""
    case = cases.case(problem)

    def single(tree):
        return {k: v.float() for k, v in tree.items()}

    def rounded(objective):
        return lambda w, lam, batch: objective(
            {k: v.double() for k, v in w.items()}, {k: v.double() for k, v in lam.items()}, batch
        ).float()

    narrow = ohg.BilevelProblem(
        rounded(case.problem.inner_objective), rounded(case.problem.outer_objective)
    )
    found = estimate(
        case,
        ohg.SAMA(),
        solver,
        problem=narrow,
        inner_params=single(case.inner_params),
        outer_params=single(case.outer_params),
    )
    exact = estimate(case, ohg.SAMA(), solver).value
    assert found.value["log_decay" if problem != "quadratic" else "number"].dtype == torch.float32
    assert relative_error({k: v.double() for k, v in found.value.items()}, exact) < 1e-3


def test_a_displacement_that_drowns_in_rounding_is_pointed_out() -> None:
    def inner(w, lam, batch):
        return 0.5 * ((w["w"] - 10.0) ** 2).sum() + (lam["x"] * w["w"]).sum()

    problem = ohg.BilevelProblem(inner, lambda w, lam, batch: (w["w"] ** 2).sum())
    w, lam = {"w": torch.ones(5)}, {"x": torch.ones(5)}
    solver = ohg.GradientDescent(0.1, max_steps=5)
    with pytest.warns(UserWarning, match="'x' moves by .*raise displacement"):
        ohg.hypergradient(problem, w, lam, estimator=ohg.SAMA(1e-7), inner_solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ohg.hypergradient(problem, w, lam, estimator=ohg.SAMA(), inner_solver=solver)


class Once(torch.autograd.Function):
    """``sin``, without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("solver", [ohg.GradientDescent(0.1, max_steps=9), ohg.Adam(0.1, 9)])
def test_sama_needs_first_derivatives_only(solver) -> None:
    def objective(sine):
        return lambda w, lam, batch: (sine(w["w"] * lam["x"]) ** 2 + 0.5 * w["w"] ** 2).sum()

    def outer(w, lam, batch):
        return ((w["w"] - 1.0) ** 2).sum() + lam["x"].sum()

    w, lam = {"w": randn(6, seed=0)}, {"x": randn(6, seed=1)}
    once = ohg.BilevelProblem(objective(Once.apply), outer)
    found = ohg.hypergradient(once, w, lam, estimator=ohg.SAMA(), inner_solver=solver)
    twice = ohg.BilevelProblem(objective(torch.sin), outer)
    exact = ohg.hypergradient(twice, w, lam, estimator=ohg.SAMA(), inner_solver=solver)
    assert relative_error(found.value, exact.value) < 1e-12


@pytest.mark.parametrize(
    "estimator",
    [
        ohg.Implicit(),
        ohg.Implicit(compile=True),
        ohg.T1T2(),
        ohg.FixedPointImplicit(),
        ohg.Unroll(),
        ohg.Unroll(truncation=2),
        ohg.ForwardMode(),
        ohg.ForwardGradient(2),
        ohg.Reversible(),
    ],
    ids=lambda e: f"{e.name}-{getattr(e, 'truncation', None)}",
)
@pytest.mark.parametrize("constant", [True, False])
def test_all_others_refuse_what_has_no_second_derivative(estimator, constant) -> None:
    """Where the function is given a constant cotangent, torch leaves no trace of it in the graph of the gradient."""

    def inner(w, lam, batch):
        once = Once.apply(w["w"] * lam["x"])
        return (once if constant else once**2).sum() + 0.5 * (w["w"] ** 2).sum()

    problem = ohg.BilevelProblem(inner, lambda w, lam, batch: ((w["w"] - 1) ** 2).sum())
    w, lam = {"w": randn(6, seed=0)}, {"x": randn(6, seed=1)}
    solver = ohg.HeavyBall(0.1, max_steps=4)
    with pytest.raises(ohg.RequirementError, match="once_differentiable"):
        ohg.hypergradient(problem, w, lam, estimator=estimator, inner_solver=solver)


def test_an_outer_objective_at_its_minimum_over_w_leaves_the_direct_term() -> None:
    case, solver = cases.case("isotropic"), ohg.GradientDescent(0.1, max_steps=3)
    problem = ohg.BilevelProblem(
        case.problem.inner_objective, lambda w, lam, batch: 0 * w["w"].sum() + lam["x"].sum()
    )
    found = estimate(case, ohg.SAMA(), solver, problem=problem)
    assert torch.equal(found.value["x"], torch.ones(5, dtype=F64))


def test_sama_works_on_the_batch_after_the_last_and_in_a_differentiable_solve() -> None:
    case = cases.case("isotropic")
    seen = []
    problem = ohg.BilevelProblem(
        case.problem.inner_objective,
        case.problem.outer_objective,
        inner_batch=lambda step: seen.append(step) or step,
    )
    found = estimate(case, ohg.SAMA(), ohg.GradientDescent(0.25, max_steps=4), problem=problem)
    assert seen[-2:] == [4, 4]
    assert found.state.inner_index == 4
    lam = {"x": case.outer_params["x"].clone().requires_grad_()}
    w = ohg.solve(
        case.problem.inner_objective,
        case.inner_params,
        lam,
        solver=ohg.GradientDescent(0.25, max_steps=4),
        estimator=ohg.SAMA(),
    )
    case.problem.outer_objective(w, lam, None).backward()
    assert relative_error({"x": lam["x"].grad}, cases.truth("isotropic")) < 1e-8


def test_a_numeric_weight_decay_is_no_obstacle() -> None:
    """The adaptation is of the gradient; T1-T2 and implicit differentiation of the solution refuse it."""
    case, solver = cases.case("isotropic"), ohg.AdamW(0.1, max_steps=5)
    assert estimate(case, ohg.SAMA(), solver).result.success
    with pytest.raises(ohg.RequirementError, match="weight_decay"):
        estimate(case, ohg.T1T2(0.1), solver)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ohg.SAMA(0.0),
        lambda: ohg.SAMA(2.0),
        lambda: ohg.SAMA(float("nan")),
        lambda: ohg.SAMA("far"),
        lambda: ohg.T1T2(0.0),
        lambda: ohg.T1T2(float("inf")),
        lambda: ohg.T1T2(True),
    ],
)
def test_settings_are_checked_when_they_are_made(make) -> None:
    with pytest.raises(ValueError, match="needs"):
        make()
