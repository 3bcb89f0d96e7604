"""How near a linear solve comes to ``H^-1 b`` for how many gradient evaluations, by solver and preconditioner.

Three tasks, each at (or near) an inner solution, with ``b`` the gradient of a validation loss:

* (a) logistic regression on a9a, 123 weights, decay 1e-4: ``H^-1 b`` by the factorized matrix;
* (b) MLP 784-512-512-10 (tanh) on MNIST images, 669,706 weights, decay 1e-4, trained by L-BFGS; damping
  1e-4 on top, which makes the Hessian positive definite;
* (c) two 3x3 convolutions and a linear layer on MNIST images, likewise.

The reference of (b) and (c) is CG in float64 to a residual of 1e-10; what is measured runs in float64 too, so that
errors are those of the methods.

The text under "Reading" in the table's file is written by hand, and kept.

Cost is counted, not timed: products (those of preconditioners included) times the measured cost of a
product, plus the passes of K-FAC and of the Gauss-Newton terms and each application of a preconditioner, all as CPU time divided by that of one gradient
evaluation, plus 1 for the Hessian's graph. "kept" is the same solve with a preconditioner that an earlier outer step has
made (``refresh_every``).

    python benchmarks/ihvp.py --data DIR            # DIR holds libsvm/a9a.xz and MNIST's gzip files (or mnist/)
    python benchmarks/ihvp.py --data DIR --tasks b --samples 5000
    python benchmarks/ihvp.py --data DIR --tasks    # the table and the figure again
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import lzma
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_svmlight_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import optuna_hypergrad as ohg
from optuna_hypergrad.curvature import ritz_values
from optuna_hypergrad.ihvp import AbstractLinearSolver, AbstractPreconditioner
from optuna_hypergrad.operators import (
    AbstractLinearOperator,
    DampedOperator,
    HessianOperator,
    InnerGraph,
)

Params = dict[str, Tensor]
F64 = torch.float64
RESULTS = Path(__file__).resolve().parent / "results"
TARGET = 1e-2
NAMES = {
    "a": "(a) logistic regression, a9a",
    "b": "(b) MLP 784-512-512-10, MNIST",
    "c": "(c) ConvNet, MNIST",
}


@dataclass
class Task:
    model: nn.Module
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    decay: float
    damping: float
    inner_params: Params = field(default_factory=dict)

    def inner(self, w: Params, lam: Params, batch: object) -> Tensor:
        loss = cross_entropy(
            torch.func.functional_call(self.model, w, (self.train[0],)), self.train[1]
        )
        return loss + 0.5 * self.decay * torch.stack([(v * v).sum() for v in w.values()]).sum()

    def outer(self, w: Params, lam: Params, batch: object) -> Tensor:
        return cross_entropy(
            torch.func.functional_call(self.model, w, (self.valid[0],)), self.valid[1]
        )

    def solve(self, num_steps: int) -> float:
        """Train by so many steps of L-BFGS; returns the gradient's norm."""
        problem = ohg.BilevelProblem(self.inner, self.outer)
        w = {k: v.detach() for k, v in self.model.named_parameters()}
        lam = {"unused": torch.zeros(1)}
        found = ohg.inner_solve(problem, ohg.LBFGS(), w, lam, num_steps=num_steps)
        self.inner_params = found.inner_params
        return found.gradient_norm

    def gradient(self) -> object:
        w = {
            k: v.requires_grad_(True)
            for k, v in ((k, v.detach()) for k, v in self.inner_params.items())
        }
        return torch.autograd.grad(self.inner(w, {}, None), tuple(w.values()))

    def operator(self) -> Watched:
        return Watched(HessianOperator(InnerGraph(self.inner, self.inner_params, {}, None)))

    def right_hand_side(self, operator: AbstractLinearOperator) -> Tensor:
        w = {k: v.detach().requires_grad_(True) for k, v in self.inner_params.items()}
        slopes = torch.autograd.grad(self.outer(w, {}, None), tuple(w.values()))
        return torch.cat([s.reshape(-1) for s in slopes])

    def gauss_newton(self, rank: int, targets: bool) -> ohg.GaussNewtonPreconditioner:
        return ohg.GaussNewtonPreconditioner(
            self.model,
            lambda batch: self.train[0],
            "cross_entropy",
            (lambda batch: self.train[1]) if targets else None,
            damping=self.decay,
            rank=rank,
        )

    def kfac(self, bolder: float = 1.0) -> ohg.KFAC:
        return ohg.KFAC(
            self.model, lambda batch: self.train[0], "cross_entropy", damping=bolder * self.decay
        )


class Watched(AbstractLinearOperator):
    """An operator that follows the iterates of CG by its directions: ``alpha = r.p / p.Hp``."""

    def __init__(self, base: HessianOperator) -> None:
        self.base, self.graph = base, base.graph
        self.size, self.dtype, self.device = base.size, base.dtype, base.device
        self.errors: list[float] = []
        self.num_built = 0
        self._x: Tensor | None = None

    def follow(
        self, b: Tensor, exact: Tensor, damping: float, weights: Tensor | None = None
    ) -> None:
        """Errors from now on are those of ``weights * x``."""
        self._x, self._r, self._damping = torch.zeros_like(b), b.clone(), damping
        self._weights = torch.ones_like(b) if weights is None else weights
        self._exact = self._weights * exact
        self.errors, self.num_built = [1.0], 0

    def stop(self) -> None:
        self._x = None

    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor:
        product = self.base(vector, out)
        if self._x is not None:
            damped = product + self._damping * vector
            alpha = torch.dot(self._r, vector) / torch.dot(vector, damped)
            self._x += alpha * vector
            self._r -= alpha * damped
            self.errors.append(relative(self._weights * self._x, self._exact))
        return product

    def _apply_many(self, vectors: Tensor) -> Tensor:
        self.num_built += len(vectors)
        return self.base.many(vectors)


def relative(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


def task_a(options: argparse.Namespace) -> Task:
    with lzma.open(options.data / "libsvm" / "a9a.xz") as file:
        x, y = load_svmlight_file(file, n_features=123)
    order = np.random.RandomState(0).permutation(len(y))
    x, y = torch.tensor(x[order].toarray()), torch.tensor((y[order] > 0).astype(np.int64))
    cut = int(0.8 * len(y))

    class TwoClasses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(123, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            score = self.layer(x)
            return torch.cat([torch.zeros_like(score), score], 1)

    model = TwoClasses().double()
    task = Task(model, (x[:cut], y[:cut]), (x[cut:], y[cut:]), decay=1e-4, damping=0.0)
    print(f"gradient norm {task.solve(400):.1e}")
    return task


def networks(name: str, options: argparse.Namespace) -> Task:
    x, y = mnist(options.data, 2 * options.samples)
    torch.manual_seed(0)
    if name == "b":
        x = x.flatten(1)
        model: nn.Module = nn.Sequential(
            nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)
        )
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(4),
            nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(7),
            nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip
    n = options.samples
    damping = options.damping
    task = Task(model.double(), (x[:n], y[:n]), (x[n:], y[n:]), decay=1e-4, damping=damping)
    print(f"gradient norm {task.solve(options.steps):.1e}", flush=True)
    return task


def mnist(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    folder = folder / "mnist" if (folder / "mnist").is_dir() else folder
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    x = np.frombuffer(raw, np.uint8, count=count * 784).reshape(-1, 1, 28, 28)
    y = np.frombuffer(labels, np.uint8, count=count)
    return torch.tensor(x / 255.0), torch.tensor(y.astype(np.int64))


def cpu_seconds(function: Callable[[], object], repetitions: int = 5) -> float:
    times = []
    for _ in range(repetitions):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return statistics.median(times)


@dataclass(frozen=True)
class Costs:
    """In gradient evaluations."""

    product: float
    batched: float


def measured(task: Task, operator: Watched) -> tuple[Costs, float]:
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(0), dtype=F64)
    rows = v.repeat(8, 1)
    task.gradient(), operator(v)
    unit = cpu_seconds(task.gradient)
    costs = Costs(
        cpu_seconds(lambda: operator(v)) / unit,
        cpu_seconds(lambda: operator.many(rows), 3) / unit / 8,
    )
    return costs, unit


def preconditioners(task: Task) -> dict[str, AbstractPreconditioner | None]:
    return {
        "CG": None,
        "CG + diagonal(16)": ohg.DiagonalPreconditioner(16),
        "CG + Nystrom(10)": ohg.NystromPreconditioner(10),
        "CG + Nystrom(30)": ohg.NystromPreconditioner(30),
        "CG + Nystrom(60)": ohg.NystromPreconditioner(60),
        "CG + Nystrom(200)": ohg.NystromPreconditioner(200),
        "CG + K-FAC": task.kfac(),
        "CG + K-FAC, damping x30": task.kfac(30.0),
        "CG + Gauss-Newton(150)": task.gauss_newton(150, False),
        "CG + Gauss-Newton(500)": task.gauss_newton(500, False),
        "CG + Gauss-Newton(500), targets": task.gauss_newton(500, True),
    }


def others(damping: float) -> dict[str, Callable[[int], AbstractLinearSolver]]:
    """By their number of steps."""
    return {
        "Neumann": lambda k: ohg.Neumann(k),
        "MINRES": lambda k: ohg.MINRES(k, 0.0),
        "GMRES(50)": lambda k: ohg.GMRES(k, 0.0, 50),
        "Nystrom": lambda k: ohg.Nystrom(k, rho=0.0 if damping else 1e-4),
        "identity": lambda k: ohg.Identity(1.0),
    }


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    task = task_a(options) if name == "a" else networks(name, options)
    operator = task.operator()
    damped: AbstractLinearOperator = operator
    if task.damping:
        damped = DampedOperator(operator, task.damping)
    b = task.right_hand_side(operator)
    reference: AbstractLinearSolver = ohg.Direct()
    if name != "a":  # the preconditioner only shortens it
        reference = ohg.CG(6000, 1e-10, True, preconditioner=ohg.NystromPreconditioner(60, seed=1))
    solved = ohg.linear_solve(reference, damped, b)
    exact = solved.x
    ritz, _ = ritz_values(operator, b, 40)
    costs, unit = measured(task, operator)
    found: dict[str, Any] = {
        "size": operator.size,
        "setting": ""
        if name == "a"
        else f"{options.samples} images, {options.steps} steps of L-BFGS, ",
        "damping": task.damping,
        "damping_share": solved.stats.get("damping_share"),
        "reference_products": solved.num_products,
        "spectrum": [float(ritz[0]), float(ritz[-1])],
        "unit_ms": 1e3 * unit,
        "product": costs.product,
        "batched": costs.batched,
        "curves": {},
    }
    print(name, {k: v for k, v in found.items() if k != "curves"}, flush=True)
    for label, preconditioner in preconditioners(task).items():
        if options.only and label not in options.only:
            continue
        operator.follow(b, exact, task.damping)
        operator.errors = [1.0]
        solver = ohg.CG(options.most, 1e-6, preconditioner=preconditioner)
        done = ohg.linear_solve(solver, damped, b, throw=False)
        errors, built = operator.errors, operator.num_built
        operator.stop()
        passes = application = prepared = 0.0
        if preconditioner is not None:
            if isinstance(preconditioner, ohg.KFAC | ohg.GaussNewtonPreconditioner):
                passes = (
                    cpu_seconds(functools.partial(preconditioner.factorize, operator), 3) / unit
                )
            assert done.factors is not None
            ready = functools.partial(preconditioner.inverse, done.factors, damped)
            inverse, prepared = ready(), cpu_seconds(ready, 3) / unit
            application = cpu_seconds(functools.partial(inverse, b)) / unit
        build = passes + built * costs.batched
        each = costs.product + application
        found["curves"][label] = {
            "build": build,
            "prepared": prepared,
            "each": each,
            "points": [[1 + build + prepared + k * each, e] for k, e in enumerate(errors)],
            "result": done.result.message,
            "stats": done.stats,
        }
        print(f"{label}: {summary(found['curves'][label])} {done.result.message[:80]}", flush=True)
    for label, make in others(task.damping).items():
        if options.only and label not in options.only:
            continue
        points = []
        for k in (10, 30, 60) if label != "identity" else (1,):
            if k > options.most or (label == "Nystrom" and k > 60):
                continue
            before = operator.num_products
            done = ohg.linear_solve(make(k), damped, b, throw=False)
            spent = operator.num_products - before
            each = costs.batched if label == "Nystrom" else costs.product
            points.append([1 + spent * each, relative(done.x, exact)])
            message = done.result.message
        found["curves"][label] = {"build": 0.0, "each": each, "points": points, "result": message}
        print(f"{label}: {points} {message[:80]}", flush=True)
    return found


def reached(curve: dict[str, Any], target: float, kept: bool = False) -> float:
    saved = curve["build"] if kept else 0.0
    return next((cost - saved for cost, error in curve["points"] if error <= target), math.inf)


def summary(curve: dict[str, Any]) -> str:
    return (
        f"to 1e-1 {reached(curve, 1e-1):.0f}, 1e-2 {reached(curve, 1e-2):.0f} (kept "
        f"{reached(curve, 1e-2, True):.0f}), 1e-4 {reached(curve, 1e-4):.0f} evaluations; "
        f"ends at {curve['points'][-1][1]:.1e}"
    )


def table(found: dict[str, Any]) -> str:
    lines = [
        "# Error of H^-1 b against gradient evaluations",
        "",
        "`python benchmarks/ihvp.py --data DIR` (`--tasks`, `--samples`, `--steps`). Gradient evaluations until the relative "
        "error of the solution is below 1e-1, 1e-2 and "
        "1e-4: the Hessian's graph, products, the making and applying of preconditioners, each weighted by its CPU time. "
        f"Kept: with a preconditioner made at an earlier outer step. {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s).",
        "",
    ]
    for name, result in found.items():
        low, high = result["spectrum"]
        share = result["damping_share"]
        lines += [
            f"## {NAMES[name]}",
            "",
            f"{result['size']:,} weights, {result['setting']}damping {result['damping']:g}, Ritz values of the Hessian {low:.1e} to "
            f"{high:.1e}"
            + (f", of the solution's curvature {share:.0%} is damping" if share else "")
            + f"; a product costs {result['product']:.1f} gradient evaluations, "
            f"{result['batched']:.1f} where eight are done together.",
            "",
            "| | making | each step | steps to 1e-2 | to 1e-1 | to 1e-2 | kept, to 1e-2 | to 1e-4 | of CG, to 1e-2 | of CG, kept |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        plain = reached(result["curves"]["CG"], TARGET)
        for label, curve in sorted(
            result["curves"].items(), key=lambda c: list(COLORS).index(c[0])
        ):
            at = [reached(curve, t) for t in (1e-1, 1e-2, 1e-4)]
            kept = reached(curve, TARGET, True)
            prepared = curve.get("prepared", 0.0)
            cells = [f"{curve['build'] + prepared:.1f}", f"{curve['each']:.2f}"]
            steps = (kept - 1 - prepared) / curve["each"] if label.startswith("CG") else math.inf
            cells += [_number(steps), _number(at[0]), _number(at[1]), _number(kept), _number(at[2])]
            cells += [_ratio(at[1], plain), _ratio(kept, plain)]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        best = min((reached(c, TARGET) / plain, k) for k, c in result["curves"].items() if "+" in k)
        kept_best = min(
            (reached(c, TARGET, True) / plain, k) for k, c in result["curves"].items() if "+" in k
        )
        lines += [
            "",
            f"Best preconditioner to 1e-2: {best[1]} at {best[0]:.2f} of plain CG, all included; kept, "
            f"{kept_best[1]} at {kept_best[0]:.2f}.",
            "",
        ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if math.isinf(value) else f"{value:.0f}"


def _ratio(value: float, plain: float) -> str:
    return "-" if math.isinf(value) or math.isinf(plain) else f"{value / plain:.2f}"


COLORS = {
    "CG": "black",
    "CG + diagonal(16)": "tab:orange",
    "CG + Nystrom(10)": "#9ecae1",
    "CG + Nystrom(30)": "#4292c6",
    "CG + Nystrom(60)": "#2171b5",
    "CG + Nystrom(200)": "#08306b",
    "CG + K-FAC": "tab:green",
    "CG + K-FAC, damping x30": "yellowgreen",
    "CG + Gauss-Newton(150)": "plum",
    "CG + Gauss-Newton(500)": "purple",
    "CG + Gauss-Newton(500), targets": "crimson",
    "Neumann": "tab:pink",
    "MINRES": "tab:brown",
    "GMRES(50)": "tab:olive",
    "Nystrom": "tab:red",
    "identity": "gray",
}


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4.8 * len(found), 4.8), squeeze=False)
    labels: dict[str, Any] = {}
    for axis, (name, result) in zip(axes[0], found.items(), strict=True):
        for label, curve in sorted(
            result["curves"].items(), key=lambda c: list(COLORS).index(c[0])
        ):
            x, y = zip(*curve["points"], strict=True)
            style = "-" if label.startswith("CG") else "--o"
            (line,) = axis.plot(x, y, style, color=COLORS[label], markersize=3, linewidth=1.5)
            labels.setdefault(label, line)
        axis.axhline(TARGET, color="gray", linewidth=0.6)
        axis.set(xscale="log", yscale="log", ylim=(1e-6, 10), title=NAMES[name])
        axis.set_xlabel("gradient evaluations, preconditioners' making included")
    axes[0][0].set_ylabel("relative error of $H^{-1} b$")
    figure.legend(labels.values(), labels.keys(), loc="lower center", ncol=5, frameon=False)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--samples", type=int, default=1000, help="images to train on")
    parser.add_argument("--steps", type=int, default=200, help="L-BFGS steps of training")
    parser.add_argument("--damping", type=float, default=1e-4)
    parser.add_argument("--most", type=int, default=600, help="steps of one solve")
    parser.add_argument("--only", nargs="+", help="these rows, beside those that are stored")
    parser.add_argument("--output", type=Path, default=RESULTS / "ihvp")
    options = parser.parse_args()
    stored = options.output.with_suffix(".json")
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    for name in options.tasks:
        before = found.get(name, {}).get("curves", {}) if options.only else {}
        found[name] = run(name, options)
        found[name]["curves"] = before | found[name]["curves"]
        found = {k: found[k] for k in NAMES if k in found}
        stored.write_text(json.dumps(found))
    text = options.output.with_suffix(".md")
    reading = text.read_text().partition("## Reading")[2] if text.exists() else ""
    text.write_text(table(found) + (f"\n## Reading{reading}" if reading else ""))
    plot(found, options.output.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
