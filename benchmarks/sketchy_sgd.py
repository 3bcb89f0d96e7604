"""SketchySGD with its defaults against tuned SGD on an ill-conditioned logistic regression.

a9a (123 features, 32,561 samples) with a weight decay per feature. ``bound`` decays: those of 8 features are at 100, where
the bounds of a search might be, all others between 1e-6 and 1e-3; so the largest eigenvalue is 100, eight times over,
and the rest of the spectrum is below 0.7. ``small`` decays: all between 1e-6 and 1e-3, so only one eigenvalue stands out.

Cost is in passes over the data. A gradient on a batch costs its share of one; a product with a Hessian two
gradients, and its graph one: a refresh of SketchySGD costs 42 gradients. SGD and momentum are tuned: for each budget
the best of their settings is shown (step size in units of 1 / lambda_max, fixed or falling as 1 / sqrt(1 + passes / 2)),
chosen by the very figure that is shown. SketchySGD is as it comes; and once more with a step that falls like that.

    python benchmarks/sketchy_sgd.py --data DIR   # the directory with a9a.xz, of LIBSVM's web page
"""

from __future__ import annotations

import argparse
import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_svmlight_file
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

import optuna_hypergrad as ohg

RESULTS = Path(__file__).parent / "results"
BUDGETS = (1, 2, 5, 10, 20)
SEEDS = (0, 1)
BATCHES = (256, 1024)
REFRESH = 42
"""Gradients: two graphs, and twenty products at two gradients each."""

READING = """\
Reading: where a few directions are far steeper than the rest (`bound`), SketchySGD as it comes is after one or two passes
where tuned SGD is not after twenty, and it is ahead of tuned momentum as well until the noise of the batches
limits both. A refresh costs more than a pass of large batches, so that nothing happens in the first pass at 1024. Where
the steepness is mild (`small`), noise decides, not curvature: SketchySGD is no faster than SGD once that is tuned, which
it need not be itself. At the end a step that falls is worth a factor of one to three."""

Params = dict[str, Tensor]


@dataclass
class Task:
    """A problem, its minimum, and the gap to it relative to the start's."""

    decay: Tensor
    data: tuple[Tensor, Tensor]
    least: float = field(init=False)
    largest: float = field(init=False)

    def __post_init__(self) -> None:
        double = {"w": torch.zeros(123, dtype=torch.float64)}, {"decay": self.decay.double()}
        self._double = tuple(t.double() for t in self.data)
        problem = ohg.BilevelProblem(self._exact, self._exact)
        found = ohg.inner_solve(problem, ohg.NewtonCG(), *double)
        self.least = found.value
        self.largest = ohg.probe_curvature(problem, *double).largest

    def _exact(self, w: Params, lam: Params, batch: None) -> Tensor:
        return loss(w["w"], lam["decay"], *self._double)

    def problem(self, size: int, seed: int) -> ohg.BilevelProblem:
        x, y = self.data

        def batch(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(100_000 * seed + step)
            return torch.randint(len(y), (size,), generator=generator)

        def inner(w: Params, lam: Params, rows: Tensor) -> Tensor:
            return loss(w["w"], lam["decay"], x[rows], y[rows])

        return ohg.BilevelProblem(inner, inner, batch)

    def gap(self, w: Tensor) -> float:
        decay, zero = self.decay.double(), torch.zeros(123, dtype=torch.float64)
        value, start = (float(loss(v, decay, *self._double)) for v in (w.double(), zero))
        return (value - self.least) / (start - self.least)


def loss(w: Tensor, decay: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return softplus(-y * (x @ w)).mean() + 0.5 * (decay * w**2).sum()


def read(directory: Path) -> tuple[Tensor, Tensor]:
    with lzma.open(directory / "a9a.xz") as file:
        x, y = load_svmlight_file(file, n_features=123)
    return torch.tensor(x.toarray(), dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def tasks(data: tuple[Tensor, Tensor]) -> dict[str, Task]:
    small = 10 ** (-6 + 3 * torch.rand(123, generator=torch.Generator().manual_seed(0)))
    bound = torch.where(torch.arange(123) < 8, torch.full_like(small, 100.0), small)
    return {"bound": Task(bound, data), "small": Task(small, data)}


def solvers(steps: int, largest: float) -> dict[str, dict[str, ohg.inner.AbstractInnerSolver]]:
    """By family, by setting; ``steps`` make a pass, and ``largest`` is the largest eigenvalue."""

    def falling(eta: float) -> Callable[[Params, int], Tensor]:
        return lambda lam, step: torch.tensor(eta / math.sqrt(1 + step / steps / 2))

    sgd: dict[str, ohg.inner.AbstractInnerSolver] = {}
    momentum: dict[str, ohg.inner.AbstractInnerSolver] = {}
    for c in (0.25, 0.5, 1.0, 1.4, 1.8):
        sgd[f"{c}"] = ohg.GradientDescent(c / largest)
        sgd[f"{c} falling"] = ohg.GradientDescent(falling(c / largest))
    for c in (0.1, 0.3, 1.0, 2.0, 3.4):
        momentum[f"{c}"] = ohg.HeavyBall(c / largest)
        momentum[f"{c} falling"] = ohg.HeavyBall(falling(c / largest))
    half = falling(0.5)
    return {
        "SketchySGD, default": {"": ohg.SketchySGD()},
        "SketchySGD, falling": {"": ohg.SketchySGD(relative_step=lambda t: float(half({}, t)))},
        "SGD, tuned": sgd,
        "SGD with momentum 0.9, tuned": momentum,
    }


def run(task: Task, size: int, seed: int, solver: ohg.inner.AbstractInnerSolver) -> list[float]:
    """The gap at each budget; infinite after it has diverged."""
    problem, lam = task.problem(size, seed), {"decay": task.decay}
    w, state, taken, gaps = {"w": torch.zeros(123)}, None, 0, []
    share = size / len(task.data[1])
    refresh = getattr(solver, "refresh_every", 0)
    for budget in BUDGETS:
        total = taken
        while cost(total + 1, refresh) * share <= budget:
            total += 1
        found = ohg.inner_solve(
            problem, solver, w, lam, start=taken, state=state, num_steps=total - taken
        )
        w, state, taken = found.inner_params, found.state, total
        gap = task.gap(w["w"])
        if not gap < 10:
            return gaps + [math.inf] * (len(BUDGETS) - len(gaps))
        gaps.append(gap)
    return gaps


def cost(steps: int, refresh: int) -> int:
    """In gradients on a batch."""
    return steps + (REFRESH * math.ceil(steps / refresh) if refresh else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    data = read(parser.parse_args().data)
    lines = [
        "# SketchySGD against tuned SGD",
        "",
        "Made by `python benchmarks/sketchy_sgd.py --data DIR`, whose docstring says what is solved and counted. Gap to",
        f"the minimum, relative to that of the start, after so many passes over the data; geometric means of {len(SEEDS)} seeds.",
    ]
    lines += ["", READING]
    curves = {}
    for name, task in tasks(data).items():
        for size in BATCHES:
            lines += ["", f"## {name} decays, batches of {size}", ""]
            lines.append("| solver | " + " | ".join(f"{b}" for b in BUDGETS) + " |")
            lines.append("|---" * (len(BUDGETS) + 1) + "|")
            for family, members in solvers(len(data[1]) // size, task.largest).items():
                gaps = {
                    k: [run(task, size, seed, s) for seed in SEEDS]
                    for k, s in tqdm(members.items(), desc=f"{name}, {size}, {family}")
                }
                means = {k: [_mean(c) for c in zip(*g, strict=True)] for k, g in gaps.items()}
                best = [min(means, key=lambda k, i=i: means[k][i]) for i in range(len(BUDGETS))]
                row = [means[k][i] for i, k in enumerate(best)]
                curves[name, size, family] = row
                cells = [
                    f"{v:.1e}" + (f" ({k})" if k else "") for v, k in zip(row, best, strict=True)
                ]
                lines.append(f"| {family} | " + " | ".join(cells) + " |")
    draw(curves)
    lines += ["", "![](sketchy_sgd.png)", ""]
    (RESULTS / "sketchy_sgd.md").write_text("\n".join(lines))


def _mean(gaps: tuple[float, ...]) -> float:
    return geometric_mean(gaps) if max(gaps) < math.inf else math.inf


def draw(curves: dict[tuple[str, int, str], list[float]]) -> None:
    names = list(dict.fromkeys(k[0] for k in curves))
    figure, axes = plt.subplots(
        len(names), len(BATCHES), figsize=(9, 6.4), sharex=True, sharey=True, layout="constrained"
    )
    for i, name in enumerate(names):
        for j, size in enumerate(BATCHES):
            for (n, s, family), row in curves.items():
                if (n, s) == (name, size):
                    axes[i, j].plot(BUDGETS, row, marker="o", markersize=4, label=family)
            axes[i, j].set_title(f"{name} decays, batches of {size}", fontsize="medium")
            axes[i, j].set(xscale="log", yscale="log")
            axes[i, j].set_xticks(BUDGETS, [str(b) for b in BUDGETS])
            axes[i, j].minorticks_off()
            axes[i, j].grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("passes over the data, products counted")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative gap to the minimum")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(RESULTS / "sketchy_sgd.png", dpi=120)


if __name__ == "__main__":
    main()
