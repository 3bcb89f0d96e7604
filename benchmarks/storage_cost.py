"""What it costs to keep a million hyperparameters, and their optimizer's state, in the study's database.

1. One outer step on an MLP 784-512-512-10 with batches of 512: inner gradient steps, one hypergradient
   with K = 10 Hessian-vector products (Neumann series on a kept double-backward graph), one Adam step
   on 1,000,000 float32 hyperparameters (a log-decay for each of 669,706 weights, a log-weight for each
   of 330,294 training samples). With it: storing the hyperparameters and Adam's two moments (12 MB) in
   an SQLite file and removing what the default retention does not keep, either before the trial is
   finished ("waits") or on the store's thread while the step runs ("overlaps"). Plain torch in the
   step, so that it is not our own solvers' slowness that makes storing look cheap.
2. The same task where the library stores by itself (``storage_paths.py``): ``minimize_bilevel`` with a
   checkpoint at every outer step (it overlaps), and the trials of a ``@differentiable`` objective
   under ``HypergradientSampler`` (it waits). A step is one outer step there and one trial here, inner
   steps and hypergradient included; each is compared with the same that stores nothing. "Waited" is
   what the caller was kept from going on by the store; "worked" is the CPU time of storing, on all
   threads; both relative to the step that stores nothing.
3. A study of 30 trials with 12 MB each beside the same study without tensors: opening it,
   ``best_trial``, ``trials_dataframe()``, and what each page of optuna-dashboard asks for,
   alternating (plots only where plotly is installed).

Wall and CPU seconds (all threads of the process), medians.

    python benchmarks/storage_cost.py
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import torch
from storage_paths import BATCH, NUM_HYPERPARAMETERS, NUM_PRODUCTS, SIZES, paths
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, relu

from optuna_hypergrad.stores import Retention, TensorStore

MODES = ("nothing stored", "waits", "overlaps")


class Clock:
    """Wall and CPU seconds, by label."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    @contextmanager
    def time(self, label: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall.setdefault(label, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(label, []).append(time.process_time() - cpu)


class OuterStep:
    """The work between two stores: ``run()`` is one outer step."""

    def __init__(self, num_inner_steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [s for a, b in pairwise(SIZES) for s in ((b, a), (b,))]
        self.weights = [
            (
                torch.randn(s, generator=generator) * (2 / s[-1]) ** 0.5 * (len(s) > 1)
            ).requires_grad_()
            for s in shapes
        ]
        self.splits = [w.numel() for w in self.weights]
        self.num_samples = NUM_HYPERPARAMETERS - sum(self.splits)
        self.images = torch.rand(10_000, SIZES[0], generator=generator)
        self.labels = torch.randint(0, SIZES[-1], (10_000,), generator=generator)
        self.hyper = torch.full((NUM_HYPERPARAMETERS,), -8.0).requires_grad_()
        self.optimizer = torch.optim.Adam([self.hyper], lr=1e-2)
        self.num_inner_steps = num_inner_steps
        self.generator = generator

    def batch(self) -> Tensor:
        return torch.randint(0, self.num_samples, (BATCH,), generator=self.generator)

    def loss(self, index: Tensor) -> Tensor:
        x, y = self.images[index % 10_000], self.labels[index % 10_000]
        w = self.weights
        for k in range(0, len(w), 2):
            x = linear(relu(x) if k else x, w[k], w[k + 1])
        return cross_entropy(x, y, reduction="none")

    def inner(self, index: Tensor) -> Tensor:
        *decays, samples = self.hyper.split([*self.splits, self.num_samples])
        data = (samples[index].sigmoid() * self.loss(index)).mean()
        pairs = zip(self.weights, decays, strict=True)
        return data + 0.5 * sum((d.exp().view_as(w) * w.square()).sum() for w, d in pairs)

    def run(self) -> None:
        for _ in range(self.num_inner_steps):
            gradients = torch.autograd.grad(self.inner(self.batch()), self.weights)
            with torch.no_grad():
                torch._foreach_sub_(self.weights, gradients, alpha=0.05)
        outer = self.loss(self.batch()).mean()
        b = torch.autograd.grad(outer, self.weights)
        kept = torch.autograd.grad(self.inner(self.batch()), self.weights, create_graph=True)
        total, term = [v.clone() for v in b], list(b)
        for _ in range(NUM_PRODUCTS):
            product = torch.autograd.grad(kept, self.weights, term, retain_graph=True)
            term = list(torch._foreach_sub(term, torch._foreach_mul(product, 0.05)))
            torch._foreach_add_(total, term)
        (mixed,) = torch.autograd.grad(kept, [self.hyper], total)
        self.hyper.grad = -0.05 * mixed
        self.optimizer.step()
        with torch.no_grad():
            self.hyper.clamp_(-12.0, 0.0)

    def tensors(self) -> dict[tuple[str, str], dict[str, Tensor]]:
        state = {k: v for k, v in self.optimizer.state[self.hyper].items() if k != "step"}
        value = {"hyper": self.hyper}
        return {("hyper", "value"): value, ("hyper", "step_state"): state}


def run_trial(
    store: TensorStore, study: optuna.Study, step: OuterStep, mode: str, clock: Clock
) -> None:
    study_id, number = study._study_id, len(study.get_trials(deepcopy=False))
    tensors = step.tensors()
    with clock.time(f"{mode}/whole"):
        trial = study.ask()
        future = None
        if mode == "overlaps":
            with clock.time(f"{mode}/store"):
                future = store.save_all_soon(
                    study_id, trial._trial_id, number, tensors, retain=True
                )
        step.run()
        with clock.time(f"{mode}/store"):
            if mode == "waits":
                store.save_all(study_id, trial._trial_id, number, step.tensors(), retain=True)
            if future is not None:
                future.result()
        study.tell(trial, 1.0 / (1 + number))


def storing(directory: Path, inner_steps: list[int], repeats: int) -> list[str]:
    lines = [
        "| inner steps | storing | step, wall s | step, CPU s | stored for, wall s | share of wall "
        "| stored for, CPU s | share of CPU | whole trial against none stored, wall |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for num_inner_steps in inner_steps:
        clock = Clock()
        step = OuterStep(num_inner_steps)
        step.run()
        studies = {
            mode: optuna.create_study(storage=f"sqlite:///{directory}/{num_inner_steps}-{k}.db")
            for k, mode in enumerate(MODES)
        }
        tensor_stores = {mode: TensorStore.of_study(study) for mode, study in studies.items()}
        for repeat in range(repeats + 3):
            fresh = Clock() if repeat < 3 else clock  # until retention has something to remove
            for k in range(len(MODES)):
                mode = MODES[(k + repeat) % len(MODES)]
                run_trial(tensor_stores[mode], studies[mode], step, mode, fresh)
        whole = {m: clock.wall[f"{m}/whole"] for m in MODES}
        for mode in MODES:
            wall, cpu = _stored(clock.wall, mode, repeats), _stored(clock.cpu, mode, repeats)
            step_wall = [a - b for a, b in zip(whole[mode], wall, strict=True)]
            step_cpu = [a - b for a, b in zip(clock.cpu[f"{mode}/whole"], cpu, strict=True)]
            pairs = zip(whole[mode], whole["nothing stored"], strict=True)
            ratio = _median([a / b for a, b in pairs])
            # Its thread does what "waits" does, but its CPU time cannot be told from the step's.
            on_cpu = f"{_median(cpu):.3f} | {_median(cpu) / _median(step_cpu):.1%}"
            lines.append(
                f"| {num_inner_steps} | {mode} | {_median(step_wall):.3f} | {_median(step_cpu):.3f} "
                f"| {_median(wall):.3f} | {_median(wall) / _median(step_wall):.1%} "
                f"| {'as above | as above' if mode == 'overlaps' else on_cpu} | {ratio:.3f} |"
            )
        for study in studies.values():
            study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    return lines


def _stored(seconds: dict[str, list[float]], mode: str, repeats: int) -> list[float]:
    parts = seconds[f"{mode}/store"]
    each = len(parts) // repeats
    return [sum(parts[i * each : (i + 1) * each]) for i in range(repeats)]


def _median(values: list[float]) -> float:
    return statistics.median(values)


def make_study(url: str, num_trials: int, stored: bool) -> None:
    study = optuna.create_study(study_name="study", storage=url)
    keep_all = Retention(every=1)
    store = TensorStore.of_study(study, retention=keep_all)
    generator = torch.Generator().manual_seed(0)
    for number in range(num_trials):
        trial = study.ask()
        trial.suggest_float("alpha", 1e-6, 1e2, log=True)
        trial.suggest_int("width", 16, 256)
        trial.suggest_categorical("activation", ["relu", "tanh"])
        trial.set_user_attr("test accuracy", 0.9)
        for step in range(5):
            trial.report(1.0 / (1 + step), step)
        if stored:
            moments = torch.randn(2, NUM_HYPERPARAMETERS, generator=generator)
            value = {"hyper": torch.randn(NUM_HYPERPARAMETERS, generator=generator)}
            state = {"exp_avg": moments[0], "exp_avg_sq": moments[1]}
            tensors = {("hyper", "value"): value, ("hyper", "step_state"): state}
            store.save_all(study._study_id, trial._trial_id, number, tensors)
        study.tell(trial, 1.0 / (1 + number))
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]


def get(app: Callable[..., Any], path: str) -> None:
    status: list[str] = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.url_scheme": "http",
    }
    body = b"".join(app(environ, lambda line, headers, error=None: status.append(line)))
    if not status[0].startswith("200"):
        raise RuntimeError(f"{path}: {status[0]}")
    if path.startswith("/api"):
        json.loads(body)


def usability(directory: Path, num_trials: int, repeats: int) -> list[str]:
    import optuna_dashboard

    urls = {kind: f"sqlite:///{directory}/study-{kind}.db" for kind in ("without", "with")}
    for kind, url in urls.items():
        make_study(url, num_trials, kind == "with")

    def opened(use: Callable[[optuna.Study], Any]) -> Callable[[str], None]:
        def task(url: str) -> None:
            storage = optuna.storages.RDBStorage(url)
            use(optuna.load_study(study_name="study", storage=storage))
            storage.engine.dispose()

        return task

    def page(path: str) -> Callable[[str], None]:
        def task(url: str) -> None:
            storage = optuna.storages.RDBStorage(url)  # a new one: the dashboard caches trials
            get(optuna_dashboard.wsgi(storage), path)
            storage.engine.dispose()

        return task

    def process(url: str) -> None:
        code = "import optuna, sys; optuna.load_study(study_name='study', storage=sys.argv[1]).best_trial"
        subprocess.run([sys.executable, "-c", code, url], check=True)

    plots = ("contour", "slice", "parallel_coordinate", "rank", "edf", "timeline")
    if importlib.util.find_spec("plotly") is None:
        plots = ()
    api = "/api/studies"
    tasks: dict[str, tuple[Callable[[str], None], int]] = {
        "open in a new process, best_trial": (process, max(3, repeats // 10)),
        "open": (opened(lambda study: None), repeats),
        "open, `study.best_trial`": (opened(lambda study: study.best_trial), repeats),
        "open, `study.trials`": (opened(lambda study: study.trials), repeats),
        "open, `study.trials_dataframe()`": (opened(lambda s: s.trials_dataframe()), repeats),
        "dashboard, list of studies": (page(api), repeats),
        "dashboard, study (home, analytics, trial list and table)": (page(f"{api}/1"), repeats),
        "dashboard, importances": (page(f"{api}/1/param_importances"), max(3, repeats // 2)),
        "dashboard, CSV": (page("/csv/1"), repeats),
        **{
            f"dashboard, {p} plot": (page(f"{api}/1/plot/{p}"), max(5, repeats // 2)) for p in plots
        },
    }
    lines = [
        "| | without, wall ms | with, wall ms | ratio, wall | ratio, CPU |",
        "|---|---|---|---|---|",
    ]
    for name, (task, times) in tasks.items():
        clock = Clock()
        for url in urls.values():
            task(url)
        for repeat in range(times):
            for kind in sorted(urls, reverse=bool(repeat % 2)):
                with clock.time(kind):
                    task(urls[kind])
        wall = {k: _median(v) for k, v in clock.wall.items()}
        cpu = {k: _median(v) for k, v in clock.cpu.items()}
        shown = "-" if task is process else f"{cpu['with'] / cpu['without']:.3f}"
        lines.append(
            f"| {name} | {1e3 * wall['without']:.1f} | {1e3 * wall['with']:.1f} "
            f"| {wall['with'] / wall['without']:.3f} | {shown} |"
        )
    sizes = {k: (directory / f"study-{k}.db").stat().st_size / 1e6 for k in urls}
    lines.append("")
    lines.append(
        f"{num_trials} trials; {sizes['without']:.1f} MB without, {sizes['with']:.0f} MB with."
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--repeats", type=int, default=12, help="outer steps of each kind")
    parser.add_argument("--path-inner-steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--path-repeats", type=int, default=8, help="of pairs, at 20 inner steps")
    parser.add_argument("--usability-repeats", type=int, default=30)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--directory", help="where the databases go (default: a temporary one)")
    results = Path(__file__).with_name("results") / "storage_cost.md"
    parser.add_argument("--output", type=Path, default=results)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]  # of all processes of the machine
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        cost = storing(Path(name), arguments.inner_steps, arguments.repeats)
        real = paths(Path(name), arguments.path_inner_steps, arguments.path_repeats)
        use = usability(Path(name), arguments.trials, arguments.usability_repeats)
    command = shlex.join(["python", "benchmarks/storage_cost.py", *sys.argv[1:]])
    text = "\n".join(
        [
            "# What storing a million hyperparameters costs",
            "",
            f"`{command}` with torch {torch.__version__} ({arguments.threads} threads of "
            f"{os.cpu_count()} cores, load average {load:.1f} at the start), optuna "
            f"{optuna.__version__}. Medians of one run, kinds alternating. What is compared: the docstring of the script.",
            "",
            f"## One outer step (MLP {'-'.join(map(str, SIZES))}, batch {BATCH}, K = {NUM_PRODUCTS})",
            "",
            *cost,
            "",
            "## Where the library stores by itself",
            "",
            *real,
            "",
            "## The study with its tensors, beside the same study without",
            "",
            *use,
            "",
        ]
    )
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)


if __name__ == "__main__":
    main()
