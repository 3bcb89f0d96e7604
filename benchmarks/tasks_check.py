"""Tasks that were written after the default step rule was fixed: it was not chosen on them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from inner_solutions import softmax_regression
from sklearn import datasets
from task import F64, Params, Task, generator, randn, task
from tasks_data import cross_entropy, squared_distances, standardized
from torch import Tensor
from torch.nn.functional import one_hot

from optuna_hypergrad.search_space import Domain


@task("pair-64")
def pair_of_digits(name: str) -> Task:
    """A decay per pixel of logistic regression, 3 against 8, from the middle of wide bounds."""
    x, y = datasets.load_digits(return_X_y=True)
    keep = np.isin(y, (3, 8))
    x, y = torch.tensor(x[keep], dtype=F64) / 16, torch.tensor(y[keep] == 8)
    order = torch.randperm(len(x), generator=generator(20))
    x, y = x[order], one_hot(y[order].long(), 2).to(F64)

    def objective(p: Params, evaluation: int) -> Tensor:
        w = softmax_regression(x[:80], y[:80], p["decay"][:, None], key=name)
        return cross_entropy(x[80:], y[80:], w)

    domain, start = Domain(1e-6, 1e2, log=True), torch.full((64,), 1e-2, dtype=F64)
    return Task(name, objective, {"decay": domain}, {"decay": start}, "non-convex, bounds bind")


@task("length-scales-31")
def length_scales(name: str) -> Task:
    """A length scale per feature and a penalty of kernel ridge classification, breast cancer."""
    xt, yt, xv, yv = standardized(datasets.load_breast_cancer, 21, 150)
    yt, yv = 2 * yt.to(F64) - 1, 2 * yv.to(F64) - 1

    def objective(p: Params, evaluation: int) -> Tensor:
        a, b = xt / p["length"], xv / p["length"]
        k = torch.exp(-0.5 * squared_distances(a, a))
        kv = torch.exp(-0.5 * squared_distances(b, a))
        dual = torch.linalg.solve(k + p["alpha"] * torch.eye(len(a), dtype=F64), yt)
        return ((kv @ dual - yv) ** 2).mean()

    return Task(
        name,
        objective,
        {"length": Domain(1e-1, 1e3, log=True), "alpha": Domain(1e-4, 10.0, log=True)},
        {"length": torch.full((30,), 10.0, dtype=F64), "alpha": torch.tensor(0.03, dtype=F64)},
        "non-convex, bounds bind",
    )


@task("groups-4")
def groups(name: str) -> Task:
    """Three decays of feature groups and one of products; ridge regression on diabetes."""
    xt, yt, xv, yv = standardized(datasets.load_diabetes, 22, 120)
    scale, shift = yt.std(), yt.mean()
    yt, yv = (yt - shift) / scale, (yv - shift) / scale
    i, j = torch.triu_indices(10, 10)
    xt, xv = (torch.cat([x, x[:, i] * x[:, j]], 1) for x in (xt, xv))
    member = torch.tensor([0] * 2 + [1] * 2 + [2] * 6 + [3] * 55)

    def objective(p: Params, evaluation: int) -> Tensor:
        gram = xt.T @ xt / len(xt) + torch.diag(p["decay"][member])
        return ((xv @ torch.linalg.solve(gram, xt.T @ yt / len(xt)) - yv) ** 2).mean()

    domain, start = Domain(1e-5, 1e3, log=True), torch.full((4,), 1e-2, dtype=F64)
    return Task(name, objective, {"decay": domain}, {"decay": start}, "few variables")


@task("trid-60")
def trid(name: str) -> Task:
    """A convex quadratic whose tridiagonal matrix has condition 1,500; some bounds bind."""

    def objective(p: Params, evaluation: int) -> Tensor:
        x = p["x"]
        return ((x - 1) ** 2).sum() - (x[1:] * x[:-1]).sum()

    start = 10 * randn(23, 60)
    return Task(name, objective, {"x": Domain(-50.0, 50.0)}, {"x": start.clamp(-50, 50)}, "convex")


@task("exponentials-6")
def exponentials(name: str) -> Task:
    """Amplitudes and rates of three exponentials, least squares: linear scale, badly scaled."""
    t = torch.linspace(0, 4, 60, dtype=F64)
    y = 3 * torch.exp(-0.4 * t) + 2 * torch.exp(-3.0 * t) - torch.exp(-9.0 * t)
    y = y + 0.02 * randn(24, 60)

    def objective(p: Params, evaluation: int) -> Tensor:
        return ((torch.exp(-t[:, None] * p["rate"]) @ p["amplitude"] - y) ** 2).mean()

    return Task(
        name,
        objective,
        {"rate": Domain(0.0, 20.0), "amplitude": Domain(-10.0, 10.0)},
        {
            "rate": torch.tensor([1.0, 5.0, 15.0], dtype=F64),
            "amplitude": torch.ones(3, dtype=F64),
        },
        "non-convex, badly scaled",
    )


@task("weights-120-noisy")
def noisy_weights(name: str) -> Task:
    """A weight in [0, 1] per patient, 30 % of the labels wrong; minibatches of 100; breast cancer."""
    xt, yt, xv, yv = standardized(datasets.load_breast_cancer, 25, 120)
    wrong = torch.rand(120, generator=generator(26)) < 0.3
    yt = one_hot(torch.where(wrong, 1 - yt, yt), 2).to(F64)
    yv = one_hot(yv, 2).to(F64)
    decay = torch.full((1, 1), 3e-2, dtype=F64)

    def objective(p: Params, evaluation: int, batch: int = 100) -> Tensor:
        w = softmax_regression(xt, yt, decay, p["weight"] / 120, key=name)
        rows = torch.randperm(len(xv), generator=generator(evaluation))[: batch or None]
        return cross_entropy(xv[rows], yv[rows], w)

    return Task(
        name,
        objective,
        {"weight": Domain(0.0, 1.0)},
        {"weight": torch.full((120,), 0.5, dtype=F64)},
        "linear scale, minibatches of 100",
        functools.partial(objective, batch=0),
    )
