"""What the sampler knows of a trial that has ended, as user attributes of it."""

from __future__ import annotations

import math
from typing import Any

from optuna.trial import FrozenTrial

from ..trial_attributes import (
    ESTIMATOR,
    HYPERGRADIENT_NORM,
    NUM_HYPERPARAMETERS,
    NUM_PRODUCTS,
    TRAJECTORY,
    TRAJECTORY_STEP,
    VALUE_KIND,
    projected_norm,
    summaries_of,
)
from .events import gradient_of
from .plan import Plan


def attributes_of(plan: Plan, trial: FrozenTrial, sign: float) -> dict[str, Any]:
    """Those of a step of a trajectory; none of a trial that is no such step.

    Args:
        sign: +1 where the study minimizes, -1 where it maximizes.
    """
    space = plan.space
    if plan.place is None or space is None or plan.void:
        return {}
    found: dict[str, Any] = {TRAJECTORY: plan.place[0], TRAJECTORY_STEP: plan.place[1]}
    tensors = {f: plan.started[f] for f in space.domains if f in plan.started}
    count = len(space.names) + sum(v.numel() for v in tensors.values())
    if not count:
        return {}
    found[NUM_HYPERPARAMETERS] = count
    gradient = {f: sign * g for f, g in plan.tensor_gradient.items() if f in tensors}
    numbers = gradient_of(trial)
    if numbers is not None and numbers[0] == space.names:
        gradient |= space.pack(sign * numbers[1])
    if gradient.keys() == space.domains.keys():
        values = {**space.pack(space.array(trial.params)), **tensors}
        norm = projected_norm(gradient, values, space.domains)
        if math.isfinite(norm):
            found[HYPERGRADIENT_NORM] = norm
        found[VALUE_KIND] = "cold"
    if plan.count is not None:
        if plan.count.num_products is not None:
            found[NUM_PRODUCTS] = plan.count.num_products
        if plan.count.estimators:
            found[ESTIMATOR] = ", ".join(plan.count.estimators)[:200]
    return found | summaries_of(tensors, space.domains)
