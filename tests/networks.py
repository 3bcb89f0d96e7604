"""Small networks near the minimum of their inner objective, for curvature that knows layers. In float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from problems import F64, Params, randn
from torch import Tensor, nn

import optuna_hypergrad as ohg
from optuna_hypergrad.operators import HessianOperator, InnerGraph

DECAY = 1e-4


@dataclass(frozen=True)
class Network:
    """A model, its data, and the inner parameters found."""

    model: nn.Module
    x: Tensor
    y: Tensor
    inner_params: Params

    def inner_objective(self, w: Params, lam: Params, batch: object) -> Tensor:
        outputs = torch.func.functional_call(self.model, w, (self.x,))
        decay = lam["decay"] * torch.stack([v.square().sum() for v in w.values()]).sum()
        return 0.5 * (outputs - self.y).square().sum(1).mean() + 0.5 * decay

    def graph(self, decay: float = DECAY) -> InnerGraph:
        lam = {"decay": torch.tensor(decay, dtype=F64)}
        return InnerGraph(self.inner_objective, self.inner_params, lam, None)

    def operator(self, decay: float = DECAY) -> HessianOperator:
        return HessianOperator(self.graph(decay))


def initialized(model: nn.Module, seed: int) -> nn.Module:
    """In float64, by numbers of its own."""
    model = model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            fan = max(p[0].numel(), 1)
            p.copy_(
                randn(*p.shape, seed=seed + i) / fan**0.5 if p.ndim > 1 else torch.zeros(p.shape)
            )
    return model


@functools.cache
def layer() -> Network:
    """One linear layer: Kronecker factors are its Gauss-Newton matrix, which is its Hessian."""
    model = initialized(nn.Linear(5, 3), seed=30)
    x, y = randn(40, 5, seed=31), randn(40, 3, seed=32)
    return Network(model, x, y, {k: v.detach() for k, v in model.named_parameters()})


@functools.cache
def perceptron() -> Network:
    """:func:`untrained_perceptron`, trained."""
    start = untrained_perceptron()
    problem = ohg.BilevelProblem(start.inner_objective, start.inner_objective)
    lam = {"decay": torch.tensor(DECAY, dtype=F64)}
    found = ohg.inner_solve(problem, ohg.LBFGS(), start.inner_params, lam, num_steps=150)
    return replace(start, inner_params=found.inner_params)


@functools.cache
def untrained_perceptron() -> Network:
    """16-8-4 regression of noisy targets: more samples than parameters, inputs of very different scales."""
    model, teacher = (
        initialized(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)), seed=40)
        for _ in range(2)
    )
    x = 3 * randn(600, 16, seed=41) * torch.logspace(0, -1.5, 16, dtype=F64)
    with torch.no_grad():
        for i, p in enumerate(teacher.parameters()):
            p.add_(0.02 * randn(*p.shape, seed=70 + i))
        y = teacher(x) + 0.1 * randn(600, 4, seed=42)
    return Network(model, x, y, {k: v.detach() for k, v in model.named_parameters()})
