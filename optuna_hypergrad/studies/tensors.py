"""Reading back the tensors of a study."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import optuna
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from .. import _optuna
from .._errors import MissingTensorError
from .._typing import Params
from ..stores import AbstractArtifactStore, TensorStore
from ..stores._retention import is_feasible
from .sampler import HypergradientSampler


def load_tensors(
    study_or_trial: Study | optuna.Trial | FrozenTrial,
    name: str | None = None,
    *,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
) -> dict[str, Any]:
    """Values of the tensors of a trial; of its best trial, for a study.

    If the best trial has none in the store, because its worker was cut off while it saved them or the
    retention policy has removed them, the best trial that has: a warning says so.

    Args:
        study_or_trial: A study, a trial of one, or a ``FrozenTrial`` together with ``study=``.
        name: Only this hyperparameter, which is then the only key.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.

    Returns:
        Name -> tensor, or a dict of tensors where that was suggested: what
        ``optuna.trial.FixedTrial`` takes, together with ``trial.params``.

    Raises:
        MissingTensorError: if there are none, or the retention policy has removed them; for a study, if
            no trial has any.
        CorruptTensorError: if stored bytes are not what was written.
    """
    trial: FrozenTrial
    if isinstance(study_or_trial, Study):
        study = study_or_trial
        return _of_best(study, name, store_of(study) if tensor_store is None else tensor_store)
    if isinstance(study_or_trial, optuna.Trial):
        study = study_or_trial.study
        trial = _optuna.all_trials(study)[study_or_trial.number]
    elif isinstance(study_or_trial, FrozenTrial) and study is not None:
        trial = study_or_trial
    else:
        raise TypeError(
            "load_tensors takes a study, a trial, or a FrozenTrial together with study=."
        )
    return _of_trial(study, trial, name, store_of(study) if tensor_store is None else tensor_store)


def _of_best(study: Study, name: str | None, store: TensorStore) -> dict[str, Any]:
    if _optuna.is_multi_objective(study):
        raise MissingTensorError(
            f"Study {study.study_name!r} has several objectives and no best trial. Give the trial that you "
            "want: load_tensors(study.best_trials[0], study=study)."
        )
    try:
        best = study.best_trial
    except ValueError as error:
        cause = str(error).rstrip(".")
        if not any(t.state is TrialState.COMPLETE for t in _optuna.all_trials(study)):
            cause = "no trial is completed yet"
        raise MissingTensorError(
            f"Study {study.study_name!r} has no best trial whose tensors could be loaded: {cause}. Give the "
            "trial that you want: load_tensors(study.trials[0], study=study)."
        ) from error
    pointers = store.pointers(best, None, "value")
    missing: MissingTensorError | None = None
    if pointers:
        try:
            return _of_trial(study, best, name, store)
        except MissingTensorError as error:
            if name is not None and name not in {p.name for p in pointers}:
                raise
            missing = error
    artifacts = store.artifact_store
    stored: set[str] | None = None
    if isinstance(artifacts, AbstractArtifactStore):
        stored = {a.artifact_id for a in artifacts.stored()}
    try:
        chosen = best_with_tensors(study, store, stored)
    except MissingTensorError as error:
        raise missing or error from None
    if missing is not None and chosen.number == best.number:
        raise missing
    found = _of_trial(study, chosen, name, store)
    _optuna.logger.warning(
        f"Trial {best.number} of study {study.study_name!r} is the best one (value {best.value:.6g}), but its "
        f"tensors are not in the store. These are those of trial {chosen.number} (value "
        f"{chosen.value:.6g}), the best one that has any."
    )
    return found


def best_with_tensors(
    study: Study, store: TensorStore, stored: Collection[str] | None
) -> FrozenTrial:
    """The best completed trial whose values are all in the store; feasible ones come first.

    Args:
        stored: Identifiers of everything that is in ``store``; ``None`` where that cannot be listed.

    Raises:
        MissingTensorError: if there is none.
    """
    if _optuna.is_multi_objective(study):
        raise MissingTensorError(
            f"Study {study.study_name!r} has several objectives and no best trial: say which one."
        )
    sign = -1.0 if study.directions[0] is StudyDirection.MAXIMIZE else 1.0
    complete = [
        t
        for t in _optuna.all_trials(study)
        if t.state is TrialState.COMPLETE and t.values is not None
    ]

    def rank(trial: FrozenTrial) -> tuple[bool, float, int]:
        return not is_feasible(trial), sign * trial.values[0], trial.number

    for trial in sorted(complete, key=rank):
        pointers = store.pointers(trial, role="value")
        if pointers and (stored is None or all(p.blob in stored for p in pointers)):
            return trial
    raise MissingTensorError(
        f"No completed trial of study {study.study_name!r} has tensors in this store. They are stored "
        "when a trial that suggests tensors is finished; if they are elsewhere, say where (tensor_store=, --tensor-store)."
    )


def _of_trial(
    study: Study, trial: FrozenTrial, name: str | None, store: TensorStore
) -> dict[str, Any]:
    pointers = store.pointers(trial, name, "value")
    if not pointers:
        what = "tensors" if name is None else f"tensor {name!r}"
        known = sorted({p.name for p in store.pointers(trial, None, "value")})
        if known:
            raise MissingTensorError(
                f"Trial {trial.number} of study {study.study_name!r} has no {what}; it has "
                f"{', '.join(map(repr, known))}."
            )
        raise MissingTensorError(
            f"Trial {trial.number} of study {study.study_name!r} has no {what}; they are stored when a "
            "trial with a finite value is finished."
        )
    found: dict[str, Tensor | Params] = {}
    for pointer in pointers:
        tensors = store.load(pointer)
        found[pointer.name] = tensors[""] if tensors.keys() == {""} else tensors
    return found


def store_of(study: Study) -> TensorStore:
    sampler = _optuna.find_sampler(study.sampler, HypergradientSampler)
    return TensorStore.of_study(study) if sampler is None else sampler.store_of(study)
