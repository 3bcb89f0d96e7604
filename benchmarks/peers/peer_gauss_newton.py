"""optuna_hypergrad: ``Implicit`` with CG and ``GaussNewtonPreconditioner``, on the task "sure"."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable

import measure
import torch
from torch import Tensor, nn
from torch_task import TorchTask

import optuna_hypergrad as ohg


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    t = TorchTask(task, options)
    problem = ohg.BilevelProblem(
        t.inner_objective, t.outer_objective, lambda step: t.train, lambda step: t.valid
    )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(3):
        outputs, inputs = t.inner[f"{i}.weight"].shape
        layers[str(i)] = nn.Linear(inputs, outputs, dtype=t.inner["0.weight"].dtype)
        layers[f"tanh{i}"] = nn.Tanh() if i < 2 else nn.Identity()

    def decay(lam: dict[str, Tensor]) -> Tensor:
        return torch.cat([v.exp().flatten() for v in lam.values()]).mean()

    terms = ohg.GaussNewtonPreconditioner(
        nn.Sequential(layers),
        lambda batch: batch[0],
        "cross_entropy",
        lambda batch: batch[1],
        damping=decay,
    )
    estimator = ohg.Implicit(ohg.CG(t.products, 0.0, preconditioner=terms))

    def hypergradient() -> measure.Arrays:
        return ohg.hypergradient(problem, t.inner, t.outer, estimator=estimator).value

    return t.gradient, hypergradient


if __name__ == "__main__":
    measure.main(build)
