"""What the closed forms are given, checked and brought to one shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _tree
from .._errors import HyperparameterError, ProblemError
from ._solving import common_shape


def checked_tensor(owner: str, name: str, value: object, least_dim: int = 0) -> Tensor:
    """Refuse anything but a finite tensor of float32 or float64.

    Raises:
        ProblemError: naming both.
    """
    if not isinstance(value, Tensor):
        raise ProblemError(
            f"{owner}: {name} is a {type(value).__name__}, not a tensor; use torch.as_tensor(...)."
        )
    if value.dtype not in (torch.float32, torch.float64):
        raise ProblemError(
            f"{owner}: {name} has dtype {value.dtype}, in which no system is factorized; use float64 or float32 "
            f"({name}.double())."
        )
    if value.dim() < least_dim:
        raise ProblemError(
            f"{owner}: {name} has shape {tuple(value.shape)}, and needs at least {least_dim} dimensions."
        )
    if value.numel() == 0:
        raise ProblemError(f"{owner}: {name} is empty, of shape {tuple(value.shape)}.")
    if not _tree.finite(value):
        raise ProblemError(f"{owner}: {name} holds NaN or infinite entries; take them out first.")
    return value


def checked_positive(owner: str, name: str, value: object, like: Tensor) -> Tensor:
    """A hyperparameter that must be positive, a number or a tensor, with the dtype and device of ``like``.

    Raises:
        HyperparameterError: naming it.
    """
    try:
        found = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=like.dtype)
    except (TypeError, ValueError, RuntimeError):
        raise HyperparameterError(
            f"{owner}: {name} is {value!r:.80}; give a number or a tensor."
        ) from None
    found = found.to(dtype=like.dtype, device=like.device)
    if not (found.numel() and _tree.finite(found) and bool((found > 0).all())):
        seen = f"its least entry is {float(found.min()):.3g}" if found.numel() else "it is empty"
        raise HyperparameterError(
            f"{owner}: {name} must be positive and finite, and {seen}. Suggest it with log=True and a positive lower "
            f"bound, or give its exponential."
        )
    return found


@dataclass(frozen=True)
class Systems:
    """Samples, targets and penalties as one batch of systems.

    Where targets have penalties of their own, each of them is one system of a further leading dimension.

    Attributes:
        x: Features ``(..., n, p)``, or a kernel ``(..., n, n)``.
        y: ``(..., n, k)``.
        penalty: ``(..., p)``, for a kernel ``(..., n)``.
        weights: ``(..., n)``.
        split: Whether targets were split.
        single: Whether there was one target, without a dimension of its own.
    """

    x: Tensor
    y: Tensor
    penalty: Tensor
    weights: Tensor
    split: bool
    single: bool

    def restored(self, found: Tensor) -> Tensor:
        """``(..., rows, k)`` of these systems in the layout of the targets that were given."""
        if self.split:
            found = found.squeeze(-1).mT
        return found.squeeze(-1) if self.single else found


def systems(
    owner: str, x: object, y: object, penalty: object, sample_weight: object, name: str = "x"
) -> Systems:
    """Check what a closed form is given.

    Raises:
        ProblemError: if data do not fit or are not finite.
        HyperparameterError: if the penalty does not fit, or is not positive.
    """
    x = checked_tensor(owner, name, x, least_dim=2)
    y = checked_tensor(owner, "y", y, least_dim=1)
    size = x.shape[-1]
    single = y.dim() == x.dim() - 1
    if y.dim() not in (x.dim() - 1, x.dim()) or y.shape[: x.dim() - 1] != x.shape[:-1]:
        targets = (*x.shape[:-1],)
        raise ProblemError(
            f"{owner}: y has shape {tuple(y.shape)} beside {name} of shape {tuple(x.shape)}; give {targets}, or "
            f"{(*targets, 'k')} for k targets."
        )
    if y.dtype != x.dtype or y.device != x.device:
        raise ProblemError(
            f"{owner}: y is {y.dtype} on {y.device}, {name} is {x.dtype} on {x.device}; make them the same."
        )
    y = y.unsqueeze(-1) if single else y
    penalty = checked_positive(owner, "penalty", penalty, x)
    k, batch = y.shape[-1], x.shape[:-2]
    each = "sample" if name == "kernel" else "feature"
    if penalty.dim() < 2:
        penalty = penalty.reshape(-1, 1)
    try:
        wanted = common_shape(penalty.shape, (*batch, size, k))
    except RuntimeError:
        wanted = torch.Size()
    if wanted != (*batch, size, k):
        raise HyperparameterError(
            f"{owner}: penalty of shape {tuple(penalty.shape)} does not fit {size} {each}s and {k} targets; give one "
            f"number, ({size},) for one per {each}, (1, {k}) for one per target, ({size}, {k}) for one per both, or "
            f"such with the leading dimensions {tuple(batch)} (for groups: penalty[group_of_{each}])."
        )
    weights = _checked_weights(owner, sample_weight, x)
    split = penalty.shape[-1] > 1
    if split:  # one system per target
        x, weights = x.unsqueeze(-3), weights.unsqueeze(-2)
        y, penalty = y.mT.unsqueeze(-1), penalty.mT
    else:
        penalty = penalty.squeeze(-1)
    penalty = penalty.expand(*penalty.shape[:-1], size)
    return Systems(x, y, penalty, weights, split, single)


def _checked_weights(owner: str, sample_weight: object, x: Tensor) -> Tensor:
    n = x.shape[-2]
    if sample_weight is None:
        return x.new_ones(n)
    weights = checked_tensor(owner, "sample_weight", sample_weight, least_dim=1).to(x)
    if weights.shape not in (x.shape[:-1], (n,)):
        raise ProblemError(
            f"{owner}: sample_weight has shape {tuple(weights.shape)}; give one per sample, {(n,)} or "
            f"{tuple(x.shape[:-1])}."
        )
    if bool((weights < 0).any()) or not bool((weights > 0).any(-1).all()):
        raise ProblemError(
            f"{owner}: sample_weight must not be negative, nor zero for all samples, and its least entry is "
            f"{float(weights.min()):.3g}; bound it below by 0 (or by something small)."
        )
    return weights


@dataclass(frozen=True)
class Folds:
    """``rows[f]`` are the samples of fold ``f``, padded to one length; ``real`` says which are not padding."""

    rows: Tensor
    real: Tensor

    def pick(self, values: Tensor) -> Tensor:
        """``(..., n, k)`` to ``(..., num_folds, size, k)``."""
        return values[..., self.rows, :]

    def pick_one(self, values: Tensor) -> Tensor:
        """``(..., n)`` to ``(..., num_folds, size)``, with zeros as padding."""
        return values[..., self.rows] * self.real

    def put_back(self, values: Tensor) -> Tensor:
        """``(..., num_folds, size, k)`` to ``(..., n, k)``, in the order of the samples."""
        flat = values.flatten(-3, -2)[..., self.real.flatten().nonzero().squeeze(-1), :]
        return flat[..., self.rows[self.real].argsort(), :]


def make_folds(owner: str, folds: int | Tensor, n: int, device: torch.device) -> Folds:
    """Folds from their number (blocks of successive samples), or from the number of each sample's fold.

    Raises:
        ProblemError: if there are fewer than two, or fewer samples than folds.
    """
    if isinstance(folds, bool) or not isinstance(folds, (int, Tensor)):
        raise ProblemError(
            f"{owner}: folds is {folds!r:.80}; give their number, or a tensor with the fold of each sample."
        )
    if isinstance(folds, int):
        if not 2 <= folds <= n:
            raise ProblemError(
                f"{owner}: {n} samples cannot be split into {folds} folds; use 2 to {n}"
                f"{' (with at least 2 samples)' if n < 2 else ''}."
            )
        larger = torch.arange(folds, device=device) < n % folds
        of_sample = torch.arange(folds, device=device).repeat_interleave(n // folds + larger)
    else:
        if folds.is_floating_point() or folds.dtype == torch.bool or folds.shape != (n,):
            raise ProblemError(
                f"{owner}: folds is a tensor of {folds.dtype} and shape {tuple(folds.shape)}; give the integer fold "
                f"of each sample, ({n},)."
            )
        _, of_sample = torch.unique(folds.to(device), return_inverse=True)
    counts = torch.bincount(of_sample)
    if len(counts) < 2:
        raise ProblemError(f"{owner}: all {n} samples are in one fold; at least two are needed.")
    order = of_sample.argsort(stable=True)
    column = torch.arange(int(counts.max()), device=device)
    real = column < counts.unsqueeze(-1)
    rows = torch.zeros_like(real, dtype=torch.long)
    rows[real] = order
    return Folds(rows, real)
