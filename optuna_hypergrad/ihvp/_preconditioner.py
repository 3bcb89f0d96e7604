"""Preconditioners: approximate inverses that turn long linear solves into short ones."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from .._arguments import check_count
from .._typing import Params
from ..operators import AbstractLinearOperator

Inverse = Callable[[Tensor], Tensor]
"""``(P,) -> (P,)``: symmetric, positive definite, about ``(H + damping I)^-1`` up to a factor."""


@dataclass(frozen=True)
class Factors:
    """What a preconditioner has learned of an operator without its damping: plain tensors, to be kept.

    Attributes:
        tensors: By name.
        stats: How they were made, for the estimate's stats.
    """

    tensors: Params
    stats: dict[str, float] = field(default_factory=dict)


class AbstractPreconditioner(abc.ABC):
    """Settings of a preconditioner. Frozen; what it learns are :class:`Factors`, passed in and out.

    ``factorize`` is the costly part, and its products count as products of the solve. Implicit
    differentiation keeps the factors for ``refresh_every`` outer steps; stale ones cost steps, not
    accuracy.
    """

    name: ClassVar[str]
    takes_one_batch: ClassVar[bool] = False
    """Whether it looks into the batch, and so cannot precondition the mean over several."""
    refresh_every: int

    @abc.abstractmethod
    def factorize(self, operator: AbstractLinearOperator) -> Factors:
        """Learn the operator, damping left out.

        Raises:
            RequirementError: if this operator cannot be preconditioned so, naming what can.
            SolverError: if what was learned makes no positive definite map.
        """

    @abc.abstractmethod
    def inverse(self, factors: Factors, operator: AbstractLinearOperator) -> Inverse:
        """The map for an operator with its damping."""

    def build(self, operator: AbstractLinearOperator) -> Inverse:
        """Both in one: a symmetric positive definite map ``(P,) -> (P,)`` that may not write to its argument."""
        return self.inverse(self.factorize(operator), operator)

    def check_refresh(self) -> None:
        """Refuse a ``refresh_every`` that means nothing.

        Raises:
            ValueError: naming the preconditioner.
        """
        check_count(type(self).__name__, "refresh_every", self.refresh_every, 1)
