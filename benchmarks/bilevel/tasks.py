"""The problems of ``cleaning.py``: which training labels of MNIST are wrong?"""

from __future__ import annotations

import functools
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from draws import GoingRound, drawn
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, relu

import optuna_hypergrad as ohg

Params, Batch = dict[str, Tensor], tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A weight ``sigmoid(lam)`` for each training sample, for a low loss on clean validation samples.

    Attributes:
        kind: ``"softmax"`` or ``"mlp"``.
        train: Pixels ``(n, 784)``, labels, numbers.
        wrong: ``(n,)`` of the training samples, which no method sees.
        decay: Of all inner weights: ``decay |w|^2``.
        start: ``lam_0``.
        batch_size: Of both objectives.
    """

    kind: str
    train: Batch
    validation: Batch
    test: Batch
    wrong: Tensor
    decay: float
    start: float
    batch_size: int

    def predict(self, w: Params, x: Tensor) -> Tensor:
        if self.kind == "softmax":
            return x @ w["w"]
        return linear(relu(linear(x, w["0"], w["0b"])), w["1"], w["1b"])

    def inner_objective(self, w: Params, lam: Params, batch: Batch) -> Tensor:
        each = cross_entropy(self.predict(w, batch[0]), batch[1], reduction="none")
        value = (lam["weight"][batch[2]].sigmoid() * each).mean()
        if self.decay:
            value = value + self.decay * sum(x.square().sum() for x in w.values())
        return value

    def outer_objective(self, w: Params, lam: Params, batch: Batch) -> Tensor:
        return cross_entropy(self.predict(w, batch[0]), batch[1])

    def problem(
        self, seed: int, train: Batch | None = None, going_round: bool = False
    ) -> ohg.BilevelProblem:
        """With ``train`` in place of the training samples; batches that go round, or are drawn anew each time."""
        given = (self.train if train is None else train, self.validation)
        if going_round:
            inner, outer = (
                GoingRound(part, self.batch_size, (seed, salt)) for salt, part in enumerate(given)
            )
            return ohg.BilevelProblem(self.inner_objective, self.outer_objective, inner, outer)
        parts = (
            functools.partial(drawn, part, self.batch_size, (seed, salt))
            for salt, part in enumerate(given)
        )
        return ohg.BilevelProblem(self.inner_objective, self.outer_objective, *parts)

    def first_params(self, seed: int) -> Params:
        if self.kind == "softmax":
            return {"w": torch.zeros(784, 10)}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = torch.nn.Linear(784, 256), torch.nn.Linear(256, 10)
        found: Params = {}
        for i, layer in enumerate(layers):
            found |= {f"{i}": layer.weight.detach(), f"{i}b": layer.bias.detach()}
        return found

    def equal_weights(self, value: float | None = None) -> Params:
        return {"weight": torch.full((len(self.wrong),), self.start if value is None else value)}

    def oracle_weights(self) -> Params:
        """None for the samples whose label is wrong, and one for the others."""
        return {"weight": torch.where(self.wrong, -1e4, 1e4)}

    @torch.no_grad()
    def test_error(self, w: Params) -> float:
        found = self.predict(w, self.test[0]).argmax(1)
        return float((found != self.test[1]).float().mean())

    def auroc(self, lam: Params) -> float:
        """Of the weights, against the truth."""
        return float(roc_auc_score((~self.wrong).numpy(), lam["weight"].numpy()))


def cleaning_mnist(data: Path, p: float) -> Task:
    """The task of ``benchopt/benchmark_bilevel``: softmax regression without bias, 20,000 training samples, a fraction
    ``p`` with labels drawn at random."""
    rng = np.random.RandomState(32)
    x, y = mnist(data, "train")
    x_test, y_test = mnist(data, "t10k")
    x, x_val, y, y_val = train_test_split(
        x, y, train_size=20_000, test_size=5_000, random_state=rng
    )
    corrupt = rng.rand(len(y)) < p
    labels = np.where(corrupt, rng.randint(0, 10, len(y)), y)
    scaler = StandardScaler().fit(x)
    parts = ((x, labels), (x_val, y_val), (x_test, y_test))
    batches = (_batch(scaler.transform(a), b) for a, b in parts)
    return Task("softmax", *batches, torch.from_numpy(labels != y), 0.2, -2.0, 64)


def cleaning_mlp(data: Path) -> Task:
    """An MLP 784-256-10 on 5,000 images, half of them with another label than their own; 1,000 clean ones for validation."""
    x, y = mnist(data, "train")
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(y))[:6000]
    train, validation = chosen[:5000], chosen[5000:]
    wrong = np.zeros(5000, dtype=bool)
    wrong[rng.permutation(5000)[:2500]] = True
    labels = np.where(wrong, (y[train] + rng.integers(1, 10, 5000)) % 10, y[train])
    x_test, y_test = mnist(data, "t10k")
    parts = ((x[train], labels), (x[validation], y[validation]), (x_test, y_test))
    batches = (_batch(a / 255.0, b) for a, b in parts)
    return Task("mlp", *batches, torch.from_numpy(wrong), 0.0, 0.0, 256)


def _batch(x: np.ndarray, y: np.ndarray) -> Batch:
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), torch.arange(len(y))


def mnist(data: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    (images,) = data.glob(f"{part}-images*.gz")
    (labels,) = data.glob(f"{part}-labels*.gz")
    return _idx(images).reshape(-1, 784).astype(np.float64), _idx(labels).astype(np.int64)


def _idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
