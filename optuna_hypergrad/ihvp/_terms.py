"""The terms of a network's Gauss-Newton matrix, one for each sample and direction of its outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._results import Status
from ._network import Loss, failure
from ._samples import Gradients, SampledLayer
from ._strays import Strays

_SHARE = 0.95
"""Of the loss's curvature in the outputs: what the directions looked at hold together."""


def columns(outputs: Tensor, weights: Tensor, loss: Loss, every: bool) -> list[Tensor]:
    """Cotangents ``l`` whose ``l l^T`` add up to the Hessian of ``sum_i weights_i loss_i`` by the outputs.

    Of the shape of the outputs, the largest of each sample first; as many as hold most of the trace, or all.
    """
    flat = outputs.reshape(len(outputs), -1)
    if loss == "squared":
        sizes = weights[:, None].expand_as(flat)
    else:  # diag(p) - p p^T = sum_c p_c (e_c - p)(e_c - p)^T
        p = flat.softmax(1)
        sizes = weights[:, None] * p * (1 - 2 * p + p.square().sum(1, keepdim=True))
    sizes, which = sizes.sort(dim=1, descending=True, stable=True)
    shares = sizes.sum(0).cumsum(0)
    count = flat.shape[1]
    if not every:
        count = min(count, 1 + int((shares < _SHARE * shares[-1]).sum()))
    found = []
    for c in which.mT[:count]:
        column = torch.zeros_like(flat).scatter_(1, c[:, None], 1.0)
        if loss == "cross_entropy":
            column = (column - p) * p.gather(1, c[:, None]).sqrt()
        found.append((column * weights[:, None].sqrt()).reshape(outputs.shape))
    return found


def slopes_of(
    layers: list[SampledLayer], outputs: Tensor, cotangents: list[Tensor]
) -> list[Tensor]:
    """For each layer ``(k, n, places, outputs)``: one backward pass for each cotangent."""
    found: list[list[Tensor]] = [[] for _ in layers]
    for cotangent in cotangents:
        gradients = by_outputs(outputs, layers, cotangent)
        for layer, own, each in zip(layers, gradients, found, strict=True):
            each.append(layer.slopes(own))
    return [torch.stack(each) for each in found]


def rest(
    value: Tensor,
    layers: list[SampledLayer],
    axes: list[Tensor],
    inputs: list[Tensor],
    slopes: list[Tensor],
    seed: int,
) -> list[Tensor]:
    """For each layer ``(outputs,)``: estimates of ``(e_j a^T) . (H - G)(e_j a^T)``, at least 0.

    ``H`` is the Hessian of ``value`` by the weights, ``G`` the terms of ``slopes``, ``a`` the layer's axis. Each sample
    has random signs of its own for the ``j`` of all layers, so that its other entries add noise to its own share only.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = []
    for layer, a, axis in zip(layers, inputs, axes, strict=True):
        shape = len(a), 1, layer.shape[0]
        signs = torch.randint(2, shape, generator=generator, device="cpu", dtype=torch.int8)
        probes.append(signs.to(a).mul_(2).sub_(1) * (a @ axis)[:, :, None])
    bends = _bends(value, layers, probes)
    shares = torch.stack([(d * z).sum((2, 3)) for d, z in zip(slopes, probes, strict=True)]).sum(0)
    found = []
    for bend, d, z in zip(bends, slopes, probes, strict=True):
        own = bend - (d * shares[:, :, None, None]).sum(0)
        found.append((own * z).sum((0, 1)).clamp_min_(0.0))
    return found


def _bends(value: Tensor, layers: list[SampledLayer], probes: list[Tensor]) -> list[Tensor]:
    """The Hessian of ``value`` by the outputs of all layers, times the probes: ``(n, places, outputs)`` each."""
    gradients = by_outputs(value, layers, None)
    slopes, given = [], []
    for layer, own, probe in zip(layers, gradients, probes, strict=True):
        for slope, z in zip(own, layer.outputs_like(probe), strict=True):
            if slope.requires_grad:
                slopes.append(slope)
                given.append(z)
    if not slopes:
        return [torch.zeros_like(z) for z in probes]
    seen = [o for layer in layers for o in layer.outputs]
    found = iter(torch.autograd.grad(slopes, seen, given, materialize_grads=True))
    return [layer.slopes([next(found) for _ in layer.outputs]) for layer in layers]


def by_outputs(
    value: Tensor, layers: list[SampledLayer], cotangent: Tensor | None
) -> list[list[Tensor]]:
    """Gradients by each layer's outputs; of the loss itself, with their graph."""
    seen = [o for layer in layers for o in layer.outputs]
    found = iter(
        torch.autograd.grad(
            value,
            seen,
            cotangent,
            retain_graph=True,
            create_graph=cotangent is None,
            materialize_grads=True,
        )
    )
    return [[next(found) for _ in layer.outputs] for layer in layers]


def largest(lengths: Tensor, rank: int) -> Tensor:
    """Where the ``rank`` largest are, ``(k, n)``."""
    kept = torch.zeros(lengths.numel(), dtype=torch.bool, device=lengths.device)
    kept[lengths.reshape(-1).argsort(descending=True, stable=True)[:rank]] = True
    return kept.reshape(lengths.shape)


def ordered(kept: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The order of :class:`Gradients`: the samples and directions of the terms, each ``(r,)``, and the counts."""
    per_sample = kept.sum(0)
    samples = per_sample.argsort(descending=True, stable=True)
    directions = kept.to(torch.int8).argsort(dim=0, descending=True, stable=True)  # kept ones first
    orders, ranks, counts = [], [], []
    for place in range(int(per_sample.max())):
        count = int((per_sample > place).sum())
        orders.append(samples[:count])
        ranks.append(directions[place, samples[:count]])
        counts.append(count)
    return torch.cat(orders), torch.cat(ranks), tuple(counts)


def leading(inputs: Tensor) -> Tensor:
    """About the leading right singular vector of ``(samples, places, inputs)``, as rows; 0 where all are."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    found = rows[int(rows.square().sum(1).argmax())]
    for _ in range(10):
        found = torch.nn.functional.normalize(found, dim=0)
        found = rows.mT @ (rows @ found)
    return torch.nn.functional.normalize(found, dim=0)


@dataclass
class Block:
    """One layer's part of ``U``, and of ``D = rho I + diag(c) (x) a a^T``.

    Attributes:
        stiff: Where ``c`` is not 0: ``a``, the terms times ``a`` ``(r, outputs)``, and ``1 / (rho + c) - 1 / rho``,
            ``(outputs,)``.
    """

    layer: SampledLayer | Strays
    gradients: Gradients
    stiff: tuple[Tensor, Tensor, Tensor] | None = None

    def stiffen(self, axis: Tensor, rest: Tensor, rho: float, factor: Tensor) -> Tensor:
        """Take ``rest`` as ``c``, less of it the more of ``e_j a^T`` the terms hold, nothing from one half on.

        Where the terms hold a direction, soft ones that share in it are left to ``rho``, and ``c`` would make them
        stiff.

        Returns:
            What that adds to ``U^T D^-1 U``.
        """
        along = self.gradients.times(axis)
        solved = torch.linalg.solve_triangular(factor, along.to(factor), upper=False)
        held = solved.square().sum(0).div_(rho).to(rest)
        weights = 1 / (rho + rest * (1 - 2 * held).clamp_min_(0.0)) - 1 / rho
        self.stiff = axis, along, weights
        added: Tensor = (along * weights) @ along.mT
        return added

    def dot(self, v: Tensor, rho: float) -> Tensor:
        """``U^T D^-1 v``, ``(r,)``."""
        found = self.gradients.dot(v).div_(rho)
        if self.stiff is not None:
            axis, along, weights = self.stiff
            found.addmv_(along, weights * (v @ axis))
        return found

    def solve(self, v: Tensor, y: Tensor, rho: float) -> Tensor:
        """``D^-1 (v - U y)``, ``(outputs, inputs)``."""
        v = v - self.gradients.sum(y, (v.shape[0], v.shape[1]))
        x = v / rho
        if self.stiff is not None:
            axis, _, weights = self.stiff
            x.addr_(weights * (v @ axis), axis)
        return x


def cholesky(matrix: Tensor) -> Tensor:
    """The factor of a symmetric positive definite matrix.

    Raises:
        SolverError: if rounding has made it indefinite.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.mT))
    if int(info):
        raise failure(
            Status.STALLED,
            "GaussNewtonPreconditioner: rounding leaves no positive definite matrix of samples. Add damping, or lower "
            "rank.",
        )
    return factor
