"""A study in two phases: vectors with all entries equal, and then free as far as nested cross-validation lets them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..studies.events import Outcome
from ._descent import first_radius
from ._nested import NestedChoice, nested_choice
from ._objective import PHASE, Penalty, TrialLoss, is_tied
from ._study import completed, finished

GUARD = "guard"
"""User attribute of a study: what nested cross-validation has said."""

Callback = Callable[[Study, FrozenTrial], None]
Optimize = Callable[[int, Sequence[Callback]], bool]
"""Of so many trials, with these callbacks; whether somebody else than they has stopped it."""


def guarded_search(
    study: Study,
    objective: TrialLoss,
    optimize: Optimize,
    n_trials: int,
    sampler_with: Callable[..., BaseSampler],
) -> NestedChoice | None:
    """Both phases, or what is left of them in a study that was cut.

    Args:
        study: Of the objective.
        objective: Guarded.
        optimize: Runs trials.
        n_trials: In all.
        sampler_with: The sampler, with other settings of its rule.

    Returns:
        The choice; ``None`` if the search was cut before it was made.
    """
    sampler = study.sampler
    try:
        tied = [t for t in finished(study) if is_tied(t)]
        if GUARD not in study.user_attrs:
            left = max(n_trials // 2, 1) - len(tied)
            if left > 0 and not _has_ended(study, objective):
                study.sampler = held(sampler, {PHASE: "tied"})
                stop = [] if _is_discrete(objective) else [_stop_at_the_end]
                if optimize(left, stop):
                    return None
            if not any(is_tied(t) for t in completed(study)):
                return None
            study.set_user_attr(GUARD, _chosen(study, objective).to_json())
        choice = NestedChoice.from_json(study.user_attrs[GUARD])
        if choice.tau is None:
            return choice
        best = _best_tied(study)
        objective.penalty = Penalty(objective.tied_of(best), choice.tau)
        left = n_trials - len(finished(study))
        free = [t for t in finished(study) if not is_tied(t)]
        if left > 0 and not any(is_the_end(t) for t in free):
            radius = first_radius(_steepest(objective, best), choice.tau)
            kept = {PHASE: "free", **objective.chosen_of(best)}
            study.sampler = held(sampler_with(radius=radius), kept)
            optimize(left, [_stop_at_the_end])
        return choice
    finally:
        study.sampler = sampler


def _chosen(study: Study, objective: TrialLoss) -> NestedChoice:
    best = _best_tied(study)
    chosen, followed = objective.chosen_of(best), objective.followed
    freedom = followed.freedom(chosen)
    choice = nested_choice(
        followed.over,
        followed.cross_validated.splits,
        followed.is_usable,
        chosen,
        freedom,
        float(best.value or 0.0),
    )
    assert choice is not None  # checked before the search
    return choice


def _steepest(objective: TrialLoss, tied: FrozenTrial) -> float:
    """The largest entry of the gradient by the vectors at a tied trial, in the coordinates that are moved."""
    chosen = objective.chosen_of(tied)
    freedom = objective.followed.freedom(chosen)
    numbers = {n: torch.tensor(v, dtype=torch.float64) for n, v in objective.tied_of(tied).items()}
    values = freedom.untied(numbers)
    leaves = {n: values[n].clone().requires_grad_() for n in freedom.vectors}
    loss = objective.followed.cross_validated(chosen, {**values, **leaves})
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return max(
        float(freedom.vectors[n].internal_gradient(g, values[n]).abs().max())
        for n, g in zip(leaves, gradients, strict=True)
    )


def _best_tied(study: Study) -> FrozenTrial:
    return next(t for t in completed(study) if is_tied(t))


def _is_discrete(objective: TrialLoss) -> bool:
    return len(dict(objective.followed.space.items())) > len(objective.followed.floats)


def _has_ended(study: Study, objective: TrialLoss) -> bool:
    tied = [t for t in completed(study) if is_tied(t)]
    return not _is_discrete(objective) and any(is_the_end(t) for t in tied)


def is_the_end(trial: FrozenTrial) -> bool:
    """Whether the descent has said that it is over."""
    outcome = Outcome.of(trial) if trial.state == TrialState.COMPLETE else None
    return outcome is not None and outcome.stop is not None


def _stop_at_the_end(study: Study, trial: FrozenTrial) -> None:
    if is_the_end(trial):
        study.stop()


def held(sampler: Any, values: dict[str, Any]) -> PartialFixedSampler:
    """A sampler to which some parameters are given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return PartialFixedSampler(values, sampler)
