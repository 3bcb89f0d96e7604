"""Checkpoints of a long run, in the tensor store of its trial's study."""

from __future__ import annotations

import json
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import optuna
import torch

from . import _optuna
from ._typing import Params
from .stores import Pointer, Retention, TensorStore

_NUMBERS = "numbers.json"
_OLD_CHECKPOINTS_GO = Retention(every=1, transient=frozenset({"checkpoint"}))


class Checkpoints:
    """Saves replace each other, and only when the new one is whole.

    Writing overlaps with the steps that follow; as a context manager it ends only when the last
    checkpoint is whole, or raises why it is not.

    Args:
        trial: A running trial.
        store: Where its tensors go.
        name: Of the run within the trial.
    """

    def __init__(self, trial: optuna.Trial, store: TensorStore, name: str) -> None:
        self.trial, self.store, self.name = trial, store, name
        self._pending: Future[list[Pointer]] | None = None

    @classmethod
    def of_trial(cls, trial: optuna.Trial, name: str) -> Checkpoints:
        """The checkpoints of a trial, in its own tensor store or its study's default one."""
        store = getattr(trial, "tensor_store", None)
        return cls(trial, TensorStore.of_study(trial.study) if store is None else store, name)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wait()

    def save(self, step: int, tensors: Params, numbers: dict[str, Any]) -> None:
        """Store a state: tensors bit for bit, and JSON numbers (``repr`` floats, so bit for bit too)."""
        encoded = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)
        self._wait()
        self._pending = self.store.save_all_soon(
            _optuna.study_id_of(self.trial.study),
            _optuna.trial_id_of(self.trial),
            step,
            {(self.name, "checkpoint"): {**tensors, _NUMBERS: encoded}},
        )

    def save_values(self, step: int, values: Params) -> None:
        """Store the hyperparameters that the run ended with, where ``load_tensors`` finds them."""
        self._wait()
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

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self) -> tuple[Params, dict[str, Any]] | None:
        """The newest state, or ``None`` where there is none."""
        frozen = _optuna.current(self.trial)
        pointers = self.store.pointers(frozen, name=self.name, role="checkpoint")
        if not pointers:
            return None
        tensors = self.store.load(max(pointers, key=lambda p: p.step))
        numbers = json.loads(bytes(tensors.pop(_NUMBERS).numpy()))
        return tensors, numbers
