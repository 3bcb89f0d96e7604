"""Random subspaces of the inner parameters, block by block: ``P`` with ``E[P P^T] = I``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._errors import RequirementError
from .._twice import saying_what_has_no_second_derivative
from .._typing import Batch, Objective, Params
from ..operators import scalar
from ._estimate import Cotangents

SketchLaw = Literal["gaussian", "rademacher", "orthonormal"]
SKETCH_LAWS: tuple[SketchLaw, ...] = ("gaussian", "rademacher", "orthonormal")


@dataclass(frozen=True)
class Sketch:
    """The subspace of one block, seen as a matrix ``(m, n)`` (its first dimension by all others).

    Attributes:
        shape: Of the block.
        basis: ``P``, ``(m, r)``; ``None`` for a block that is left whole.
    """

    shape: torch.Size
    basis: Tensor | None

    @property
    def share(self) -> float:
        """``r / m``."""
        return 1.0 if self.basis is None else self.basis.shape[1] / self.basis.shape[0]

    def down(self, block: Tensor) -> Tensor:
        """``P^T W``: ``(r, n)``."""
        return block if self.basis is None else self.basis.mT @ block.reshape(self.shape[0], -1)

    def up(self, coordinates: Tensor) -> Tensor:
        """``P C``, in the block's shape."""
        return coordinates if self.basis is None else (self.basis @ coordinates).reshape(self.shape)

    def moved(self, block: Tensor, coordinates: Tensor, by: float) -> Tensor:
        """``W + by P C`` in one go."""
        if self.basis is None:
            return block.add(coordinates, alpha=by)
        flat = block.reshape(self.shape[0], -1)
        return torch.addmm(flat, self.basis, coordinates, alpha=by).reshape(self.shape)

    def move(self, block: Tensor, coordinates: Tensor, by: float) -> None:
        """``W <- W + by P C``, in the memory of ``W``, which must be contiguous."""
        if self.basis is None:
            block.add_(coordinates, alpha=by)
        else:
            block.view(self.shape[0], -1).addmm_(self.basis, coordinates, alpha=by)

    def square(self, coordinates: Tensor) -> float:
        """``|P C|^2``."""
        if self.basis is None:
            return float(coordinates.square().sum())
        return float(((self.basis.mT @ self.basis) @ coordinates).mul_(coordinates).sum())


Sketches = dict[str, Sketch]


def rank_of(label: str, name: str, shape: torch.Size, rank: int | float) -> int | None:
    """``r`` of a block; ``None`` for one that is no matrix, and is left whole.

    Raises:
        RequirementError: if it has fewer rows than that.
    """
    if len(shape) < 2 or not shape.numel():
        return None
    if isinstance(rank, float):
        return max(1, math.ceil(rank * shape[0]))
    if rank > shape[0]:
        raise RequirementError(
            f"{label}(rank={rank}) is larger than the inner parameter {name!r} of shape {tuple(shape)}, a block of "
            f"{shape[0]} rows; lower it, give a fraction of the rows (rank=0.25), or transpose {name!r}."
        )
    return rank


def draw(
    label: str,
    law: SketchLaw,
    rank: int | float,
    key: tuple[int, ...],
    inner_params: Params,
    whole: Collection[str] = (),
) -> Sketches:
    """Independent sketches of all blocks but those that are left ``whole``; equal keys give equal bytes."""
    found: Sketches = {}
    for i, (name, block) in enumerate(inner_params.items()):
        r = None if name in whole else rank_of(label, name, block.shape, rank)
        if r is None:
            found[name] = Sketch(block.shape, None)
            continue
        m, generator = block.shape[0], generator_of((*key, i))
        dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
        if law == "rademacher":
            basis = signs((m, r), generator).to(dtype) / math.sqrt(r)
        else:
            basis = torch.randn(m, r, generator=generator, device="cpu", dtype=dtype) / math.sqrt(r)
        if law == "orthonormal":
            q, upper = torch.linalg.qr(basis)
            basis = q * torch.where(upper.diagonal() < 0, -1.0, 1.0) * math.sqrt(m / r)
        found[name] = Sketch(block.shape, basis.to(block))
    return found


def generator_of(key: tuple[int, ...]) -> torch.Generator:
    mixed = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]) >> 1)


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, shape, generator=generator, device="cpu") - 1.0


def sketched_gradient(
    value: Tensor,
    inner_params: Params,
    outer_params: Params,
    sketches: Sketches,
    keep: bool = False,
) -> tuple[Params, Cotangents]:
    """``P^T`` times the gradient with respect to each block, and that with respect to each hyperparameter.

    Both dicts are leaves. The gradient of a block is projected and let go as soon as autograd has it, before that
    of the next one is made.

    Args:
        keep: Keep the graph.
    """
    found: Params = {}

    def project(name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        found[name] = sketches[name].down(leaf.grad)
        leaf.grad = None

    hooks: list[Any] = [
        leaf.register_post_accumulate_grad_hook(lambda leaf, k=k: project(k, leaf))  # type: ignore[no-untyped-call]
        for k, leaf in inner_params.items()
    ]
    try:
        if value.requires_grad:
            leaves = [*inner_params.values(), *outer_params.values()]
            torch.autograd.backward(value, inputs=leaves, retain_graph=keep)
    finally:
        for hook in hooks:
            hook.remove()
    by_outer = {k: v.grad for k, v in outer_params.items()}
    for v in outer_params.values():
        v.grad = None
    for k, leaf in inner_params.items():
        if k not in found:
            found[k] = sketches[k].down(torch.zeros_like(leaf))
    return {k: found[k] for k in inner_params}, by_outer


@dataclass(frozen=True)
class SketchedProducts:
    """What one pass gives: ``g``, ``P^T g_w`` (where asked for), ``P^T H t`` and ``M^T t``."""

    value: Tensor
    slope: Params
    product: Params
    mixed: Cotangents


def sketched_products(
    inner_objective: Objective,
    inner_params: Params,
    outer_params: Params,
    batch: Batch,
    tangent: Mapping[str, Tensor],
    sketches: Sketches,
    slope: bool,
) -> SketchedProducts:
    """One forward pass with the tangent ``t`` of ``w``, and one or two backward ones: reverse over forward.

    Args:
        tangent: By block; a block that it lacks does not move.
        slope: Whether ``P^T g_w`` is asked for, too.

    Raises:
        RequirementError: if an operation has no forward-mode derivative, or that no derivative.
    """
    w, lam = _tree.leaves(inner_params), _tree.leaves(outer_params)
    names = [k for k in w if k in tangent]

    def value(*moving: Tensor) -> Tensor:
        at = {**w, **dict(zip(names, moving, strict=True))}
        return scalar(inner_objective(dict(at), dict(lam), batch), "inner_objective")

    points, tangents = tuple(w[k] for k in names), tuple(tangent[k] for k in names)
    with torch.enable_grad(), saying_what_has_no_second_derivative():
        try:
            found: Any = torch.func.jvp(value, points, tangents)
            primal, pushed = found
        except (NotImplementedError, RuntimeError) as error:
            said = str(error).strip().partition("\n")[0].rstrip(".")
            if "forward" not in said and "jvp" not in said:
                raise
            raise RequirementError(
                f"BROS takes forward-mode derivatives of inner_objective, and one of its operations has none "
                f"({said:.200}); write it with others, or use MASOBA."
            ) from error
        if not primal.requires_grad:
            raise RequirementError(
                "inner_objective does not depend on inner_params through differentiable torch operations."
            )
        gradient = sketched_gradient(primal, w, lam, sketches, keep=True)[0] if slope else {}
        product, mixed = sketched_gradient(pushed, w, lam, sketches)
    return SketchedProducts(primal.detach(), gradient, product, mixed)
