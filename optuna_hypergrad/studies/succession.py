"""A trial that was cut off, or whose long run was interrupted, is gone on with by the next one that begins.

What passes on is what Optuna's ``RetryHeartbeatStaleTrialCallback`` passes on (parameters, user attributes,
``failed_trial`` and ``retry_history``), the checkpoints of ``minimize_bilevel``, and the claim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from .. import _optuna
from ..checkpoint import INTERRUPTED
from ..stores import checkpoint_attributes, set_trial_attribute
from .events import CLAIM
from .leases import CUT_OFF, cut_off, mark_as_failed

HEIR_OF = "hypergrad:heir_of"
_RESUMED_AT = "hypergrad:resumed_at"
_FIXED = "fixed_params"

MAX_FUTILE = 3
"""So many times in a row a checkpoint is continued that gets no further: it kills its process."""

_told: set[tuple[int, datetime | None]] = set()
"""The trials of which this process has said that they are not continued again."""


def succeed(
    study: Study, trial: FrozenTrial, trials: Sequence[FrozenTrial], unfinished: Iterable[int]
) -> bool:
    """Mark trials that were cut off as failed, and let ``trial`` go on with one that has a checkpoint, or
    that was enqueued with parameters, or with a failed one whose run was interrupted.

    Further ones are enqueued. Where the storage has a callback for stale trials, that
    is called instead for those that were cut off.

    Args:
        trial: A trial that begins; its attributes are changed along with the stored ones.
        trials: All of the study.
        unfinished: Numbers of the trials to look at.

    Returns:
        Whether any trial was marked or is gone on with.
    """
    ended = [t for t in cut_off(trials, unfinished) if t.number != trial.number]
    callback = _optuna.stale_trial_callback(study)
    sources = [s for t in ended for s in _sources(t, trials)] if callback is None else []
    interrupted = _interrupted(trial, trials)
    if sources or interrupted:  # before the marks: whoever takes over from this trial has to know
        _set(study, trial, HEIR_OF, [s.number for s in [*sources, *interrupted]])
    if interrupted:
        still = {t.number for t in _interrupted(trial, _optuna.all_trials(study))}
        if len(still) < len(interrupted):  # of two that claim one at once, at most one has it
            interrupted = [t for t in interrupted if t.number in still]
            _set(study, trial, HEIR_OF, [s.number for s in [*sources, *interrupted]])
    marked = [t for t in ended if mark_as_failed(study, t)]
    if callback is not None:
        for one in marked:
            callback(study, copy.deepcopy(one))
    else:
        sources = [s for t in marked for s in _sources(t, trials)]
    taken = bool(trial.params or _optuna.fixed_params(trial) or _history(trial))
    for source in [*sources, *interrupted]:
        attributes = _legacy(source)
        if attributes is None:
            continue
        if taken:
            _enqueue(study, source, attributes)
        else:
            _adopt(study, trial, source, attributes)
            taken = True
    return bool(marked or interrupted)


def _interrupted(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Failed trials whose run was interrupted, and that no other trial goes on with, or is about to."""
    found = [
        t
        for t in trials
        if t.state == TrialState.FAIL
        and t.system_attrs.get(INTERRUPTED) is True
        and CUT_OFF not in t.system_attrs  # whoever has marked it goes on with it
        and checkpoint_attributes(t)
    ]
    if not found:
        return []
    passed_on = {n for t in trials for n in _history(t)}
    for other in trials:
        if other.state == TrialState.RUNNING and other.number != trial.number:
            passed_on |= set(_heir_of(other))
    return [t for t in found if t.number not in passed_on and _legacy(t) is not None]


def keep_given_params(study: Study, trial: FrozenTrial) -> None:
    """Have the parameters of a trial that Optuna retries, which come with it, count as enqueued ones."""
    if trial.params and not _optuna.fixed_params(trial):
        _set(study, trial, _FIXED, _named(trial.params))


def _sources(ended: FrozenTrial, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that are to be gone on with, and that nobody goes on with once ``ended`` is over: it, and
    those that it was about to pass on."""
    numbers = _heir_of(ended)
    half = _RESUMED_AT not in ended.system_attrs and any(n in numbers for n in _history(ended))
    found = [ended] if _is_passed_on(ended) and not half else []
    passed_on = {n for t in trials if t is not ended or found for n in _history(t)}
    for number in numbers:
        if 0 <= number < len(trials) and number not in passed_on:
            source = trials[number]
            if source.state == TrialState.FAIL and _is_passed_on(source):
                found.append(source)
    return found


def _is_passed_on(trial: FrozenTrial) -> bool:
    return bool(checkpoint_attributes(trial) or _optuna.fixed_params(trial))


def _history(trial: FrozenTrial) -> list[int]:
    return _numbers(trial.system_attrs.get("retry_history"))


def _heir_of(trial: FrozenTrial) -> list[int]:
    return _numbers(trial.system_attrs.get(HEIR_OF))


def _numbers(value: Any) -> list[int]:
    return [n for n in value if type(n) is int] if isinstance(value, list) else []


def _legacy(source: FrozenTrial) -> dict[str, Any] | None:
    """System attributes for the successor; ``None`` for a checkpoint that leads nowhere."""
    attributes = source.system_attrs
    checkpoints = checkpoint_attributes(source)
    step = max(map(_step_of, checkpoints.values()), default=-1)
    before = attributes.get(_RESUMED_AT)
    resumed = [*(before if isinstance(before, list) else []), step]
    if len(resumed) > MAX_FUTILE and resumed[-MAX_FUTILE - 1 :] == [step] * (MAX_FUTILE + 1):
        when = f"after step {step} of its checkpoint" if step >= 0 else "with no checkpoint"
        key = _optuna.trial_id_of(source), source.datetime_start
        if key in _told:
            return None
        _told.add(key)
        _optuna.logger.warning(
            f"Trial {source.number} was cut off for the {MAX_FUTILE + 1}th time {when}; it is not continued "
            "again. Look for what kills its process (memory?)."
        )
        return None
    newest_first = sorted(checkpoints.items(), key=lambda entry: -_step_of(entry[1]))
    return {  # in the order in which they are written: the last one says that all of them are
        "retry_history": [*_history(source), source.number],
        "failed_trial": attributes.get("failed_trial", source.number),
        _FIXED: _optuna.fixed_params(source) | _named(source.params),
        **{k: v for k, v in attributes.items() if str(k).startswith(CLAIM)},
        **dict(newest_first),
        **({INTERRUPTED: True} if checkpoints else {}),  # until its run begins
        _RESUMED_AT: resumed,
    }


def _named(params: dict[str, Any]) -> dict[str, Any]:
    """Without those whose name is not text: SQLite lets any type into any column."""
    return {name: value for name, value in params.items() if isinstance(name, str)}


def _step_of(pointer: Any) -> int:
    step = pointer.get("step") if isinstance(pointer, dict) else None
    return step if type(step) is int else -1


def _adopt(
    study: Study, trial: FrozenTrial, failed: FrozenTrial, attributes: dict[str, Any]
) -> None:
    storage, trial_id = _optuna.storage_of(study), _optuna.trial_id_of(trial)
    for key, value in failed.user_attrs.items():
        storage.set_trial_user_attr(trial_id, key, value)
        trial.user_attrs[key] = value
    for key, value in attributes.items():
        _set(study, trial, key, value)
    how = "interrupted" if failed.system_attrs.get(INTERRUPTED) is True else "cut off"
    _optuna.logger.warning(f"Trial {trial.number} goes on where trial {failed.number} was {how}.")


def _enqueue(study: Study, failed: FrozenTrial, attributes: dict[str, Any]) -> None:
    waiting = create_trial(
        state=TrialState.WAITING, user_attrs=failed.user_attrs, system_attrs=attributes
    )
    _optuna.storage_of(study).create_new_trial(_optuna.study_id_of(study), waiting)


def _set(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
    set_trial_attribute(_optuna.storage_of(study), _optuna.trial_id_of(trial), key, value)
    trial.system_attrs[key] = value
