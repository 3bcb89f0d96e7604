"""The hypergradient of a search beside finite differences, for which each fold is fitted again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from sklearn.base import BaseEstimator
from torch import Tensor

from .._differences import directional_derivative
from .._typing import Params
from ..check_report import DirectionCheck, HypergradientReport
from ._following import Followed

_SPREAD = 0.3
"""Of the entries of a vector around the tied solution, in the coordinate that is moved."""

_NO_SLOPE = 1e-7
"""Of the loss: what changes it by less than this, where a logarithm or a tenth of a range changes by one, has no effect on it but
rounding. Errors are relative to at least that."""

_MARGIN = 0.02
"""Share of a range without a logarithm, at either end, in which differences would have one side only."""


def checked(
    followed: Followed,
    estimator: BaseEstimator,
    scoring: Any,
    at: Mapping[str, Any] | None,
    rtol: float,
    seed: int,
) -> HypergradientReport:
    """Compare gradient and loss with what else says them.

    Args:
        followed: Whose fits begin anew each time.
        estimator: As the user gave it.
        scoring: Of the score that is followed.
        at: Values by name; others are the first choice, or where a search would begin.
        rtol: Relative error up to which a hypergradient is right.
        seed: Of the directions.

    Raises:
        ValueError: for a name that is not searched, or a value that does not fit.
    """
    given = dict(at or {})
    unknown = given.keys() - {n for n, _ in followed.space.items()} - followed.space.vectors.keys()
    if unknown:
        raise ValueError(f"at= names {sorted(unknown)}, which the search does not search.")
    given = {name: _as_searched(followed, name, value) for name, value in given.items()}
    chosen = {
        name: given.get(name, _first(distribution))
        for name, distribution in followed.space.items()
        if name not in followed.floats
    }
    freedom = followed.freedom(chosen)
    start = followed.scanned(chosen, freedom)
    generator = torch.Generator().manual_seed(seed)
    moved: list[str] = []
    point: Params = {}
    for name, domain in freedom.domains.items():
        if name in given:
            number = torch.as_tensor(np.asarray(given[name], dtype=np.float64))
            wanted = (freedom.sizes[name],) if name in freedom.sizes else ()
            if tuple(number.shape) != wanted or not domain.contains(number):
                raise ValueError(
                    f"at[{name!r}] is not of shape {wanted} and within [{domain.low:g}, {domain.high:g}]."
                )
            point[name] = domain.to_internal(number)
        else:
            point[name] = domain.to_internal(torch.tensor(start[name], dtype=torch.float64))
            if name in freedom.sizes:
                noise = torch.randn(
                    freedom.sizes[name], generator=generator, device="cpu", dtype=torch.float64
                )
                inside = domain.to_external(point[name] + _SPREAD * noise)
                point[name] = domain.to_internal(inside)
        if not domain.log:  # beyond a bound, there may be no fit to compare with
            low, high = domain.internal_bounds()
            margin = _MARGIN * (high - low)
            kept = point[name].clamp(low + margin, high - margin)
            moved += [name] if bool((kept != point[name]).any()) else []
            point[name] = kept

    def loss(u: Mapping[str, Tensor]) -> Tensor:
        values = {  # not clamped: at a bound, a difference would have one side only
            n: u[n].exp() if domain.log else u[n] * domain.scale
            for n, domain in freedom.domains.items()
        }
        return followed.cross_validated(chosen, values)

    def value(u: Params) -> float:
        with torch.no_grad():
            return float(loss(u))

    leaves = {n: u.clone().requires_grad_() for n, u in point.items()}
    found = loss(leaves)
    gradients = torch.autograd.grad(found, list(leaves.values()))
    middle, rows = float(found.detach()), []
    for name, gradient in zip(leaves, gradients, strict=True):
        way = torch.randn(gradient.shape, generator=generator, device="cpu", dtype=torch.float64)
        if float((way * gradient).sum()) < 0:  # not away from what the gradient says
            way = -way
        way = way / way.norm() + gradient / max(float(gradient.norm()), 1e-300)
        way = way / way.norm()
        difference, doubt = directional_derivative(
            value, point, {name: way}, middle=middle, epsilon=2.0**-48, rtol=rtol
        )
        least = _NO_SLOPE * abs(middle)
        rows.append(_row(name, difference, doubt, float((gradient * way).sum()), rtol, least))
    setting = {n: float(freedom.domains[n].to_external(point[n])) for n in followed.floats}
    entries = {n: freedom.domains[n].to_external(point[n]) for n in freedom.vectors}
    setting |= followed.space.decode(chosen) | followed.vectors.decoded(entries)
    wrong = sum(r.verdict == "wrong" for r in rows)
    said = f"The hypergradient agrees with fits of each fold at other values, to within {rtol:g} or their uncertainty."
    if wrong:
        said = f"Wrong for {wrong} of {len(rows)} hyperparameters; the adapter differentiates something else than it fits."
    note = f"{followed.loss.label} stands for the score, which is not compared."
    if followed.loss.is_score:
        note = f"The loss is {middle:.8g}; "
        try:
            score = followed.score_of(estimator, setting, scoring)
        except (
            ValueError
        ) as error:  # such as of a log loss, where a fold is tested without one of the classes
            note += f"scikit-learn's own score of these folds is not defined: {error}"
        else:
            note += f"the score of scikit-learn's own fits is {score:.8g}."
    notes = [note]
    if moved:
        share = f"{100 * _MARGIN:g} % of the range"
        notes.append(
            f"At a bound, differences have one side only: {', '.join(moved)} was compared {share} inside."
        )
    return HypergradientReport(tuple(rows), said, rtol, tuple(notes))


def _row(
    name: str, difference: float, doubt: float, estimate: float, rtol: float, least: float
) -> DirectionCheck:
    scale = max(abs(difference), abs(estimate), least) or 1.0
    off = abs(difference - estimate)
    verdict: Literal["right", "wrong", "unclear"] = "right"
    if not doubt <= scale:
        verdict = "unclear"
    elif off > rtol * scale + doubt:
        verdict = "wrong"
    return DirectionCheck(name, difference, doubt, estimate, 0.0, off / scale, verdict)


def _first(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return distribution.low  # type: ignore[attr-defined]


def _as_searched(followed: Followed, name: str, value: Any) -> Any:
    """A value of ``best_params_`` as the search has it: a label for an object, an array for a dict, one entry per group.

    Raises:
        ValueError: for what is none of the choices.
    """
    vector = followed.vectors.by_name.get(name)
    if vector is not None:
        if isinstance(value, Mapping):
            value = [value.get(label) for label in followed.vectors.classes.tolist()]
        groups = vector.distribution.groups
        if groups is not None and len(np.atleast_1d(value)) == len(groups):
            _, first = np.unique(np.asarray(groups), return_index=True)
            return np.asarray(value)[first]
        return value
    distribution = dict(followed.space.items())[name]
    if not isinstance(distribution, CategoricalDistribution):
        return value
    objects = followed.space.choices.get(name, {})
    found = [label for label, choice in objects.items() if repr(choice) == repr(value)]
    if found:
        return found[0]
    if value not in distribution.choices:
        raise ValueError(
            f"at[{name!r}] is {value!r:.60}, and the choices are {distribution.choices!r:.200}."
        )
    return value
