"""Hyperparameters that were suggested like a module, in that module's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._errors import HyperparameterError
from .._typing import Params


def laid_out(found: Mapping[str, Any], like: nn.Module | Mapping[str, Tensor]) -> Params:
    """The one dict of tensors in ``found`` that fits ``like``: its keys, in its order, on its devices.

    Raises:
        HyperparameterError: if none fits, or several.
    """
    params = dict(like.named_parameters()) if isinstance(like, nn.Module) else like
    if not isinstance(params, Mapping) or not all(isinstance(v, Tensor) for v in params.values()):
        raise TypeError(
            f"load_tensors: like= takes a module or a dict of tensors, not {type(like).__name__}."
        )
    reasons = {name: _why_not(value, params) for name, value in found.items()}
    fitting = [name for name, reason in reasons.items() if reason is None]
    if not fitting:
        told = "; ".join(f"{name!r} {reason}" for name, reason in list(reasons.items())[:3])
        raise HyperparameterError(
            f"No hyperparameter is laid out like the given {type(like).__name__}: {told}. Give what it was "
            "suggested like."
        )
    if len(fitting) > 1:
        raise HyperparameterError(
            f"{', '.join(map(repr, fitting[:4]))} are all laid out like the given {type(like).__name__}. Say "
            "which one: name=."
        )
    entries = found[fitting[0]]
    return {k: entries[k].to(v.device) for k, v in params.items() if k in entries}


def _why_not(value: Any, params: Mapping[str, Tensor]) -> str | None:
    """In words, why a hyperparameter is not laid out like ``params``."""
    if not isinstance(value, Mapping):
        return "is one tensor, no dict of them"
    for key, tensor in value.items():
        if key not in params:
            return f"has an entry {key!r}, which the other lacks"
        if tensor.shape != params[key].shape:
            shapes = f"{tuple(tensor.shape)} and not {tuple(params[key].shape)}"
            return f"has an entry {key!r} of shape {shapes}"
    return None
