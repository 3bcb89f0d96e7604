"""higher 0.2.1: ``innerloop_ctx`` around a module whose weights are the inner parameters."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import higher
import measure
import torch
from peer_higher import Weights
from torch_task import TorchTask


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    if solver != "descent":
        raise SystemExit("gradient descent only")
    t = TorchTask(task, options)
    names = tuple(t.inner)
    module = Weights(t.inner)
    descent = torch.optim.SGD(module.parameters(), lr=t.alpha)

    def hypergradient() -> measure.Arrays:
        _, lam = t.leaves()
        with higher.innerloop_ctx(module, descent) as (functional, differentiable):
            for _ in range(t.products):
                w = dict(zip(names, functional(), strict=True))
                differentiable.step(t.inner_objective(w, lam, t.train))
            w = dict(zip(names, functional(), strict=True))
            found = torch.autograd.grad(t.outer_objective(w, lam, t.valid), tuple(lam.values()))
        return dict(zip(lam, found, strict=True))

    return t.gradient, hypergradient


if __name__ == "__main__":
    measure.main(build)
