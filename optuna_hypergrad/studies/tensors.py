"""Reading back the tensors of a study."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn

from .. import _optuna
from .._arguments import check_count
from .._errors import CorruptTensorError, MissingTensorError
from .._typing import Params
from .._words import listed, nearest, ranges
from ..stores import AbstractArtifactStore, TensorStore
from .layouts import laid_out
from .ledger import Ledger
from .ranking import ranked
from .sampler import HypergradientSampler


def load_tensors(
    study_or_trial: Study | optuna.Trial | FrozenTrial,
    name: str | None = None,
    step: int | None = None,
    like: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
) -> dict[str, Any]:
    """Values of the tensors of a trial; of its best trial, for a study.

    If the best trial has none in the store, because its worker was cut off while it saved them or the
    retention policy has removed them, the best trial that has: a warning says so.

    Example::

        decay = ohg.load_tensors(study)["decay"]
        early = ohg.load_tensors(study, "decay", step=0)["decay"]  # where its trajectory began
        net.load_state_dict(ohg.load_tensors(study, "net", like=net), strict=False)

    Args:
        study_or_trial: A study, a trial of one, or a ``FrozenTrial`` together with ``study=``.
        name: Only this hyperparameter, which is then the only key.
        step: Those of another outer step of the same trajectory, counted from 0.
        like: A module, or a dict of tensors, like which one of the hyperparameters was suggested: its entries
            alone, in that layout and on those devices. What was not suggested has no entry.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.

    Returns:
        Name -> tensor, or a dict of tensors where that was suggested: what
        ``optuna.trial.FixedTrial`` takes, together with ``trial.params``. With ``like=``, one dict of tensors.

    Raises:
        MissingTensorError: if there are none, or the retention policy has removed them; for a study, if
            no trial has any. It says which names, and which steps, there are.
        HyperparameterError: if no hyperparameter, or more than one, is laid out like ``like``.
        CorruptTensorError: if stored bytes are not what was written.
    """
    check_count("load_tensors", "step", step, 0, none=True)
    trial: FrozenTrial
    found: dict[str, Any]
    if isinstance(study_or_trial, Study):
        study = study_or_trial
        store = store_of(study) if tensor_store is None else tensor_store
        found = _of_best(study, name, step, store)
        return found if like is None else laid_out(found, like)
    if isinstance(study_or_trial, optuna.Trial):
        study = study_or_trial.study
        trial = _optuna.all_trials(study)[study_or_trial.number]
    elif isinstance(study_or_trial, FrozenTrial) and study is not None:
        trial = study_or_trial
    else:
        raise TypeError(
            "load_tensors takes a study, a trial, or a FrozenTrial together with study=."
        )
    store = store_of(study) if tensor_store is None else tensor_store
    found = _of_step(study, trial, name, step, store)
    return found if like is None else laid_out(found, like)


def _of_best(
    study: Study, name: str | None, step: int | None, store: TensorStore
) -> dict[str, Any]:
    if _optuna.is_multi_objective(study):
        raise MissingTensorError(
            f"Study {study.study_name!r} has several objectives and no best trial. Give the trial that you "
            "want: load_tensors(study.best_trials[0], study=study)."
        )
    try:
        best = study.best_trial
    except ValueError as error:
        if not any(t.state is TrialState.COMPLETE for t in _optuna.all_trials(study)):
            raise MissingTensorError(
                f"Study {study.study_name!r} has no best trial whose tensors could be loaded: no trial is completed "
                "yet. Give the trial that you want: load_tensors(study.trials[0], study=study)."
            ) from error
        best = best_with_tensors(study, store, stored_in(store))
        say_infeasible(study, best)
    if step is not None:
        return _of_step(study, best, name, step, store)
    pointers = store.pointers(best, None, "value")
    missing: MissingTensorError | None = None
    if pointers:
        try:
            return _of_trial(study, best, name, store)
        except MissingTensorError as error:
            if name is not None and name not in {p.name for p in pointers}:
                raise
            missing = error
    try:
        chosen = best_with_tensors(study, store, stored_in(store))
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


def stored_in(store: TensorStore) -> set[str] | None:
    """Identifiers of everything that is in a store; ``None`` where that cannot be listed."""
    artifacts = store.artifact_store
    if not isinstance(artifacts, AbstractArtifactStore):
        return None
    return {a.artifact_id for a in artifacts.stored()}


def _of_step(
    study: Study, trial: FrozenTrial, name: str | None, step: int | None, store: TensorStore
) -> dict[str, Any]:
    """Those of a trial, or of another step of its trajectory."""
    if step is None:
        return _of_trial(study, trial, name, store)
    steps = tensor_steps(study, trial, name, store)
    stored = stored_in(store)
    if step in steps:
        try:
            return _of_trial(study, steps[step], name, store)
        except MissingTensorError:
            if stored is None:
                raise
    elif not steps:
        return _of_trial(study, trial, name, store)  # which says why there are none
    kept = [s for s in sorted(steps) if is_stored(store, steps[s], name, stored)]
    what = "tensors" if name is None else f"tensor {name!r}"
    told = (
        f"those of steps {ranges(kept)} are"
        if len(kept) > 1
        else f"that of step {kept[0]} is"
        if kept
        else "nothing of it is"
    )
    why = (
        "has been removed by the retention policy (Retention(newest=, best=, every=))"
        if step in steps
        else f"was never stored: {_why_no_step(steps, step)}"
    )
    raise MissingTensorError(
        f"The {what} of step {step} of the trajectory of trial {trial.number} of study {study.study_name!r} {why}; "
        f"{told} in the store."
    )


def tensor_steps(
    study: Study, trial: FrozenTrial, name: str | None, store: TensorStore
) -> dict[int, FrozenTrial]:
    """The trial of each outer step of the trajectory of ``trial`` that has stored such tensors.

    What retention has removed since is among them. A bilevel run inside one trial stores its last step. A trial with
    a damaged pointer is left out, with a warning.
    """
    trials = _optuna.all_trials(study)
    ledger = Ledger(_optuna.sign_of(study))
    ledger.sync(trials)
    trajectory = ledger.of_trial(trial.number)
    members = [trial] if trajectory is None else [trials[s.number] for s in trajectory.steps]
    found: dict[int, FrozenTrial] = {}
    for member in members:
        try:
            found |= {p.step: member for p in store.pointers(member, name, "value")}
        except CorruptTensorError as error:
            _optuna.logger.warning(f"{error} It is left out.")
    return found


def is_stored(
    store: TensorStore, trial: FrozenTrial, name: str | None, stored: Collection[str] | None
) -> bool:
    """Whether values to which a trial points are in the store, as far as that can be told without reading them.

    Args:
        stored: As :func:`stored_in` gives it.
    """
    try:
        pointers = store.pointers(trial, name, "value")
    except CorruptTensorError:
        return False
    return stored is None or all(p.blob in stored for p in pointers)


def _why_no_step(steps: Collection[int], step: int) -> str:
    if step > max(steps):
        return f"the last one is step {max(steps)}"
    return "it failed, or was cut off"


def say_infeasible(study: Study, best: FrozenTrial) -> None:
    """Warn that ``best`` stands for a best trial that there is none of."""
    _optuna.logger.warning(
        f"No trial of study {study.study_name!r} is feasible: each violates a constraint. These are the tensors of "
        f"trial {best.number} (value {best.value:.6g}), the best of them that has any."
    )


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
    for trial in ranked(_optuna.all_trials(study), _optuna.sign_of(study)):
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
                f"{listed(known)}{nearest(name, known)}."
            )
        if name is not None and name in trial.params:
            raise MissingTensorError(
                f"{name!r} of trial {trial.number} of study {study.study_name!r} is a number, no tensor: "
                f"trial.params[{name!r}]."
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
    """Where the tensors of a study are: where its sampler puts them, or its default place."""
    sampler = _optuna.find_sampler(study.sampler, HypergradientSampler)
    return TensorStore.of_study(study) if sampler is None else sampler.store_of(study)
