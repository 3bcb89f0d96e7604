"""A database to be damaged: two studies cut off in the middle, and what they would have come to."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.stores import _opening, rdb
from optuna_hypergrad.studies import HypergradientSampler

STEPS, CUT_OFF_AT = 7, 5
"""Outer steps of the long run; before this one it was cut off."""


class CutOff(Exception):
    """The end of a process that is simulated."""


@ohg.differentiable
def objective(trial: Any) -> Tensor:
    x = trial.suggest_float("x", 1e-3, 1e3, log=True)
    decay = trial.suggest_tensor("decay", (6, 8), 1e-3, 1e2, log=True)
    tree = trial.suggest_tensor_like("tree", {"w": torch.zeros(20), "b": torch.zeros(1)}, -1.0, 1.0)
    slope = torch.linspace(-1.0, 1.0, 48).reshape(6, 8)
    loss = (x.log() - 1) ** 2 + ((decay.log() - slope) ** 2).mean()
    return loss + (tree["w"] - 0.3).pow(2).sum() + tree["b"].sum() ** 2


def sampler(**settings: Any) -> HypergradientSampler:
    return HypergradientSampler(seed=0, **{"lease": None, **settings})


def long_run(trial: optuna.Trial | None, cut_off_at: int = -1) -> ohg.BilevelResult:
    """A bilevel run of ``STEPS`` outer steps with a checkpoint after each."""
    target = torch.linspace(-1.0, 1.0, 30).reshape(5, 6)

    def batch(step: int) -> None:
        if step == cut_off_at:
            raise CutOff

    return ohg.minimize_bilevel(
        ohg.BilevelProblem(
            lambda w, lam, _: ((w["w"] - lam["x"]) ** 2).sum(),
            lambda w, lam, _: ((w["w"] - target) ** 2).sum(),
            outer_batch=batch,
        ),
        {"w": torch.zeros(5, 6)},
        {"x": torch.zeros(5, 6)},
        inner_solver=ohg.GradientDescent(0.25, max_steps=3),
        num_steps=STEPS,
        bounds={"x": (-2.0, 2.0)},
        trial=trial,
        checkpoint_every=1,
    )


class Specimen:
    """The database as it was left: study ``steps`` after four trials, study ``run`` inside its only one.

    Args:
        directory: Where it is made.
    """

    chunk_bytes = 190
    """Small, so that the smallest tensors take several rows."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "specimen.db"
        storage = RDBStorage(f"sqlite:///{self.path}")
        sa.event.listen(storage.engine, "connect", _in_haste)
        storage.engine.dispose()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rdb, "CHUNK_BYTES", self.chunk_bytes)
            self.fill(storage)
        storage.engine.dispose()
        self.end = long_run(None).outer_params["x"]

    def fill(self, storage: RDBStorage) -> None:
        study = optuna.create_study(storage=storage, study_name="steps", sampler=sampler())
        study.optimize(objective, n_trials=4)
        study = optuna.create_study(storage=storage, study_name="run", sampler=RandomSampler(0))
        with contextlib.suppress(CutOff):
            long_run(study.ask(), CUT_OFF_AT)

    @contextlib.contextmanager
    def copy(self, directory: Path) -> Iterator[RDBStorage]:
        """A copy of it, which is gone at the end."""
        path = directory / "copy.db"
        shutil.copyfile(self.path, path)
        with opened(path) as storage:
            yield storage
        path.unlink()


@contextlib.contextmanager
def command_in_haste() -> Iterator[None]:
    """The command line does not ask whether this Optuna knows the tables, which takes it long."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(RDBStorage, skip_compatibility_check=True)
        patch.setattr(_opening, "RDBStorage", quick)
        yield


@contextlib.contextmanager
def opened(path: Path) -> Iterator[RDBStorage]:
    storage = RDBStorage(
        f"sqlite:///{path}", skip_compatibility_check=True, skip_table_creation=True
    )
    sa.event.listen(storage.engine, "connect", _in_haste)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _in_haste(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("PRAGMA journal_mode=MEMORY")


def resume(storage: RDBStorage) -> tuple[optuna.Trial, ohg.BilevelResult]:
    """Go on with the long run, as its trial's next process would."""
    study = optuna.load_study(storage=storage, study_name="run", sampler=RandomSampler(0))
    (running,) = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    trial = optuna.Trial(study, running._trial_id)
    return trial, long_run(trial)


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """What the library's logger says meanwhile, and nobody else hears."""
    logger = logging.getLogger("optuna.hypergradients")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
