"""Linear solvers and preconditioners: exact answers, honest residuals, and failures in words (GT8, GT10)."""

from __future__ import annotations

import dataclasses
import math

import networks
import pytest
import torch
from problems import F64, randn
from torch import Tensor, nn

import optuna_hypergrad as ohg
from optuna_hypergrad.curvature import asymmetry
from optuna_hypergrad.dense import dense
from optuna_hypergrad.ihvp import AbstractPreconditioner, Factors, Inverse
from optuna_hypergrad.operators import (
    AbstractLinearOperator,
    DampedOperator,
    HessianOperator,
    InnerGraph,
    MatrixOperator,
)


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def with_spectrum(values: Tensor, seed: int = 3) -> MatrixOperator:
    q, _ = torch.linalg.qr(randn(len(values), len(values), seed=seed))
    matrix = q @ torch.diag(values) @ q.T
    return MatrixOperator(0.5 * (matrix + matrix.T))


# GMRES ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5, 17])
def test_gmres_iterates_have_the_least_residual_in_the_krylov_space(num_steps: int) -> None:
    matrix, b = torch.eye(30, dtype=F64) + 0.5 * randn(30, 30, seed=1) / 30**0.5, randn(30, seed=2)
    found = ohg.linear_solve(ohg.GMRES(num_steps, 0.0, None), MatrixOperator(matrix), b)
    krylov = [b]
    for _ in range(num_steps - 1):
        krylov.append(matrix @ krylov[-1])
        krylov[-1] = krylov[-1] / krylov[-1].norm()
    basis, _ = torch.linalg.qr(torch.stack(krylov, 1))
    least = basis @ torch.linalg.lstsq(matrix @ basis, b[:, None]).solution[:, 0]
    assert off(found.x, least) < 1e-9
    assert found.num_products == num_steps + 1
    assert found.residual == pytest.approx(
        float((b - matrix @ found.x).norm() / b.norm()), rel=1e-9
    )


@pytest.mark.parametrize("solver", [ohg.GMRES(2), ohg.MINRES(2)])
def test_a_solve_that_achieved_next_to_nothing_warns(solver: ohg.GMRES | ohg.MINRES) -> None:
    values = torch.linspace(-1.0, 1.0, 30, dtype=F64)
    operator, b = MatrixOperator(torch.diag(values)), torch.ones(30, dtype=F64)
    with pytest.warns(
        UserWarning, match=r"(GMRES|MINRES): .*relative residual of 0\.\d+ after .*Raise max_steps"
    ):
        found = ohg.linear_solve(solver, operator, b)
    assert found.result.success
    assert found.residual > 0.5
    strict = dataclasses.replace(solver, require_convergence=True)
    assert not ohg.linear_solve(strict, operator, b, throw=False).result
    enough = dataclasses.replace(solver, max_steps=30)
    assert ohg.linear_solve(enough, operator, b).residual < 1e-5


@pytest.mark.parametrize("solver", [ohg.GMRES(200, 1e-4), ohg.MINRES(200, 1e-4)])
def test_a_first_guess_is_used(solver: ohg.GMRES | ohg.MINRES) -> None:
    operator, b = with_spectrum(torch.linspace(-1, 3, 30, dtype=F64) + 0.01), randn(30, seed=2)
    exact = torch.linalg.solve(operator.matrix, b)
    at_it = ohg.linear_solve(solver, operator, b, exact)
    assert at_it.num_products == 1
    near = ohg.linear_solve(solver, operator, b, exact + 1e-3 * randn(30, seed=5))
    cold = ohg.linear_solve(solver, operator, b)
    assert near.residual < 1e-4
    assert off(operator.matrix @ near.x, b) < 1e-4
    assert near.num_products < cold.num_products


def test_gmres_ends_early_on_an_invariant_space() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, -3.0], dtype=F64))
    found = ohg.linear_solve(ohg.GMRES(50, 1e-12), MatrixOperator(matrix), torch.ones(6, dtype=F64))
    assert found.num_products == 4
    assert off(found.x, 1 / matrix.diagonal()) < 1e-14


def test_gmres_in_single_precision_restarts_to_the_residual_that_was_asked_for() -> None:
    matrix = torch.eye(200) + 0.6 * randn(200, 200, seed=1).float() / 200**0.5
    b = randn(200, seed=2).float()
    found = ohg.linear_solve(
        ohg.GMRES(500, 1e-6, 10, require_convergence=True), MatrixOperator(matrix), b
    )
    assert off(matrix.double() @ found.x.double(), b.double()) < 2e-6


# MINRES -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*the linear solve ended at a relative residual")
@pytest.mark.parametrize("num_steps", [1, 2, 5, 17])
def test_minres_iterates_are_those_of_gmres(num_steps: int) -> None:
    operator, b = with_spectrum(torch.linspace(-1, 3, 30, dtype=F64) + 0.01), randn(30, seed=2)
    one, other = (
        ohg.linear_solve(s, operator, b)
        for s in (ohg.MINRES(num_steps, 0.0), ohg.GMRES(num_steps, 0.0, None))
    )
    assert off(one.x, other.x) < 1e-10
    assert one.residual == pytest.approx(other.residual, rel=1e-8)
    assert one.num_products == num_steps + 1


def test_minres_gives_the_shortest_solution_of_a_singular_system_that_has_one() -> None:
    spectrum = torch.linspace(-1, 3, 30, dtype=F64) + 0.01
    spectrum[:6] = 0
    operator = with_spectrum(spectrum)
    b = operator.matrix @ randn(30, seed=2)
    found = ohg.linear_solve(ohg.MINRES(200, 1e-12, True), operator, b)
    assert off(found.x, torch.linalg.pinv(operator.matrix, rtol=1e-10) @ b) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_minres_reports_the_least_residual_of_a_system_that_has_no_solution(dtype) -> None:
    spectrum = torch.linspace(-1, 3, 30, dtype=F64) + 0.01
    spectrum[:6] = 0
    operator, b = with_spectrum(spectrum), randn(30, seed=2)
    least = off(operator.matrix @ torch.linalg.pinv(operator.matrix, rtol=1e-10) @ b, b)
    narrow = MatrixOperator(operator.matrix.to(dtype), symmetric=True)
    found = ohg.linear_solve(ohg.MINRES(400, 1e-6), narrow, b.to(dtype))
    assert found.residual == pytest.approx(least, rel=1e-3)
    assert off(operator.matrix @ found.x.to(F64), b) == pytest.approx(least, rel=1e-3)


def test_preconditioned_minres_ends_by_the_residual_itself() -> None:
    d = torch.logspace(0, -3, 50, dtype=F64)
    core = with_spectrum(torch.linspace(-1, 2, 50, dtype=F64) + 0.01).matrix
    operator = MatrixOperator(d[:, None] * core * d, symmetric=True)
    jacobi = ohg.DiagonalPreconditioner(diagonal=lambda _: d**2, floor=1e-12)
    b = randn(50, seed=2)
    found = ohg.linear_solve(ohg.MINRES(2000, 1e-8, True, jacobi), operator, b)
    plain = ohg.linear_solve(ohg.MINRES(2000, 1e-8), operator, b)
    assert off(operator.matrix @ found.x, b) < 1e-8
    assert found.num_products < 0.5 * plain.num_products


# Nystrom ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 7])
def test_nystrom_is_exact_for_a_matrix_of_its_rank(rank: int) -> None:
    root = randn(40, 4, seed=1)
    base, b = MatrixOperator(root @ root.T, symmetric=True), randn(40, seed=2)
    operator = DampedOperator(base, 0.1)
    found = ohg.linear_solve(
        ohg.Nystrom(rank, rho=0, rtol=1e-10, require_convergence=True), operator, b
    )
    assert off(found.x, torch.linalg.solve(dense(operator, 40), b)) < 1e-12
    assert found.num_products == rank + 1
    steps = ohg.linear_solve(
        ohg.CG(50, 1e-10, preconditioner=ohg.NystromPreconditioner(rank)), operator, b
    )
    assert steps.num_products <= rank + 2


def test_nystrom_as_an_inverse_says_how_wrong_it_is_on_a_flat_spectrum() -> None:
    operator, b = with_spectrum(torch.linspace(0.5, 2, 200, dtype=F64)), randn(200, seed=2)
    exact = torch.linalg.solve(operator.matrix, b)
    found = ohg.linear_solve(ohg.Nystrom(20, rho=1e-3), operator, b, throw=False)
    assert off(found.x, exact) > 100
    assert found.residual == pytest.approx(off(operator.matrix @ found.x, b), rel=1e-9)
    assert "CG(preconditioner=NystromPreconditioner(20))" in found.result.message
    steps = ohg.linear_solve(
        ohg.CG(100, 1e-10, preconditioner=ohg.NystromPreconditioner(20)), operator, b
    )
    assert off(steps.x, exact) < 1e-9


def test_nystrom_reports_the_negative_curvature_that_its_sketch_met() -> None:
    spectrum = torch.logspace(1, -4, 60, dtype=F64)
    spectrum[-20:] *= -1
    operator, b = DampedOperator(with_spectrum(spectrum), 0.05), randn(60, seed=2)
    found = ohg.linear_solve(
        ohg.CG(200, 1e-9, preconditioner=ohg.NystromPreconditioner(55)), operator, b
    )
    assert found.stats["preconditioner_shift"] > 1e-5
    assert off(found.x, torch.linalg.solve(dense(operator, 60), b)) < 1e-7


# K-FAC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_kfac_of_one_layer_with_squared_loss_is_the_inverse(damping: float, decay: float) -> None:
    net = networks.layer()
    base = net.operator(decay)
    operator = DampedOperator(base, damping) if damping else base
    given = ohg.KFAC(
        net.model, lambda _: net.x, "squared", damping=lambda lam: lam["decay"], num_samples=None
    )
    v = randn(operator.size, seed=3)
    exact = torch.linalg.solve(dense(operator, 100), v)
    assert off(given.build(operator)(v), exact) < 1e-14
    assert base.num_products == operator.size  # of dense(...): K-FAC itself takes none


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_random_signs_give_the_expectation_on_average(loss: str) -> None:
    net = networks.perceptron()
    settings = {"model": net.model, "inputs": lambda _: net.x, "loss": loss}
    exact = ohg.KFAC(**settings, num_samples=None).factorize(net.operator()).tensors
    drawn = ohg.KFAC(**settings, num_samples=300).factorize(net.operator()).tensors

    def slopes(tensors: dict[str, Tensor], layer: str) -> Tensor:
        q = tensors[f"{layer}/slopes/vectors"]
        return q @ torch.diag(tensors[f"{layer}/slopes/values"]) @ q.T

    for layer in ("0", "2"):
        assert off(slopes(drawn, layer), slopes(exact, layer)) < 0.02


def test_kfac_blocks_are_kronecker_products_of_inputs_and_output_curvature() -> None:
    """A convolution and a linear layer, by loops over samples and positions."""
    model = networks.initialized(
        nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(3 * 5 * 3, 4, bias=False),
        ),
        seed=1,
    )
    x, y = randn(6, 2, 5, 4, seed=2), torch.arange(6) % 4
    w = {k: v.detach() for k, v in model.named_parameters()}

    def inner(w, lam, _):
        return nn.functional.cross_entropy(torch.func.functional_call(model, w, (x,)), y)

    operator = DampedOperator(HessianOperator(InnerGraph(inner, w, {"a": y * 1.0}, None)), 0.1)
    found = ohg.KFAC(model, lambda _: x, "cross_entropy", num_samples=None).build(operator)

    def after(z: Tensor) -> Tensor:
        return model[3](z.relu().flatten())

    positions, inputs, slopes = 5 * 3, [], torch.zeros(3, 3, dtype=F64)
    heads, head_slopes = [], torch.zeros(4, 4, dtype=F64)
    for each in x:
        padded = nn.functional.pad(each, (1, 1, 1, 1))
        patches = [padded[:, i : i + 3, 2 * j : 2 * j + 2] for i in range(5) for j in range(3)]
        inputs += [torch.cat([p.flatten(), torch.ones(1, dtype=F64)]) for p in patches]
        z = model[0](each[None])[0].detach()
        p = after(z).softmax(0)
        curvature = torch.diag(p) - torch.outer(p, p)
        jacobian = torch.func.jacrev(after)(z).reshape(4, 3, positions)
        slopes += torch.einsum("cop,cd,dqp->oq", jacobian, curvature, jacobian)
        heads.append(z.relu().flatten())
        head_slopes += curvature
    a, h = torch.stack(inputs), torch.stack(heads)
    blocks = [
        torch.kron(slopes / 6, a.T @ a / len(a)),
        torch.kron(head_slopes / 6, h.T @ h / len(h)),
    ]
    v = randn(operator.size, seed=3)
    parts = dict(zip(w, torch.split(v, [p.numel() for p in w.values()]), strict=True))
    conv = torch.cat([parts["0.weight"].reshape(3, 12), parts["0.bias"][:, None]], 1).reshape(-1)
    solved = [
        torch.linalg.solve(b + 0.1 * torch.eye(len(b), dtype=F64), u)
        for b, u in zip(blocks, (conv, parts["3.weight"]), strict=True)
    ]
    conv = solved[0].reshape(3, 13)
    exact = torch.cat([conv[:, :-1].reshape(-1), conv[:, -1], solved[1]])
    assert off(found(v), exact.detach()) < 1e-12


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).tanh())


def test_kfac_refuses_a_layer_that_it_does_not_know_by_name_or_scales_it() -> None:
    model, x, y = networks.initialized(Normed(), seed=1), randn(50, 5, seed=2), randn(50, 3, seed=3)
    w = {f"net.{k}": v.detach() for k, v in model.named_parameters()}

    def inner(w, lam, _):
        outputs = torch.func.functional_call(model, {k[4:]: v for k, v in w.items()}, (x,))
        return (outputs - y).square().mean()

    operator = DampedOperator(HessianOperator(InnerGraph(inner, w, {"a": y}, None)), 0.5)
    before, random = {k: b.clone() for k, b in model.named_buffers()}, torch.get_rng_state()
    given = {"loss": "squared", "scale": 2 / 3, "prefix": "net."}
    with pytest.raises(
        ohg.RequirementError, match=r"'net.norm.weight': BatchNorm1d 'norm' \(only Lin"
    ):
        ohg.KFAC(model, lambda _: x, **given).build(operator)
    kfac = ohg.KFAC(model, lambda _: x, uncovered="identity", **given)
    found = ohg.linear_solve(
        ohg.CG(200, 1e-9, preconditioner=kfac), operator, randn(operator.size, seed=5)
    )
    assert found.stats["preconditioner_uncovered"] == pytest.approx(8 / operator.size)
    assert found.residual < 1e-9
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], b) for k, b in model.named_buffers())


def test_kfac_counts_the_directions_that_rounding_leaves_without_curvature() -> None:
    net = networks.layer()
    dead = net.x.clone()
    dead[:, 0] = 0  # no input, so no curvature without damping
    kfac = ohg.KFAC(net.model, lambda _: dead, "squared")
    stats = kfac.factorize(net.operator()).stats
    assert stats["preconditioner_clamped"] == pytest.approx(3 / 18)
    damped = kfac.factorize(DampedOperator(net.operator(), 1e-3)).stats
    assert damped["preconditioner_clamped"] == 0


def test_kfac_names_what_keeps_it_from_running() -> None:
    net = networks.layer()
    v = torch.zeros(net.operator().size, dtype=F64)
    with pytest.raises(ohg.RequirementError, match="in the dtype of the inner parameters"):
        ohg.KFAC(net.model, lambda _: net.x.float(), "squared").build(net.operator())(v)
    with pytest.raises(ohg.SolverError, match=r"NaN or infinite entries .* inputs\(batch\)"):
        ohg.KFAC(net.model, lambda _: net.x / 0, "squared").build(net.operator())
    unused = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(3, 3)}).double()
    unused.forward = lambda x: unused["a"](x)  # type: ignore[method-assign]
    w = {k: p.detach() for k, p in unused.named_parameters()}
    graph = InnerGraph(lambda w, lam, _: sum((p**2).sum() for p in w.values()), w, {}, None)
    with pytest.raises(ohg.RequirementError, match="does not use it"):
        ohg.KFAC(unused, lambda _: net.x, "squared").build(HessianOperator(graph))


# What can go wrong --------------------------------------------------------------------------------


def test_an_operator_that_only_says_that_it_is_symmetric_is_found_out() -> None:
    matrix = torch.eye(30, dtype=F64) + randn(30, 30, seed=1)
    liar, b = MatrixOperator(matrix, symmetric=True), randn(30, seed=2)
    for solver in (ohg.CG(20, require_convergence=True), ohg.MINRES(20, 1e-8, True)):
        with pytest.raises(ohg.SolverError, match=r"differ by .* use GMRES"):
            ohg.linear_solve(solver, liar, b)
    assert asymmetry(liar) > 1e-2
    assert asymmetry(MatrixOperator(matrix + matrix.T)) < 1e-15


def test_damping_that_hides_the_problem_shows_in_the_stats() -> None:
    operator, b = with_spectrum(torch.linspace(0.5, 2, 40, dtype=F64)), randn(40, seed=2)
    for solver in (ohg.CG(100, 1e-10), ohg.GMRES(100, 1e-10), ohg.MINRES(100, 1e-10)):
        for damping in (1e-3, 1e2):
            found = ohg.linear_solve(solver, DampedOperator(operator, damping), b)
            x = found.x
            exact = damping * x @ x / (x @ operator.matrix @ x + damping * x @ x)
            assert found.stats["damping_share"] == pytest.approx(float(exact), rel=1e-8)
    negative = DampedOperator(MatrixOperator(-0.5 * torch.eye(3, dtype=F64)), 1.0)
    share = ohg.linear_solve(ohg.CG(), negative, torch.ones(3, dtype=F64)).stats["damping_share"]
    assert share == pytest.approx(2.0)
    assert "damping_share" not in ohg.linear_solve(ohg.CG(), operator, b).stats


class Negative(AbstractPreconditioner):
    name = "negative"
    refresh_every = 1

    def factorize(self, operator: AbstractLinearOperator) -> Factors:
        return Factors({})

    def inverse(self, factors: Factors, operator: AbstractLinearOperator) -> Inverse:
        return lambda vector: -vector


@pytest.mark.parametrize("solver", [ohg.CG, ohg.MINRES])
def test_a_preconditioner_that_is_not_positive_definite_is_refused(solver) -> None:
    operator = with_spectrum(torch.linspace(0.5, 2, 40, dtype=F64))
    with pytest.raises(ohg.SolverError, match="needs a positive definite preconditioner"):
        ohg.linear_solve(solver(preconditioner=Negative()), operator, randn(40, seed=2))


def test_clamped_entries_of_a_diagonal_are_counted() -> None:
    diagonal = torch.tensor([4.0, 1.0, 1e-9, -1.0], dtype=F64)
    operator = MatrixOperator(torch.diag(diagonal))
    factors = ohg.DiagonalPreconditioner(4, floor=0.01).factorize(operator)
    assert factors.stats["preconditioner_clamped"] == 0.5
    inverse = ohg.DiagonalPreconditioner(4, floor=0.01).inverse(factors, operator)
    expected = torch.tensor([0.25, 1.0, 25.0, 25.0], dtype=F64)
    assert torch.allclose(inverse(torch.ones(4, dtype=F64)), expected, rtol=1e-12)


@pytest.mark.parametrize("solver", [ohg.GMRES(), ohg.MINRES(), ohg.CG()])
def test_nan_in_a_product_is_reported(solver) -> None:
    operator = MatrixOperator(torch.full((5, 5), math.nan, dtype=F64), symmetric=True)
    with pytest.raises(ohg.SolverError, match="NaN"):
        ohg.linear_solve(solver, operator, torch.ones(5, dtype=F64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ohg.GMRES(0), "GMRES needs an integer max_steps"),
        (lambda: ohg.GMRES(restart=0), "restart >= 1 or None"),
        (lambda: ohg.GMRES(rtol=math.nan), "0 <= rtol < 1"),
        (lambda: ohg.GMRES(memory_budget=0), "memory_budget > 0"),
        (lambda: ohg.MINRES(True), "integer max_steps"),
        (lambda: ohg.MINRES(preconditioner="nystrom"), r"such as NystromPreconditioner\(30\)"),
        (lambda: ohg.CG(preconditioner=ohg.CG()), r"such as NystromPreconditioner\(30\)"),
        (lambda: ohg.Nystrom(0), "rank >= 1"),
        (lambda: ohg.Nystrom(rho=-1), "rho >= 0"),
        (lambda: ohg.Nystrom(rtol=0), "0 < rtol < 1"),
        (lambda: ohg.NystromPreconditioner(rho=0), "rho > 0"),
        (lambda: ohg.NystromPreconditioner(refresh_every=0), "refresh_every >= 1"),
        (lambda: ohg.DiagonalPreconditioner(floor=0), "0 < floor <= 1"),
        (lambda: ohg.DiagonalPreconditioner(diagonal=3), "function operator -> tensor"),
        (lambda: ohg.KFAC(None, len, "squared"), "needs a torch.nn.Module"),
        (lambda: ohg.KFAC(nn.Linear(1, 1), 3, "squared"), "function batch -> the model's input"),
        (lambda: ohg.KFAC(nn.Linear(1, 1), len, "hinge"), "loss to be one of"),
        (lambda: ohg.KFAC(nn.Linear(1, 1), len, "squared", damping=-1), "damping >= 0"),
        (lambda: ohg.KFAC(nn.Linear(1, 1), len, "squared", scale=math.inf), "scale > 0"),
        (lambda: ohg.KFAC(nn.Linear(1, 1), len, "squared", num_samples=0), "num_samples >= 1"),
        (
            lambda: ohg.KFAC(nn.Linear(1, 1), len, "squared", uncovered=None),
            "uncovered to be one of",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
