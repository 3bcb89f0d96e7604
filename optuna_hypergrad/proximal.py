"""A pull towards shared parameters, which makes the start of a task a hyperparameter of its solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._arguments import is_number
from ._errors import HyperparameterError, ProblemError
from ._typing import Batch, Objective, Params


@dataclass(frozen=True)
class Proximal:
    """What :func:`proximal` returns: an objective with a pull towards the shared parameters."""

    objective: Objective
    strength: str | float
    center: str

    def __call__(self, inner_params: Params, outer_params: Params, batch: Batch) -> Tensor:
        value = self.objective(inner_params, outer_params, batch)
        return value + self.pull(inner_params, outer_params, batch)

    def pull(self, inner_params: Params, outer_params: Params, batch: Batch) -> Tensor:
        """The proximal term alone."""
        strength: Any = self.strength
        if isinstance(strength, str):
            strength = _positive(outer_params, strength)
        squares = []
        for k, v in inner_params.items():
            shared = check_shared(outer_params, self.center, k, v.shape, "proximal(center=")
            squares.append((v - shared).square().sum())
        term: Tensor = 0.5 * strength * torch.stack(squares).sum()
        return term


def proximal(
    objective: Objective, strength: str | float = "strength", center: str = "theta."
) -> Objective:
    """``g(w, lam; batch) + strength / 2 * |w - theta|^2``, the inner objective of iMAML.

    Reference: Rajeswaran, Finn, Kakade & Levine (2019), equation 3.

    Args:
        objective: ``g`` of one task.
        strength: The name of an outer parameter, 0-d, or a number; positive. (The paper calls it lambda. For a
            hyperparameter give bounds with ``log=True``.)
        center: Prefix of the outer parameters that are ``theta``: ``w["a"]`` is pulled to ``outer_params["theta.a"]``.

    Raises:
        ProblemError: if ``strength`` is neither a name nor a positive number. When the objective is called:
            :class:`HyperparameterError` where an outer parameter is missing, has another shape than its inner one,
            or is not a positive strength.
    """
    if not callable(objective):
        raise ProblemError(f"proximal needs an objective, a function, got {objective!r:.80}.")
    named = isinstance(strength, str)
    if not named and not (is_number(strength) and 0 < strength < float("inf")):  # type: ignore[operator]
        raise ProblemError(
            f"proximal needs strength > 0, a number or the name of an outer parameter, got {strength!r:.80}."
        )
    if not isinstance(center, str):
        raise ProblemError(
            f'proximal needs a prefix of outer parameters as center ("theta."), got {center!r:.80}.'
        )
    return Proximal(objective, strength, center)


def _positive(outer_params: Params, name: str) -> Tensor:
    if name not in outer_params:
        raise HyperparameterError(
            f"proximal(strength={name!r}): there is no such outer parameter among {sorted(outer_params)}."
        )
    value = outer_params[name]
    if value.numel() != 1:
        raise HyperparameterError(
            f"proximal(strength={name!r}) needs one number, and outer_params[{name!r}] has shape {tuple(value.shape)}."
        )
    try:
        known = float(value.detach())
    except RuntimeError:  # a tangent of a transform: its value has been looked at before
        return value
    if not known > 0:
        raise HyperparameterError(
            f"proximal(strength={name!r}) needs a positive strength, and outer_params[{name!r}] is {known:g}; give it "
            f"bounds such as Domain(1e-3, 1e3, log=True)."
        )
    return value


def check_shared(
    outer_params: Params, prefix: str, name: str, shape: torch.Size, label: str
) -> Tensor:
    """The outer parameter that an inner one goes with."""
    key = prefix + name
    if key not in outer_params:
        raise HyperparameterError(
            f"{label}{prefix!r}): outer_params has no {key!r}, which the inner parameter {name!r} goes with; it has "
            f"{sorted(outer_params)}."
        )
    if outer_params[key].shape != shape:
        raise HyperparameterError(
            f"{label}{prefix!r}): outer_params[{key!r}] has shape {tuple(outer_params[key].shape)}, and the inner "
            f"parameter {name!r} of one task {tuple(shape)}; they must be equal."
        )
    return outer_params[key]
