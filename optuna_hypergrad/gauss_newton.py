"""Positive semidefinite matrices in place of the inner Hessian, from a model and what is lost on its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import _tree
from ._arguments import check_count, is_number
from ._errors import ObjectiveError
from ._typing import Batch, Objective, Params
from .operators import AbstractCurvature, AbstractLinearOperator, InnerGraph, scalar

Bend = Callable[[Tensor], Tensor]
"""A linear map of tangents of the outputs to cotangents, of their shape."""


@dataclass(frozen=True)
class GaussNewton(AbstractCurvature):
    """The generalized Gauss-Newton matrix (Schraudolph 2002): positive semidefinite for a convex loss.

    **Give it the** ``regularizer`` **of the inner objective**, if that has one: see :class:`Fisher`.

    It equals the Hessian where the model is linear in ``w``; elsewhere it is a bias, and is reported
    in the estimate's stats as ``exact_hessian = 0``.

    Args:
        outputs: ``(inner_params, outer_params, batch) -> tensor``, the model.
        loss: ``(outputs, outer_params, batch) -> scalar tensor``, convex in the outputs.
        regularizer: ``(inner_params, outer_params, batch) -> scalar tensor`` or ``None``; its exact
            Hessian is added, so that ``loss(outputs) + regularizer`` is the inner objective.
    """

    outputs: Callable[[Params, Params, Batch], Tensor]
    loss: Callable[[Tensor, Params, Batch], Tensor]
    regularizer: Objective | None = None

    def build(self, graph: InnerGraph, batch: Batch) -> AbstractLinearOperator:
        lam = _tree.detach(graph.outer_params)

        def loss(outputs: Tensor) -> Bend:
            at = outputs.detach().requires_grad_(True)
            value = scalar(self.loss(at, lam, batch), "GaussNewton loss")
            (slope,) = torch.autograd.grad(value, at, create_graph=True, materialize_grads=True)
            if not slope.requires_grad:
                return torch.zeros_like
            return lambda pushed: torch.autograd.grad(
                slope, at, pushed, retain_graph=True, materialize_grads=True
            )[0]

        return ModelOperator("GaussNewton", self.outputs, loss, self.regularizer, graph, batch)


@dataclass(frozen=True)
class Fisher(AbstractCurvature):
    """The Fisher information of the model's own predictions, whatever the targets are: positive semidefinite.

    **Whatever the inner objective has beyond the likelihood (weight decay, a prior) must be given as** ``regularizer``.
    Nothing notices where it is left out, and hypergradients are then wrong by any factor: where data say little
    about a direction, the regularizer is all of its curvature. (:func:`check_hypergradient` finds it.)

    ``F = scale * mean over samples of E_y [J^T d d^T J]`` with ``d`` the gradient of ``-log p(y | outputs)`` in the outputs
    and ``y`` distributed as the model says. For these likelihoods the exact expectation is the Gauss-Newton matrix of
    the negative log-likelihood, without a look at a target. It is *not* the "empirical Fisher", which puts the targets
    of the data in place of the model's and is no approximation of the Hessian. A bias like ``GaussNewton``, and
    reported as that.

    Reference: Martens (2020), "New insights and perspectives on the natural gradient method"; against the empirical
    one: Kunstner, Balles & Hennig (2019).

    Args:
        outputs: ``(inner_params, outer_params, batch) -> tensor``, the model: logits, or means.
        likelihood: ``"categorical"``, the classes along the last dimension (``cross_entropy``); ``"bernoulli"``
            (``binary_cross_entropy_with_logits``, summed up for each sample); ``"gaussian"`` of variance 1 (half the
            squared error, likewise). Samples are the first dimension; for ``"categorical"`` all but the last.
        regularizer: ``(inner_params, outer_params, batch) -> scalar tensor`` or ``None``; its exact Hessian is added.
        num_samples: Draws of ``y`` for each sample, in place of the expectation; ``None`` for that.
        scale: Of the negative log-likelihood in the inner objective: ``2 / d`` for ``mse_loss`` of ``d`` outputs.
        seed: Of the draws.
    """

    outputs: Callable[[Params, Params, Batch], Tensor]
    likelihood: Literal["categorical", "bernoulli", "gaussian"] = "categorical"
    regularizer: Objective | None = None
    num_samples: int | None = None
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.likelihood not in ("categorical", "bernoulli", "gaussian"):
            raise ValueError(
                f'Fisher needs likelihood "categorical", "bernoulli" or "gaussian", got {self.likelihood!r:.80}.'
            )
        check_count("Fisher", "num_samples", self.num_samples, 1, none=True)
        check_count("Fisher", "seed", self.seed, 0)
        if not (is_number(self.scale) and 0 < self.scale < math.inf):
            raise ValueError(f"Fisher needs a positive finite scale, got {self.scale!r:.80}.")

    def build(self, graph: InnerGraph, batch: Batch) -> AbstractLinearOperator:
        return ModelOperator("Fisher", self.outputs, self._bend, self.regularizer, graph, batch)

    def _bend(self, outputs: Tensor) -> Bend:
        """The Fisher information in the outputs."""
        shape, at = outputs.shape, outputs.detach()
        classes = self.likelihood == "categorical"
        at = at.reshape(-1, shape[-1]) if classes else at.reshape(shape[0] if shape else 1, -1)
        factor = self.scale / max(len(at), 1)
        if self.num_samples is not None:
            slopes = self._draws(at)  # (num_samples, n, c)

            def sampled(pushed: Tensor) -> Tensor:
                along = (slopes * pushed.reshape(at.shape)).sum(2, keepdim=True)
                return (slopes * along).mean(0).mul(factor).reshape(shape)

            return sampled
        if self.likelihood == "gaussian":
            return lambda pushed: pushed * factor
        p = at.softmax(1) if classes else at.sigmoid()

        def exact(pushed: Tensor) -> Tensor:
            x = pushed.reshape(p.shape)
            inside = (p * x).sum(1, keepdim=True) if classes else p * x
            return (p * (x - inside)).mul(factor).reshape(shape)

        return exact

    def _draws(self, at: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        size = (self.num_samples or 1, *at.shape)
        if self.likelihood == "gaussian":
            return torch.randn(size, generator=generator, device="cpu", dtype=torch.float32).to(at)
        if self.likelihood == "bernoulli":
            p = at.sigmoid()
            drawn = (
                torch.rand(size, generator=generator, device="cpu", dtype=torch.float32).to(at) < p
            )
            return p - drawn.to(p)
        p = at.softmax(1)
        chosen = torch.multinomial(p.double().cpu(), size[0], replacement=True, generator=generator)
        return p - torch.nn.functional.one_hot(chosen.mT, at.shape[1]).to(p)


class ModelOperator(AbstractLinearOperator):
    """``J^T B J`` with ``J`` the model's Jacobian, plus the exact Hessian of a regularizer, graphs kept.

    Args:
        bend: At some outputs, the map ``B`` in their space.
    """

    def __init__(
        self,
        label: str,
        model: Callable[[Params, Params, Batch], Tensor],
        bend: Callable[[Tensor], Bend],
        regularizer: Objective | None,
        graph: InnerGraph,
        batch: Batch,
    ) -> None:
        self.graph, self._layout = graph, graph.layout
        self.size, self.dtype, self.device = (
            self._layout.size,
            self._layout.dtype,
            self._layout.device,
        )
        lam = _tree.detach(graph.outer_params)
        self._leaves = tuple(graph.inner_params.values())
        with torch.enable_grad():
            outputs = model(graph.inner_params, lam, batch)
            if not outputs.requires_grad:
                raise ObjectiveError(f"{label}: outputs(...) does not depend on inner_params.")
            self._outputs = outputs
            self._bend = bend(outputs)
            self._dual = torch.zeros_like(outputs, requires_grad=True)
            transposed = torch.autograd.grad(
                outputs, self._leaves, self._dual, create_graph=True, materialize_grads=True
            )
            self._alive = tuple(i for i, t in enumerate(transposed) if t.requires_grad)
            self._transposed = tuple(transposed[i] for i in self._alive)
        self._regularizer = (
            None
            if regularizer is None
            else InnerGraph(regularizer, _tree.detach(graph.inner_params), lam, batch)
        )

    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor:
        parts = self._layout.split(vector)
        (pushed,) = torch.autograd.grad(
            self._transposed, self._dual, [parts[i] for i in self._alive], retain_graph=True
        )
        pulled = torch.autograd.grad(
            self._outputs,
            self._leaves,
            self._bend(pushed),
            retain_graph=True,
            materialize_grads=True,
        )
        product = self._layout.flatten(pulled)
        if self._regularizer is not None:
            product = product + self._regularizer.hvp(vector)
        return product
