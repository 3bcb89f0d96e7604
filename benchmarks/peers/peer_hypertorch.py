"""hypertorch (prolearner/hypertorch): ``CG`` and ``neumann`` on the fixed-point map of gradient descent.

It is not on PyPI (the ``hypertorch`` there is another project), and its package is called
``hypergrad`` as moskomule's is: give the path of a checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import measure
import torch
from torch import Tensor
from torch_task import TorchTask

Tensors = list[Tensor]


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    sys.path.insert(0, options.checkout)
    from hypergrad.hypergradients import CG, neumann

    t = TorchTask(task, options)
    names = tuple(t.inner)

    def fixed_point_map(w: Tensors, lam: Tensors) -> Tensors:
        loss = t.inner_objective(
            dict(zip(names, w, strict=True)), dict(zip(names, lam, strict=True)), t.train
        )
        slope = torch.autograd.grad(loss, w, create_graph=True)
        return [a - t.alpha * s for a, s in zip(w, slope, strict=True)]

    def outer(w: Tensors, lam: Tensors) -> Tensor:
        return t.outer_objective(
            dict(zip(names, w, strict=True)), dict(zip(names, lam, strict=True)), t.valid
        )

    def hypergradient() -> measure.Arrays:
        w, lam = (list(part.values()) for part in t.leaves())
        method = CG if solver == "cg" else neumann
        found = method(w, lam, t.products, fixed_point_map, outer, tol=0.0, set_grad=False)
        return dict(zip(names, found, strict=True))

    return t.gradient, hypergradient


if __name__ == "__main__":
    measure.main(build, lambda parser: parser.add_argument("--checkout", required=True))
