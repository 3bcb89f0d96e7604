"""One trial: one evaluation of the cross-validated loss, with its gradient."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from .._errors import MissingTensorError, StorageError
from .._typing import Params
from ..studies import DifferentiableTrial, load_tensors
from ..studies.events import Claim, Outcome
from ._distributions import suggest
from ._folds import remembered
from ._following import Followed
from ._nested import Freedom
from ._rows import distinct
from ._study import FAILURE

PHASE = "guard:phase"
"""Parameter of a guarded search's trials, ``"tied"`` or ``"free"``."""

DESCENT = "descent"
"""Parameter of the trials of a search of vectors that is not guarded: number of the descent that they are of."""

FIRST = "first"
"""User attribute of the trial with which the first of them begins: where that is, numbers by name."""

LOSS = "followed_loss"
"""User attribute of a trial whose value has a penalty: the loss without it."""


def tied_name(name: str) -> str:
    """Parameter that is all entries of a vector."""
    return f"{name}:tied"


@dataclass(frozen=True)
class Penalty:
    """On the departure from the tied solution."""

    tied: dict[str, float]
    tau: float


class TrialLoss:
    """The objective of a study.

    Args:
        followed: What is followed.
        guarded: Whether vectors are tied first.
        restarted: Whether there are descents from several starts.

    Attributes:
        penalty: Once they are free.
        start: Of the descent that the next trial is of, if it is not where a scan says.
    """

    def __init__(self, followed: Followed, guarded: bool, restarted: bool = False) -> None:
        self.followed, self.guarded, self.restarted = followed, guarded, restarted
        self.start: Mapping[str, float | Tensor] | None = None
        self.penalty: Penalty | None = None
        self._freedoms: OrderedDict[Hashable, Freedom] = OrderedDict()

    def __call__(self, trial: DifferentiableTrial) -> Tensor:
        followed = self.followed
        phase: Literal["tied", "free"] = "free"
        if self.guarded:
            phase = "tied" if self.penalty is None else "free"
            trial.suggest_categorical(PHASE, ["tied", "free"])
        if self.restarted:
            trial.suggest_int(DESCENT, 0, 1_000_000)
        chosen = {
            name: suggest(trial, name, distribution)
            for name, distribution in followed.space.items()
            if name not in followed.floats
        }
        freedom = remembered(
            self._freedoms, tuple(chosen.items()), lambda: followed.freedom(chosen)
        )
        start = self._start(trial, chosen, freedom)
        values: Params = {}
        for name, domain in followed.floats.items():
            at = start.get(name)
            values[name] = _number(trial, name, domain, None if at is None else float(at))
        for name, domain in freedom.vectors.items():
            if phase == "tied":
                at = start.get(name)
                values[name] = _number(
                    trial, tied_name(name), domain, None if at is None else float(at)
                )
            else:
                values[name] = trial.suggest_tensor(
                    name,
                    (freedom.sizes[name],),
                    domain.low,
                    domain.high,
                    log=domain.log,
                    init=start.get(name),
                    dtype=torch.float64,
                )
        loss = followed.cross_validated(chosen, freedom.untied(values))
        if self.penalty is None:
            return loss
        trial.set_user_attr(LOSS, float(loss.detach()))
        departure = freedom.departure(values, self.penalty.tied)
        return loss + 0.5 * self.penalty.tau * departure

    def chosen_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """Hyperparameters of a finished trial that are not differentiated."""
        return {
            n: trial.params[n]
            for n, _ in self.followed.space.items()
            if n not in self.followed.floats
        }

    def tied_of(self, trial: FrozenTrial) -> dict[str, float]:
        """Numbers of a finished, tied trial, those that are all entries of a vector by its name."""
        names = {n: n for n in self.followed.floats}
        names |= {n: tied_name(n) for n in self.followed.vectors.by_name}
        return {n: float(trial.params[p]) for n, p in names.items()}

    def setting_of(self, study: Study, trial: FrozenTrial) -> dict[str, Any] | None:
        """Everything for the estimator; ``None`` if the store has not kept the vectors of the trial."""
        chosen, vectors = self.chosen_of(trial), self.followed.vectors
        found = self.followed.space.decode(chosen)
        found |= {n: float(trial.params[n]) for n in self.followed.floats}
        if not vectors.by_name:
            return found
        if is_tied(trial):
            sizes = self.followed.freedom(chosen).sizes
            tied = {n: float(trial.params[tied_name(n)]) for n in sizes}
            return found | vectors.decoded(
                {n: torch.full((k,), tied[n], dtype=torch.float64) for n, k in sizes.items()}
            )
        try:
            values = load_tensors(trial, study=study)
        except MissingTensorError:
            return None
        return found | vectors.decoded(values)

    def ranked(
        self, study: Study, best: Sequence[FrozenTrial], at_most: int
    ) -> list[tuple[FrozenTrial, dict[str, Any]]]:
        """The best trials with distinct settings; of a guarded search, those that its choice leaves, and the best tied one.

        Values of free trials have their penalty: to rank them by anything else would go around the guard.
        """
        tied = [t for t in best if is_tied(t)]
        free = [t for t in best if not is_tied(t)]
        order = tied if self.guarded and (self.penalty is None or not free) else free
        last = tied[:1] if order is free else []
        settings = ((t, self.setting_of(study, t)) for t in order)
        found = distinct(((t, s) for t, s in settings if s is not None), at_most)
        return found + [(t, s) for t in last if (s := self.setting_of(study, t)) is not None]

    def _start(
        self, trial: DifferentiableTrial, chosen: Mapping[str, Any], freedom: Freedom
    ) -> Mapping[str, float | Tensor]:
        """Where a trajectory begins, if this trial begins one."""
        if self.penalty is not None:
            return self.penalty.tied
        if self.start is not None:
            return self.start
        earlier = self._begun(trial, chosen)
        if earlier is None:
            return {}
        if not earlier:
            found = self.followed.scanned(chosen, freedom)
            if self.restarted:
                trial.set_user_attr(FIRST, found)
            return found
        visited = self._visited(trial, chosen)
        return self.followed.scanned_elsewhere(chosen, freedom, visited, earlier)

    def _begun(self, trial: DifferentiableTrial, chosen: Mapping[str, Any]) -> int | None:
        """Trajectories of this setting that began before this one; ``None`` if this trial goes on with one.

        What was cut off before its start was evaluated has not begun: a search that goes on looks where it would have. Starts
        that other processes are looking for have.
        """
        _ = trial.relative_params  # plans the trial
        trials = trial.study.get_trials(deepcopy=False)[: trial.number + 1]
        claim = Claim.of(trials.pop())
        if claim is not None and (
            claim.parent is not None or claim.source not in ("init", "enqueued")
        ):
            return None
        under = [t for t in trials if self._is_under(t, chosen)]
        if claim is None:
            return sum(not t.state.is_finished() or _has_opened(t) for t in under)
        return sum(map(_has_opened, under))

    def _visited(
        self, trial: DifferentiableTrial, chosen: Mapping[str, Any]
    ) -> list[dict[str, float]]:
        """Points under a setting that have a value, or that other processes look at; of vectors, those that are tied."""
        names = {*self.followed.floats, *map(tied_name, self.followed.vectors.by_name)}
        return [
            self.tied_of(t)
            for t in trial.study.get_trials(deepcopy=False)
            if t.number != trial.number
            and t.state in (TrialState.COMPLETE, TrialState.RUNNING)
            and names <= t.params.keys()
            and self._is_under(t, chosen)
        ]

    def _is_under(self, trial: FrozenTrial, chosen: Mapping[str, Any]) -> bool:
        return all(trial.params.get(n) == v for n, v in chosen.items())


def _has_opened(trial: FrozenTrial) -> bool:
    """Whether a trial is the first of a trajectory, or is about to be, or has failed as such by its own fault."""
    claim = Claim.of(trial)
    if claim is None or claim.parent is not None:
        return False
    return trial.state != TrialState.FAIL or has_failed(trial)


def has_failed(trial: FrozenTrial) -> bool:
    """Whether a trial has failed by its own fault: it was not cut off."""
    if FAILURE in trial.user_attrs:
        return True
    with suppress(StorageError):  # of which the ledger tells
        outcome = Outcome.of(trial)
        return outcome is not None and outcome.kind == "bad"
    return False


def is_tied(trial: FrozenTrial) -> bool:
    return bool(trial.params.get(PHASE) == "tied")


def _number(trial: DifferentiableTrial, name: str, domain: Any, init: float | None) -> Tensor:
    value: Tensor = trial.suggest_float(name, domain.low, domain.high, log=domain.log, init=init)
    return value
