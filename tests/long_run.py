"""A long run inside a trial that is cut off at a step: by an exception, or with its whole process.

Run as a script, this file begins a run in each of some studies with Optuna's heartbeat, and kills itself when
all of them are at the same step: ``long_run.py CUT_AT SAMPLER URL [SAMPLER URL ...]``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import optuna
import torch
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from torch import Tensor

import optuna_hypergrad as ohg

NUM_STEPS = 8
SAMPLERS: dict[str, Callable[[], BaseSampler]] = {
    "random": lambda: RandomSampler(seed=0),
    "hypergradient": lambda: ohg.HypergradientSampler(seed=0),
}


class CutOffError(Exception):
    """The run ends here; what it has stored is as it was."""


def cut_off() -> None:
    raise CutOffError


def problem() -> ohg.BilevelProblem:
    target = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)

    def inner(w: Any, lam: Any, batch: Any) -> Tensor:
        return ((w["w"] - 1.0) ** 2).sum() + (lam["decay"] * w["w"] ** 2).sum()

    def outer(w: Any, lam: Any, batch: Any) -> Tensor:
        return ((w["w"] - target) ** 2).sum()

    return ohg.BilevelProblem(inner, outer)


class _Cutting(ohg.Implicit):
    cut_at: int | None
    cut: Callable[[], None]
    seen: list[int]

    def estimate(  # type: ignore[override]
        self, problem: Any, solver: Any, w: Any, lam: Any, step: int, state: Any
    ) -> Any:
        if step == self.cut_at:
            self.cut()
        self.seen.append(step)
        return super().estimate(problem, solver, w, lam, step, state)


def long_run(
    trial: Any,
    cut_at: int | None = None,
    cut: Callable[[], None] = cut_off,
    seen: list[int] | None = None,
) -> float:
    """``NUM_STEPS`` outer steps with a checkpoint after each second one.

    Args:
        cut_at: the step that is not done any more.
        cut: what happens there.
        seen: gets the numbers of the steps that are done.
    """
    width = trial.suggest_int("width", 1, 50)
    estimator = _Cutting()
    for name, value in {"cut_at": cut_at, "cut": cut, "seen": [] if seen is None else seen}.items():
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


def study_with_heartbeat(url: str, sampler: str) -> optuna.Study:
    """One that is made or opened; a beat every second, and Optuna's own callback for stale trials."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = RDBStorage(
            url,
            heartbeat_interval=1,
            grace_period=2,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
    return optuna.create_study(
        study_name="s", storage=storage, sampler=SAMPLERS[sampler](), load_if_exists=True
    )


def main() -> None:
    cut_at, *pairs = sys.argv[1:]
    studies = [study_with_heartbeat(u, s) for s, u in zip(pairs[::2], pairs[1::2], strict=True)]
    everybody = threading.Barrier(
        len(studies), action=lambda: os.kill(os.getpid(), signal.SIGKILL), timeout=200
    )

    def run(study: optuna.Study) -> None:
        study.optimize(lambda t: long_run(t, int(cut_at), lambda: bool(everybody.wait())), 1)

    threads = [threading.Thread(target=run, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
