"""What a step rule is: a function from (state, point, value, gradient) to the next point."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import ClassVar

from .._typing import Params

Bounds = dict[str, float]
"""One bound per hyperparameter, in internal coordinates (``Domain.internal_bounds``)."""


@dataclass(frozen=True)
class StepState:
    """Everything that a resumed trajectory needs, and nothing else.

    Args:
        tensors: Flat names (they may contain ``/``), any dtype and shape.
        numbers: What JSON holds: floats (finite), ints, booleans and strings.
    """

    tensors: Params = field(default_factory=dict)
    numbers: dict[str, float | int | bool | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """Where to evaluate next.

    Args:
        point: The next internal point, inside the bounds exactly; shapes and dtypes of the last.
        state: Goes into the next call.
        stop: ``None``, or one sentence that says why the trajectory is over.
    """

    point: Params
    state: StepState
    stop: str | None = None


class AbstractStepRule(abc.ABC):
    """Settings of an outer step rule; its state is a value that is passed in and out.

    A rule minimizes. It sees internal coordinates only, in which one unit is a natural step
    (:class:`~optuna_hypergrad.search_space.Domain`), and every evaluation is a value with its
    gradient at the point that was proposed last (or at the start).
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def init(self, point: Params, lower: Bounds, upper: Bounds) -> StepState:
        """State before the first evaluation, which is at ``point``."""

    @abc.abstractmethod
    def step(
        self,
        state: StepState,
        point: Params,
        value: float,
        gradient: Params,
        lower: Bounds,
        upper: Bounds,
    ) -> Proposal:
        """Take in the evaluation at ``point`` and propose the next one.

        Args:
            state: From :meth:`init` or the last proposal.
            point: Internal point that was evaluated.
            value: Loss there. NaN or infinite: the step is taken back and shortened.
            gradient: Its gradient, keyed and shaped like ``point``. Non-finite entries, or an
                empty dict when the evaluation failed: the step is taken back and shortened.
            lower: Lower bound per name, ``-inf`` for none.
            upper: Upper bound per name, ``inf`` for none.
        """
