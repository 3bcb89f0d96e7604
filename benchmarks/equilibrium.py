"""A deep equilibrium classifier, trained with phantom gradients and with exact implicit gradients.

The layer is ``z* = tanh(z* W + x U + b)`` with ``W`` scaled to a spectral norm of 0.95, so that every solve converges; a
linear classifier reads ``z*``. All methods train the same network from the same initialization on the same batches (Adam,
step falling to 0), in float64, with the same search for the equilibrium; they differ in the backward pass only.

* accuracy: on the test set after training, mean and standard deviation over seeds, and its difference from that of the
  exact gradient, paired by seed;
* products: with the transposed Jacobian, per backward pass;
* backward: CPU time of the backward passes of a whole training run over that of the exact gradient's. It includes
  what all of them have to do: the classifier, and pulling ``u`` through the map once. Seeds are interleaved.

Then, at the network that exact gradients have trained, the relative error and the cosine of the phantom gradient of all
parameters, by its number of steps.

    python benchmarks/equilibrium.py                 # the digits of scikit-learn, 8 x 8
    python benchmarks/equilibrium.py --mnist DIR     # MNIST's gzip files, in equilibrium_mnist.md; some of the methods
"""

from __future__ import annotations

import argparse
import gzip
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import optuna_hypergrad as ohg

RESULTS = Path(__file__).parent / "results"
F64 = torch.float64
FORWARD = ohg.Anderson(200, 1e-5, per_sample=True)
GMRES: Any = getattr(ohg, "GMRES", None)
EXACT = "exact, series to 1e-8" if GMRES is None else "exact, GMRES to 1e-8"
METHODS: dict[str, Any] = {
    EXACT: ohg.Picard(2000, 1e-8) if GMRES is None else GMRES(1000, 1e-8),
    "Anderson to 1e-8": ohg.Anderson(500, 1e-8, memory=10, per_sample=True),
    "Anderson to 1e-3": ohg.Anderson(500, 1e-3, per_sample=True),
    "series to 1e-3": ohg.Picard(2000, 1e-3),
    "phantom, k = 5, tau = 1": ohg.Phantom(5, 1.0),
    "phantom, k = 5, tau = 0.5": ohg.Phantom(5, 0.5),
    "phantom, k = 5, tau = 0.5, unrolled": ohg.Phantom(5, 0.5, unrolled=True),
    "phantom, k = 2, tau = 1": ohg.Phantom(2, 1.0),
    "phantom, k = 1, tau = 1 (Jacobian-free)": ohg.Phantom(1, 1.0),
}
ON_MNIST = (EXACT, "series to 1e-3", *(k for k in METHODS if k.startswith("phantom, k = 5, tau")))
CURVES = {  # for the errors by number of steps
    "tau = 1": lambda k: ohg.Phantom(k, 1.0),
    "tau = 0.5": lambda k: ohg.Phantom(k, 0.5),
    "tau = 0.5, unrolled": lambda k: ohg.Phantom(k, 0.5, unrolled=True),
}
STEPS = (1, 2, 3, 5, 8, 12, 20, 30)


@dataclass(frozen=True)
class Task:
    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    width: int
    batch: int
    epochs: int
    lr: float


@dataclass(frozen=True)
class Run:
    accuracy: float
    loss: float
    seconds: float
    products: float
    searched: float
    network: dict[str, Tensor]


def digits() -> Task:
    x, y = load_digits(return_X_y=True)
    features, labels = torch.tensor(x / 16, dtype=F64), torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    return Task(
        "digits, 1,000 train and 797 test images",
        (features[train], labels[train]),
        (features[test], labels[test]),
        width=80,
        batch=100,
        epochs=30,
        lr=3e-3,
    )


def mnist(folder: Path) -> Task:
    def read(name: str) -> np.ndarray:
        with gzip.open(folder / name) as file:
            raw = file.read()
        sizes = np.frombuffer(raw, ">i4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)

    def part(name: str) -> tuple[Tensor, Tensor]:
        images = torch.tensor(read(f"{name}-images-idx3-ubyte.gz"), dtype=F64).flatten(1) / 255
        return images, torch.tensor(read(f"{name}-labels-idx1-ubyte.gz"), dtype=torch.int64)

    return Task(
        "MNIST, 60,000 train and 10,000 test images",
        part("train"),
        part("t10k"),
        width=100,
        batch=250,
        epochs=2,
        lr=2e-3,
    )


def start(task: Task, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(n: int, m: int) -> Tensor:
        return torch.randn(n, m, generator=generator, dtype=F64) / n**0.5

    inputs = task.train[0].shape[1]
    return {
        "W": randn(task.width, task.width),
        "U": randn(inputs, task.width),
        "b": torch.zeros(task.width, dtype=F64),
        "V": randn(task.width, 10),
        "c": torch.zeros(10, dtype=F64),
    }


def logits(p: dict[str, Tensor], x: Tensor, **how: Any) -> Tensor:
    recurrent = 0.95 * p["W"] / torch.linalg.matrix_norm(p["W"], 2)
    injected = x @ p["U"] + p["b"]
    z = ohg.fixed_point(
        lambda z: torch.tanh(z @ recurrent + injected),
        torch.zeros_like(injected),
        forward=FORWARD,
        **how,
    )
    return z @ p["V"] + p["c"]


def trained(task: Task, backward: Any, seed: int, epochs: int) -> Run:
    p = {k: v.requires_grad_() for k, v in start(task, seed).items()}
    generator = torch.Generator().manual_seed(1000 + seed)
    x, y = task.train
    optimizer = torch.optim.Adam(p.values(), task.lr)
    per_epoch = len(x) // task.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    seconds, products, searched, loss = 0.0, 0.0, 0.0, torch.tensor(0.0)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in torch.split(order[: per_epoch * task.batch], task.batch):
            stats: dict[str, float] = {}
            optimizer.zero_grad()
            loss = cross_entropy(logits(p, x[rows], backward=backward, stats=stats), y[rows])
            begun = time.process_time()
            loss.backward()
            seconds += time.process_time() - begun
            optimizer.step()
            schedule.step()
            products += stats.get("num_products", backward.num_steps if _unrolled(backward) else 0)
            searched += stats["num_steps"]
    with torch.no_grad():
        right = torch.cat(
            [
                logits(p, part).argmax(1) == labels
                for part, labels in zip(
                    task.test[0].split(1000), task.test[1].split(1000), strict=True
                )
            ]
        )
    count = epochs * per_epoch
    network = {k: v.detach() for k, v in p.items()}
    return Run(
        float(right.double().mean()),
        float(loss.detach()),
        seconds,
        products / count,
        searched / count,
        network,
    )


def _unrolled(backward: Any) -> bool:
    return isinstance(backward, ohg.Phantom) and backward.unrolled


def gradient(task: Task, network: dict[str, Tensor], backward: Any) -> Tensor:
    p = {k: v.clone().requires_grad_() for k, v in network.items()}
    x, y = (t[:500] for t in task.test)
    loss = cross_entropy(logits(p, x, backward=backward), y)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(p.values()))])


def curves(task: Task, network: dict[str, Tensor]) -> dict[str, list[tuple[float, float]]]:
    """Relative error and cosine, by number of steps."""
    exact = gradient(task, network, ohg.Picard(3000, 1e-13))
    found = {}
    for label, make in CURVES.items():
        found[label] = [
            (
                float((g - exact).norm() / exact.norm()),
                float(torch.cosine_similarity(g, exact, dim=0)),
            )
            for g in (gradient(task, network, make(k)) for k in STEPS)
        ]
    return found


def table(task: Task, runs: dict[str, list[Run]], epochs: int) -> list[str]:
    exact = runs[EXACT]
    lines = [
        f"## {task.name}",
        "",
        f"Width {task.width}, {epochs} epochs in batches of {task.batch}, {len(exact)} seeds; the search takes "
        f"{np.mean([r.searched for r in exact]):.1f} evaluations on average.",
        "",
        "| backward | test accuracy, % | minus exact, points | worst seed | products | backward time / exact | exact takes that many times as long |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = sum(r.seconds for r in exact)
    for name, found in runs.items():
        accuracy = 100 * np.array([r.accuracy for r in found])
        away = accuracy - 100 * np.array([r.accuracy for r in exact])
        ratio = sum(r.seconds for r in found) / reference
        products = np.mean([r.products for r in found])
        lines.append(
            f"| {name} | {accuracy.mean():.2f} ± {accuracy.std(ddof=1) if len(found) > 1 else 0:.2f} | "
            f"{away.mean():+.2f} | {away.min():+.2f} | {products:.1f} | {ratio:.2f} | {1 / ratio:.1f} |"
        )
    return [*lines, ""]


def error_table(found: dict[str, list[tuple[float, float]]]) -> list[str]:
    lines = [
        "Relative error (cosine) of the phantom gradient of all parameters, 500 test images, after training with exact "
        "gradients:",
        "",
        f"| k | {' | '.join(map(str, STEPS))} |",
        f"|---|{'---|' * len(STEPS)}",
    ]
    for label, cells in found.items():
        shown = " | ".join(f"{error:.1e} ({cosine:.3f})" for error, cosine in cells)
        lines.append(f"| {label} | {shown} |")
    return [*lines, ""]


def draw(task: Task, runs: dict[str, list[Run]], found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.6))
    for style, (label, cells) in zip(("o-", "s-", "x--"), found.items(), strict=True):
        left.plot(STEPS, [error for error, _ in cells], style, label=label, markersize=4)
    left.set_yscale("log")
    left.set_xlabel("steps k")
    left.set_ylabel("relative error of the gradient")
    left.set_title(task.name, fontsize=9)
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    exact = runs[EXACT]
    reference = sum(r.seconds for r in exact)
    for marker, (name, several) in zip("oXPDs^v<>*", runs.items(), strict=False):
        away = [100 * (r.accuracy - e.accuracy) for r, e in zip(several, exact, strict=True)]
        right.errorbar(
            sum(r.seconds for r in several) / reference,
            np.mean(away),
            np.std(away, ddof=1) / len(away) ** 0.5 if len(away) > 1 else 0,
            fmt=marker,
            capsize=2,
            markersize=5,
            label=name,
        )
    right.axhspan(-0.5, 0.5, color="tab:green", alpha=0.08)
    right.set_xscale("log")
    right.set_xticks(
        ticks := [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2) if t > 0.6 * right.get_xlim()[0]]
    )
    right.set_xticklabels([f"{t:g}" for t in ticks])
    right.minorticks_off()
    right.set_xlabel("CPU time of the backward passes / exact")
    right.set_ylabel("accuracy minus exact, points")
    right.set_title("mean and its standard error; green: within 0.5", fontsize=9)
    right.grid(alpha=0.3)
    right.legend(fontsize=6.5, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--seeds", type=int, help="6 for digits, 2 for MNIST")
    parser.add_argument("--epochs", type=int, help="instead of the task's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = mnist(options.mnist) if options.mnist else digits()
    methods = ON_MNIST if options.mnist else tuple(METHODS)
    seeds = options.seeds or (2 if options.mnist else 6)
    epochs = options.epochs or task.epochs
    output = options.output or RESULTS / f"equilibrium{'_mnist' if options.mnist else ''}.md"
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    for seed, name in tqdm([(seed, name) for seed in range(seeds) for name in methods]):
        runs[name].append(trained(task, METHODS[name], seed, epochs))
    found = curves(task, runs[EXACT][0].network)
    lines = [
        "# Phantom gradients of a deep equilibrium classifier",
        "",
        f"`python benchmarks/equilibrium.py{' --mnist DIR' if options.mnist else ''}`, {options.threads} thread(s), "
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}; what the columns are is at "
        f"the top of that file.",
        "",
        *table(task, runs, epochs),
        *error_table(found),
    ]
    output.write_text("\n".join(lines))
    draw(task, runs, found, output.with_suffix(".png"))
    print(output.read_text())


if __name__ == "__main__":
    main()
