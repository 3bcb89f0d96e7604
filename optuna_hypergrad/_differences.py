"""A directional derivative by finite differences that know how far they may be off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from ._typing import Params

_FIRST, _RATIO, _LEVELS = 0.02, 4.0, 10
"""Steps, relative to the direction: 2e-2, 5e-3, ... 8e-8."""

Value = Callable[[Params], float]


def noise_level(value: Value, lam: Params, direction: Params, epsilon: float) -> float:
    """Standard deviation of what makes ``value`` rough at the smallest scale; NaN where it is not finite.

    From third differences of seven values very close to each other, in which a smooth function does not show.

    Reference: Moré & Wild (2011), "Estimating computational noise".
    """
    spacing = max(1e-7, 64 * epsilon)
    differences = [value(_moved(lam, direction, i * spacing)) for i in range(7)]
    for _ in range(3):
        differences = [b - a for a, b in itertools.pairwise(differences)]
    return math.sqrt(sum(d * d for d in differences) / len(differences) / 20)


def directional_derivative(
    value: Value,
    lam: Params,
    direction: Params,
    *,
    middle: float,
    epsilon: float,
    noise: float = 0.0,
    rtol: float = 1e-3,
) -> tuple[float, float]:
    """The derivative of ``value`` along ``direction``, and how far it may be off.

    Central differences, extrapolated to a step of zero; the best entry of the table by its distance from its
    neighbors, doubled, plus what a kink at ``lam`` would make. NaN and infinity where no two steps in a row give finite
    values.

    Reference: Ridders (1982), "Accurate computation of F'(x) and F'(x)F''(x)".

    Args:
        middle: ``value(lam)``.
        epsilon: Relative rounding error of ``value`` and ``lam``.
        noise: Of ``value``, absolute.
        rtol: Steps end where the error is far below this, relatively.
    """
    best, error, kink = math.nan, math.inf, math.inf
    last: list[float] = []
    last_bend = math.nan
    for level in range(_LEVELS):
        h = _FIRST * _RATIO**-level
        above, below = (value(_moved(lam, direction, step)) for step in (h, -h))
        slope, bend = (above - below) / (2 * h), (above + below - 2 * middle) / (2 * h)
        if not math.isfinite(slope):  # too far for the inner problem
            last = []
            continue
        rough = (3 * noise + epsilon * (2 * max(abs(above), abs(below)) + abs(slope))) / h
        now = [slope]
        for i, before in enumerate(last):
            power = _RATIO ** (2 * (i + 1))
            now.append((power * now[i] - before) / (power - 1))
            spread = max(abs(now[-1] - now[-2]), abs(now[-1] - before)) + rough
            if spread < error:
                best, error = now[-1], spread
        if last:  # a bend falls with h; a kink does not
            kink = max(0.0, abs(_RATIO * bend - last_bend) / (_RATIO - 1) - 2 * rough)
        last, last_bend = now, bend
        close_enough = error + kink < 1e-2 * rtol * abs(best)
        if level >= 2 and (close_enough or rough > error):  # smaller steps are rougher still
            break
    return best, 2 * error + kink


def _moved(lam: Params, direction: Params, step: float) -> Params:
    return {
        k: (v.double() + step * direction[k]).to(v.dtype) if k in direction else v
        for k, v in lam.items()
    }
