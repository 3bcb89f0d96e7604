"""What a hypergradient through the inner steps costs on a GPU, in gradient evaluations and in memory.

Multilayer perceptrons with one decay per weight: that of ``unrolling_cost.py`` (784-512-512-10, batch 512), too small to
fill a GPU, and a wide one (784-4096-4096-10, batch 1024, 20 million decays). Cost is the time that passes
divided by that of one gradient of the inner objective, per inner step (and direction), medians of interleaved
repetitions; memory is the peak of torch's allocator above what was there before, by the number of inner steps.
Inputs are random: neither depends on them.

    python benchmarks/unrolling_gpu.py [--repetitions 5] [--device cuda]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from torch_task import objectives, unrolled

RESULTS = Path(__file__).parent / "results"
TASKS = {"mlp": (512, 512), "wide": (4096, 1024)}
"""By name, the width of hidden layers, and samples in a batch."""
LENGTHS, STEPS, DIRECTIONS = (10, 100, 1000), 100, 8
MOMENTUM = "momentum"
ESTIMATORS: dict[str, tuple[AbstractHypergradientEstimator, int]] = {
    "Unroll, whole tape": (ohg.Unroll(recompute="never"), 1),
    "Unroll, compiled, whole tape": (ohg.Unroll(recompute="never", compile=True), 1),
    "Unroll, default": (ohg.Unroll(), 1),
    "Unroll, tree": (ohg.Unroll(recompute="tree"), 1),
    "ForwardGradient, 8 directions": (
        ohg.ForwardGradient(DIRECTIONS, width=DIRECTIONS, memory_budget=1e11),
        DIRECTIONS,
    ),
    "ForwardMode, 2 hyperparameters": (ohg.ForwardMode(), 1),
    "Reversible": (ohg.Reversible(), 1),
}
TORCH = "torch, tape"
Ways = dict[str, Callable[[int], object]]


def ways(task: str, device: str) -> tuple[Callable[[], object], Ways]:
    """One gradient evaluation, and the hypergradient through a number of steps, by method."""
    width, batch = TASKS[task]
    rng = torch.Generator().manual_seed(0)
    sizes = [(784, width), (width, width), (width, 10)]
    w, lam = {}, {}
    for i, (a, b) in enumerate(sizes):
        w[f"{i}.weight"] = (torch.randn(b, a, generator=rng) / a**0.5).to(device)
        w[f"{i}.bias"] = torch.zeros(b, device=device)
    lam = {k: torch.full_like(v, -6.0) for k, v in w.items()}
    data = [
        (torch.rand(batch, 784, generator=rng), torch.randint(10, (batch,), generator=rng))
        for _ in range(2)
    ]
    train, valid = ((x.to(device), y.to(device)) for x, y in data)
    inner, outer = objectives("mlp")
    problem = ohg.BilevelProblem(inner, outer, lambda step: train, lambda step: valid)
    few = {"lr": torch.tensor(0.05, device=device), MOMENTUM: torch.tensor(0.9, device=device)}
    of_few = ohg.BilevelProblem(
        lambda at, _, rows: inner(at, lam, rows),
        lambda at, _, rows: outer(at, lam, rows),
        lambda step: train,
        lambda step: valid,
    )

    def gradient() -> object:
        at = {k: v.detach().requires_grad_(True) for k, v in w.items()}
        return torch.autograd.grad(inner(at, lam, train), tuple(at.values()))

    def ours(estimator: AbstractHypergradientEstimator) -> Callable[[int], object]:
        def run(num_steps: int) -> object:
            where, steps = (problem, w, lam), ohg.GradientDescent(0.05, max_steps=num_steps)
            if isinstance(estimator, ohg.ForwardMode):
                where = of_few, w, few
                steps = ohg.HeavyBall("lr", momentum=MOMENTUM, max_steps=num_steps)
            elif isinstance(estimator, ohg.Reversible):
                steps = ohg.HeavyBall(0.05, momentum=0.9, max_steps=num_steps)
            return ohg.hypergradient(*where, estimator=estimator, inner_solver=steps)

        return run

    def tape(num_steps: int) -> object:
        at = {k: v.detach().requires_grad_(True) for k, v in lam.items()}
        end = unrolled(inner, w, at, train, num_steps, 0.05)
        return torch.autograd.grad(outer(end, at, valid), tuple(at.values()))

    return gradient, {TORCH: tape} | {k: ours(e) for k, (e, _) in ESTIMATORS.items()}


def seconds(call: Callable[[], object], times: int = 1) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / times


def megabytes(call: Callable[[], object]) -> float | None:
    """The peak above what there was; ``None`` if it does not fit."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        call()
    except torch.OutOfMemoryError:
        return None
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def costs(task: str, device: str, repetitions: int) -> list[str]:
    gradient, methods = ways(task, device)
    found: dict[str, list[float]] = {k: [] for k in methods}
    memory = {}
    for name, run in methods.items():
        run(STEPS)  # compiles, and warms up
        memory[name] = megabytes(lambda run=run: run(STEPS))
    seconds(gradient, 20)
    for _ in tqdm(range(repetitions), task, leave=False):
        for name, run in methods.items():
            unit = seconds(gradient, 50)
            share = STEPS * ESTIMATORS.get(name, (None, 1))[1]
            found[name].append(seconds(lambda run=run: run(STEPS)) / unit / share)
    width, batch = TASKS[task]
    lines = [
        f"## MLP 784-{width}-{width}-10, batch {batch}, T = {STEPS}",
        "",
        "| | gradient evaluations a step (and direction) | MB |",
        "|---|---|---|",
    ]
    for name, values in found.items():
        low, high = min(values), max(values)
        lines.append(
            f"| {name} | **{statistics.median(values):.2f}** ({low:.2f}-{high:.2f}) | {memory[name]:,.0f} |"
        )
    return [*lines, ""]


def growth(device: str) -> list[str]:
    _, methods = ways("mlp", device)
    lines = [
        "## Peak memory by the number of inner steps, MLP 784-512-512-10, batch 512, MB",
        "",
        f"| | {' | '.join(f'T = {n:,}' for n in LENGTHS)} |",
        "|---|---|---|---|",
    ]
    for name, run in tqdm(methods.items(), "memory", leave=False):
        found = [megabytes(lambda n=n, run=run: run(n)) for n in LENGTHS]
        shown = ("does not fit" if m is None else f"{m:,.0f}" for m in found)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "unrolling_gpu.md")
    options = parser.parse_args()
    lines = [
        "# The cost of a hypergradient through the inner steps, on a GPU",
        "",
        f"`python benchmarks/unrolling_gpu.py`: {torch.cuda.get_device_name()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}. Time that passes divided by that of one gradient evaluation, per inner step (and "
        f"direction), median of {options.repetitions} interleaved repetitions, lowest and highest in brackets; peak of "
        f"torch's allocator above what was there before. Random inputs, a decay per weight; momentum descent for "
        f"`Reversible` and `ForwardMode`, gradient descent for the others. The default memory_budget of `Unroll` and of the "
        f"others is left as it is, but for that of `ForwardGradient`.",
        "",
    ]
    for task in options.tasks:
        lines += costs(task, options.device, options.repetitions)
        options.output.write_text("\n".join(lines), encoding="utf-8")
    if not options.no_growth:
        lines += growth(options.device)
    options.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
