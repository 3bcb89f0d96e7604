"""What a benchmark task is, and the table that tasks enter themselves into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optuna_hypergrad.search_space import Domain

Params = dict[str, Tensor]
F64 = torch.float64


@dataclass(frozen=True)
class Task:
    """A box, a start and an objective.

    Args:
        objective: ``(params, evaluation) -> value``; noisy tasks draw their noise from the number
            of the evaluation.
        exact: The same without noise; ``None`` where there is none.
        kind: What is special, in a few words.
    """

    name: str
    objective: Callable[[Params, int], Tensor]
    domains: dict[str, Domain]
    start: Params
    kind: str
    exact: Callable[[Params, int], Tensor] | None = None

    @property
    def size(self) -> int:
        return sum(v.numel() for v in self.start.values())

    def truth(self, params: Params) -> float:
        with torch.no_grad():
            return float((self.exact or self.objective)(params, 0))


TASKS: dict[str, Callable[[], Task]] = {}


def task(name: str, *arguments: object) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Enter ``build(name, *arguments)`` as ``TASKS[name]``; stacks."""

    def enter(build: Callable[..., Task]) -> Callable[..., Task]:
        TASKS[name] = functools.lru_cache(functools.partial(build, name, *arguments))
        return build

    return enter


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)
