"""Gradients of single samples by a layer's weights, as products of what it is fed and of what comes back.

For sample ``i`` and a cotangent of its outputs, the gradient by a layer's weight is ``sum_t d_it a_it^T`` over the
places ``t`` where the layer is applied (1 for a linear layer that is applied once; the positions of a convolution).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import RequirementError
from .._typing import Params
from ._layers import Layer

_AT_ONCE = 64
"""Gradients that are written out at once."""


@dataclass
class SampledLayer(Layer):
    """A layer that keeps what each sample feeds it.

    Attributes:
        seen: Per call, ``(samples, places, inputs)``, a 1 appended for the bias.
    """

    seen: list[Tensor] = field(default_factory=list)

    def see(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        given = arguments[0].detach()
        rows = self._input_rows(given).to(self.dtype)
        if self.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        alone = given.ndim == (1 if isinstance(module, nn.Linear) else 3)
        self.seen.append(rows.reshape(1 if alone else len(given), -1, rows.shape[1]))
        self.outputs.append(output)
        return output.clone()

    def inputs(self, samples: int, owner: str) -> Tensor:
        """``(samples, places, inputs)`` over all calls.

        Raises:
            RequirementError: if the layer is not applied sample by sample.
        """
        for seen in self.seen:
            if len(seen) != samples:
                raise RequirementError(
                    f"{owner}: the layer {self.name!r} is applied to {len(seen)} rows where the model returns {samples}, so "
                    f"that it cannot be said which row belongs to which sample. Keep the samples as the first dimension "
                    f"inside of the model, or use NystromPreconditioner."
                )
        return _joined(self.seen)

    def slopes(self, gradients: Sequence[Tensor]) -> Tensor:
        """``(samples, places, outputs)`` of gradients by the outputs of all calls."""
        rows = [
            self.rows_of(g).reshape(len(a), -1, self.shape[0])
            for g, a in zip(gradients, self.seen, strict=True)
        ]
        return _joined(rows).to(self.dtype)

    def outputs_like(self, rows: Tensor) -> list[Tensor]:
        """``(samples, places, outputs)`` in the shapes of the calls' outputs: the inverse of :meth:`slopes`."""
        parts = torch.split_with_sizes(rows, [a.shape[1] for a in self.seen], dim=1)
        found = []
        for part, output in zip(parts, self.outputs, strict=True):
            if isinstance(self.module, nn.Conv2d):
                part = part.mT
            found.append(part.reshape(output.shape).to(output.dtype))
        return found


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def squared_lengths(inputs: Tensor, slopes: Tensor) -> Tensor:
    """``(k, samples)``: ``|sum_t d_t a_t^T|^2`` of slopes ``(k, samples, places, outputs)``."""
    if inputs.shape[1] == 1:
        return inputs.square().sum((1, 2)) * slopes.square().sum((2, 3))
    found = [
        torch.einsum("ksto,sti->ksoi", d, a).square_().sum((2, 3))
        for d, a in zip(
            torch.split(slopes, _AT_ONCE, 1), torch.split(inputs, _AT_ONCE), strict=True
        )
    ]
    return torch.cat(found, 1)


@dataclass(frozen=True)
class Gradients:
    """``r`` gradients of single samples by one layer's weight, never written out where they are long.

    The pairs of a sample and a cotangent are ordered so that the first ``counts[0]`` are one of each sample, the next
    ``counts[1]`` a second one of the first ``counts[1]`` samples, and so on: sums over the pairs of a sample are sums of
    slices.

    Attributes:
        inputs: ``(samples, places, inputs)``.
        slopes: ``(r, places, outputs)``.
        counts: Falling; they sum up to ``r``.
        written: ``(r, outputs * inputs)``, where that is shorter.
    """

    inputs: Tensor
    slopes: Tensor
    counts: tuple[int, ...]
    written: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensor, slopes: Tensor, counts: tuple[int, ...]) -> Gradients:
        found = cls(inputs, slopes, counts)
        if not writes_out(inputs.shape, slopes.shape[-1]):
            return found
        parts = [found._columns(i) for i in range(0, len(slopes), _AT_ONCE)]
        return cls(inputs, slopes, counts, torch.cat(parts))

    def tensors(self) -> Params:
        """What is needed to multiply with them."""
        if self.written is not None:
            return {"written": self.written}
        return {"inputs": self.inputs, "slopes": self.slopes}

    @classmethod
    def again(cls, tensors: Params, counts: tuple[int, ...]) -> Gradients:
        """From :meth:`tensors`."""
        nothing = torch.empty(0, device="cpu")
        return cls(
            tensors.get("inputs", nothing),
            tensors.get("slopes", nothing),
            counts,
            tensors.get("written"),
        )

    def dot(self, matrix: Tensor) -> Tensor:
        """``(outputs, inputs) -> (r,)``: the inner products with each of them."""
        if self.written is not None:
            return self.written @ matrix.reshape(-1)
        rows = self.inputs @ matrix.mT  # (samples, places, outputs)
        parts = torch.split_with_sizes(self.slopes, self.counts)
        return torch.cat([(rows[: len(d)] * d).sum((1, 2)) for d in parts])

    def sum(self, weights: Tensor, shape: tuple[int, int]) -> Tensor:
        """``(r,) -> (outputs, inputs)``: their weighted sum."""
        if self.written is not None:
            return (weights @ self.written).reshape(shape)
        rows = torch.zeros_like(self.slopes[: self.counts[0]])
        slopes, shares = (torch.split_with_sizes(t, self.counts) for t in (self.slopes, weights))
        for d, c in zip(slopes, shares, strict=True):
            rows[: len(d)].addcmul_(d, c[:, None, None])
        return rows.reshape(-1, shape[0]).mT @ self.inputs.reshape(-1, shape[1])

    def times(self, direction: Tensor) -> Tensor:
        """``(inputs,) -> (r, outputs)``: each of them times a vector."""
        if self.written is not None:
            return self.written.reshape(len(self.written), -1, len(direction)) @ direction
        scales = (self.inputs @ direction)[self._samples()]  # (r, places)
        return torch.einsum("rto,rt->ro", self.slopes, scales)

    def gram(self) -> Tensor:
        """``(r, r)``: their inner products."""
        if self.written is not None:
            return self.written @ self.written.mT
        samples = self._samples()
        if self.inputs.shape[1] == 1:
            a, d = self.inputs[:, 0], self.slopes[:, 0]
            return (a @ a.mT)[samples][:, samples].mul_(d @ d.mT)
        found = self.slopes.new_empty(len(self.slopes), len(self.slopes))
        starts = range(0, len(self.slopes), _AT_ONCE)
        for i in starts:
            left = self._columns(i)
            for j in (j for j in starts if j <= i):
                block = left @ (left if i == j else self._columns(j)).mT
                found[i : i + _AT_ONCE, j : j + _AT_ONCE] = block
                found[j : j + _AT_ONCE, i : i + _AT_ONCE] = block.mT
        return found

    def _samples(self) -> Tensor:
        """Whose they are, ``(r,)``."""
        device = self.slopes.device
        return torch.cat([torch.arange(count, device=device) for count in self.counts])

    def _columns(self, begin: int) -> Tensor:
        these = slice(begin, begin + _AT_ONCE)
        given = self.inputs[self._samples()[these]]
        return torch.einsum("rto,rti->roi", self.slopes[these], given).flatten(1)


def writes_out(inputs: Sequence[int], outputs: int) -> bool:
    """Whether the gradients of a layer fed ``(samples, places, inputs)`` are shorter written out."""
    places, width = inputs[1], inputs[2]
    return places > 1 and outputs * width < places * (outputs + width)
