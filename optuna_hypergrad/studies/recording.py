"""The state of trajectories: taken from storage before a step, put there after it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .. import _optuna
from .._errors import CorruptTensorError, MissingTensorError, StorageError
from .._typing import Params
from ..step_rules import AbstractStepRule
from ..stores import TensorStore
from .events import OUTCOME, Claim, Outcome, gradient_of, write_event
from .plan import Memory, Plan
from .points import Definition, PointSpace, domain_of, nested
from .racing import Race
from .stored_state import LostTrajectoryError, cursor_after, name_of
from .trajectory import Cursor, Trajectory, advance

StoreOf = Callable[[Study], TensorStore]

STATE = "trajectory"
_JITTER = 0.3
_TENSOR_CURSORS = 2


@dataclass(frozen=True)
class Recorder:
    """Folds finished trials into the state of their trajectory, with the tensors' part in the store.

    Args:
        rule: Takes the outer steps.
        race: Says which trajectories are over.
        seed: Of the small displacements that keep two workers from the very same start.
    """

    rule: AbstractStepRule
    race: Race
    seed: int

    def resume(self, memory: Memory, plan: Plan, study: Study, store_of: StoreOf) -> None:
        """Fill in where the trajectory of ``plan`` goes next.

        Raises:
            LostTrajectoryError: if its tensors cannot be read any more, or are another step rule's.
        """
        trajectory = plan.trajectory
        assert trajectory is not None
        cursor = memory.cursors.get(trajectory.last, trajectory.cursor)
        if cursor is None or cursor.after != trajectory.last:
            if trajectory.space.tensors:
                cursor = self._load(trajectory, study, store_of(study))
            else:
                cursor = self._replay(memory, trajectory, study, cursor)
        trajectory.cursor = plan.cursor = cursor
        external = trajectory.space.to_external(cursor.point)
        plan.values |= trajectory.space.float_values(external)
        plan.tensors = trajectory.space.tensor_values(external)
        for name in trajectory.space.names:
            plan.distributions[name] = trajectory.distributions[name]

    def start_of(
        self,
        memory: Memory,
        plan: Plan,
        definition: Definition,
        init: Params,
        study: Study,
        trial: FrozenTrial,
        store: TensorStore,
    ) -> Params:
        """Where the tensors of ``definition`` are in this trial: external and flat."""
        flat = {definition.flat(k): k for k in definition.domains}
        if plan.trajectory is not None:
            if all(f in plan.tensors for f in flat):
                return {f: plan.tensors[f].to(init[f].device) for f in flat}
            return init
        start = init
        if plan.tensors_from is not None:
            donor = _optuna.all_trials(study)[plan.tensors_from]
            start = self._borrow(definition, init, donor, store)
        assert plan.claim is not None
        rivals = self._same_start(memory, plan, study, trial)
        if rivals is not None:
            entropy = [self.seed, *rivals, zlib.crc32(definition.name.encode())]
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            generator = torch.Generator().manual_seed(seed)
            for f, k in flat.items():
                domain = definition.domains[k]
                u = domain.to_internal(start[f])
                noise = torch.randn(u.shape, generator=generator, device="cpu", dtype=torch.float32)
                start = {**start, f: domain.to_external(u + _JITTER * noise.to(u))}
        return start

    def _same_start(
        self, memory: Memory, plan: Plan, study: Study, trial: FrozenTrial
    ) -> tuple[int, int] | None:
        """How many trajectories have started, and are now starting, where this one would, with no
        number to tell them apart; ``None`` where it is the only one."""
        ledger, claim = memory.ledger, plan.claim
        assert claim is not None
        if claim.source == "enqueued" or plan.distributions.keys() & ledger.owned:
            return None
        point = _point(claim.source)
        setting = {n: v for n, v in plan.values.items() if n not in ledger.owned}
        done = sum(
            _point(t.source) == point and t.setting == setting for t in ledger.trajectories.values()
        )
        claims = ledger.claims(_optuna.all_trials(study), trial.number)
        now = [n for n, c in claims.items() if c.parent is None and _point(c.source) == point]
        return (done, sum(n < trial.number for n in now)) if done or now else None

    def _borrow(
        self, definition: Definition, init: Params, donor: FrozenTrial, store: TensorStore
    ) -> Params:
        try:
            (pointer,) = store.pointers(donor, definition.name, "value")
            stored = store.load(pointer)
        except (ValueError, MissingTensorError, CorruptTensorError):
            return init
        found = {definition.flat(k): v for k, v in stored.items()}
        if found.keys() != init.keys() or any(
            found[f].shape != init[f].shape or found[f].dtype != init[f].dtype for f in init
        ):
            return init
        return {f: found[f].to(init[f].device) for f in init}

    def record(
        self,
        memory: Memory,
        plan: Plan,
        claim: Claim,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
        store_of: StoreOf,
    ) -> None:
        """Write the outcome of a running trial, and its tensors and the state after it, if any."""
        known = memory.ledger.trajectories.get(claim.trajectory)
        if claim.parent is not None and (known is None or known.last != claim.parent):
            memory.ledger.sync(_optuna.all_trials(study))
        outcome = self._outcome(memory, plan, claim, study, trial, state, values, store_of)
        write_event(study, trial, OUTCOME, outcome.to_json())

    def _outcome(
        self,
        memory: Memory,
        plan: Plan,
        claim: Claim,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
        store_of: StoreOf,
    ) -> Outcome:
        if plan.void:
            return Outcome("void")
        ledger, number = memory.ledger, trial.number
        finite = state == TrialState.COMPLETE and values is not None and math.isfinite(values[0])
        value = float(values[0]) if finite and values is not None else None
        gradient = gradient_of(trial)
        tensors = plan.definitions_of_tensors()
        trajectory = ledger.trajectories.get(claim.trajectory)
        if claim.parent is None or trajectory is None or _has_left(trajectory, trial):
            trajectory = None
        if trajectory is None:
            names = [] if gradient is None else gradient[0]
            space = PointSpace({n: domain_of(n, trial.distributions[n]) for n in names}, tensors)
        else:
            space = trajectory.space
            if plan.cursor is None and space.tensors:
                memory.say_once(
                    "elsewhere",
                    f"Trial {number} was told to a study that did not run it, so the gradient of its "
                    "tensors is lost and its step will be repeated. Tell it where it ran.",
                )
                return Outcome("void")
            if plan.cursor is None:
                plan.trajectory = trajectory
                self.resume(memory, plan, study, store_of)
        identity = number if trajectory is None else trajectory.id
        parent = None if trajectory is None else claim.parent
        opened = {k: d.to_json() for k, d in tensors.items()} if trajectory is None else {}
        step = 0 if trajectory is None else len(trajectory.steps)
        plan.place, plan.space = (identity, step), space
        stored = {} if value is None else self._values(plan, space)
        slope = self._slope(memory, space, gradient, number)
        missing = [f for f in self._flat(space) if f not in plan.tensor_gradient]
        empty = not (space.names or space.tensors)
        if value is not None and (slope is None or missing or empty):
            has = space.names or space.tensors or ledger.owned & trial.params.keys()
            stop = f"No hypergradient was reported in trial {number}." if has else _NOTHING
            self._save(memory, study, trial, step, stored, store_of)
            return Outcome("good", identity, parent, value, stop, None, opened)
        if value is None and trajectory is None:
            stop = "The evaluation at its start failed."
            return Outcome("bad", identity, parent, None, stop, None, opened)
        held = sorted(_optuna.held_by_wrappers(study.sampler).keys() & space.floats.keys())
        cursor = advance(
            self.rule,
            space,
            plan.cursor,
            number,
            {n: float(trial.params[n]) for n in space.names if n in trial.params},
            plan.started,
            math.inf if value is None else ledger.sign * value,
            None if value is None or slope is None else ledger.sign * slope,
            {f: ledger.sign * plan.tensor_gradient[f] for f in self._flat(space)}
            if value is not None
            else {},
            held,
        )
        self._remember(memory, cursor, claim.parent, bool(space.tensors))
        numbers, rule = None, None
        if space.tensors:
            numbers, rule = dict(cursor.state.numbers), name_of(self.rule)
            blob = {f"state/{k}": v for k, v in cursor.state.tensors.items()}
            blob |= {f"point/{k}": v for k, v in cursor.point.items()}
            stored[STATE, "step_state"] = blob
            self._save(memory, study, trial, step, stored, store_of)
        kind: Any = "good" if value is not None else "bad"
        return Outcome(kind, identity, parent, value, cursor.stop, numbers, opened, held, rule)

    def _slope(
        self,
        memory: Memory,
        space: PointSpace,
        gradient: tuple[list[str], np.ndarray] | None,
        number: int,
    ) -> np.ndarray | None:
        if gradient is None:
            return None if space.names else np.zeros(0)
        names, array = gradient
        if names == space.names:
            return array
        given = dict(zip(names, array.tolist(), strict=True))
        absent = [n for n in space.names if n not in given]
        if absent:
            memory.say_once(
                "partial",
                f"Trial {number} reported no hypergradient for {absent[:5]}, which had one when the "
                "trajectory started; they stay where they are. Report all of them in every trial.",
            )
        return space.array(given, missing=0.0)

    def _flat(self, space: PointSpace) -> list[str]:
        return [d.flat(k) for d in space.tensors.values() for k in d.domains]

    def _values(self, plan: Plan, space: PointSpace) -> dict[tuple[str, str], Params]:
        """The tensors at which the trial was evaluated, as they are stored."""
        found: dict[tuple[str, str], Params] = {}
        for name, definition in space.tensors.items():
            if all(definition.flat(k) in plan.started for k in definition.domains):
                value = nested(definition, plan.started)
                found[name, "value"] = value if isinstance(value, dict) else {"": value}
        return found

    def _save(
        self,
        memory: Memory,
        study: Study,
        trial: FrozenTrial,
        step: int,
        stored: dict[tuple[str, str], Params],
        store_of: StoreOf,
    ) -> None:
        """Store tensors of a running trial, all at once, and remove what retention does not keep."""
        if not stored:
            return
        ledger, race = memory.ledger, self.race

        def open_trajectory(other: FrozenTrial) -> Hashable | None:
            if not ledger.has_placed(other.number):  # finished elsewhere, a moment ago
                return ("unknown", other.number)
            found = ledger.of_trial(other.number)
            if found is None or race.is_over(found):
                return None
            return ("last", found.id) if other.number == found.last else found.id

        store_of(study).save_all(
            _optuna.study_id_of(study),
            _optuna.trial_id_of(trial),
            step,
            stored,
            retain=True,
            trajectory=open_trajectory,
        )

    def _remember(self, memory: Memory, cursor: Cursor, parent: int | None, heavy: bool) -> None:
        if parent is not None:
            memory.cursors.pop(parent, None)
        memory.cursors[cursor.after] = cursor
        if heavy:
            for number in sorted(memory.cursors)[:-_TENSOR_CURSORS]:
                del memory.cursors[number]

    def _load(self, trajectory: Trajectory, study: Study, store: TensorStore) -> Cursor:
        """The state after the last step; after an earlier one where nothing later can be read.

        The step after that one is then evaluated again, at the same point, and followed by the same points as
        it was: the state does not know that it was taken before. The repetition is a trial, and a step of
        the trajectory, like any other, so that numbers, claims and the race stay as every worker sees them.
        """
        trials, errors = _optuna.all_trials(study), list[str]()
        for step in reversed(trajectory.steps):
            try:
                cursor = cursor_after(trajectory, trials[step.number], self.rule, store, STATE)
            except StorageError as error:
                errors.append(str(error))
                continue
            if errors:
                _optuna.logger.warning(
                    f"{errors[0]} Trajectory {trajectory.id} goes on from its state after trial "
                    f"{step.number}: what was evaluated next is evaluated again."
                )
            return cursor
        raise LostTrajectoryError(errors[0])

    def _replay(
        self, memory: Memory, trajectory: Trajectory, study: Study, cursor: Cursor | None
    ) -> Cursor:
        """The state after the last step, by taking the steps that ``cursor`` has not seen again."""
        sign, trials = memory.ledger.sign, _optuna.all_trials(study)
        done = -1 if cursor is None else cursor.after
        for step in trajectory.steps:
            if step.number <= done:
                continue
            trial = trials[step.number]
            outcome = Outcome.of(trial)
            slope = self._slope(memory, trajectory.space, gradient_of(trial), step.number)
            cursor = advance(
                self.rule,
                trajectory.space,
                cursor,
                step.number,
                {n: float(trial.params[n]) for n in trajectory.space.names if n in trial.params},
                {},
                step.value,
                None if not step.good or slope is None else sign * slope,
                {},
                outcome.held if outcome is not None else (),
            )
        assert cursor is not None
        return cursor


_NOTHING = "Nothing continuous is suggested under this setting."


def _point(source: str) -> str:
    """Where tensors start: at a trial's, or else at ``init=``."""
    return source if source.isdigit() else "init"


def _has_left(trajectory: Trajectory, trial: FrozenTrial) -> bool:
    """Whether a trial was, in the end, under another setting than the trajectory it was to continue."""
    return any(
        trajectory.setting.get(n, v) != v
        for n, v in trial.params.items()
        if n not in trajectory.space.floats
    )
