"""What a search may try for each parameter of an estimator, checked before any fit."""

from __future__ import annotations

import difflib
from collections.abc import ItemsView, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from sklearn.base import BaseEstimator

_STORABLE = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Space:
    """Distributions by parameter, and what their categories stand for.

    Args:
        distributions: By name, as a study knows them.
        choices: By name, the objects behind labels: those that a database cannot hold.
    """

    distributions: dict[str, BaseDistribution]
    choices: dict[str, dict[str, Any]]

    def items(self) -> ItemsView[str, BaseDistribution]:
        return self.distributions.items()

    def decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters for the estimator, from those of a trial."""
        return {
            name: self.choices[name][value] if name in self.choices else value
            for name, value in params.items()
        }


def space_of(estimator: BaseEstimator, given: Mapping[str, Any]) -> Space:
    """The search space of ``estimator``.

    Args:
        estimator: Its ``get_params()`` are the names there are.
        given: By name, one of Optuna's distributions, or a sequence of choices of any kind.

    Raises:
        ValueError: for no parameters, an unknown name (naming the nearest) or an empty sequence.
        TypeError: for anything but a distribution or a sequence.
    """
    if not given:
        raise ValueError(
            "param_distributions is empty: there is nothing to search. Give a distribution by parameter name."
        )
    known = estimator.get_params(deep=True)
    distributions: dict[str, BaseDistribution] = {}
    choices: dict[str, dict[str, Any]] = {}
    for name, what in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid ones are {sorted(known)}."
            raise ValueError(
                f"Invalid parameter {name!r} for estimator {type(estimator).__name__}: {hint}"
            )
        if isinstance(what, (FloatDistribution, IntDistribution, CategoricalDistribution)):
            distributions[name] = what
        elif isinstance(what, Sequence) and not isinstance(what, (str, bytes)):
            distributions[name], objects = _categories(name, what)
            if objects:
                choices[name] = objects
        else:
            raise TypeError(
                f"param_distributions[{name!r}] must be a distribution of optuna.distributions or a list of choices, "
                f"got {what!r:.80}."
            )
    return Space(distributions, choices)


def _categories(name: str, choices: Sequence[Any]) -> tuple[BaseDistribution, dict[str, Any]]:
    if not choices:
        raise ValueError(f"param_distributions[{name!r}] is empty; give at least one choice.")
    if all(isinstance(c, _STORABLE) for c in choices):
        return CategoricalDistribution(choices), {}
    labels = [f"{i}: {choice!r:.60}" for i, choice in enumerate(choices)]
    return CategoricalDistribution(labels), dict(zip(labels, choices, strict=True))


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """What the study's (base) sampler chooses, a plain value."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    return optuna.Trial.suggest_float(  # a number, which the base sampler chooses
        trial,
        name,
        distribution.low,
        distribution.high,
        step=distribution.step,
        log=distribution.log,
    )
