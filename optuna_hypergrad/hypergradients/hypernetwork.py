"""Hypernetworks: the inner solution as a network of the hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import check_count
from .._errors import RequirementError
from .._typing import Params
from ..inner import AbstractInnerSolver, AbstractStepSolver, Adam
from ..problem import BilevelProblem
from ._around import Around
from ._proxy import AbstractProxy


@dataclass(frozen=True)
class Hypernetwork(AbstractProxy):
    """``w_hat(lam) = w_0 + net(lam)``, all of it fitted to the inner objective at perturbed ``lam``.

    An estimate is ``fit.max_steps`` steps for the network, and then the derivative of ``f(w_hat(lam), lam)`` (the joint,
    local optimization of the paper). There is no inner solve: ``inner_solver`` is not used by estimates (only by the solve at
    the end of ``minimize_bilevel``, which starts at ``w_hat(lam)``). First derivatives only, about 2 gradient evaluations for
    a step. For small inner models: the network has ``P (hidden + 1)`` numbers at least.

    Hand its ``state`` on from step to step (``minimize_bilevel`` does): with a fresh one it starts from ``w_0`` for any
    ``lam``.

    Reference: Lorraine & Duvenaud (2018), "Stochastic hyperparameter optimization through hypernetworks".

    Args:
        fit: A step solver for the network; its ``max_steps`` are those of one estimate.
        scale: Standard deviation of the perturbations, in ``lam``, or in its logarithm. They know no bounds: name in ``log``
            what must stay positive.
        log: Names of positive hyperparameters that the network sees the logarithm of.
        seed: Of the perturbations, and of the network before any fit.
        max_hyperparameters: More entries of ``outer_params`` than this are refused.
        hidden: Units of its hidden layer (tanh); 0 for a linear function.
        max_size: A larger last layer than this is refused.
    """

    name: ClassVar[str] = "hypernetwork"
    solves: ClassVar[bool] = False

    fit: AbstractStepSolver = field(default_factory=lambda: Adam(0.003, max_steps=20))
    hidden: int = 0
    max_size: int = 10_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Hypernetwork", "hidden", self.hidden, 0)
        check_count("Hypernetwork", "max_size", self.max_size, 1)

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        super().check(problem, inner_solver, inner_params, outer_params)
        inputs = self.hidden or _tree.num_entries(outer_params)
        size = _tree.num_entries(inner_params) * inputs
        if size > self.max_size:
            raise RequirementError(
                f"The last layer of this Hypernetwork would have {size} entries ({_tree.num_entries(inner_params)} inner "
                f"parameters, {inputs} inputs); it is refused above {self.max_size} (max_size). Use DeltaSTN, whose response "
                f"is structured, or Implicit."
            )

    def start(self, inner_params: Params, around: Around) -> Params:
        generator = torch.Generator().manual_seed(self.seed)
        net, inputs = {}, around.size
        if self.hidden:
            first = torch.randn(
                self.hidden, inputs, generator=generator, device="cpu", dtype=torch.float64
            )
            net["first"] = (first / inputs**0.5).to(around.zeros())
            net["bias"] = around.zeros().new_zeros(self.hidden)
            inputs = self.hidden
        for k, v in inner_params.items():
            net[f"last/{k}"] = v.new_zeros(v.numel(), inputs)
            net[f"shift/{k}"] = torch.zeros_like(v)
        return net

    def respond(self, fitted: Params, anchor: Params, offset: Tensor, delta: Tensor) -> Params:
        features = offset + delta
        if self.hidden:
            features = torch.tanh(fitted["first"] @ features + fitted["bias"])
        return {
            k: v
            + fitted[f"shift/{k}"]
            + (fitted[f"last/{k}"] @ features.to(v.dtype)).reshape(v.shape)
            for k, v in anchor.items()
        }
