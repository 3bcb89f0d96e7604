"""Differences of outer values in a few directions: nothing is differentiated."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import is_number
from .._errors import RequirementError
from .._results import SUCCESS, Result, Status
from .._typing import Params
from ..inner import AbstractInnerSolver, InnerSolution
from ..inner._base import AbstractBlackBox
from ..operators import scalar
from ..problem import BilevelProblem
from ._base import run_inner
from ._directional import AbstractDirectionalEstimator, PartialEstimate
from ._directions import flat, shaped
from ._estimate import EstimatorState, HypergradientEstimate
from ._outer_gradients import _first_failure


@dataclass(frozen=True)
class ZerothOrder(AbstractDirectionalEstimator):
    """``(1/b) sum_i s_i v_i`` with ``s_i = (h(lam + mu v_i) - h(lam)) / mu``, ``h`` the outer value after a solve.

    Any inner solver will do, also a :class:`BlackBox`, and it sees whatever the outer value depends on. Cost:
    ``b + 1`` inner solves (``2 b + 1`` of central differences; the one at ``lam`` gives the value and the next
    warm start). Directions as for :class:`ForwardGradient`; orthogonal ones with ``b = N`` are plain finite
    differences. Bias ``O(mu)`` where ``h`` is curved, ``O(mu^2)`` of central differences; each solve ends at a
    tolerance far below ``mu``, or its error is divided by ``mu``, too.

    References: Shen, Wang, Yang & Xu (2024), "Memory-efficient gradient unrolling for large-scale bi-level
    optimization", section 3.2; Nesterov & Spokoiny (2017), "Random gradient-free minimization of convex
    functions".

    Args:
        mu: How far to go, in units of ``lam``, whose entries should be of order 1 (take logarithms). Each entry
            moves by about ``mu`` (one at a time by ``mu sqrt(N)`` in coordinate directions), also across bounds.
            In float32 it should be about 1e-2, or the differences drown in rounding: much below, it is refused,
            or a warning says so.
        central: ``(h(lam + mu v) - h(lam - mu v)) / (2 mu)``.
    """

    name: ClassVar[str] = "zeroth_order"
    requires: ClassVar[frozenset[str]] = frozenset({"repeatable_solves"})

    mu: float = field(default=1e-4, kw_only=True)
    central: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.mu) and 0 < self.mu < float("inf")):
            raise ValueError(f"ZerothOrder needs a finite mu > 0, got {self.mu!r:.80}.")

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        if inner_solver is None:
            raise RequirementError(
                "ZerothOrder solves the inner problem again at displaced hyperparameters, and no inner solver was "
                "given; pass inner_solver=, or use Implicit at a solution found elsewhere."
            )
        for name, v in outer_params.items():
            largest = float(v.detach().abs().max()) if v.numel() else 0.0
            spacing = torch.finfo(v.dtype).eps * largest
            if self.mu < 10 * spacing:
                raise RequirementError(
                    f"ZerothOrder(mu={self.mu:g}) is lost in the rounding of {name!r}, whose entries of up to "
                    f"{largest:.3g} are {spacing:.1g} apart in {v.dtype}; raise mu, scale "
                    f"{name!r} (or take its logarithm), or use float64."
                )
            if 0 < largest < self.mu:
                warnings.warn(
                    f"ZerothOrder(mu={self.mu:g}) moves {name!r} by more than its largest entry, {largest:.3g}: scale "
                    f"{name!r} (or take its logarithm), or lower mu.",
                    stacklevel=3,
                )

    def group(self, inner_params: Params) -> int:
        return 1

    def partial(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
        directions: range | None = None,
    ) -> PartialEstimate:
        self.check(problem, inner_solver, inner_params, outer_params)
        state = EstimatorState() if state is None else state
        begun, at, num_steps = time.perf_counter(), flat(outer_params), 0
        sampled = self._sampled(outer_params, step)
        numbers = self._numbers(sampled, directions, 1)

        def solved(flat_lam: Tensor) -> tuple[Tensor, InnerSolution]:
            nonlocal num_steps
            lam = shaped(flat_lam, outer_params)
            found = run_inner(problem, inner_solver, inner_params, lam, state)
            num_steps += found.num_steps
            return _value(problem, found, lam, step), found

        value, base = solved(at)
        result = _first_failure(base.result, _finite_value(value, "at lam"))
        if result:
            self._check_repeatable(problem, inner_solver, base.inner_params, outer_params, step)
        scalars: list[float] = []
        seen: list[Tensor] = []
        for i, row in zip(numbers, sampled.each(numbers), strict=True):
            if not result:
                break
            signs = (1.0, -1.0) if self.central else (1.0,)
            ends = [solved(at + sign * self.mu * row) for sign in signs]
            for sign, (end, solution) in zip(signs, ends, strict=True):
                where = f"at lam {'+' if sign > 0 else '-'} {self.mu:g} v, v being direction {i}"
                result = _first_failure(result, solution.result, _finite_value(end, where))
            ahead, behind = ends[0][0], ends[-1][0] if self.central else value
            scalars.append(float(ahead.double() - behind.double()) / (self.mu * len(signs)))
            seen += [end for end, _ in ends]
        if result and seen:
            result = self._rounding(value, torch.stack(seen), len(numbers) == sampled.size)
        known = HypergradientEstimate(
            _tree.zeros_like(outer_params)
            if result
            else _tree.tree_map(lambda v: torch.full_like(v, torch.nan), outer_params),
            value,
            base.inner_params,
            result,
            {
                "num_inner_steps": float(num_steps),
                "num_inner_solves": float(1 + len(seen)),
                "seconds_inner": time.perf_counter() - begun,
            },
            EstimatorState(state.inner_index + base.num_steps, base.state or None),
        )
        missing = [torch.nan] * (len(numbers) - len(scalars))
        return PartialEstimate(
            torch.tensor([*scalars, *missing], dtype=torch.float64, device="cpu"),
            numbers,
            step,
            known,
            moving=frozenset(outer_params),
        )

    def _check_repeatable(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int,
    ) -> None:
        """Refuse objectives that are not the same twice at the solution; whatever they vary by is divided by ``mu``.

        Raises:
            RequirementError: naming the one.
        """
        inner = ("inner_objective", problem.inner_objective, problem.inner_batch, 0)
        outer = ("outer_objective", problem.outer_objective, problem.outer_batch, step)
        between = [] if isinstance(inner_solver, AbstractBlackBox) else [inner, inner]
        known: dict[str, float] = {}
        for label, objective, batch_of, index in (outer, *between, outer):
            w, lam = _tree.clone(inner_params), _tree.clone(outer_params)
            with torch.enable_grad():
                now = float(scalar(objective(dict(w), dict(lam), batch_of(index)), label).detach())
            first = known.setdefault(label, now)
            if abs(first - now) > 1e-2 * self.mu * max(abs(first), abs(now)):
                raise RequirementError(
                    f"{label} gave {first:.9g} and then {now:.9g} at the same place: differences over mu={self.mu:g} "
                    f"are of that, and not of lam. Draw random numbers (dropout) from a generator that is seeded by the "
                    f"batch, or switch them off, and see that the objectives change nothing that they use (running "
                    f"statistics of batch normalization)."
                )

    def _rounding(self, value: Tensor, seen: Tensor, all_entries: bool) -> Result:
        """Whether ``h`` moved at all, and by more than it is rounded by."""
        moved = float((seen.double() - value.double()).abs().max())
        if moved == 0.0 and self.directions == "coordinate" and not all_entries:
            return SUCCESS
        if moved == 0.0:
            return Result(
                Status.STALLED,
                f"The outer value stays {float(value):.9g} to the last bit wherever lam is moved by mu={self.mu:g}: "
                f"it does not depend on lam, is piecewise constant (an accuracy), or is too coarse. Raise mu, use "
                f"a smooth outer value, or leave these hyperparameters to Optuna.",
            )
        rounding = torch.finfo(value.dtype).eps * abs(float(value))
        if moved < 20 * rounding:
            warnings.warn(
                f"ZerothOrder(mu={self.mu:g}): the outer value moves by {moved:.1g}, and is rounded by about "
                f"{rounding:.1g} in {value.dtype}: raise mu, or use float64.",
                stacklevel=3,
            )
        return SUCCESS


def _value(problem: BilevelProblem, found: InnerSolution, lam: Params, step: int) -> Tensor:
    with torch.enable_grad():  # it may take derivatives of its own
        value = problem.outer_objective(
            dict(found.inner_params), dict(lam), problem.outer_batch(step)
        )
        return scalar(value, "outer_objective").detach()


def _finite_value(value: Tensor, where: str) -> Result:
    if torch.isfinite(value):
        return SUCCESS
    return Result(
        Status.NONFINITE,
        f"The outer value is {float(value)} {where}; keep the hyperparameters where it has one (tighter bounds).",
    )
