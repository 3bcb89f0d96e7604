"""Vectors of hyperparameters: where each one enters a fit, and what scikit-learn is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import has_fit_parameter
from torch import Tensor

from ._adapter import AbstractAdapter, Fold, Split
from ._folds import last_step
from .feature_weights import FeatureWeights
from .tensor_distribution import TensorDistribution

Place = Literal["features", "samples", "classes", "targets"]
SAMPLE_WEIGHT = "sample_weight"
_ONE_OF = {"features": "feature", "samples": "sample", "classes": "class", "targets": "target"}


@dataclass(frozen=True)
class Vector:
    """A vector of hyperparameters.

    Attributes:
        name: As the user names it.
        place: What has one number each.
        distribution: Its bounds, and its groups.
        argument: What the adapter calls it, for ``"targets"``.
    """

    name: str
    place: Place
    distribution: TensorDistribution
    argument: str = ""

    def check(self, count: int) -> None:
        """Refuse another number of entries than there are features, samples, classes or targets.

        Raises:
            ValueError: naming both numbers.
        """
        what = self.distribution
        given = len(what.groups) if what.groups is not None else what.shape[0]
        if isinstance(given, int) and given != count:
            member = "groups gives the group of" if what.groups is not None else "shape is that of"
            raise ValueError(
                f"param_distributions[{self.name!r}]: {member} {given} {self.place}, and there are {count}."
            )

    def size(self, count: int) -> int:
        """Entries that are searched, of which ``count`` numbers are made."""
        groups = self.distribution.groups
        return count if groups is None else len(set(groups))

    def spread(self, values: Tensor) -> Tensor:
        """One number each, from those that are searched."""
        groups = self.distribution.groups
        if groups is None:
            return values
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        return values[torch.as_tensor(index)]


@dataclass(frozen=True)
class Vectors:
    """All vectors of a search, of one estimator.

    Attributes:
        by_name: Each one.
        classes: Labels, sorted; empty where no vector is one of classes.
    """

    by_name: dict[str, Vector]
    classes: np.ndarray

    def of(self, place: Place) -> Vector | None:
        return next((v for v in self.by_name.values() if v.place == place), None)

    def applied(
        self, fold: Fold, split: Split, values: Mapping[str, Tensor]
    ) -> tuple[Fold, dict[str, Tensor]]:
        """The fold as the estimator sees it, and the estimator's own vectors."""
        arguments, weights = {}, fold.weights
        for name, vector in self.by_name.items():
            each = vector.spread(values[name])
            if vector.place == "features":
                fold = replace(fold, x_train=fold.x_train * each, x_test=fold.x_test * each)
            elif vector.place == "targets":
                arguments[vector.argument] = each
            else:
                rows = split[0]
                if vector.place == "classes":
                    rows = np.searchsorted(self.classes, fold.y_train)
                factor = each[torch.as_tensor(rows)]
                weights = factor if weights is None else weights * factor
        return replace(fold, weights=weights), arguments

    def decoded(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """For ``set_params``: arrays, and a dict of class weights. (Sample weights are for ``fit``.)"""
        found: dict[str, Any] = {}
        for name, vector in self.by_name.items():
            array = vector.spread(values[name].detach()).numpy().copy()
            found[name] = array
            if vector.place == "classes":
                found[name] = dict(zip(self.classes.tolist(), array.tolist(), strict=True))
        return found


def placed(
    estimator: BaseEstimator,
    adapter: AbstractAdapter,
    distributions: Mapping[str, TensorDistribution],
) -> dict[str, Vector]:
    """Where each vector enters.

    Raises:
        ValueError: for a parameter that cannot be a vector, or another shape than fits there.
    """
    found: dict[str, Vector] = {}
    for name, distribution in distributions.items():
        vector = _placed(estimator, adapter, name, distribution)
        one = _ONE_OF[vector.place]
        if isinstance(distribution.shape, str) and distribution.shape not in (
            f"per_{one}",
            "per_group",
        ):
            raise ValueError(
                f"param_distributions[{name!r}] is {distribution.shape!r}, and it has one number per {one}; use "
                f"'per_{one}' or 'per_group'."
            )
        if any(v.place == vector.place for v in found.values()):
            raise ValueError(
                f"param_distributions has two vectors of one number per {one}, {name!r} among them; search for one."
            )
        found[name] = vector
    return found


def _placed(
    estimator: BaseEstimator, adapter: AbstractAdapter, name: str, what: TensorDistribution
) -> Vector:
    leaf, prefix = last_step(estimator)
    if is_sample_weight(estimator, name) and has_fit_parameter(leaf, SAMPLE_WEIGHT):
        return Vector(name, "samples", what)
    if name == f"{prefix}class_weight" and "class_weight" in leaf.get_params():
        return Vector(name, "classes", what)
    argument = name.removeprefix(prefix)
    if name.startswith(prefix) and argument in adapter.vectors:
        return Vector(name, "targets", what, argument)
    before, step = _step_before(estimator)
    if name == f"{step}__weights" and isinstance(before, FeatureWeights):
        return Vector(name, "features", what)
    taken = [SAMPLE_WEIGHT] if has_fit_parameter(leaf, SAMPLE_WEIGHT) else []
    taken += [a for a in ("class_weight", *adapter.vectors) if a in leaf.get_params()]
    raise ValueError(
        f"param_distributions[{name!r}] is a vector, and {type(leaf).__name__} takes one as "
        f"{', '.join(prefix + a for a in taken)}, or as the weights of a FeatureWeights step right before it."
    )


def is_sample_weight(estimator: BaseEstimator, name: str) -> bool:
    """Whether ``name`` is that of the weights which ``fit`` of the last step takes."""
    _, prefix = last_step(estimator)
    return name in (SAMPLE_WEIGHT, f"{prefix}{SAMPLE_WEIGHT}")


def _step_before(estimator: BaseEstimator) -> tuple[BaseEstimator | None, str]:
    """The transformer right before the last step, and its whole name."""
    found, prefix = (None, ""), ""
    while isinstance(estimator, Pipeline):
        if len(estimator.steps) > 1:
            name, step = estimator.steps[-2]
            found = step, prefix + name
        name, estimator = estimator.steps[-1]
        prefix += f"{name}__"
    return found
