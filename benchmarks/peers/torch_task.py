"""The three tasks in torch: objectives ``(inner_params, outer_params, batch) -> scalar tensor``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import Task
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, linear, relu

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Objective = Callable[[Params, Params, Batch], Tensor]


def softmax_regression(w: Params, x: Tensor) -> Tensor:
    return x @ w["weight"]


def mlp(w: Params, x: Tensor) -> Tensor:
    x = relu(linear(x, w["0.weight"], w["0.bias"]))
    x = relu(linear(x, w["1.weight"], w["1.bias"]))
    return linear(x, w["2.weight"], w["2.bias"])


def tanh_mlp(w: Params, x: Tensor) -> Tensor:
    x = linear(x, w["0.weight"], w["0.bias"]).tanh()
    x = linear(x, w["1.weight"], w["1.bias"]).tanh()
    return linear(x, w["2.weight"], w["2.bias"])


def convnet(w: Params, x: Tensor) -> Tensor:
    x = avg_pool2d(relu(conv2d(x, w["0.weight"], w["0.bias"], padding=1)), 2)
    x = avg_pool2d(relu(conv2d(x, w["1.weight"], w["1.bias"], padding=1)), 2)
    return linear(x.flatten(1), w["2.weight"], w["2.bias"])


MOMENTUM = 0.9
"""Of the inner solver "momentum"."""

MODELS = {"softmax": softmax_regression, "mlp": mlp, "convnet": convnet, "sure": tanh_mlp}


def objectives(name: str) -> tuple[Objective, Objective]:
    """Training loss with a decay ``exp(lam)`` for each weight; validation loss."""
    model = MODELS[name]

    def inner(w: Params, lam: Params, batch: Batch) -> Tensor:
        loss = cross_entropy(model(w, batch[0]), batch[1])
        return loss + 0.5 * sum((lam[k].exp() * (v * v)).sum() for k, v in w.items())

    def outer(w: Params, lam: Params, batch: Batch) -> Tensor:
        return cross_entropy(model(w, batch[0]), batch[1])

    return inner, outer


def unrolled(
    inner: Objective,
    w: Params,
    lam: Params,
    batch: Batch,
    num_steps: int,
    step_size: float,
    momentum: float = 0.0,
) -> Params:
    """The end of inner steps, with the graph of all of them."""
    w = {k: v.detach().requires_grad_(True) for k, v in w.items()}
    velocity = {k: torch.zeros_like(v) for k, v in w.items()}
    for _ in range(num_steps):
        slopes = torch.autograd.grad(inner(w, lam, batch), tuple(w.values()), create_graph=True)
        gradient = dict(zip(w, slopes, strict=True))
        if momentum:
            gradient = velocity = {k: momentum * velocity[k] + g for k, g in gradient.items()}
        w = {k: v - step_size * gradient[k] for k, v in w.items()}
    return w


class TorchTask:
    """Objectives, tensors and the unit of cost."""

    def __init__(self, task: Task, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self.products, self.alpha = task.products, task.alpha
        self.inner_objective, self.outer_objective = objectives(task.name)
        self.train, self.valid = _batch(task.train), _batch(task.valid)
        self.inner = {k: torch.tensor(v) for k, v in task.inner.items()}
        self.outer = {k: torch.tensor(v) for k, v in task.outer.items()}

    def leaves(self) -> tuple[Params, Params]:
        return (
            {k: v.detach().requires_grad_(True) for k, v in self.inner.items()},
            {k: v.detach().requires_grad_(True) for k, v in self.outer.items()},
        )

    def gradient(self) -> object:
        """One gradient of the inner objective by the inner parameters: the unit."""
        w = {k: v.detach().requires_grad_(True) for k, v in self.inner.items()}
        return torch.autograd.grad(
            self.inner_objective(w, self.outer, self.train), tuple(w.values())
        )


def _batch(arrays: tuple[object, object]) -> Batch:
    return torch.tensor(arrays[0]), torch.tensor(arrays[1])
