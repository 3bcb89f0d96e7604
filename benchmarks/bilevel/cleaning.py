"""Hyper-data cleaning: test error against CPU time and samples seen, for every method, on two tasks.

* ``softmax``: cleaning-mnist as ``benchopt/benchmark_bilevel`` defines it (20,000 weights), a fraction p = .5, .7, .9 of the
  labels drawn at random;
* ``mlp``: an MLP 784-256-10 on 5,000 images with half of the labels wrong.

Every method has the same CPU time (one thread), batches of the same size, and plain SGD on the weights. Beside them: equal
weights; an oracle that knows which labels are right; Optuna's TPE, which tunes what all samples share; for the MLP
also training on the validation samples alone, and peers in an environment of their own (``../peers``), each with the same data,
batches, start and budget. Errors are of the running ``w``, as it is when the time is over: nothing is trained again.

    python benchmarks/bilevel/cleaning.py --data DIR              # DIR holds MNIST's four gzip files; about 2 hours
    python benchmarks/bilevel/cleaning.py --data DIR --tasks mlp --seeds 1 --only MA-SOBA SAMA

Runs are kept in ``--stored`` as they end, and not done again. A table and a figure are written to ``results/``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from cleaning_report import write
from methods import methods
from recording import Moment, OutOfTime, Record, Recorded
from tasks import Task, cleaning_mlp, cleaning_mnist
from tqdm import tqdm

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator

HERE = Path(__file__).resolve().parent
SECONDS = {"softmax": 12.0, "mlp": 40.0}
MOMENTS = 20
PEERS = ("BOAT", "BOAT, falling", "Betty", "TorchOpt", "higher")
BASELINES = ("equal weights", "oracle", "validation alone", "TPE")
Run = dict[str, Any]


def of_ours(task: Task, name: str, seed: int, seconds: float) -> Run:
    method = methods(task.kind)[name]

    def run(estimator: AbstractHypergradientEstimator, problem: Any, num_steps: int) -> None:
        ohg.minimize_bilevel(
            problem,
            task.first_params(seed),
            task.equal_weights(),
            inner_solver=method.solver,
            estimator=estimator,
            optimizer=method.optimizer,
            lr_lambda=method.lr_lambda,
            num_steps=num_steps,
        )

    problem = task.problem(seed, going_round=method.going_round)
    run(method.estimator, problem, 2)  # what torch does once in a process
    record = Record(seconds, MOMENTS)
    with contextlib.suppress(OutOfTime):
        run(Recorded(method.estimator, record), record.counting(problem), 10**9)
    return _curve(task, record)


def of_baseline(task: Task, name: str, seed: int, seconds: float) -> Run:
    if name == "TPE":
        return _of_tpe(task, seed, seconds)
    lam = task.oracle_weights() if name == "oracle" else task.equal_weights(1e4)
    if task.kind == "softmax":
        w = _exact(task, lam)
        return {"moments": [[0.0, 0, 0, task.test_error(w), None]]}
    part = task.validation if name == "validation alone" else task.train
    lam = {"weight": torch.full((len(part[1]),), 1e4)} if name == "validation alone" else lam
    record = Record(seconds, MOMENTS)
    problem = record.counting(task.problem(seed, part))
    w, step = task.first_params(seed), 0
    solver = methods("mlp")["MA-SOBA"].solver
    try:
        while True:
            record.note(w, lam)
            w = ohg.inner_solve(problem, solver, w, lam, start=step).inner_params
            step += 1
    except OutOfTime:
        pass
    return _curve(task, record, weights=False)


def _of_tpe(task: Task, seed: int, seconds: float) -> Run:
    start, found = time.process_time(), Record(seconds, MOMENTS)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    best: list[tuple[float, float]] = []
    moments = []
    while time.process_time() - start < seconds:
        trial = study.ask()
        if task.kind == "softmax":
            lam = task.equal_weights(trial.suggest_float("weight", -6.0, 6.0))
            w = _exact(task, lam)
        else:
            lam = task.equal_weights(1e4)
            solver = ohg.GradientDescent(
                trial.suggest_float("step_size", 1e-3, 1.0, log=True),
                max_steps=trial.suggest_int("num_steps", 20, 1000, log=True),
            )
            problem = found.counting(task.problem(seed))
            w = ohg.inner_solve(problem, solver, task.first_params(seed), lam).inner_params
        value = float(task.outer_objective(w, lam, task.validation))
        study.tell(trial, value if value == value else 1e9)
        best.append((value, task.test_error(w)))
        spent = time.process_time() - start
        moments.append([spent, len(best), found.samples, min(best)[1], None])
    return {"moments": moments}


def of_peer(task: Task, name: str, seed: int, seconds: float, python: str) -> Run:
    """In a process of its own: torch, the peer, and nothing of ours."""
    with tempfile.TemporaryDirectory() as directory:
        given, out = Path(directory) / "task.pt", Path(directory) / "moments.pt"
        start = {
            "train": task.train,
            "validation": task.validation,
            "w": task.first_params(seed),
            "lam": task.equal_weights()["weight"],
        }
        settings = {"seed": seed, "size": task.batch_size, "seconds": seconds, "num": MOMENTS}
        torch.save({**start, **settings}, given)
        command = [
            str(Path(python).absolute()),
            str(HERE / "peers" / f"run_{name.lower().replace(', ', '_')}.py"),
            str(given),
            str(out),
        ]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False)
        if ended.returncode:
            return {"error": (ended.stderr.strip().splitlines() or ["it died"])[-1][:300]}
        record = Record(seconds, MOMENTS)
        record.moments = [
            Moment(s, n, m, w, {"weight": lam}) for s, n, m, w, lam in torch.load(out)
        ]
        return _curve(task, record)


def _curve(task: Task, record: Record, *, weights: bool = True) -> Run:
    return {
        "moments": [
            [
                m.seconds,
                m.steps,
                m.samples,
                task.test_error(m.inner_params),
                task.auroc(m.outer_params) if weights else None,
            ]
            for m in record.moments
        ]
    }


def _exact(task: Task, lam: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    whole = ohg.BilevelProblem(task.inner_objective, task.outer_objective, lambda _: task.train)
    return ohg.inner_solve(whole, ohg.LBFGS(max_steps=200), task.first_params(0), lam).inner_params


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's gzip files")
    parser.add_argument("--tasks", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="methods, baselines or peers")
    parser.add_argument("--peers", default=sys.executable, help="Python that has the peers")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of all budgets, to try things out"
    )
    parser.add_argument("--stored", type=Path, default=HERE.parent / "results" / "cleaning.json")
    args = parser.parse_args()
    if not list(args.data.glob("train-images*.gz")):
        parser.error(f"no train-images*.gz in {args.data}")
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    runs: dict[str, Run] = json.loads(args.stored.read_text()) if args.stored.exists() else {}
    wanted: list[tuple[str, Callable[[], Task], str, int]] = []
    for kind in args.tasks:
        of_kind: dict[str, Callable[[], Task]] = {"mlp": functools.partial(cleaning_mlp, args.data)}
        if kind == "softmax":
            of_kind = {
                f"softmax, p = {p}": functools.partial(cleaning_mnist, args.data, p)
                for p in args.fractions
            }
        names = [*methods(kind), *BASELINES, *PEERS]
        if kind == "softmax":
            names = [n for n in names if n not in (*PEERS, "validation alone")]
        wanted += [
            (label, make, name, seed)
            for label, make in of_kind.items()
            for seed in range(args.seeds)
            for name in names
            if args.only is None or name in args.only
        ]
    tasks: dict[str, Task] = {}
    bar = tqdm(wanted)
    for label, make, name, seed in bar:
        key = f"{label} | {name} | {seed}"
        if key in runs:
            continue
        bar.set_description(key)
        if label not in tasks:
            tasks[label] = make()
        task = tasks[label]
        seconds = args.scale * SECONDS[task.kind]
        if name in PEERS:
            runs[key] = of_peer(task, name, seed, seconds, args.peers)
        elif name in BASELINES:
            runs[key] = of_baseline(task, name, seed, seconds)
        else:
            runs[key] = of_ours(task, name, seed, seconds)
        args.stored.write_text(json.dumps(runs))
    write(runs, HERE.parent / "results")


if __name__ == "__main__":
    main()
