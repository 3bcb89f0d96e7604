"""Settings of a step solver that may be hyperparameters: numbers, names of outer parameters, or schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _tree
from .._arguments import is_number
from .._errors import RequirementError
from .._typing import Params

Setting = float | str | Callable[[Params, int], Tensor | Params]
"""A number; the name of an outer parameter (0-d, or 1-D with an entry for each step); or
``(outer_params, step) -> tensor`` (0-d, or a dict with a factor for each inner parameter)."""

Value = float | Tensor | Params


def resolve(setting: Setting, outer_params: Params, index: int, label: str) -> Value:
    """A setting's value at a step: a number, or tensors that carry their graph.

    Raises:
        RequirementError: naming ``label``, if it names an outer parameter that does not exist, or that
            has no entry for this step.
    """
    if callable(setting):
        value = setting(outer_params, index)
        if not all(is_number(v) or isinstance(v, Tensor) for v in _parts(value)):
            raise RequirementError(
                f"The inner solver's {label} is a function that gave {value!r:.80} at step {index}; it must give one "
                f"number (a number or a 0-d tensor, such as outer_params['lr']), or a dict with a factor for each inner "
                f"parameter."
            )
        if isinstance(value, Tensor) and value.dim() > 0:
            raise RequirementError(
                f"The inner solver's {label} is a function that gave a tensor of shape {tuple(value.shape)} at step "
                f"{index}; it must give one number, or a dict with a factor for each inner parameter."
            )
        return value
    if not isinstance(setting, str):
        return setting
    if setting not in outer_params:
        raise RequirementError(
            f"The inner solver's {label} is the outer parameter {setting!r}, which is not among "
            f"{sorted(outer_params)}."
        )
    found = outer_params[setting]
    if found.dim() == 0:
        return found
    if found.dim() > 1:
        raise RequirementError(
            f"The inner solver's {label} is the outer parameter {setting!r} of shape {tuple(found.shape)}; it "
            f"must be 0-d, or 1-D with an entry for each inner step. For a factor for each inner parameter, "
            f"give a function: {label}=lambda lam, step: {{...}}."
        )
    if index >= len(found):
        raise RequirementError(
            f"The inner solver's {label} {setting!r} has an entry for each of {len(found)} inner steps, and "
            f"step {index} was reached. Give it more entries, or lower max_steps (under warm starts, steps are "
            f"counted on: use cold starts)."
        )
    return found[index]


def _parts(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else [value]


def times(tree: Params, factor: Value) -> Params:
    """``tree`` times a number, or entry by entry times a tree of factors that broadcast; in its own dtypes.

    Raises:
        RequirementError: if the factors are not those of ``tree``.
    """
    if not isinstance(factor, dict):
        return {k: (v * factor).to(v.dtype) for k, v in tree.items()}
    if factor.keys() != tree.keys():
        raise RequirementError(
            f"A setting of the inner solver has factors for {sorted(factor)}, and the inner parameters are "
            f"{sorted(tree)}."
        )
    for k, v in tree.items():
        shape = tuple(getattr(factor[k], "shape", ()))
        aligned = zip(reversed(shape), reversed(v.shape), strict=False)
        if len(shape) > v.dim() or any(n not in (1, size) for n, size in aligned):
            raise RequirementError(
                f"A setting of the inner solver has a factor of shape {shape} for {k!r}, which has the shape "
                f"{tuple(v.shape)}; give one that broadcasts to it."
            )
    return {k: (v * factor[k]).to(v.dtype) for k, v in tree.items()}


def less(tree: Params, direction: Params, factor: Value) -> Params:
    """``tree - factor * direction``, as :func:`times` multiplies; in one pass where the factor is a number."""
    if isinstance(factor, (int, float)) and all(
        direction[k].dtype == v.dtype for k, v in tree.items()
    ):
        return {k: torch.add(v, direction[k], alpha=-factor) for k, v in tree.items()}
    return _tree.sub(tree, times(direction, factor))


def check_setting(label: str, setting: object) -> None:
    """Refuse what is no number, name or schedule; a tensor above all, which would be a constant.

    Raises:
        ValueError: naming ``label``.
    """
    if isinstance(setting, Tensor):
        raise ValueError(
            f"{label} is a tensor, of which no hypergradient would be taken. To tune it, put it among the outer "
            f'parameters and give its name ({{"lr": lr}} and step_size="lr"); otherwise give float(...).'
        )
    if not (is_number(setting) or isinstance(setting, str) or callable(setting)):
        raise ValueError(
            f"{label} must be a number, the name of an outer parameter, or a function of (outer_params, step), got "
            f"{setting!r:.80}."
        )


def check_number(label: str, setting: Setting, low: float, high: float = math.inf) -> None:
    """Refuse a number outside of ``[low, high)``; names and schedules are looked at when they are used.

    Raises:
        ValueError: naming ``label``.
    """
    if isinstance(setting, (int, float)) and not low <= setting < high:
        bound = "" if math.isinf(high) else f" and below {high:g}"
        raise ValueError(f"{label} must be at least {low:g}{bound}, got {setting}.")
