"""One trial's plan: which step it is, from which point, and how that is decided."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._counting import Count
from .._typing import Params
from ..stores import TensorStore
from .events import CLAIM, Claim, write_event
from .leases import abandoned, is_abandoned
from .ledger import MAX_CUT_OFF, Ledger
from .points import Definition, PointSpace
from .proposals import Proposer
from .racing import Race
from .trajectory import Cursor, Trajectory

StartFrom = Literal["best", "base", "init", "given"]

STARTUP_TRAJECTORIES = 4
"""Settings that are chosen at random before TPE has a model: each takes several trials."""

_PROPOSALS = 8
"""How often the base sampler is asked for a setting that is new, or not clearly bad."""

_WAIT_FOR_RIVAL = 10.0
"""Seconds for which a claim waits for a later one on the same step to be withdrawn, at most."""


@dataclass
class Plan:
    """What one running trial is to do, and what it has reported so far. Lives in one process.

    Args:
        claim: The step that it works on; ``None`` while nothing has been differentiated.
        trajectory: The one that it continues, ``None`` for a start.
        values: Suggested values by name.
        distributions: Of ``values``.
        tensors: Values of tensors, external and flat.
        proposer: The base sampler in front of what it may see.
        count: What its hypergradient took.
        place: The trajectory that it was a step of, and which, once it has ended.
        space: The hyperparameters that it moved, once it has ended.
    """

    claim: Claim | None = None
    trajectory: Trajectory | None = None
    values: dict[str, Any] = field(default_factory=dict)
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    tensors: Params = field(default_factory=dict)
    tensors_from: int | None = None
    proposer: Proposer | None = None
    definitions: dict[str, Definition] = field(default_factory=dict)
    inits: dict[str, float] = field(default_factory=dict)
    started: Params = field(default_factory=dict)
    tensor_gradient: Params = field(default_factory=dict)
    float_gradient: dict[str, float] = field(default_factory=dict)
    reported: bool = False
    committed: bool = False
    void: bool = False
    cursor: Cursor | None = None
    count: Count | None = None
    place: tuple[int, int] | None = None
    space: PointSpace | None = None

    def definitions_of_tensors(self) -> dict[str, Definition]:
        return {n: d for n, d in self.definitions.items() if d.kind != "float"}


@dataclass
class Memory:
    """What a sampler keeps of one study in this process. All of it can be rebuilt from storage."""

    ledger: Ledger
    lock: threading.RLock = field(default_factory=threading.RLock)
    plans: dict[int, Plan] = field(default_factory=dict)
    cursors: dict[int, Cursor] = field(default_factory=dict)
    store: TensorStore | None = None
    said: set[str] = field(default_factory=set)

    def begin_anew(self, sign: float) -> None:
        """For another study: SQLite gives the id of a deleted one to the next, which has fewer trials."""
        self.ledger = Ledger(sign)
        self.plans.clear()
        self.cursors.clear()
        self.store = None
        self.said.clear()

    def say_once(self, subject: str, text: str) -> None:
        if subject not in self.said:
            self.said.add(subject)
            _optuna.logger.warning(text)


@dataclass(frozen=True)
class Planner:
    """Decides what a trial does. Settings only; see :class:`HypergradientSampler` for them.

    Args:
        base: Unused; ``None`` for the default one.
    """

    base: BaseSampler | None
    seed: int
    race: Race
    start: StartFrom

    def is_differentiated(
        self, memory: Memory, trials: Sequence[FrozenTrial], trial: FrozenTrial
    ) -> bool:
        """Whether gradients decide: some trial had one, or one that runs now is to have one."""
        claims = memory.ledger.claims(trials, trial.number)
        return memory.ledger.started or bool(claims)

    def plan(self, memory: Memory, study: Study, trial: FrozenTrial) -> Plan | None:
        """Claim a step for ``trial``; ``None`` while the study is the base sampler's alone."""
        ledger, excluded = memory.ledger, set[int]()
        trials = _optuna.recent_trials(study, max(trial.number + 1, ledger.seen))
        ledger.sync(trials)
        if not self.is_differentiated(memory, trials, trial):
            return None
        enqueued = _optuna.fixed_params(trial)
        while True:
            claims = ledger.claims(trials, trial.number)
            taken = {c.trajectory for c in claims.values()} | excluded
            chosen, setting, proposer = self._choose(
                ledger, study, trials, trial, taken, bool(enqueued)
            )
            if chosen is None:
                plan = self._open(ledger, study, trials, trial, claims, setting, proposer, enqueued)
                self._write(study, trial, plan.claim)
                return plan
            claim = Claim(chosen.id, chosen.last, "step")
            self._write(study, trial, claim)
            trials = _optuna.all_trials(study)
            if self._won(ledger, study, trials, trial, claim):
                return Plan(
                    claim=claim,
                    trajectory=chosen,
                    values=dict(chosen.setting),
                    distributions={n: chosen.distributions[n] for n in chosen.setting},
                )
            self._write(
                study, trial, Claim(trial.number, None, "base")
            )  # a rival may wait for this
            excluded.add(chosen.id)
            trials = _optuna.all_trials(study)
            ledger.sync(trials)

    def _choose(
        self,
        ledger: Ledger,
        study: Study,
        trials: Sequence[FrozenTrial],
        trial: FrozenTrial,
        taken: set[int],
        enqueued: bool,
    ) -> tuple[Trajectory | None, dict[str, Any], Proposer | None]:
        """A trajectory to continue, or else a setting for a new one."""
        if enqueued:
            return self._inherited(ledger, trial, taken), {}, None
        others, everything = ledger.other_distributions(), ledger.trajectories.values()
        held = _optuna.held_by_wrappers(study.sampler)
        taken = taken | {t.id for t in everything if not agrees(t.setting, held)}
        chosen = self.race.choose(ledger.trajectories, taken)
        if chosen is not None:
            return chosen, {}, None
        if not others:
            return self.race.best_of(everything, ledger.trajectories, taken, 1.0), {}, None
        for attempt in range(_PROPOSALS):
            proposer = self._proposer(ledger, study, trials, trial, set(others), attempt)
            setting = proposer.propose(others)
            setting |= {n: v for n, v in held.items() if n in others}
            same = [t for t in everything if all(setting.get(n) == v for n, v in t.setting.items())]
            if not same:
                return None, setting, proposer
            chosen = self.race.best_of(same, ledger.trajectories, taken)
            if chosen is not None:
                return chosen, {}, None
        chosen = self.race.best_of(everything, ledger.trajectories, taken, 1.0)
        return chosen, setting, proposer

    def _inherited(self, ledger: Ledger, trial: FrozenTrial, taken: set[int]) -> Trajectory | None:
        """The trajectory of a trial that Optuna retries, if its step is still to be done."""
        claim = Claim.of(trial)
        found = None if claim is None else ledger.trajectories.get(claim.trajectory)
        if claim is None or found is None or found.id in taken or found.last != claim.parent:
            return None
        return found

    def _open(
        self,
        ledger: Ledger,
        study: Study,
        trials: Sequence[FrozenTrial],
        trial: FrozenTrial,
        claims: dict[int, Claim],
        setting: dict[str, Any],
        proposer: Proposer | None,
        enqueued: dict[str, Any],
    ) -> Plan:
        """A new trajectory: its setting is given; here its start is chosen."""
        best = ledger.best()
        source, values, tensors_from = "base", dict(setting), None
        floats = ledger.float_distributions()
        known = {t.key for t in ledger.trajectories.values()}
        fresh = bool(setting) and repr(sorted(setting.items())) not in known
        inherited = Claim.of(trial)
        if inherited is not None and inherited.parent is None:
            source = inherited.source
        elif enqueued:
            source = "enqueued"
        elif (
            (not ledger.started and not claims)
            or (fresh and self.start == "init")
            or self.start == "given"
        ):
            source = "init"
        elif best is not None and (not floats or (fresh and self.start == "best")):
            source = str(best.best.number)  # type: ignore[union-attr]
        if best is not None and source != "init":
            tensors_from = best.best.number  # type: ignore[union-attr]
        if proposer is None:
            names = set(ledger.other_distributions()) or set(floats)
            proposer = self._proposer(ledger, study, trials, trial, names, 0)
            if enqueued:
                values = proposer.propose(
                    {n: d for n, d in ledger.other_distributions().items() if n not in enqueued}
                )
        if source.isdigit():
            params = trials[int(source)].params
            values |= {n: params[n] for n in floats if n in params}
        elif source == "base" and floats:
            starter = proposer
            if ledger.other_distributions():
                starter = self._proposer(ledger, study, trials, trial, set(floats), _PROPOSALS)
            values |= starter.propose(dict(floats))
        return Plan(
            claim=Claim(trial.number, None, source),
            values={n: v for n, v in values.items() if n not in enqueued},
            distributions={n: ledger.distributions[n] for n in values if n not in enqueued},
            tensors_from=tensors_from,
            proposer=proposer,
        )

    def _proposer(
        self,
        ledger: Ledger,
        study: Study,
        trials: Sequence[FrozenTrial],
        trial: FrozenTrial,
        names: set[str],
        stage: int,
    ) -> Proposer:
        entropy = [self.seed, self._ordinal(ledger, study, trials, trial), stage]
        if self.base is None:
            fresh = TPESampler(n_startup_trials=STARTUP_TRAJECTORIES)
            sampler = _optuna.seeded(fresh, entropy)
        else:
            sampler = _optuna.seeded_copy(self.base, entropy)
        return Proposer(sampler, study, ledger, self.race, trials, trial, names)

    def _ordinal(
        self, ledger: Ledger, study: Study, trials: Sequence[FrozenTrial], trial: FrozenTrial
    ) -> int:
        """The trial's number among those that count: lost ones do not, so that a study which was
        cut off goes on with the choices that it would have made; unless they kill every process."""
        unfinished = [n for n in ledger.unfinished if n < trial.number]
        gone = sum(1 for n in ledger.lost if n < trial.number)
        gone += len(abandoned(study, trials, unfinished))
        in_a_row = next(i for i in itertools.count() if trial.number - i - 1 not in ledger.lost)
        return trial.number - gone + in_a_row // MAX_CUT_OFF

    def proposer_of(self, memory: Memory, study: Study, trial: FrozenTrial) -> Proposer:
        """For a parameter that nobody foresaw."""
        ledger, trials = memory.ledger, _optuna.all_trials(study)
        ledger.sync(trials)
        names = set(ledger.other_distributions()) or set(ledger.owned)
        return self._proposer(ledger, study, trials, trial, names, _PROPOSALS + 1)

    def _write(self, study: Study, trial: FrozenTrial, claim: Claim | None) -> None:
        if claim is not None:
            write_event(study, trial, CLAIM, claim.to_json())

    def _won(
        self,
        ledger: Ledger,
        study: Study,
        trials: Sequence[FrozenTrial],
        trial: FrozenTrial,
        claim: Claim,
    ) -> bool:
        """Whether nobody else works on, or has finished, the claimed step.

        Both rivals write before they read, so at least one sees the other. The later trial gives
        way at once; the earlier one waits for that, and gives way itself when it does not happen,
        because the later one may have looked before this claim was written: it has begun its work then,
        or ended.
        """
        deadline = time.monotonic() + _WAIT_FOR_RIVAL
        while True:
            ledger.sync(trials)
            if ledger.trajectories[claim.trajectory].last != claim.parent:
                return False
            rivals = [
                trials[n]
                for n, c in ledger.claims(trials, trial.number).items()
                if (c.trajectory, c.parent) == (claim.trajectory, claim.parent)
            ]
            if not rivals:
                return True
            if any(t.number < trial.number or t.params or is_abandoned(t) for t in rivals):
                return False
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
            trials = _optuna.all_trials(study)


def agrees(setting: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two settings give the same value to every name that both have."""
    return all(other[n] == v for n, v in setting.items() if n in other)
