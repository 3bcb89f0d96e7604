"""Data condensation on MNIST: a few images that networks learn from as well as they can.

    python benchmarks/condensation.py --mnist DIRECTORY [--per-class 1 10] [--seeds 3] [--steps N] ...

The hyperparameters are the pixels: ``min over images of f(w_T(images))``, where ``w_T`` is a ConvNet
after ``T`` steps of SGD on the images and ``f`` its loss on real ones (Shen et al. 2024, section 4.1).
Each outer step trains a fresh network. Estimators of the hypergradient differ in how they go through
the ``T`` steps, and all else is the same for them: starts, batches, networks, and outer steps.
``DIRECTORY`` holds the four gzipped idx files of MNIST. What is done is kept in
``results/condensation.json``, and a run that was stopped goes on there; it ends with
``results/condensation.md`` and ``.png``. About 25 minutes of CPU time on one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from condensation_report import figure, report, versions
from condensation_task import (
    GRID,
    Data,
    Setting,
    accuracies,
    initial,
    load_mnist,
    make_problem,
    real_images,
)
from torch import Tensor
from tqdm import tqdm

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator, EstimatorState

RESULTS = Path(__file__).parent / "results"
REAL, FULL = "random real images", "full unrolling"
FORWARD, TWO_PHASES = "(FG)^2U", "(FG)^2U, two phases"
CHEAP = ("truncated", "T1-T2", "Neumann")
METHODS = (REAL, *CHEAP, FORWARD, TWO_PHASES, FULL)
DEFAULTS = {  # by images per class
    1: {"inner_steps": 20, "outer_lr": 3e-2, "steps": 60, "directions": 64},
    10: {"inner_steps": 50, "outer_lr": 2e-2, "steps": 300, "directions": 256},
}


def estimator_of(
    method: str, s: Setting, seed: int, device: torch.device
) -> AbstractHypergradientEstimator:
    room: dict[str, Any] = {"memory_budget": 20e9} if device.type == "cuda" else {}
    truncated = ohg.Unroll(truncation=s.truncation, **room)
    forward = ohg.ForwardGradient(
        s.num_directions, seed=seed, width=s.columns, compile=True, **room
    )
    corrected = dataclasses.replace(forward, control_variate=truncated)
    return {
        "truncated": truncated,
        "T1-T2": ohg.Implicit(ohg.Identity(s.step_size)),
        "Neumann": ohg.Implicit(ohg.Neumann(s.truncation - 1, alpha=s.step_size)),
        FORWARD: forward,
        TWO_PHASES: ohg.TwoPhase(truncated, corrected, switch=s.switch),
        FULL: ohg.Unroll(**room),
    }[method]


def condense(s: Setting, data: Data, method: str, seed: int) -> tuple[Tensor, list[float], float]:
    """The images, the outer loss of each step, and seconds: of the CPU, or passed if a GPU works."""
    images = real_images(s, data, seed)
    if method == REAL:
        return images, [], 0.0
    images.requires_grad_(True)
    problem, solver = make_problem(s, data, seed), s.solver()
    estimator = estimator_of(method, s, seed, data.device)
    optimizer = torch.optim.Adam([images], lr=s.outer_lr)
    state, losses, begun = EstimatorState(), [], clock(data)
    bar = tqdm(range(s.num_steps), f"{s.per_class} per class, seed {seed}, {method}", leave=False)
    for step in bar:
        lam = {"images": images.detach().clone()}
        start = initial(s, data.device, seed, 0, step)
        found = estimator.estimate(problem, solver, start, lam, step, state)
        if not found.value["images"].isfinite().all():
            found.result.raise_if_failed()
        state, images.grad = found.state.cold(), found.value["images"]
        optimizer.param_groups[0]["lr"] = s.outer_lr * (1 - step / s.num_steps)
        optimizer.step()
        with torch.no_grad():
            images.clamp_(0, 1)
        losses.append(float(found.outer_value))
        bar.set_postfix_str(f"loss {np.mean(losses[-10:]):.3f}", refresh=False)
    return images.detach(), losses, clock(data) - begun


def clock(data: Data) -> float:
    return time.process_time() if data.device.type == "cpu" else time.perf_counter()


def cosines(s: Setting, data: Data, seed: int) -> dict[str, list[float]]:
    """With the exact hypergradient, at the start, by method (two phases: the second), for two networks."""
    problem, solver = make_problem(s, data, seed), s.solver()
    found: dict[str, list[float]] = {}
    for step in (s.num_steps, s.num_steps + 1):
        lam = {"images": real_images(s, data, seed)}
        at = problem, solver, initial(s, data.device, seed, 0, step), lam, step
        exact = estimator_of(FULL, s, seed, data.device).estimate(*at).value["images"].flatten()
        for method in (*CHEAP, FORWARD, TWO_PHASES):
            estimator = estimator_of(method, s, seed, data.device)
            value = estimator.estimate(*at).value["images"].flatten()
            found.setdefault(method, []).append(float(torch.cosine_similarity(value, exact, dim=0)))
    return found


def setting_of(arguments: argparse.Namespace, per_class: int) -> Setting:
    usual = DEFAULTS.get(per_class, DEFAULTS[10])
    given = {k: v if (v := getattr(arguments, k)) is not None else usual[k] for k in usual}
    return Setting(
        per_class=per_class,
        size=arguments.size,
        width=arguments.width,
        inner_steps=int(given["inner_steps"]),
        inner_batch=arguments.inner_batch,
        step_size=arguments.step_size,
        outer_lr=given["outer_lr"],
        outer_batch=arguments.outer_batch,
        num_steps=int(given["steps"]),
        num_directions=int(given["directions"]),
        columns=arguments.columns,
        truncation=arguments.truncation,
        switch=round(given["steps"] * arguments.switch),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mnist", type=Path, required=True, help="folder of the four idx files")
    parser.add_argument("--per-class", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--cosines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--size", type=int, default=8, choices=tuple(GRID))
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument(
        "--inner-steps", type=int, help="by default as in DEFAULTS, as the next three are"
    )
    parser.add_argument("--inner-batch", type=int, default=20)
    parser.add_argument("--step-size", type=float, default=5e-2)
    parser.add_argument("--outer-lr", type=float)
    parser.add_argument("--outer-batch", type=int, default=256)
    parser.add_argument("--steps", type=int, help="outer steps")
    parser.add_argument("--directions", type=int)
    parser.add_argument("--columns", type=int, default=64, help="directions in one product")
    parser.add_argument("--truncation", type=int, default=5)
    parser.add_argument("--switch", type=float, default=0.5, help="share of the first phase")
    parser.add_argument("--networks", type=int, default=5, help="for the test accuracy")
    parser.add_argument("--training-steps", type=int, default=100, help="of each of them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    data = load_mnist(arguments.mnist, arguments.size, arguments.device)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / "condensation.json"
    store = json.loads(path.read_text()) if path.exists() else {}
    for seed in arguments.seeds:
        for per_class in arguments.per_class:
            s = setting_of(arguments, per_class)
            for method in (*arguments.methods, *["cosines"] * arguments.cosines):
                key, done = f"{per_class}/{seed}/{method}", {"setting": dataclasses.asdict(s)}
                if store.get(key, {}).get("setting") == done["setting"]:
                    continue
                if method == "cosines":
                    store[key] = done | cosines(s, data, seed)
                else:
                    images, losses, seconds = condense(s, data, method, seed)
                    images = (images * 255).round()
                    early, late = (
                        accuracies(s, data, images / 255, arguments.networks, steps)
                        for steps in (s.inner_steps, arguments.training_steps)
                    )
                    print(f"{key}: {np.mean(early):.3f}, {np.mean(late):.3f}, {seconds:.0f} s")
                    store[key] = done | {
                        "early": early,
                        "late": late,
                        "losses": [round(v, 4) for v in losses],
                        "seconds": round(seconds, 2),
                        "images": images[:10].int().flatten().tolist(),
                    }
                whole = path.with_suffix(".tmp")
                whole.write_text(json.dumps(store))
                whole.replace(path)
    command = f"python benchmarks/condensation.py {' '.join(_named(sys.argv[1:]))}"
    device = torch.device(arguments.device).type
    text = report(store, command, METHODS, versions(), device)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    figure(store, METHODS, path.with_suffix(".png"))
    print(text)


def _named(arguments: list[str]) -> list[str]:
    """Arguments without the folders of this machine."""
    return [
        "DIRECTORY" if before == "--mnist" else a
        for before, a in zip(["", *arguments], arguments, strict=False)
    ]


if __name__ == "__main__":
    main()
