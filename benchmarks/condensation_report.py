"""The table and the figure of ``condensation.py``."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Store = dict[str, dict[str, Any]]
PAPER = {  # MNIST at 28 x 28, 128 channels, T = 100; by images per class
    1: {"truncated": 73.8, "T1-T2": 66.0, "Neumann": 68.4, "(FG)^2U": 82.4, "full unrolling": 92.3},
    10: {
        "truncated": 94.1,
        "T1-T2": 95.0,
        "Neumann": 95.8,
        "(FG)^2U": 96.1,
        "full unrolling": 96.8,
    },
}
NOTE = (
    "Test accuracy of new networks from new initializations, trained on the condensed images for as many steps as "
    "in condensation, and longer; mean and standard deviation of the seeds, each the mean of several networks. "
    "*Outer loss*: mean of the last ten outer steps. All methods take equally many outer steps from the same random "
    "real images, with the same fresh network and real batch in each. *Cosine*: of the estimate with the exact "
    "hypergradient at the start, for one network (mean of a few; two phases: its second). *Paper*: Shen et al. "
    "(2024), at 28 x 28, 128 channels, T = 100; its (FG)^2U has 512 to 2,048 directions. "
    "The instance norm has an epsilon of 0.1 here: with 1e-5 the 2 x 2 grid of the last block makes single "
    "hypergradients a hundred times larger than others, and neither the cheap estimators nor (FG)^2U got beyond the start."
)
READINGS = {
    "cpu": """## Reading (of the default run)

* One image per class: the order is the paper's in each seed, at equally many outer steps. (FG)^2U's single estimates are
  no closer to the exact one than the cheap ones are (cosines), but its errors average out, and theirs do not.
* Two phases: half the cost, and most of the gain.
* Ten images per class: networks trained on the condensed images to the end are the paper's order in each of three seeds,
  T1-T2 and Neumann below truncated unrolling aside. After as many steps as in condensation, (FG)^2U is ahead of truncated
  unrolling in two seeds and behind in one. It takes 300 outer steps through 50 inner ones, with 256 directions each, 39 minutes on one
  core; with 40 steps, 20 inner ones and 64 directions it was behind. T1-T2 and Neumann leave the images worse than they were.
* Equal CPU time is another matter. One image per class, `--methods truncated --steps 1500` (90 s, as 60 steps of (FG)^2U
  take): 60.3 and 59.6 % after T steps, 64.0 and 63.4 % later, for seeds 0 and 1; (FG)^2U has 59.2 and 58.7, 60.2 and 59.8.
  Full unrolling has more in 6 s. Where the tape fits into memory, as it does here, (FG)^2U is not the one to take.
""",
    "cuda": """## Reading

* The full setting, 57 outer steps, one seed: the paper's order of the methods that were run, which shared
  the GPU. (FG)^2U gains 16 points over real images, the cheap two 9, full unrolling 30.
* With 57 outer steps (FG)^2U has 7,296 directions in all, fewer than there are pixels, where the paper's takes 512 to 2,048
  in each step, and it ends below the paper's 82.4 %. Its seconds are those of 100 inner steps with 128 directions each;
  compiling took 54 s more.
* **With 216 outer steps it has 82.2 % after 100 steps and 82.4 % later, the paper's figure** (27,648 directions, one seed,
  356 s on an NVIDIA H200; `condensation_gpu_long.json` and `.png`): `python benchmarks/condensation.py --mnist DIRECTORY
  --device cuda --per-class 1 --seeds 0 --size 28 --width 128 --inner-steps 100 --inner-batch 10 --step-size 1e-2 --steps 216
  --directions 128 --columns 128 --truncation 20 --training-steps 300 --no-cosines --outer-lr 2e-2 --methods "(FG)^2U"`.
""",
}
COLORS = {"random real images": "#9a9a9a", "full unrolling": "#24292f"}
OURS, CHEAP = "#c1121f", "#1d5fa8"


def runs_of(store: Store, per_class: int, method: str) -> list[dict[str, Any]]:
    """One run per seed."""
    found = [(k.split("/"), v) for k, v in store.items()]
    return [v for (n, _, m), v in found if int(n) == per_class and m == method]


def versions() -> str:
    return f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"


def report(store: Store, command: str, methods: Sequence[str], versions: str, device: str) -> str:
    """Markdown."""
    lines = ["# Data condensation on MNIST", "", f"`{command}`, {versions}. {NOTE}", ""]
    for per_class in sorted({int(k.split("/")[0]) for k in store}):
        setting = next(v for k, v in store.items() if k.startswith(f"{per_class}/"))["setting"]
        cosines = [
            v for k, v in store.items() if k.startswith(f"{per_class}/") and k.endswith("/cosines")
        ]
        lines += [f"## {per_class} image{'s' * (per_class > 1)} per class", "", _said(setting), ""]
        lines += [
            f"| method | accuracy after {setting['inner_steps']} steps, % | later, % | by seed, later "
            f"| outer loss | {'CPU s' if device == 'cpu' else 's'} per outer step | cosine | paper, % |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            _row(per_class, m, r, cosines) for m in methods if (r := runs_of(store, per_class, m))
        ] + [""]
    return "\n".join(lines) + "\n" + READINGS[device]


def _said(s: dict[str, Any]) -> str:
    n = 10 * s["per_class"] * s["size"] ** 2
    relative = (n / s["num_directions"] - 1) ** 0.5
    return (
        f"{n:,} hyperparameters. Images {s['size']} x {s['size']}, {s['width']} channels, T = {s['inner_steps']} steps of "
        f"SGD ({s['step_size']:g}, momentum 0.9) on {min(s['inner_batch'], 10 * s['per_class'])} images each; "
        f"{s['num_steps']} outer steps of Adam ({s['outer_lr']:g}, falling linearly to 0) on {s['outer_batch']} real "
        f"images each; truncated to {s['truncation']} steps, Neumann with as many terms. (FG)^2U: "
        f"{s['num_directions']} directions a step ({s['num_directions'] * s['num_steps']:,} in all), relative error "
        f"{relative:.1f}; two phases: truncated "
        f"for {s['switch']} steps, then (FG)^2U that corrects it."
    )


def _row(
    per_class: int, method: str, runs: list[dict[str, Any]], cosines: list[dict[str, Any]]
) -> str:
    moved = bool(runs[0]["losses"])
    loss = f"{statistics.fmean(np.mean(r['losses'][-10:]) for r in runs):.3f}" if moved else "-"
    seconds = statistics.fmean(r["seconds"] / max(1, len(r["losses"])) for r in runs)
    angles = [c for of_seed in cosines for c in of_seed.get(method, [])]
    paper = PAPER.get(per_class, {}).get(method, "")
    cells = [
        method,
        _spread(runs, "early"),
        _spread(runs, "late"),
        " ".join(f"{100 * statistics.fmean(r['late']):.1f}" for r in runs),
        loss,
        f"{seconds:.2f}" if moved else "-",
        f"{statistics.fmean(angles):.2f}" if angles else "",
        str(paper),
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(runs: list[dict[str, Any]], when: str) -> str:
    """Mean and standard deviation of the seeds."""
    means = [100 * statistics.fmean(r[when]) for r in runs]
    deviation = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):.1f}{deviation}"


def figure(store: Store, methods: Sequence[str], path: Path) -> None:
    """Left: the images of seed 0, one per class. Right: accuracies after T steps, a dot per seed."""
    counts = sorted({int(k.split("/")[0]) for k in store})
    shown = [m for m in methods if any(runs_of(store, n, m) for n in counts)]
    layout = {"width_ratios": [2.6] + [1.3] * len(counts)}
    canvas, axes = plt.subplots(
        1,
        1 + len(counts),
        figsize=(12, 0.62 * len(shown) + 0.9),
        layout="constrained",
        gridspec_kw=layout,
    )
    _draw_images(axes[0], store, counts[0], shown)
    for axis, n in zip(axes[1:], counts, strict=True):
        _draw_accuracies(axis, store, n, shown)
    canvas.savefig(path, dpi=140)
    plt.close(canvas)


def _draw_images(axis: plt.Axes, store: Store, per_class: int, methods: Sequence[str]) -> None:
    size = next(iter(store.values()))["setting"]["size"]
    sheet = np.full((len(methods) * (size + 1), 10 * (size + 1)), 255.0)
    for i, method in enumerate(methods):
        for run in runs_of(store, per_class, method)[:1]:
            for j, image in enumerate(np.reshape(run["images"], (-1, size, size))[:10]):
                top, left = i * (size + 1), j * (size + 1)
                sheet[top : top + size, left : left + size] = image
    axis.imshow(sheet, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="nearest")
    axis.set_yticks([(i + 0.5) * (size + 1) - 1 for i in range(len(methods))], methods)
    axis.set_xticks([(j + 0.5) * (size + 1) - 1 for j in range(10)], range(10))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(
        f"{per_class} image{'s' * (per_class > 1)} per class, seed 0", loc="left", fontsize=10
    )


def _draw_accuracies(axis: plt.Axes, store: Store, n: int, methods: Sequence[str]) -> None:
    for i, method in enumerate(methods):
        values = [100 * statistics.fmean(r["early"]) for r in runs_of(store, n, method)]
        if not values:
            continue
        color = COLORS.get(method, OURS if method.startswith("(FG)") else CHEAP)
        mean = statistics.fmean(values)
        axis.plot(values, [i] * len(values), "o", ms=4, color=color, alpha=0.45)
        axis.plot(mean, i, "|", ms=18, mew=2.5, color=color)
        axis.annotate(
            f"{mean:.1f}", (mean, i), (0, 10), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set(ylim=(len(methods) - 0.5, -0.5), yticks=[])
    axis.margins(x=0.12)
    axis.spines[["left", "top", "right"]].set_visible(False)
    axis.set_title(f"accuracy, %: {n} per class", loc="left", fontsize=10)
