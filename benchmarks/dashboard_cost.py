"""What looking at a million hyperparameters in optuna-dashboard costs, and what publishing them costs the trials.

1. A study of 30 trials with 1,000,000 float32 hyperparameters each, and everything that it publishes, beside the same
   study without tensors that publishes nothing: each page in Chromium, alternating. Seconds from the beginning of the
   navigation until what the page is to show can be read, all its figures are drawn, and nothing is fetched any more
   (the study's page has three more figures then); bytes of all JSON that it fetches, uncompressed. Medians.
2. Trials of the quickstart (``examples/quickstart.py``: minimize_bilevel in a study of TPE's in SQLite): the seconds spent
   in publishing, of those of the trials. The first publishing imports plotly and is given by itself.

Needs Chromium (Debian: ``apt-get install chromium``).

    PYTHONPATH=tests:examples python benchmarks/dashboard_cost.py
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import quickstart
import torch
from browser import Browser

import optuna_hypergrad as ohg
from optuna_hypergrad.dashboard.publishing import PUBLISHER

TRIALS, SIDE = 30, 1000
PAGES = {
    "study": ("studies/1", ("Best Trial",), 3),
    "analytics": ("studies/1/analytics", ("Slice", "Contour"), 3),
    "trials": ("studies/1/trials", ("Trial 29",), 0),
    "best trial": ("studies/1/trials?numbers={best}", ("Started At",), 0),
    "note": ("studies/1/note", ("Note",), 0),
}


@ohg.differentiable
def with_tensors(trial: Any) -> torch.Tensor:
    pixels = trial.suggest_tensor("pixels", (SIDE, SIDE), 1e-3, 10.0, log=True, init=0.1)
    return plain(trial) + (pixels.log10() + 0.5).square().mean()


def plain(trial: Any) -> torch.Tensor:
    kind = trial.suggest_categorical("kind", ["a", "b"])
    return 1 + (trial.suggest_float("x", -1.0, 2.0) - 0.5) ** 2 + 0.1 * (kind == "b")


def make_study(directory: Path, name: str) -> tuple[str, int]:
    url = f"sqlite:///{directory / name}.db"
    tensors = name == "tensors"
    sampler = ohg.HypergradientSampler(seed=0, optimizer="adam", publish=tensors)
    study = optuna.create_study(storage=url, study_name=name, sampler=sampler)
    study.optimize(with_tensors if tensors else ohg.differentiable(plain), n_trials=TRIALS)
    return url, study.best_trial.number


@contextmanager
def serving(url: str) -> Iterator[str]:
    command = [sys.executable, "-m", "optuna_hypergrad", "dashboard", url, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[2]
        process.terminate()


def pages(repeats: int) -> list[str]:
    seconds: dict[tuple[str, str], list[float]] = {}
    sizes: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        made = {name: make_study(Path(directory), name) for name in ("plain", "tensors")}
        addresses = {name: stack.enter_context(serving(url)) for name, (url, _) in made.items()}
        browser = stack.enter_context(Browser())
        for repeat in range(repeats + 1):  # the first one fills caches
            for page, (path, words, plots) in PAGES.items():
                for name in sorted(made, reverse=bool(repeat % 2)):
                    drawn = plots + 3 * (name == "tensors" and page == "study")
                    url = f"{addresses[name]}/{path.format(best=made[name][1])}"
                    view = browser.look(url, words=words, plots=drawn, png=False)
                    assert not view.errors, view.errors
                    if repeat:
                        seconds.setdefault((page, name), []).append(view.seconds)
                        sizes[page, name] = view.json_bytes
    lines = [
        "| page | without tensors, s | with, s | ratio | JSON without, kB | with, kB | more, kB |",
        "|---|---|---|---|---|---|---|",
    ]
    for page in PAGES:
        before, after = (statistics.median(seconds[page, name]) for name in ("plain", "tensors"))
        small, large = (sizes[page, name] / 1000 for name in ("plain", "tensors"))
        lines.append(
            f"| {page} | {before:.2f} | {after:.2f} | {after / before:.2f} | {small:.1f} | {large:.1f} | "
            f"{large - small:.1f} |"
        )
    return lines


def trials(count: int) -> list[str]:
    """Of the quickstart: what publishing takes of them."""
    spent: list[float] = []
    for name in ("tell_trial", "tell_study"):
        setattr(PUBLISHER, name, timed(getattr(PUBLISHER, name), spent))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    data = quickstart.load_data()
    took, first, total = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as directory:
        study = optuna.create_study(
            storage=f"sqlite:///{directory}/study.db",
            sampler=optuna.samplers.TPESampler(seed=0),
            pruner=optuna.pruners.NopPruner(),
        )
        for _ in range(count):
            spent.clear()
            started = time.perf_counter()
            study.optimize(lambda trial: quickstart.tuned_by_gradient(trial, data, 100), n_trials=1)
            took.append(time.perf_counter() - started)
            total += sum(spent)
            first = max(first, sum(spent))
        started = time.perf_counter()
        PUBLISHER.flush()
        last = time.perf_counter() - started
    return [
        f"{count} trials of the quickstart, {statistics.median(took):.1f} s each (median): {total:.2f} s of {sum(took):.1f} s "
        f"in publishing, **{100 * total / sum(took):.2f} %**; with what is published when the process ends ({last:.2f} s), "
        f"{100 * (total + last) / (sum(took) + last):.2f} %. The most in one trial, which imports plotly: {first:.2f} s.",
    ]


def timed(function: Any, spent: list[float]) -> Any:
    def wrapped(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **settings)
        finally:
            spent.append(time.perf_counter() - started)

    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--output", default="benchmarks/results/dashboard_cost.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# What the dashboard costs",
        "",
        f"`python benchmarks/dashboard_cost.py --repeats {options.repeats} --trials {options.trials}` with torch "
        f"{torch.__version__}, optuna {optuna.__version__}, Python {platform.python_version()}. Medians of one run, kinds "
        "alternating. What is compared: the docstring of the script.",
        "",
        f"## Pages of a study of {TRIALS} trials with {SIDE * SIDE:,} hyperparameters each",
        "",
        *pages(options.repeats),
        "",
        "## What publishing costs the trials",
        "",
        *trials(options.trials),
    ]
    Path(options.output).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
