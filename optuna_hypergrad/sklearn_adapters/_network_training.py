"""Tuning a network's decays while it trains, with early stopping; then training with them from the beginning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._errors import SolverError
from .._results import Result, Status
from .._typing import Params
from ..gauss_newton import GaussNewton
from ..hypergradients import Implicit
from ..ihvp import CG
from ..inner import Adam, inner_solve
from ..outer import minimize_bilevel
from ._network_problem import Data, Network

_CHECKED_EVERY = 5
"""Outer steps between looks at the validation loss."""

_STRONGER = 100.0
"""Times the first decay is another one to begin with: where samples are few, a weak one fits them before it has grown."""


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast.

    Attributes:
        max_iter: Outer steps at most.
        inner_steps: Steps of training between two of them, and ``burn_in`` before the first.
        step_size, outer_step_size: Of Adam, in the weights and in the (logarithms of) decays.
        num_products: With the curvature, per hypergradient.
        patience: Outer steps without a better validation loss, after which it ends; ``None`` for no end.
        batch_size: ``None`` for all samples.
    """

    max_iter: int
    inner_steps: int
    burn_in: int
    step_size: float
    outer_step_size: float
    num_products: int
    patience: int | None
    batch_size: int | None


@dataclass
class Tuned:
    """What tuning ended with, or has come to.

    Attributes:
        w: The weights now, and the ``best`` ones.
        lam: Hyperparameters of the least loss on the samples that judge.
        least: That loss.
        num_training_steps: Steps of training up to there.
        history: A dict per outer step.
    """

    w: Params
    lam: Params
    best: Params = field(default_factory=dict)
    least: float = math.inf
    num_training_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    trained: int = 0


def tune(
    network: Network,
    parts: tuple[Data, Data, Data, Data],
    decay: float,
    bounds: tuple[float, float],
    sample_weights: bool,
    schedule: Schedule,
    seed: int,
) -> Tuned:
    """One decay first, from two starts where there is an end to each, then everything from the better one, if there is more.

    Args:
        network: With all that is tuned at the end.
        parts: To train on, to take hypergradients of, to judge the hyperparameters by, and all that is held back, which guides
            and judges one decay.
        decay: Of all weights, to begin with; the other start is a hundred times as much.
        bounds: Of decays.
        sample_weights: Whether those of training samples are tuned.
        schedule: How long.
        seed: Of batches.

    Raises:
        SolverError: if training diverges.
    """
    train, guide, judge, held = parts
    tied = replace(network, decay="one")
    starts = {decay, min(_STRONGER * decay, bounds[1])} if schedule.patience else {decay}
    ends = []
    for start in sorted(starts):
        ends.append(Tuned(network.weights(), tied.start(start, None)))
        _descend(tied, (train, held, held), bounds, schedule, seed, ends[-1])
    state = min(ends, key=lambda end: end.least)
    if state.best:
        with torch.no_grad():
            state.least = float(tied.validation_loss(state.best, state.lam, judge))
        state.w, state.trained = state.best, state.num_training_steps
    if network.decay != "one" or sample_weights:
        found = float(state.lam["decay"])
        state.lam = network.start(found, len(train[0]) if sample_weights else None)
        _descend(network, (train, guide, judge), bounds, schedule, seed, state)
    if not math.isfinite(state.least):
        message = "Training a network gave a loss that is not finite: lower learning_rate_init, or scale the data."
        raise SolverError(message, Result(Status.NONFINITE, message))
    return state


def _descend(
    network: Network,
    parts: tuple[Data, Data, Data],
    bounds: tuple[float, float],
    schedule: Schedule,
    seed: int,
    state: Tuned,
) -> None:
    """From where ``state`` is, until the judge sees nothing better."""
    train, guide, judge = parts
    curvature = GaussNewton(network.outputs, network.data_loss, network.penalty)
    estimator = Implicit(
        CG(max_steps=schedule.num_products, rtol=1e-3), damping=1e-3, curvature=curvature
    )
    optimizer = _Continued(schedule.outer_step_size)
    lam, done, since = state.lam, 0, 0
    while done < schedule.max_iter:
        steps = min(_CHECKED_EVERY, schedule.max_iter - done)
        burn_in = 0 if state.trained else schedule.burn_in
        found = minimize_bilevel(
            network.problem(train, guide, schedule.batch_size, seed, state.trained),
            state.w,
            lam,
            inner_solver=Adam(schedule.step_size, max_steps=schedule.inner_steps),
            num_steps=steps,
            estimator=estimator,
            optimizer=optimizer,
            bounds=network.domains(lam, bounds),
            burn_in=burn_in,
        )
        state.trained += burn_in + (steps + 1) * schedule.inner_steps  # with those at the end
        state.w, lam = found.inner_params, found.outer_params
        state.history += found.history
        done, since = done + steps, since + steps
        with torch.no_grad():
            loss = float(network.validation_loss(state.w, lam, judge))
        if loss < state.least:
            state.least, state.lam, state.best, since = loss, lam, state.w, 0
            state.num_training_steps = state.trained
        if schedule.patience is not None and since >= schedule.patience:
            break


def train_anew(
    network: Network, data: Data, lam: Params, schedule: Schedule, num_steps: int, seed: int
) -> Params:
    """From the initial weights, at fixed hyperparameters.

    Raises:
        SolverError: if training diverges.
    """
    found = inner_solve(
        network.problem(data, data, schedule.batch_size, seed),
        Adam(schedule.step_size, max_steps=schedule.inner_steps),
        network.weights(),
        lam,
        num_steps=max(num_steps, 1),
    )
    found.result.raise_if_failed()
    return found.inner_params


class _Continued:
    """A factory of Adam that goes on where its last one was."""

    def __init__(self, lr: float) -> None:
        self._lr = lr
        self._last: torch.optim.Optimizer | None = None

    def __call__(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        optimizer: Any = torch.optim.Adam(params, lr=self._lr)
        if self._last is not None:
            optimizer.load_state_dict(self._last.state_dict())
        self._last = optimizer
        return optimizer  # type: ignore[no-any-return]
