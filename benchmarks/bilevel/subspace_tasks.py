"""The five problems of ``subspaces.py``, each with a lower level of at least 20 million weights."""

from __future__ import annotations

import functools
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draws import Part, drawn
from PIL import Image
from sklearn.metrics import roc_auc_score
from subspace_networks import (
    blocks,
    blocks_shapes,
    convolutions,
    convolutions_shapes,
    dense,
    mlp,
    mlp_shapes,
    normal,
)
from tasks import cleaning_mlp, mnist
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import optuna_hypergrad as ohg

Params = dict[str, Tensor]
LENGTH = 16
MEAN, STD = 0.1307, 0.3081  # of MNIST


@dataclass(frozen=True)
class Task:
    """A bilevel problem with its start, and what is asked at its end.

    Attributes:
        validate: Mean outer loss on all validation samples at ``(w, lam)``.
        test: Another figure on samples that no method sees, lower is better.
        told: What is known of the true ``lam``, in words.
    """

    problem: ohg.BilevelProblem
    w: Params
    lam: Params
    validate: Callable[[Params, Params], float]
    test: Callable[[Params, Params], float]
    told: Callable[[Params], dict[str, float]]


def cleaning(data: Path, width: int, seed: int, batch: int, network: str) -> Task:
    """A weight for each of 3,000 (ConvNet: 400) images of MNIST, half of them with another label than their own."""
    given = cleaning_mlp(data / "mnist")
    num = 3000 if network == "mlp" else 400

    def scaled(x: Tensor) -> Tensor:
        x = (x - MEAN) / STD
        return x if network == "mlp" else x.reshape(-1, 1, 28, 28)

    train, validation, test = (
        (scaled(x), y, i) for x, y, i in (given.train, given.validation, given.test)
    )
    train = tuple(x[:num] for x in train)
    test = tuple(x[:1000] for x in test)
    if network == "mlp":
        return reweighting(mlp, mlp_shapes(784, 10, width), (train, validation, test), given.wrong[:num], batch, seed)  # fmt: skip
    shapes = convolutions_shapes(10, width)
    return reweighting(
        convolutions, shapes, (train, validation, test), given.wrong[:num], batch, seed
    )


def reweighting(
    predict: Callable[[Params, Tensor], Tensor],
    shapes: dict[str, tuple[int, ...]],
    parts: tuple[Any, Any, Any],
    wrong: Tensor,
    batch: int,
    seed: int,
) -> Task:
    """A weight ``sigmoid(lam)`` for each training sample, for a low loss on clean validation samples."""
    train, validation, test = parts

    def inner(w: Params, lam: Params, batch: Part) -> Tensor:
        each = cross_entropy(predict(w, batch[0]), batch[1], reduction="none")
        return (lam["weight"][batch[2]].sigmoid() * each).mean()

    def told(lam: Params) -> dict[str, float]:
        return {"AUROC": float(roc_auc_score((~wrong).numpy(), lam["weight"].numpy()))}

    return Task(
        ohg.BilevelProblem(
            inner,
            lambda w, lam, batch: cross_entropy(predict(w, batch[0]), batch[1]),
            functools.partial(drawn, train, batch, (seed, 0)),
            functools.partial(drawn, validation, batch, (seed, 1)),
        ),
        normal(shapes, seed),
        {"weight": torch.zeros(len(wrong))},
        lambda w, lam: mean_loss(functools.partial(predict, w), validation),
        lambda w, lam: error(functools.partial(predict, w), test),
        told,
    )


@torch.no_grad()
def outputs(predict: Callable[[Tensor], Tensor], part: Part) -> Tensor:
    return torch.cat([predict(x) for x in part[0].split(100)])


def mean_loss(predict: Callable[[Tensor], Tensor], part: Part) -> float:
    return float(cross_entropy(outputs(predict, part), part[1]))


def error(predict: Callable[[Tensor], Tensor], part: Part) -> float:
    return float((outputs(predict, part).argmax(1) != part[1]).float().mean())


def mixture(data: Path, width: int, seed: int, batch: int) -> Task:
    """How much of tinyshakespeare, of WikiText-2, and of both with half of the characters replaced, a transformer reads."""
    a, b = (characters(data / name) for name in ("tinyshakespeare/input.txt.xz", "wikitext2_valid_test/valid.txt.xz"))  # fmt: skip
    n = min(len(a), len(b)) - 60_000
    rng = torch.Generator().manual_seed(seed)
    half = torch.cat([a[: n // 2], b[: n - n // 2]])
    noise = half[torch.randperm(n, generator=rng)]
    corrupted = torch.where(torch.rand(n, generator=rng) < 0.5, noise, half)
    sources = torch.stack([a[:n], b[:n], corrupted])
    validation, test = (torch.stack([x[n:][i : i + 30_000] for x in (a, b)]) for i in (0, 30_000))
    shapes = {"embed": (128, width), "place": (LENGTH, width), **blocks_shapes(width), "read": (width, 128)}  # fmt: skip

    def losses(w: Params, passages: Tensor) -> Tensor:
        """Of each source."""
        x = one_hot(passages[..., :-1], 128).to(w["embed"]) @ w["embed"] + w["place"]
        read = dense(blocks(w, x, causal=True), w["read"])
        each = cross_entropy(read.flatten(0, -2), passages[..., 1:].flatten(), reduction="none")
        return each.reshape(len(passages), -1).mean(1)

    @torch.no_grad()
    def loss(text: Tensor, w: Params, lam: Params) -> float:
        chosen = passages(text, 100, (seed, 2), 0)
        return float(torch.stack([losses(w, x).mean() for x in chosen.split(10, dim=1)]).mean())

    names = ("tinyshakespeare", "WikiText-2", "corrupted")
    return Task(
        ohg.BilevelProblem(
            lambda w, lam, batch: lam["mixture"].softmax(0) @ losses(w, batch),
            lambda w, lam, batch: losses(w, batch).mean(),
            functools.partial(passages, sources, batch, (seed, 0)),
            functools.partial(passages, validation, batch, (seed, 1)),
        ),
        normal(shapes, seed),
        {"mixture": torch.zeros(3)},
        functools.partial(loss, validation),
        functools.partial(loss, test),
        lambda lam: dict(zip(names, lam["mixture"].softmax(0).tolist(), strict=True)),
    )


def characters(path: Path) -> Tensor:
    return torch.tensor(
        list(lzma.decompress(path.read_bytes()).decode().encode("ascii", "replace"))
    )


def passages(text: Tensor, size: int, key: tuple[int, int], step: int) -> Tensor:
    """``(sources, size, LENGTH + 1)``."""
    seed = int(np.random.SeedSequence((*key, step)).generate_state(1, np.uint64)[0] >> 1)
    rng = torch.Generator().manual_seed(seed)
    starts = torch.randint(text.shape[-1] - LENGTH, (size, 1), generator=rng)
    return text[:, starts + torch.arange(LENGTH + 1)]


def representation(data: Path, width: int, seed: int, batch: int) -> Task:
    """64 features of MNIST's images (``lam``: 50,176 numbers), learned on 3,000 images, below an MLP that is trained on 2,000 others."""
    train, validation, test = clean_images(data, seed)

    def predict(w: Params, lam: Params, x: Tensor) -> Tensor:
        return mlp(w, torch.tanh(dense(x, lam["features"])) * 1.5)

    def objective(w: Params, lam: Params, batch: Part) -> Tensor:
        return cross_entropy(predict(w, lam, batch[0]), batch[1])

    return Task(
        ohg.BilevelProblem(
            objective,
            objective,
            functools.partial(drawn, train, batch, (seed, 0)),
            functools.partial(drawn, validation, batch, (seed, 1)),
        ),
        normal(mlp_shapes(64, 10, width), seed),
        normal({"features": (784, 64)}, seed + 1),
        lambda w, lam: mean_loss(functools.partial(predict, w, lam), validation),
        lambda w, lam: error(functools.partial(predict, w, lam), test),
        lambda lam: {},
    )


def clean_images(data: Path, seed: int) -> list[Part]:
    """2,000, 3,000 and, of the images for tests, 2,000."""
    rng, found = np.random.default_rng(seed), []
    (x, y), of_test = mnist(data / "mnist", "train"), mnist(data / "mnist", "t10k")
    chosen = rng.permutation(len(y))[:5000]
    for images, labels in (
        (x[chosen[:2000]], y[chosen[:2000]]),
        (x[chosen[2000:]], y[chosen[2000:]]),
        [a[:2000] for a in of_test],
    ):
        pixels = torch.from_numpy(images / 255).float().sub(MEAN).div(STD)
        found.append((pixels, torch.from_numpy(labels), torch.arange(len(labels))))
    return found


def vit(data: Path, width: int, seed: int, batch: int, num: int = 300) -> Task:
    """A weight for each of ``num`` images of CIFAR-10 (JPEG copy), 40 % of them with another label than their own."""
    rng = np.random.default_rng(seed)
    stored = np.load(data / "cifar10_jpeg" / "train.npz")
    chosen = rng.permutation(len(stored["label"]))[: num + 1000]
    x, y = pictures(stored, chosen)
    wrong = torch.from_numpy(rng.permutation(num) < 0.4 * num)
    other = (y[:num] + torch.from_numpy(rng.integers(1, 10, num))) % 10
    train = x[:num], torch.where(wrong, other, y[:num]), torch.arange(num)
    stored = np.load(data / "cifar10_jpeg" / "test.npz")
    test = pictures(stored, rng.permutation(len(stored["label"]))[:2000])
    parts = train, (x[num:], y[num:], torch.arange(1000)), (*test, torch.arange(2000))
    shapes = {"patch": (768, width), "place": (4, width), **blocks_shapes(width), "read": (width, 10)}  # fmt: skip

    def predict(w: Params, x: Tensor) -> Tensor:
        seen = blocks(w, dense(x, w["patch"]) + w["place"], causal=False)
        return dense(seen.mean(1) * 2, w["read"])

    task = reweighting(predict, shapes, parts, wrong, batch, seed)
    task.w["read"].zero_()
    return task


def pictures(stored: Any, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Patches ``(n, 4, 768)`` of 16 x 16 pixels, and labels."""
    raw, offset = stored["jpeg"], stored["offset"]
    found = [
        np.asarray(Image.open(BytesIO(raw[offset[i] : offset[i + 1]].tobytes()))) for i in chosen
    ]
    x = (torch.from_numpy(np.stack(found)).float() / 255 - 0.47) / 0.25
    x = x.reshape(-1, 2, 16, 2, 16, 3).transpose(2, 3).reshape(-1, 4, 768)
    return x, torch.from_numpy(stored["label"][chosen].astype(np.int64))
