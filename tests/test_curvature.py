"""Probes of the curvature: against eigendecompositions of spiked matrices (GT9), in words and in pictures."""

from __future__ import annotations

import builtins
import math
from typing import Any

import cases
import pytest
import torch
from problems import F64, randn

import optuna_hypergrad as ohg
from optuna_hypergrad.operators import MatrixOperator

SIZE = 400


def noise(seed: int, size: int = SIZE) -> torch.Tensor:
    """Symmetric, entries of variance 1."""
    root = randn(size, size, seed=seed)
    return (root + root.T) / 2**0.5


def spiked(*spikes: float, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    """Noise with its spectrum in [-2, 2], and spikes."""
    q, _ = torch.linalg.qr(randn(size, len(spikes), seed=seed + 1))
    found = noise(seed, size) / size**0.5 + q @ torch.diag(torch.tensor(spikes, dtype=F64)) @ q.T
    return (found + found.T) / 2


def of_matrices(matrices: list[torch.Tensor]) -> ohg.BilevelProblem:
    return ohg.BilevelProblem(
        lambda w, lam, h: 0.5 * w["w"] @ h @ w["w"] - lam["c"] * w["w"].sum(),
        lambda w, lam, batch: w["w"].sum(),
        inner_batch=lambda step: matrices[step],
    )


def at(size: int = SIZE) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return {"w": torch.zeros(size, dtype=F64)}, {"c": torch.ones((), dtype=F64)}


@pytest.mark.parametrize("seed", range(5))
def test_the_top_of_a_spiked_matrix_is_found_in_ten_products(seed: int) -> None:
    matrix = spiked(20.0, 12.0, seed=10 * seed)
    exact = torch.linalg.eigvalsh(matrix)
    found = ohg.probe_curvature(MatrixOperator(matrix), num_products=10, seed=seed)
    assert abs(found.largest - float(exact[-1])) < 1e-3 * float(exact[-1])
    assert found.largest <= float(exact[-1]) * (1 + 1e-12)
    assert found.smallest >= float(exact[0]) * (1 + 1e-12)
    for ritz, bound in (
        (found.largest, found.largest_bound),
        (found.smallest, found.smallest_bound),
    ):
        assert float((exact - ritz).abs().min()) <= bound * (1 + 1e-8)
    assert found.num_products == 10


def test_no_error_bar_is_shorter_than_the_rounding_of_the_products() -> None:
    """Lanczos that has run to its end leaves residuals of 1e-20, which no product in float64 can."""
    values = torch.tensor([1.0, 2.0, 4.0, 100.0], dtype=F64)
    found = ohg.probe_curvature(MatrixOperator(torch.diag(values)), num_products=4)
    least = found.rounding * found.largest
    assert found.largest_bound >= least > 0
    assert found.smallest_bound >= least
    assert found.largest_bound < 1e-10
    assert f"100 ± {found.largest_bound:.0e}" in str(found)
    assert "e-14" in f"{least:.0e}"


@pytest.mark.parametrize("seed", range(5))
def test_the_recommended_damping_makes_it_positive_definite_and_alpha_converges(seed: int) -> None:
    matrix = spiked(9.0, -4.0, seed=10 * seed)
    found = ohg.probe_curvature(MatrixOperator(matrix))
    least = float(torch.linalg.eigvalsh(matrix)[0])
    assert found.negative_curvature == found.smallest == pytest.approx(least, rel=1e-3)
    assert -least < found.damping < -1.2 * least
    damped = matrix + found.damping * torch.eye(SIZE, dtype=F64)
    b = randn(SIZE, seed=3)
    exact = torch.linalg.solve(damped, b)
    for solver in (ohg.CG(200, 1e-10), ohg.Neumann(2000, alpha=found.alpha)):
        x = ohg.linear_solve(solver, MatrixOperator(damped), b).x
        assert float((x - exact).norm() / exact.norm()) < 1e-6
    with pytest.raises(ohg.SolverError, match="direction of curvature"):
        ohg.linear_solve(ohg.CG(200), MatrixOperator(matrix), b)


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_eigenvalue_at_other_batch_sizes_is_predicted(seed: int) -> None:
    """Batches of 64 samples whose Hessians are that of all data and noise of variance 6.4 a sample."""
    sample, whole = 6.4, spiked(30.0, 18.0, seed=seed) + 2 * torch.eye(SIZE, dtype=F64)

    def batch(size: int, seed: int) -> torch.Tensor:
        return whole + (sample / size) ** 0.5 * noise(1000 * (seed + 1))

    few = [batch(64, i) for i in range(4)]
    found = ohg.probe_curvature(of_matrices(few), *at(), num_batches=4, batch_size=64)
    assert found.hessian_variance == pytest.approx(sample, rel=0.05)
    assert found.num_products == 4 * (20 + 4)
    exact = float(torch.linalg.eigvalsh(whole)[-1])
    assert found.largest_at(None) == pytest.approx(exact, rel=0.05)
    for size in (4, 16, 64, 512):
        seen = float(torch.linalg.eigvalsh(batch(size, 77))[-1])
        assert found.largest_at(size) == pytest.approx(seen, rel=0.05)
    small = [float(torch.linalg.eigvalsh(batch(s, 5))[-1]) for s in (1, 4)]
    assert small[0] > 1.6 * exact  # the inflation is there to be seen
    assert found.largest_at(1) == pytest.approx(small[0], rel=0.05)
    assert found.step_size == pytest.approx(1 / found.largest_at(64), rel=1e-3)


def test_step_sizes_follow_the_batch_size() -> None:
    h = spiked(5.0, seed=3)
    batches = [h + 3.0 * noise(50 + i) for i in range(3)]
    found = ohg.probe_curvature(of_matrices(batches), *at(), num_batches=3, batch_size=8)
    assert found.rescaled_step_size(0.1, 32, "adam") == pytest.approx(0.2)
    assert found.rescaled_step_size(0.1, 2) == pytest.approx(0.025)
    growth = [found.rescaled_step_size(1.0, 8 * 4**k) / 4**k for k in (1, 3, 8)]
    assert 1 > growth[0] > growth[1] > growth[2]
    assert found.rescaled_step_size(1.0, 10**9) == pytest.approx(
        found.largest_at(8) / found.largest_at(None), rel=1e-3
    )
    alone = ohg.probe_curvature(of_matrices(batches), *at(), batch_size=8)
    assert alone.rescaled_step_size(0.1, 32) == pytest.approx(0.4)


def test_the_density_is_that_of_the_spectrum() -> None:
    matrix = spiked(6.0, seed=2)
    exact = torch.linalg.eigvalsh(matrix)
    found = ohg.probe_curvature(MatrixOperator(matrix), num_products=40, num_probes=20)
    x, y = found.density(2000)
    assert float(torch.trapezoid(y, x)) == pytest.approx(1.0, abs=1e-3)
    for low, high in ((-3.0, -1.0), (-1.0, 0.0), (0.0, 1.0), (1.0, 3.0)):
        share = float(((exact > low) & (exact < high)).double().mean())
        inside = (x > low) & (x < high)
        assert float(torch.trapezoid(y[inside], x[inside])) == pytest.approx(share, abs=0.03)
    assert found.negative_share == pytest.approx(float((exact < 0).double().mean()), abs=0.03)
    shifted = MatrixOperator(matrix + 3 * torch.eye(SIZE, dtype=F64))
    moved = ohg.probe_curvature(shifted, num_products=40, num_probes=20)
    assert moved.trace == pytest.approx(float(matrix.trace()) + 3 * SIZE, rel=0.01)


def test_a_problem_is_probed_as_the_matrix_that_it_is() -> None:
    case = cases.case("ridge")
    w = case.solution(case.outer_params)
    matrix = torch.func.hessian(
        lambda u: case.problem.inner_objective({"w": u}, case.outer_params, None)
    )(w["w"])
    exact = torch.linalg.eigvalsh(matrix)
    found = ohg.probe_curvature(case.problem, w, case.outer_params)
    assert found.largest == pytest.approx(float(exact[-1]), rel=1e-10)
    assert found.smallest == pytest.approx(float(exact[0]), rel=1e-10)
    assert found.num_products == 12
    assert found.damping == found.negative_curvature == 0.0
    assert "Condition about" in str(found)
    again = ohg.probe_curvature(case.problem, w, case.outer_params)
    assert torch.equal(found.nodes, again.nodes)
    assert str(found) == str(again)


def test_the_report_says_what_it_found_in_words() -> None:
    down = str(ohg.probe_curvature(MatrixOperator(spiked(9.0, -4.0))))
    assert (
        "Negative curvature: in some direction the inner objective curves downwards, by -4." in down
    )
    assert "Implicit(damping=" in down
    assert "GaussNewton" in down
    hill = ohg.probe_curvature(MatrixOperator(-torch.eye(5, dtype=F64)))
    assert "Nothing curves upwards" in str(hill)
    assert math.isnan(hill.alpha)
    flat = torch.diag(torch.linspace(0, 1, 30, dtype=F64).pow(8))
    assert "not told apart from 0" in str(ohg.probe_curvature(MatrixOperator(flat)))
    batches = [spiked(9.0, seed=1) + noise(i) + 3 * torch.eye(SIZE, dtype=F64) for i in range(3)]
    some = ohg.probe_curvature(of_matrices(batches), *at(), num_batches=3, batch_size=10)
    assert "with the Hessian of 3 batches" in str(some)
    assert "Differences between batches alone" in str(some)
    assert "This is no minimum." in down
    assert "multiply the step size of SGD by" in str(some)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_negative_curvature(dtype: torch.dtype) -> None:
    x = randn(20, 60, seed=4).to(dtype)  # a Hessian of rank 20
    wide = torch.promote_types(dtype, torch.float32)
    problem = ohg.BilevelProblem(
        lambda w, lam, _: 0.5 * ((x @ w["w"]).to(wide) ** 2).sum() + 0 * lam["c"].to(wide),
        lambda w, lam, _: w["w"].sum(),
    )
    point = {"w": torch.ones(60, dtype=dtype)}, {"c": torch.ones((), dtype=dtype)}
    found = ohg.probe_curvature(problem, *point, num_products=30)
    assert found.negative_curvature == found.damping == 0.0
    assert "not told apart from 0" in str(found)
    assert found.largest == pytest.approx(
        float(torch.linalg.matrix_norm(x.double(), 2)) ** 2, rel=0.02
    )


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), torch.full((1, 1), 2.0)])
def test_spectra_of_one_value_are_printed_and_drawn(matrix: torch.Tensor, tmp_path: Any) -> None:
    found = ohg.probe_curvature(MatrixOperator(matrix.double()))
    assert "largest eigenvalue" in str(found)
    found.plot().figure.savefig(tmp_path / "density.png")


def test_the_density_is_drawn(tmp_path: Any) -> None:
    axes = ohg.probe_curvature(MatrixOperator(spiked(9.0, -4.0))).plot()
    axes.figure.savefig(tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 5000
    assert any("-4." in t.get_text() for t in axes.texts)


def test_without_matplotlib_the_picture_is_refused_in_words(monkeypatch: Any) -> None:
    found = ohg.probe_curvature(MatrixOperator(torch.eye(3, dtype=F64)))
    real = builtins.__import__

    def no_matplotlib(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ohg.RequirementError, match="pip install matplotlib"):
        found.plot()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_products": 1}, ValueError, "num_products >= 2"),
        ({"num_probes": 0}, ValueError, "num_probes >= 1"),
        ({"num_batches": 1.5}, ValueError, "num_batches >= 1, an integer"),
        ({"batch_size": 0}, ValueError, "batch_size >= 1"),
        ({"seed": -1}, ValueError, "seed >= 0"),
        ({"num_batches": 2}, ohg.RequirementError, "no inner_batch"),
        ({"curvature": "hessian"}, ohg.RequirementError, "must be Hessian"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    case = cases.case("ridge")
    with pytest.raises(error, match=message):
        ohg.probe_curvature(case.problem, case.inner_params, case.outer_params, **settings)


def test_what_cannot_be_probed_or_foretold_is_refused() -> None:
    case = cases.case("ridge")
    with pytest.raises(ohg.RequirementError, match="curvature is that at a point"):
        ohg.probe_curvature(case.problem)
    with pytest.raises(ohg.RequirementError, match="BilevelProblem or an operator"):
        ohg.probe_curvature(torch.eye(3))  # type: ignore[arg-type]
    eye = MatrixOperator(torch.eye(3, dtype=F64))
    with pytest.raises(ohg.RequirementError, match="an operator is what it is"):
        ohg.probe_curvature(eye, case.inner_params, case.outer_params)
    with pytest.raises(ohg.RequirementError, match="needs a symmetric operator"):
        ohg.probe_curvature(MatrixOperator(randn(3, 3, seed=1)))
    with pytest.raises(ohg.SolverError, match="NaN or infinite"):
        ohg.probe_curvature(MatrixOperator(torch.full((3, 3), torch.nan, dtype=F64), True))
    found = ohg.probe_curvature(eye)
    with pytest.raises(ohg.RequirementError, match="num_batches=8"):
        found.largest_at(3)
    with pytest.raises(ohg.RequirementError, match="give batch_size="):
        found.rescaled_step_size(0.1, 3)
    sized = ohg.probe_curvature(eye, batch_size=4)
    with pytest.raises(ValueError, match='"sgd" or "adam"'):
        sized.rescaled_step_size(0.1, 3, "lamb")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive step_size"):
        sized.rescaled_step_size(-0.1, 3)
    with pytest.raises(ValueError, match="width > 0"):
        sized.density(width=0.0)
