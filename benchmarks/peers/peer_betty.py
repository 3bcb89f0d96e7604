"""Betty, the release on PyPI or its repository: its hypergradient routines, called as its ``Problem`` does.

The engine around them (data loaders, optimizers, logging) is left out: only the hypergradient counts.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import measure
import torch
from betty.configs import Config
from betty.hypergradient import get_grads
from torch import Tensor
from torch_task import TorchTask


@dataclass
class Level:
    """The part of ``betty.problems.Problem`` that its hypergradients ask for."""

    tensors: list[Tensor]
    training_step_exec: Callable[[Any], Tensor] | None = None
    config: Config | None = None
    cur_batch: object = None
    paths: list[object] = field(default_factory=list)

    def parameters(self) -> list[Tensor]:
        return self.tensors

    def trainable_parameters(self) -> list[Tensor]:
        return self.tensors


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    t = TorchTask(task, options)
    config = Config(
        type=solver,
        cg_iterations=t.products,
        cg_alpha=1.0,
        neumann_iterations=t.products,
        neumann_alpha=t.alpha,
    )

    newer = "do_sync" in inspect.signature(get_grads).parameters
    settings = {"retain_graph": False} | ({"do_sync": False} if newer else {})

    def hypergradient() -> measure.Arrays:
        w, lam = t.leaves()
        upper = Level(list(lam.values()))
        lower = Level(
            list(w.values()), lambda batch: t.inner_objective(w, lam, batch), config, t.train
        )
        loss = t.outer_objective(w, lam, t.valid)
        found = get_grads(loss, [upper, lower, upper], **settings)
        return dict(zip(lam, found, strict=True))

    return t.gradient, hypergradient


if __name__ == "__main__":
    torch.set_warn_always(False)
    measure.main(build)
