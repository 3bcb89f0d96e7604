"""How the entries of a tensor are distributed at each outer step: quantiles, or counts in bins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna, trial_attributes
from .._arguments import check_count, is_number
from .._errors import MissingTensorError
from ..stores import TensorStore
from ..stores._pointer import attribute_key
from ..studies.ledger import Ledger
from ..studies.tensors import (
    best_with_tensors,
    is_stored,
    load_tensors,
    store_of,
    stored_in,
    tensor_steps,
)
from ._curves import finite, is_run, ledger_of, refuse_several_objectives, thinned
from ._tensors import Array, Values, chosen, has_tensors, heads, quantiles

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_BINS = 40
SUMMARY = ("min", *trial_attributes.QUANTILES, "max")
"""The same, as they are called in a summary of a tensor among a trial's user attributes."""

Mode = Literal["quantiles", "histogram"]
_OWNER = "plot_tensor_evolution"


@dataclass(frozen=True)
class EvolutionInfo:
    """What the figure shows.

    Args:
        x: Outer steps of a trajectory; trials, where each is a whole run.
        trials: The trial of each.
        levels: Which quantiles.
        table: One row for each ``x``: the quantiles; empty for a histogram.
        edges: Of the bins, ``(bins + 1,)``; empty for quantiles.
        shares: One row for each ``x``: percent of the entries in each bin.
    """

    name: str = ""
    title: str = "Tensor Evolution"
    axis: str = "Outer step"
    log: bool = False
    x: tuple[int, ...] = ()
    trials: tuple[int, ...] = ()
    levels: tuple[float, ...] = ()
    table: tuple[tuple[float, ...], ...] = ()
    edges: tuple[float, ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()

    def level(self, i: int) -> list[float]:
        return [row[i] for row in self.table]

    @property
    def bands(self) -> list[tuple[int, int]]:
        """Pairs of levels, the outermost first."""
        n = len(self.levels)
        return [(i, n - 1 - i) for i in range(n // 2)]


@dataclass(frozen=True)
class _Places:
    """Where the values of one hyperparameter are.

    Args:
        head: As it was suggested.
        found: The trial of each ``x``.
        stored: Those whose tensors are in the store.
        summaries: Rows for ``QUANTILES`` out of attributes.
    """

    study: Study
    store: TensorStore
    ledger: Ledger
    head: str
    name: str | None
    log: bool | None
    found: dict[int, FrozenTrial]
    stored: list[int]

    def values(self, x: int) -> Values:
        found = load_tensors(self.found[x], self.head, study=self.study, tensor_store=self.store)
        return chosen(found, self.name or self.head, self.log, self.ledger.definitions)

    def summaries(self, values: Values) -> dict[int, list[float]]:
        """Rows for ``QUANTILES`` out of attributes, where the whole is one tensor."""
        if len(values.entries) != 1:
            return {}
        (key,) = values.entries
        flat = f"{self.head}/{key}" if key else self.head
        rows = {
            x: _row(t.user_attrs.get(trial_attributes.SUMMARY_PREFIX + flat))
            for x, t in self.found.items()
        }
        return {x: row for x, row in rows.items() if row is not None}


def read_evolution(
    study: Study,
    name: str | None,
    trajectory: int | None,
    mode: Mode,
    levels: Sequence[float],
    n_steps: int | None,
    log: bool | None,
    tensor_store: TensorStore | None,
) -> EvolutionInfo:
    """What :func:`plot_tensor_evolution` shows."""
    _check(mode, levels, n_steps, trajectory)
    refuse_several_objectives(study)
    if not has_tensors(study):
        return EvolutionInfo()
    store = store_of(study) if tensor_store is None else tensor_store
    trials = _optuna.all_trials(study)
    ledger = ledger_of(study, trials)
    start = _start(study, trials, ledger, trajectory, store)
    places = _places(study, trials, ledger, start, name, log, store)
    last = places.values(places.stored[-1])
    summaries = {}
    if mode == "quantiles" and tuple(levels) == QUANTILES:
        summaries = places.summaries(last)
    known = sorted({*places.stored, *summaries})
    x = [known[i] for i in thinned(len(known), len(known) if n_steps is None else n_steps)]
    if mode == "quantiles":
        rows = [summaries.get(i) or quantiles(places.values(i).flat, levels) for i in x]
        least, edges, shares = min(map(min, rows)), [], []
    else:
        ends = [quantiles(places.values(i).flat, (0.0, 1.0)) for i in x]
        least, most = min(e[0] for e in ends), max(e[1] for e in ends)
        grid = _edges(least, most, last.log and least > 0)
        rows, edges = [], grid.tolist()
        shares = [_shares(places.values(i).flat, grid) for i in x]
    owner = ledger.of_trial(start.number)
    runs = is_run(start)
    what = "runs" if runs or owner is None else f"trajectory {owner.id}"
    count = "1 entry" if last.size == 1 else f"{last.size:,} entries"
    return EvolutionInfo(
        last.axis,
        f"Evolution of {last.axis} ({what}, {count})",
        "Trial" if runs else "Outer step",
        last.log and least > 0,
        tuple(x),
        tuple(places.found[i].number for i in x),
        tuple(levels),
        tuple(map(tuple, rows)),
        tuple(edges),
        tuple(map(tuple, shares)),
    )


def _check(mode: Mode, levels: Sequence[float], n_steps: int | None, trajectory: object) -> None:
    if mode not in ("quantiles", "histogram"):
        raise ValueError(f'{_OWNER} needs mode "quantiles" or "histogram", got {mode!r:.80}.')
    ordered = [float(q) for q in levels if is_number(q) and 0 <= q <= 1]
    if len(ordered) != len(levels) or not ordered or ordered != sorted(set(ordered)):
        raise ValueError(
            f"{_OWNER} needs quantiles in increasing order between 0 and 1, got {levels!r:.80}."
        )
    check_count(_OWNER, "n_steps", n_steps, 1, none=True)
    check_count(_OWNER, "trajectory", trajectory, 0, none=True)


def _start(
    study: Study,
    trials: Sequence[FrozenTrial],
    ledger: Ledger,
    trajectory: int | None,
    store: TensorStore,
) -> FrozenTrial:
    """A trial of the trajectory that is meant."""
    if trajectory is None:
        return best_with_tensors(study, store, stored_in(store))
    if trajectory not in ledger.trajectories:
        known = ", ".join(map(str, list(ledger.trajectories)[:20])) or "none"
        raise MissingTensorError(
            f"Study {study.study_name!r} has no trajectory {trajectory}; those that it has began with trials {known}."
        )
    members = [trials[step.number] for step in ledger.trajectories[trajectory].steps]
    return next((t for t in members if store.pointers(t, None, "value")), members[0])


def _places(
    study: Study,
    trials: Sequence[FrozenTrial],
    ledger: Ledger,
    start: FrozenTrial,
    name: str | None,
    log: bool | None,
    store: TensorStore,
) -> _Places:
    if not store.pointers(start, None, "value"):
        load_tensors(start, name, study=study, tensor_store=store)  # says why there are none
    head = _head(store, start, name)
    if is_run(start):
        key = attribute_key(head, "value")
        found = {t.number: t for t in trials if is_run(t) and key in t.system_attrs}
    else:
        found = tensor_steps(study, start, head, store)
    if not found:
        load_tensors(start, head, study=study, tensor_store=store)  # says what there is
    stored = stored_in(store)
    there = [x for x in sorted(found) if is_stored(store, found[x], head, stored)]
    if not there:
        raise MissingTensorError(
            f"Nothing of {head!r} is left of the trajectory of trial {start.number} of study {study.study_name!r}: the "
            "retention policy has removed it (Retention(newest=, best=, every=))."
        )
    return _Places(study, store, ledger, head, name, log, found, there)


def _head(store: TensorStore, trial: FrozenTrial, name: str | None) -> str:
    """The hyperparameter that is meant; the largest of the trial's where none is named."""
    pointers = store.pointers(trial, None, "value")
    known = {
        p.name: p.size if p.tensors is None else sum(math.prod(s.shape) for s in p.tensors)
        for p in pointers
    }
    if name is None:
        return max(known, key=lambda n: known[n])
    return next((h for h in heads(name) if h in known), name)


def _row(summary: object) -> list[float] | None:
    if not isinstance(summary, Mapping):
        return None
    row = [summary.get(key) for key in SUMMARY]
    return [float(v) for v in row if v is not None] if all(map(finite, row)) else None


def _edges(low: float, high: float, log: bool) -> Array:
    if not low < high:
        width = abs(low) * 1e-3 or 1e-3
        low, high = (low / 1.01, high * 1.01) if log else (low - width, high + width)
    if log:
        edges: Array = np.geomspace(low, high, NUM_BINS + 1)
    else:
        edges = np.linspace(low, high, NUM_BINS + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return edges


def _shares(array: Array, edges: Array) -> list[float]:
    """Percent of the finite entries, by bin."""
    flat = array[np.isfinite(array)]
    counts, _ = np.histogram(flat.astype(np.float64), edges)
    return [float(f"{100.0 * c / max(flat.size, 1):.4g}") for c in counts]
