"""Looking at a few points, and going down from one, outside of a study."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._errors import SolverError
from .._typing import Params
from ..search_space import Domain
from ..step_rules import StepState, TrustRegion

NUM_SCANNED = 4

_MORE_WHERE_FLAT = 3
"""Scans of further points, at most, where the loss does not change between points that are far apart."""

_SAME = 1e-9
"""Relative difference of losses that are the same but for rounding."""

Loss = Callable[[Params], Tensor]
Losses = Callable[[Params, int, int], Tensor]

ROUGH: dict[str, Any] = {"gtol": 1e-4, "ftol": 1e-4, "patience": 8}
"""Of a rule that ends where little is to be gained."""

IMPATIENT: dict[str, Any] = {**ROUGH, "patience": 6, "rtol": 2e-4}
"""Of one that also ends where it creeps along a rugged valley."""


def scan(
    losses: Losses, domains: Mapping[str, Domain], more: Mapping[str, float], num_folds: int
) -> dict[str, float]:
    """The best of four points that are spread over the box (of three for one number), the middle among them, and of one more.

    They race: all of them are fitted to a fifth of the folds, the better half to another fifth, and so on, until one is left or
    every fold was used. Points this far apart differ by more than folds do, and a start need not be the best of them.

    Where the best two have the same loss, it is flat between them, and has no slope to follow (of a sparse model without features,
    or a kernel that is the identity): points as of :func:`scan_elsewhere` race with the best, up to three times.

    Reference: Jamieson & Talwalkar (2016), "Non-stochastic best arm identification and hyperparameter optimization" (successive
    halving); for the points, Roberts (2018), "The unreasonable effectiveness of quasirandom sequences" (its additive recurrence).

    Args:
        losses: Of numbers by name, and of the folds from one number to before another; points where it fails or is not finite
            are passed over.
        domains: Of each number; finite bounds.
        more: A further point, as far as it is inside: other numbers are at the middle.
        num_folds: There are.

    Returns:
        The middle, where every point fails.
    """
    names = sorted(domains)
    middle = {n: domains[n].midpoint() for n in names}
    candidates = [middle, *_spread(domains, range(1, min(NUM_SCANNED, 2 + len(names))))]
    inside = {
        n: v for n, v in more.items() if n in domains and domains[n].low <= v <= domains[n].high
    }
    if inside:
        candidates.append({**middle, **inside})
    best, is_flat = _race(losses, candidates, num_folds)
    for number in range(1, 1 + _MORE_WHERE_FLAT):
        if best is None or not is_flat:
            break
        best, is_flat = _race(losses, [best, *_elsewhere(domains, number)], num_folds)
    return middle if best is None else best


def scan_elsewhere(
    losses: Losses,
    domains: Mapping[str, Domain],
    visited: Sequence[Mapping[str, float]],
    number: int,
    num_folds: int,
) -> dict[str, float]:
    """The best of the next eight points for each number (24 at most) that are not near what was visited; they race as in :func:`scan`.

    Args:
        losses, domains, num_folds: As there.
        visited: Points. What is nearer to one of them than half the distance of neighbors is left out.
        number: Of this scan: 1, 2, ...; each has points of its own.

    Returns:
        Where no point is left, or every one fails: the one of them that is farthest from what was visited, unseen.

    Reference: Rinnooy Kan & Timmer (1987), "Stochastic global optimization methods" (starts of local searches that are not near
    to what is known).
    """
    points = _elsewhere(domains, number)
    sizes = [high - low for low, high in (d.internal_bounds() for d in domains.values())]
    near = max(0.5 * (math.prod(sizes) / len(points)) ** (1 / len(sizes)), 1.0)
    gaps = [min((_distance(domains, p, v) for v in visited), default=math.inf) for p in points]
    far = [p for p, g in zip(points, gaps, strict=True) if g > near]
    best, _ = _race(losses, far, num_folds)
    return points[gaps.index(max(gaps))] if best is None else best


def _elsewhere(domains: Mapping[str, Domain], number: int) -> list[dict[str, float]]:
    """The points of a scan: 1, 2, ..."""
    each = min(8 * len(domains), 24)
    begin = NUM_SCANNED + (number - 1) * each
    return _spread(domains, range(begin, begin + each))


def _spread(domains: Mapping[str, Domain], indices: Iterable[int]) -> list[dict[str, float]]:
    """Points of the additive recurrence; the middle is number 0."""
    names = sorted(domains)
    ratio = _generalized_golden_ratio(len(names))
    return [
        {n: _at(domains[n], (0.5 + i * ratio ** -(j + 1)) % 1.0) for j, n in enumerate(names)}
        for i in indices
    ]


def _distance(
    domains: Mapping[str, Domain], one: Mapping[str, float], other: Mapping[str, float]
) -> float:
    """The largest of the distances of two points by any number, in the coordinates that are moved."""

    def apart(name: str) -> float:
        pair = torch.tensor([one[name], other[name]], dtype=torch.float64)
        return abs(float(domains[name].to_internal(pair).diff()))

    return max(map(apart, domains))


def _race(
    losses: Losses, candidates: list[dict[str, float]], num_folds: int
) -> tuple[dict[str, float] | None, bool]:
    """The best candidate, if there is one, and whether another point of the last round has the same loss."""
    # neighbors one after the other: fits begin where the last one has ended
    candidates.sort(key=lambda c: tuple(c.values()))
    totals = [0.0] * len(candidates)
    left, first, share = list(range(len(candidates))), 0, math.ceil(num_folds / 5)
    ranked: list[int] = []
    while left and (first == 0 or (first < num_folds and len(left) > 1)):
        last = min(first + share, num_folds)
        for i in left:
            totals[i] += _total(losses, candidates[i], first, last)
        ranked = sorted((i for i in left if math.isfinite(totals[i])), key=lambda i: totals[i])
        left, first = sorted(ranked[: (len(left) + 1) // 2]), last
    if not ranked:
        return None, False
    best, *others = ranked
    is_flat = any(
        math.isclose(totals[i], totals[best], rel_tol=_SAME)
        and not _is_the_same(candidates[i], candidates[best])
        for i in others
    )
    return candidates[best], is_flat


def _is_the_same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(math.isclose(v, other[n], rel_tol=_SAME) for n, v in one.items())


def _total(losses: Losses, candidate: Mapping[str, float], first: int, last: int) -> float:
    values = {n: torch.tensor(v, dtype=torch.float64) for n, v in candidate.items()}
    try:
        with torch.no_grad():
            found = float(losses(values, first, last).sum())
    except SolverError:
        return math.inf
    return found if math.isfinite(found) else math.inf


def first_radius(steepest: float, stiffness: float) -> float:
    """How far a first step may go where a quadratic penalty of this stiffness pulls it back.

    Args:
        steepest: The largest entry of the gradient where it begins.
        stiffness: Second derivative of the penalty.
    """
    if stiffness <= 0:
        return 1.0
    return min(1.0, max(2 * steepest / stiffness, 1e-4))


def descend(
    loss: Loss,
    domains: Mapping[str, Domain],
    start: Params,
    max_evaluations: int,
    stiffness: float = 0.0,
) -> tuple[Params, float]:
    """The best point, external, and its loss.

    Args:
        loss: Differentiable, of tensors by name.
        domains: Of each tensor.
        start: External; inside.
        max_evaluations: Of the loss and its gradient, at most.
        stiffness: Of a quadratic penalty in the loss.

    Raises:
        SolverError: if the loss cannot be computed at ``start``.
    """
    lower, upper = {}, {}
    for name, domain in domains.items():
        lower[name], upper[name] = domain.internal_bounds()
    point = {n: domains[n].to_internal(v.detach()) for n, v in start.items()}
    rule, state = TrustRegion(**ROUGH), StepState()
    best, lowest = {n: v.detach() for n, v in start.items()}, math.inf
    for number in range(max_evaluations):
        external = {n: domains[n].to_external(u).requires_grad_() for n, u in point.items()}
        value, slope = math.nan, {}
        try:
            found = loss(external)
            gradients = torch.autograd.grad(found, list(external.values()))
        except SolverError:
            if number == 0:
                raise
        else:
            value = float(found.detach())
            slope = {
                n: domains[n].internal_gradient(g, external[n].detach())
                for n, g in zip(external, gradients, strict=True)
            }
            if value < lowest:
                best, lowest = {n: v.detach() for n, v in external.items()}, value
        if number == 0:
            steepest = max(float(g.abs().max()) for g in slope.values())
            rule = replace(rule, radius=first_radius(steepest, stiffness))
            state = rule.init(point, lower, upper)
        proposal = rule.step(state, point, value, slope, lower, upper)
        point, state = proposal.point, proposal.state
        if proposal.stop is not None:
            break
    return best, lowest


def _at(domain: Domain, share: float) -> float:
    """What lies at ``share`` of the range, in the coordinate in which it is moved."""
    low, high = domain.internal_bounds()
    return float(domain.to_external(torch.tensor(low + share * (high - low), dtype=torch.float64)))


def _generalized_golden_ratio(d: int) -> float:
    """The positive root of ``x^(d+1) = x + 1``."""
    x = 2.0
    for _ in range(50):
        x = (1 + x) ** (1 / (d + 1))
    return x
