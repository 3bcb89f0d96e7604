"""Outer step rules: where a trajectory goes next, given what it has seen."""

from __future__ import annotations

from .._registry import look_up, registry
from ._abstract import AbstractStepRule, Bounds, Proposal, StepState
from .adam import Adam
from .lbfgs import LBFGS
from .torch_optimizer import OptimizerFactory, TorchOptimizer
from .trust_region import TrustRegion

REGISTRY = registry(AbstractStepRule, globals())  # type: ignore[type-abstract]

AUTO = TrustRegion


def make_step_rule(optimizer: str | AbstractStepRule | OptimizerFactory) -> AbstractStepRule:
    """A step rule from what a user gives as ``optimizer=``.

    Args:
        optimizer: ``"auto"``, a registered name, a rule, or a factory of a ``torch.optim``
            optimizer such as ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)``.

    Raises:
        ValueError: for a name that nobody registered (the message lists the names).
        TypeError: for anything else.
    """
    if isinstance(optimizer, AbstractStepRule):
        return optimizer
    if isinstance(optimizer, str):
        if optimizer == "auto":
            return AUTO()
        return look_up(REGISTRY, optimizer, "outer optimizer")()
    if callable(optimizer):
        return TorchOptimizer(optimizer)
    raise TypeError(
        f"optimizer={optimizer!r} is not a name, a step rule or a torch.optim factory; "
        'use "auto", or functools.partial(torch.optim.Adam, lr=0.1).'
    )


__all__ = [
    "AUTO",
    "LBFGS",
    "REGISTRY",
    "AbstractStepRule",
    "Adam",
    "Bounds",
    "OptimizerFactory",
    "Proposal",
    "StepState",
    "TorchOptimizer",
    "TrustRegion",
    "make_step_rule",
]
