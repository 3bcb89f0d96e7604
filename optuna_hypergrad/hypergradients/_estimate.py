"""What an estimator of hypergradients returns, and what one outer step hands to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .._results import SUCCESS, Result
from .._typing import Params
from ..inner import InnerSolution
from ..inner._base import InnerState

Cotangents = dict[str, Tensor | None]
"""By name; ``None`` where there is no path, which is not the same as zero."""


@dataclass(frozen=True)
class EstimatorState:
    """What one outer step hands to the next.

    Attributes:
        inner_index: Index of the next inner batch.
        solver_state: The inner solver's memory; ``None`` for a fresh one.
        tensors: The estimator's own memory; whoever is given none begins anew.
        numbers: Likewise.
    """

    inner_index: int = 0
    solver_state: InnerState | None = None
    tensors: Params = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)

    def cold(self) -> EstimatorState:
        """What is handed on where each inner solve begins anew: the estimator's own memory."""
        return EstimatorState(tensors=self.tensors, numbers=self.numbers)


@dataclass(frozen=True)
class HypergradientEstimate:
    """A hypergradient and how it was come by.

    Attributes:
        value: ``df/dlam``: keys, shapes, dtypes, device of ``outer_params``.
        outer_value: ``f(w, lam)``, a 0-d tensor.
        inner_params: ``w`` after the inner solve: the caller's next warm start.
        result: Success, or a sentence that says what to change.
        stats: ``num_inner_steps``, ``num_hvps``, ``residual``, ``inner_gradient_norm``,
            ``curvature``, ``seconds_inner``, ``seconds_backward`` where they apply.
        state: For the next outer step under warm starts.
    """

    value: Params
    outer_value: Tensor
    inner_params: Params
    result: Result = SUCCESS
    stats: dict[str, float] = field(default_factory=dict)
    state: EstimatorState = EstimatorState()


@dataclass(frozen=True)
class Pulled:
    """A cotangent of the inner solution, pulled back.

    Attributes:
        outer: Cotangents of ``lam``.
        initial: Cotangents of ``w_0``.
        result: Of the linear solve, where there is one.
        stats: Counts and residuals.
        tensors: What the estimator wants back at the next outer step, as ``EstimatorState.tensors``.
        numbers: Likewise.
    """

    outer: Cotangents
    initial: Cotangents
    result: Result = SUCCESS
    stats: dict[str, float] = field(default_factory=dict)
    tensors: Params = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Solved:
    """An inner solution and the map that pulls its cotangents back (and takes them: the dict is emptied)."""

    solution: InnerSolution
    pullback: Callable[[Params], Pulled]
    last_pullback: Callable[[Params], Pulled] | None = None
    """The same for the last time and without ``initial``, where that lets it leave out work or give back memory."""
