"""Gradients of single samples by parameters outside of the layers whose gradients are products: written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _tree
from .._errors import RequirementError
from .._typing import Params
from ..operators import InnerGraph
from ._layers import Layer, Settings

_AT_ONCE = 64
"""Samples whose gradients are computed at once."""


@dataclass(frozen=True)
class Strays:
    """Inner parameters that no covered layer has, as one row.

    Attributes:
        shapes: By name.
        name: In place of a layer's.
    """

    shapes: dict[str, torch.Size]
    name: str = ""

    @classmethod
    def of(cls, graph: InnerGraph, layers: Sequence[Layer]) -> Strays | None:
        """``None`` where the layers have all inner parameters."""
        covered = {k for layer in layers for k in (layer.weight, layer.bias)}
        shapes = zip(graph.layout.names, graph.layout.shapes, strict=True)
        found = {k: s for k, s in shapes if k not in covered}
        return cls(found) if found else None

    @property
    def size(self) -> int:
        return sum(s.numel() for s in self.shapes.values())

    def matrix(self, parts: Params) -> Tensor:
        return torch.cat([parts[k].reshape(-1) for k in self.shapes])[None]

    def tensors(self, matrix: Tensor) -> Params:
        parts = torch.split_with_sizes(matrix[0], [s.numel() for s in self.shapes.values()])
        return {k: p.reshape(s) for (k, s), p in zip(self.shapes.items(), parts, strict=True)}

    def gradients(self, settings: Settings, graph: InnerGraph, cotangents: list[Tensor]) -> Tensor:
        """``(k, n, size)``: by these parameters, of each sample's outputs times each cotangent.

        Raises:
            RequirementError: if one is not the model's, or the model does not run on single samples.
        """
        given = settings.inputs(graph.batch)
        arguments = given if isinstance(given, tuple) else (given,)
        known = {settings.prefix + k: k for k, _ in settings.model.named_parameters()}
        unknown = [k for k in self.shapes if k not in known]
        if unknown:
            raise RequirementError(
                f"{type(settings).__name__}(uncovered='per_sample') covers parameters of the model, and {unknown[0]!r} is "
                f"none. Set prefix=, or uncovered='identity'."
            )
        w = {k: v.detach() for k, v in _tree.leaves(graph.inner_params).items()}
        fixed = {known[k]: v for k, v in w.items() if k in known and k not in self.shapes}
        fixed |= {k: b.detach().clone() for k, b in settings.model.named_buffers()}

        def value(strays: Params, cotangent: Tensor, *sample: Tensor) -> Tensor:
            values = fixed | {known[k]: v for k, v in strays.items()}
            alone = tuple(s[None] for s in sample)
            outputs: Tensor = torch.func.functional_call(settings.model, values, alone)
            return (outputs[0] * cotangent).sum()

        each = torch.func.vmap(
            torch.func.grad(value),
            in_dims=(None, 0, *(0 for _ in arguments)),
            randomness="different",
            chunk_size=_AT_ONCE,
        )
        own = {k: w[k] for k in self.shapes}
        found = []
        try:
            with torch.random.fork_rng():
                for cotangent in cotangents:
                    by_name = each(own, cotangent, *arguments)
                    rows = [by_name[k].reshape(len(cotangent), -1) for k in self.shapes]
                    found.append(torch.cat([r.to(graph.layout.dtype) for r in rows], 1))
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise RequirementError(
                f"{type(settings).__name__}(uncovered='per_sample') could not run the model on single samples, for the "
                f"gradients by {list(self.shapes)[:3]}: {type(error).__name__}: {error}. Use uncovered='identity', "
                f"eval() mode, or NystromPreconditioner."
            ) from error
        return torch.stack(found)
