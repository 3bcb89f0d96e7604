"""Networks of ``subspaces.py``: weights only, drawn from a standard normal law, each layer divided by the root of its inputs.

So the same step size does at every width. Blocks are stored so that their first dimension is the shorter one where that
matters: ``BROS`` draws its subspaces there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, relu

Params = dict[str, Tensor]


def normal(shapes: dict[str, tuple[int, ...]], seed: int) -> Params:
    rng = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=rng) for k, s in shapes.items()}


def dense(x: Tensor, w: Tensor) -> Tensor:
    return x @ w / w.shape[0] ** 0.5


def mlp_shapes(inputs: int, outputs: int, width: int, depth: int = 4) -> dict[str, tuple[int, ...]]:
    """``depth`` square layers between the first and the last one."""
    hidden = {f"hidden{i}": (width, width) for i in range(depth)}
    return {"first": (inputs, width), **hidden, "last": (width, outputs)}


def mlp(w: Params, x: Tensor) -> Tensor:
    for k, block in w.items():
        x = dense(x, block)
        if k != "last":
            x = relu(x) * 2**0.5
    return x


def convolutions_shapes(outputs: int, width: int, depth: int = 5) -> dict[str, tuple[int, ...]]:
    """Three that halve the image, up to ``width`` channels, and ``depth`` of ``width`` by ``width``."""
    sizes = [1, width // 16, width // 4, *[width] * (depth + 1)]
    pairs = zip(sizes[1:], sizes[:-1], strict=True)
    return {f"conv{i}": (m, n, 3, 3) for i, (m, n) in enumerate(pairs)} | {"last": (width, outputs)}


def convolutions(w: Params, x: Tensor) -> Tensor:
    """Of ``(n, 1, 28, 28)``."""
    for i, block in enumerate(v for k, v in w.items() if k != "last"):
        y = conv2d(x, block, stride=2 if i < 4 else 1, padding=1) / block[0].numel() ** 0.5
        y = relu(layer_norm(y, y.shape[1:]))
        x = x + y if i > 3 else y
    return dense(x.mean((2, 3)) * 2**0.5, w["last"])


def blocks_shapes(width: int, depth: int = 4) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        found |= {
            f"attend{i}": (width, 3 * width),
            f"hidden{i}": (width, 4 * width),
            f"out{i}": (width, 4 * width),
        }
    return found


def blocks(w: Params, x: Tensor, causal: bool, heads: int = 8) -> Tensor:
    """Of a transformer; ``x`` is ``(..., length, width)``."""
    length, width = x.shape[-2:]
    depth = sum(k.startswith("attend") for k in w)
    for i in range(depth):
        seen = dense(layer_norm(x, (width,)), w[f"attend{i}"])
        parts = seen.unflatten(-1, (heads, -1)).transpose(-2, -3).chunk(3, dim=-1)
        scores = parts[0] @ parts[1].mT / parts[0].shape[-1] ** 0.5
        if causal:
            scores = scores - 1e9 * torch.ones(length, length).triu(1)
        x = x + (scores.softmax(-1) @ parts[2]).transpose(-2, -3).flatten(-2)
        hidden = relu(dense(layer_norm(x, (width,)), w[f"hidden{i}"]))
        x = x + hidden @ w[f"out{i}"].mT / hidden.shape[-1] ** 0.5
    return layer_norm(x, (width,))
