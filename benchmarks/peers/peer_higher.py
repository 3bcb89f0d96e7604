"""higher 0.2.1: no implicit differentiation, so ``K + 1`` unrolled gradient steps from the inner solution.

At a stationary point that is the Neumann series with ``K`` products, at the price of a tape.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import higher
import measure
import torch
from torch import Tensor, nn
from torch_task import TorchTask


class Weights(nn.Module):
    """The inner parameters as a module, which is what higher patches."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(v.clone()) for v in tensors.values()])

    def forward(self) -> list[Tensor]:
        return list(self.weights)


def unrolling(t: TorchTask, num_steps: int) -> Callable[[], measure.Arrays]:
    """The hypergradient through so many steps of gradient descent."""
    names = tuple(t.inner)
    module = Weights(t.inner)
    descent = torch.optim.SGD(module.parameters(), lr=t.alpha)

    def hypergradient() -> measure.Arrays:
        _, lam = t.leaves()
        with higher.innerloop_ctx(module, descent) as (functional, differentiable):
            for _ in range(num_steps):
                w = dict(zip(names, functional(), strict=True))
                differentiable.step(t.inner_objective(w, lam, t.train))
            w = dict(zip(names, functional(), strict=True))
            loss = t.outer_objective(w, lam, t.valid)
            found = torch.autograd.grad(loss, tuple(lam.values()))
        return dict(zip(lam, found, strict=True))

    return hypergradient


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    if solver != "neumann":
        raise SystemExit("higher unrolls; it has no CG")
    t = TorchTask(task, options)
    return t.gradient, unrolling(t, t.products + 1)


if __name__ == "__main__":
    measure.main(build)
