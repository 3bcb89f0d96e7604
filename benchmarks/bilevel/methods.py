"""How each method is run in ``cleaning.py``: settings by task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import AbstractHypergradientEstimator
from optuna_hypergrad.inner import AbstractInnerSolver


@dataclass(frozen=True)
class Method:
    """Args:
    estimator, solver: As for ``minimize_bilevel``.
    lr, lr_lambda: Of plain SGD on the weights.
    going_round: Whether batches go round.
    """

    estimator: AbstractHypergradientEstimator
    solver: AbstractInnerSolver
    lr: float
    lr_lambda: Callable[[int], float] | None = None
    going_round: bool = False

    @property
    def optimizer(self) -> functools.partial[torch.optim.Optimizer]:
        return functools.partial(torch.optim.SGD, lr=self.lr)


def methods(kind: str) -> dict[str, Method]:
    """By name."""
    if kind == "softmax":
        return _SOFTMAX
    return {name: replace(method, lr_lambda=_falling_outer) for name, method in _MLP.items()}


def _falling(lam: object, step: int) -> float:
    return 0.1 * (1.0 + step / 100.0) ** -0.5


def _falling_outer(step: int) -> float:
    return float((1.0 + step / 200.0) ** -0.5)


def _at_most(lam: object, step: int) -> float:
    """As low as :func:`_falling` in a tenth of the outer steps."""
    return 0.1 * (1.0 + step / 1000.0) ** -0.5


_one = ohg.GradientDescent(_falling, max_steps=1)
_constant = ohg.GradientDescent(0.03, max_steps=1)
_ten = ohg.GradientDescent(_at_most, max_steps=10)
_SOFTMAX = {
    "SOBA": Method(ohg.SOBA(), _one, 1000.0),
    "MA-SOBA": Method(ohg.MASOBA(theta=0.1), _one, 1000.0),
    "SABA": Method(
        ohg.SABA(num_inner_batches=313, num_outer_batches=79), _constant, 1000.0, going_round=True
    ),
    "BROS": Method(ohg.BROS(rank=0.25, theta=0.1), _one, 1000.0),
    "SAMA": Method(ohg.SAMA(), _one, 1000.0),
    "T1-T2": Method(ohg.T1T2(step_size=0.1), _one, 1000.0),
    "F2SA": Method(ohg.F2SA(), _one, 1000.0),
    "PBGD": Method(ohg.PBGD(step_size=0.05), _one, 1000.0),
    "BOME": Method(ohg.BOME(step_size=0.05, same_batch=False), _one, 1000.0),
    "Implicit, Neumann-5": Method(ohg.Implicit(ohg.Neumann(5, alpha=0.02)), _ten, 1000.0),
    "Implicit, CG-5": Method(ohg.Implicit(ohg.CG(max_steps=5, rtol=0.0)), _ten, 1000.0),
    "Unroll, 10 steps": Method(ohg.Unroll(), _ten, 1000.0),
}


def _falling_y(step: int) -> float:
    return 0.3 * _falling_outer(step)


_quick = ohg.GradientDescent(0.2, max_steps=1)
_quick_falling = ohg.GradientDescent(lambda lam, step: 0.2 * _falling_outer(step), max_steps=1)
_far = ohg.GradientDescent(2.0, max_steps=1)
_quick_ten = ohg.GradientDescent(0.2, max_steps=10)
_momentum = ohg.HeavyBall(0.05, momentum=0.9, max_steps=1)
_v: dict[str, float] = {"step_size": 0.1, "damping": 0.1}
_MLP = {
    "SOBA": Method(ohg.SOBA(**_v), _momentum, 300.0),
    "MA-SOBA": Method(ohg.MASOBA(theta=0.1, **_v), _momentum, 300.0),
    "BROS": Method(ohg.BROS(rank=0.25, theta=0.1, **_v), _quick, 300.0),
    "SAMA": Method(ohg.SAMA(), _quick, 300.0),
    "T1-T2": Method(ohg.T1T2(), _quick, 300.0),
    "F2SA": Method(ohg.F2SA(10.0, returns="penalized"), _quick_falling, 1000.0),
    "PBGD": Method(ohg.PBGD(same_batch=True, returns="penalized"), _quick, 300.0),
    "BOME": Method(
        ohg.BOME(5.0, step_size=_falling_y, barrier_on="gap", returns="penalized"), _far, 600.0
    ),
    "BOME, z": Method(ohg.BOME(5.0, step_size=_falling_y, barrier_on="gap"), _far, 600.0),
    "Implicit, Neumann-5": Method(
        ohg.Implicit(ohg.Neumann(5, alpha=0.1), damping=0.1), _quick_ten, 300.0
    ),
    "Unroll, 10 steps": Method(ohg.Unroll(), _quick_ten, 300.0),
}
