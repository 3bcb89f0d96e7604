"""All that touches Optuna's private interface (checked against optuna 5.0).

Other files ask here. Where Optuna keeps its tables is known to ``stores/_optuna_tables.py`` alone.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import optuna
from optuna._imports import try_import as try_import
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat as BaseHeartbeat
from optuna.storages._heartbeat import is_heartbeat_enabled
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from optuna.study import Study, StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import BaseTrial, FrozenTrial, TrialState

logger = optuna.logging.get_logger("optuna.hypergradients")

_LATE = 1.0
"""Seconds for which a trial may be missing from a listing that shows later ones."""


def storage_of(study: Study) -> BaseStorage:
    return study._storage


def study_id_of(study: Study | FrozenStudy) -> int:
    return study._study_id


def trial_id_of(trial: optuna.Trial | FrozenTrial) -> int:
    return trial._trial_id


def current(trial: optuna.Trial) -> FrozenTrial:
    """A running trial as the storage has it now."""
    return trial.study._storage.get_trial(trial._trial_id)


def wrapped_by(storage: BaseStorage) -> Any:
    """What a storage stands before: a cached database, a Journal's file; ``None`` for no such thing."""
    return getattr(storage, "_backend", None)


def path_of_journal(backend: JournalFileBackend) -> str:
    return backend._file_path


def lock_of_journal(backend: JournalFileBackend) -> AbstractContextManager[None]:
    return get_lock_file(backend._lock)


def asked_at_its_end() -> bool:
    """Whether the caller's caller is ``Study.optimize``, in the middle of ending a trial."""
    return sys._getframe(2).f_globals.get("__name__") == "optuna.study._optimize"


def is_last_of_many() -> bool:
    """Whether this is called at the end of the last of the two or more trials of one ``Study.optimize`` in this
    thread. ``False`` where that cannot be told: with a timeout, several jobs, the ask-and-tell interface."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_optimize_sequential":
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_globals.get("__name__") != "optuna.study._optimize":
        return False
    many, number = frame.f_locals.get("n_trials"), frame.f_locals.get("i_trial")
    return isinstance(many, int) and isinstance(number, int) and number >= many > 1


def stale_trial_ids(storage: BaseHeartbeat, study_id: int) -> list[int]:
    return storage._get_stale_trial_ids(study_id)


def stale_trial_callback(study: Study) -> Callable[[Study, FrozenTrial], None] | None:
    """What the user has Optuna's heartbeat do with a stale trial; ``None`` under Hyperband, whose study
    takes no new trials."""
    storage = study._storage
    if not isinstance(storage, BaseHeartbeat) or not hasattr(study, "add_trial"):
        return None
    return storage.get_heartbeat_stale_trial_callback() if is_heartbeat_enabled(storage) else None


def all_trials(study: Study) -> list[FrozenTrial]:
    """Every trial of the study by number, fresh and uncopied; under Hyperband too, all of them.

    While several threads create trials, Optuna's cache may show a later one before an earlier one: that is
    waited for. Numbers that were changed come back as they are.
    """
    deadline = time.monotonic() + _LATE
    while True:
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
        if _has_no_gap(trials) or time.monotonic() > deadline:
            return trials
        time.sleep(0.01)


def recent_trials(study: Study, at_least: int) -> list[FrozenTrial]:
    """Every trial, as of the last ``ask`` if that includes ``at_least`` of them."""
    trials = study._get_trials(deepcopy=False, use_cache=True)
    return trials if len(trials) >= at_least and _has_no_gap(trials) else all_trials(study)


def _has_no_gap(trials: Sequence[FrozenTrial]) -> bool:
    return not trials or trials[-1].number == len(trials) - 1


def is_multi_objective(study: Study) -> bool:
    return len(study.directions) > 1


def sign_of(study: Study) -> float:
    """+1 where the study minimizes, -1 where it maximizes."""
    return -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0


def is_sound(distribution: BaseDistribution) -> bool:
    """Whether its fields are of their types. (Optuna reads them from a storage as they are there.)"""
    if not isinstance(distribution, (FloatDistribution, IntDistribution)):
        return True
    numbers = (distribution.low, distribution.high, distribution.step)
    return type(distribution.log) is bool and all(
        n is None or (isinstance(n, (int, float)) and not isinstance(n, bool)) for n in numbers
    )


def is_continuous(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, FloatDistribution) and distribution.step is None


def contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:
        return False


def single_value(distribution: BaseDistribution) -> Any:
    return optuna.distributions._get_single_value(distribution)


def find_sampler(sampler: Any, kind: type[Any]) -> Any:
    """The sampler of class ``kind``, also under a wrapper such as ``PartialFixedSampler``."""
    seen = 0
    while sampler is not None and not isinstance(sampler, kind) and seen < 8:
        sampler, seen = getattr(sampler, "_base_sampler", None), seen + 1
    return sampler if isinstance(sampler, kind) else None


def unpickling(sampler: Any, depth: int = 0) -> str | None:
    """Class of the sampler, in it or itself, that unpickles what the storage holds, if there is one."""
    if isinstance(sampler, CmaEsSampler):
        return type(sampler).__name__
    inside = (v for v in vars(sampler).values() if isinstance(v, BaseSampler) and depth < 4)
    return next(filter(None, (unpickling(v, depth + 1) for v in inside)), None)


def held_by_wrappers(sampler: Any) -> dict[str, Any]:
    """Values that a ``PartialFixedSampler`` around the sampler puts in place of its own."""
    held: dict[str, Any] = {}
    while sampler is not None and hasattr(sampler, "_base_sampler"):
        held = {**getattr(sampler, "_fixed_params", {}), **held}
        sampler = sampler._base_sampler
    return held


def attributes_of(study: Study, trial_id: int) -> dict[str, Any]:
    return study._storage.get_trial_system_attrs(trial_id)


def ended(trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> FrozenTrial:
    """A trial that is about to be told, as it will be then."""
    found = copy.copy(trial)
    found.state = state
    found.values = None if values is None else list(values)
    return found


def frozen_of(trial: optuna.Trial) -> FrozenTrial:
    """What a running trial has so far; follows it."""
    return trial._cached_frozen_trial


def replayed(trial: BaseTrial, name: str) -> Any:
    """A value with which a ``FixedTrial`` or ``FrozenTrial`` was made, or ``None``."""
    return getattr(trial, "_params", trial.params).get(name)


def fixed_params(trial: FrozenTrial) -> dict[str, Any]:
    """Values that were enqueued for this trial."""
    found = trial.system_attrs.get("fixed_params")
    return dict(found) if isinstance(found, dict) else {}


class ViewStudy(Study):
    """A study as the base sampler is to see it: the trials that it is given and no others.

    Made without ``Study.__init__``, so that it also works on the restricted study that a sampler
    receives under ``HyperbandPruner``.
    """

    _shown: list[FrozenTrial]

    @classmethod
    def of(cls, study: Study, shown: Sequence[FrozenTrial]) -> ViewStudy:
        view = cls.__new__(cls)
        for name in ("_study_id", "_directions", "study_name", "pruner", "sampler"):
            setattr(view, name, getattr(study, name))
        view._storage = cast(BaseStorage, _ViewStorage(study._storage, view))
        view._thread_local = type(study._thread_local)()
        view._stop_flag = False
        view._shown = list(shown)
        return view

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._get_trials(deepcopy, states)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        shown = [t for t in self._shown if states is None or t.state in states]
        return copy.deepcopy(shown) if deepcopy else shown

    def stop(self) -> None:
        """A base sampler that has proposed everything it can does not end the trajectories."""


class _ViewStorage:
    """For samplers that ask the storage instead of the study."""

    def __init__(self, storage: BaseStorage, view: ViewStudy) -> None:
        self._storage = storage
        self._view = view

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        return self._view._get_trials(deepcopy, states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def representative(
    number: int,
    trial_id: int,
    state: TrialState,
    value: float | None,
    params: dict[str, Any],
    distributions: dict[str, BaseDistribution],
    like: FrozenTrial,
    intermediate_values: dict[int, float] | None = None,
) -> FrozenTrial:
    """A trial that was not: one trajectory, as the base sampler is to see it."""
    return FrozenTrial(
        number=number,
        state=state,
        value=value,
        datetime_start=like.datetime_start,
        datetime_complete=like.datetime_complete if state.is_finished() else None,
        params=params,
        distributions=distributions,
        user_attrs=dict(like.user_attrs),
        system_attrs={
            k: v for k, v in like.system_attrs.items() if not str(k).startswith("hypergrad:")
        },
        intermediate_values=intermediate_values or {},
        trial_id=trial_id,
    )


def _random_states(sampler: Any, depth: int = 0) -> Iterator[tuple[Any, str]]:
    """(owner, attribute) of every random generator inside a sampler."""
    for name, value in sorted(vars(sampler).items()):
        if isinstance(value, (LazyRandomState, np.random.RandomState, np.random.Generator)):
            yield sampler, name
        elif isinstance(value, BaseSampler) and depth < 4:
            yield from _random_states(value, depth + 1)


def seeded_copy(sampler: BaseSampler, entropy: Sequence[int]) -> BaseSampler:
    """A copy of an unused sampler whose every random generator is seeded from ``entropy``.

    A sampler that keeps randomness elsewhere than in NumPy generators among its attributes, or
    cannot be copied, comes back as it is: its choices are then its own, resumed or not.
    """
    try:
        fresh = copy.deepcopy(sampler)
    except Exception:
        return sampler
    return seeded(fresh, entropy)


def seeded(fresh: BaseSampler, entropy: Sequence[int]) -> BaseSampler:
    """A sampler that nobody else has, whose every random generator is seeded from ``entropy``."""
    for i, (owner, name) in enumerate(_random_states(fresh)):
        seeds = np.random.SeedSequence([*entropy, i])
        old = getattr(owner, name)
        if isinstance(old, np.random.Generator):
            setattr(owner, name, np.random.default_rng(seeds))
            continue
        state = np.random.RandomState(seeds.generate_state(4))
        if isinstance(old, LazyRandomState):
            lazy = LazyRandomState()
            lazy._rng = state
            setattr(owner, name, lazy)
        else:
            setattr(owner, name, state)
    return fresh


def own_seed(sampler: BaseSampler) -> int | None:
    """A number drawn from the generator of a seeded sampler, which is left as it was."""
    for owner, name in _random_states(sampler):
        value = getattr(owner, name)
        if isinstance(value, LazyRandomState):
            value = value._rng
        if isinstance(value, np.random.RandomState):
            return int(copy.deepcopy(value).randint(2**31))
    return None
