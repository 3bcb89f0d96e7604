"""Peak memory of a step of MA-SOBA and of BROS, beside that of one gradient, in units of the weights' own memory.

A tanh network of ``--depth`` square layers of ``--width`` weights a side (five of 2,000: 20 million weights, 80 MB), batches
of 64, and as hyperparameters a weight for each sample, or a decay for each layer. Each figure comes from a process of its own: the peak of what is resident (``VmHWM``) over
three steps of ``minimize_bilevel``, above what is resident before the first one, when data and weights (once, ``w_0``) are
there. So the weights that ``minimize_bilevel`` copies to begin with count, and ``w`` after a step beside that before it.
Blocks of memory are given back as soon as they are freed (``MALLOC_MMAP_THRESHOLD_=65536``), so that the peak is that of
what is in use and not of what the allocator keeps.

    python benchmarks/single_loop_memory.py [--width 2000] [--depth 5] [--output benchmarks/results/single_loop_memory.md]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import optuna_hypergrad as ohg

SIZES = (0.05, 0.15, 0.25)
METHODS: dict[str, Callable[[], ohg.hypergradients.AbstractHypergradientEstimator] | None] = {
    "one gradient of the inner objective": None,
    "SOBA": lambda: ohg.SOBA(),
    "MASOBA": lambda: ohg.MASOBA(),
    **{
        f"BROS, {correction}, rank {rank:.0%} of the rows": (
            lambda correction=correction, rank=rank: ohg.BROS(rank=rank, correction=correction)
        )
        for correction in ("one_sided", "two_sketch")
        for rank in SIZES
    },
}


def resident(what: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def prepared(name: str, kind: str, width: int, depth: int) -> Callable[[], object]:
    """The steps, with data and weights in place."""
    generator = torch.Generator().manual_seed(0)
    w = {
        f"w{i}": torch.randn(width, width, generator=generator).div_(width**0.5)
        for i in range(depth)
    }
    x, y = (torch.randn(64, width, generator=generator) for _ in range(2))

    def losses(w: ohg.Params) -> torch.Tensor:
        at = x
        for v in w.values():
            at = torch.tanh(at @ v)
        return (at - y).square().mean(1)

    def outer(w: ohg.Params, lam: ohg.Params, _: object) -> torch.Tensor:
        return losses(w).mean()

    def weighted(w: ohg.Params, lam: ohg.Params, _: object) -> torch.Tensor:
        return (lam["weight"] * losses(w)).mean()

    def decayed(w: ohg.Params, lam: ohg.Params, batch: object) -> torch.Tensor:
        decays = [
            torch.linalg.vector_norm(v).square() * d
            for v, d in zip(w.values(), lam["decay"], strict=True)
        ]
        return outer(w, lam, batch) + torch.stack(decays).sum()

    if kind == "weights":
        inner, lam = weighted, {"weight": torch.full((64,), 0.5)}
    else:
        inner, lam = decayed, {"decay": torch.full((depth,), 1e-4)}
    make = METHODS[name]
    if make is None:
        leaves = {k: v.requires_grad_() for k, v in w.items()}
        return lambda: torch.autograd.grad(inner(leaves, lam, None), list(leaves.values()))
    return lambda: ohg.minimize_bilevel(
        ohg.BilevelProblem(inner, outer),
        w,
        lam,
        inner_solver=ohg.GradientDescent(0.01, max_steps=1),
        estimator=make(),
        num_steps=3,
        bounds={k: ohg.Domain(1e-8, 1.0, log=True) for k in lam},
    )


def measured(name: str, kind: str, width: int, depth: int) -> tuple[float, float]:
    """Peak above the start, and the weights, in MB."""
    prepared(name, kind, 40, depth)()  # what is loaded once does not count
    steps = prepared(name, kind, width, depth)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    steps()
    return resident("VmHWM") - before, depth * width**2 * 4 / 2**20


def table(kind: str, width: int, depth: int) -> list[str]:
    rows, peaks = [], {}
    for name in METHODS:
        command = [sys.executable, __file__, "--only", name, kind]
        command += ["--width", str(width), "--depth", str(depth)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        said = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        peaks[name], weights = (float(v) for v in said.stdout.split())
        against = f"{peaks[name] / peaks['MASOBA']:.2f}" if "MASOBA" in peaks else "-"
        rows.append(f"| {name} | {peaks[name]:,.0f} | {peaks[name] / weights:.1f} | {against} |")
        print(rows[-1], flush=True)
    return ["", "| | MB | in weights' memory | beside MA-SOBA |", "|---|---|---|---|", *rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--only", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    width, depth = options.width, options.depth
    if options.only:
        print(*measured(*options.only, width, depth))
        return
    lines = [
        "# Peak memory of one loop, in full and in subspaces",
        "",
        f"`python benchmarks/single_loop_memory.py --width {width} --depth {depth}`: {depth * width**2:,} weights in {depth} "
        f"layers, batch 64, float32, 1 thread; peak above the start, of which data and `w_0` are part; torch {torch.__version__}.",
    ]
    for kind, title in (
        ("weights", "A weight for each sample"),
        ("decays", "A decay for each layer"),
    ):
        lines += ["", f"## {title}", *table(kind, width, depth)]
    if options.output is not None:
        options.output.write_text("\n".join(lines).replace("\n\n\n", "\n\n"))


if __name__ == "__main__":
    main()
