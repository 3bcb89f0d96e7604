"""A hyperparameter that is a tensor, or a dict of them, as the figures want it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import optuna
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial
from torch import Tensor

from .. import _optuna
from .._errors import HyperparameterError, MissingTensorError
from .._words import listed, nearest, shortened
from ..stores import TensorStore
from ..stores._pointer import pointers_in
from ..studies.points import Definition
from ..studies.tensors import load_tensors, store_of
from ._curves import ledger_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Source: TypeAlias = "Study | optuna.Trial | FrozenTrial | Tensor | Array | Mapping[str, Any]"
"""A study (its best trial), a trial, or the values themselves."""

_DECADES = 100.0


@dataclass(frozen=True)
class Values:
    """One hyperparameter.

    Args:
        name: In titles; empty where values were given without one.
        entries: Its tensors by key; ``""`` for a single one.
        log: Whether it is drawn on a logarithmic axis.
        origin: The trial, in words; empty where values were given.
    """

    name: str
    entries: dict[str, Array]
    log: bool
    origin: str = ""

    @property
    def described(self) -> str:
        """In a title: its name, where it comes from, and how many numbers it is."""
        count = "1 entry" if self.size == 1 else f"{self.size:,} entries"
        told = f"{self.origin}, {count}" if self.origin else count
        return f"{shortened(self.name, 44) or 'values'} ({told})"

    @property
    def axis(self) -> str:
        """On an axis."""
        return shortened(self.name, 44) or "Value"

    @property
    def size(self) -> int:
        return sum(a.size for a in self.entries.values())

    @property
    def flat(self) -> Array:
        """All numbers, in order."""
        return np.concatenate([a.reshape(-1) for a in self.entries.values()] or [np.zeros(0)])

    def label(self, index: int) -> str:
        """The name of the entry at ``index`` of ``flat``: ``layer.weight[3, 5]``."""
        for key, array in self.entries.items():
            if index < array.size:
                place = [str(int(i)) for i in np.unravel_index(index, array.shape)]
                return f"{key or self.name}[{', '.join(place)}]" if place else key or self.name
            index -= array.size
        raise IndexError(index)


def read_values(
    source: Source,
    name: str | None,
    log: bool | None,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
    guess: bool = True,
) -> Values | None:
    """A hyperparameter out of a study, a trial, or values as they are.

    Args:
        name: ``None`` for the largest; ``name/entry`` for one entry of a dict.
        log: ``None`` for as it was suggested; where nobody knows, and ``guess`` is set, by its numbers.

    Returns:
        ``None``, after a warning, for a study in which no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter, or it is not in the store (any more).
    """
    if isinstance(source, Study):
        study = source
    elif isinstance(source, optuna.Trial):
        study = source.study
    elif not isinstance(source, FrozenTrial):
        return _given(source, name, log, guess)
    if study is not None and not has_tensors(study):
        return None
    found = _loaded(source, name, study, tensor_store)
    assert study is not None  # load_tensors has raised
    trials = _optuna.all_trials(study)
    ledger = ledger_of(study, trials)
    origin = "best trial" if isinstance(source, Study) else f"trial {source.number}"
    values = replace(chosen(found, name, log, ledger.definitions, guess), origin=origin)
    store = store_of(study) if tensor_store is None else tensor_store
    firsts = [trials[number] for number in ledger.trajectories]
    return positive(_as_suggested(values, firsts, store))


def _as_suggested(values: Values, firsts: Iterable[FrozenTrial], store: TensorStore) -> Values:
    """In the order in which a dict was suggested: that of the trials that began trajectories; later ones sort."""
    if len(values.entries) < 2:
        return values
    for trial in firsts:
        for pointer in store.pointers(trial, values.name, "value"):
            keys = [spec.name for spec in pointer.tensors or ()]
            if set(keys) == values.entries.keys():
                return replace(values, entries={k: values.entries[k] for k in keys})
    return values


def has_tensors(study: Study) -> bool:
    """Whether any trial points to values of tensors; a warning says that none does."""
    if any(pointers_in(t.system_attrs, "value") for t in _optuna.all_trials(study)):
        return True
    _optuna.logger.warning(
        f"Study {study.study_name!r} does not have any tensors: no trial that suggested one was completed."
    )
    return False


def _loaded(
    source: Any, name: str | None, study: Study | None, tensor_store: TensorStore | None
) -> dict[str, Any]:
    """What is stored as ``name``, or as what is before one of its slashes."""
    if isinstance(source, Study):
        study = None
    first: MissingTensorError | None = None
    for head in [None] if name is None else heads(name):
        try:
            return load_tensors(source, head, study=study, tensor_store=tensor_store)
        except MissingTensorError as error:
            first = first or error
    assert first is not None
    raise first


def heads(name: str) -> list[str]:
    """What a hyperparameter may be called of which ``name`` is an entry."""
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]


def chosen(
    found: Mapping[str, Any],
    name: str | None,
    log: bool | None,
    definitions: Mapping[str, Definition],
    guess: bool = True,
) -> Values:
    """The hyperparameter that is meant, among those that a trial has."""
    head: str
    if name is None:
        head = max(found, key=lambda n: sum(a.size for a in as_entries(found[n]).values()))
        entries, key = as_entries(found[head]), None
    else:
        head = next(h for h in heads(name) if h in found)
        entries, key = as_entries(found[head]), None
        if name != head:
            key = name[len(head) + 1 :]
            if key not in entries:
                known = [f"{head}/{k}" for k in entries if k]
                raise MissingTensorError(
                    f"Hyperparameter {head!r} has no entry {key!r}; "
                    + (
                        f"it has {listed(known)}{nearest(name, known)}."
                        if known
                        else "it is one tensor."
                    )
                )
            entries = {key: entries[key]}
    if log is None:
        definition = definitions.get(head)
        domains = {} if definition is None else definition.domains
        logs = [domains[k].log for k in entries if k in domains]
        log = all(logs) if logs else guess and spans_decades(entries.values())
    title = head if key is None else f"{head}/{key}"
    return Values(title, entries, log)


def as_entries(value: Any) -> dict[str, Array]:
    if isinstance(value, Mapping):
        return {str(k): as_array(v) for k, v in value.items()}
    return {"": as_array(value)}


def _given(value: Any, name: str | None, log: bool | None, guess: bool) -> Values:
    """Values as they are; ``name`` picks an entry of a dict, if it is one, and is a title otherwise."""
    entries = as_entries(value)
    if name is not None and isinstance(value, Mapping):
        if name not in entries:
            raise HyperparameterError(
                f"There is no {name!r} in what was given; there is "
                f"{listed(list(entries))}{nearest(name, entries)}."
            )
        entries = {name: entries[name]}
    if log is None:
        log = guess and spans_decades(entries.values())
    return positive(Values(name or "", entries, log))


def positive(values: Values) -> Values:
    """Refuse what has no place on the logarithmic axis that was asked for."""
    if values.log and any(a.size and not float(a.min()) > 0 for a in values.entries.values()):
        raise HyperparameterError(
            f"{values.name or 'What was given'!r} has entries that are not above 0, which a logarithmic axis cannot "
            "show: log=False."
        )
    return values


def as_array(value: Any) -> Array:
    """NumPy numbers, in their own precision where NumPy has it.

    Raises:
        HyperparameterError: for anything that is no array of real numbers.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype in (torch.bfloat16, torch.float16) or value.dtype.itemsize == 1:
            value = value.float()
        value = value.numpy()
    try:
        array = np.asarray(value)
        if array.dtype == bool:
            return array.astype(np.float32)
        return array if array.dtype.kind in "fiu" else array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise HyperparameterError(
            f"What is to be drawn is no array of real numbers: {error}. Give a study, a trial, a tensor, or a dict of "
            "tensors."
        ) from None


def spans_decades(arrays: Iterable[Any]) -> bool:
    """Whether numbers are all positive and differ by two orders of magnitude."""
    low, high = math.inf, -math.inf
    for array in map(np.asarray, arrays):
        if array.size:
            low, high = min(low, float(array.min())), max(high, float(array.max()))
    return 0 < low < math.inf and high < math.inf and high >= _DECADES * low


def quantiles(array: Array, at: Sequence[float]) -> list[float]:
    """Of the finite entries; NaN where there are none."""
    flat = array.reshape(-1)
    flat = flat[np.isfinite(flat)]
    if not flat.size:
        return [math.nan] * len(at)
    found = np.quantile(flat.astype(np.float64), at)
    return [float(v) for v in found]
