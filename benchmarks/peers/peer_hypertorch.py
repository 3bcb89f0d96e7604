"""hypertorch (github.com/prolearner/hypertorch): its ``CG`` and ``neumann`` on one gradient step's map.

The map is ``w -> w - alpha dg/dw``, so CG solves with ``alpha H``; its iterates are those of CG with ``H``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
from hypergrad import hypergradients
from hypergrad.diff_optimizers import GradientDescent
from torch import Tensor
from torch_task import TorchTask


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    t = TorchTask(task, options)
    names = tuple(t.inner)

    def named(tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(names, tensors, strict=True))

    def inner(w: list[Tensor], lam: list[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return t.inner_objective(named(w), named(lam), batch)

    def outer(w: list[Tensor], lam: list[Tensor]) -> Tensor:
        return t.outer_objective(named(w), named(lam), t.valid)

    step = GradientDescent(inner, t.alpha, data_or_iter=t.train)
    method = hypergradients.CG if solver == "cg" else hypergradients.neumann

    def hypergradient() -> measure.Arrays:
        w, lam = t.leaves()
        found = method(
            list(w.values()), list(lam.values()), t.products, step, outer, tol=0.0, set_grad=False
        )
        return named(found)

    return t.gradient, hypergradient


if __name__ == "__main__":
    measure.main(build)
