"""The Optuna sampler that moves continuous hyperparameters by their hypergradients."""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from .. import _optuna
from ..checkpoint import INTERRUPTED
from ..step_rules import AbstractStepRule, make_step_rule
from ..stores import AtomicFileSystemArtifactStore, Retention, TensorStore
from ..stores._pointer import pointers_in
from .events import (
    Claim,
    continuous_names,
)
from .leases import LeaseKeeper
from .plan import STARTUP_TRAJECTORIES, Memory, Plan, Planner, StartFrom
from .racing import Race
from .recording import Recorder
from .running_trials import RunningTrials
from .settings import check_settings
from .succession import keep_given_params, succeed
from .telling import attributes_of

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore


class _Answers(dict[str, Any]):
    """Relative values. Optuna asks ``in`` first, and samples the others when the objective gets to
    them; whoever indexes gets an answer for every name."""

    def __init__(self, values: Mapping[str, Any], sample: Callable[[str], Any]) -> None:
        super().__init__(values)
        self._sample = sample

    def __missing__(self, name: str) -> Any:
        self[name] = self._sample(name)
        return self[name]


class HypergradientSampler(RunningTrials, BaseSampler):
    """Moves continuous hyperparameters along their hypergradients; another sampler does the rest.

    A *trajectory* is a sequence of outer steps from one start under one setting of the other
    hyperparameters (integers, categories, floats with a step). A trial is one step of one trajectory.
    The base sampler chooses settings and starts, and sees one trial for each trajectory, with the best
    value of its first ``slice_steps`` steps (of all steps, once no trajectory goes on), so that a setting
    is judged after its continuous hyperparameters were tuned, and all of them after as many steps.
    Trajectories of different settings race: those that are behind wait.

    A study in which no trial has a hypergradient is left to the base sampler altogether.

    Everything that the sampler knows is in the study's storage, so a new sampler object, in another
    process, goes on as this one would have, to the bit, if ``seed`` or the base sampler's own seed is
    given and one worker runs at a time. (A base sampler whose random numbers do not come from NumPy
    generators among its attributes makes its own choices.)

    Args:
        base_sampler: For everything without a hypergradient, and for starts. Default:
            ``TPESampler(seed=seed, n_startup_trials=4)``: to it, a trajectory is a trial. It is copied,
            and must be unused.
        optimizer: Of the outer steps: ``"auto"``, ``"lbfgs"``, ``"adam"``, a step rule, or a factory of
            a ``torch.optim`` optimizer such as ``functools.partial(torch.optim.SGD, lr=0.1)``. It moves
            the logarithm of a hyperparameter where ``log=True``; otherwise a unit is a tenth of the
            range.
        tensor_store: Where tensors go: an artifact store, a directory, or a :class:`TensorStore`.
            Default: the study's own database, or beside its file.
        retention: Which trials' tensors are kept.
        seed: Of the base sampler's choices.
        start: Where a new trajectory starts under a setting that has none yet: ``"best"``: at the best
            point so far of any setting; ``"base"``: where the base sampler says; ``"init"``: at
            ``init=`` or the middle of the range. The very first one always starts there. Under a
            setting that has trajectories, the base sampler says; but for ``"given"``: at ``init=`` or the middle every time, for
            objectives that know where (trials that go on with a trajectory ignore ``init=``).
        slice_steps: Steps after which a trajectory is first compared with the others; then after twice
            as many, and so on.
        reduction: Only the best one in so many trajectories goes on at once; otherwise the base sampler
            is asked for a setting.
        max_steps: Steps after which a trajectory is over; ``None`` for no limit.
        patience: Steps without a better value after which it is over; ``None`` leaves that to the
            optimizer.
        lease: Seconds after which a worker that has not been heard of counts as gone (at once, where
            its process is known to have ended on the same machine). Its trial is then marked as failed,
            its step is done again, and nothing that it still does is stored. Renewed by a thread while
            a trial runs. ``math.inf``: only processes that are known to have ended. ``None``: none; a
            trial is kept until it is told, by whichever process, also when the one that asked for it
            has ended.
        publish: Whether the study tells ``optuna-dashboard`` about itself as it goes on: attributes of
            trials, a note, plots, artifacts of the best trial; see :func:`optuna_hypergrad.dashboard.publish`.

    A trial that was asked for and is not told blocks its trajectory: the others wait for its outcome as
    long as its process lives, or for good with ``lease=None``. Give it up with
    ``study.tell(number, state=TrialState.FAIL)``.

    Raises:
        ValueError: for settings out of range.
        StorageError: if the path ``tensor_store`` is not that of a directory.
    """

    def __init__(
        self,
        base_sampler: BaseSampler | None = None,
        *,
        optimizer: str
        | AbstractStepRule
        | Callable[[Iterable[Tensor]], torch.optim.Optimizer] = "auto",
        tensor_store: TensorStore | ArtifactStore | str | os.PathLike[str] | None = None,
        retention: Retention | None = None,
        seed: int | None = None,
        start: StartFrom = "init",
        slice_steps: int = 3,
        reduction: int = 3,
        max_steps: int | None = None,
        patience: int | None = None,
        lease: float | None = 120.0,
        publish: bool = True,
    ) -> None:
        check_settings(
            base_sampler, start, slice_steps, reduction, max_steps, patience, lease, publish, seed
        )
        if isinstance(base_sampler, HypergradientSampler):
            raise TypeError(
                "base_sampler is a HypergradientSampler itself; give e.g. TPESampler()."
            )
        is_default = base_sampler is None
        if base_sampler is None:
            base_sampler = TPESampler(seed=seed, n_startup_trials=STARTUP_TRAJECTORIES)
        self._base = base_sampler
        drawn = _optuna.own_seed(self._base) if seed is None else seed
        rule = make_step_rule(optimizer)
        race = Race(slice_steps, reduction, max_steps=max_steps, patience=patience)
        pristine = None if is_default else _optuna.seeded_copy(self._base, [0])
        drawn = secrets.randbits(31) if drawn is None else drawn
        self._planner = Planner(pristine, drawn, race, start)
        self._leases = LeaseKeeper(lease)
        self.publishes = publish
        if isinstance(tensor_store, (str, os.PathLike)):
            tensor_store = AtomicFileSystemArtifactStore(tensor_store)
        self._tensor_store = tensor_store
        self._retention = retention
        self._recorder = Recorder(rule, race, drawn)
        self._memories: weakref.WeakKeyDictionary[BaseStorage, dict[int, Memory]] = (
            weakref.WeakKeyDictionary()
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_memories"] = None  # can be rebuilt from storage
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._memories = weakref.WeakKeyDictionary()

    def reseed_rng(self) -> None:
        self._base.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        if _optuna.is_multi_objective(study):
            return
        try:
            if self._begin(study, trial):
                return
            self._base.before_trial(study, trial)
        except BaseException:
            self._leases.end(study, trial)
            raise

    def _begin(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether gradients are to decide about ``trial``."""
        # Not under memory.lock: this waits for the database, whose holder may wait for that lock.
        self._leases.begin(study, trial)
        memory = self._memory(study)
        with memory.lock:
            self._warn_of_pickles(memory, study)
            trials = _optuna.recent_trials(study, max(trial.number + 1, memory.ledger.seen))
            if len(trials) < memory.ledger.seen:
                memory.begin_anew(_optuna.sign_of(study))
            ledger = memory.ledger
            ledger.sync(trials)
            if succeed(study, trial, trials, ledger.unfinished):
                trials = _optuna.all_trials(study)
                ledger.sync(trials)
            keep_given_params(study, trial)
            return self._planner.is_differentiated(memory, trials, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        plan = self._plan(study, trial)
        if plan.claim is None:
            return self._base.infer_relative_search_space(study, trial)
        return dict(plan.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        plan = self._plan(study, trial)
        if plan.claim is None:
            values = self._base.sample_relative(study, trial, search_space)
        else:
            values = {n: plan.values[n] for n in search_space if n in plan.values}
        return _Answers(values, lambda n: self.sample_independent(study, trial, n, search_space[n]))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        plan = self._plan(study, trial)
        if plan.claim is None:
            return self._base.sample_independent(study, trial, param_name, param_distribution)
        memory = self._memory(study)
        with memory.lock:
            declared = plan.definitions.get(param_name)
            if declared is not None or param_name in memory.ledger.owned:
                low, high = param_distribution.low, param_distribution.high  # type: ignore[attr-defined]
                if param_name in plan.values:
                    return min(max(float(plan.values[param_name]), low), high)
                if declared is not None and plan.claim.source != "base":
                    middle = declared.domains[""].midpoint()
                    return plan.inits.get(param_name, middle)
            if plan.proposer is None:
                plan.proposer = self._planner.proposer_of(memory, study, trial)
            return plan.proposer.one(param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        if _optuna.is_multi_objective(study):
            return
        try:
            self._end(study, trial, state, values)
        finally:
            self._leases.end(study, trial)

    def _end(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        memory = self._memory(study)
        with memory.lock:
            plan = memory.plans.pop(_optuna.trial_id_of(trial), None) or Plan()
            claim = Claim.of(trial)
            if state == TrialState.FAIL and trial.system_attrs.get(INTERRUPTED) is True:
                plan.void = True
            if claim is not None:
                self._recorder.record(
                    memory, plan, claim, study, trial, state, values, self.store_of
                )
                if plan.proposer is not None:
                    plan.proposer.finish(state, values)
        if self.publishes:
            self._tell(study, trial, plan, state, values)
        if claim is not None:
            return
        self._base.after_trial(study, trial, state, values)
        # Tensors without a claim are those of a bilevel run, which has hypergradients of its own.
        if (
            state == TrialState.COMPLETE
            and continuous_names(trial)
            and not pointers_in(trial.system_attrs)
        ):
            memory.say_once(
                "base",
                f"No hypergradient was reported in trial {trial.number}, so the parameters are chosen by "
                f"{type(self._base).__name__}. Decorate the objective with @differentiable, or call "
                "report_hypergradient(trial, {...}).",
            )

    def _tell(
        self,
        study: Study,
        trial: FrozenTrial,
        plan: Plan,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        from ..dashboard.publishing import (
            PUBLISHER,  # a face: it looks at studies, and not they at it
        )

        PUBLISHER.tell_trial(
            study, trial, lambda: attributes_of(plan, trial, _optuna.sign_of(study))
        )
        PUBLISHER.tell_study(study, (trial.number, state, values), self.store_of)

    def _warn_of_pickles(self, memory: Memory, study: Study) -> None:
        name = _optuna.unpickling(self._base)
        if name is not None and not isinstance(_optuna.storage_of(study), InMemoryStorage):
            memory.say_once(
                "pickle",
                f"{name} keeps its state in the study's storage as a pickle. Whoever can write to that storage "
                "can run code in this process: use it only where you trust them all, or take "
                "TPESampler() or GPSampler(), which read numbers only.",
            )
