"""A torch module as a bilevel problem: its weights inside, their decays and the weights of samples outside."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from .._typing import Params
from ..problem import BilevelProblem
from ..search_space import Domain

Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""Inputs ``(n, ...)``, targets ``(n,)``, the samples' places in weights that are tuned ``(n,)``, and how much each sample counts
``(n,)``, 1 on average over what a batch is drawn from."""

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
SAMPLES = "sample_weights"


def build(
    given: Any, sizes: Sequence[int], activation: str, num_inputs: int, num_outputs: int, seed: int
) -> nn.Module:
    """A module of its own, of the same initial weights for the same ``seed`` (those of ``given``, if that is a module).

    Raises:
        TypeError: if a function gives no module.
        ValueError: if it has no parameters, or layers that act differently in each call; for sizes that are none.
    """
    if any(int(n) != n or n < 1 for n in sizes):
        raise ValueError(f"hidden_layer_sizes must be integers from 1 on, got {list(sizes)!r:.80}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(given, nn.Module):
            module = copy.deepcopy(given)
        elif given is not None:
            module = given(num_inputs, num_outputs)
        else:
            widths = [num_inputs, *sizes, num_outputs]
            layers: list[nn.Module] = []
            for a, b in itertools.pairwise(widths):
                layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
            module = nn.Sequential(*layers[:-1])
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module(n_inputs, n_outputs) gave {type(module).__name__}, no torch module."
        )
    if not any(True for _ in module.parameters()):
        raise ValueError(f"module {type(module).__name__} has no parameters to fit.")
    for part in module.modules():
        if isinstance(part, (_NormBase, _DropoutNd)):
            raise ValueError(
                f"module has a {type(part).__name__} layer, of which each call is another function, so that its weights "
                f"have no decay that is best. Use LayerNorm or GroupNorm in place of batch normalization; in place of "
                f"dropout, the decays that are tuned."
            )
    return module


@dataclass(frozen=True)
class Network:
    """A module and what is tuned of its training.

    Attributes:
        module: Its own weights are never used.
        loss: ``(outputs, targets) -> (n,)``.
        decay: What has a decay of its own: ``"one"`` (all weight matrices), ``"per_layer"`` (each of them), ``"per_tensor"``
            or ``"per_weight"`` (with biases).
    """

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    decay: str

    def weights(self) -> Params:
        return {k: v.detach().clone() for k, v in self.module.named_parameters()}

    def decay_of(self, weights: Params) -> dict[str, str]:
        """The name of the decay of each tensor that has one."""
        matrices = [k for k, v in weights.items() if v.dim() > 1] or list(weights)
        if self.decay == "one":
            return dict.fromkeys(matrices, "decay")
        return {k: k for k in (matrices if self.decay == "per_layer" else weights)}

    def start(self, decay: float, num_samples: int | None) -> Params:
        """Equal decays, and equal weights for ``num_samples``."""
        weights = self.weights()
        some = next(iter(weights.values()))
        found: Params = {}
        for name, key in self.decay_of(weights).items():
            shape = weights[name].shape if self.decay == "per_weight" else ()
            found[key] = torch.full(shape, decay, dtype=some.dtype, device=some.device)
        if num_samples is not None:
            found[SAMPLES] = torch.ones(num_samples, dtype=some.dtype, device=some.device)
        return found

    def domains(self, tuned: Params, decay_range: tuple[float, float]) -> dict[str, Domain]:
        low, high = decay_range
        return {
            k: Domain(0.0, 1.0, unit=0.3) if k == SAMPLES else Domain(low, high, log=True)
            for k in tuned
        }

    def outputs(self, w: Params, lam: Params, batch: Data) -> Tensor:
        found: Tensor = torch.func.functional_call(self.module, w, (batch[0],))
        return found

    def data_loss(self, outputs: Tensor, lam: Params, batch: Data) -> Tensor:
        each = batch[3] * self.loss(outputs, batch[1])
        return (lam[SAMPLES][batch[2]] * each).mean() if SAMPLES in lam else each.mean()

    def penalty(self, w: Params, lam: Params, batch: Data) -> Tensor:
        terms = [(lam[key] * w[k].square()).sum() for k, key in self.decay_of(w).items()]
        return torch.stack(terms).sum() / 2

    def training_loss(self, w: Params, lam: Params, batch: Data) -> Tensor:
        return self.data_loss(self.outputs(w, lam, batch), lam, batch) + self.penalty(w, lam, batch)

    def validation_loss(self, w: Params, lam: Params, batch: Data) -> Tensor:
        return (batch[3] * self.loss(self.outputs(w, lam, batch), batch[1])).mean()

    def problem(
        self, train: Data, validation: Data, batch_size: int | None, seed: int, first: int = 0
    ) -> BilevelProblem:
        """Training on batches of ``train`` from number ``first`` on; all of it where ``batch_size`` is ``None``."""

        def drawn(step: int) -> Data:
            if batch_size is None or batch_size >= len(train[0]):
                return train
            generator = torch.Generator().manual_seed(seed + first + step)
            chosen = torch.randperm(len(train[0]), generator=generator, device="cpu")[:batch_size]
            chosen = chosen.to(train[0].device)
            return train[0][chosen], train[1][chosen], train[2][chosen], train[3][chosen]

        return BilevelProblem(
            self.training_loss, self.validation_loss, drawn, lambda step: validation
        )


def split(
    y: np.ndarray, fraction: float, classes: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation samples, the same share of each class, of which none is left out of the training."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(y == c) for c in np.unique(y)] if classes else [np.arange(len(y))]
    held = []
    for group in groups:
        size = min(round(fraction * len(group)), len(group) - 1)
        held.append(rng.permutation(group)[:size])
    chosen = np.concatenate(held)
    if not len(chosen):  # classes too small for a share
        spare = [g for g in groups if len(g) > 1] or [np.arange(len(y))]
        chosen = rng.permutation(max(spare, key=len))[:1]
    mask = np.zeros(len(y), dtype=bool)
    mask[chosen] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)
