"""Few-shot episodes of Omniglot, and three ways to learn from them as bilevel problems."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import (
    affine_grid,
    conv2d,
    cross_entropy,
    grid_sample,
    interpolate,
    one_hot,
    silu,
)

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator
from optuna_hypergrad.inner import AbstractInnerSolver

Params = dict[str, Tensor]
Classes = Literal["characters", "drawings"]
NUM_BLOCKS, VALIDATION = 4, 100
Task = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Data:
    """Images by class: ``(classes, images, size, size)``, strokes 1 on 0."""

    training: Tensor
    validation: Tensor
    test: Tensor


def load(folder: Path, classes: Classes) -> Data:
    """``"characters"``: 20 people's drawings of each; ``"drawings"``: each image is a class of its own.

    Raises:
        ValueError: if the labels do not belong to the images.
    """
    background, evaluation = (
        _load(folder / f"images_{k}", classes) for k in ("background", "evaluation")
    )
    order = torch.randperm(len(background), generator=torch.Generator().manual_seed(0))
    background = background[order]
    return Data(background[VALIDATION:], background[:VALIDATION], evaluation)


def _load(stem: Path, classes: Classes) -> Tensor:
    sheet = np.asarray(Image.open(stem.with_suffix(".png")))[..., 0]
    rows = sheet.reshape(len(sheet) // 28, 28, -1, 28).swapaxes(1, 2).reshape(-1, 28, 28)
    images = torch.from_numpy(rows.astype(np.float32) / 255)
    if classes == "drawings":
        return images[:, None]
    names = [tuple(n) for n in json.loads(stem.with_suffix(".json").read_text())]
    by_name: dict[tuple[str, ...], list[int]] = {}
    for i, name in enumerate(names):
        by_name.setdefault(name, []).append(i)
    index = torch.tensor([by_name[k] for k in sorted(by_name)])
    alike = likeness(images, index)
    if alike < 0.1:
        raise ValueError(
            f"{stem.name}: images of one character are no more alike than images of any ({alike:.3f}; 0 by chance), so "
            f"the labels in {stem.name}.json are not those of the images; use --classes drawings."
        )
    return images[index]


def likeness(images: Tensor, index: Tensor) -> float:
    """Mean correlation of the blurred mean of one half of each class with that of the other half."""
    blurred = interpolate(images[:, None], 9, mode="area").flatten(1)
    blurred = blurred - blurred.mean(0)
    blurred = blurred / blurred.norm(dim=1, keepdim=True).clamp_min(1e-6)
    first, second = (blurred[half].mean(1) for half in index.chunk(2, dim=1))
    return float((first * second).sum(1).mean())


def distorted(images: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    """``(n, size, size)``, each turned, sheared, scaled, shifted and bent at random."""
    n, size = len(images), images.shape[-1]

    def uniform(*shape: int) -> Tensor:
        return strength * (2 * torch.rand(n, *shape, generator=rng) - 1)

    angle, log_scale = 0.4 * uniform(), 0.25 * uniform(2)
    cos, sin, shear = angle.cos(), angle.sin(), 0.3 * uniform()
    matrix = torch.stack([torch.stack([cos, shear - sin], 1), torch.stack([sin, cos], 1)], 1)
    matrix = matrix * log_scale.exp()[:, None, :]
    shift = 0.15 * uniform(2, 1)
    grid = affine_grid(torch.cat([matrix, shift], 2), [n, 1, size, size], align_corners=False)
    bend = interpolate(0.2 * uniform(2, 4, 4), size, mode="bilinear", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    return grid_sample(images[:, None], grid, align_corners=False)[:, 0]


@dataclass(frozen=True)
class Setting:
    """Sizes of episodes and networks; ``distortion`` is the strength of that of single drawings."""

    ways: int = 5
    shots: int = 1
    queries: int = 5
    num_tasks: int = 16
    width: int = 32
    distortion: float = 1.0

    def episodes(
        self, classes: Tensor, seed: int, *, rotate: bool, with_support: bool
    ) -> Callable[[int], list[Task]]:
        """``step -> tasks``; each class turned by a random multiple of 90 degrees if ``rotate``."""
        labels, each = torch.arange(self.ways), self.shots + self.queries

        def tasks(step: int) -> list[Task]:
            rng = torch.Generator().manual_seed(seed * 10_000_019 + step)
            chosen = []
            for _ in range(self.num_tasks):
                for c in torch.randperm(len(classes), generator=rng)[: self.ways]:
                    if classes.shape[1] == 1:
                        of_class = classes[c].expand(each, -1, -1)
                    else:
                        which = torch.randperm(classes.shape[1], generator=rng)
                        of_class = classes[c, which[:each]]
                    turn = int(torch.randint(4, (), generator=rng)) if rotate else 0
                    chosen.append(torch.rot90(of_class, turn, (1, 2)))
            images = torch.stack(chosen)
            if classes.shape[1] == 1:
                flat = distorted(images.flatten(0, 1), rng, self.distortion)
                images = flat.view(images.shape)
            images = images.unflatten(0, (self.num_tasks, self.ways))[:, :, :, None]
            found: list[Task] = []
            for of_task in images:  # (ways, shots + queries, 1, size, size)
                support, query = of_task.split([self.shots, self.queries], 1)
                seen = support.flatten(0, 1), labels.repeat_interleave(self.shots)
                asked = query.flatten(0, 1), labels.repeat_interleave(self.queries)
                found.append((seen, (*asked, *seen) if with_support else asked))
            return found

        return tasks


def features(w: Params, x: Tensor) -> Tensor:
    """Four convolutions of stride 2 with the batch's own statistics: ``(n, 4 * width)``, rows of length 1."""
    for i in range(NUM_BLOCKS):
        x = conv2d(x, w[f"conv{i}"], stride=2, padding=1)
        x = x - x.mean((0, 2, 3))[:, None, None]
        scale = (
            w[f"gain{i}"] * (x.square().mean((0, 2, 3)) + 1e-3).rsqrt()
        )  # x.var is 3 times as long
        x = silu(x * scale[:, None, None] + w[f"bias{i}"][:, None, None])
    x = x.flatten(1)
    x = x - x.mean(0)
    return x * (x.square().sum(1, keepdim=True) + 1e-3).rsqrt()


def fresh_features(width: int, seed: int) -> Params:
    rng, found, channels = torch.Generator().manual_seed(seed), {}, 1
    for i in range(NUM_BLOCKS):
        found[f"conv{i}"] = (
            torch.randn(width, channels, 3, 3, generator=rng) * (2 / (9 * channels)) ** 0.5
        )
        found[f"gain{i}"], found[f"bias{i}"] = torch.ones(width), torch.zeros(width)
        channels = width
    return found


@dataclass(frozen=True)
class Method:
    """One way to learn from episodes: how a task is learned, how that is differentiated, and the start."""

    inner_objective: ohg.Objective
    logits: Callable[[Params, Params, tuple[Tensor, ...]], Tensor]
    solver: AbstractInnerSolver
    estimator: AbstractHypergradientEstimator
    outer_params: Callable[[Setting, int], Params]
    inner_params: Callable[[Setting], Params] | None = None  # none: they start from theta
    num_steps: int = 3000
    lr: float = 1e-2
    with_support: bool = False

    def problem(self, setting: Setting, classes: Tensor, seed: int, rotate: bool) -> ohg.Episodes:
        tasks = setting.episodes(classes, seed, rotate=rotate, with_support=self.with_support)

        def outer_objective(w: Params, lam: Params, batch: tuple[Tensor, ...]) -> Tensor:
            return cross_entropy(self.logits(w, lam, batch), batch[1])

        origin = "theta." if self.inner_params is None else None
        return ohg.Episodes(self.inner_objective, outer_objective, tasks, origin, vectorize=True)

    def start(self, problem: ohg.Episodes, setting: Setting, outer_params: Params) -> Params:
        given = outer_params if self.inner_params is None else self.inner_params(setting)
        return problem.start(given, setting.num_tasks)


def accuracies(
    method: Method, setting: Setting, classes: Tensor, lam: Params, seed: int, num_episodes: int
) -> list[float]:
    """Of the queries of each episode, after learning from its support."""
    problem, found = method.problem(setting, classes, seed, rotate=False), []
    w0 = method.start(problem, setting, lam)
    for step in range(-(-num_episodes // setting.num_tasks)):
        solution = ohg.inner_solve(problem.at(step), method.solver, w0, lam).inner_params
        adapted = problem.adapted(solution, lam)
        with torch.no_grad():
            for i, (_, query) in enumerate(problem.tasks(step)):
                w = {k: v[i] for k, v in adapted.items()}
                right = method.logits(w, lam, query).argmax(1) == query[1]
                found.append(float(right.float().mean()))
    return found[:num_episodes]


def nearest_pixels(setting: Setting, classes: Tensor, seed: int, num_episodes: int) -> list[float]:
    """Accuracies of the nearest image of the support, without any learning."""
    tasks, found = setting.episodes(classes, seed, rotate=False, with_support=False), []
    for step in range(-(-num_episodes // setting.num_tasks)):
        for (x, y), (asked, answers) in tasks(step):
            nearest = torch.cdist(asked.flatten(1), x.flatten(1)).argmin(1)
            found.append(float((y[nearest] == answers).float().mean()))
    return found[:num_episodes]


def _network(w: Params, x: Tensor) -> Tensor:
    return 18.0 * features(w, x) @ w["last"] + w["last_bias"]


def _network_loss(w: Params, lam: Params, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(_network(w, batch[0]), batch[1])


def _confident_logits(w: Params, lam: Params, batch: tuple[Tensor, ...]) -> Tensor:
    """The pull keeps logits small: those of the queries are multiplied by a learned factor."""
    return lam["log_scale"].exp() * _network(w, batch[0])


def _fresh_network(setting: Setting, seed: int) -> Params:
    """A last layer of zeros, which treats all classes alike, and ``log_scale``."""
    last = {
        "last": torch.zeros(4 * setting.width, setting.ways),
        "last_bias": torch.zeros(setting.ways),
    }
    whole = fresh_features(setting.width, seed) | last
    return {f"theta.{k}": v for k, v in whole.items()} | {"log_scale": torch.tensor(1.0)}


def imaml(
    strength: float = 10.0,
    step_size: float = 0.04,
    num_steps: int = 4,
    products: int = 2,
    damping: float = 0.0,
    gauss_newton: bool = False,
) -> Method:
    """All weights of the network, pulled to the shared ones, by implicit differentiation."""
    inner_objective = ohg.proximal(_network_loss, strength)
    tasks = ohg.Episodes(inner_objective, _network_loss, lambda step: [], "theta.", vectorize=True)
    curvature = tasks.gauss_newton(
        lambda w, lam, batch: _network(w, batch[0]),
        lambda outputs, lam, batch: cross_entropy(outputs, batch[1]),
    )
    return Method(
        inner_objective,
        _confident_logits,
        ohg.GradientDescent(step_size, max_steps=num_steps),
        ohg.Implicit(
            ohg.CG(products, rtol=1e-3),
            damping=damping,
            curvature=curvature if gauss_newton else ohg.Hessian(),
        ),
        _fresh_network,
        num_steps=5000,
    )


def _dual_ridge(w: Params, lam: Params, batch: tuple[Tensor, ...]) -> Tensor:
    """Smallest at ``(K + ridge)^-1 Y``, the ridge head in the coordinates of the images."""
    x, y = batch
    embedded, a = features(lam, x), w["dual"]
    targets = one_hot(y, a.shape[1]).to(a.dtype) - 1 / a.shape[1]
    pushed = embedded @ (embedded.T @ a) + lam["log_ridge"].exp() * a
    return (a * (0.5 * pushed - targets)).sum()


def _ridge_logits(w: Params, lam: Params, batch: tuple[Tensor, ...]) -> Tensor:
    asked, _, seen, _ = batch
    return lam["log_scale"].exp() * features(lam, asked) @ (features(lam, seen).T @ w["dual"])


def ridge_head() -> Method:
    """Shared features, a ridge head for each task in closed form."""
    return Method(
        _dual_ridge,
        _ridge_logits,
        ohg.NewtonCG(rtol=1e-5, max_products=100),
        ohg.Implicit(ohg.CG(100, rtol=1e-5)),
        lambda s, seed: (
            fresh_features(s.width, seed)
            | {"log_ridge": torch.tensor(-1.0), "log_scale": torch.tensor(2.0)}
        ),
        lambda s: {"dual": torch.zeros(s.ways * s.shots, s.ways)},
        num_steps=4000,
        with_support=True,
    )


def unrolled_head(step_size: float = 1.0, num_steps: int = 10) -> Method:
    """Shared features, a softmax head for each task by a few steps, which are unrolled."""

    def logits(w: Params, lam: Params, batch: tuple[Tensor, ...]) -> Tensor:
        return lam["log_scale"].exp() * features(lam, batch[0]) @ w["last"]

    return Method(
        lambda w, lam, batch: cross_entropy(logits(w, lam, batch), batch[1]),
        logits,
        ohg.GradientDescent(step_size, max_steps=num_steps),
        ohg.Unroll(),
        lambda s, seed: fresh_features(s.width, seed) | {"log_scale": torch.tensor(1.0)},
        lambda s: {"last": torch.zeros(4 * s.width, s.ways)},
        num_steps=1000,
    )
