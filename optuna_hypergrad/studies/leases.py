"""Who works on a trial, and until when.

A trial has a lease from its first moment: a system attribute that names the process and a time. A thread
renews the leases of trials that outlast a quarter of theirs. When a process is gone (known at once on its
own machine) or a lease has run out (a machine that died, a process that is paused), the next worker to
begin a trial marks the old one as failed. Every storage refuses to change a finished trial, so whoever
wakes up late can no longer write anything: his place is taken.

Leases are compared by wall clocks. A clock that is wrong by more than a lease costs work that is done
twice, never a result.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .. import _optuna
from ..stores import is_for_threads, seconds_since_loss, set_trial_attribute
from .events import CLAIM
from .processes import is_dead, this_process

OWNER, CUT_OFF = "hypergrad:owner", "hypergrad:cut_off"
_RETRIED = "retry_history"

_RENEWALS = 4
"""A lease is renewed so many times before it would run out."""

_LONGEST = 3600.0
"""Seconds between two renewals, at most."""

_MOMENT = 60.0
"""Seconds between the creation of a trial and its lease, at most, for a process that lives."""

_SETTLED = 2.0
"""As ``_MOMENT``, where a wrong guess costs nothing but a setting that is tried twice."""

_AFTER_LOSS = 30.0
"""Seconds that others get to renew their leases, once the database is back."""

_MOST_ENDED = 1000
_ended: dict[tuple[int, int, datetime | None], threading.Thread] = {}
"""The trials that this process has done with last, and in which thread."""


@dataclass(frozen=True)
class Lease:
    """Args:
    process: :func:`this_process` of whoever works on the trial; without the birth where the trial is
        kept for whoever tells it, because such a process is never known to be gone.
    until: Seconds since the epoch; ``None`` for a lease that never runs out.
    """

    process: str
    until: float | None

    @classmethod
    def of(cls, trial: FrozenTrial) -> Lease | None:
        """That of a trial; ``None`` where there is none that can be read."""
        data = trial.system_attrs.get(OWNER)
        if not isinstance(data, dict) or not isinstance(data.get("process"), str):
            return None
        until = data.get("until")
        try:
            return cls(data["process"], None if until is None else float(until))
        except (TypeError, ValueError, OverflowError):
            return None

    @classmethod
    def new(cls, seconds: float | None) -> Lease:
        process = this_process()
        if seconds is None:
            return cls(f"{process.rpartition('|')[0]}|", None)
        return cls(process, time.time() + seconds if math.isfinite(seconds) else None)

    def to_json(self) -> dict[str, Any]:
        return {"process": self.process, "until": self.until}

    @property
    def host(self) -> str:
        return self.process.partition("|")[0].partition("/")[0]

    @property
    def pid(self) -> str:
        return self.process.partition("|")[2].partition("|")[0]

    @property
    def is_kept(self) -> bool:
        """Whether any process may tell the trial, also when that which asked for it has ended."""
        return self.until is None and self.process.endswith("|")

    @property
    def is_over(self) -> bool:
        """Whether its owner is known to be gone, or has not renewed it in time."""
        if is_dead(self.process):
            return True
        if self.until is None or self.process == this_process():
            return False
        # After a lost connection everybody is late.
        return time.time() > self.until and seconds_since_loss() > _AFTER_LOSS


def is_abandoned(trial: FrozenTrial) -> bool:
    """Whether nobody works on an unfinished trial any more.

    A trial that has had neither lease nor claim of its own for ``_MOMENT`` seconds was cut off before it
    could have one, or belongs to another sampler. (A study in memory has no leases: it goes with its
    process.)
    """
    if _was_given_up(trial):
        return True
    lease = Lease.of(trial)
    if lease is not None:
        return lease.is_over
    claimed = CLAIM in trial.system_attrs and _RETRIED not in trial.system_attrs
    return not claimed and _age(trial) > _MOMENT


def abandoned(study: Study, trials: Sequence[FrozenTrial], numbers: Iterable[int]) -> set[int]:
    """Those of ``numbers`` on which nobody works any more.

    A trial that was created just now gets some time to have its lease. When it has none after that, its
    process was killed, and the trial counts as abandoned here although it is not marked yet.
    """
    numbers, deadline = list(numbers), time.monotonic() + _SETTLED
    leased = not isinstance(_optuna.storage_of(study), InMemoryStorage)
    while True:
        running = [trials[n] for n in numbers if trials[n].state == TrialState.RUNNING]
        new = [t for t in running if leased and Lease.of(t) is None and _is_untouched(t)]
        if time.monotonic() > deadline or all(_age(t) > _SETTLED for t in new):
            return {t.number for t in [*new, *filter(is_abandoned, running)]}
        time.sleep(0.02)
        trials = _optuna.all_trials(study)


def cut_off(trials: Sequence[FrozenTrial], unfinished: Iterable[int]) -> list[FrozenTrial]:
    """Those of the ``unfinished`` that are running and whose owner is gone.

    A trial without a lease is left alone, because another sampler may work on it, unless it is as its
    creation, or whoever enqueued it, left it and every finished trial of the study had a lease, or was marked itself.
    """
    running = (trials[n] for n in sorted(unfinished) if trials[n].state == TrialState.RUNNING)
    gone = (trial for trial in running if is_abandoned(trial))
    return [
        trial
        for trial in gone
        if Lease.of(trial) is not None or _was_given_up(trial) or _was_ours(trial, trials)
    ]


def _was_given_up(trial: FrozenTrial) -> bool:
    """Whether this process has done with a trial, although its end could not be stored."""
    thread = _ended.get(_identity(trial))
    return thread is not None and (thread is threading.current_thread() or not thread.is_alive())


def _identity(trial: FrozenTrial) -> tuple[int, int, datetime | None]:
    return _optuna.trial_id_of(trial), trial.number, trial.datetime_start


def mark_as_failed(study: Study, trial: FrozenTrial) -> bool:
    """Whether this call has done it, and nobody else before. From then on the owner can write nothing.

    A trial that has got a lease, or a new one, since it was read is left alone.
    """
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    lease = Lease.of(storage.get_trial(trial_id))
    if lease is not None and not lease.is_over and not _was_given_up(trial):
        return False
    try:
        set_trial_attribute(storage, trial_id, CUT_OFF, True)
        if not storage.set_trial_state_values(trial_id, TrialState.FAIL):
            return False
    except UpdateFinishedTrialError:
        return False
    _optuna.logger.warning(
        f"Trial {trial.number} is marked as failed: its "
        + (
            "end could not be stored."
            if _was_given_up(trial)
            else "process was gone before it had begun."
            if lease is None
            else f"process ({lease.pid} on {lease.host}) is gone, or has not renewed its lease."
        )
    )
    return True


def _was_ours(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    finished = [t for t in trials if t.state.is_finished()]
    ours = bool(finished) and all({OWNER, CUT_OFF} & t.system_attrs.keys() for t in finished)
    return ours and _is_untouched(trial)


def _is_untouched(trial: FrozenTrial) -> bool:
    """Whether a trial is as its creation, or whoever enqueued it, left it."""
    if trial.params or trial.intermediate_values:
        return False
    enqueued = bool(_optuna.fixed_params(trial))
    return enqueued or not (trial.user_attrs or trial.system_attrs)


def _age(trial: FrozenTrial) -> float:
    begun = trial.datetime_start
    return float("inf") if begun is None else (datetime.now() - begun).total_seconds()


class LeaseKeeper:
    """Gives leases to the trials of this process and renews them.

    Args:
        seconds: Of a lease; infinite for leases that end with their process, ``None`` for trials that are
            kept for whoever tells them.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._forget()
        _keepers.add(self)

    def _forget(self) -> None:
        """Hold no lease, as in a process that was just forked: the trials are its parent's."""
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int], BaseStorage] = {}
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def begin(self, study: Study, trial: FrozenTrial) -> None:
        """Write the lease of a trial that begins, and renew it until :meth:`end`."""
        storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
        seconds = self.seconds
        if isinstance(storage, InMemoryStorage):
            return
        lease = Lease.new(seconds)
        if Lease.of(trial) != lease:
            set_trial_attribute(storage, trial_id, OWNER, lease.to_json())
        if lease.until is None or seconds is None or not is_for_threads(storage):
            return
        with self._lock:
            self._held[id(storage), trial_id] = storage
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_renew,
                    args=(weakref.ref(self), min(seconds / _RENEWALS, _LONGEST)),
                    name="hypergrad-leases",
                    daemon=True,
                )
                self._thread.start()

    def end(self, study: Study, trial: FrozenTrial) -> None:
        """The trial is finished, or about to be, or could not begin.

        If it still runs when this thread goes on, or is over, then its end could not be stored.
        """
        with self._lock:
            self._held.pop((id(_optuna.storage_of(study)), _optuna.trial_id_of(trial)), None)
        _ended[_identity(trial)] = threading.current_thread()
        while len(_ended) > _MOST_ENDED:
            with suppress(KeyError, RuntimeError):  # another thread does the same
                del _ended[next(iter(_ended))]

    def renew(self) -> bool:
        """Renew every lease; whether there are any left."""
        with self._lock:
            held = list(self._held.items())
            if not held:
                self._thread = None
                return False
        for key, storage in held:
            try:
                set_trial_attribute(storage, key[1], OWNER, Lease.new(self.seconds).to_json())
            except UpdateFinishedTrialError:
                with self._lock:
                    told = self._held.pop(key, None) is None
                if not told:
                    _optuna.logger.warning(
                        f"The trial with id {key[1]} was taken over, because this process had not renewed "
                        f"its lease of {self.seconds:g} s (was it paused?). What it still computes "
                        "for that trial is refused."
                    )
            except Exception as error:
                _optuna.logger.warning(
                    f"A lease could not be renewed and is tried again: {type(error).__name__}."
                )
            finally:
                storage.remove_session()
        return True


_keepers: weakref.WeakSet[LeaseKeeper] = weakref.WeakSet()


def _leave_to_parent() -> None:
    _ended.clear()
    for keeper in list(_keepers):
        keeper._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _renew(reference: weakref.ref[LeaseKeeper], interval: float) -> None:
    while True:
        time.sleep(interval)
        keeper = reference()
        if keeper is None or not keeper.renew():
            return
        del keeper
