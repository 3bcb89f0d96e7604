"""Cheaper matrix products in compiled code on a CPU; what they compute stays the same.

* With few columns, turned around: ``A B = (B^T A^T)^T``. BLAS libraries tile the output for wide results:
  for ``(m, k) @ (k, n)`` with ``1 < n < 16`` the transposed product is 1.5 to 15 times faster (measured
  with MKL 2024.2 and AVX-512, m k from 4,096 to 401,408), and a classifier's last layer takes six such
  products in each Hessian-vector product.
* With few summands, as a sum in generated code: ``(A[:, :, None] * B[None]).sum(1)``. BLAS libraries keep
  ``(m, k) @ (k, n)`` with so small a ``k`` to one thread, while what follows the sum is fused with it. Of the
  product's time it takes 0.6 (k = 5) and 1.1 (k = 10) on one thread, 0.5 and 0.8 on two (512 by 512,
  float32). A classifier's gradient goes from its classes to the layer before through two such
  products in each Hessian-vector product.
* ``addmm(C, A, B)`` with a whole matrix ``C`` as a product and a sum: ``addmm`` copies ``C`` first, while
  a sum is fused with what follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_WIDE = 16
"""Columns from which the product as it stands is as fast."""
_MANY = 11
"""Summands from which a product as it stands is as fast."""
_LEAST_ROWS = 32
_LEAST_ENTRIES = 4096
"""Entries of the largest matrix below which a product costs its call, not its arithmetic."""

_aten = torch.ops.aten
_mm = _aten.mm.default


class MatrixProducts(CustomGraphPass):
    """Rewrites ``mm`` and ``addmm`` of a graph in place. Strides of the results are kept."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            added, a, b = _summand_and_factors(node)
            if a is None or b is None:
                continue
            rewritten = _rewriting_of(a.meta["val"], b.meta["val"])
            if rewritten or _is_matrix_on_cpu(added):
                with graph.inserting_before(node):
                    product = (rewritten or _as_it_is)(graph, a, b)
                    if added is not None:
                        product = _call(graph, _aten.add.Tensor, product, added)
                node.replace_all_uses_with(product)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """Part of the key under which compiled code is cached."""
        return get_hash_for_files((__file__,))


def _summand_and_factors(node: Node) -> tuple[Any, Any, Any]:
    """``C``, ``A`` and ``B`` of ``C + A B``; ``None`` for what is not there."""
    if node.target is _mm:
        return None, node.args[0], node.args[1]
    if node.target is _aten.addmm.default and not node.kwargs:  # beta = alpha = 1
        return node.args[0], node.args[1], node.args[2]
    return None, None, None


def _rewriting_of(a: Tensor, b: Tensor) -> Callable[[Graph, Node, Node], Node] | None:
    (m, k), n = a.shape, b.shape[1]
    if a.device.type != "cpu" or m < _LEAST_ROWS:
        return None
    if 1 < n < _WIDE:
        return _turned if m * k >= _LEAST_ENTRIES else None
    is_few = n >= _WIDE and 1 < k < _MANY and m * n >= _LEAST_ENTRIES
    return _summed if is_few and a.dtype in (torch.float32, torch.float64) else None


def _is_matrix_on_cpu(added: Node | None) -> bool:
    if added is None:
        return False
    value: Tensor = added.meta["val"]
    return value.device.type == "cpu" and value.ndim == 2


def _turned(graph: Graph, a: Node, b: Node) -> Node:
    transposed = [_call(graph, _aten.permute.default, f, [1, 0]) for f in (b, a)]
    back = _call(graph, _aten.permute.default, _call(graph, _mm, *transposed), [1, 0])
    return _call(graph, _aten.clone.default, back, memory_format=torch.contiguous_format)


def _summed(graph: Graph, a: Node, b: Node) -> Node:
    factors = (
        _call(graph, _aten.unsqueeze.default, a, 2),
        _call(graph, _aten.unsqueeze.default, b, 0),
    )
    return _call(graph, _aten.sum.dim_IntList, _call(graph, _aten.mul.Tensor, *factors), [1])


def _as_it_is(graph: Graph, a: Node, b: Node) -> Node:
    return _call(graph, _mm, a, b)


def _call(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A new node with the shape, dtype and strides of its result, which later passes look up."""
    node: Node = graph.call_function(target, args, kwargs)
    known = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    node.meta["val"] = target(*known, **kwargs)
    return node
