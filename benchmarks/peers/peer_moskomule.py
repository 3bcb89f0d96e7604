"""hypergrad 0.0.1 (the release on PyPI, by moskomule)."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
from hypergrad.approx_hypergrad import conjugate_gradient, neumann
from torch import Tensor
from torch_task import TorchTask

Tensors = tuple[Tensor, ...]


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    t = TorchTask(task, options)
    names = tuple(t.inner)

    def named(tensors: Tensors) -> dict[str, Tensor]:
        return dict(zip(names, tensors, strict=True))

    def inner(w: Tensors, lam: Tensors) -> Tensor:
        return t.inner_objective(named(w), named(lam), t.train)

    def outer(w: Tensors, lam: Tensors) -> Tensor:
        return t.outer_objective(named(w), named(lam), t.valid)

    method, step = (conjugate_gradient, 1.0) if solver == "cg" else (neumann, t.alpha)
    w, lam = tuple(t.inner.values()), tuple(t.outer.values())
    return t.gradient, lambda: named(method(inner, outer, w, lam, t.products, step))


if __name__ == "__main__":
    measure.main(build)
