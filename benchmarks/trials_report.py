"""The table and the figure of ``trials_to_target.py``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tasks import TASKS
from tasks_mixed import DEVELOPMENT, MIXED

Results = list[dict[str, Any]]
COUNTS = (10, 30, 60)
COLORS = {
    "HypergradientSampler": "#c1121f",
    "trajectories + TPE": "#c1121f",
    "trajectories + Random": "#f4a261",
    "Random": "#9a9a9a",
    "TPE": "#1d5fa8",
    "CMA-ES": "#2a9d55",
    "GP": "#7b4fa3",
}


def report(done: Results, ours: str, samplers: list[str], mixed_samplers: list[str]) -> str:
    """Markdown."""
    others = [s for s in samplers if s != ours]
    lines = [
        "# Trials to a target",
        "",
        "Made by `python benchmarks/trials_to_target.py`. Lower is better. Best value so far (noisy",
        "tasks: the true value), sampler defaults, one seed. A number in brackets: the study had done",
        "only so many trials when its time was over (GP everywhere, CMA-ES and TPE at hundreds of",
        "variables). *Reached after*: our trials until the value is at most the best that any of the",
        "others has at its end.",
        "",
        "| task | variables | kind | start | "
        + " | ".join(f"ours, {c}" for c in COUNTS)
        + " | "
        + " | ".join(f"{s}, {_planned(done, s)}" for s in others)
        + " | reached after |",
        "|---|---|---|---|" + "---|" * (len(COUNTS) + len(others) + 1),
    ]
    for name in _names(done, "continuous"):
        runs = {d["sampler"]: d for d in done if d["task"] == name}
        task = TASKS[name]()
        best = runs[ours]["best"]
        cells = [f"**{best[min(c, len(best)) - 1]:.4g}**" for c in COUNTS]
        for s in others:
            run = runs.get(s)
            early = (
                "" if run is None or len(run["best"]) >= run["trials"] else f" ({len(run['best'])})"
            )
            cells.append("" if run is None else f"{run['best'][-1]:.4g}{early}")
        target = min(runs[s]["best"][-1] for s in others if s in runs)
        after = next((i + 1 for i, v in enumerate(best) if v <= target), None)
        start = f"{task.truth(task.start):.4g}"
        lines.append(
            f"| {name} | {task.size} | {task.kind} | {start} | "
            + " | ".join(cells)
            + f" | {after if after else 'not'} |"
        )
    for title, names in (
        ("Mixed tasks that the defaults of the race were chosen on", set(DEVELOPMENT)),
        ("Mixed tasks that were run after the defaults were fixed", set(MIXED) - set(DEVELOPMENT)),
    ):
        names = [n for n in _names(done, "mixed") if n in names]
        if names:
            lines += ["", f"## {title} ({len(names)})", "", *_mixed(done, names, mixed_samplers)]
    return "\n".join(lines) + "\n"


def _mixed(done: Results, names: list[str], samplers: list[str]) -> list[str]:
    """Medians and quartiles over seeds, and how often the first sampler ends below each other one."""
    some = [d for d in done if d["task"] in names]
    most = max(d["trials"] for d in some)
    counts = [c for c in (25, 50, 100, 200) if c < most] + [most]
    lines = [
        "Medians (quartiles) of the best value over seeds, at equal trials. *Ahead*: share of the seeds in which",
        f"{samplers[0]} is below after {' / '.join(map(str, counts))} trials, in percent (ties count half).",
        "",
        "| task | what is tuned | sampler | seeds | "
        + " | ".join(str(c) for c in counts)
        + " | ahead |",
        "|---|---|---|---|" + "---|" * (len(counts) + 1),
    ]
    for name in names:
        task = MIXED[name]()
        curves = {(d["sampler"], d["seed"]): d["best"] for d in some if d["task"] == name}
        for s in samplers:
            bests = [d["best"] for d in some if d["task"] == name and d["sampler"] == s]
            if not bests:
                continue
            cells = []
            for c in counts:
                at = [b[min(c, len(b)) - 1] for b in bests]
                low, middle, high = np.percentile(at, (25, 50, 75))
                cells.append(f"{middle:.4g} ({low:.4g} to {high:.4g})")
            pairs = [(curves[samplers[0], k], v) for (other, k), v in curves.items() if other == s]
            ahead = " / ".join(f"{100 * _ahead(pairs, c):.0f}" for c in counts)
            lines.append(
                f"| {name} | {task.kind} | {s} | {len(bests)} | "
                + " | ".join(cells)
                + f" | {'' if s == samplers[0] else ahead} |"
            )
    return lines


def _ahead(pairs: list[tuple[list[float], list[float]]], count: int) -> float:
    """Share of the pairs of best-so-far curves in which the first is below after ``count`` trials."""
    ends = [(a[min(count, len(a)) - 1], b[min(count, len(b)) - 1]) for a, b in pairs]
    return float(np.mean([0.5 if a == b else float(a < b) for a, b in ends]))


def _planned(done: Results, sampler: str) -> int:
    return max((d["trials"] for d in done if d["sampler"] == sampler), default=0)


def _names(done: Results, kind: str) -> list[str]:
    order = [*TASKS, *MIXED]
    return sorted({d["task"] for d in done if d["kind"] == kind}, key=order.index)


def figure(done: Results, ours: str, path: Path) -> None:
    """One panel per task: the gap to the lowest known value over trials."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    record = Path(__file__).parent / "results" / "known_best.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    names = _names(done, "continuous") + _names(done, "mixed")
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, name in zip(axes.flat, names, strict=False):
        some = [d for d in done if d["task"] == name]
        lowest = min([known.get(name, math.inf), *(d["best"][-1] for d in some)])
        for s in [s for s in COLORS if any(d["sampler"] == s for d in some)]:
            bests = [d["best"] for d in some if d["sampler"] == s]
            length = min(len(b) for b in bests)
            middle = np.median([b[:length] for b in bests], 0)
            if name in MIXED:
                heights = middle
            else:
                heights = np.maximum((middle - lowest) / (middle[0] - lowest), 1e-4)
            (line,) = axis.plot(
                np.arange(1, length + 1),
                heights,
                color=COLORS[s],
                linewidth=2.0 if s == ours or s.startswith("trajectories") else 1.3,
            )
            handles.setdefault(s, line)
        axis.set_title(f"{name}" + (" (loss, median)" if name in MIXED else ""), fontsize=9)
        heights_seen = [y for line in axis.get_lines() for y in line.get_ydata()]
        axis.set_yscale("log" if min(heights_seen) > 0 else "linear")
        axis.set_xscale("log")
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25, which="major")
        if name not in MIXED:
            axis.set_ylim(7e-5, 1.5)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    fig.supxlabel("trials", fontsize=9)
    fig.supylabel("(best so far - lowest known) / (start - lowest known)", fontsize=9)
    fig.legend(
        handles.values(), handles.keys(), loc="upper center", ncol=len(handles), fontsize=9,
        frameon=False, bbox_to_anchor=(0.5, 1.0),
    )  # fmt: skip
    fig.tight_layout(rect=(0.01, 0.0, 1.0, 1.0 - 0.35 / (2.6 * rows)))
    fig.savefig(path, dpi=110)
    plt.close(fig)
