"""What storing costs where the library itself does it: ``minimize_bilevel``, and the sampler.

The task is that of ``storage_cost.py``: an MLP 784-512-512-10 with batches of 512, and 1,000,000 float32
hyperparameters (a log-decay for each of 669,706 weights, a log-weight for each of 330,294 samples).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, relu

import optuna_hypergrad as ohg
from optuna_hypergrad.checkpoint import Checkpoints
from optuna_hypergrad.hypergradients import Implicit
from optuna_hypergrad.ihvp import Neumann
from optuna_hypergrad.inner import GradientDescent
from optuna_hypergrad.stores import Pointer, TensorStore, tensor_store

NUM_HYPERPARAMETERS = 1_000_000
SIZES = (784, 512, 512, 10)
BATCH = 512
NUM_PRODUCTS = 10
ETA = 0.05
ALPHA = 0.01


class Task:
    """Data, objectives and start."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {
            f"{kind}{k}": shape
            for k, (a, b) in enumerate(pairwise(SIZES))
            for kind, shape in (("w", (b, a)), ("b", (b,)))
        }
        self.start = {
            k: torch.randn(s, generator=generator) * (2 / s[-1]) ** 0.5 * (len(s) > 1)
            for k, s in shapes.items()
        }
        self.splits = [w.numel() for w in self.start.values()]
        self.num_samples = NUM_HYPERPARAMETERS - sum(self.splits)
        self.images = torch.rand(10_000, SIZES[0], generator=generator)
        self.labels = torch.randint(0, SIZES[-1], (10_000,), generator=generator)

    def batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randint(0, self.num_samples, (BATCH,), generator=generator)

    def losses(self, w: dict[str, Tensor], index: Tensor) -> Tensor:
        x = self.images[index % 10_000]
        for k in range(len(SIZES) - 1):
            x = linear(relu(x) if k else x, w[f"w{k}"], w[f"b{k}"])
        return cross_entropy(x, self.labels[index % 10_000], reduction="none")

    def inner(self, w: dict[str, Tensor], lam: dict[str, Tensor], index: Tensor) -> Tensor:
        *decays, samples = lam["hyper"].split([*self.splits, self.num_samples])
        data = (samples[index].sigmoid() * self.losses(w, index)).mean()
        pairs = zip(w.values(), decays, strict=True)
        return data + 0.5 * sum((d.exp().view_as(v) * v.square()).sum() for v, d in pairs)

    def outer(self, w: dict[str, Tensor], lam: dict[str, Tensor], index: Tensor) -> Tensor:
        return self.losses(w, index).mean()


class Meter:
    """Seconds for which callers of the store wait (``wall``), and that its work takes (``cpu``)."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count what happens inside, whichever thread does it."""
        waiting = [(Checkpoints, "save"), (Checkpoints, "save_values"), (Checkpoints, "__exit__")]
        waiting += [(TensorStore, "save_all")]
        working = [(tensor_store, "encode_all"), (TensorStore, "_write"), (Pointer, "digest")]
        with _patched(waiting, self._waits), _patched(working, self._works):
            yield

    def _waits(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before, start = self.wall, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:  # one of these may call another
                self.wall = before + time.perf_counter() - start

        return timed

    def _works(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.cpu += time.thread_time() - start

        return timed


@contextmanager
def _patched(places: list[tuple[Any, str]], wrap: Callable[..., Any]) -> Iterator[None]:
    patches = [patch.object(owner, name, wrap(getattr(owner, name))) for owner, name in places]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


class NothingStored(TensorStore):
    """The same study without its tensors: it goes on from memory."""

    def save_all(self, *args: Any, **kwargs: Any) -> list[Pointer]:
        return []


def bilevel(directory: Path, num_inner: int, num_steps: int, repeats: int) -> list[str]:
    """Whole trials of ``minimize_bilevel``, checkpoint at every outer step against none."""
    task, rows = Task(), []
    problem = ohg.BilevelProblem(task.inner, task.outer, task.batch, task.batch)
    study = optuna.create_study(
        storage=f"sqlite:///{directory}/bilevel-{num_inner}.db", pruner=optuna.pruners.NopPruner()
    )

    def run(every: int) -> tuple[float, float, Meter]:
        meter = Meter()
        wall, cpu = time.perf_counter(), time.process_time()
        with meter.reading():
            trial = study.ask()
            found = ohg.minimize_bilevel(
                problem,
                task.start,
                {"hyper": torch.full((NUM_HYPERPARAMETERS,), -8.0)},
                inner_solver=GradientDescent(step_size=ETA, max_steps=num_inner),
                estimator=Implicit(Neumann(NUM_PRODUCTS, alpha=ALPHA)),
                num_steps=num_steps,
                bounds={"hyper": (-12.0, 0.0)},
                trial=trial,
                checkpoint_every=every,
            )
            study.tell(trial, found.outer_value)
        return time.perf_counter() - wall, time.process_time() - cpu, meter

    run(1)
    for repeat in range(repeats):
        pair = {every: run(every) for every in (sorted((0, 1), reverse=bool(repeat % 2)))}
        (wall0, cpu0, _), (wall1, cpu1, meter) = pair[0], pair[1]
        rows.append(
            [
                wall0 / num_steps,
                cpu0 / num_steps,
                meter.wall / wall0,
                meter.cpu / cpu0,
                wall1 / wall0,
                cpu1 / cpu0,
            ]
        )
    study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    name = f"`minimize_bilevel(checkpoint_every=1)`, {num_steps} outer steps"
    return [_row(num_inner, name, rows)]


def sampler(directory: Path, num_inner: int, optimizer: str, repeats: int) -> list[str]:
    """Trials of a ``@differentiable`` objective, tensors stored in every one against none stored."""
    task, rows = Task(), []

    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        hyper = trial.suggest_tensor("hyper", (NUM_HYPERPARAMETERS,), -12.0, 0.0, init=-8.0)
        w = ohg.solve(
            task.inner,
            task.start,
            {"hyper": hyper},
            solver=GradientDescent(step_size=ETA, max_steps=num_inner),
            estimator=Implicit(Neumann(NUM_PRODUCTS, alpha=ALPHA)),
            inner_batch=task.batch,
        )
        return task.outer(w, {}, task.batch(0))

    studies = []
    for kind in (NothingStored, TensorStore):
        url = f"sqlite:///{directory}/sampler-{optimizer}-{num_inner}-{kind.__name__}.db"
        study = optuna.create_study(storage=url)
        store = kind.of_study(study)
        study.sampler = ohg.HypergradientSampler(optimizer=optimizer, tensor_store=store, seed=0)
        studies.append(study)

    def run(study: optuna.Study) -> tuple[float, float, Meter]:
        meter = Meter()
        wall, cpu = time.perf_counter(), time.process_time()
        with meter.reading():
            study.optimize(objective, n_trials=1)
        return time.perf_counter() - wall, time.process_time() - cpu, meter

    for repeat in range(repeats + 4):  # until retention has something to remove
        order = (0, 1) if repeat % 2 else (1, 0)
        found = {k: run(studies[k]) for k in order}
        (wall0, cpu0, _), (wall1, cpu1, meter) = found[0], found[1]
        if repeat >= 4:
            rows.append(
                [wall0, cpu0, meter.wall / wall0, meter.cpu / cpu0, wall1 / wall0, cpu1 / cpu0]
            )
    for study in studies:
        study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
    return [_row(num_inner, f'sampler, `optimizer="{optimizer}"`, waits', rows)]


def _row(num_inner: int, name: str, rows: list[list[float]]) -> str:
    step, cpu, waited, worked, whole, whole_cpu = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    return (
        f"| {num_inner} | {name} | {step:.3f} | {cpu:.3f} | {waited:.1%} | {worked:.1%} "
        f"| {whole:.3f} | {whole_cpu:.3f} |"
    )


def paths(directory: Path, inner_steps: list[int], repeats: int) -> list[str]:
    """The table: medians of interleaved pairs."""
    lines = [
        "| inner steps | path | step, wall s | step, CPU s | waited, share of wall | worked, share of "
        "CPU | whole trial against none stored, wall | same, CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for num_inner in inner_steps:
        times = max(3, repeats * 20 // num_inner)
        lines += bilevel(directory, num_inner, 8, times)
        for optimizer in ("adam", "auto"):
            lines += sampler(directory, num_inner, optimizer, times)
    return lines
