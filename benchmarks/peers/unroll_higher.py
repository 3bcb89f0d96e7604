"""higher 0.2.1: ``innerloop_ctx`` around a module whose weights are the inner parameters."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
from peer_higher import unrolling
from torch_task import TorchTask


def build(
    task: measure.Task, solver: str, options: argparse.Namespace
) -> tuple[Callable[[], object], Callable[[], measure.Arrays]]:
    if solver != "descent":
        raise SystemExit("gradient descent only")
    t = TorchTask(task, options)
    return t.gradient, unrolling(t, t.products)


if __name__ == "__main__":
    measure.main(build)
