"""Synthetic tasks: convex and not, badly scaled, noisy, with bounds that bind."""

from __future__ import annotations

import functools
import math

import torch
from task import F64, Params, Task, generator, randn, task
from torch import Tensor

from optuna_hypergrad.search_space import Domain


@task("rosenbrock-2", 2)
@task("rosenbrock-10", 10)
def rosenbrock(name: str, d: int) -> Task:
    start = torch.tensor([-1.2, 1.0] * (d // 2), dtype=F64)

    def objective(p: Params, evaluation: int) -> Tensor:
        x = p["x"]
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    return Task(name, objective, {"x": Domain(-2.0, 2.0)}, {"x": start}, "curved valley")


@task("quadratic-50", 50, 1e4, 3.0, 0.0)
@task("quadratic-100-box", 100, 1e3, 8.0, 0.0)
@task("quadratic-20-noisy", 20, 1e2, 3.0, 0.3)
def quadratic(name: str, d: int, condition: float, reach: float, noise: float) -> Task:
    """A rotated convex quadratic in [-5, 5]; ``reach`` > 5 puts its optimum outside."""
    rotation = torch.linalg.qr(randn(d, d, d))[0]
    spectrum = torch.logspace(0, -math.log10(condition), d, dtype=F64)
    hessian = rotation @ torch.diag(spectrum) @ rotation.T
    center = (torch.rand(d, generator=generator(d + 1), dtype=F64) * 2 - 1) * reach
    size = float(0.5 * center @ hessian @ center)

    def objective(p: Params, evaluation: int, noise: float = noise) -> Tensor:
        x = p["x"] - center
        draw = noise * randn(1000 + evaluation, d + 1)
        slope = size / d * draw[:d]
        return 0.5 * x @ hessian @ x + noise * (slope @ p["x"] + size * 0.1 * draw[d])

    return Task(
        name,
        objective,
        {"x": Domain(-5.0, 5.0)},
        {"x": torch.zeros(d, dtype=F64)},
        f"convex, condition {condition:g}" + (", noisy" if noise else ""),
        functools.partial(objective, noise=0.0) if noise else None,
    )


@task("sphere-200", 200)
@task("sphere-1000", 1000)
def sphere(name: str, d: int) -> Task:
    """Sum of squares in [-5, 5] from a random start."""

    def objective(p: Params, evaluation: int) -> Tensor:
        return (p["x"] ** 2).sum()

    start = torch.rand(d, generator=generator(d), dtype=F64) * 10 - 5
    return Task(name, objective, {"x": Domain(-5.0, 5.0)}, {"x": start}, "convex")


@task("sphere-50-noisy")
def noisy_sphere(name: str) -> Task:
    """Sum of squares in [-5, 5]; the gradient's noise is as large as the start's gradient / 3."""

    def objective(p: Params, evaluation: int, noise: float = 1.0) -> Tensor:
        draw = noise * randn(5000 + evaluation, 51)
        return (p["x"] ** 2).sum() + 2.0 * draw[:50] @ p["x"] + 10.0 * draw[50]

    start = torch.rand(50, generator=generator(50), dtype=F64) * 10 - 5
    exact = functools.partial(objective, noise=0.0)
    return Task(name, objective, {"x": Domain(-5.0, 5.0)}, {"x": start}, "convex, noisy", exact)


@task("styblinski-20")
def styblinski_tang(name: str) -> Task:
    def objective(p: Params, evaluation: int) -> Tensor:
        x = p["x"]
        return (x**4 - 16 * x**2 + 5 * x).mean() / 2

    start = torch.rand(20, generator=generator(21), dtype=F64) * 10 - 5
    return Task(name, objective, {"x": Domain(-5.0, 5.0)}, {"x": start}, "many minima")
