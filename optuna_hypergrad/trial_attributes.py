"""What a trial says about itself in user attributes: numbers that serve as axes of plots, and summaries of tensors.

Names are plain, because they are read in a browser. What an objective has set under one of them is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from optuna.trial import FrozenTrial
from torch import Tensor

from ._typing import Params
from .search_space import Domain

HYPERGRADIENT_NORM = "hypergradient_norm"
"""In internal coordinates (natural steps), without entries that a bound holds back."""
NUM_HYPERPARAMETERS = "num_hyperparameters"
"""How many numbers move by hypergradients."""
NUM_PRODUCTS = "num_products"
"""Hessian-vector products that the trial's hypergradients took."""
OUTER_STEPS = "outer_steps"
"""Of a bilevel run inside the trial."""
TRAJECTORY = "trajectory"
"""Number of the trial that opened the trajectory of which this trial is a step."""
TRAJECTORY_STEP = "trajectory_step"
"""Outer steps before this one on its trajectory: 0 at the start."""
VALUE_KIND = "value_kind"
"""``cold`` or ``warm``; not set by a bilevel run that was trained again at its end: see :func:`value_kind_of`."""
COLD_VALUE, WARM_VALUE, RETRAINED_VALUE = "cold_value", "warm_value", "retrained_value"
"""Of a bilevel run inside the trial: the first or the second, and the third where it was trained again at its end."""
ESTIMATOR = "estimator"
SUMMARY_PREFIX = "tensor:"
"""Followed by a tensor's flat name: its shape and quantiles, as :func:`summary_of` gives them."""
NUMBERS = ("norm", "at_low", "at_high")
"""Each followed by ``:`` and a tensor's flat name: its Euclidean norm, and the shares of its entries at a bound."""

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
MAX_SUMMARIES = 4
"""Of one trial: the dashboard sends the attributes of every trial, again and again."""

_MAX_SORTED = 1 << 17
"""Quantiles of more entries than this are those of as many at equal distances."""
_ROUNDING = 1e-5
_MAX_NAME = 100
_MAX_DESCRIPTION = 120


def value_kind_of(trial: FrozenTrial) -> str | None:
    """Whether a trial's value is ``"cold"``, ``"warm"`` or ``"retrained"``; ``None`` where that is not known."""
    attributes = trial.user_attrs
    if RETRAINED_VALUE not in attributes:
        kind = attributes.get(VALUE_KIND)
        return kind if kind in ("cold", "warm") else None
    named = {"retrained": RETRAINED_VALUE, "warm": WARM_VALUE, "cold": COLD_VALUE}
    values = trial.values or (None,)
    found = (kind for kind, key in named.items() if attributes.get(key) == values[0])
    return None if values[0] is None else next(found, None)


def summary_of(value: Tensor, domain: Domain) -> dict[str, Any]:
    """Of one tensor: small enough for an attribute that is sent at each poll.

    Args:
        value: external, of any shape with at least one entry.

    Returns:
        ``shape``; ``log`` where it is tuned on that scale; ``min``, ``q05`` to ``q95`` and ``max``; and :data:`NUMBERS`,
        where there is a bound. Four significant digits. Quantiles of more than 131,072 entries are those of a sample at
        equal distances. A number that is not finite is ``None``.
    """
    flat = value.detach().reshape(-1)
    low, high = domain.bounds_as(flat)
    if domain.log:  # what was projected there in the logarithm comes back a little inside
        low, high = low * (1.0 + _ROUNDING), high * (1.0 - _ROUNDING)
    numbers: dict[str, float] = {}
    sample = flat[:: math.ceil(flat.numel() / _MAX_SORTED)]
    least, most = (float(v) for v in torch.aminmax(flat))
    array = sample.to("cpu", torch.float32 if sample.dtype.itemsize < 4 else sample.dtype).numpy()
    found = np.quantile(array, list(QUANTILES.values()))
    numbers["min"] = least
    numbers |= {k: min(max(float(q), least), most) for k, q in zip(QUANTILES, found, strict=True)}
    numbers["max"] = most
    numbers["norm"] = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
    if math.isfinite(domain.low):
        numbers["at_low"] = int(torch.count_nonzero(flat <= low)) / flat.numel()
    if math.isfinite(domain.high):
        numbers["at_high"] = int(torch.count_nonzero(flat >= high)) / flat.numel()
    scale = {"log": True} if domain.log else {}
    return {"shape": list(value.shape), **scale, **{k: _short(v) for k, v in numbers.items()}}


def summaries_of(values: Params, domains: Mapping[str, Domain]) -> dict[str, Any]:
    """Attributes that summarize the largest of a trial's tensors, at most :data:`MAX_SUMMARIES`.

    Args:
        values: external, by flat name.
    """
    sized = sorted((n for n in values if values[n].numel()), key=lambda n: (-values[n].numel(), n))
    shown = [n for n in sized if len(n) <= _MAX_NAME][:MAX_SUMMARIES]
    found: dict[str, Any] = {}
    for name in shown:
        summary = summary_of(values[name], domains[name])
        numbers = {f"{k}:{name}": summary.pop(k) for k in NUMBERS if k in summary}
        found |= {SUMMARY_PREFIX + name: summary, **numbers}
    return found


def summaries_in(attributes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What :func:`summaries_of` has put there, by flat name, the largest first. Anything else is left out."""
    found = {}
    for key, value in attributes.items():
        if isinstance(key, str) and key.startswith(SUMMARY_PREFIX) and isinstance(value, dict):
            name, shape = key.removeprefix(SUMMARY_PREFIX), value.get("shape")
            if isinstance(shape, list) and all(type(n) is int for n in shape):
                numbers = {k: attributes.get(f"{k}:{name}") for k in NUMBERS}
                found[name] = value | {k: v for k, v in numbers.items() if v is not None}
    return dict(sorted(found.items(), key=lambda item: (-math.prod(item[1]["shape"]), item[0])))


def projected_norm(gradient: Params, values: Params, domains: Mapping[str, Domain]) -> float:
    """Norm of a gradient (external, of what is minimized) in internal coordinates, where nothing holds it back.

    Args:
        gradient: by name.
        values: at which it was taken: external, with the same names and shapes.
    """
    norms = []
    for name, g in gradient.items():
        v, domain = values[name].detach(), domains[name]
        slope = domain.internal_gradient(g.detach(), v)
        low, high = domain.bounds_as(v)
        blocked = ((v <= low) & (slope > 0)) | ((v >= high) & (slope < 0))
        norm = torch.linalg.vector_norm(slope.masked_fill(blocked, 0.0), dtype=torch.float64)
        norms.append(float(norm))
    return math.hypot(*norms)  # squares of finite numbers may overflow


def described(settings: object) -> str:
    """A solver or estimator in short: its class and those of its settings that differ from their defaults.

    ``Implicit(Neumann(num_steps=5), damping=0.1)``; at most 120 characters.
    """
    text = _described(settings, 3)
    return text if len(text) <= _MAX_DESCRIPTION else f"{text[: _MAX_DESCRIPTION - 3]}..."


def _described(settings: object, depth: int) -> str:
    fields = getattr(settings, "__dataclass_fields__", None)
    if fields is None or depth == 0:
        return type(settings).__name__
    try:
        usual: object = type(settings)()
    except Exception:  # somebody's own class, which needs arguments or refuses its defaults
        usual = None
    shown = []
    for name, field in fields.items():
        value = getattr(settings, name, None)
        if not field.init or _same(value, getattr(usual, name, field.default)):
            continue
        if isinstance(value, (bool, int, float, str)):
            shown.append(f"{name}={value!r:.40}")
        elif hasattr(value, "__dataclass_fields__"):
            shown.append(_described(value, depth - 1))
    return f"{type(settings).__name__}({', '.join(shown)})"


def _same(value: object, default: object) -> bool:
    if type(value) is not type(default):
        return False
    try:
        return value is default or bool(value == default)
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors
        return False


def _short(number: float) -> float | int | None:
    if not math.isfinite(number):
        return None
    rounded = float(f"{number:.4g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded
