"""The error that users' other choices reach on task (b) of ``ihvp.py``, and what that costs them, in one run.

An MLP 784-512-512-10 (tanh) near convergence on MNIST images, one decay per weight, all of them decay plus damping of that
task: the same linear system, and the hypergradient is its solution times decays and weights. Every peer gets as many
steps as CG needs to an error of 1e-2 (Neumann the same number, which is not enough), the row with
the preconditioner as many as it needs. What is measured runs in float32, as training does; the error is against the
hypergradient from a solve to a residual of 1e-9 in float64. Cost is CPU time, as a whole and divided by that of one gradient
evaluation.

hypertorch is not on PyPI: its rows need a checkout of github.com/prolearner/hypertorch (``--hypertorch DIR``).

    python benchmarks/ihvp_peers.py --data DIR --peers benchmarks/.peers-venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ihvp
import numpy as np
import torch

import optuna_hypergrad as ohg
from optuna_hypergrad.curvature import ritz_values
from optuna_hypergrad.operators import DampedOperator

HERE = Path(__file__).resolve().parent
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TOP_PAD_": "67108864",
}
NAMES = {"0": "0", "2": "1", "4": "2"}
"""Layers of ``ihvp.py``'s model, and of the peers'."""


@dataclass(frozen=True)
class Row:
    label: str
    script: str
    solver: str = "cg"
    own: bool = True
    arguments: tuple[str, ...] = ()


def rows(hypertorch: Path | None) -> list[Row]:
    kept, anew = ("--way", "kept"), ("--way", "jvp")
    found = [
        Row("ours, CG + Gauss-Newton(500), targets", "peer_gauss_newton.py"),
        Row("ours, CG", "peer_ours.py"),
        Row("torch, CG, graph kept", "peer_torch.py", arguments=kept),
        Row("torch, CG, jvp each time", "peer_torch.py", arguments=anew),
        Row("TorchOpt 0.7.3, CG", "peer_torchopt.py", own=False),
        Row("Betty 0.1.1, CG", "peer_betty.py", own=False),
        Row("ours, Neumann", "peer_ours.py", "neumann"),
        Row("torch, Neumann, graph kept", "peer_torch.py", "neumann", arguments=kept),
        Row("TorchOpt 0.7.3, Neumann", "peer_torchopt.py", "neumann", own=False),
        Row("Betty 0.1.1, Neumann", "peer_betty.py", "neumann", own=False),
    ]
    if hypertorch is not None:
        found.append(Row("hypertorch, CG", "peer_hypertorch.py", own=False))
        found.append(Row("hypertorch, Neumann", "peer_hypertorch.py", "neumann", own=False))
    return found


def prepare(options: argparse.Namespace, path: Path) -> tuple[int, int]:
    """Write the task; returns the steps that CG needs to an error of 1e-2, without and with the preconditioner."""
    task = ihvp.networks("b", options)
    task.inner_params = {k: v.float().double() for k, v in task.inner_params.items()}
    operator = task.operator()
    damped = DampedOperator(operator, task.damping)
    b = task.right_hand_side(operator)
    solved = ohg.linear_solve(ohg.CG(6000, 1e-9, True), damped, b).x
    narrow = ihvp.Task(
        task.model, *(_narrow(d) for d in (task.train, task.valid)), task.decay, task.damping
    )
    narrow.model.float()
    narrow.inner_params = {k: v.detach().float() for k, v in task.inner_params.items()}
    single = narrow.operator()
    weights = torch.cat([v.flatten() for v in narrow.inner_params.values()])
    steps = []
    for preconditioner in (None, narrow.gauss_newton(500, True)):
        right = narrow.right_hand_side(single)
        single.follow(right, solved.float(), task.damping, weights)
        solver = ohg.CG(150, 1e-5, preconditioner=preconditioner)
        ohg.linear_solve(solver, DampedOperator(single, task.damping), right)
        errors = single.errors
        single.stop()
        steps.append(next(k for k, e in enumerate(errors) if e <= 0.97 * ihvp.TARGET))
    decay = task.decay + task.damping
    names = {k: f"{NAMES[k.split('.')[0]]}.{k.split('.')[1]}" for k in task.inner_params}
    x = dict(
        zip(
            names.values(),
            torch.split(solved, [v.numel() for v in task.inner_params.values()]),
            strict=True,
        )
    )
    w = {names[k]: v.detach() for k, v in task.inner_params.items()}
    exact = {k: -decay * v * x[k].view(v.shape) for k, v in w.items()}
    top = float(ritz_values(damped, b, 40)[0][-1])
    np.savez(
        path,
        products=steps[0],
        alpha=1 / top,
        x_train=task.train[0].float(),
        y_train=task.train[1],
        x_valid=task.valid[0].float(),
        y_valid=task.valid[1],
        **{f"w/{k}": v.float() for k, v in w.items()},
        **{f"lam/{k}": torch.full_like(v, math.log(decay)).float() for k, v in w.items()},
        **{f"cg/{k}": v for k, v in exact.items()},
        **{f"neumann/{k}": v for k, v in exact.items()},
    )
    return steps[0], steps[1]


def _narrow(data: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return data[0].float(), data[1]


def with_products(path: Path, count: int) -> Path:
    """The same task with another number of steps."""
    other = path.parent / "fewer" / path.name
    other.parent.mkdir(exist_ok=True)
    with np.load(path) as stored:
        np.savez(other, **({k: stored[k] for k in stored.files} | {"products": count}))
    return other


def measured(row: Row, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    paths = [HERE.parent, *([options.hypertorch] if options.hypertorch else [])]
    environment = os.environ | ALLOCATOR | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [
        sys.executable if row.own else str(options.peers), str(HERE / "peers" / row.script), str(path), row.solver,
        "--threads", "1", "--repetitions", str(options.repetitions), *row.arguments,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row.label}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(found: dict[str, dict[str, Any]], steps: dict[str, int], setting: str) -> str:
    lines = [
        "# Beside other libraries: an error of 1e-2 of the hypergradient near convergence",
        "",
        f"`python benchmarks/ihvp_peers.py --data DIR --peers PYTHON`. {setting}, float32, {platform.machine()}, torch "
        f"{torch.__version__}, 1 thread. Evaluations: CPU time of one hypergradient, everything included, divided by that of "
        "one gradient evaluation.",
        "",
        "| | steps | error | evaluations | CPU ms | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in found.items():
        lines.append(
            f"| {label} | {steps[label]} | {row['error']:.1e} | {row['evaluations']:.0f} | {row['hypergradient_ms']:.0f} | "
            f"{row['megabytes']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peers", type=Path, default=HERE / ".peers-venv" / "bin" / "python")
    parser.add_argument("--hypertorch", type=Path, help="a checkout")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--damping", type=float, default=1e-4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "ihvp_peers.md")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, int] = {}
    setting = f"MLP 784-512-512-10 (tanh), 669,706 decays, {options.samples} MNIST images"
    text = options.output.read_text() if options.output.exists() else ""
    reading = text.partition("## Reading")[2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sure.npz"
        plain, fewer = prepare(options, path)
        short = with_products(path, fewer)
        for row in rows(options.hypertorch):
            quick = row.script == "peer_gauss_newton.py"
            steps[row.label] = fewer if quick else plain
            found[row.label] = measured(row, short if quick else path, options)
            print(row.label, steps[row.label], found[row.label], flush=True)
            text = table(found, steps, setting)
            options.output.write_text(text + (f"\n## Reading{reading}" if reading else ""))
    print(text)


if __name__ == "__main__":
    main()
