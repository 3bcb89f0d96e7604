"""optuna_hypergrad: ``hypergradient(...)`` with the explicit estimators, checks and statistics included."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch_task import MOMENTUM, TorchTask

import optuna_hypergrad as ohg

DIRECTIONS = 8


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    t = TorchTask(task, options)
    problem = ohg.BilevelProblem(
        t.inner_objective, t.outer_objective, lambda step: t.train, lambda step: t.valid
    )
    estimator = {
        "whole tape": ohg.Unroll(recompute="never"),
        "default": ohg.Unroll(),
        "100 MB": ohg.Unroll(memory_budget=100e6),
        "compiled": ohg.Unroll(recompute="never", compile=True),
        "compiled, 300 MB": ohg.Unroll(memory_budget=300e6, compile=True),
        "compiled, 100 MB": ohg.Unroll(memory_budget=100e6, compile=True),
        "tree": ohg.Unroll(recompute="tree"),
        "directions": ohg.ForwardGradient(DIRECTIONS, width=DIRECTIONS, memory_budget=2e9),
        "directions, compiled": ohg.ForwardGradient(
            DIRECTIONS, width=DIRECTIONS, memory_budget=2e9, compile=True
        ),
        "reversible": ohg.Reversible(),
        "forward": ohg.ForwardMode(),
    }[options.way]
    steps: dict[str, Any] = {"step_size": t.alpha, "max_steps": t.products}
    outer: dict[str, torch.Tensor] = t.outer
    momentum: float | str = MOMENTUM
    if options.way == "forward":  # a few hyperparameters, in place of a decay per weight
        outer = {"lr": torch.tensor(t.alpha), "momentum": torch.tensor(MOMENTUM)}
        problem = ohg.BilevelProblem(
            lambda w, lam, batch: t.inner_objective(w, t.outer, batch),
            lambda w, lam, batch: t.outer_objective(w, t.outer, batch),
            lambda step: t.train,
            lambda step: t.valid,
        )
        steps["step_size"], momentum = "lr", "momentum"
    inner_solver = (
        ohg.GradientDescent(**steps)
        if solver == "descent"
        else ohg.HeavyBall(**steps, momentum=momentum)
    )

    def hypergradient() -> measure.Arrays:
        return ohg.hypergradient(
            problem, t.inner, outer, estimator=estimator, inner_solver=inner_solver
        ).value

    return t.gradient, hypergradient


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--way", default="default")


if __name__ == "__main__":
    measure.main(build, extend)
