"""K-FAC: Kronecker-factored curvature of a network's layers, as a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._arguments import check_count
from .._results import Status
from .._typing import Batch, Params
from ..operators import AbstractLinearOperator
from ._layers import Layer, run_model
from ._network import AbstractNetworkPreconditioner, Loss, failure
from ._preconditioner import Factors, Inverse


@dataclass(frozen=True)
class KFAC(AbstractNetworkPreconditioner):
    """Each layer's Gauss-Newton block as ``A (x) S``, inverted with the damping in its eigenbasis.

    ``A = E[a a^T]`` over a layer's inputs, a 1 appended for the bias; ``S = E[d d^T]`` over the loss's
    gradients by its outputs, had its targets been drawn from the model's own distribution. Instead of drawing
    them, the columns of a root of the loss's Hessian by the outputs are mixed with random signs: the same expectation,
    and far less variance where the model is sure of its answers. Covers ``Linear`` and ``Conv2d`` layers; for a
    convolution (and a linear layer that is applied at several places of a sample) positions count as independent.

    One layer with a squared loss is exact; otherwise correlations between layers, and between inputs and
    gradients, are left out. It pays where there are more samples than parameters and inputs of different scales; for
    deep networks with more parameters than samples it may save nothing, and ``GaussNewtonPreconditioner`` is the one to try.

    No products: one forward and ``num_samples`` backward passes (``kfac_passes`` in the stats counts
    them, forward included), and the eigenvectors of matrices of the layers' widths.

    References: Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate
    curvature", sections 3 and 6.1; for convolutions Grosse & Martens (2016), "A Kronecker-factored
    approximate Fisher matrix for convolution layers"; the exact damping by eigenvectors is George et al.
    (2018), section 2.

    Args:
        model: Whose ``named_parameters()`` the inner parameters are, by name. It is run with these values in its
            own mode, ``train()`` or ``eval()``, and what it changes of its buffers is undone.
        inputs: ``batch -> the model's input`` (or a tuple of its arguments), of the inner batch.
        loss: ``"cross_entropy"`` (of class scores, one row per sample) or ``"squared"``
            (``0.5 |outputs - y|^2``), the mean over samples.
        scale: The inner objective's loss in units of that: ``len(x)`` for sums, ``2 / k`` for
            ``mse_loss`` of ``k`` outputs.
        damping: Curvature of what the inner objective adds to the loss, such as the coefficient of
            ``0.5 * decay * |w|^2``; or ``outer_params -> number``. The operator's own damping comes on top. Where the
            factors are crude (few samples), ten to thirty times as much leaves more to CG, and may save steps.
        prefix: In front of the model's names in the inner parameters' names.
        num_samples: Draws of signs; ``None`` for their expectation, at as many backward passes as there are
            outputs.
        seed: Of these draws.
        uncovered: ``"refuse"`` parameters outside of covered layers, or ``"identity"``: give them the mean curvature
            of the covered ones (``preconditioner_uncovered`` in the stats is their share).
        refresh_every: Outer steps for which factors are kept.
    """

    name: ClassVar[str] = "kfac"
    model: nn.Module
    inputs: Callable[[Batch], Any]
    loss: Loss
    scale: float = 1.0
    damping: float | Callable[[Params], float | Tensor] = 0.0
    prefix: str = ""
    num_samples: int | None = 1
    seed: int = 0
    uncovered: Literal["refuse", "identity"] = "refuse"
    refresh_every: int = 1

    def __post_init__(self) -> None:
        self.check_settings()
        check_count("KFAC", "num_samples", self.num_samples, 1, none=True)
        check_count("KFAC", "seed", self.seed, 0)

    def factorize(self, operator: AbstractLinearOperator) -> Factors:
        graph = self.graph_of(operator)
        layers = self.layers(graph, Layer)
        outputs = run_model(self, graph, layers)
        self.check_outputs(outputs)
        rows = len(outputs)
        tensors: Params = {}
        for layer in layers:
            tensors |= _eigen(f"{layer.name}/inputs", layer.square / layer.places)
        passes = 1
        squares: dict[str, Tensor] = {}
        for slope in self._slopes(outputs.detach()):
            seen = [o for layer in layers for o in layer.outputs]
            gradients = iter(
                torch.autograd.grad(outputs, seen, slope, retain_graph=True, materialize_grads=True)
            )
            passes += 1
            for layer in layers:
                d = torch.cat([layer.rows_of(next(gradients)) for _ in layer.outputs])
                d = d.to(graph.layout.dtype)
                s = d.mT @ d * (self.scale / rows)
                squares[layer.name] = squares[layer.name] + s if layer.name in squares else s
        for name, s in squares.items():
            tensors |= _eigen(f"{name}/slopes", s)
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            raise failure(
                Status.NONFINITE,
                "KFAC met NaN or infinite activations or gradients inside of the model at the inner solution.",
            )
        covered = sum(layer.size for layer in layers)
        curvatures = [_curvature(tensors, layer) for layer in layers]
        damping = self.damping_of(operator)
        least = _least(curvatures, damping)
        clamped = sum(float((c + damping < least).sum()) for c in curvatures) / covered
        stats = {
            "kfac_passes": float(passes),
            "preconditioner_uncovered": 1 - covered / graph.layout.size,
            "preconditioner_clamped": clamped,
        }
        return Factors(tensors, stats)

    def inverse(self, factors: Factors, operator: AbstractLinearOperator) -> Inverse:
        graph = self.graph_of(operator)
        damping = self.damping_of(operator)
        layers, found, layout = self.layers(graph, Layer), factors.tensors, graph.layout
        curvatures = [_curvature(found, layer) for layer in layers]
        covered = sum(c.numel() for c in curvatures)
        mean = sum(float(c.sum()) for c in curvatures) / covered + damping
        if not mean > 0:
            raise failure(
                Status.STALLED,
                "KFAC found no curvature at all: every layer's inputs or gradients are zero at the inner solution. Add "
                "damping, or leave the preconditioner out.",
            )
        least = _least(curvatures, damping)
        blocks = [
            (
                layer,
                (curvature + damping).clamp_min_(least),
                found[f"{layer.name}/slopes/vectors"],
                found[f"{layer.name}/inputs/vectors"],
            )
            for layer, curvature in zip(layers, curvatures, strict=True)
        ]

        def apply(vector: Tensor) -> Tensor:
            parts = dict(zip(layout.names, layout.split(vector), strict=True))
            solved: Params = {}
            for layer, curvature, q_s, q_a in blocks:
                v = layer.matrix(parts)  # (outputs, inputs)
                v = q_s @ ((q_s.mT @ v @ q_a) / curvature) @ q_a.mT
                solved |= layer.tensors(v)
            return layout.flatten(
                [solved[k] if k in solved else parts[k] / mean for k in layout.names], copy=True
            )

        return apply

    def _slopes(self, outputs: Tensor) -> Sequence[Tensor]:
        """Cotangents whose outer products average to the Hessian of the loss by the outputs."""
        flat = outputs.reshape(len(outputs), -1)
        width, count = flat.shape[1], self.num_samples
        if self.loss == "squared":
            columns = torch.eye(width, dtype=flat.dtype, device=flat.device)[:, None]
            columns = columns.expand(width, len(flat), width)  # (width, n, width)
        else:  # diag(p) - p p^T = sum_c p_c (e_c - p)(e_c - p)^T
            p = flat.softmax(1)
            eye = torch.eye(width, dtype=flat.dtype, device=flat.device)[:, None]
            columns = (eye - p) * p.mT[:, :, None].sqrt()
        if count is None:
            return [column.reshape(outputs.shape) for column in columns]
        generator = torch.Generator().manual_seed(self.seed)
        signs = (
            torch.randint(2, (count, width, len(flat), 1), generator=generator, device="cpu").to(
                flat
            )
            * 2
            - 1
        )
        mixed = (signs * columns).sum(1) / count**0.5
        return list(mixed.reshape(count, *outputs.shape))


def _eigen(name: str, matrix: Tensor) -> Params:
    """Eigenvalues and eigenvectors of a covariance, found in float64 where the device has it."""
    wide = matrix if matrix.device.type == "mps" else matrix.double()
    if not bool(torch.isfinite(wide).all()):
        return {f"{name}/values": matrix.diagonal(), f"{name}/vectors": matrix}
    values, vectors = torch.linalg.eigh(0.5 * (wide + wide.mT))
    return {f"{name}/values": values.to(matrix), f"{name}/vectors": vectors.to(matrix)}


def _curvature(tensors: Params, layer: Layer) -> Tensor:
    """``(outputs, inputs)``: the eigenvalues of ``A (x) S``."""
    values = (tensors[f"{layer.name}/{k}/values"].clamp_min(0) for k in ("slopes", "inputs"))
    return torch.outer(*values)


def _least(curvatures: list[Tensor], damping: float) -> float:
    """What rounding leaves of a zero eigenvalue; smaller ones are raised to it."""
    top = max(float(c.max()) for c in curvatures) + damping
    return float(torch.finfo(curvatures[0].dtype).eps) * top
