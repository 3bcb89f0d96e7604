"""The task of ``condensation.py``: MNIST, a ConvNet, and the two losses of data condensation."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, relu

import optuna_hypergrad as ohg

Params = dict[str, Tensor]
EPS = 0.1
GRID = {28: 3, 14: 3, 8: 2}  # by size, the side of the last grid of the ConvNet


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    Args:
        per_class: Condensed images per class.
        size: Images are ``size x size``: MNIST's 28 x 28, averaged to 14 x 14, or their middle 24 x 24 to 8 x 8.
        width: Channels of the ConvNet.
        inner_steps: ``T``.
        inner_batch: Condensed images in an inner step, evenly from the classes.
        step_size: Of the inner SGD (momentum 0.9).
        outer_lr: Of the outer Adam.
        outer_batch: Real images in an outer loss.
        num_steps: Outer steps.
        num_directions: Of (FG)^2U, per outer step.
        columns: Of them, how many are pushed in one product.
        truncation: Steps that truncated unrolling differentiates.
        switch: Outer step at which the second phase begins.
    """

    per_class: int
    size: int
    width: int
    inner_steps: int
    inner_batch: int
    step_size: float
    outer_lr: float
    outer_batch: int
    num_steps: int
    num_directions: int
    columns: int
    truncation: int
    switch: int

    def solver(self) -> ohg.HeavyBall:
        return ohg.HeavyBall(self.step_size, momentum=0.9, max_steps=self.inner_steps)


@dataclass(frozen=True)
class Data:
    """Images ``(n, 1, size, size)`` in [0, 1] and labels ``(n,)``; all that is computed is on their device."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def device(self) -> torch.device:
        return self.images.device


def load_mnist(folder: Path, size: int, device: str = "cpu") -> Data:
    """The four gzipped idx files of MNIST in ``folder``."""
    parts = []
    for part in ("train", "t10k"):
        images = _idx(folder / f"{part}-images-idx3-ubyte.gz").float()[:, None] / 255
        if size == 8:
            images = images[..., 2:26, 2:26]  # blank around it but for a few strokes
        parts.append(avg_pool2d(images, images.shape[-1] // size))
        parts.append(_idx(folder / f"{part}-labels-idx1-ubyte.gz").long())
    return Data(*(t.to(device) for t in parts))


def _idx(path: Path) -> Tensor:
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))


def generator(*key: int) -> torch.Generator:
    mixed = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]) >> 1)


def initial(setting: Setting, device: torch.device, *key: int) -> Params:
    """Weights of a fresh network; a function of ``key`` alone, so that a step can be replayed."""
    g, w, channels, grid = generator(*key), {}, 1, GRID[setting.size] ** 2
    for i in range(3):
        fan_in = 9 * channels
        w[f"kernel{i}"] = (
            torch.randn(setting.width, channels, 3, 3, generator=g) * (2 / fan_in) ** 0.5
        )
        w[f"bias{i}"] = torch.zeros(setting.width)
        w[f"scale{i}"], w[f"shift{i}"] = torch.ones(setting.width), torch.zeros(setting.width)
        channels = setting.width
    w["last"] = torch.randn(10, grid * channels, generator=g) * (1 / (grid * channels)) ** 0.5
    w["last_bias"] = torch.zeros(10)
    return {k: v.to(device) for k, v in w.items()}


def convnet(w: Params, x: Tensor) -> Tensor:
    """Three blocks of convolution, instance norm, ReLU and average pooling, down to a grid of 3 x 3 or 2 x 2."""
    for i in range(3):
        x = conv2d(x, w[f"kernel{i}"], w[f"bias{i}"], padding=1)
        x = x - x.mean((2, 3), keepdim=True)
        x = x * (x.square().mean((2, 3), keepdim=True) + EPS).rsqrt()
        x = relu(x * w[f"scale{i}"][:, None, None] + w[f"shift{i}"][:, None, None])
        if x.shape[-1] > 3:  # the third block of small images has nothing to pool
            x = avg_pool2d(x, 2)
    return x.flatten(1) @ w["last"].T + w["last_bias"]


def fixed_labels(setting: Setting) -> Tensor:
    return torch.arange(10).repeat(setting.per_class)


def real_images(setting: Setting, data: Data, seed: int) -> Tensor:
    """Random training images, in the order of ``fixed_labels``: the start, and the baseline."""
    order = torch.randperm(len(data.labels), generator=generator(seed, 1))
    chosen, labels = torch.empty(setting.per_class, 10, dtype=torch.long), data.labels.cpu()
    for label in range(10):
        chosen[:, label] = order[labels[order] == label][: setting.per_class]
    return data.images[chosen.flatten()].clone()


def make_problem(setting: Setting, data: Data, seed: int) -> ohg.BilevelProblem:
    """Inner: a network on the condensed images. Outer: its loss on real ones."""
    labels = fixed_labels(setting).to(data.device)

    def training_loss(w: Params, lam: Params, rows: Tensor) -> Tensor:
        return cross_entropy(convnet(w, lam["images"][rows]), labels[rows])

    def real_loss(w: Params, lam: Params, rows: Tensor) -> Tensor:
        return cross_entropy(convnet(w, data.images[rows]), data.labels[rows])

    def real_batch(step: int) -> Tensor:
        rng = generator(seed, 2, step)
        rows = torch.randint(len(data.labels), (setting.outer_batch,), generator=rng)
        return rows.to(data.device)

    def condensed_batch(step: int) -> Tensor:
        return balanced_rows(setting, step).to(data.device)

    return ohg.BilevelProblem(training_loss, real_loss, condensed_batch, real_batch)


def balanced_rows(setting: Setting, step: int) -> Tensor:
    """Rows of the condensed images, equally many of each class: they are ordered ``0 .. 9, 0 .. 9``."""
    groups = min(setting.inner_batch // 10, setting.per_class)
    order = torch.arange(setting.per_class)
    if groups < setting.per_class:
        epoch, part = divmod(step, setting.per_class // groups)
        order = torch.randperm(setting.per_class, generator=generator(3, epoch))
        order = order[groups * part : groups * (part + 1)]
    return (10 * order[:, None] + torch.arange(10)).flatten()


def accuracies(
    setting: Setting, data: Data, images: Tensor, num_networks: int, num_steps: int
) -> list[float]:
    """Test accuracy of new networks, each trained on ``images`` with the inner solver for ``num_steps``.

    Their initializations are none that condensation has seen.
    """
    problem, found = make_problem(setting, data, 0), []
    for i in range(num_networks):
        trained = ohg.inner_solve(
            problem,
            setting.solver(),
            initial(setting, data.device, 4, i),
            {"images": images},
            num_steps=num_steps,
        )
        with torch.no_grad():
            guesses = [
                convnet(trained.inner_params, x).argmax(1) for x in data.test_images.split(2000)
            ]
        found.append(float((torch.cat(guesses) == data.test_labels).float().mean()))
    return found
