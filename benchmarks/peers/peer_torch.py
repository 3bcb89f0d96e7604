"""Plain torch, as one writes it without a library.

``--way kept``: the double-backward graph is built once and walked for each product.
``--way jvp``: ``torch.func.jvp`` of ``torch.func.grad``, anew for each product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import torch
from torch import Tensor
from torch_task import TorchTask

Vectors = list[Tensor]


def conjugate_gradients(product: Callable[[Vectors], Vectors], b: Vectors, steps: int) -> Vectors:
    x = [torch.zeros_like(v) for v in b]
    r, p = list(b), list(b)
    rr = dot(r, r)
    for _ in range(steps):
        hp = product(p)
        alpha = rr / dot(p, hp)
        x = [a + alpha * c for a, c in zip(x, p, strict=True)]
        r = [a - alpha * c for a, c in zip(r, hp, strict=True)]
        before, rr = rr, dot(r, r)
        p = [a + (rr / before) * c for a, c in zip(r, p, strict=True)]
    return x


def neumann(product: Callable[[Vectors], Vectors], b: Vectors, steps: int, alpha: float) -> Vectors:
    v, total = list(b), list(b)
    for _ in range(steps):
        v = [a - alpha * c for a, c in zip(v, product(v), strict=True)]
        total = [a + c for a, c in zip(total, v, strict=True)]
    return [alpha * t for t in total]


def dot(a: Vectors, b: Vectors) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    t = TorchTask(task, options)

    def solve(product: Callable[[Vectors], Vectors], b: Vectors) -> Vectors:
        if solver == "cg":
            return conjugate_gradients(product, b, t.products)
        return neumann(product, b, t.products, t.alpha)

    def kept() -> measure.Arrays:
        w, lam = t.leaves()
        at, by = list(w.values()), list(lam.values())
        b = torch.autograd.grad(t.outer_objective(w, lam, t.valid), at)
        slope = torch.autograd.grad(t.inner_objective(w, lam, t.train), at, create_graph=True)
        x = solve(lambda v: list(torch.autograd.grad(slope, at, v, retain_graph=True)), list(b))
        return {k: -c for k, c in zip(lam, torch.autograd.grad(slope, by, x), strict=True)}

    def jvp() -> measure.Arrays:
        w, lam = t.inner, t.outer
        b = torch.func.grad(t.outer_objective)(w, lam, t.valid)

        def slope(w: dict[str, Tensor], lam: dict[str, Tensor]) -> dict[str, Tensor]:
            return torch.func.grad(t.inner_objective)(w, lam, t.train)

        def product(v: Vectors) -> Vectors:
            tangent = dict(zip(w, v, strict=True))
            return list(torch.func.jvp(lambda w: slope(w, lam), (w,), (tangent,))[1].values())

        x = solve(product, list(b.values()))
        _, pull = torch.func.vjp(lambda lam: slope(w, lam), lam)
        return {k: -c for k, c in pull(dict(zip(w, x, strict=True)))[0].items()}

    return t.gradient, {"kept": kept, "jvp": jvp}[options.way]


if __name__ == "__main__":
    measure.main(
        build, lambda parser: parser.add_argument("--way", choices=["kept", "jvp"], default="kept")
    )
