"""Where the trace of a function and its pullback is cut in two.

torch's own cut weighs bytes only, and saves gradients, transposed and in copies. This one saves inputs, and the results of
matrix products, convolutions and whatever else is no pointwise operation, view or sum; the pullback computes the rest
again, fused with what it is there for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._functorch.partitioners import _extract_fwd_bwd_modules, get_default_op_list
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx import GraphModule, Node


class AfterDearOperations(CustomPartitionerFn):
    """The cut."""

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        count: int = options["num_fwd_outputs"]
        return _extract_fwd_bwd_modules(gm, saved_nodes(gm.graph, count), [], num_fwd_outputs=count)

    def uuid(self) -> Any:
        """Part of the key under which compiled code is cached."""
        return get_hash_for_files((__file__,))


def saved_nodes(graph: torch.fx.Graph, num_outputs: int) -> list[Node]:
    """What the way back takes over, of a trace whose first ``num_outputs`` results are those of the way forth."""
    results = next(n for n in graph.nodes if n.op == "output").args[0]
    back: set[Node] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and "tangents" in node.name
        if given or not back.isdisjoint(node.all_input_nodes):
            back.add(node)
    cheap = _is_cheap()
    found: set[Node] = set()
    seen: set[Node] = set()
    ahead = list(_nodes(results[num_outputs:]))
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr":
            continue
        if node in back or (node.op == "call_function" and cheap(node)):
            ahead += node.all_input_nodes
        else:
            found.add(node)
    return [node for node in graph.nodes if node in found]


def _is_cheap() -> Callable[[Node], bool]:
    kinds, aten = get_default_op_list(), torch.ops.aten
    more = {aten.avg_pool2d.default, aten.avg_pool2d_backward.default}

    def cheap(node: Node) -> bool:
        if node.target is operator.getitem:
            source = node.args[0]
            return isinstance(source, Node) and source.op == "call_function" and cheap(source)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        return node.target in more or (kinds.is_recomputable(node) and not kinds.is_random(node))

    return cheap


def _nodes(results: Iterable[Any]) -> Iterator[Node]:
    return (r for r in results if isinstance(r, Node))
