"""Trials that a study needs: ``HypergradientSampler`` against Random, TPE, CMA-ES and GP.

    python benchmarks/trials_to_target.py [--trials 200] [--ours 60] [--seconds 180] [--processes 2]
                                          [--tasks NAME ...] [--seeds 7]

Every study runs through ``study.optimize`` with its sampler's defaults; the others get the start as
their first trial. A study that takes longer than ``--seconds`` ends early, and its table cell says
after how many trials (GP, and CMA-ES and TPE at hundreds of variables). Writes
``results/trials_to_target.md`` and ``.png``. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from tasks import CHECK, TASKS, Task
from tasks_mixed import MIXED, MixedTask
from trials_report import figure, report

import optuna_hypergrad as ohg

RESULTS = Path(__file__).parent / "results"
OURS = "HypergradientSampler"
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    OURS: lambda seed: ohg.HypergradientSampler(seed=seed),
    "Random": lambda seed: RandomSampler(seed=seed),
    "TPE": lambda seed: TPESampler(seed=seed),
    "CMA-ES": lambda seed: CmaEsSampler(seed=seed),
    "GP": lambda seed: GPSampler(seed=seed),
}
MIXED_SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "trajectories + TPE": lambda seed: ohg.HypergradientSampler(seed=seed),
    "trajectories + Random": lambda seed: ohg.HypergradientSampler(
        RandomSampler(seed=seed), seed=seed
    ),
    "TPE": lambda seed: TPESampler(seed=seed),
}
DEFAULT_TASKS = [
    "digits-64",
    "digits-64-noisy",
    "digits-640",
    "cancer-30",
    "wine-39",
    "ridge-1000",
    "kernel-ridge-11",
    "gp-12",
    "weights-300",
    "schedule-31",
    "rosenbrock-10",
    "quadratic-100-box",
    "sphere-200",
    "sphere-1000",
    "sphere-50-noisy",
    *CHECK,
]


def study_values(
    sampler: BaseSampler, objective: Callable[[Any], float], options: dict[str, Any]
) -> tuple[list[float], float]:
    """Values of all trials in order (infinite for failures) and seconds."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(sampler=sampler)
    if options.get("start"):
        study.enqueue_trial(options["start"])
    began = time.perf_counter()
    study.optimize(objective, n_trials=options["trials"], timeout=options["seconds"])
    seconds = time.perf_counter() - began
    return [math.inf if t.value is None else t.value for t in study.trials], seconds


def continuous(
    name: str, sampler: str, trials: int, seconds: float
) -> tuple[list[float], list[float], float]:
    """Values, true values (without noise) and seconds of one study."""
    task: Task = TASKS[name]()
    truths: list[float] = []

    def note(params: dict[str, torch.Tensor]) -> None:
        if task.exact is not None:
            truths.append(task.truth({k: v.detach() for k, v in params.items()}))

    @ohg.differentiable
    def ours(trial: ohg.DifferentiableTrial) -> torch.Tensor:
        params = {}
        for key, start in task.start.items():
            d = task.domains[key]
            if start.ndim:
                params[key] = trial.suggest_tensor(
                    key, tuple(start.shape), d.low, d.high, log=d.log, init=start
                )
            else:
                params[key] = trial.suggest_float(key, d.low, d.high, log=d.log, init=float(start))
        note(params)
        return task.objective(params, trial.number)

    def plain(trial: optuna.Trial) -> float:
        params = {}
        for key, start in task.start.items():
            d = task.domains[key]
            found = [
                trial.suggest_float(f"{key}_{i}", d.low, d.high, log=d.log)
                for i in range(start.numel())
            ]
            params[key] = torch.tensor(found, dtype=start.dtype).reshape(start.shape)
        note(params)
        with torch.no_grad():
            return float(task.objective(params, trial.number))

    options: dict[str, Any] = {"trials": trials, "seconds": seconds}
    if sampler != OURS:
        options["start"] = {
            f"{k}_{i}": x
            for k, v in task.start.items()
            for i, x in enumerate(v.reshape(-1).tolist())
        }
    objective = ours if sampler == OURS else plain
    values, taken = study_values(SAMPLERS[sampler](0), objective, options)
    return values, truths or values, taken


def mixed(
    name: str, sampler: BaseSampler, gradients: bool, trials: int
) -> tuple[list[float], float]:
    """Values and seconds of one study with two discrete hyperparameters, one float for each number."""
    task: MixedTask = MIXED[name]()

    def suggest(trial: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        setting = {k: trial.suggest_categorical(k, v) for k, v in task.categories.items()}
        for k, (low, high, log) in task.integers.items():
            setting[k] = trial.suggest_int(k, low, high, log=log)
        params = {}
        for k, size in task.sizes.items():
            d = task.domains[k]
            names = [k] if size == 1 else [f"{k}_{i}" for i in range(size)]
            found = [trial.suggest_float(n, d.low, d.high, log=d.log) for n in names]
            stacked = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in found])
            params[k] = stacked[0] if size == 1 else stacked
        return setting, params

    def plain(trial: Any) -> torch.Tensor:
        return task.objective(*suggest(trial))

    objective = (
        ohg.differentiable(plain) if gradients else lambda trial: float(plain(trial).detach())
    )
    return study_values(sampler, objective, {"trials": trials, "seconds": None})


def _job(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    if job["kind"] == "mixed":
        sampler = MIXED_SAMPLERS[job["sampler"]](job["seed"])
        gradients = isinstance(sampler, ohg.HypergradientSampler)
        values, seconds = mixed(job["task"], sampler, gradients, job["trials"])
        truths = values
    else:
        values, truths, seconds = continuous(
            job["task"], job["sampler"], job["trials"], job["seconds"]
        )
    best = np.minimum.accumulate(truths).tolist()
    return {**job, "best": best, "took": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--ours", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tasks", nargs="*", default=DEFAULT_TASKS + list(MIXED))
    parser.add_argument("--seeds", type=int, default=7, help="of the mixed tasks")
    parser.add_argument("--raw", type=Path, help="keep finished studies here, and go on from them")
    options = parser.parse_args()

    jobs: list[dict[str, Any]] = []
    for name in options.tasks:
        common = {"task": name, "seconds": options.seconds}
        if name in MIXED:
            jobs += [
                {**common, "kind": "mixed", "sampler": s, "trials": options.trials, "seed": seed}
                for s in MIXED_SAMPLERS
                for seed in range(options.seeds)
            ]
        else:
            jobs += [
                {
                    **common,
                    "kind": "continuous",
                    "sampler": s,
                    "trials": options.ours if s == OURS else options.trials,
                    "seed": 0,
                }
                for s in SAMPLERS
            ]
    done: list[dict[str, Any]] = []
    if options.raw and options.raw.exists():
        done = [json.loads(line) for line in options.raw.read_text().splitlines()]
    finished = {(d["task"], d["sampler"], d["seed"], d["trials"]) for d in done}
    jobs = [j for j in jobs if (j["task"], j["sampler"], j["seed"], j["trials"]) not in finished]
    with multiprocessing.get_context("fork").Pool(options.processes, maxtasksperchild=1) as pool:
        for result in pool.imap_unordered(_job, jobs):
            done.append(result)
            print(
                f"{result['task']:20s} {result['sampler']:22s} best {result['best'][-1]:.6g} "
                f"in {len(result['best'])} trials, {result['took']:.0f} s",
                flush=True,
            )
            if options.raw:
                with options.raw.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    done = [d for d in done if d["task"] in options.tasks]
    text = report(done, OURS, list(SAMPLERS), list(MIXED_SAMPLERS))
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "trials_to_target.md").write_text(text)
    figure(done, OURS, RESULTS / "trials_to_target.png")


if __name__ == "__main__":
    main()
