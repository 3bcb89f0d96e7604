"""The solvers of ``benchmarks/pde_discovery.py``: order of the scheme, and solutions that are known."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
Array = np.ndarray


@pytest.fixture
def pde(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("pde_solvers")


def solution(pde: ModuleType, name: str, num_points: int, num_steps: int, start: object) -> Array:
    """At ``t = 1``, on 64 points."""
    grid = pde.Grid(num_points)
    u = start(grid.x)
    if name == "burgers":
        states = pde.dispersive_burgers(grid, num_steps, u, 1.0, 0.01 / np.pi, 0.0)
    elif name == "kdv":
        states = pde.dispersive_burgers(grid, num_steps, u, 1.0, 0.0, 2.5e-3)
    else:
        states = pde.allen_cahn(grid, num_steps, u, 1e-3, 5.0)
    return grid.values(states[-1])[:: num_points // 64]


@pytest.mark.parametrize("name", ["burgers", "allen-cahn", "kdv"])
def test_half_the_step_is_a_sixteenth_of_the_error(pde: ModuleType, name: str) -> None:
    start = {
        "burgers": pde.burgers_start,
        "allen-cahn": pde.allen_cahn_start,
        "kdv": pde.kdv_start,
    }[name]
    steps = [64, 128, 256] if name == "allen-cahn" else [128, 256, 512]
    best = solution(pde, name, 128, 4096, start)
    errors = [np.abs(solution(pde, name, 128, m, start) - best).max() for m in steps]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders[-1] == pytest.approx(4.0, abs=0.4), (errors, orders)


@pytest.mark.parametrize(("name", "coarse"), [("burgers", 512), ("allen-cahn", 256), ("kdv", 256)])
def test_the_grid_of_the_benchmark_is_fine_enough(pde: ModuleType, name: str, coarse: int) -> None:
    """What is observed changes by far less than by an error of the coefficient that counts."""
    start = {
        "burgers": pde.burgers_start,
        "allen-cahn": pde.allen_cahn_start,
        "kdv": pde.kdv_start,
    }[name]
    here = solution(pde, name, coarse, coarse, start)
    there = solution(pde, name, 2 * coarse, 2 * coarse, start)
    assert np.abs(here - there).max() < (5e-3 if name == "burgers" else 5e-4)


def test_burgers_is_the_cole_hopf_solution(pde: ModuleType) -> None:
    """``u = -int sin(pi (x - y)) f(x - y) G(y) dy / int f(x - y) G(y) dy``, ``f = exp(-cos(pi y) / (2 pi nu))``."""
    nu, nodes, weights = 0.02, *np.polynomial.hermite.hermgauss(80)
    grid = pde.Grid(256)
    found = grid.values(
        pde.dispersive_burgers(grid, 512, pde.burgers_start(grid.x), 1.0, nu, 0.0)[-1]
    )
    y = grid.x[:, None] - np.sqrt(4 * nu) * nodes
    kernel = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * nu))
    exact = -(kernel * np.sin(np.pi * y)).sum(1) / kernel.sum(1)
    assert np.abs(found - exact).max() < 1e-6


def test_a_soliton_travels(pde: ModuleType) -> None:
    """``u = 3 c sech^2(sqrt(c / d) (x - c t) / 2)`` of KdV."""
    c, d, grid = 0.4, 5e-4, pde.Grid(256)

    def soliton(x: Array) -> Array:
        return 3 * c / np.cosh(0.5 * np.sqrt(c / d) * x) ** 2

    start = soliton(grid.x + 0.2)
    found = grid.values(pde.dispersive_burgers(grid, 512, start, 1.0, 0.0, d)[-1])
    assert np.abs(found - soliton(grid.x + 0.2 - c)).max() < 1e-4


def test_the_series_is_the_solution_between_the_points(pde: ModuleType) -> None:
    grid, x = pde.Grid(32), np.array([-0.93, 0.11, 0.5])
    modes = grid.modes(np.exp(np.sin(np.pi * grid.x)))
    assert np.abs(grid.at(np.array([modes] * 3), x) - np.exp(np.sin(np.pi * x))).max() < 1e-7


def test_a_step_that_is_too_long_says_so(pde: ModuleType) -> None:
    grid = pde.Grid(256)
    with (
        pytest.raises(FloatingPointError, match="blew up at t ="),
        np.errstate(all="ignore"),
    ):
        pde.dispersive_burgers(grid, 8, 50 * pde.kdv_start(grid.x), 1.0, 1e-6, 0.0)
