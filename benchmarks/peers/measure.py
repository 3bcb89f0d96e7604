"""What every peer is measured by: CPU time, peak memory and error of one hypergradient. No framework.

A peer's script defines ``build(task, solver, options) -> (gradient, hypergradient)`` and ends with
``measure.main(build)``. ``gradient()`` is one gradient of the inner objective by the inner parameters,
``hypergradient()`` one whole hypergradient as arrays by name. One line of JSON comes out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
Build = Callable[["Task", str, argparse.Namespace], tuple[Callable[[], object], Callable[[], Any]]]

SOLVERS = ("cg", "neumann", "descent", "momentum")
"""What a task may hold references of: two linear solvers, two inner solvers."""

LEAST_SECONDS = 0.02
"""CPU seconds that one timing spans at least, so that the clock's grain and idle threads do not show."""


@dataclass(frozen=True)
class Task:
    """What ``prepare.py`` wrote: the same arrays for every peer.

    Args:
        name: "softmax", "mlp" or "convnet".
        products: ``K``; or how many inner steps are unrolled.
        alpha: Step length of the Neumann series; or of the inner steps.
        train, valid: Inputs and labels.
        inner, outer: ``w`` and ``lam`` by name.
        reference: By solver, the hypergradient in float64.
    """

    name: str
    products: int
    alpha: float
    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    inner: Arrays
    outer: Arrays
    reference: dict[str, Arrays]


def load(path: Path, dtype: str = "float32") -> Task:
    stored = np.load(path)

    def group(prefix: str) -> Arrays:
        return {k[len(prefix) :]: stored[k] for k in stored.files if k.startswith(prefix)}

    return Task(
        path.stem,
        int(stored["products"]),
        float(stored["alpha"]),
        (stored["x_train"].astype(dtype), stored["y_train"]),
        (stored["x_valid"].astype(dtype), stored["y_valid"]),
        {k: v.astype(dtype) for k, v in group("w/").items()},
        {k: v.astype(dtype) for k, v in group("lam/").items()},
        {s: group(f"{s}/") for s in SOLVERS if group(f"{s}/")},
    )


def relative_error(value: Mapping[str, Any], reference: Arrays) -> float:
    apart = sum(float(np.sum((np.asarray(value[k], float) - r) ** 2)) for k, r in reference.items())
    return (apart / sum(float(np.sum(r**2)) for r in reference.values())) ** 0.5


def cost(
    gradient: Callable[[], object], hypergradient: Callable[[], Any], repetitions: int
) -> dict[str, Any]:
    """CPU seconds of both, all threads of this process, interleaved; medians, and that of their ratio."""
    times: dict[str, list[float]] = {"gradient": [], "hypergradient": []}
    calls = {"gradient": gradient, "hypergradient": hypergradient}
    count = {k: max(1, round(LEAST_SECONDS / max(_cpu(f, 3), 1e-6))) for k, f in calls.items()}
    for _ in range(repetitions):
        for name, function in calls.items():
            times[name].append(_cpu(function, count[name]))
    ratios = [h / g for g, h in zip(times["gradient"], times["hypergradient"], strict=True)]
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "gradient_ms": 1e3 * statistics.median(times["gradient"]),
        "hypergradient_ms": 1e3 * statistics.median(times["hypergradient"]),
        "evaluations": statistics.median(ratios),
        "evaluations_quartiles": [quarters[0], quarters[2]],
    }


def peak_megabytes(function: Callable[[], object]) -> float | None:
    """Peak resident memory during one call, above what was resident before it (Linux only).

    The call has been made before, so that what is allocated once (compiled code, thread pools, the
    libraries' own buffers) does not count.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        start = _status("VmRSS")
        function()
        return (_status("VmHWM") - start) / 1024
    except OSError:
        return None


def main(build: Build, extend: Callable[[argparse.ArgumentParser], None] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", type=Path)
    parser.add_argument("solver", choices=SOLVERS)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--memory", action="store_true", help="peak memory only")
    parser.add_argument("--float64", action="store_true", help="the error in float64 only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="other inner steps than the task's")
    if extend is not None:
        extend(parser)
    options = parser.parse_args()
    task = load(options.task, "float64" if options.float64 else "float32")
    if options.steps is not None:
        task = replace(task, products=options.steps, reference={options.solver: {"other steps": 0}})
    gradient, hypergradient = build(task, options.solver, options)
    begun = time.perf_counter()
    value = hypergradient()
    first = time.perf_counter() - begun
    found: dict[str, Any] = {"first_call_seconds": first}
    if (reference := task.reference[options.solver]).keys() <= value.keys():
        found["error"] = relative_error(value, reference)
    if not options.float64:
        del value
        if not options.memory:
            for _ in range(2):
                gradient()
                hypergradient()
            found |= cost(gradient, hypergradient, options.repetitions)
        found["megabytes"] = peak_megabytes(hypergradient)
    print(json.dumps(found))


def _cpu(function: Callable[[], object], count: int) -> float:
    begun = time.process_time()
    for _ in range(count):
        function()
    return (time.process_time() - begun) / count


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(field)
