"""The table and the figure of ``subspaces.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Run = dict[str, Any]
FULL, SKETCHED = "MA-SOBA", "BROS"
_COLORS = {FULL: "#0072b2", SKETCHED: "#d55e00"}
_LESS, _WITHIN = 44.9, 1.01


def pairs(runs: dict[str, Run]) -> dict[str, dict[str, Run]]:
    """By task, where both methods have been run."""
    by_task: dict[str, dict[str, Run]] = {}
    for key, run in runs.items():
        task, method = key.split(" | ")
        by_task.setdefault(task, {})[method] = run
    return {k: v for k, v in by_task.items() if {FULL, SKETCHED} <= v.keys()}


def verdict(pair: dict[str, Run]) -> str:
    """Per cent of memory that the subspaces save, per cent that the loss is higher by, and what is missed of the aim."""
    full, sketched = pair[FULL], pair[SKETCHED]
    less = 100 * (1 - sketched["MB"] / full["MB"])
    ratio = sketched["validation"] / full["validation"]
    missed = [
        words for words, met in (("memory", less >= _LESS), ("loss", ratio <= _WITHIN)) if not met
    ]
    said = f"missed: {', '.join(missed)}" if missed else "met"
    return f"{less:.1f} % less | {100 * (ratio - 1):+.1f} % | {said}"


def write(
    runs: dict[str, Run], labels: Mapping[str, str], heading: list[str], stored: Path
) -> None:
    """Beside ``stored``: the same name with ``.md`` and ``.png``."""
    found = pairs(runs)
    if not found:
        return
    lines = [
        *heading,
        "| task | method | steps | MB | in weights' memory | s a step | validation loss | test | weights | memory, loss beside MA-SOBA, aim |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task, pair in found.items():
        for method in (FULL, SKETCHED):
            run = pair[method]
            size = run["weights"] * 4 / 2**20
            told = ", ".join(f"{k} {v:.3f}" for k, v in run["told"].items()) or "-"
            beside = "-" if method == FULL else verdict(pair).replace(" | ", "; ")
            lines.append(
                f"| {labels[task]} | {method} | {len(run['curve'])} | {run['MB']:,.0f} | {run['MB'] / size:.2f} | "
                f"{run['seconds']:.2f} | {run['validation']:.4f} | {run['test']:.4f} | {told} | {beside} |"
            )
    sizes = ", ".join(f"{labels[k]} {v[FULL]['weights']:,}" for k, v in found.items())
    lines += ["", f"Weights of the lower level: {sizes}.", ""]
    stored.with_suffix(".md").write_text("\n".join(lines))
    _draw(found, labels, stored.with_suffix(".png"))


def _draw(found: dict[str, dict[str, Run]], labels: Mapping[str, str], path: Path) -> None:
    figure, axes = plt.subplots(
        1, len(found), figsize=(3.1 * len(found), 3.0), layout="constrained", squeeze=False
    )
    for axis, (task, pair) in zip(axes[0], found.items(), strict=True):
        for method in (FULL, SKETCHED):
            run = pair[method]
            curve = np.array(run["curve"])
            window = max(1, len(curve) // 10)
            smooth = np.convolve(curve, np.ones(window) / window, "valid")
            axis.plot(
                np.arange(len(smooth)) + window / 2,
                smooth,
                color=_COLORS[method],
                linestyle="-" if method == FULL else "--",
                label=f"{method}, {run['MB']:,.0f} MB",
            )
        axis.set_title(labels[task], fontsize=10)
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("loss of validation batches")
    figure.savefig(path, dpi=150)
    plt.close(figure)
