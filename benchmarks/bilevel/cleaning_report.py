"""The table and the figure of ``cleaning.py``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

Run = dict[str, Any]
_SHARES = (0.25, 0.5, 1.0)


def write(runs: dict[str, Run], folder: Path) -> None:
    by_task: dict[str, dict[str, list[Run]]] = {}
    for key, run in runs.items():
        task, name, _ = key.split(" | ")
        by_task.setdefault(task, {}).setdefault(name, []).append(run)
    lines = [
        "# Hyper-data cleaning",
        "",
        "`python benchmarks/bilevel/cleaning.py --data DIR`: test error in per cent after a quarter, half and all of the CPU "
        "time (one thread; 12 s for softmax, 40 s for the MLP), median over seeds, range in brackets; of the running `w`.",
        "",
    ]
    for task, found in by_task.items():
        lines += [
            f"## {task}",
            "",
            "| method | seeds | outer steps | samples | error, 1/4 | error, 1/2 | error, end | best | AUROC |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        rows = [(_last(rs), _row(name, rs)) for name, rs in found.items()]
        lines += [row for _, row in sorted(rows, key=lambda r: r[0])]
        lines.append("")
    (folder / "cleaning.md").write_text("\n".join(lines))
    _draw(by_task, folder / "cleaning.png")


def _row(name: str, runs: list[Run]) -> str:
    whole = [r["moments"] for r in runs if "moments" in r]
    if not whole:
        return f"| {name} | - | - | - | - | - | failed: {runs[0]['error']} | - | - |"
    ends = [m[-1] for m in whole]
    errors = [_median([100 * m[_at(m, share)][3] for m in whole]) for share in _SHARES]
    finals = [100 * m[3] for m in ends]
    best = _median([100 * min(x[3] for x in m) for m in whole])
    steps, samples = (_median([m[i] for m in ends]) for i in (1, 2))
    aurocs = [m[4] for m in ends if m[4] is not None]
    auroc = f"{_median(aurocs):.3f}" if aurocs else "-"
    return (
        f"| {name} | {len(whole)} | {steps:,.0f} | {samples:,.0f} | {errors[0]:.2f} | {errors[1]:.2f} | "
        f"**{errors[2]:.2f}** ({min(finals):.2f}-{max(finals):.2f}) | {best:.2f} | {auroc} |"
    )


def _last(runs: list[Run]) -> float:
    found = [r["moments"][-1][3] for r in runs if "moments" in r]
    return _median(found) if found else 1.0


def _at(moments: list[list[float]], share: float) -> int:
    end = moments[-1][0]
    return max(i for i, m in enumerate(moments) if m[0] <= share * end or i == 0)


def _median(values: list[float]) -> float:
    return float(statistics.median(values))


def _draw(by_task: dict[str, dict[str, list[Run]]], path: Path) -> None:
    figure, axes = plt.subplots(
        2, len(by_task), figsize=(4.6 * len(by_task), 7.5), squeeze=False, layout="constrained"
    )
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    names = sorted({name for found in by_task.values() for name in found})
    for column, (task, found) in enumerate(by_task.items()):
        for row, (index, label) in enumerate(((0, "CPU seconds"), (2, "samples seen"))):
            axis = axes[row][column]
            for name in names:
                runs = [r["moments"] for r in found.get(name, []) if "moments" in r]
                if not runs:
                    continue
                color = colors[names.index(name) % 20]
                errors = 100 * np.median([[m[3] for m in r][: _shortest(runs)] for r in runs], 0)
                if len(errors) == 1:
                    axis.axhline(errors[0], color=color, linestyle=":", label=name)
                    continue
                at = np.median([[m[index] for m in r][: _shortest(runs)] for r in runs], 0)
                dashed = (
                    "--" if name in ("TPE", "equal weights", "oracle", "validation alone") else "-"
                )
                axis.plot(at, errors, dashed, color=color, label=name, linewidth=1.4)
            axis.set(xlabel=label, title=task if row == 0 else "")
            if column == 0:
                axis.set_ylabel("test error, %")
            low = min(100 * m[3] for rs in found.values() for r in rs for m in r.get("moments", []))
            axis.set_ylim(0.95 * low, min(100.0, 2.2 * low))
            axis.xaxis.set_major_locator(MaxNLocator(4))
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= {t: h for h, t in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=110)


def _shortest(runs: list[list[Any]]) -> int:
    return min(map(len, runs))
