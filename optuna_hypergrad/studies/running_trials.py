"""What a sampler's trials are to do while they run, and what they say of themselves meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._typing import Params
from ..stores import Retention, TensorStore
from .definitions import check_definition
from .events import (
    CLAIM,
    GRADIENT,
    Claim,
    continuous_names,
    encode_gradient,
    write_event,
)
from .ledger import Ledger
from .plan import Memory, Plan, Planner
from .points import Definition
from .recording import Recorder
from .stored_state import LostTrajectoryError

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore


class RunningTrials:
    """The part of :class:`HypergradientSampler` that ``DifferentiableTrial`` and ``report_hypergradient`` need."""

    _planner: Planner
    _recorder: Recorder
    _tensor_store: TensorStore | ArtifactStore | None
    _retention: Retention | None
    _memories: weakref.WeakKeyDictionary[BaseStorage, dict[int, Memory]]

    def store_of(self, study: Study) -> TensorStore:
        """The store of the study's tensors.

        Raises:
            StorageError: if the study's storage has no place for tensors and none was given, or if a
                ``TensorStore`` was given that was made for another storage.
        """
        memory = self._memory(study)
        with memory.lock:
            store = memory.store
            if store is None:
                if isinstance(self._tensor_store, TensorStore):
                    self._tensor_store.check_serves(study)
                    store = self._tensor_store
                else:
                    store = TensorStore.of_study(study, self._tensor_store, self._retention)
                memory.store = store
            return store

    def declare(
        self, study: Study, trial: FrozenTrial, definition: Definition, init: Any = None
    ) -> Params:
        """Say that a running trial has this continuous hyperparameter; its tensors' values, if any.

        Raises:
            HyperparameterError: if another trial defined it otherwise.
        """
        memory = self._memory(study)
        plan = self._plan(study, trial)
        with memory.lock:
            if plan.claim is None:
                self._claim_start(memory, plan, study, trial)
            assert plan.claim is not None
            space = None if plan.trajectory is None else plan.trajectory.space
            check_definition(memory.ledger, space, definition, trial.number)
            plan.definitions[definition.name] = definition
            if definition.kind == "float":
                if init is not None:
                    plan.inits[definition.name] = float(init)
                return {}
            store = self.store_of(study)
            values = self._recorder.start_of(memory, plan, definition, init, study, trial, store)
            plan.started |= values
            return values

    def receive(
        self, study: Study, trial: FrozenTrial, floats: Mapping[str, float], tensors: Params
    ) -> None:
        """Take in a running trial's gradient by its numbers and tensors (external)."""
        memory = self._memory(study)
        plan = self._plan(study, trial)
        with memory.lock:
            if plan.claim is None:
                self._claim_start(memory, plan, study, trial)
            plan.tensor_gradient.update(tensors)
            plan.float_gradient.update(floats)
            plan.reported = True
            if floats:
                payload = encode_gradient(plan.float_gradient, continuous_names(trial))
                write_event(study, trial, GRADIENT, payload)

    def plan_for(self, study: Study, trial: FrozenTrial) -> Plan:
        """What a running trial is to do; decided now if it was not."""
        return self._plan(study, trial)

    def is_first(self, study: Study, plan: Plan) -> bool:
        """Whether there is no earlier point that a trial could be taken back to."""
        claim = plan.claim
        chosen = claim is not None and claim.source in ("init", "enqueued")
        return chosen and self._memory(study).ledger.best() is None

    def plan_of(self, study: Study, trial_id: int) -> Plan | None:
        return self._memory(study).plans.get(trial_id)

    def _plan(self, study: Study, trial: FrozenTrial) -> Plan:
        if _optuna.is_multi_objective(study):
            raise ValueError(
                "HypergradientSampler follows the gradient of one objective, and this study has "
                f"{len(study.directions)}. Return one value (a weighted sum, say), or use another sampler."
            )
        memory, trial_id = self._memory(study), _optuna.trial_id_of(trial)
        with memory.lock:
            if trial_id not in memory.plans:
                memory.plans[trial_id] = self._make_plan(memory, study, trial)
            return memory.plans[trial_id]

    def _make_plan(self, memory: Memory, study: Study, trial: FrozenTrial) -> Plan:
        while True:
            plan = self._planner.plan(memory, study, trial)
            if plan is None or plan.trajectory is None:
                return plan or Plan()
            try:
                self._recorder.resume(memory, plan, study, self.store_of)
            except LostTrajectoryError as error:
                plan.trajectory.stop = str(error)
                memory.say_once("lost", f"Trajectory {plan.trajectory.id} cannot go on. {error}")
            else:
                return plan

    def _memory(self, study: Study) -> Memory:
        studies = self._memories.setdefault(_optuna.storage_of(study), {})
        key = _optuna.study_id_of(study)
        if key not in studies:
            studies.setdefault(key, Memory(Ledger(_optuna.sign_of(study))))
        return studies[key]

    def _claim_start(self, memory: Memory, plan: Plan, study: Study, trial: FrozenTrial) -> None:
        """The trial has turned out to be differentiated: it opens a trajectory."""
        trials = _optuna.all_trials(study)
        memory.ledger.sync(trials)
        first = not self._planner.is_differentiated(memory, trials, trial)
        enqueued = bool(_optuna.fixed_params(trials[trial.number]))
        source = "enqueued" if enqueued else "init" if first else "base"
        plan.claim = Claim(trial.number, None, source)
        write_event(study, trial, CLAIM, plan.claim.to_json())
