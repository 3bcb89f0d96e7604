"""optuna_hypergrad: ``hypergradient(...)`` with ``Implicit``, checks and statistics included."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
from torch_task import TorchTask

import optuna_hypergrad as ohg


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    t = TorchTask(task, options)
    problem = ohg.BilevelProblem(
        t.inner_objective, t.outer_objective, lambda step: t.train, lambda step: t.valid
    )
    linear = (
        ohg.CG(max_steps=t.products, rtol=0.0)
        if solver == "cg"
        else ohg.Neumann(num_steps=t.products, alpha=t.alpha)
    )
    estimator = ohg.Implicit(linear, compile=options.compile)
    descent = None
    if options.inner_steps:
        descent = ohg.GradientDescent(max_steps=options.inner_steps, step_size=t.alpha)

    def hypergradient() -> measure.Arrays:
        found = ohg.hypergradient(
            problem, t.inner, t.outer, estimator=estimator, inner_solver=descent
        )
        if found.stats["num_hvps"] != t.products:
            raise RuntimeError(f"{found.stats['num_hvps']} products, not {t.products}")
        return found.value

    return t.gradient, hypergradient


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--inner-steps", type=int, default=0, help="solve the inner problem too")


if __name__ == "__main__":
    measure.main(build, extend)
