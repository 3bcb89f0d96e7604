"""Reading back the tensors of a study."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial
from torch import Tensor

from .. import _optuna
from .._errors import MissingTensorError
from .._typing import Params
from ..stores import TensorStore
from .sampler import HypergradientSampler


def load_tensors(
    study_or_trial: Study | optuna.Trial | FrozenTrial,
    name: str | None = None,
    *,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
) -> dict[str, Any]:
    """Values of the tensors of a trial; of its best trial, for a study.

    Args:
        study_or_trial: A study, a trial of one, or a ``FrozenTrial`` together with ``study=``.
        name: Only this hyperparameter, which is then the only key.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.

    Returns:
        Name -> tensor, or a dict of tensors where that was suggested: what
        ``optuna.trial.FixedTrial`` takes, together with ``trial.params``.

    Raises:
        MissingTensorError: if there are none, or the retention policy has removed them.
        CorruptTensorError: if stored bytes are not what was written.
    """
    trial: FrozenTrial
    if isinstance(study_or_trial, Study):
        study = study_or_trial
        trial = study.best_trial
    elif isinstance(study_or_trial, optuna.Trial):
        study = study_or_trial.study
        trial = _optuna.all_trials(study)[study_or_trial.number]
    elif isinstance(study_or_trial, FrozenTrial) and study is not None:
        trial = study_or_trial
    else:
        raise TypeError(
            "load_tensors takes a study, a trial, or a FrozenTrial together with study=."
        )
    store = _store(study) if tensor_store is None else tensor_store
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


def _store(study: Study) -> TensorStore:
    sampler = _optuna.find_sampler(study.sampler, HypergradientSampler)
    return TensorStore.of_study(study) if sampler is None else sampler.store_of(study)
