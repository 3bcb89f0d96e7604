"""What the scripts of all peers share: the task, and a clock that writes down where a run is."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, relu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from draws import drawn

Params = dict[str, Tensor]
torch.set_num_threads(1)


class OutOfTime(Exception):
    """The budget of the run is used up."""


class Task:
    """The MLP task, and the clock, which starts when it is made."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = torch.load(sys.argv[1])
        self.w: Params = self.given["w"]
        self.lam: Tensor = self.given["lam"]
        self.moments: list[tuple[float, int, int, Params, Tensor]] = []
        self.samples = self.steps = 0
        self.start = time.process_time()

    def batch(self, part: str, step: int) -> Any:
        self.samples += self.given["size"]
        key = (self.given["seed"], 0 if part == "train" else 1)
        return drawn(self.given[part], self.given["size"], key, step)

    def note(self, w: Params, lam: Tensor) -> None:
        """Before each outer step.

        Raises:
            OutOfTime: when the budget is used up; :meth:`save` then.
        """
        seconds, budget = time.process_time() - self.start, self.given["seconds"]
        self.steps += 1
        if seconds >= len(self.moments) * budget / self.given["num"]:
            kept = {k: v.detach().clone() for k, v in w.items()}
            at = seconds, self.steps - 1, self.samples
            self.moments.append((*at, kept, lam.detach().clone()))
        if seconds >= budget:
            raise OutOfTime

    def save(self) -> None:
        torch.save(self.moments, sys.argv[2])


def predict(w: Params, x: Tensor) -> Tensor:
    return linear(relu(linear(x, w["0"], w["0b"])), w["1"], w["1b"])


def inner_objective(w: Params, lam: Tensor, batch: Any) -> Tensor:
    each = cross_entropy(predict(w, batch[0]), batch[1], reduction="none")
    return (lam[batch[2]].sigmoid() * each).mean()


def outer_objective(w: Params, batch: Any) -> Tensor:
    return cross_entropy(predict(w, batch[0]), batch[1])


class Weights(nn.Module):
    """The inner parameters as a module."""

    def __init__(self, tensors: Params) -> None:
        super().__init__()
        self.names = {k: f"w{k}" for k in tensors}
        for k, v in tensors.items():
            self.register_parameter(self.names[k], nn.Parameter(v.clone()))

    def forward(self) -> Params:
        return {k: getattr(self, name) for k, name in self.names.items()}
