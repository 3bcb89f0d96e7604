"""A long run inside a trial that is cut off at a step: by an exception, or with its whole process."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor

import optuna_hypergrad as ohg

NUM_STEPS = 8


class CutOffError(Exception):
    """The run ends here; what it has stored is as it was."""


def problem() -> ohg.BilevelProblem:
    target = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)

    def inner(w: Any, lam: Any, batch: Any) -> Tensor:
        return ((w["w"] - 1.0) ** 2).sum() + (lam["decay"] * w["w"] ** 2).sum()

    def outer(w: Any, lam: Any, batch: Any) -> Tensor:
        return ((w["w"] - target) ** 2).sum()

    return ohg.BilevelProblem(inner, outer)


class _Cutting(ohg.Implicit):
    cut_at: int | None
    die: bool
    seen: list[int]

    def estimate(  # type: ignore[override]
        self, problem: Any, solver: Any, w: Any, lam: Any, step: int, state: Any
    ) -> Any:
        if step == self.cut_at:
            if self.die:
                os.kill(os.getpid(), signal.SIGKILL)
            raise CutOffError
        self.seen.append(step)
        return super().estimate(problem, solver, w, lam, step, state)


def long_run(
    trial: Any, cut_at: int | None = None, *, die: bool = False, seen: list[int] | None = None
) -> float:
    """``NUM_STEPS`` outer steps with a checkpoint after each second one.

    Args:
        cut_at: the step that is not done any more.
        die: by SIGKILL, rather than by an error.
        seen: gets the numbers of the steps that are done.
    """
    width = trial.suggest_int("width", 1, 50)
    estimator = _Cutting()
    for name, value in {"cut_at": cut_at, "die": die, "seen": [] if seen is None else seen}.items():
        object.__setattr__(estimator, name, value)
    found = ohg.minimize_bilevel(
        problem(),
        {"w": torch.zeros(5, dtype=torch.float64)},
        {"decay": torch.full((5,), 0.1 + width / 100, dtype=torch.float64)},
        inner_solver=ohg.GradientDescent(step_size=0.1, max_steps=5),
        estimator=estimator,
        bounds={"decay": ohg.Domain(1e-3, 1e2, log=True)},
        num_steps=NUM_STEPS,
        trial=trial,
        checkpoint_every=2,
    )
    return found.outer_value
