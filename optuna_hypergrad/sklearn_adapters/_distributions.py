"""What a search may try for each parameter of an estimator, checked before any fit."""

from __future__ import annotations

import difflib
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import make_constraint

from ._vectors import SAMPLE_WEIGHT, is_sample_weight
from .tensor_distribution import TensorDistribution

_STORABLE = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Space:
    """Distributions by parameter, and what their categories stand for.

    Args:
        distributions: By name, as a study knows them.
        choices: By name, the objects behind labels: those that a database cannot hold.
        vectors: By name, those of vectors.
    """

    distributions: dict[str, BaseDistribution]
    choices: dict[str, dict[str, Any]]
    vectors: dict[str, TensorDistribution] = field(default_factory=dict)

    def items(self) -> ItemsView[str, BaseDistribution]:
        return self.distributions.items()

    def decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters for the estimator, from those of a trial; without those of a step for which something is chosen that
        does not have them."""
        found = {
            name: self.choices[name][value] if name in self.choices else value
            for name, value in params.items()
        }
        return {name: value for name, value in found.items() if _applies(name, found)}

    def steps_of(self, name: str) -> dict[str, tuple[Any, ...]]:
        """Steps for which something is chosen and of which ``name`` is a parameter, with what may be chosen."""
        chosen = ((step, self.distributions.get(step)) for step, _ in _owners(name))
        return {step: d.choices for step, d in chosen if isinstance(d, CategoricalDistribution)}


def space_of(estimator: BaseEstimator, given: Mapping[str, Any]) -> Space:
    """The search space of ``estimator``.

    Args:
        estimator: Its ``get_params()`` are the names there are.
        given: By name, one of Optuna's distributions, a sequence of choices of any kind, or a :class:`TensorDistribution`.

    Raises:
        ValueError: for no parameters, an unknown name (naming the nearest), an empty sequence, or a tuple that may be meant as a
            range.
        TypeError: for anything but a distribution or a sequence.
    """
    if not given:
        raise ValueError(
            "param_distributions is empty: there is nothing to search. Give a distribution by parameter name."
        )
    known = estimator.get_params(deep=True)
    distributions: dict[str, BaseDistribution] = {}
    choices: dict[str, dict[str, Any]] = {}
    vectors: dict[str, TensorDistribution] = {}
    for name, what in given.items():
        is_weight = isinstance(what, TensorDistribution) and is_sample_weight(estimator, name)
        if name not in known and not is_weight and not _of_a_choice(name, given):
            near = difflib.get_close_matches(str(name), [*known, SAMPLE_WEIGHT], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid ones are {sorted(known)}."
            raise ValueError(
                f"Invalid parameter {name!r} for estimator {type(estimator).__name__}: {hint}"
            )
        if isinstance(what, (FloatDistribution, IntDistribution, CategoricalDistribution)):
            _check_kind(estimator, name, what, known.get(name))
            distributions[name] = what
        elif isinstance(what, TensorDistribution):
            vectors[name] = what
        elif isinstance(what, Sequence) and not isinstance(what, (str, bytes)):
            _check_is_no_range(name, what)
            distributions[name], objects = _categories(name, what)
            if objects:
                choices[name] = objects
        else:
            raise TypeError(
                f"param_distributions[{name!r}] must be a distribution of optuna.distributions, a TensorDistribution or a "
                f"list of choices, got {what!r:.80}."
            )
    return Space(distributions, choices, vectors)


def _applies(name: str, chosen: Mapping[str, Any]) -> bool:
    """Whether what is chosen for a step, if anything is, has the parameter."""
    return next((_has(chosen[step], rest) for step, rest in _owners(name) if step in chosen), True)


def _of_a_choice(name: str, given: Mapping[str, Any]) -> bool:
    """Whether it is a parameter of what is chosen for a step."""
    offered = ((given.get(step), rest) for step, rest in _owners(name))
    return any(isinstance(c, Sequence) and any(_has(o, rest) for o in c) for c, rest in offered)


def _owners(name: str) -> Iterator[tuple[str, str]]:
    """Steps that may have the parameter, the outermost first, and what it is called there."""
    path = name.split("__")
    for i in range(1, len(path)):
        yield "__".join(path[:i]), "__".join(path[i:])


def _has(owner: Any, name: str) -> bool:
    return hasattr(owner, "get_params") and name in owner.get_params()


def _check_kind(
    estimator: BaseEstimator, name: str, distribution: BaseDistribution, value: Any
) -> None:
    """Refuse numbers for what the owner of the parameter says can be none.

    Raises:
        ValueError: naming what it takes.
    """
    *path, last = name.split("__")
    owner: Any = estimator
    for part in path:
        owner = owner.get_params().get(part)
        if not hasattr(owner, "get_params"):
            return
    constraints = getattr(owner, "_parameter_constraints", {}).get(last)
    if not isinstance(constraints, list) or isinstance(distribution, CategoricalDistribution):
        return
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    for bound in (distribution.low, distribution.high):
        if not any(make_constraint(c).is_satisfied_by(bound) for c in constraints):
            takes = " or ".join(str(make_constraint(c)) for c in constraints)
            raise ValueError(
                f"param_distributions[{name!r}] goes from {distribution.low} to {distribution.high}, and "
                f"{type(owner).__name__} takes {takes} (now it is {value!r:.40}); {bound} is neither."
            )


def _check_is_no_range(name: str, choices: Sequence[Any]) -> None:
    """Refuse a pair of numbers in parentheses, which is a range to some and two choices to others.

    Raises:
        ValueError: that has both spelled out.
    """
    are_numbers = all(isinstance(c, Real) and not isinstance(c, bool) for c in choices)
    if not isinstance(choices, tuple) or len(choices) != 2 or not are_numbers:
        return
    low, high = sorted(choices)
    ints = all(isinstance(c, Integral) for c in choices)
    kind, log = "IntDistribution" if ints else "FloatDistribution", ", log=True" if low > 0 else ""
    raise ValueError(
        f"param_distributions[{name!r}] is the tuple {choices!r}, which may be a range or two choices; write {kind}({low!r}, "
        f"{high!r}{log}) of optuna.distributions for a range, or the list {list(choices)!r} for two choices."
    )


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
