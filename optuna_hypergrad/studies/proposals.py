"""What the base sampler is shown, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .. import _optuna
from .leases import is_abandoned
from .ledger import Ledger
from .points import domain_of
from .racing import Race


def representatives(
    ledger: Ledger, race: Race, trials: Sequence[FrozenTrial], names: set[str]
) -> list[FrozenTrial]:
    """One finished trial for each trajectory and, of its start, only ``names``.

    Its value is the trajectory's best one after as many steps as the others have had: what a setting is
    worth must not depend on how long it was tuned. Trials from before or beside the trajectories are
    shown as they are, and trials that are opening a trajectory as running ones.
    """
    shown: list[FrozenTrial] = []
    values = race.comparable(ledger.trajectories.values())
    for t in ledger.trajectories.values():
        if t.best is None:
            if trials[t.id].state == TrialState.PRUNED:
                shown.append(cut(trials[t.id], names))
            continue
        params = {n: v for n, v in {**t.setting, **t.first}.items() if n in names}
        shown.append(
            _optuna.representative(
                t.id,
                t.trial_id,
                TrialState.COMPLETE,
                ledger.sign * values[t.id],
                params,
                {n: t.distributions[n] for n in params},
                trials[t.best.number],
            )
        )
    for number in ledger.foreign:
        shown.append(cut(trials[number], names))
    for number, claim in ledger.claims(trials, but=-1).items():
        if claim.parent is None and not is_abandoned(trials[number]):
            shown.append(cut(trials[number], names))
    return sorted(shown, key=lambda t: t.number)


def cut(trial: FrozenTrial, names: set[str]) -> FrozenTrial:
    params = {n: v for n, v in trial.params.items() if n in names}
    return _optuna.representative(
        trial.number,
        _optuna.trial_id_of(trial),
        trial.state,
        trial.value if trial.state.is_finished() else None,
        params,
        {n: trial.distributions[n] for n in params},
        trial,
        dict(trial.intermediate_values),
    )


class Proposer:
    """A seeded copy of the base sampler in front of the representatives of a study's trajectories.

    Args:
        sampler: The copy.
        names: The hyperparameters that it is to know of.
    """

    def __init__(
        self,
        sampler: BaseSampler,
        study: Study,
        ledger: Ledger,
        race: Race,
        trials: Sequence[FrozenTrial],
        trial: FrozenTrial,
        names: set[str],
    ) -> None:
        self.sampler = sampler
        self.trial = cut(trial, names)
        shown = [
            t for t in representatives(ledger, race, trials, names) if t.number != trial.number
        ]
        shown = sorted([*shown, self.trial], key=lambda t: t.number)
        self.view = _optuna.ViewStudy.of(study, shown)
        self.sampler.before_trial(self.view, self.trial)
        self.trial.system_attrs = _optuna.attributes_of(study, _optuna.trial_id_of(trial))

    def propose(self, distributions: dict[str, BaseDistribution]) -> dict[str, Any]:
        """A value for each of ``distributions``: jointly where the sampler can, one by one elsewhere."""
        space = self.sampler.infer_relative_search_space(self.view, self.trial)
        space = {n: d for n, d in space.items() if n in distributions}
        joint = self.sampler.sample_relative(self.view, self.trial, space)
        values = {}
        for name, distribution in distributions.items():
            if name in joint and _optuna.contains(distribution, joint[name]):
                values[name] = self._keep(name, distribution, joint[name])
            else:
                values[name] = self.one(name, distribution)
        return values

    def one(self, name: str, distribution: BaseDistribution) -> Any:
        if distribution.single():
            return self._keep(name, distribution, _optuna.single_value(distribution))
        value = self.sampler.sample_independent(self.view, self.trial, name, distribution)
        if _optuna.is_continuous(distribution) and not _optuna.contains(distribution, value):
            value = domain_of(
                name, distribution
            ).midpoint()  # TPE gives NaN for a few ulps of logarithms
        return self._keep(name, distribution, value)

    def _keep(self, name: str, distribution: BaseDistribution, value: Any) -> Any:
        self.trial.params = {**self.trial.params, name: value}
        self.trial.distributions = {**self.trial.distributions, name: distribution}
        return value

    def finish(self, state: TrialState, values: Sequence[float] | None) -> None:
        """Tell the sampler that the trial is over."""
        self.sampler.after_trial(self.view, self.trial, state, values)
