"""TorchOpt 0.7: ``torchopt.diff.implicit.custom_root`` with its linear solvers."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import torch
import torchopt
from torch import Tensor
from torch_task import TorchTask


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    t = TorchTask(task, options)
    names = tuple(t.inner)
    slope = torch.func.grad(
        lambda w, lam: t.inner_objective(
            dict(zip(names, w, strict=True)), dict(zip(names, lam, strict=True)), t.train
        )
    )
    if solver == "cg":
        solve = torchopt.linear_solve.solve_cg(maxiter=t.products, rtol=0.0, atol=0.0)
    else:
        solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=t.products, alpha=t.alpha)

    @torchopt.diff.implicit.custom_root(slope, argnums=1, solve=solve)
    def solution(w: tuple[Tensor, ...], lam: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return w

    def hypergradient() -> measure.Arrays:
        w, lam = t.leaves()
        at = dict(zip(names, solution(tuple(w.values()), tuple(lam.values())), strict=True))
        loss = t.outer_objective(at, lam, t.valid)
        return dict(zip(names, torch.autograd.grad(loss, tuple(lam.values())), strict=True))

    return t.gradient, hypergradient


if __name__ == "__main__":
    measure.main(build)
