"""Which outer rule needs the fewest evaluations: every rule on every task, without Optuna.

    python benchmarks/step_rules.py [--evaluations 60] [--seeds 2] [--processes 2] [--tasks NAME ...]

One evaluation is a value with its exact (or, in the noisy tasks, noisy) gradient. Writes
``results/step_rules.md`` and keeps the lowest values ever seen in ``results/known_best.json``.
About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from tasks import CHECK, DEVELOPMENT, TASKS, Task

from optuna_hypergrad.step_rules import TrustRegion, make_step_rule

Params = dict[str, torch.Tensor]
RESULTS = Path(__file__).parent / "results"
RULES: dict[str, object] = {
    "auto": "auto",
    "lbfgs": "lbfgs",
    "adam": "adam",
    "SciPy L-BFGS-B": None,
    "torch Rprop, 1": functools.partial(torch.optim.Rprop, lr=1.0),
    "torch Adam, 0.5": functools.partial(torch.optim.Adam, lr=0.5),
    "torch SGD, 0.1, momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "auto, power=1": TrustRegion(power=1.0),
    "auto, history=3": TrustRegion(history=3),
    "auto, noise=inf": TrustRegion(noise=math.inf),
}
SHOWN = list(RULES)[:6]
COUNTS = (10, 20, 30, 60)
GAPS = (0.1, 0.01, 0.001)
FLOOR = 1e-4


def evaluate(task: Task, internal: Params, number: int) -> tuple[float, Params, float]:
    """Value, gradient in internal coordinates, and the value without noise."""
    domains = task.domains
    external = {k: domains[k].to_external(v).requires_grad_(True) for k, v in internal.items()}
    try:
        value = task.objective(external, number)
        slopes = torch.autograd.grad(value, list(external.values()))
    except torch.linalg.LinAlgError:
        return math.nan, {}, math.inf
    gradient = {
        k: domains[k].internal_gradient(g, external[k].detach())
        for k, g in zip(external, slopes, strict=True)
    }
    number_ = float(value.detach())
    truth = task.truth({k: v.detach() for k, v in external.items()}) if task.exact else number_
    return number_, gradient, truth if math.isfinite(truth) else math.inf


def trace(name: str, rule: str, seed: int, evaluations: int) -> list[float]:
    """Lowest true value so far after each evaluation; ends where the rule stops."""
    task = TASKS[name]()
    point = {k: task.domains[k].to_internal(v) for k, v in task.start.items()}
    lower = {k: d.internal_bounds()[0] for k, d in task.domains.items()}
    upper = {k: d.internal_bounds()[1] for k, d in task.domains.items()}
    seen: list[float] = []
    if RULES[rule] is None:
        _scipy(task, point, lower, upper, seed, evaluations, seen)
    else:
        stepper = make_step_rule(RULES[rule])  # type: ignore[arg-type]
        state = stepper.init(point, lower, upper)
        for i in range(evaluations):
            value, gradient, truth = evaluate(task, point, i + 100_000 * seed)
            seen.append(truth)
            proposal = stepper.step(state, point, value, gradient, lower, upper)
            point, state = proposal.point, proposal.state
            if proposal.stop is not None:
                break
    return np.minimum.accumulate(seen).tolist()


def _scipy(
    task: Task,
    point: Params,
    lower: dict[str, float],
    upper: dict[str, float],
    seed: int,
    evaluations: int,
    seen: list[float],
) -> None:
    sizes = [v.numel() for v in point.values()]

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        if len(seen) >= evaluations:
            raise StopIteration
        parts = torch.tensor(x).split(sizes)
        here = {k: p.reshape(v.shape) for (k, v), p in zip(point.items(), parts, strict=True)}
        value, gradient, truth = evaluate(task, here, len(seen) + 100_000 * seed)
        seen.append(truth)
        if not gradient:
            return math.inf, np.zeros(len(x))
        return value, np.concatenate([g.reshape(-1).numpy() for g in gradient.values()])

    start = torch.cat([v.reshape(-1) for v in point.values()]).numpy()
    bounds = [(lower[k], upper[k]) for k, v in point.items() for _ in range(v.numel())]
    with contextlib.suppress(StopIteration):
        minimize(function, start, jac=True, method="L-BFGS-B", bounds=bounds)


def _job(arguments: tuple[str, str, int, int]) -> tuple[str, str, int, list[float]]:
    name, rule, seed, evaluations = arguments
    torch.set_num_threads(1)
    return name, rule, seed, trace(name, rule, seed, evaluations)


Traces = dict[tuple[str, str, int], list[float]]


def measures(
    traces: Traces, best: dict[str, float], name: str, rule: str
) -> tuple[list[float], list[float]]:
    """log10 of the relative gap after each of COUNTS; log10 of evaluations to each of GAPS."""
    gaps, needed = [], []
    for (n, r, _), values in traces.items():
        if (n, r) != (name, rule):
            continue
        gap = [
            max((v - best[name]) / (values[0] - best[name]), FLOOR)
            for v in values + [values[-1]] * (COUNTS[-1] - len(values))
        ]
        gaps.append([math.log10(gap[c - 1]) for c in COUNTS])
        reached = [next((i + 1 for i, g in enumerate(gap) if g <= q), 120) for q in GAPS]
        needed.append([math.log10(e) for e in reached])
    return np.mean(gaps, 0).tolist(), np.mean(needed, 0).tolist()


def summary(traces: Traces, best: dict[str, float], names: list[str]) -> list[str]:
    rows = [
        "| rule | " + " | ".join(f"gap at {c}" for c in COUNTS) + " | " +
        " | ".join(f"to {q:.1%}" for q in GAPS) + " |",
        "|---|" + "---|" * (len(COUNTS) + len(GAPS)),
    ]  # fmt: skip
    for rule in RULES:
        both = [measures(traces, best, name, rule) for name in names]
        gaps = np.mean([g for g, _ in both], 0)
        needed = 10 ** np.mean([e for _, e in both], 0)
        rows.append(
            f"| {rule} | " + " | ".join(f"{10**g:.2%}" for g in gaps) + " | "
            + " | ".join(f"{e:.0f}" for e in needed) + " |"
        )  # fmt: skip
    return rows


def details(traces: Traces, names: list[str]) -> list[str]:
    rows = [
        "| task | variables | kind | start | " + " | ".join(SHOWN) + " |",
        "|---|---|---|---|" + "---|" * len(SHOWN),
    ]
    for name in names:
        task = TASKS[name]()
        cells = []
        for rule in SHOWN:
            runs = [v for (n, r, _), v in traces.items() if (n, r) == (name, rule)]
            at = [np.mean([v[min(c, len(v)) - 1] for v in runs]) for c in (10, 30, 60)]
            cells.append(" ".join(f"{v:.4g}" for v in at))
        start = f"{task.truth(task.start):.4g}"
        rows.append(f"| {name} | {task.size} | {task.kind} | {start} | " + " | ".join(cells) + " |")
    return rows


def report(traces: Traces, best: dict[str, float], evaluations: int) -> str:
    present = {name for name, _, _ in traces}
    groups = {
        "The tasks that the default was chosen on": [n for n in DEVELOPMENT if n in present],
        "Tasks that were written after it was fixed": [n for n in CHECK if n in present],
    }
    lines = [
        "# Outer step rules",
        "",
        "Made by `python benchmarks/step_rules.py`. One evaluation is one value with its gradient;",
        "all rules start at the same point and move the same internal coordinates. The gap is",
        "(best value so far - lowest known value) / (start - lowest known value), its geometric mean",
        f"over the tasks (not below {FLOOR:.2%} each). The last columns are geometric means of the",
        "evaluations until the gap is 10 %, 1 % and 0.1 %, 120 where 60 were not enough. Noisy tasks:",
        "the best true value among the points visited, mean of the seeds.",
    ]
    for title, names in groups.items():
        if not names:
            continue
        lines += ["", f"## {title} ({len(names)})", "", *summary(traces, best, names), ""]
        lines += ["Best value after 10, 30 and 60 evaluations:", "", *details(traces, names)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2, help="of noisy tasks")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    options = parser.parse_args()
    jobs = [
        (name, rule, seed, options.evaluations)
        for name in options.tasks
        for rule in RULES
        for seed in range(options.seeds if TASKS[name]().exact else 1)
    ]
    traces: Traces = {}
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        for name, rule, seed, values in pool.imap_unordered(_job, jobs):
            traces[name, rule, seed] = values
            print(f"{name:22s} {rule:26s} {values[-1]:.6g} in {len(values)}", flush=True)
    record = RESULTS / "known_best.json"
    best = json.loads(record.read_text()) if record.exists() else {}
    for (name, _, _), values in traces.items():
        best[name] = min(best.get(name, math.inf), values[-1])
    RESULTS.mkdir(exist_ok=True)
    record.write_text(json.dumps(dict(sorted(best.items())), indent=1) + "\n")
    text = report(traces, best, options.evaluations)
    print(text)
    if set(options.tasks) == set(TASKS):
        (RESULTS / "step_rules.md").write_text(text)


if __name__ == "__main__":
    main()
