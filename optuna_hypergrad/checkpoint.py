"""Checkpoints of a long run, in the tensor store of its trial's study."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import optuna
import torch
from optuna.exceptions import StorageInternalError
from optuna.study import Study
from torch import Tensor

from . import _optuna
from ._errors import CorruptTensorError, HyperparameterError, StorageError
from ._typing import Params
from .search_space import Domain
from .stores import Pointer, Retention, TensorStore, set_trial_attribute
from .stores._encoding import check_text

INTERRUPTED = "hypergrad:interrupted"
"""System attribute: whether a run of the trial ended by no fault of its own, and is to be gone on with."""

INTERRUPTIONS = (KeyboardInterrupt, SystemExit, StorageError, StorageInternalError)

_NUMBERS = "numbers.json"
_MAX_NAME_LENGTH = 2_500
_SECOND = " (second slot)"
_OLD_CHECKPOINTS_GO = Retention(every=1, transient=frozenset({"checkpoint"}))


@runtime_checkable
class _HasStore(Protocol):
    """A sampler that says where the tensors of its studies go."""

    def store_of(self, study: Study) -> TensorStore: ...


class Checkpoints:
    """The last two saves of a run. Each replaces the one before the last, and only when it is whole.

    Two, so that a run whose newest checkpoint was damaged goes on from the one before. Writing overlaps
    with the steps that follow; as a context manager it ends only when the last checkpoint is whole, or
    raises why it is not, and tells the trial that follows whether the run was interrupted.

    Args:
        trial: A running trial.
        store: Where its tensors go.
        name: Of the run within the trial.

    Raises:
        HyperparameterError: for a name that cannot be stored.
    """

    def __init__(self, trial: optuna.Trial, store: TensorStore, name: str) -> None:
        _check_name(name)
        self.trial, self.store, self.name = trial, store, name
        self._slots = (name, name + _SECOND)
        self._next = 0
        self._pending: Future[list[Pointer]] | None = None

    @classmethod
    def of_trial(cls, trial: optuna.Trial, name: str) -> Checkpoints:
        """The checkpoints of a trial, in the tensor store of its sampler or its study's default one."""
        sampler = _optuna.find_sampler(trial.study.sampler, _HasStore)
        if sampler is None:
            return cls(trial, TensorStore.of_study(trial.study), name)
        return cls(trial, sampler.store_of(trial.study), name)

    def __enter__(self) -> Checkpoints:
        self._mark(False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except BaseException as failure:
            error = failure
            raise
        finally:
            if isinstance(error, INTERRUPTIONS):
                with suppress(Exception):  # the storage may be what failed
                    self._mark(True)

    def _mark(self, interrupted: bool) -> None:
        """Written at the start too: where there is no room for a row, one can still be changed."""
        storage = _optuna.storage_of(self.trial.study)
        set_trial_attribute(storage, _optuna.trial_id_of(self.trial), INTERRUPTED, interrupted)

    def save(self, step: int, tensors: Params, numbers: dict[str, Any]) -> None:
        """Store a state: tensors bit for bit, and JSON numbers (``repr`` floats, so bit for bit too)."""
        encoded = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)
        self.wait()
        self._pending = self.store.save_all_soon(
            _optuna.study_id_of(self.trial.study),
            _optuna.trial_id_of(self.trial),
            step,
            {(self._slots[self._next], "checkpoint"): {**tensors, _NUMBERS: encoded}},
        )
        self._next = 1 - self._next

    def save_values(self, step: int, values: Params) -> None:
        """Store the hyperparameters that the run ended with, where ``load_tensors`` finds them."""
        self.wait()
        store = TensorStore(
            self.store.artifact_store, _optuna.storage_of(self.trial.study), _OLD_CHECKPOINTS_GO
        )
        store.save_all(
            _optuna.study_id_of(self.trial.study),
            _optuna.trial_id_of(self.trial),
            step,
            {(self.name, "value"): values},
            retain=True,
        )

    def wait(self) -> None:
        """Until the last checkpoint is whole; raises why it is not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self) -> tuple[Params, dict[str, Any]] | None:
        """The newest state that can be read, or ``None`` where none was ever stored.

        Raises:
            CorruptTensorError: naming the rows, if there is one and none can be read.
        """
        frozen = _optuna.current(self.trial)
        found: list[tuple[Pointer, int]] = []
        damage: list[str] = []
        for slot, name in enumerate(self._slots):
            try:
                pointers = self.store.pointers(frozen, name=name, role="checkpoint")
                found += [(pointer, slot) for pointer in pointers]
            except StorageError as error:
                damage.append(str(error))
        for pointer, slot in sorted(found, key=lambda entry: -entry[0].step):
            try:
                state = read_checkpoint(self.store, pointer)
            except StorageError as error:
                damage.append(str(error))
                continue
            if damage:
                _optuna.logger.warning(
                    f"{damage[0]} {self.name!r} in trial {frozen.number} goes on from its other "
                    f"checkpoint, of step {pointer.step}."
                )
            self._next = 1 - slot
            return state
        if damage:
            raise CorruptTensorError(
                f"No checkpoint of {self.name!r} in trial {frozen.number} can be read, so it cannot be "
                f"continued. {' '.join(damage)} Restore a backup, or run it in a new trial."
            )
        return None


def read_checkpoint(store: TensorStore, pointer: Pointer) -> tuple[Params, dict[str, Any]]:
    """What :meth:`Checkpoints.save` stored.

    Raises:
        StorageError: if it is gone, or not what was stored.
    """
    tensors = store.load(pointer)
    try:
        numbers = json.loads(bytes(tensors.pop(_NUMBERS).numpy()))
        if numbers["step"] != pointer.step:
            raise ValueError(f"it says that it is of step {numbers['step']!r}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptTensorError(
            f"What is stored as {pointer} is no checkpoint ({error!r}). Use an earlier trial, or a "
            "backup of the storage."
        ) from error
    return tensors, numbers


def settings_of(
    domains: dict[str, Domain], outer_params: Params, inner_params: Params | None, **others: str
) -> dict[str, str]:
    """What a run that begins must have in common with the checkpoint that it goes on from.

    Args:
        inner_params: Of a cold run, whose every step begins there.
    """
    found = dict(others)
    for k, domain in domains.items():
        unit = "log=True" if domain.log else f"unit={float(domain.scale)}"
        found[f"bounds[{k!r}]"] = f"[{float(domain.low)}, {float(domain.high)}], {unit}"
    found |= {f"outer_params[{k!r}]": _digest(v) for k, v in outer_params.items()}
    return found | {f"inner_params[{k!r}]": _digest(v) for k, v in (inner_params or {}).items()}


def check_same(settings: dict[str, str], saved: dict[str, Any], num_steps: int, name: str) -> None:
    """Refuse a checkpoint that was begun otherwise; one without settings is an older one.

    Raises:
        HyperparameterError: naming what has changed.
    """
    before, step = saved.get("settings"), saved["step"]
    changed = [
        f"{k} (then {str(before[k])[:80]}, now {v})"
        for k, v in settings.items()
        if isinstance(before, dict) and k in before and before[k] != v
    ]
    if num_steps < step:
        changed.append(f"num_steps (now {num_steps})")
    if changed:
        raise HyperparameterError(
            f"The run {name!r} has a checkpoint of outer step {step}, and cannot go on from it, because these "
            f"have changed: {'; '.join(changed[:5])}. Use what it was begun with, or run it under another "
            "name= or in a new trial."
        )


def _digest(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return "sha256 " + hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]


def _check_name(name: str) -> None:
    check_text(name, "name= of the run")
    if len(name) > _MAX_NAME_LENGTH or name.endswith(_SECOND):
        raise HyperparameterError(
            f"name={name[:60]!r} cannot name a run: it must have at most {_MAX_NAME_LENGTH} characters "
            f"and not end with {_SECOND!r}. Rename it."
        )
