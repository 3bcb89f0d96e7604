"""One hyperparameter: steps by values and slopes, against the minimum that is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optuna_hypergrad.step_rules import TrustRegion, _line
from optuna_hypergrad.step_rules._line import OnLine

Function = Callable[[Tensor], Tensor]
SMOOTH: dict[str, Function] = {
    "exponentials": lambda x: x.exp() + 0.01 * (-3 * x).exp(),
    "logistic": lambda x: torch.log1p((-2 * x).exp()) + torch.log1p((x - 3).exp()),
    "saturating": lambda x: torch.sigmoid(-x) + 0.02 * (0.8 * x).exp(),
    "one-sided": lambda x: (1.5 * (x - 3)).exp() + 0.3 * (3 - x).clamp(min=0) ** 1.5,
}


def evaluations(function: Function, start: float, gap: float) -> float:
    """So many until the value is within ``gap`` of the least, relative to how far off it was at first."""
    least = float(function(torch.linspace(-6, 8, 1_000_001, dtype=torch.float64)).min())
    rule, bounds = TrustRegion(), ({"x": -6.0}, {"x": 8.0})
    point = {"x": torch.tensor(start, dtype=torch.float64)}
    state, first = rule.init(point, *bounds), math.nan
    for count in range(1, 61):
        x = point["x"].clone().requires_grad_(True)
        value = function(x)
        (slope,) = torch.autograd.grad(value, x)
        off = float(value.detach()) - least
        first = off if count == 1 else first
        if off <= gap * first:
            return count
        proposal = rule.step(state, point, float(value.detach()), {"x": slope}, *bounds)
        assert proposal.stop is None
        point, state = proposal.point, proposal.state
    return math.inf


def at(function: Function, x: float) -> OnLine:
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = function(leaf)
    return OnLine(x, float(value.detach()), float(torch.autograd.grad(value, leaf)[0]))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("a", [0.0, 0.2, -0.1])
def test_the_minimum_of_a_cubic_is_one_step_away(a: float, scale: float) -> None:
    def cubic(x: Tensor) -> Tensor:
        return scale * (a * x**3 + x**2 - 3)  # least at 0

    for one, other in ((-1.0, 2.0), (2.0, -1.0), (0.5, -0.25)):
        n: dict[str, float] = {}
        kept, new = sorted((at(cubic, one), at(cubic, other)), key=lambda e: e.value)
        _line.take_in(n, kept, new)
        step = _line.step_from(n, kept, 100.0)
        assert kept.at + step == pytest.approx(0.0, abs=1e-12)


def test_steps_stay_between_the_ends_of_the_interval() -> None:
    rng = random.Random(0)
    for _ in range(300):
        n: dict[str, float] = {}
        low, high = rng.uniform(-3, 0), rng.uniform(0.1, 3)
        left = OnLine(low, rng.uniform(0, 1), -(10 ** rng.uniform(-3, 3)))
        right = OnLine(high, rng.uniform(0, 1), 10 ** rng.uniform(-3, 3))
        kept, other = sorted((left, right), key=lambda e: e.value)
        _line.take_in(n, kept, other)
        assert low < kept.at + _line.step_from(n, kept, rng.uniform(-9, 9)) < high


def test_without_an_interval_slopes_decide() -> None:
    n: dict[str, float] = {}
    kept, new = OnLine(0.0, 3.0, -1.0), OnLine(1.0, 2.5, -0.5)
    _line.take_in(n, kept, new)
    assert _line.step_from(n, new, 0.7) == 0.7
    _line.take_in(n, new, OnLine(1.7, 2.6, 0.1))
    assert 0 < _line.step_from(n, new, 5.0) < 0.7
    _line.forget(n)
    assert _line.step_from(n, new, 5.0) == 5.0


@pytest.mark.parametrize(
    ("name", "by_slopes"),
    [("exponentials", 8.5), ("logistic", 6.0), ("saturating", 6.0), ("one-sided", 8.25)],
)
def test_a_single_hyperparameter_takes_fewer_evaluations_than_by_slopes_alone(
    name: str, by_slopes: float
) -> None:
    counts = [evaluations(SMOOTH[name], start, 1e-4) for start in (-4.0, 0.0, 1.0, 7.0)]
    assert sum(counts) / 4 <= by_slopes - 0.5


def test_a_kink_is_not_taken_for_noise() -> None:
    """Its place is found as by bisection; steps for noisy losses take 57 evaluations."""
    counts = [
        evaluations(lambda x: (x - 2.3).abs(), start, 1e-4) for start in (-4.0, 0.0, 1.0, 7.0)
    ]
    assert max(counts) <= 22


@pytest.mark.parametrize(("worse", "slope"), [(math.nan, math.nan), (100.0, 1e5), (100.0, -1e5)])
def test_a_step_into_a_hole_of_the_interval_is_not_taken_again(worse: float, slope: float) -> None:
    """Where it failed once it fails again: each further evaluation there would be in vain."""
    rule, bounds = TrustRegion(), ({"x": -6.0}, {"x": 8.0})
    for start in (-1.0, 1.0, 5.0):
        point = {"x": torch.tensor(start, dtype=torch.float64)}
        state, hole, seen = rule.init(point, *bounds), math.nan, []
        for _ in range(60):
            now = at(SMOOTH["exponentials"], float(point["x"]))
            if math.isnan(hole) and {e.slope > 0 for e in seen} == {True, False}:
                hole = now.at
            if abs(now.at - hole) < 0.05:
                now = OnLine(now.at, now.value + worse, now.slope + slope)
            seen.append(now)
            gradient = {"x": torch.tensor(now.slope, dtype=torch.float64)}
            proposal = rule.step(state, point, now.value, gradient, *bounds)
            if proposal.stop is not None:
                break
            point, state = proposal.point, proposal.state
        assert not math.isnan(hole)
        assert len({e.at for e in seen}) == len(seen)
