"""The study of one search: a fresh one for each fit, or the one that an earlier fit of the same data began."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import joblib  # type: ignore[import-untyped]
import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, get_storage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ._process_wide import ProcessWide

FINGERPRINT = "hypergrad:search"
"""User attribute of a study: what its values are of, as a digest."""

FAILURE = "failure"
"""User attribute of a trial that has failed by its own fault: why."""

_TRIALS = logging.getLogger(optuna.study.__name__)
_VERBOSITY = ProcessWide(optuna.logging.get_verbosity, optuna.logging.set_verbosity)
_OF_TRIALS = ProcessWide(lambda: _TRIALS.level, _TRIALS.setLevel)


def fingerprint(*things: Any) -> str:
    """A digest of data and settings, the same in every process."""
    return str(joblib.hash(things, hash_name="sha1"))


def check_url(storage: Any) -> None:
    """Refuse a string that is no URL, such as the name of a file.

    Raises:
        ValueError: that says what the URL would be.
    """
    if isinstance(storage, str) and not re.match(r"[a-z0-9+]+://", storage):
        raise ValueError(
            f"storage={storage!r} is not the URL of a database. For a file of SQLite it is 'sqlite:///{storage or 'study.db'}' (three "
            f"slashes, and a fourth where the path is absolute), for a server 'postgresql+psycopg://user:password@host/name'."
        )


def open_study(
    storage: str | BaseStorage | None,
    name: str | None,
    sampler: BaseSampler,
    direction: Literal["minimize", "maximize"],
    digest: str,
    resume: bool,
) -> Study:
    """A study of ``digest`` alone.

    Names that are taken get a number: the fits of clones (in ``cross_val_score``, say) are studies of their own, and none
    sees the trials of another. With ``resume``, the one of the same ``digest`` is continued, if there is one.
    """
    kept: BaseStorage = InMemoryStorage() if storage is None else get_storage(storage)
    known = optuna.get_all_study_summaries(kept, include_best_trial=False)
    taken = {s.study_name: s.user_attrs.get(FINGERPRINT) for s in known}
    for candidate in _names(name):
        if resume and candidate in taken and taken[candidate] == digest:
            return optuna.load_study(study_name=candidate, storage=kept, sampler=sampler)
        if candidate in taken:
            continue
        try:
            study = optuna.create_study(
                storage=kept, study_name=candidate, sampler=sampler, direction=direction
            )
        except optuna.exceptions.DuplicatedStudyError:  # somebody else was faster
            continue
        study.set_user_attr(FINGERPRINT, digest)
        return study
    raise AssertionError("names do not end")


def finished(study: Study) -> list[FrozenTrial]:
    """Trials that are over, the best ones first."""
    sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
    over = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    return sorted(over, key=lambda t: sign * t.value if t.value is not None else float("inf"))


def completed(study: Study) -> list[FrozenTrial]:
    """Trials with a value, the best ones first."""
    return [t for t in finished(study) if t.state == TrialState.COMPLETE]


def was_stopped(study: Study) -> bool:
    """Whether somebody has called ``study.stop()`` since its ``optimize`` began."""
    return bool(getattr(study, "_stop_flag", False))


@contextmanager
def quiet(verbose: int) -> Iterator[None]:
    """Optuna's messages about each trial, only where ``verbose`` asks for them.

    Without, it also keeps its tracebacks of failed trials to itself: a search warns of each of them in one sentence.
    """
    if verbose:
        yield
        return
    with (
        _VERBOSITY.changed(lambda now: max(now, optuna.logging.WARNING)),
        _OF_TRIALS.changed(lambda now: logging.ERROR),
    ):
        yield


def _names(name: str | None) -> Iterator[str | None]:
    if name is None:
        yield None
        return
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1
