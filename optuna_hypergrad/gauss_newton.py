"""Positive semidefinite matrices in place of the inner Hessian, from a model and what is lost on its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _tree
from ._errors import ObjectiveError
from ._typing import Batch, Objective, Params
from .operators import AbstractCurvature, AbstractLinearOperator, InnerGraph, scalar


@dataclass(frozen=True)
class GaussNewton(AbstractCurvature):
    """The generalized Gauss-Newton matrix (Schraudolph 2002): positive semidefinite for a convex loss.

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
        return GaussNewtonOperator(self, graph, batch)


class GaussNewtonOperator(AbstractLinearOperator):
    """``J^T (d2 loss / d outputs2) J`` plus the exact Hessian of a regularizer, graphs kept."""

    def __init__(self, curvature: GaussNewton, graph: InnerGraph, batch: Batch) -> None:
        self.graph, layout = graph, graph.layout
        self.size, self.dtype, self.device = layout.size, layout.dtype, layout.device
        self._layout = layout
        lam = _tree.detach(graph.outer_params)
        self._leaves = tuple(graph.inner_params.values())
        with torch.enable_grad():
            outputs = curvature.outputs(graph.inner_params, lam, batch)
            if not outputs.requires_grad:
                raise ObjectiveError("GaussNewton: outputs(...) does not depend on inner_params.")
            self._outputs = outputs
            at = outputs.detach().requires_grad_(True)
            loss = scalar(curvature.loss(at, lam, batch), "GaussNewton loss")
            (slope,) = torch.autograd.grad(loss, at, create_graph=True, materialize_grads=True)
            self._at, self._slope = at, slope
            self._dual = torch.zeros_like(outputs, requires_grad=True)
            transposed = torch.autograd.grad(
                outputs, self._leaves, self._dual, create_graph=True, materialize_grads=True
            )
            self._alive = tuple(i for i, t in enumerate(transposed) if t.requires_grad)
            self._transposed = tuple(transposed[i] for i in self._alive)
        self._regularizer = (
            None
            if curvature.regularizer is None
            else InnerGraph(curvature.regularizer, _tree.detach(graph.inner_params), lam, batch)
        )

    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor:
        parts = self._layout.split(vector)
        (pushed,) = torch.autograd.grad(
            self._transposed, self._dual, [parts[i] for i in self._alive], retain_graph=True
        )
        if self._slope.requires_grad:
            (bent,) = torch.autograd.grad(
                self._slope, self._at, pushed, retain_graph=True, materialize_grads=True
            )
            pulled = torch.autograd.grad(
                self._outputs, self._leaves, bent, retain_graph=True, materialize_grads=True
            )
            product = self._layout.flatten(pulled)
        else:
            product = torch.zeros_like(vector)
        if self._regularizer is not None:
            product = product + self._regularizer.hvp(vector)
        return product
