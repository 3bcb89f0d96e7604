"""Checkpoints of a long run, in the tensor store of its trial's study."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
import torch

from ._typing import Params

if TYPE_CHECKING:
    from .stores import TensorStore

_NUMBERS = "numbers.json"


@dataclass(frozen=True)
class Checkpoints:
    """Saves replace each other, and only when the new one is whole.

    Args:
        trial: A running trial.
        store: Where its tensors go.
        name: Of the run within the trial.
    """

    trial: optuna.Trial
    store: TensorStore
    name: str

    @classmethod
    def of_trial(cls, trial: optuna.Trial, name: str) -> Checkpoints:
        """The checkpoints of a trial, in its own tensor store or its study's default one."""
        from .stores import TensorStore

        store = getattr(trial, "tensor_store", None)
        return cls(trial, TensorStore.of_study(trial.study) if store is None else store, name)

    def save(self, step: int, tensors: Params, numbers: dict[str, Any]) -> None:
        """Store a state: tensors bit for bit, and JSON numbers (``repr`` floats, so bit for bit too)."""
        encoded = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)
        self.store.save(
            self.trial.study._study_id,
            self.trial._trial_id,
            self.name,
            "checkpoint",
            step,
            {**tensors, _NUMBERS: encoded},
        )

    def load(self) -> tuple[Params, dict[str, Any]] | None:
        """The newest state, or ``None`` where there is none."""
        frozen = self.trial.study._storage.get_trial(self.trial._trial_id)
        pointers = self.store.pointers(frozen, name=self.name, role="checkpoint")
        if not pointers:
            return None
        tensors = self.store.load(max(pointers, key=lambda p: p.step))
        numbers = json.loads(bytes(tensors.pop(_NUMBERS).numpy()))
        return tensors, numbers
