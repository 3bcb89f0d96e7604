"""Descents of vectors from several starts, one after the other in a study: losses over vectors have many minima."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from ..studies import load_tensors
from ._descent import ROUGH
from ._guarded import held, is_the_end
from ._objective import DESCENT, FIRST, TrialLoss, has_failed
from ._study import completed, finished

Callback = Callable[[Study, FrozenTrial], None]
Optimize = Callable[[int, Sequence[Callback]], bool]
"""Of so many trials, with these callbacks; whether somebody else than they has stopped it."""

LOOSER = (1.0, 10.0, 30.0)
"""Times which all entries are what they are where the first descent begins. A feature whose weight is small is left out by a
sparse model, or outvoted, and its weight has no slope there; where all of them are loose, each one has."""

NEARBY = (3.0, 10.0, 0.3)
"""Times which all entries are the best ones where later descents begin."""

_GAIN = 1e-7
"""Of a loss, relatively, below which going on is in vain."""

_LEAST = 15
"""Trials without which another start is not tried: the best one so far has more use for them."""


def restarted_search(
    study: Study,
    objective: TrialLoss,
    optimize: Optimize,
    n_trials: int,
    sampler_with: Callable[..., BaseSampler],
) -> None:
    """All trials of a search of vectors, or what is left of them in a study that was cut.

    The first descents begin with all entries of a vector equal, and looser each time; then one goes on from the best of all
    until nothing is left to gain; then others begin near the best, all entries times a factor, and so on in turns. All but
    those that go on end where little is to be gained, and the search ends where going on is all that is left and gains
    nothing. A start is a function of the trials before it, so that a study which was cut goes on as if it had not been.

    Reference: Lourenço, Martin & Stützle (2003), "Iterated local search"; for weights that begin loose, Zou (2006), "The
    adaptive lasso and its oracle properties".

    Args:
        study: Of the objective.
        objective: Not guarded; nothing but what is moved by hypergradients is searched.
        optimize: Runs trials.
        n_trials: In all.
        sampler_with: The sampler, with other settings of its rule.
    """
    sampler = study.sampler
    try:
        while (left := n_trials - len(finished(study))) > 0:
            number = _next(study)
            factor = _factor(number, n_trials - _begun(study, number))
            if factor == 1 and _has_gone_on_in_vain(study, number - 1, n_trials):
                return
            objective.start = None if number == 0 else _start(number, factor, study, objective)
            rough = number == 0 or factor != 1
            study.sampler = held(sampler_with(**ROUGH if rough else {}), {DESCENT: number})
            if optimize(left, [_stop_at_the_end]):
                return
    finally:
        study.sampler, objective.start = sampler, None


def _next(study: Study) -> int:
    """The descent that the next trial is of."""
    trials = finished(study)
    if not trials:
        return 0
    number = int(max(trials, key=lambda t: t.number).params.get(DESCENT, 0))
    return number + 1 if _has_ended(trials, number) else number


def _has_ended(trials: Sequence[FrozenTrial], number: int) -> bool:
    of_it = [t for t in trials if t.params.get(DESCENT) == number]
    failed = all(t.state != TrialState.COMPLETE for t in of_it) and any(map(has_failed, of_it))
    return failed or any(is_the_end(t) for t in of_it)


def _stop_at_the_end(study: Study, trial: FrozenTrial) -> None:
    if is_the_end(trial) or (
        trial.state != TrialState.COMPLETE
        and _has_ended(finished(study), int(trial.params.get(DESCENT, -1)))
    ):
        study.stop()


def _begun(study: Study, number: int) -> int:
    """Trials before a descent."""
    of_it = [t.number for t in finished(study) if t.params.get(DESCENT) == number]
    return min(of_it, default=len(finished(study)))


def _factor(number: int, left: int) -> float:
    """Times which a descent begins where the first one has (up to the last of ``LOOSER``), or at the best; 1 goes on from there."""
    if left < _LEAST:
        return 1.0
    if number < len(LOOSER):
        return LOOSER[number]
    return (1.0, *NEARBY)[(number - len(LOOSER)) % (1 + len(NEARBY))]


def _has_gone_on_in_vain(study: Study, number: int, n_trials: int) -> bool:
    """Whether a descent that went on from the best trial found nothing better."""
    if number < 1 or _factor(number, n_trials - _begun(study, number)) != 1:
        return False
    values = {t.number: float(t.value or 0.0) for t in completed(study)}
    begun = _begun(study, number)
    before = min((v for n, v in values.items() if n < begun), default=math.inf)
    return not min(values.values(), default=math.inf) < before - _GAIN * abs(before)


def _start(
    number: int, factor: float, study: Study, objective: TrialLoss
) -> Mapping[str, float | Tensor] | None:
    """Where a descent begins; ``None``: where a scan says."""
    vectors, trials = objective.followed.vectors.by_name, completed(study)
    first = next((t.user_attrs[FIRST] for t in finished(study) if FIRST in t.user_attrs), None)
    if first is None or not trials:
        return None
    found: dict[str, float | Tensor] = dict(first)
    if factor == 1 or number >= len(LOOSER):
        found = {n: float(trials[0].params[n]) for n in objective.followed.floats}
        found |= load_tensors(trials[0], study=study)
    for name, vector in vectors.items():
        domain, value = vector.distribution.domain, found[name]
        scaled = value / factor if vector.place == "targets" else value * factor
        if isinstance(scaled, Tensor):
            found[name] = domain.clamp(scaled)
        else:
            found[name] = min(max(scaled, domain.low), domain.high)
    return found
