"""The ledger of a study: the fold of its trials' events into trajectories."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from .. import _optuna
from .._errors import StorageError
from .events import CLAIM, OUTCOME, Claim, Outcome, damaged, gradient_of
from .leases import CUT_OFF, OWNER, Lease, is_abandoned
from .points import Definition, PointSpace, domain_of
from .trajectory import Step, Trajectory

MAX_CUT_OFF = 5
"""So many processes may die at one step before its trajectory is given up."""


def _ended_before_it_had_begun(trial: FrozenTrial) -> bool:
    """Whether a trial without a claim failed for no reason of its own: killed, or its claim not stored."""
    if trial.state != TrialState.FAIL:
        return False
    return CUT_OFF in trial.system_attrs or (OWNER in trial.system_attrs and not trial.params)


@dataclass
class Ledger:
    """The fold of a study's events. Feed it the study's trials; it takes in the new ones.

    Args:
        sign: +1 where the study minimizes, -1 where it maximizes.
        say: Is told once of each trial that is left out, and why; the logger by default.
    """

    sign: float
    say: Callable[[str], None] | None = None
    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    owned: set[str] = field(default_factory=set)
    definitions: dict[str, Definition] = field(default_factory=dict)
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    foreign: list[int] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    unfinished: set[int] = field(default_factory=set)
    early: list[int] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    seen: int = 0
    member: dict[int, int] = field(default_factory=dict)
    cut_off: Counter[tuple[int, int | None]] = field(default_factory=Counter)
    _said: set[int] = field(default_factory=set)

    def sync(self, trials: Sequence[FrozenTrial]) -> None:
        """Take in every trial that has finished since the last call, in order of number.

        With several workers a step can have a lower number than the step it follows: it is taken in
        after that one. Trials whose events are damaged are left out, with a warning, and so are the
        steps that follow them.

        Raises:
            StorageError: if the trials are not numbered from 0 on.
        """
        for n in range(self.seen, len(trials)):
            if trials[n].number != n:
                raise StorageError(
                    f"The study has {len(trials)} trials, and in the place of trial {n} there is trial "
                    f"{trials[n].number}. Something has changed the rows; restore them from a backup."
                )
        due = sorted(self.unfinished) + list(range(self.seen, len(trials)))
        self.seen = max(self.seen, len(trials))
        self.unfinished.update(n for n in due if not trials[n].state.is_finished())
        finished = [n for n in due if trials[n].state.is_finished()]
        self.unfinished.difference_update(finished)
        waiting, placed = sorted(self.early + finished), bool(finished)
        while placed:
            left = [n for n in waiting if not self._take(trials[n])]
            waiting, placed = left, len(left) < len(waiting)
        self.early = self._without_stray(waiting, trials)

    def _without_stray(self, waiting: list[int], trials: Sequence[FrozenTrial]) -> list[int]:
        """Steps that wait for one that can still come. Where there is none, its place is taken."""
        if not waiting:
            return waiting
        outcomes = {n: Outcome.of(trials[n]) for n in waiting}
        parents = {n: o.parent for n, o in outcomes.items() if o is not None}
        hopeful, before = set(self.unfinished), -1
        while len(hopeful) > before:
            before = len(hopeful)
            hopeful.update(n for n, parent in parents.items() if parent in hopeful)
        for n in waiting:
            if n not in hopeful:
                self.left_out.add(n)
                if parents.get(n) not in waiting:
                    self._say(
                        n,
                        f"Trial {n} says that it is the step after trial {parents.get(n)}, which has "
                        "another next step, or none. It is left out of the trajectories.",
                    )
        return [n for n in waiting if n in hopeful]

    def _take(self, trial: FrozenTrial) -> bool:
        """Whether the trial had its place: ``False`` for a step after one that is still to come."""
        try:
            return self._place(trial)
        except StorageError as error:
            self.left_out.add(trial.number)
            self._say(
                trial.number,
                f"{error} Meanwhile trial {trial.number} and the steps that follow it are left out of the "
                "trajectories.",
            )
            return True

    def _place(self, trial: FrozenTrial) -> bool:
        _check_names(trial)
        for name, distribution in trial.distributions.items():
            if not _optuna.is_sound(distribution):
                raise damaged(trial, f"distribution of {name}", "a field has another type")
        claim, outcome = self._claim_of(trial), Outcome.of(trial)
        if outcome is not None and outcome.kind == "good" and trial.state != TrialState.COMPLETE:
            outcome = None  # cut off just before its end
        if outcome is None and claim is not None:
            self._count_cut_off(claim)
        if outcome is None or outcome.kind == "void":
            if CLAIM in trial.system_attrs or _ended_before_it_had_begun(trial):
                self.lost.add(trial.number)
            elif trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                self.foreign.append(trial.number)
                self.distributions.update(trial.distributions)
            return True
        self.distributions.update(trial.distributions)
        value = math.inf if outcome.value is None else self.sign * outcome.value
        good = outcome.kind == "good"
        step = Step(trial.number, value if good else math.inf, good)
        if outcome.parent in self.left_out:
            self.left_out.add(trial.number)
            return True
        if outcome.parent is None:
            self.trajectories[trial.number] = self._open(trial, outcome, claim)
            self.trajectories[trial.number].add(step, outcome.stop)
            self.member[trial.number] = trial.number
            return True
        trajectory = self.trajectories.get(outcome.trajectory)
        if trajectory is None or trajectory.last != outcome.parent:
            return False
        gradient_of(trial)  # damaged, it is no part of what a trajectory is rebuilt from
        _check_numbers(trial, trajectory.space.floats)
        trajectory.add(step, outcome.stop)
        self.member[trial.number] = trajectory.id
        return True

    def _count_cut_off(self, claim: Claim) -> None:
        self.cut_off[claim.trajectory, claim.parent] += 1
        trajectory = self.trajectories.get(claim.trajectory)
        if trajectory is not None and self.cut_off[claim.trajectory, claim.parent] >= MAX_CUT_OFF:
            trajectory.stop = (
                f"Its step after trial {claim.parent} was cut off {MAX_CUT_OFF} times. Look for what kills "
                "its process (memory?)."
            )
            self._tell(f"Trajectory {trajectory.id} cannot go on. {trajectory.stop}")

    def has_placed(self, number: int) -> bool:
        """Whether a trial has been taken in, as a step or as none."""
        return number < self.seen and number not in self.unfinished and number not in self.early

    def of_trial(self, number: int) -> Trajectory | None:
        """The trajectory that a finished trial is a step of."""
        return self.trajectories.get(self.member.get(number, -1))

    def _open(self, trial: FrozenTrial, outcome: Outcome, claim: Claim | None) -> Trajectory:
        gradient = gradient_of(trial)
        names = gradient[0] if gradient is not None else sorted(self.owned & trial.params.keys())
        try:
            definitions = {k: Definition.from_json(k, d) for k, d in outcome.definitions.items()}
            floats = {n: domain_of(n, trial.distributions[n]) for n in names}
            flat = [d.flat(k) for d in definitions.values() for k in d.domains]
            if len(set(flat)) < len(flat):
                raise ValueError("two of its definitions have the same name")
        except ValueError as error:
            raise damaged(trial, OUTCOME, error) from error
        _check_numbers(trial, floats)
        self.owned.update(names)
        self.definitions.update(definitions)
        return Trajectory(
            id=trial.number,
            trial_id=_optuna.trial_id_of(trial),
            setting={n: v for n, v in trial.params.items() if n not in floats},
            space=PointSpace(floats, definitions),
            distributions=dict(trial.distributions),
            source="init" if claim is None else claim.source,
            first={n: float(trial.params[n]) for n in names},
        )

    @property
    def started(self) -> bool:
        """Whether any trial was ever differentiated."""
        return bool(self.trajectories)

    def claims(self, trials: Sequence[FrozenTrial], but: int) -> dict[int, Claim]:
        """Claims of the trials that somebody works on, by number, without trial ``but``.

        A lease that has run out changes nothing before the trial is marked as failed: until then its
        owner can still finish the step.
        """
        found = {}
        for number in self.unfinished:
            if number == but or trials[number].state != TrialState.RUNNING:
                continue
            if Lease.of(trials[number]) is None and is_abandoned(trials[number]):
                continue
            claim = self._claim_of(trials[number])
            if claim is not None:
                found[number] = claim
        return found

    def _claim_of(self, trial: FrozenTrial) -> Claim | None:
        try:
            return Claim.read(trial)
        except StorageError as error:
            self._say(trial.number, f"{error} Nobody knows which step it claims.")
            return None

    def _say(self, number: int, text: str) -> None:
        if number not in self._said:
            self._said.add(number)
            self._tell(text)

    def _tell(self, text: str) -> None:
        (self.say or _optuna.logger.warning)(text)

    def best(self) -> Trajectory | None:
        """The trajectory with the lowest value."""
        found = [t for t in self.trajectories.values() if t.best is not None]
        return min(found, key=lambda t: t.best.value, default=None)  # type: ignore[union-attr]

    def other_distributions(self) -> dict[str, BaseDistribution]:
        """Hyperparameters without a gradient, for the base sampler."""
        return {n: d for n, d in sorted(self.distributions.items()) if n not in self.owned}

    def float_distributions(self) -> dict[str, FloatDistribution]:
        """Numbers with a gradient."""
        found = {}
        for name in sorted(self.owned):
            distribution = self.distributions.get(name)
            if isinstance(distribution, FloatDistribution):
                found[name] = distribution
        return found


def _check_names(trial: FrozenTrial) -> None:
    for name in trial.params:
        if not isinstance(name, str):  # SQLite lets any type into any column
            raise StorageError(
                f"A parameter of trial {trial.number} has the name {str(name)[:60]}, which is not text. Something "
                "else than optuna_hypergrad has changed the row; restore it from a backup."
            )


def _check_numbers(trial: FrozenTrial, names: Iterable[str]) -> None:
    for name in names:
        value = trial.params.get(name, 0.0)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise StorageError(
                f"The parameter {name!r} of trial {trial.number} is {str(value)[:60]!r}, which is no finite "
                "number. Something else than optuna_hypergrad has changed the row; restore it from a "
                "backup."
            )
