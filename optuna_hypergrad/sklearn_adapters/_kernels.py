"""scikit-learn's kernels as differentiable functions, and what of them stays the same in all trials of a fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..closed_form.kernels import _exponent
from ._adapter import Fold

KERNELS = ("linear", "rbf", "laplacian", "poly", "polynomial", "sigmoid")
"""By scikit-learn's names. All but the first have a ``gamma``."""


def of_fold(
    kernel: str, settings: Mapping[str, Any], fold: Fold, memory: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Kernels of the training samples with themselves ``(n, n)``, and of the test samples with them ``(m, n)``.

    Args:
        kernel: A name in :data:`KERNELS`.
        settings: ``gamma``, a tensor or a number, and ``coef0`` and ``degree``.
        fold: Its samples.
        memory: Of the fold: distances and products are kept there while the samples stay the same.
    """
    among, across = pairs_of_fold(kernel, fold, memory)
    return _kernel(kernel, among, settings), _kernel(kernel, across, settings)


def pairs_of_fold(kernel: str, fold: Fold, memory: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the kernels of :func:`of_fold` are functions of, ``(n, n)`` and ``(m, n)``."""
    among = _remembered(kernel, "among", fold.x_train, fold.x_train, memory)
    across = _remembered(kernel, "across", fold.x_test, fold.x_train, memory)
    return among, across


def is_radial(kernel: str, fold: Fold) -> bool:
    """Whether a kernel is an exponential of a distance times ``gamma``, or a plain product, of samples without a graph."""
    given = (fold.x_train, fold.x_test, fold.weights)
    graph = any(isinstance(t, Tensor) and t.requires_grad for t in given)
    return kernel in ("linear", "rbf", "laplacian") and not graph


def remembered(
    memory: dict[str, Any], key: str, given: tuple[Any, ...], make: Callable[[], Any]
) -> Any:
    """``make()``, once for as long as ``given`` are the same objects, and none of them requires grad."""
    if any(isinstance(g, Tensor) and g.requires_grad for g in given):
        return make()
    kept = memory.get(key)
    if kept is None or any(a is not b for a, b in zip(kept[0], given, strict=True)):
        memory[key] = kept = (given, make())
    return kept[1]


def _remembered(kernel: str, key: str, a: Tensor, b: Tensor, memory: dict[str, Any]) -> Tensor:
    def made() -> Tensor:
        found = _pairs(kernel, a, b)
        return 0.5 * (found + found.mT) if a is b else found  # symmetric but for rounding

    kept: Tensor = remembered(memory, f"{key} {kernel}", (a, b), made)
    return kept


def _pairs(kernel: str, a: Tensor, b: Tensor) -> Tensor:
    """What the kernel is a function of, for each pair: minus a distance, or a product."""
    if kernel == "rbf":
        negative = 2 * _exponent(a, b, a.new_ones(()))
        return negative - negative.detach().clamp_min(0.0)  # above zero by rounding
    if kernel == "laplacian":
        return -torch.cdist(a, b, p=1.0)
    return a @ b.mT


def _kernel(kernel: str, pairs: Tensor, settings: Mapping[str, Any]) -> Tensor:
    if kernel == "linear":
        return pairs
    scaled = settings["gamma"] * pairs
    if kernel in ("rbf", "laplacian"):
        return torch.exp(scaled)
    shifted = scaled + settings["coef0"]
    return torch.tanh(shifted) if kernel == "sigmoid" else shifted ** settings["degree"]


def with_zero_slopes(predicted: Tensor, params: Mapping[str, Tensor], used: set[str]) -> Tensor:
    """The same, of slope zero in hyperparameters that the fit does not depend on.

    That is no mistake of a caller: a search over kernels has settings of all of them.
    """
    for name, value in params.items():
        if name not in used:
            predicted = predicted + 0.0 * value
    return predicted
