"""Summaries of studies as lines for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._terminal import Column, fit, plain, table, width
from .stores import Pointer
from .stores._encoding import TensorSpec
from .studies.inspection import Presence, StudySummary, TensorSummary, TrajectorySummary

_MOST_ROWS = 40

_STUDIES = (
    Column("study", least=12),
    Column("trials", right=True, least=4),
    Column("complete", right=True, least=5),
    Column("running", right=True, least=4),
    Column("failed", right=True, least=5),
    Column("trajectories", right=True, least=5),
    Column("best", right=True),
    Column("blobs", right=True),
    Column("MB", right=True),
)
_TRAJECTORIES = (
    Column("id", right=True),
    Column("start"),
    Column("steps", right=True),
    Column("best", right=True),
    Column("in trial", right=True, least=6),
    Column("setting", least=12),
    Column("state", least=12),
)
_TENSORS = (
    Column("name", least=12),
    Column("role"),
    Column("trial", right=True),
    Column("step", right=True),
    Column("tensors", least=12),
    Column("MB", right=True),
    Column("state"),
)


def overview(summaries: Sequence[StudySummary], stored: Mapping[str, int]) -> Iterator[str]:
    """One line for each study."""
    if not summaries:
        yield "There are no studies in this storage."
        return
    rows = [
        (
            s.name,
            str(sum(s.trials.values())),
            str(s.trials["complete"]),
            str(s.trials["running"]),
            str(s.trials["fail"]),
            str(len(s.trajectories)),
            _number(s.best_value),
            str(len(s.blobs)),
            _megabytes(sum(s.blobs.values())),
        )
        for s in summaries
    ]
    yield from table(_STUDIES, rows, indent="")
    for s in summaries:
        yield from (f"Damaged: {fit(plain(s.name), 40).rstrip()}: {p}" for p in s.problems)
    yield f"Stored in all: {_blobs(stored)}. One of them: --study NAME."


def study_at_a_glance(
    summary: StudySummary, stored: Mapping[str, int], every_tensor: bool
) -> Iterator[str]:
    """Its trials, trajectories and tensors.

    Args:
        stored: Size of everything in the store.
        every_tensor: Also those that retention has removed.
    """
    yield from _facts(summary)
    yield ""
    yield from _trajectories(summary.trajectories)
    yield ""
    yield from _tensors(summary.tensors, every_tensor)
    yield ""
    yield f"Stored: {_blobs(summary.blobs)}; by all studies here, {_blobs(stored)}."
    yield from (f"Damaged: {problem}" for problem in summary.problems)


def _facts(summary: StudySummary) -> Iterator[str]:
    total = sum(summary.trials.values())
    states = ", ".join(f"{n} {_STATES[state]}" for state, n in summary.trials.items() if n)
    facts = {
        "Study": plain(summary.name),
        "Direction": ", ".join(summary.directions),
        "Trials": f"{total}: {states}" if total else "none yet",
    }
    if summary.best_trial is not None:
        facts["Best"] = f"{_number(summary.best_value)}, trial {summary.best_trial}"
    for title, text in facts.items():
        yield f"{title:10} {fit(text, width() - 11).rstrip()}"


_STATES = {
    "running": "running",
    "complete": "complete",
    "pruned": "pruned",
    "fail": "failed",
    "waiting": "waiting",
}


def _trajectories(trajectories: Sequence[TrajectorySummary]) -> Iterator[str]:
    if not trajectories:
        yield "No trajectories: no trial has had a hypergradient."
        return
    yield f"Trajectories: {len(trajectories)}"
    rows = [
        (
            str(t.id),
            t.source,
            str(t.steps),
            _number(t.best_value),
            "" if t.best_trial is None else str(t.best_trial),
            ", ".join(f"{n}={v}" for n, v in t.setting.items()),
            t.state,
        )
        for t in trajectories
    ]
    yield from table(_TRAJECTORIES, rows)


def _tensors(tensors: Sequence[TensorSummary], every_one: bool) -> Iterator[str]:
    if not tensors:
        yield "No tensors: no trial points to any."
        return
    count = Counter(t.presence for t in tensors)
    words: dict[Presence, str] = {
        "stored": "stored",
        "removed": "removed by retention",
        "missing": "missing",
    }
    yield "Tensors: " + ", ".join(f"{count[p]} {w}" for p, w in words.items() if count[p])
    shown = [t for t in tensors if every_one or t.presence != "removed"]
    if not every_one:
        shown = shown[-_MOST_ROWS:]
    rows = [
        (
            t.pointer.name,
            t.pointer.role,
            str(t.trial),
            str(t.pointer.step),
            _shapes(t.pointer),
            _megabytes(t.pointer.size),
            t.presence,
        )
        for t in shown
    ]
    if rows:
        yield from table(_TENSORS, rows)
    if len(shown) < len(tensors):
        yield f"  and {len(tensors) - len(shown)} more: --all"


def _shapes(pointer: Pointer) -> str:
    """One tensor in full, several in short."""
    if pointer.tensors is None:
        return "very many"
    if len(pointer.tensors) == 1:
        (spec,) = pointer.tensors
        return f"{_torch_name(spec)} {list(spec.shape)}"
    numbers = sum(math.prod(spec.shape) for spec in pointer.tensors)
    dtypes = ", ".join(sorted({_torch_name(spec) for spec in pointer.tensors}))
    return f"{len(pointer.tensors)} tensors, {numbers:,} entries, {dtypes}"


def _torch_name(spec: TensorSpec) -> str:
    return str(spec.torch_dtype).removeprefix("torch.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value + 0.0:.6g}"  # not -0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f}" if size >= 1000 or not size else "<0.001"


def _blobs(blobs: Mapping[str, int]) -> str:
    count = "1 blob" if len(blobs) == 1 else f"{len(blobs)} blobs"
    return f"{count}, {sum(blobs.values()) / 1e6:.3f} MB"


def to_json(summary: StudySummary) -> dict[str, Any]:
    """Everything, with names as they are; ``null`` where a number is not finite."""
    return {
        "study": summary.name,
        "directions": list(summary.directions),
        "trials": summary.trials,
        "best": _best_json(summary.best_value, summary.best_trial),
        "trajectories": [_trajectory_json(t) for t in summary.trajectories],
        "tensors": [_tensor_json(t) for t in summary.tensors],
        "blobs": len(summary.blobs),
        "num_bytes": sum(summary.blobs.values()),
        "problems": list(summary.problems),
    }


def _trajectory_json(trajectory: TrajectorySummary) -> dict[str, Any]:
    return {
        "id": trajectory.id,
        "setting": {n: _finite(v) for n, v in trajectory.setting.items()},
        "source": trajectory.source,
        "start": {n: _finite(v) for n, v in trajectory.start.items()},
        "steps": trajectory.steps,
        "best": _best_json(trajectory.best_value, trajectory.best_trial),
        "stop": trajectory.stop,
        "workers": [dataclasses.asdict(w) for w in trajectory.workers],
    }


def _tensor_json(tensor: TensorSummary) -> dict[str, Any]:
    pointer = tensor.pointer
    specs = pointer.tensors
    return {
        "name": pointer.name,
        "role": pointer.role,
        "trial": tensor.trial,
        "step": pointer.step,
        "num_bytes": pointer.size,
        "state": tensor.presence,
        "blob": pointer.blob,
        "tensors": None
        if specs is None
        else [{"name": s.name, "dtype": _torch_name(s), "shape": list(s.shape)} for s in specs],
    }


def _best_json(value: float | None, trial: int | None) -> dict[str, Any] | None:
    return None if trial is None else {"value": _finite(value), "trial": trial}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
