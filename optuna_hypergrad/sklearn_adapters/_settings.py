"""Settings of what is not differentiated: all of them looked at first, where they are few."""

from __future__ import annotations

import itertools
import math
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import TrialState

from ._distributions import Space

_MOST = 8


def enqueue_each(study: Study, space: Space, differentiated: set[str], num_trials: int) -> None:
    """Have a study of which no trial has begun start with one under each combination of its choices.

    A descent under the best of them follows, rather than under the first that the sampler thinks of. Nothing is
    enqueued where a choice is a number, or where there are more than eight, or more than trials.
    """
    if any(t.state != TrialState.WAITING for t in study.get_trials(deepcopy=False)):
        return
    rest = {name: d for name, d in space.items() if name not in differentiated}
    choices: dict[str, tuple[Any, ...]] = {
        name: d.choices for name, d in rest.items() if isinstance(d, CategoricalDistribution)
    }
    count = math.prod(map(len, choices.values()))
    if len(choices) < len(rest) or not 1 < count <= min(_MOST, num_trials):
        return
    for setting in itertools.product(*choices.values()):
        study.enqueue_trial(dict(zip(choices, setting, strict=True)), skip_if_exists=True)
