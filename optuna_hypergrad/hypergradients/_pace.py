"""Step sizes of the estimators' own variables: schedules, and what is done where a linear system diverges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

from .._arguments import is_number
from .._results import SUCCESS, Result, Status

Schedule = float | Callable[[int], float]
"""A number, or a function of how many steps the estimator has taken."""

_TOO_MUCH = math.log(1e3)
"""How far steps may have lengthened ``|v|^2`` on balance before they are made shorter."""

_SHORTEST = 1e-9


def check_schedule(label: str, name: str, value: object, *, none: bool = False) -> None:
    """Refuse anything but a positive number or a function.

    Raises:
        ValueError: naming both.
    """
    if (none and value is None) or callable(value):
        return
    if not (is_number(value) and 0 < value < math.inf):  # type: ignore[operator]
        end = " or None" if none else ""
        raise ValueError(
            f"{label} needs {name} to be a finite number > 0, a function of the step{end}, got {value!r:.80}."
        )


def scheduled(label: str, name: str, value: Schedule, count: int) -> float:
    """The value of a schedule.

    Raises:
        ValueError: if a function gives no positive number.
    """
    found = float(value(count)) if callable(value) else float(value)
    if not 0 < found < math.inf:
        raise ValueError(f"{label}: {name} is {found} at step {count}; it must be finite and > 0.")
    return found


class Pace(NamedTuple):
    """The step size of ``v``, what is remembered of its growth, and whether it can go on."""

    step_size: float
    numbers: dict[str, float]
    result: Result = SUCCESS


def paced(
    label: str, step_size: float, products: tuple[float, float, float], numbers: dict[str, float]
) -> Pace:
    """The step size of ``v``, shortened where ``v <- v - step_size H v`` has kept lengthening ``v``.

    ``log(|v - step_size H v|^2 / |v|^2)`` is summed, as long as the sum is positive (a CUSUM): in expectation
    it falls whatever ``v`` is exactly where the steps are stable in mean square, single batches included.

    Args:
        products: ``v.v``, ``v.Hv`` and ``Hv.Hv``.
    """
    vv, vh, hh = products
    factor = numbers.get("step_size_factor", 1.0)
    eta = step_size * factor
    if vv == 0.0:
        return Pace(eta, {"step_size_factor": factor})
    if not math.isfinite(vv + abs(vh) + hh):
        message = (
            f"{label}: v, or its product with the inner Hessian, holds NaN or infinite values; lower step_size (of v), "
            f"and check that the inner objective is finite."
        )
        return Pace(eta, {"step_size_factor": factor}, Result(Status.NONFINITE, message))
    longer = 1.0 - 2.0 * eta * vh / vv + eta**2 * hh / vv
    growth = numbers.get("growth", 0.0) + math.log(max(longer, 1e-300))
    bend = numbers.get("bend", 0.0) + vh / vv
    if growth <= 0.0:
        return Pace(eta, {"step_size_factor": factor})
    if growth <= _TOO_MUCH:
        return Pace(eta, {"step_size_factor": factor, "growth": growth, "bend": bend})
    shorter = min(0.5, vh / (eta * hh)) if vh > 0 else 0.5
    if bend <= 0 or factor * shorter < _SHORTEST:
        message = (
            f"{label}: v has kept growing along directions in which the inner Hessian is negative (v.Hv / v.v is "
            f"{vh / vv:.2g}), so that H v = f_w has no solution that steps could reach. Give damping= more than that, "
            f"add a decay to the inner objective, or begin nearer to a minimum (burn_in=)."
        )
        failed = Result(Status.NEGATIVE_CURVATURE, message)
        return Pace(eta, {"step_size_factor": factor}, failed)
    warnings.warn(
        f"{label}: v grows at a step size of {eta:.3g}, as the inner Hessian has a curvature of {math.sqrt(hh / vv):.3g} "
        f"along it (2 over it is the limit); from here on it is {eta * shorter:.3g}. Give step_size= (of v) to avoid "
        f"the detour.",
        stacklevel=4,
    )
    return Pace(eta * shorter, {"step_size_factor": factor * shorter})
