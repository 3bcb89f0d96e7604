"""Linear operators of one solve: built once, then applied to flat vectors ``(P,)``.

Linear algebra happens on flat vectors, so that a solver is a few lines and a product costs little
beyond itself. Half-precision parameters are accumulated in float32.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from . import _tree
from ._errors import ObjectiveError
from ._twice import check_differentiable_twice, saying_what_has_no_derivative
from ._typing import Batch, Objective, Params
from .kept_graph import VjpsOfRows, vjp_through_kept_graph


class Flattener:
    """The layout of a dict of tensors as one vector ``(P,)``, and back."""

    def __init__(self, like: Params) -> None:
        self.names = list(like)
        self.shapes = [v.shape for v in like.values()]
        self.sizes = [v.numel() for v in like.values()]
        self.dtypes = [v.dtype for v in like.values()]
        self.size = sum(self.sizes)
        self.device = next(iter(like.values())).device
        widest = self.dtypes[0]
        for dtype in self.dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        self.dtype = torch.float32 if widest in (torch.float16, torch.bfloat16) else widest
        self._uniform = all(d == self.dtype for d in self.dtypes)

    def flatten(
        self,
        tensors: list[Tensor] | tuple[Tensor, ...],
        copy: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """``(P,)`` in the accumulation dtype. A single tensor is viewed unless ``copy`` is set.

        Several tensors are written to ``out``, if it is given: fresh memory of some megabytes costs
        more (page faults) than the copy itself.
        """
        if len(tensors) == 1:
            vector = tensors[0].reshape(-1)
            return vector if self._uniform and not copy else vector.to(self.dtype, copy=copy)
        if self._uniform:
            return torch.cat([t.reshape(-1) for t in tensors], out=out)
        return torch.cat([t.reshape(-1).to(self.dtype) for t in tensors], out=out)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of ``vector`` in the shapes (and copies in the dtypes) of the parameters."""
        if len(self.shapes) == 1 and self._uniform:
            return [vector.view(self.shapes[0])]
        if len(self.shapes) == 1:
            parts: list[Tensor] = [vector.view(self.shapes[0])]
        else:
            parts = [
                p.view(s) for p, s in zip(torch.split(vector, self.sizes), self.shapes, strict=True)
            ]
        if self._uniform:
            return parts
        return [p.to(d) for p, d in zip(parts, self.dtypes, strict=True)]

    def unflatten(self, vector: Tensor) -> Params:
        return _tree.from_list(self.names, self.split(vector))


class AbstractLinearOperator(abc.ABC):
    """A square linear map on flat vectors. ``num_products`` counts how often it was applied."""

    symmetric: bool = True
    size: int
    dtype: torch.dtype
    device: torch.device
    num_products: int = 0

    def __call__(self, vector: Tensor, out: Tensor | None = None) -> Tensor:
        """``(P,) -> (P,)``. The result may lie in ``out`` (:meth:`workspace`), but need not."""
        self.num_products += 1
        return self._apply(vector, out)

    def workspace(self) -> Tensor | None:
        """An ``out`` for a caller to reuse, where that saves a copy into fresh memory."""
        return None

    def many(self, vectors: Tensor) -> Tensor:
        """``(B, P) -> (B, P)``: one product for each row."""
        self.num_products += len(vectors)
        return self._apply_many(vectors)

    @abc.abstractmethod
    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor: ...

    def _apply_many(self, vectors: Tensor) -> Tensor:
        return torch.stack([self._apply(v, None) for v in vectors])


class MatrixOperator(AbstractLinearOperator):
    """An explicit matrix ``(P, P)``."""

    def __init__(self, matrix: Tensor, symmetric: bool | None = None) -> None:
        self.matrix = matrix
        self.size = matrix.shape[0]
        self.dtype, self.device = matrix.dtype, matrix.device
        self.symmetric = torch.equal(matrix, matrix.mT) if symmetric is None else symmetric

    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor:
        return torch.mv(self.matrix, vector, out=out)


class DampedOperator(AbstractLinearOperator):
    """``base + damping * I``."""

    def __init__(self, base: AbstractLinearOperator, damping: float) -> None:
        self.base, self.damping = base, damping
        self.size, self.dtype, self.device = base.size, base.dtype, base.device
        self.symmetric = base.symmetric

    def workspace(self) -> Tensor | None:
        return self.base.workspace()

    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor:
        return torch.add(self.base(vector, out), vector, alpha=self.damping, out=out)

    def _apply_many(self, vectors: Tensor) -> Tensor:
        return self.base.many(vectors).add(vectors, alpha=self.damping)


def undamped(operator: AbstractLinearOperator) -> tuple[AbstractLinearOperator, float]:
    """The operator under all damping, and the damping in all."""
    if not isinstance(operator, DampedOperator):
        return operator, 0.0
    base, damping = undamped(operator.base)
    return base, damping + operator.damping


class InnerGraph:
    """The gradient of the inner objective with its double-backward graph, kept for one solve.

    ``hvp`` and ``cross_vjp`` both walk this one graph, so dropout masks, buffers and the batch are
    the same in every product. Cost: one gradient evaluation to build, its activations in memory.
    """

    def __init__(
        self, inner_objective: Objective, inner_params: Params, outer_params: Params, batch: Batch
    ) -> None:
        self.inner_objective, self.batch = inner_objective, batch
        self.inner_params = _tree.leaves(inner_params)
        self.outer_params = _tree.leaves(outer_params)
        self.layout = Flattener(inner_params)
        with torch.enable_grad():
            with saying_what_has_no_derivative("inner_objective"):
                value = inner_objective(dict(self.inner_params), dict(self.outer_params), batch)
            value = scalar(value, "inner_objective")
            if not value.requires_grad:
                raise ObjectiveError(
                    "inner_objective does not depend on inner_params through differentiable torch operations."
                )
            self._leaves = tuple(self.inner_params.values())
            gradients = torch.autograd.grad(
                value, self._leaves, create_graph=True, materialize_grads=True
            )
        check_differentiable_twice(value, gradients, self._leaves)
        self.value = value.detach()
        detached = [g.detach() for g in gradients]
        self.gradient_norm = float(_tree.norm(_tree.from_list(self.layout.names, detached)))
        self._alive = tuple(i for i, g in enumerate(gradients) if g.requires_grad)
        # Edges keep the graph without the gradient's own memory.
        self._gradients = tuple(get_gradient_edge(gradients[i]) for i in self._alive)
        self._vjps_of_rows = VjpsOfRows()

    def hvp(self, vector: Tensor, out: Tensor | None = None) -> Tensor:
        """``H v``: ``(P,) -> (P,)`` with ``H = d2g/dw2``."""
        if not self._gradients:
            return torch.zeros_like(vector)
        products = vjp_through_kept_graph(self._gradients, self._leaves, self._cotangents(vector))
        return self.layout.flatten(
            [
                torch.zeros_like(w) if h is None else h
                for h, w in zip(products, self._leaves, strict=True)
            ],
            out=out,
        )

    def hvp_many(self, vectors: Tensor) -> Tensor:
        """``(B, P) -> (B, P)``: the rows' products in one walk of the graph.

        One after the other where an operation of the inner objective cannot be batched.
        """
        if not self._gradients:
            return torch.zeros_like(vectors)
        parts = torch.split_with_sizes(vectors, self.layout.sizes, dim=1)
        rows = len(vectors)
        cotangents = [
            parts[i].reshape(rows, *self.layout.shapes[i]).to(self.layout.dtypes[i])
            for i in self._alive
        ]
        products = self._vjps_of_rows(self._gradients, self._leaves, cotangents)
        if products is None:
            return torch.stack([self.hvp(v) for v in vectors])
        flat = [
            w.new_zeros(rows, w.numel()) if h is None else h.reshape(rows, -1)
            for h, w in zip(products, self._leaves, strict=True)
        ]
        return torch.cat([h.to(self.layout.dtype) for h in flat], dim=1)

    def cross_vjp(self, vector: Tensor) -> dict[str, Tensor | None]:
        """``M^T v`` with ``M = d2g/(dw dlam)``, by hyperparameter; ``None`` where g_w ignores it."""
        if not self._gradients:
            return dict.fromkeys(self.outer_params)
        products = vjp_through_kept_graph(
            self._gradients, tuple(self.outer_params.values()), self._cotangents(vector)
        )
        return dict(zip(self.outer_params, products, strict=True))

    def _cotangents(self, vector: Tensor) -> list[Tensor]:
        parts = self.layout.split(vector)
        return parts if len(self._alive) == len(parts) else [parts[i] for i in self._alive]


class HessianOperator(AbstractLinearOperator):
    """``d2g/dw2`` from a kept double-backward graph (1.1-2.9 gradient evaluations a product)."""

    def __init__(self, graph: InnerGraph) -> None:
        self.graph = graph
        self.size, self.dtype, self.device = (
            graph.layout.size,
            graph.layout.dtype,
            graph.layout.device,
        )

    def workspace(self) -> Tensor | None:
        if len(self.graph.layout.sizes) == 1:  # the product is the tensor that autograd made
            return None
        return torch.empty(self.size, dtype=self.dtype, device=self.device)

    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor:
        return self.graph.hvp(vector, out)

    def _apply_many(self, vectors: Tensor) -> Tensor:
        return self.graph.hvp_many(vectors)


class AveragedOperator(AbstractLinearOperator):
    """The mean of several operators of one size: a product costs one with each of them."""

    def __init__(self, operators: Sequence[AbstractLinearOperator]) -> None:
        self.operators, first = tuple(operators), operators[0]
        self.size, self.dtype, self.device = first.size, first.dtype, first.device
        self.symmetric = all(o.symmetric for o in operators)

    def each(self, vector: Tensor) -> Tensor:
        """``(P,) -> (K, P)``: the product with each of the operators."""
        return torch.stack([o(vector) for o in self.operators])

    def _apply(self, vector: Tensor, out: Tensor | None) -> Tensor:
        total = self.operators[0](vector).clone()
        for operator in self.operators[1:]:
            total += operator(vector)
        return total.div_(len(self.operators))

    def _apply_many(self, vectors: Tensor) -> Tensor:
        total = self.operators[0].many(vectors).clone()
        for operator in self.operators[1:]:
            total += operator.many(vectors)
        return total.div_(len(self.operators))


class AbstractCurvature(abc.ABC):
    """Which matrix stands for the inner Hessian: settings that build an operator for one solve."""

    @abc.abstractmethod
    def build(self, graph: InnerGraph, batch: Batch) -> AbstractLinearOperator: ...

    def average(self, graph: InnerGraph, batches: Sequence[Batch]) -> AbstractLinearOperator:
        """The mean over several batches; ``graph`` is that of :func:`mean_objective` on all of them."""
        return AveragedOperator([self.build(graph, batch) for batch in batches])


@dataclass(frozen=True)
class Hessian(AbstractCurvature):
    """The exact Hessian of the inner objective."""

    def build(self, graph: InnerGraph, batch: Batch) -> AbstractLinearOperator:
        return HessianOperator(graph)

    def average(self, graph: InnerGraph, batches: Sequence[Batch]) -> AbstractLinearOperator:
        return HessianOperator(graph)


def mean_objective(objective: Objective) -> Objective:
    """The objective whose batch is several batches: its mean over them."""

    def mean(inner_params: Params, outer_params: Params, batches: Batch) -> Tensor:
        values = [objective(dict(inner_params), dict(outer_params), batch) for batch in batches]
        return torch.stack([scalar(v, "inner_objective") for v in values]).mean()

    return mean


def scalar(value: object, label: str) -> Tensor:
    """``value`` as a 0-d tensor.

    Raises:
        ObjectiveError: if it is not a tensor with exactly one entry, or is not finite.
    """
    if not isinstance(value, Tensor):
        raise ObjectiveError(
            f"{label} returned a {type(value).__name__}; return a scalar torch tensor."
        )
    if value.numel() != 1:
        raise ObjectiveError(
            f"{label} returned a tensor of shape {tuple(value.shape)}; reduce it to a scalar, e.g. by .mean()."
        )
    if value.is_complex():
        raise ObjectiveError(f"{label} returned a complex number; take its real part or its abs().")
    return value.reshape(())
