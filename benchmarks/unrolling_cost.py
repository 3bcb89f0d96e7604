"""What a hypergradient through the inner steps costs, in gradient evaluations a step and in memory.

Two tasks with one decay per weight, from a random initialization, through 100 inner steps on one batch:

* mlp: 784-512-512-10, 669,706 weights, batch of 512;
* convnet: two 3x3 convolutions and a linear layer, 20,490 weights, batch of 128 at 28x28.

The inner solver is gradient descent (momentum descent for ``Reversible``). Cost is CPU time (all threads of
the process) divided by that of one gradient evaluation, the inner steps themselves included, per inner step; that
of ``ForwardGradient`` also per direction. Memory is the peak above what was resident before the call. The
error is against plain autograd through all steps in float64, computed in float32 and in float64.

Then the peak memory of ours at 10, 100 and 1,000 steps of the MLP, beside plain torch's.

Peers live in ``benchmarks/.peers-venv``, as those of ``product_cost.py``, with whose allocator settings all are timed.

    python benchmarks/unrolling_cost.py --data DIR   # MNIST's gzip files; digits enlarged without
    python benchmarks/unrolling_cost.py --tasks mlp --peers ours torch --repetitions 3

It takes hours of CPU time; stopped, it goes on from the .json beside the table, which is removed to begin anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from product_cost import PEERS, RESULTS, Environments, Peer, measure
from tqdm import tqdm

STEPS = 100
DIRECTIONS = 8
TASKS = {
    "mlp": "MLP 784-512-512-10, 669,706 decays, batch 512",
    "convnet": "small ConvNet, 20,490 decays, batch 128",
}
LENGTHS = (10, 100, 1000)


@dataclass(frozen=True)
class Row:
    """A peer, and what it is held to: gradient evaluations a step (and direction), and megabytes."""

    peer: Peer
    solver: str = "descent"
    target: float | None = None
    megabytes: float | None = None
    directions: int = 1


def ours(label: str, way: str) -> Peer:
    return Peer(f"ours, {label}", "unroll_ours.py", arguments=("--way", way))


ROWS = [
    Row(ours("Unroll, whole tape", "whole tape"), target=2.4),
    Row(ours("Unroll, default", "default"), target=3.2, megabytes=135.0),
    Row(ours("Unroll, 100 MB", "100 MB")),
    Row(ours("Unroll, compiled, whole tape", "compiled"), target=2.4),
    Row(ours("Unroll, compiled, 300 MB", "compiled, 300 MB")),
    Row(ours("Unroll, compiled, 100 MB", "compiled, 100 MB"), target=3.2, megabytes=135.0),
    Row(ours("Unroll, tree", "tree")),
    Row(
        ours(f"ForwardGradient, {DIRECTIONS} directions", "directions"),
        target=2.5,
        directions=DIRECTIONS,
    ),
    Row(
        ours(f"ForwardGradient, compiled, {DIRECTIONS} directions", "directions, compiled"),
        target=2.5,
        directions=DIRECTIONS,
    ),
    Row(ours("Reversible", "reversible"), "momentum", target=4.5),
    Row(Peer("torch, tape", "unroll_torch.py", arguments=("--way", "tape"))),
    Row(Peer("torch, checkpoints", "unroll_torch.py", arguments=("--way", "checkpoint"))),
    Row(Peer("TorchOpt 0.7.3", "unroll_torchopt.py", "torch", install=("torchopt==0.7.3",))),
    Row(Peer("higher 0.2.1", "unroll_higher.py", "torch", install=("--no-deps", "higher==0.2.1"))),
]
GROWTH = [
    (ours("ForwardGradient", "directions"), "descent", LENGTHS),
    (ours("ForwardMode, 2 hyperparameters", "forward"), "momentum", LENGTHS),
    (ours("Reversible", "reversible"), "momentum", LENGTHS),
    (ours("Unroll, tree", "tree"), "descent", LENGTHS),
    (ours("Unroll, default", "default"), "descent", LENGTHS),
    (Peer("torch, tape", "unroll_torch.py", arguments=("--way", "tape")), "descent", LENGTHS[:2]),
]


def run(options: argparse.Namespace, stored: Path) -> dict[str, Any]:
    """All figures; they are in ``stored`` (.json) as far as the run came, and are not measured again."""
    found: dict[str, Any] = {"rows": {}, "missing": {}, "growth": {}}
    if stored.exists():
        found |= json.loads(stored.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        environments = Environments(Path(scratch), {})
        usable = []
        for row in ROWS:
            if options.peers and row.peer.family not in options.peers:
                continue
            reason = environments.prepare(row.peer)
            if reason is None:
                usable.append(row)
            else:
                found["missing"][row.peer.label] = reason
        growth = [] if options.no_growth else GROWTH
        total = len(options.tasks) * len(usable) + sum(len(lengths) for *_, lengths in growth)
        with tqdm(total=total) as bar:
            for name in options.tasks:
                task = Path(scratch) / f"{name}.npz"
                data = ["--data", str(options.data)] if options.data else []
                command = [sys.executable, str(PEERS / "prepare.py"), name, str(task)]
                subprocess.run([*command, "--unroll", str(STEPS), *data], check=True)
                for row in usable:
                    if f"{name}/{row.peer.label}" in found["rows"]:
                        bar.update()
                        continue
                    place = environments, row.peer, task, row.solver, options.threads
                    figures = measure(*place, "--repetitions", str(options.repetitions))
                    if "failure" not in figures:
                        figures["megabytes"] = measure(*place, "--memory").get("megabytes")
                        figures["error64"] = measure(*place, "--float64").get("error")
                    found["rows"][f"{name}/{row.peer.label}"] = figures
                    stored.write_text(json.dumps(found, indent=1))
                    bar.update()
                if name == "mlp":
                    for peer, solver, lengths in growth:
                        for length in lengths:
                            if f"{peer.label}/{length}" in found["growth"]:
                                bar.update()
                                continue
                            place = environments, peer, task, solver, options.threads
                            figures = measure(*place, "--memory", "--steps", str(length))
                            found["growth"][f"{peer.label}/{length}"] = figures.get("megabytes")
                            stored.write_text(json.dumps(found, indent=1))
                            bar.update()
    return found


def report(found: dict[str, Any], options: argparse.Namespace) -> str:
    lines = [
        "# The cost of a hypergradient through the inner steps",
        "",
        f"`python benchmarks/unrolling_cost.py`: CPU time divided by that of one gradient evaluation, per inner step "
        f"(and direction), {STEPS} steps; peak memory above the start. {options.threads} thread(s), freed memory kept by "
        f"malloc for timings, median of {options.repetitions} interleaved repetitions, quartiles in brackets; "
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}. Load average at the end: "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
        "",
    ]
    for name in options.tasks:
        lines += [
            f"## {TASKS[name]}",
            "",
            "| | gradient evaluations a step | target | MB | error in float32 | in float64 |",
            "|---|---|---|---|---|---|",
        ]
        for row in ROWS:
            label = row.peer.label
            figures = found["rows"].get(f"{name}/{label}")
            if figures is None:
                why = found["missing"].get(label)
                lines += [f"| {label} | not run: {why} | | | | |"] if why else []
            elif "failure" in figures:
                lines.append(f"| {label} | fails: `{figures['failure']}` | | | | |")
            else:
                lines.append(_line(row, figures))
        lines.append("")
    if found["growth"]:
        head = " | ".join(f"T = {n:,}" for n in LENGTHS)
        lines += [
            f"## Peak memory by the number of inner steps, {TASKS['mlp']}, MB",
            "",
            f"| | {head} |",
            "|---|---|---|---|",
        ]
        for peer, _, _ in GROWTH:
            cells = [found["growth"].get(f"{peer.label}/{n}") for n in LENGTHS]
            shown = ("-" if c is None else f"{c:,.0f}" for c in cells)
            lines.append(f"| {peer.label} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def _line(row: Row, figures: dict[str, Any]) -> str:
    share = STEPS * row.directions
    value, (low, high) = figures["evaluations"] / share, figures["evaluations_quartiles"]
    targets = []
    if row.target is not None:
        targets.append(f"{row.target} {'met' if value <= row.target else '**missed**'}")
    if row.megabytes is not None:
        within = (figures.get("megabytes") or 0.0) <= row.megabytes
        targets.append(f"{row.megabytes:.0f} MB {'met' if within else '**missed**'}")
    errors = (figures.get(k) for k in ("error", "error64"))
    cells = [
        row.peer.label,
        f"**{value:.2f}** ({low / share:.2f}-{high / share:.2f})",
        ", ".join(targets),
        f"{figures['megabytes']:,.0f}" if figures.get("megabytes") is not None else "-",
        *("random" if row.directions > 1 else "-" if e is None else f"{e:.0e}" for e in errors),
    ]
    return f"| {' | '.join(cells)} |"


def draw(found: dict[str, Any], options: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(options.tasks), figsize=(5.2 * len(options.tasks), 3.8), squeeze=False
    )
    for axis, name in zip(axes[0], options.tasks, strict=True):
        placed: list[tuple[float, float]] = []
        for row in ROWS:
            figures = found["rows"].get(f"{name}/{row.peer.label}", {})
            if not figures.get("megabytes"):
                continue
            at = figures["evaluations"] / (STEPS * row.directions), figures["megabytes"]
            mine = row.peer.label.startswith("ours")
            axis.scatter(*at, color="tab:blue" if mine else "tab:gray", zorder=2)
            label = row.peer.label.removeprefix("ours, ").replace(f", {DIRECTIONS} directions", "")
            label = label.replace("ForwardGradient", "(FG)^2U")
            crowd = sum(abs(x - at[0]) < 0.9 and 0.85 < y / at[1] < 1.18 for x, y in placed)
            placed.append(at)
            axis.annotate(label, at, (5, 4 - 9 * crowd), textcoords="offset points", fontsize=7)
        axis.set_yscale("log")
        axis.set_xlim(0, 6.5)
        axis.set_title(TASKS[name], fontsize=9)
        axis.set_xlabel("gradient evaluations a step (and direction)", fontsize=8)
        axis.grid(alpha=0.3, zorder=0)
    axes[0][0].set_ylabel("peak memory, MB", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--peers", nargs="+", help="first words of labels; all by default")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "unrolling_cost.md")
    options = parser.parse_args()
    found = run(options, options.output.with_suffix(".json"))
    options.output.write_text(report(found, options))
    draw(found, options, options.output.with_suffix(".png"))
    print(options.output.read_text())


if __name__ == "__main__":
    main()
