"""Mixed tasks: two discrete hyperparameters, and at least 16 that move by their gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from inner_solutions import softmax_regression
from sklearn import datasets
from task import F64, Params, generator, randn
from tasks_data import cross_entropy, digits, squared_distances, standardized
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, one_hot

from optuna_hypergrad.search_space import Domain

Setting = dict[str, Any]


@dataclass(frozen=True)
class MixedTask:
    """A discrete space, a box, and an objective on both.

    Args:
        objective: ``(setting, params) -> value``.
        categories: Choices by name.
        integers: ``(low, high, log)`` by name.
        domains: Of the continuous hyperparameters, which start in the middle of their ranges.
        sizes: How many of each.
        kind: What is tuned, in a few words.
    """

    objective: Callable[[Setting, Params], Tensor]
    kind: str
    categories: dict[str, list[str]]
    integers: dict[str, tuple[int, int, bool]]
    domains: dict[str, Domain]
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(self.sizes.values()) + len(self.categories) + len(self.integers)


MIXED: dict[str, Callable[[], MixedTask]] = {}
DEVELOPMENT: list[str] = []
"""The tasks on which the defaults of the race and of the base sampler were chosen."""


def mixed(
    name: str, *arguments: object, development: bool = False
) -> Callable[[Callable[..., MixedTask]], Callable[..., MixedTask]]:
    """Enter ``build(*arguments)`` as ``MIXED[name]``; stacks."""

    def enter(build: Callable[..., MixedTask]) -> Callable[..., MixedTask]:
        MIXED[name] = functools.lru_cache(functools.partial(build, *arguments))
        if development:
            DEVELOPMENT.append(name)
        return build

    return enter


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "cos": torch.cos,
    "square": torch.square,
    "sigmoid": lambda z: torch.sigmoid(5 * z),
}


def _friedman(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Friedman's function with 15 of 20 features irrelevant; 600 samples, ``n`` to train on."""
    x, y = datasets.make_friedman1(600, 20, noise=0.5, random_state=seed)
    x, y = 2 * torch.tensor(x) - 1, torch.tensor((y - y.mean()) / y.std())
    return x[:n], y[:n], x[n:], y[n:]


def _cancer(n: int, seed: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Breast cancer, classes as -1 and 1."""
    xt, yt, xv, yv = standardized(datasets.load_breast_cancer, seed, n)
    return xt, 2 * yt.to(F64) - 1, xv, 2 * yv.to(F64) - 1


def _squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    return ((prediction - y) ** 2).mean()


def _ridge(a: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    """``(d,)``: ridge regression with a penalty, or one for each column."""
    gram = a.T @ a / len(a) + torch.diag(penalty.expand(a.shape[1]))
    return torch.linalg.solve(gram, a.T @ y / len(a))


@mixed("mixed-friedman-23", _friedman, development=True)
@mixed("mixed-cancer-33", _cancer, development=True)
def random_features(load: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]]) -> MixedTask:
    """Ridge regression on ``activation(x * scale @ directions + phases)``: a scale per feature."""
    xt, yt, xv, yv = load(150)
    features, most = xt.shape[1], 96
    directions = randn(31, features, most)
    phases = 2 * math.pi * torch.rand(most, generator=generator(32), dtype=F64)

    def objective(s: Setting, p: Params) -> Tensor:
        width = s["width"]

        def mapped(x: Tensor) -> Tensor:
            z = (x * p["scale"]) @ directions[:, :width] + phases[:width]
            h = ACTIVATIONS[s["activation"]](z) / math.sqrt(width)
            return torch.cat([h, torch.ones(len(h), 1, dtype=F64)], 1)

        return _squared_error(mapped(xv) @ _ridge(mapped(xt), yt, p["penalty"]), yv)

    return MixedTask(
        objective,
        "random features: activation, width; scale per feature, penalty",
        {"activation": list(ACTIVATIONS)},
        {"width": (4, most, True)},
        {"scale": Domain(1e-3, 10.0, log=True), "penalty": Domain(1e-6, 10.0, log=True)},
        {"scale": features, "penalty": 1},
    )


KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda a, b: a @ b.T,
    "cubic": lambda a, b: (1 + a @ b.T) ** 3,
    "gaussian": lambda a, b: torch.exp(-0.5 * squared_distances(a, b)),
    "exponential": lambda a, b: torch.exp(-(squared_distances(a, b) + 1e-9).sqrt()),
    "cauchy": lambda a, b: 1 / (1 + squared_distances(a, b)),
    "periodic": lambda a, b: torch.cos(a @ torch.ones(a.shape[1], 1, dtype=F64) - (b.sum(1))),
}


@mixed("mixed-kernels-33", development=True)
def kernels() -> MixedTask:
    """Kernel regression on landmarks, breast cancer: kernel, landmarks; scale per feature, penalty."""
    xt, yt, xv, yv = _cancer(200, 33)

    def objective(s: Setting, p: Params) -> Tensor:
        kernel, marks = KERNELS[s["kernel"]], xt[: s["landmarks"]] * p["scale"]
        kt, kv = kernel(xt * p["scale"], marks), kernel(xv * p["scale"], marks)
        return _squared_error(kv @ _ridge(kt, yt, p["penalty"]), yv)

    return MixedTask(
        objective,
        "kernel on landmarks: kernel, landmarks; scale per feature, penalty",
        {"kernel": list(KERNELS)},
        {"landmarks": (3, 120, True)},
        {"scale": Domain(1e-3, 3.0, log=True), "penalty": Domain(1e-6, 10.0, log=True)},
        {"scale": 30, "penalty": 1},
    )


@mixed("mixed-network-46", development=True)
def network() -> MixedTask:
    """30 unrolled gradient steps of a network, wine: activation, width; scales, a schedule, a decay."""
    xt, yt, xv, yv = standardized(datasets.load_wine, 34, 60)
    yt, yv = one_hot(yt).to(F64), one_hot(yv).to(F64)
    first, second = randn(35, 13, 40) / math.sqrt(13), randn(36, 40, 3)

    def objective(s: Setting, p: Params) -> Tensor:
        width, activation = s["width"], ACTIVATIONS[s["activation"]]
        w = [first[:, :width], second[:width] / math.sqrt(width)]

        def net(w: list[Tensor], x: Tensor) -> Tensor:
            return activation((x * p["scale"]) @ w[0]) @ w[1]

        with torch.enable_grad():
            w = [v.clone().requires_grad_(True) for v in w]
            for size in p["step_size"]:
                loss = -(torch.log_softmax(net(w, xt), 1) * yt).sum(1).mean()
                slopes = torch.autograd.grad(loss, w, create_graph=True)
                w = [v - size * (g + p["decay"] * v) for v, g in zip(w, slopes, strict=True)]
            return -(torch.log_softmax(net(w, xv), 1) * yv).sum(1).mean()

    return MixedTask(
        objective,
        "unrolled network: activation, width; scale per feature, 30 step sizes, decay",
        {"activation": ["identity", "tanh", "relu", "cos", "sigmoid"]},
        {"width": (1, 40, True)},
        {
            "scale": Domain(1e-2, 10.0, log=True),
            "step_size": Domain(1e-4, 1.0, log=True),
            "decay": Domain(1e-6, 1.0, log=True),
        },
        {"scale": 13, "step_size": 30, "decay": 1},
    )


def _legendre(x: Tensor, degree: int) -> Tensor:
    before, now = torch.ones_like(x), x
    found = [now]
    for k in range(1, degree):
        before, now = now, ((2 * k + 1) * x * now - k * before) / (k + 1)
        found.append(now)
    return torch.stack(found, 1)


BASES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "legendre": _legendre,
    "fourier": lambda x, m: torch.stack([torch.cos(math.pi * k * x / 2 + k) for k in range(m)], 1),
    "hinges": lambda x, m: torch.stack([torch.relu(x + 1 - 2 * k / m) for k in range(m)], 1),
    "steps": lambda x, m: torch.stack(
        [torch.sigmoid(9 * (x + 1 - 2 * k / m)) for k in range(m)], 1
    ),
}


@mixed("mixed-additive-20", datasets.load_diabetes, 10, 8)
def additive_model(load: Callable[..., object], features: int, most: int) -> MixedTask:
    """A sum of functions of one feature each, diabetes: basis, its size; penalties per feature, degree."""
    xt, yt, xv, yv = standardized(load, 37, 200)
    shift, size = yt.mean(), yt.std()
    xt, xv, yt, yv = (
        torch.tanh(xt / 2),
        torch.tanh(xv / 2),
        (yt - shift) / size,
        (yv - shift) / size,
    )

    def objective(s: Setting, p: Params) -> Tensor:
        m, basis = s["terms"], BASES[s["basis"]]
        at, av = basis(xt, m).reshape(len(xt), -1), basis(xv, m).reshape(len(xv), -1)
        center = at.mean(0)
        penalty = (p["of_term"][:m, None] * p["of_feature"]).reshape(-1)
        return _squared_error((av - center) @ _ridge(at - center, yt, penalty), yv)

    return MixedTask(
        objective,
        "additive model: basis, terms; penalty per feature and per term",
        {"basis": list(BASES)},
        {"terms": (1, most, False)},
        {"of_feature": Domain(1e-4, 1e2, log=True), "of_term": Domain(1e-2, 1e2, log=True)},
        {"of_feature": features, "of_term": most},
    )


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda x: x,
    "root": torch.sqrt,
    "square": torch.square,
    "binary": lambda x: (x > 0.5).to(F64),
    "across": lambda x: x - x.roll(1, -1),
    "blurred": lambda x: avg_pool2d(x, 3, 1, 1),
}


@mixed("mixed-digits-66")
def pixels() -> MixedTask:
    """Softmax regression on transformed digits at a resolution: a decay per pixel."""
    xt, yt, xv, yv = digits(38, 250)

    def objective(s: Setting, p: Params) -> Tensor:
        side = s["side"]

        def mapped(x: Tensor) -> Tensor:
            image = TRANSFORMS[s["transform"]](x.reshape(-1, 1, 8, 8))
            small = interpolate(image, size=(side, side), mode="bilinear", antialias=True)
            return small.reshape(len(x), -1)

        decay = p["decay"].reshape(1, 1, 8, 8)
        decay = interpolate(decay.log(), size=(side, side), mode="nearest").exp().reshape(-1, 1)
        key = ("pixels", s["transform"], side)
        return cross_entropy(mapped(xv), yv, softmax_regression(mapped(xt), yt, decay, key=key))

    return MixedTask(
        objective,
        "softmax regression: transform, resolution; decay per pixel",
        {"transform": list(TRANSFORMS)},
        {"side": (2, 8, False)},
        {"decay": Domain(1e-6, 10.0, log=True)},
        {"decay": 64},
    )


@mixed("mixed-process-24")
def gaussian_process() -> MixedTask:
    """Likelihood of a Gaussian process on Friedman's function: kernel, warping power; length scales."""
    xt, yt, *_ = _friedman(120, 1)
    names = ["linear", "cubic", "gaussian", "exponential", "cauchy"]

    def objective(s: Setting, p: Params) -> Tensor:
        a = xt.sign() * xt.abs() ** (s["power"] / 4) * p["scale"]
        k = p["amplitude"] * KERNELS[s["kernel"]](a, a) + p["noise"] * torch.eye(120, dtype=F64)
        factor = torch.linalg.cholesky(k)
        fit = torch.linalg.solve_triangular(factor, yt[:, None], upper=False)
        return (0.5 * (fit**2).sum() + factor.diagonal().log().sum()) / len(yt)

    return MixedTask(
        objective,
        "Gaussian process: kernel, warping; scale per feature, amplitude, noise",
        {"kernel": names},
        {"power": (1, 16, False)},
        {
            "scale": Domain(1e-2, 10.0, log=True),
            "amplitude": Domain(1e-2, 1e2, log=True),
            "noise": Domain(1e-3, 10.0, log=True),
        },
        {"scale": 20, "amplitude": 1, "noise": 1},
    )


@mixed("mixed-valleys-18")
def valleys() -> MixedTask:
    """Rotated quadratics whose floor and conditioning depend on two discrete choices."""
    kinds = ["a", "b", "c", "d", "e", "f", "g", "h"]
    rotations = [torch.linalg.qr(randn(400 + i, 16, 16))[0] for i in range(8)]
    centers = [2 * torch.rand(16, generator=generator(420 + i), dtype=F64) - 1 for i in range(8)]
    floors = torch.rand(8, generator=generator(440), dtype=F64)

    def objective(s: Setting, p: Params) -> Tensor:
        i, level = kinds.index(s["kind"]), s["level"]
        spectrum = torch.logspace(0, -(i % 4), 16, dtype=F64)
        away = rotations[i] @ (p["x"] - centers[i])
        floor = floors[i] + ((level - 5 - 4 * i) / 20) ** 2
        return floor + (spectrum * away**2).sum()

    return MixedTask(
        objective,
        "quadratics: kind, level; 16 coordinates",
        {"kind": kinds},
        {"level": (1, 40, False)},
        {"x": Domain(-3.0, 3.0)},
        {"x": 16},
    )
