"""Slow weights that follow any step solver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import check_count
from .._errors import RequirementError
from .._typing import Params
from ._base import AbstractStepSolver, Evaluate, InnerState
from ._settings import Setting, check_number

_PREFIX = "inner_"


@dataclass(frozen=True)
class Lookahead(AbstractStepSolver):
    """``period`` steps of a solver from the slow weights, then ``slow <- slow + slow_step (fast - slow)``.

    The inner parameters, at which the outer objective and all derivatives are taken, are the *slow* weights: they
    move every ``period`` steps, so let ``max_steps`` be a multiple of it: fewer steps than a period do not move them at
    all, and have no derivative, but for warm starts, under which a period goes on from one outer step to the next. Gradients (and tolerances on them) are
    those at the fast weights, which the solver's state holds, with the place in the period and the inner solver's own
    memory, which goes on from period to period. ``slow_step=1`` is the inner solver. Averaging noise away is
    what it does: at ``slow_step=0.5`` the variance on a noisy quadratic is about a third.

    Reference: Zhang, Lucas, Hinton & Ba (2019), "Lookahead optimizer: k steps forward, 1 step back", algorithm 1.

    Args:
        inner_solver: Takes the fast steps; its ``weight_decay`` and ``max_norm`` hold for them.
        period: ``k``, the number of fast steps between two slow ones.
        slow_step: In (0, 1]; a number, the name of an outer parameter, or a schedule.
        max_steps: Fast steps; ``None`` for those of ``inner_solver``. So with ``rtol`` and ``atol``.
    """

    name: ClassVar[str] = "lookahead"
    settings: ClassVar[tuple[str, ...]] = ("slow_step",)
    inner_solver: AbstractStepSolver
    period: int = 5
    slow_step: Setting = 0.5
    max_steps: int = field(default=None, kw_only=True)  # type: ignore[assignment]
    rtol: float = field(default=None, kw_only=True)  # type: ignore[assignment]
    atol: float = field(default=None, kw_only=True)  # type: ignore[assignment]
    step_size: Setting = field(init=False, repr=False)
    weight_decay: Setting = field(init=False, repr=False)
    max_norm: float | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.inner_solver, AbstractStepSolver):
            raise ValueError(
                f"Lookahead goes around a step solver such as HeavyBall(0.1), not {self.inner_solver!r:.80}."
            )
        for name in ("max_steps", "rtol", "atol"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.inner_solver, name))
        for name in ("step_size", "weight_decay", "max_norm"):
            object.__setattr__(self, name, getattr(self.inner_solver, name))
        super().__post_init__()
        check_count("Lookahead", "period", self.period, 1)
        check_number("Lookahead: slow_step", self.slow_step, 0.0)
        if isinstance(self.slow_step, (int, float)) and not 0 < self.slow_step <= 1:
            raise ValueError(f"Lookahead needs 0 < slow_step <= 1, got {self.slow_step}.")

    def hyperparameters(self) -> frozenset[str]:
        return super().hyperparameters() | self.inner_solver.hyperparameters()

    def fixed_step_size(self) -> float | None:
        return None

    def has_schedule(self) -> bool:
        return super().has_schedule() or self.inner_solver.has_schedule()

    def has_moved(self, state: InnerState) -> bool:
        """Whether a period has ended with the last step, in a solver inside of this one, too."""
        return not bool(state["phase"]["steps"]) and self.inner_solver.has_moved(_inside(state))

    def init(self, inner_params: Params) -> InnerState:
        some = next(iter(inner_params.values()))
        return {
            "fast": _tree.clone(inner_params),
            "phase": {"steps": torch.zeros((), dtype=torch.float64, device=some.device)},
            **{_PREFIX + k: v for k, v in self.inner_solver.init(inner_params).items()},
        }

    def step(
        self,
        evaluate: Evaluate,
        inner_params: Params,
        outer_params: Params,
        state: InnerState,
        index: int,
    ) -> tuple[Params, InnerState, Tensor, Params]:
        slow_step = self.setting("slow_step", outer_params, index)
        if isinstance(slow_step, dict):
            raise RequirementError(
                "slow_step of Lookahead must be one number for all inner parameters."
            )
        phase, slow = state["phase"]["steps"], inner_params
        # Where a period begins the fast weights are the slow ones, whatever was handed in, with their graph.
        begins = phase == 0
        fast = {k: torch.where(begins, v, state["fast"][k]) for k, v in slow.items()}
        fast, memory, value, gradient = self.inner_solver.step(
            evaluate, fast, outer_params, _inside(state), index
        )
        ends = phase + 1 == self.period
        moved = {}
        for k, v in slow.items():
            a = slow_step.to(v.dtype) if isinstance(slow_step, Tensor) else slow_step
            moved[k] = torch.where(ends, torch.lerp(v, fast[k], a), v)
        after = {
            "fast": fast,
            "phase": {"steps": torch.where(ends, torch.zeros_like(phase), phase + 1)},
            **{_PREFIX + k: v for k, v in memory.items()},
        }
        return moved, after, value, gradient


def _inside(state: InnerState) -> InnerState:
    """The memory of the solver inside."""
    return {k[len(_PREFIX) :]: v for k, v in state.items() if k.startswith(_PREFIX)}
