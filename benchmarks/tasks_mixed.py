"""Mixed tasks: two discrete hyperparameters and a scale per feature, random features + ridge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn import datasets
from task import F64, generator, randn
from tasks_data import standardized
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "cos": torch.cos,
    "square": torch.square,
    "sigmoid": lambda z: torch.sigmoid(5 * z),
}
WIDTHS = (4, 96)
SCALES = (1e-3, 10.0)
PENALTIES = (1e-6, 10.0)


@dataclass(frozen=True)
class MixedTask:
    """Activation and width are discrete; ``features`` scales and a penalty are continuous."""

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    directions: Tensor
    phases: Tensor

    @property
    def features(self) -> int:
        return self.train[0].shape[1]

    def loss(self, activation: str, width: int, scale: Tensor, penalty: Tensor) -> Tensor:
        """Validation error of ridge regression on ``activation(x * scale @ directions + phases)``."""

        def mapped(x: Tensor) -> Tensor:
            z = (x * scale) @ self.directions[:, :width] + self.phases[:width]
            h = ACTIVATIONS[activation](z) / math.sqrt(width)
            return torch.cat([h, torch.ones(len(h), 1, dtype=F64)], 1)

        (xt, yt), (xv, yv) = self.train, self.validation
        a = mapped(xt)
        gram = a.T @ a / len(a) + penalty * torch.eye(width + 1, dtype=F64)
        w = torch.linalg.solve(gram, a.T @ yt / len(a))
        return ((mapped(xv) @ w - yv) ** 2).mean()


def friedman() -> MixedTask:
    """Friedman's function with 15 of 20 features irrelevant."""
    x, y = datasets.make_friedman1(600, 20, noise=0.5, random_state=0)
    x, y = 2 * torch.tensor(x) - 1, torch.tensor((y - y.mean()) / y.std())
    return _build("mixed-friedman-23", x[:150], y[:150], x[150:], y[150:])


def cancer() -> MixedTask:
    """Breast cancer, classes as -1 and 1."""
    xt, yt, xv, yv = standardized(datasets.load_breast_cancer, 30, 150)
    return _build("mixed-cancer-33", xt, 2 * yt.to(F64) - 1, xv, 2 * yv.to(F64) - 1)


def _build(name: str, xt: Tensor, yt: Tensor, xv: Tensor, yv: Tensor) -> MixedTask:
    directions = randn(31, xt.shape[1], WIDTHS[1])
    phases = 2 * math.pi * torch.rand(WIDTHS[1], generator=generator(32), dtype=F64)
    return MixedTask(name, (xt, yt), (xv, yv), directions, phases)


MIXED = {"mixed-friedman-23": friedman, "mixed-cancer-33": cancer}
