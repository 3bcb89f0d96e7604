"""TorchOpt 0.7: ``MetaSGD``, the differentiable optimizer of its documentation for meta-learning."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import torch
import torchopt
from torch import Tensor, nn
from torch_task import TorchTask


class Weights(nn.Module):
    """The inner parameters as a module; TorchOpt replaces them by tensors with a graph."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {k: k.replace(".", "_") for k in tensors}
        for k, v in tensors.items():
            self.register_parameter(self.names[k], nn.Parameter(v.clone()))

    def forward(self) -> dict[str, Tensor]:
        return {k: getattr(self, name) for k, name in self.names.items()}


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    if solver != "descent":
        raise SystemExit("gradient descent only")
    t = TorchTask(task, options)

    def hypergradient() -> measure.Arrays:
        _, lam = t.leaves()
        module = Weights(t.inner)
        descent = torchopt.MetaSGD(module, lr=t.alpha)
        for _ in range(t.products):
            descent.step(t.inner_objective(module(), lam, t.train))
        loss = t.outer_objective(module(), lam, t.valid)
        return dict(zip(lam, torch.autograd.grad(loss, tuple(lam.values())), strict=True))

    return t.gradient, hypergradient


if __name__ == "__main__":
    measure.main(build)
