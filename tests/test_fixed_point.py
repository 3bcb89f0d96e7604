"""Fixed points: the searches, the layer against exact answers (GT8), and the estimator over an inner solver's step."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace

import cases
import pytest
import torch
from problems import F64, randn, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import equilibrium
from optuna_hypergrad.equilibrium import find_fixed_point

GMRES = [ohg.GMRES(200, 1e-13)] if hasattr(ohg, "GMRES") else []

SEARCHES = [
    (ohg.Picard(3000, 1e-12), "radius 0.9"),
    (ohg.Picard(3000, 1e-12, relaxation=0.5), "radius 0.9"),
    (ohg.Picard(3000, 1e-12, relaxation=0.5), "all eigenvalues near -1.5"),
    (ohg.Anderson(200, 1e-12), "radius 0.9"),
    (ohg.Anderson(200, 1e-12, memory=30), "radius 0.99"),
    (ohg.Anderson(200, 1e-12, memory=30), "all eigenvalues near -1.5"),
    (ohg.Anderson(200, 1e-12, memory=30, relaxation=0.7), "radius 3"),
]
"""Method, map on which it must find the fixed point."""

EXACT_BACKWARD = [
    (ohg.Direct(), 1e-9),
    *((solver, 1e-9) for solver in GMRES),
    (ohg.Neumann(5500, alpha=0.5), 1e-9),
    (ohg.Phantom(2800, 1.0), 1e-9),
    (ohg.Picard(2800, 1e-12), 1e-9),
    (ohg.Anderson(400, 1e-12, memory=40), 1e-9),
    (ohg.Phantom(2800, 1.0, unrolled=True), 1e-9),
]


def matrix_of(radius: float, size: int = 30, seed: int = 0) -> Tensor:
    """Not symmetric, of this spectral radius."""
    a = randn(size, size, seed=seed)
    return radius * a / torch.linalg.eigvals(a).abs().max()


def affine(kind: str) -> tuple[Tensor, Tensor]:
    if kind.startswith("radius"):
        return matrix_of(float(kind.split()[1])), randn(30, seed=1)
    return -1.5 * torch.eye(30, dtype=F64) + matrix_of(0.3), randn(30, seed=1)


@pytest.mark.parametrize(("solver", "kind"), SEARCHES, ids=str)
def test_search_finds_the_fixed_point_of_a_linear_map(solver, kind) -> None:
    a, c = affine(kind)
    found = find_fixed_point(solver, lambda z: {"z": a @ z["z"] + c}, {"z": torch.zeros_like(c)})
    exact = torch.linalg.solve(torch.eye(30, dtype=F64) - a, c)
    assert found.result.success, found.result.message
    assert float((found.image["z"] - exact).norm() / exact.norm()) < 1e-9
    assert found.residual < 1e-12


def test_every_search_has_a_row_and_a_reference() -> None:
    tried = {type(solver) for solver, _ in SEARCHES}
    for name, cls in equilibrium.REGISTRY.items():
        assert cls in tried, name
        assert "Reference" in inspect.getdoc(cls), name


def test_anderson_with_enough_memory_ends_after_as_many_steps_as_dimensions() -> None:
    """On a linear map it is GMRES (Walker & Ni 2011, theorem 2.2), expanding or not."""
    a, c = matrix_of(2.0, size=8), randn(8, seed=1)
    solver = ohg.Anderson(12, 1e-9, memory=8)
    found = find_fixed_point(solver, lambda z: {"z": a @ z["z"] + c}, {"z": torch.zeros_like(c)})
    assert found.result.success
    assert found.num_steps <= 10


def test_anderson_takes_samples_by_themselves() -> None:
    """One hard sample does not change what is done for the others, or their order."""
    a = torch.stack([matrix_of(r, 10, seed=i) for i, r in enumerate((0.2, 0.9, 0.99))])
    c = randn(3, 10, seed=1)
    solver = ohg.Anderson(12, rtol=0.0, memory=3, per_sample=True)

    def search(rows: list[int]) -> Tensor:
        def function(z: dict[str, Tensor]) -> dict[str, Tensor]:
            flat = torch.cat([z["a"], z["b"]], dim=1)
            moved = torch.einsum("bij,bj->bi", a[rows], flat) + c[rows]
            return {"a": moved[:, :4], "b": moved[:, 4:]}

        z0 = {"a": c.new_zeros(len(rows), 4), "b": c.new_zeros(len(rows), 6)}
        found = find_fixed_point(solver, function, z0).point
        return torch.cat([found["a"], found["b"]], dim=1)

    together = search([0, 1, 2])
    for i in range(3):
        assert torch.allclose(search([i])[0], together[i], rtol=1e-9, atol=1e-12)
    with pytest.raises(ohg.RequirementError, match="first dimension that counts the samples"):
        find_fixed_point(solver, lambda z: z, {"a": c, "b": c[:2]})


def test_without_tolerances_a_search_takes_exactly_its_steps() -> None:
    a, c = affine("radius 0.9")
    found = find_fixed_point(
        ohg.Picard(7, rtol=0.0), lambda z: {"z": a @ z["z"] + c}, {"z": torch.zeros_like(c)}
    )
    z = torch.zeros_like(c)
    for _ in range(7):
        z = a @ z + c
    assert torch.equal(found.point["z"], z)
    assert found.num_steps == 7
    assert found.result.success


# The layer, GT8: z* = A z* + theta, f = <c, z*>, so that theta's gradient is (I - A^T)^-1 c.


def layer_gradient(a: Tensor, c: Tensor, backward: object) -> Tensor:
    theta = randn(len(c), seed=3).requires_grad_()
    z = ohg.fixed_point(
        lambda z: a @ z + theta,
        torch.zeros_like(c),
        forward=ohg.Anderson(500, 1e-12, memory=40),
        backward=backward,
    )
    (gradient,) = torch.autograd.grad(z @ c, theta)
    return gradient


@pytest.mark.parametrize("radius", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(("backward", "rtol"), EXACT_BACKWARD, ids=str)
def test_exact_backward_solves_have_the_exact_gradient(radius, backward, rtol) -> None:
    a, c = matrix_of(radius), randn(30, seed=2)
    exact = torch.linalg.solve(torch.eye(30, dtype=F64) - a.T, c)
    found = layer_gradient(a, c, backward)
    assert float((found - exact).norm() / exact.norm()) < rtol


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(("num_steps", "tau"), [(1, 1.0), (1, 0.4), (5, 1.0), (6, 0.5)])
def test_phantom_gradients_are_their_formula(num_steps, tau, unrolled) -> None:
    a, c = matrix_of(0.9), randn(30, seed=2)
    power = tau * a.T + (1 - tau) * torch.eye(30, dtype=F64)
    formula = tau * sum(torch.linalg.matrix_power(power, t) @ c for t in range(num_steps))
    found = layer_gradient(a, c, ohg.Phantom(num_steps, tau, unrolled))
    assert float((found - formula).norm() / formula.norm()) < 1e-12


def test_cosines_of_phantom_gradients_by_spectral_radius() -> None:
    """One random matrix of another prototype gave 1.000/.932/.865 at k=5 and 1.000/.998/.934 at k=20: so do these."""
    for num_steps, expected in (5, (1.000, 0.932, 0.865)), (20, (1.000, 0.998, 0.934)):
        for radius, figure in zip((0.5, 0.9, 0.99), expected, strict=True):
            found, exact = [], []
            for seed in range(20):
                a, c = matrix_of(radius, seed=2 * seed), randn(30, seed=2 * seed + 1)
                exact.append(torch.linalg.solve(torch.eye(30, dtype=F64) - a.T, c))
                found.append(layer_gradient(a, c, ohg.Phantom(num_steps, 1.0)))
            cosines = torch.cosine_similarity(torch.stack(found), torch.stack(exact))
            assert float(cosines.mean()) == pytest.approx(
                figure, abs=1e-3 + float(cosines.std())
            ), (num_steps, radius)


class Cell(torch.nn.Module):
    """A small equilibrium model with parameters, an input, and what it closes over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(matrix_of(0.7, 6))
        self.inject = torch.nn.Linear(3, 6, dtype=F64)
        with torch.no_grad():
            self.inject.weight.copy_(randn(6, 3, seed=4))
            self.inject.bias.copy_(randn(6, seed=5))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return (z @ self.weight + self.inject(x)).tanh()


BACKWARD = [
    ohg.Direct(),
    *GMRES,
    ohg.Neumann(300, alpha=1.0),
    ohg.Picard(500, 1e-12),
    ohg.Anderson(rtol=1e-12),
    ohg.Anderson(rtol=1e-12, per_sample=True),
    ohg.Phantom(300, 1.0, unrolled=True),
]


@pytest.mark.parametrize("backward", BACKWARD, ids=str)
def test_gradients_reach_parameters_inputs_and_closures(backward) -> None:
    cell, x = Cell(), randn(5, 3, seed=6).requires_grad_()
    scale = torch.tensor(0.9, dtype=F64, requires_grad=True)
    target = randn(5, 6, seed=7)
    wanted = [*cell.parameters(), x, scale]

    def function(z: Tensor) -> Tensor:
        return scale * cell(z, x)

    z = torch.zeros(5, 6, dtype=F64)
    for _ in range(400):
        z = function(z)
    exact = torch.autograd.grad((z * target).sum(), wanted)
    stats: dict[str, float] = {}
    found = ohg.fixed_point(
        function,
        torch.zeros(5, 6, dtype=F64),
        forward=ohg.Anderson(rtol=1e-12),
        backward=backward,
        stats=stats,
    )
    (found * target).sum().backward()
    for p, e in zip(wanted, exact, strict=True):
        assert float((p.grad - e).norm() / e.norm()) < 1e-9
    assert stats["residual"] < 1e-12
    assert float((found.detach() - z.detach()).norm()) < 1e-11 * float(z.detach().norm())
    if not isinstance(backward, ohg.Phantom):
        assert stats["backward_residual"] < 1e-11
        assert stats["num_products"] > 1


def test_layers_stack_and_take_dicts() -> None:
    """Two equilibria, the second a dict of two tensors of which one does not depend on the other."""
    cell, x = Cell(), randn(2, 3, seed=6)
    gain = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def second(first: Tensor):
        return lambda z: {
            "a": gain * z["b"].sin() + first,
            "b": 0.3 * z["b"] + first.mean(0, keepdim=True),
        }

    zeros = {"a": torch.zeros(2, 6, dtype=F64), "b": torch.zeros(1, 6, dtype=F64)}

    def unrolled() -> Tensor:
        first = torch.zeros(2, 6, dtype=F64)
        for _ in range(300):
            first = cell(first, x)
        z = zeros
        for _ in range(300):
            z = second(first)(z)
        return (z["a"] ** 2).sum()

    def layered() -> Tensor:
        tight = {"forward": ohg.Anderson(rtol=1e-12), "backward": ohg.Anderson(rtol=1e-12)}
        first = ohg.fixed_point(lambda z: cell(z, x), zeros["a"], **tight)
        return (ohg.fixed_point(second(first), zeros, **tight)["a"] ** 2).sum()

    wanted = [*cell.parameters(), gain]
    exact, found = (torch.autograd.grad(f(), wanted) for f in (unrolled, layered))
    for e, f in zip(exact, found, strict=True):
        assert float((f - e).norm() / e.norm()) < 1e-9


def test_the_value_is_the_same_without_a_graph_and_memory_does_not_grow() -> None:
    cell, x = Cell(), randn(5, 3, seed=6)
    zeros = torch.zeros(5, 6, dtype=F64)
    with_graph = ohg.fixed_point(lambda z: cell(z, x), zeros)
    with torch.no_grad():
        without = ohg.fixed_point(lambda z: cell(z, x), zeros)
    assert torch.equal(with_graph, without)
    assert not without.requires_grad
    saved = []
    for steps in (3, 30):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            kept = ohg.fixed_point(lambda z: cell(z, x), zeros, forward=ohg.Picard(steps, rtol=0.0))
        saved.append(sum(sizes))
        del kept
    assert saved[0] == saved[1] > 0


def test_the_result_may_be_written_to() -> None:
    cell, x = Cell(), randn(5, 3, seed=6)
    zeros, found = torch.zeros(5, 6, dtype=F64), []
    for in_place in (False, True):
        z = ohg.fixed_point(lambda z: cell(z, x), zeros, backward=ohg.Phantom(50, 1.0))
        loss = torch.nn.ReLU(inplace=in_place)(z).sum()
        found.append(torch.autograd.grad(loss, cell.weight)[0])
    assert torch.equal(*found)


def test_what_depends_on_nothing_requires_no_gradient() -> None:
    a, c = affine("radius 0.9")
    assert not ohg.fixed_point(lambda z: a @ z + c, torch.zeros_like(c)).requires_grad
    constant = c.clone().requires_grad_()
    z = ohg.fixed_point(lambda z: 1.0 * constant, torch.zeros_like(c))  # J = 0
    (gradient,) = torch.autograd.grad(z.sum(), constant)
    assert torch.equal(gradient, torch.ones_like(c))


def test_half_precision_is_solved_in_single() -> None:
    a, c = matrix_of(0.5).bfloat16(), randn(30, seed=2).bfloat16().requires_grad_()
    z = ohg.fixed_point(
        lambda z: a @ z + c,
        torch.zeros_like(c),
        forward=ohg.Picard(40, rtol=0.0),
        backward=ohg.Phantom(30, 1.0),
    )
    (gradient,) = torch.autograd.grad(z.float().sum(), c)
    exact = torch.linalg.solve(torch.eye(30) - a.float().T, torch.ones(30))
    assert z.dtype == gradient.dtype == torch.bfloat16
    assert float((gradient.float() - exact).norm() / exact.norm()) < 2e-2


def test_unrolled_phantoms_can_be_differentiated_again_and_others_say_that_they_cannot() -> None:
    theta = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def equilibrium(backward: object) -> Tensor:
        return ohg.fixed_point(
            lambda z: (theta * z).sin() + theta,
            torch.zeros(1, dtype=F64),
            forward=ohg.Picard(200, 1e-14),
            backward=backward,
        ).sum()

    (slope,) = torch.autograd.grad(
        equilibrium(ohg.Phantom(100, 1.0, unrolled=True)), theta, create_graph=True
    )
    (bend,) = torch.autograd.grad(slope, theta)
    z = torch.zeros(1, dtype=F64)
    for _ in range(300):
        z = (theta * z).sin() + theta
    (exact,) = torch.autograd.grad(z.sum(), theta, create_graph=True)
    slope, exact_slope = slope.detach(), exact.detach()
    assert float(slope) == pytest.approx(float(exact_slope), rel=1e-10)
    assert float(bend) == pytest.approx(float(torch.autograd.grad(exact, theta)[0]), rel=1e-8)
    with pytest.raises(ohg.RequirementError, match="unrolled=True"):
        torch.autograd.grad(equilibrium(ohg.Phantom()), theta, create_graph=True)


A, C = affine("radius 0.9")
ZEROS = torch.zeros_like(C)
REFUSED = [
    ({"map": 3}, ohg.ObjectiveError, "needs a function"),
    ({"forward": ohg.GradientDescent(0.1)}, ohg.RequirementError, "forward must be Anderson"),
    ({"backward": 5}, ohg.RequirementError, "backward must be Phantom"),
    (
        {"backward": ohg.CG()},
        ohg.RequirementError,
        "CG needs a symmetric matrix.*GMRES.*Phantom.*normal equations",
    ),
    ({"backward": ohg.Neumann()}, ohg.RequirementError, "alpha='lanczos'.*Give alpha a number"),
    ({"z0": [0.0]}, ohg.ProblemError, "z0"),
    ({"z0": torch.zeros(3, dtype=torch.int64)}, ohg.ProblemError, "floating-point"),
    ({"z0": ZEROS / 0}, ohg.ProblemError, "finite"),
    ({"z0": ZEROS.clone().requires_grad_()}, ohg.ZeroHypergradientError, r"z0.detach\(\)"),
    ({"map": lambda z: z[:3]}, ohg.ObjectiveError, r"shape \(30,\) and returned a .*\(3,\)"),
    ({"map": lambda z: 1.0}, ohg.ObjectiveError, "returned a float"),
    ({"map": lambda z: z.float()}, ohg.ObjectiveError, "dtype that it returns"),
    ({"z0": {"z": ZEROS}, "map": lambda z: z["z"]}, ohg.ObjectiveError, "returned Tensor"),
    ({"z0": {"z": ZEROS}, "map": lambda z: {"z": 1}}, ohg.ObjectiveError, "returned a int"),
    (
        {"map": lambda z: 2 * z + 1, "forward": ohg.Picard()},
        ohg.SolverError,
        "relative residual of 5.0e-01 .*no contraction.*Use Anderson",
    ),
    ({"map": lambda z: z.exp() + z, "forward": ohg.Picard()}, ohg.SolverError, "NaN or infinite"),
    (
        {"map": lambda z: A @ z + C, "forward": ohg.Picard(40)},
        ohg.SolverError,
        "after 40 evaluations.*raise max_steps",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    REFUSED,
    ids=[f"{i}-{r[2][:30]}" for i, r in enumerate(REFUSED)],
)
def test_bad_input_is_refused_in_words(arguments, error, message) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        ohg.fixed_point(**{"map": lambda z: A @ z + C, "z0": ZEROS, **arguments})


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_map_that_writes_to_its_argument_is_refused_and_the_start_is_left_alone(mode) -> None:
    """Without a graph its answer was wrong, and in the caller's ``z0``."""
    z0 = torch.zeros(3, dtype=F64)
    two = {"b": z0, "a": torch.ones(3, dtype=F64)}
    with mode():
        for start in (z0, torch.zeros(3, dtype=F64)):
            with pytest.raises(ohg.ObjectiveError, match=r"writes to its argument, .*z\.clone\(\)"):
                ohg.fixed_point(lambda z: z.mul_(0.5).add_(1.0), start)
            assert torch.equal(start, torch.zeros_like(start))
        with pytest.raises(ohg.ObjectiveError, match="writes to its argument"):
            ohg.fixed_point(lambda z: {"b": z["b"], "a": z["a"].mul_(0.5)}, two)
        found = ohg.fixed_point(lambda z: z.clone().mul_(0.5).add_(1.0), z0)
        same = ohg.fixed_point(lambda z: z, z0)
    assert torch.allclose(found, torch.full_like(found, 2.0))
    assert torch.equal(same, z0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ohg.Picard(0),
        lambda: ohg.Picard(2.5),
        lambda: ohg.Picard(rtol=-1.0),
        lambda: ohg.Picard(rtol=float("nan")),
        lambda: ohg.Picard(relaxation=0.0),
        lambda: ohg.Picard(relaxation=1.5),
        lambda: ohg.Anderson(memory=0),
        lambda: ohg.Phantom(0),
        lambda: ohg.Phantom(5, 0.0),
        lambda: ohg.Phantom(5, float("nan")),
        lambda: ohg.Phantom(5, 0.5, unrolled=1),
    ],
)
def test_settings_are_checked_when_they_are_made(make) -> None:
    with pytest.raises(ValueError, match="needs"):
        make()


def test_failures_are_warnings_where_they_are_not_thrown() -> None:
    theta = C.clone().requires_grad_()
    with pytest.warns(UserWarning, match="after 5 evaluations"):
        z = ohg.fixed_point(
            lambda z: A @ z + theta,
            ZEROS,
            forward=ohg.Picard(5),
            backward=ohg.Picard(3),
            throw=False,
        )
    with pytest.warns(UserWarning, match=r"\(I - J\^T\) u = b.*Picard failed.*after 3"):
        z.sum().backward()
    z = ohg.fixed_point(lambda z: A @ z + theta, ZEROS, backward=ohg.Picard(3))
    with pytest.raises(ohg.SolverError, match="after 3 evaluations"):
        z.sum().backward()


def test_a_phantom_whose_terms_run_away_is_a_failure() -> None:
    theta = C.clone().requires_grad_()
    expanding = -3.0 * torch.eye(30, dtype=F64)
    z = ohg.fixed_point(lambda z: expanding @ z + theta, ZEROS, backward=ohg.Phantom(8, 1.0))
    with pytest.raises(ohg.SolverError, match=r"terms of the series grew by a factor of 2\.2e"):
        z.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = ohg.fixed_point(lambda z: expanding @ z + theta, ZEROS, backward=ohg.Phantom(40, 0.25))
        z.sum().backward()  # tau J + (1 - tau) I = 0
    assert torch.allclose(theta.grad, torch.full_like(C, 0.25))


# The estimator.


@pytest.mark.parametrize(("num_steps", "tau"), [(1, 1.0), (4, 0.5), (20, 0.8)])
def test_phantom_of_gradient_descent_is_neumann_with_alpha_tau_eta(num_steps, tau) -> None:
    case, eta = cases.case("quadratic"), 0.25
    optimum = case.solution(case.outer_params)
    solver = ohg.GradientDescent(eta, max_steps=1)
    phantom = ohg.hypergradient(
        case.problem,
        optimum,
        case.outer_params,
        estimator=ohg.FixedPointImplicit(ohg.Phantom(num_steps, tau)),
        inner_solver=solver,
    )
    series = ohg.hypergradient(
        case.problem,
        optimum,
        case.outer_params,
        estimator=ohg.Implicit(ohg.Neumann(num_steps - 1, alpha=tau * eta)),
        inner_solver=solver,
    )
    assert relative_error(phantom.value, series.value) < 1e-10
    assert phantom.stats["num_hvps"] == num_steps - 1
    assert phantom.stats["residual"] == pytest.approx(series.stats["residual"], rel=1e-9)


@pytest.mark.parametrize("num_steps", [1, 3, 9])
def test_phantom_of_momentum_descent_is_its_unrolling_from_the_solution(num_steps) -> None:
    """With the velocity among the variables: ``k`` steps differentiated at rest are the series of the map."""
    case = cases.case("quadratic")
    optimum = case.solution(case.outer_params)
    found = [
        ohg.hypergradient(
            case.problem,
            optimum,
            case.outer_params,
            estimator=estimator,
            inner_solver=ohg.HeavyBall(0.2, max_steps=steps, momentum=0.8),
        ).value
        for estimator, steps in (
            (ohg.FixedPointImplicit(ohg.Phantom(num_steps, 1.0)), 1),
            (ohg.Unroll(), num_steps),
        )
    ]
    assert relative_error(found[0], found[1]) < 1e-10


def test_momentum_speeds_the_series_up() -> None:
    case, exact = cases.case("quadratic"), cases.truth("quadratic")
    optimum = case.solution(case.outer_params)
    errors = [
        relative_error(
            ohg.hypergradient(
                case.problem,
                optimum,
                case.outer_params,
                estimator=ohg.FixedPointImplicit(ohg.Phantom(60, 1.0)),
                inner_solver=solver,
            ).value,
            exact,
        )
        for solver in (
            ohg.GradientDescent(0.05, max_steps=1),
            ohg.HeavyBall(0.05, max_steps=1, momentum=0.8),
        )
    ]
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_weight_decay_of_the_solver_is_seen(nesterov) -> None:
    """As if the inner objective had it, and its hypergradient is that of the objective's."""
    case = cases.case("quadratic")
    lam = {**case.outer_params, "decay": torch.tensor(0.3, dtype=F64)}
    inner, outer = case.problem.inner_objective, case.problem.outer_objective

    def decayed(w, lam, batch):
        return inner(w, lam, batch) + 0.5 * lam["decay"] * sum((v**2).sum() for v in w.values())

    solver = ohg.HeavyBall(0.2, max_steps=400, momentum=0.8, nesterov=nesterov)
    found = ohg.hypergradient(
        ohg.BilevelProblem(inner, outer),
        case.inner_params,
        lam,
        estimator=ohg.FixedPointImplicit(ohg.Anderson(rtol=1e-11, memory=20)),
        inner_solver=replace(solver, weight_decay="decay"),
    )
    written_out = ohg.hypergradient(
        ohg.BilevelProblem(decayed, outer),
        case.inner_params,
        lam,
        estimator=ohg.Implicit(ohg.Direct()),
        inner_solver=solver,
    )
    assert relative_error(found.value, written_out.value) < 1e-8


def test_the_estimator_says_how_far_the_inner_problem_is_from_its_solution() -> None:
    case = cases.case("ridge")
    stats = [
        ohg.hypergradient(
            case.problem,
            case.inner_params,
            case.outer_params,
            estimator=ohg.FixedPointImplicit(ohg.Phantom(5)),
            inner_solver=ohg.HeavyBall(0.3, max_steps=n, momentum=0.8),
        ).stats
        for n in (5, 300)
    ]
    for key in ("inner_gradient_norm", "fixed_point_residual"):
        assert stats[1][key] < 1e-9 < 1e-3 < stats[0][key]


def test_cg_and_unrolled_phantoms_are_refused_when_the_estimator_is_made() -> None:
    for solver, message in (
        (ohg.CG(), "CG needs a symmetric matrix"),
        (ohg.Neumann(), "measures the curvature"),
        (ohg.Phantom(unrolled=True), r"Use .*Unroll\(truncation=k\)"),
        (3, "must be Phantom"),
    ):
        with pytest.raises(ohg.RequirementError, match=message):
            ohg.FixedPointImplicit(solver)


@dataclass(frozen=True)
class Wrapped(ohg.GradientDescent):
    """A solver of somebody else's, around another."""

    inside: ohg.Lookahead | None = None

    def init(self, inner_params):
        return self.inside.init(inner_params)

    def step(self, *arguments):
        return self.inside.step(*arguments)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (ohg.Lookahead(ohg.GradientDescent(0.2, 10)), r"Lookahead\(period=5\) takes another step"),
        (ohg.Lookahead(ohg.Lookahead(ohg.GradientDescent(0.2, 10)), 1), r"Lookahead\(period=5\)"),
        (ohg.Lookahead(ohg.Adam(0.2, 10), 1), "Adam takes another step"),
        (Wrapped(inside=ohg.Lookahead(ohg.GradientDescent(0.2, 10))), r"Lookahead\(period=5\)"),
    ],
    ids=["lookahead", "inside lookahead", "adam inside", "inside another's"],
)
def test_a_solver_that_counts_its_steps_has_no_fixed_point(solver, message) -> None:
    """Its hypergradient was 0, and called a success."""
    case = cases.case("quadratic")
    with pytest.raises(ohg.RequirementError, match=f"{message}.*no map of which.*Use Implicit"):
        ohg.hypergradient(
            case.problem,
            case.inner_params,
            case.outer_params,
            estimator=ohg.FixedPointImplicit(),
            inner_solver=solver,
        )


def test_a_lookahead_whose_period_is_one_step_has_one() -> None:
    case = cases.case("quadratic")
    found = ohg.hypergradient(
        case.problem,
        case.inner_params,
        case.outer_params,
        estimator=ohg.FixedPointImplicit(ohg.Anderson(rtol=1e-11, memory=20)),
        inner_solver=ohg.Lookahead(ohg.GradientDescent(0.25, 1000), 1),
    )
    assert relative_error(found.value, cases.truth("quadratic")) < 1e-8
    with pytest.raises(ohg.ZeroHypergradientError, match="'number' steers the inner solver"):
        ohg.hypergradient(
            case.problem,
            case.inner_params,
            case.outer_params,
            estimator=ohg.FixedPointImplicit(),
            inner_solver=ohg.Lookahead(ohg.GradientDescent("number"), 1),
        )


def test_the_estimator_goes_into_a_differentiable_solve() -> None:
    case, exact = cases.case("ridge"), cases.truth("ridge")
    lam = {k: v.clone().requires_grad_() for k, v in case.outer_params.items()}
    w = ohg.solve(
        case.problem.inner_objective,
        case.inner_params,
        lam,
        solver=cases.WITH_MOMENTUM["ridge"],
        estimator=ohg.FixedPointImplicit(ohg.Anderson(rtol=1e-10, memory=15)),
    )
    case.problem.outer_objective(w, lam, None).backward()
    assert relative_error({k: v.grad for k, v in lam.items()}, exact) < 1e-8
