"""When a study tells about itself: each trial at once, the study as a whole at a pace that trials do not feel.

Publishing never fails a trial: what goes wrong is told to the debug log, and done again next time.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any

from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .. import _optuna
from .._errors import HypergradError, StorageError
from .._typing import Params
from ..stores import (
    Pointer,
    TensorStore,
    change_study_attributes,
    seconds_since_loss,
    set_user_attributes,
    unwrap_rdb,
)
from ..stores._full import is_of_storage
from ..stores._identity import study_uuid
from ..stores._opening import reason
from ..stores._pointer import pointers_in
from ..stores._published import ARTIFACT_ATTRIBUTES
from ..studies.tensors import store_of
from ..trial_attributes import summaries_in
from . import note, plots, shelf
from .artifacts import files_of
from .findings import find
from .pace import Pace

StoreOf = Callable[[Study], TensorStore]
Ending = tuple[int, TrialState, Sequence[float] | None]
"""A trial that is about to be told, and what as."""

SHARE = 0.015
"""Of the time of a study that publishing it as a whole may take."""
_MOST_WAITING = 16
"""Studies that are published when the process ends."""


def publish(study: Study, *, tensor_store: TensorStore | None = None) -> None:
    """Have ``optuna-dashboard`` show a study as it is now: its note, plots, and artifacts of its best trial.

    Studies do so by themselves as they go on, at a pace that takes less than 2 % of their time, and when
    ``study.optimize(n_trials=...)`` or the process ends (not where it is killed). This is for studies in memory, and
    for those that were cut off.

    Args:
        tensor_store: Where its tensors are, if it is not where the study's sampler puts them.

    Raises:
        HypergradError: if ``optuna-dashboard`` is not installed, or no trial of the study has had a hypergradient.
        StorageError: if its storage cannot be written to.
    """
    if not _is_installed():
        raise HypergradError(
            "optuna-dashboard is not installed, and nothing else shows what would be published. Install it: "
            "pip install 'optuna_hypergrad[dashboard]'."
        )
    trials = _optuna.all_trials(study)
    if not find(study, trials).is_ours:
        raise HypergradError(
            f"No trial of study {study.study_name!r} has had a hypergradient, so there is nothing to publish. Use "
            "create_study(sampler=HypergradientSampler()), or minimize_bilevel(..., trial=trial)."
        )
    store = store_of if tensor_store is None else lambda _: tensor_store
    try:
        _publish(study, trials, store)
    except Exception as error:
        if isinstance(error, HypergradError) or not is_of_storage(error):
            raise
        raise StorageError(
            f"Study {study.study_name!r} cannot be published, because its storage refuses to be written to "
            f"({reason(error)}). The study itself is as it was: publish it where it can be written."
        ) from error


@dataclass(eq=False)
class _Study:
    """What this process knows of the publishing of one study.

    Args:
        waits: Whether something has happened since it was published.
    """

    pace: Pace = field(default_factory=lambda: Pace(SHARE))
    waits: tuple[Study, StoreOf] | None = None
    is_busy: bool = False


class Publisher:
    """Tells about the studies of this process."""

    def __init__(self) -> None:
        self._begin_anew()
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()
        self._studies: weakref.WeakKeyDictionary[BaseStorage, dict[int, _Study]] = (
            weakref.WeakKeyDictionary()
        )
        self._waiting: list[_Study] = []
        self._at_exit: Finalize | None = None

    def tell_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        attributes: Callable[[], Mapping[str, Any]],
        *,
        anew: bool = False,
    ) -> None:
        """Set user attributes of a running trial that it does not have.

        Args:
            attributes: Called here, where an error of its own cannot fail the trial.
            anew: Also those that it has, as from a run that was cut off.
        """
        try:
            known = () if anew else trial.user_attrs
            missing = {k: v for k, v in attributes().items() if k not in known}
            if missing:
                set_user_attributes(_optuna.storage_of(study), _optuna.trial_id_of(trial), missing)
        except Exception as error:
            _say(f"Attributes of trial {trial.number}", error)

    def tell_study(self, study: Study, ending: Ending | None, store: StoreOf) -> None:
        """Publish the study as a whole, if it is time to; otherwise later, at the latest when the process ends.

        Args:
            ending: A trial that is still running, and will not be when it is read about; ``None`` where one that is
                running has not ended yet.
        """
        storage = _optuna.storage_of(study)
        if isinstance(storage, InMemoryStorage) or not _is_installed():
            return
        if _optuna.is_multi_objective(study):
            return
        with self._lock:
            studies = self._studies.setdefault(storage, {})
            known = studies.setdefault(_optuna.study_id_of(study), _Study())
            known.pace.begin()
            if known.is_busy:
                self._wait(known, (study, store))
                return
            is_due = known.pace.allows() or _optuna.is_last_of_many()
            # A trial that goes on after this is not in what is published now.
            self._wait(known, None if is_due and ending is not None else (study, store))
            known.is_busy = is_due
        if is_due:
            try:
                with known.pace.spending():
                    trials = list(_optuna.all_trials(study))
                    if ending is not None:
                        trials[ending[0]] = _optuna.ended(trials[ending[0]], *ending[1:])
                    _publish(study, trials, store)
            except Exception as error:
                _say(f"Study {study.study_name!r}", error)
                with self._lock:
                    self._wait(known, (study, store))
            finally:
                known.is_busy = False

    def _wait(self, known: _Study, waits: tuple[Study, StoreOf] | None) -> None:
        known.waits = waits
        if known in self._waiting:
            self._waiting.remove(known)
        if waits is None:
            return
        self._waiting.append(known)
        for forgotten in self._waiting[:-_MOST_WAITING]:
            forgotten.waits = None
        del self._waiting[:-_MOST_WAITING]
        if self._at_exit is None:  # unlike atexit, this is also called where a forked worker ends
            self._at_exit = Finalize(None, self.flush, exitpriority=100)

    def flush(self) -> None:
        """Publish what waits. Nothing, if a database has just been away: a process must be able to end."""
        with self._lock:
            waiting = [known.waits for known in self._waiting if known.waits is not None]
            self._waiting.clear()
        for study, store in waiting:
            if seconds_since_loss() < 60.0:
                return
            try:
                storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
                storage = unwrap_rdb(storage) or storage  # a cache remembers names
                # SQLite gives the id of a deleted study to the next one.
                if storage.get_study_name_from_id(study_id) == study.study_name:
                    _publish(study, _optuna.all_trials(study), store)
            except Exception as error:
                _say(f"Study {study.study_name!r}", error)


PUBLISHER = Publisher()


def _publish(study: Study, trials: Sequence[FrozenTrial], store: StoreOf) -> None:
    findings = find(study, trials)
    if not findings.is_ours:
        return
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
    change_study_attributes(
        storage, study_id, note.PREFIX, lambda known: note.changed(known, findings)
    )
    tensors = store(study) if findings.stored else None  # not every storage has a place for them
    figures = plots.drawn(study, trials, findings, tensors)
    change_study_attributes(
        storage, study_id, plots.PREFIX, lambda known: plots.changed(known, figures)
    )
    if findings.best is not None and tensors is not None:
        _show_best(study, findings.best, tensors)


def _show_best(study: Study, best: FrozenTrial, store: TensorStore) -> None:
    """Put the artifacts of the best trial there, unless they are there."""
    storage, study_id = _optuna.storage_of(study), _optuna.study_id_of(study)
    uuid, trial_id = study_uuid(storage, study_id), _optuna.trial_id_of(best)
    attributes = storage.get_study_system_attrs(study_id)
    known = {k: v for k, v in attributes.items() if str(k).startswith(ARTIFACT_ATTRIBUTES)}
    if shelf.shown_trial(known, uuid) == trial_id:
        return
    tensors: Params = {}
    for key, value in pointers_in(best.system_attrs, "value").items():
        pointer = Pointer.from_json(value, key, best.number)
        for entry, tensor in store.load(pointer).items():
            tensors[f"{pointer.name}/{entry}" if entry else pointer.name] = tensor
    scales = {n: s.get("log") is True for n, s in summaries_in(best.user_attrs).items()}
    files = files_of(tensors, scales)
    shelf.put(storage, study_id, trial_id, uuid, store, files)


def _is_installed() -> bool:
    """Without the package that shows it, a note is nothing that anybody sees."""
    return importlib.util.find_spec("optuna_dashboard") is not None


def _say(what: str, error: Exception) -> None:
    _optuna.logger.debug(f"{what}: not published ({type(error).__name__}: {error}).")
