"""Tasks on scikit-learn's bundled data (and its regression generators)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from inner_solutions import lasso, softmax_regression
from sklearn import datasets
from task import F64, Params, Task, generator, randn, task
from torch import Tensor
from torch.nn.functional import one_hot

from optuna_hypergrad.search_space import Domain


def standardized(
    load: Callable[..., object], seed: int, n_train: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and validation halves, shuffled by ``seed``, scaled by the training half."""
    x, y = (torch.as_tensor(np.asarray(a)) for a in load(return_X_y=True))  # type: ignore[misc]
    order = torch.randperm(len(x), generator=generator(seed))
    x, y = x[order].to(F64), y[order]
    mean, std = x[:n_train].mean(0), x[:n_train].std(0).clamp(min=1e-9)
    x = (x - mean) / std
    return x[:n_train], y[:n_train], x[n_train:], y[n_train:]


def cross_entropy(x: Tensor, targets: Tensor, w: Tensor) -> Tensor:
    return -(torch.log_softmax(x @ w, 1) * targets).sum(1).mean()


def digits(seed: int, n: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = datasets.load_digits(return_X_y=True)
    order = torch.randperm(1797, generator=generator(seed))
    x = torch.tensor(x, dtype=F64)[order] / 16
    y = one_hot(torch.tensor(y)[order], 10).to(F64)
    return x[:n], y[:n], x[n : n + 700], y[n : n + 700]


@task("digits-64", 0)
@task("digits-64-noisy", 0, 128)
@task("digits-64b", 5)
def digits_64(name: str, seed: int, batch: int | None = None) -> Task:
    """A decay per pixel of softmax regression."""
    xt, yt, xv, yv = digits(seed)

    def objective(p: Params, evaluation: int, batch: int | None = batch) -> Tensor:
        w = softmax_regression(xt, yt, p["decay"][:, None], key=name)
        if batch is None:
            return cross_entropy(xv, yv, w)
        rows = torch.randperm(700, generator=generator(evaluation))[:batch]
        return cross_entropy(xv[rows], yv[rows], w)

    return Task(
        name,
        objective,
        {"decay": Domain(1e-6, 10.0, log=True)},
        {"decay": torch.full((64,), 1e-2, dtype=F64)},
        "non-convex, bounds bind" + (f", minibatches of {batch}" if batch else ""),
        functools.partial(objective, batch=None) if batch else None,
    )


@task("digits-640", 1)
def digits_640(name: str, seed: int) -> Task:
    """A decay per weight of softmax regression on PCA-free pixels 8x8 of 200 samples."""
    xt, yt, xv, yv = digits(seed, 200)

    def objective(p: Params, evaluation: int) -> Tensor:
        return cross_entropy(xv, yv, softmax_regression(xt, yt, p["decay"], key=name))

    return Task(
        name,
        objective,
        {"decay": Domain(1e-5, 1e2, log=True)},
        {"decay": torch.full((64, 10), 10**-1.5, dtype=F64)},
        "non-convex, bounds bind",
    )


@task("cancer-30", datasets.load_breast_cancer, 0, 150, False)
@task("cancer-30-noisy", datasets.load_breast_cancer, 0, 150, False, 32)
@task("wine-39", datasets.load_wine, 1, 60, True)
@task("iris-4", datasets.load_iris, 2, 50, False)
def logistic(
    name: str, load: Callable[..., object], seed: int, n: int, per_weight: bool, batch: int = 0
) -> Task:
    """A decay per feature, or per weight, of softmax regression."""
    xt, yt, xv, yv = standardized(load, seed, n)
    yt, yv = one_hot(yt).to(F64), one_hot(yv).to(F64)
    shape = (xt.shape[1], yt.shape[1]) if per_weight else (xt.shape[1], 1)

    def objective(p: Params, evaluation: int, batch: int = batch) -> Tensor:
        w = softmax_regression(xt, yt, p["decay"].reshape(shape), key=name)
        if not batch:
            return cross_entropy(xv, yv, w)
        rows = torch.randperm(len(xv), generator=generator(evaluation))[:batch]
        return cross_entropy(xv[rows], yv[rows], w)

    return Task(
        name,
        objective,
        {"decay": Domain(1e-5, 1e2, log=True)},
        {"decay": torch.full((shape[0] * shape[1],), 10**-1.5, dtype=F64)},
        "non-convex, bounds bind" + (f", minibatches of {batch}" if batch else ""),
        functools.partial(objective, batch=0) if batch else None,
    )


@task("ridge-10", 1)
@task("ridge-65", 2)
def diabetes_ridge(name: str, degree: int) -> Task:
    """A decay per (product of) feature(s) of ridge regression on diabetes."""
    xt, yt, xv, yv = standardized(datasets.load_diabetes, 0, 200)
    scale, shift = yt.std(), yt.mean()
    yt, yv = (yt - shift) / scale, (yv - shift) / scale
    if degree == 2:
        i, j = torch.triu_indices(10, 10)
        xt, xv = (torch.cat([x, (x[:, i] * x[:, j])], 1) for x in (xt, xv))

    def objective(p: Params, evaluation: int) -> Tensor:
        gram = xt.T @ xt / len(xt) + torch.diag(p["decay"])
        w = torch.linalg.solve(gram, xt.T @ yt / len(xt))
        return ((xv @ w - yv) ** 2).mean()

    return Task(
        name,
        objective,
        {"decay": Domain(1e-4, 1e4, log=True)},
        {"decay": torch.ones(xt.shape[1], dtype=F64)},
        "non-convex, bounds bind",
    )


@task("ridge-1000")
def sparse_ridge(name: str) -> Task:
    """A decay per feature, 20 of 1,000 relevant, 300 samples."""
    x, noise, w_true = randn(0, 900, 1000), randn(1, 900), torch.zeros(1000, dtype=F64)
    w_true[:20] = randn(2, 20) + 1.0
    y = x @ w_true + 2.0 * noise
    xt, yt, xv, yv = x[:300], y[:300], x[300:], y[300:]

    def objective(p: Params, evaluation: int) -> Tensor:
        xd = xt / p["decay"]  # (n, p) X D^-1
        dual = torch.linalg.solve(xd @ xt.T + 300 * torch.eye(300, dtype=F64), yt)
        return ((xv @ (xd.T @ dual) - yv) ** 2).mean()

    return Task(
        name,
        objective,
        {"decay": Domain(1e-4, 1e4, log=True)},
        {"decay": torch.ones(1000, dtype=F64)},
        "non-convex, bounds bind",
    )


@task("kernel-ridge-2", False)
@task("kernel-ridge-11", True)
def kernel_ridge(name: str, ard: bool) -> Task:
    """Penalty and length scale(s) of kernel ridge regression on diabetes."""
    xt, yt, xv, yv = standardized(datasets.load_diabetes, 3, 200)
    scale, shift = yt.std(), yt.mean()
    yt, yv = (yt - shift) / scale, (yv - shift) / scale

    def objective(p: Params, evaluation: int) -> Tensor:
        a, b = xt / p["length"], xv / p["length"]
        k = torch.exp(-0.5 * squared_distances(a, a)) + p["alpha"] * torch.eye(len(a), dtype=F64)
        return (
            (torch.exp(-0.5 * squared_distances(b, a)) @ torch.linalg.solve(k, yt) - yv) ** 2
        ).mean()

    return Task(
        name,
        objective,
        {"alpha": Domain(1e-4, 1e2, log=True), "length": Domain(1e-1, 1e3, log=True)},
        {
            "alpha": torch.tensor(0.1, dtype=F64),
            "length": torch.full((10 if ard else 1,), 10.0).to(F64),
        },
        "non-convex",
    )


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return ((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T).clamp(min=0)


@task("gp-12")
def gaussian_process(name: str) -> Task:
    """Negative log marginal likelihood per sample of an ARD kernel on Friedman's function."""
    x, y = datasets.make_friedman1(150, 10, noise=0.5, random_state=0)
    x, y = torch.tensor(x), torch.tensor((y - y.mean()) / y.std())

    def objective(p: Params, evaluation: int) -> Tensor:
        a = x / p["length"]
        k = p["amplitude"] * torch.exp(-0.5 * squared_distances(a, a))
        factor = torch.linalg.cholesky(k + p["noise"] * torch.eye(len(y), dtype=F64))
        fit = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
        return (0.5 * (fit**2).sum() + factor.diagonal().log().sum()) / len(y)

    return Task(
        name,
        objective,
        {
            "length": Domain(1e-2, 1e2, log=True),
            "amplitude": Domain(1e-2, 1e2, log=True),
            "noise": Domain(1e-4, 1e1, log=True),
        },
        {
            "length": torch.ones(10, dtype=F64),
            "amplitude": torch.tensor(1.0, dtype=F64),
            "noise": torch.tensor(10**-1.5, dtype=F64),
        },
        "non-convex",
    )


@task("weights-300", 300)
@task("weights-300-noisy", 300, 64)
def sample_weights(name: str, n: int, batch: int = 0) -> Task:
    """A weight in [0, 1] per digit, 40 % of the labels wrong; softmax regression."""
    xt, yt, xv, yv = digits(2, n)
    wrong = torch.rand(n, generator=generator(3)) < 0.4
    labels = torch.where(wrong, torch.randint(0, 10, (n,), generator=generator(4)), yt.argmax(1))
    yt = one_hot(labels, 10).to(F64)

    def objective(p: Params, evaluation: int, batch: int = batch) -> Tensor:
        decay = torch.full((1, 1), 1e-2, dtype=F64)
        w = softmax_regression(xt, yt, decay, p["weight"] / n, key=name)
        if not batch:
            return cross_entropy(xv, yv, w)
        rows = torch.randperm(700, generator=generator(evaluation))[:batch]
        return cross_entropy(xv[rows], yv[rows], w)

    return Task(
        name,
        objective,
        {"weight": Domain(0.0, 1.0)},
        {"weight": torch.full((n,), 0.5, dtype=F64)},
        "linear scale, bounds bind" + (f", minibatches of {batch}" if batch else ""),
        functools.partial(objective, batch=0) if batch else None,
    )


@task("mixture-8")
def kernel_mixture(name: str) -> Task:
    """Eight kernel weights in [0, 1] and a penalty; kernel ridge on diabetes."""
    xt, yt, xv, yv = standardized(datasets.load_diabetes, 6, 200)
    scale, shift = yt.std(), yt.mean()
    yt, yv = (yt - shift) / scale, (yv - shift) / scale
    lengths = torch.logspace(-0.5, 2, 8, dtype=F64)
    kt = torch.stack([torch.exp(-0.5 * squared_distances(xt, xt) / s**2) for s in lengths])
    kv = torch.stack([torch.exp(-0.5 * squared_distances(xv, xt) / s**2) for s in lengths])

    def objective(p: Params, evaluation: int) -> Tensor:
        k = torch.einsum("m,mij->ij", p["mix"], kt) + p["alpha"] * torch.eye(200, dtype=F64)
        fit = torch.einsum("m,mij->ij", p["mix"], kv) @ torch.linalg.solve(k, yt)
        return ((fit - yv) ** 2).mean()

    return Task(
        name,
        objective,
        {"mix": Domain(0.0, 1.0), "alpha": Domain(1e-4, 10.0, log=True)},
        {"mix": torch.full((8,), 0.5, dtype=F64), "alpha": torch.tensor(0.1, dtype=F64)},
        "linear and log, bounds bind",
    )


@task("lasso-10")
def weighted_lasso(name: str) -> Task:
    """A penalty per feature of the lasso on diabetes: a non-smooth outer loss."""
    xt, yt, xv, yv = standardized(datasets.load_diabetes, 4, 150)
    scale, shift = yt.std(), yt.mean()
    yt, yv = (yt - shift) / scale, (yv - shift) / scale

    def objective(p: Params, evaluation: int) -> Tensor:
        return ((xv @ lasso(xt, yt, p["penalty"]) - yv) ** 2).mean()

    return Task(
        name,
        objective,
        {"penalty": Domain(1e-4, 1.0, log=True)},
        {"penalty": torch.full((10,), 1e-2, dtype=F64)},
        "non-smooth, bounds bind",
    )


@task("schedule-31")
def step_size_schedule(name: str) -> Task:
    """30 step sizes and a momentum of unrolled gradient descent; wine; diverges where too large."""
    xt, yt, xv, yv = standardized(datasets.load_wine, 7, 60)
    yt, yv = one_hot(yt).to(F64), one_hot(yv).to(F64)

    def objective(p: Params, evaluation: int) -> Tensor:
        w = velocity = torch.zeros(13, 3, dtype=F64)
        for size in p["step_size"]:
            gradient = xt.T @ (torch.softmax(xt @ w, 1) - yt) / len(xt) + 0.02 * w
            velocity = p["momentum"] * velocity - size * gradient
            w = w + velocity
        return cross_entropy(xv, yv, w)

    return Task(
        name,
        objective,
        {"step_size": Domain(1e-4, 10.0, log=True), "momentum": Domain(0.0, 0.99)},
        {
            "step_size": torch.full((30,), 10**-1.5, dtype=F64),
            "momentum": torch.tensor(0.5).to(F64),
        },
        "non-convex, unrolled",
    )


@task("mlp-6")
def mlp_decays(name: str) -> Task:
    """A decay per layer tensor, step size and momentum of a small MLP; 60 unrolled steps."""
    xt, yt, xv, yv = digits(8, 200)
    shapes = [(64, 16), (16,), (16, 10), (10,)]
    w0 = [randn(9 + i, *s) / math.sqrt(s[0]) for i, s in enumerate(shapes)]

    def net(w: list[Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ w[0] + w[1]) @ w[2] + w[3]

    def objective(p: Params, evaluation: int) -> Tensor:
        with torch.enable_grad():
            w = [v.clone().requires_grad_(True) for v in w0]
            velocity = [torch.zeros_like(v) for v in w0]
            for _ in range(60):
                loss = -(torch.log_softmax(net(w, xt), 1) * yt).sum(1).mean()
                gradient = torch.autograd.grad(loss, w, create_graph=True)
                for i, g in enumerate(gradient):
                    g = g + p["decay"][i] * w[i]
                    velocity[i] = p["momentum"] * velocity[i] - p["step_size"] * g
                w = [a + b for a, b in zip(w, velocity, strict=True)]
            return -(torch.log_softmax(net(w, xv), 1) * yv).sum(1).mean()

    return Task(
        name,
        objective,
        {
            "decay": Domain(1e-6, 1.0, log=True),
            "step_size": Domain(1e-3, 10.0, log=True),
            "momentum": Domain(0.0, 0.99),
        },
        {
            "decay": torch.full((4,), 1e-3, dtype=F64),
            "step_size": torch.tensor(0.1, dtype=F64),
            "momentum": torch.tensor(0.5, dtype=F64),
        },
        "non-convex, unrolled",
    )


@task("features-65")
def feature_map(name: str) -> Task:
    """A 13 x 5 feature map, unbounded, under a ridge head in closed form; wine."""
    xt, yt, xv, yv = standardized(datasets.load_wine, 10, 60)
    yt, yv = one_hot(yt).to(F64), one_hot(yv).to(F64)

    def objective(p: Params, evaluation: int) -> Tensor:
        ft, fv = torch.tanh(xt @ p["map"]), torch.tanh(xv @ p["map"])
        head = torch.linalg.solve(ft.T @ ft / len(ft) + 0.01 * torch.eye(5, dtype=F64), ft.T @ yt)
        return ((fv @ head / len(ft) - yv) ** 2).sum(1).mean()

    return Task(
        name, objective, {"map": Domain()}, {"map": randn(11, 13, 5) / 4}, "non-convex, unbounded"
    )
