"""Plain torch: the tape of all inner steps, or ``torch.utils.checkpoint`` around each of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch_task import TorchTask, unrolled


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    if solver != "descent":
        raise SystemExit("gradient descent only")
    t = TorchTask(task, options)
    names = tuple(t.inner)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            w = dict(zip(names, tensors, strict=False))
            lam = dict(zip(names, tensors[len(names) :], strict=True))
            loss = t.inner_objective(w, lam, t.train)
            slopes = torch.autograd.grad(loss, tensors[: len(names)], create_graph=True)
            return tuple(v - t.alpha * g for v, g in zip(w.values(), slopes, strict=True))

    def hypergradient() -> measure.Arrays:
        w, lam = t.leaves()
        if options.way == "tape":
            end = unrolled(t.inner_objective, w, lam, t.train, t.products, t.alpha)
        else:
            at = tuple(w.values())
            for _ in range(t.products):
                at = checkpoint(step, *at, *lam.values(), use_reentrant=False)
            end = dict(zip(names, at, strict=True))
        loss = t.outer_objective(end, lam, t.valid)
        return dict(zip(names, torch.autograd.grad(loss, tuple(lam.values())), strict=True))

    return t.gradient, hypergradient


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--way", choices=["tape", "checkpoint"], default="tape")


if __name__ == "__main__":
    measure.main(build, extend)
