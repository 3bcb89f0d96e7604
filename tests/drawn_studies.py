"""Small studies for the tests of figures, run once each."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import torch
from optuna.pruners import NopPruner
from optuna.trial import TrialState
from torch import Tensor, nn

import optuna_hypergrad as ohg
from optuna_hypergrad import _optuna

TARGET = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(3, 4)


def new_study(**settings: Any) -> optuna.Study:
    sampler = ohg.HypergradientSampler(seed=0, retention=ohg.Retention(**settings))
    return optuna.create_study(sampler=sampler)


@ohg.differentiable
def with_numbers(trial: Any) -> Tensor:
    width = trial.suggest_int("width", 2, 4)
    x = trial.suggest_float("x", 1e-3, 1e3, log=True)
    y = trial.suggest_float("y", 0.0, 5.0)
    return (x.log() - 1) ** 2 + 0.1 * (y + 1) ** 2 + width


@functools.cache
def numbers() -> optuna.Study:
    """Two floats, one of which ends at its bound; several trajectories."""
    study = new_study()
    study.optimize(with_numbers, n_trials=20)
    return study


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()


@ohg.differentiable
def with_tensors(trial: Any) -> Tensor:
    decay = trial.suggest_tensor("decay", (8, 5), 1e-6, 1e2, log=True, dtype=torch.float64)
    like = dict(network().named_parameters())
    tree = trial.suggest_tensor_like("tree", like, -1.0, 2.0)
    goal = torch.linspace(-9.0, 2.0, 40, dtype=torch.float64).reshape(8, 5)
    loss = 0.1 * (decay.log() - goal).square().mean()
    for i, v in enumerate(tree.values()):
        goals = torch.linspace(0.0, 1.0, v.numel(), dtype=v.dtype).reshape(v.shape) ** 2
        loss = loss + (v - goals - i / 8).square().mean()
    return loss


@functools.cache
def tensors() -> optuna.Study:
    """A tensor in log and a tree like a network; one trajectory, every tensor kept."""
    study = new_study(every=1)
    study.optimize(with_tensors, n_trials=7)
    return study


def bilevel(trial: Any) -> float:
    rate = trial.suggest_float("rate", 0.05, 0.3)
    return ohg.minimize_bilevel(
        ohg.BilevelProblem(
            lambda w, lam, _: (w["w"] - lam["x"]).square().sum(),
            lambda w, lam, _: (w["w"] - TARGET).square().sum(),
        ),
        {"w": torch.zeros_like(TARGET)},
        {"x": torch.zeros_like(TARGET)},
        inner_solver=ohg.GradientDescent(rate, max_steps=2),
        num_steps=9,
        bounds={"x": (-2.0, 2.0)},
        trial=trial,
        final_eval="retrain",
    ).outer_value


def failing(trial: Any) -> float:
    raise ValueError("it fails")


def failed_only() -> optuna.Study:
    study = new_study()
    study.optimize(failing, n_trials=3, catch=ValueError)
    assert {t.state for t in study.trials} == {TrialState.FAIL}
    return study


def running_only() -> optuna.Study:
    study = new_study()
    study.ask()
    return study


def foreign() -> optuna.Study:
    """A study of Optuna's own."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=4)
    return study


def mixed() -> optuna.Study:
    """Random trials, then ours, failed and pruned ones."""
    study = foreign()
    study.sampler = ohg.HypergradientSampler(seed=0)

    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        x = trial.suggest_float("x", 0.0, 1.0)
        if trial.number == 6:
            raise ValueError("it fails")
        if trial.number == 7:
            trial.report(1.0, 0)
            raise optuna.TrialPruned
        return (x - 0.3) ** 2 - 0.1

    study.optimize(objective, n_trials=6, catch=ValueError)
    return study


NOTHING = {
    "empty": lambda: new_study(),
    "failed only": failed_only,
    "running only": running_only,
}


@contextmanager
def told() -> Iterator[list[str]]:
    """Warnings that are logged meanwhile."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, level = Handler(logging.WARNING), _optuna.logger.level
    _optuna.logger.addHandler(handler)
    _optuna.logger.setLevel(logging.WARNING)
    try:
        yield lines
    finally:
        _optuna.logger.removeHandler(handler)
        _optuna.logger.setLevel(level)


@functools.cache
def runs() -> optuna.Study:
    """Bilevel runs inside trials, retrained at their end."""
    sampler = ohg.HypergradientSampler(seed=0)
    study = optuna.create_study(sampler=sampler, pruner=NopPruner())
    study.optimize(bilevel, n_trials=3)
    return study
