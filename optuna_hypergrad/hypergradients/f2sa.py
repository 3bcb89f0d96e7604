"""The hypergradient as a difference of inner solutions with and without a little of the outer objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .. import _tree
from .._typing import Batch, Params
from ..inner import AbstractInnerSolver, InnerSolution, inner_solve
from ..problem import BilevelProblem
from ._base import run_inner
from ._estimate import Cotangents, EstimatorState, HypergradientEstimate
from ._pace import Schedule, check_schedule, scheduled
from ._penalty import AbstractPenalty, in_words, packed, part, unpacked
from ._slopes import Slopes, difference, outer_slopes


def rising(count: int) -> float:
    """``10 (1 + t)^(1/7)``: as fast as noise in both objectives allows."""
    return float(10.0 * (1.0 + count) ** (1.0 / 7.0))


@dataclass(frozen=True)
class F2SA(AbstractPenalty):
    """``f_lam(y) + s [g_lam(y) - g_lam(z)]`` with ``y ~ argmin g + f/s`` and ``z ~ argmin g``.

    No second derivatives and no linear system: the inner solver minimizes twice, on the same batches. The bias is
    ``O(1/s)``, and what ``y`` and ``z`` lack of their minima is multiplied by ``s``; so is rounding, which in
    float32 asks for ``s`` below about 1e3. ``s`` has to be large enough for ``g + f/s`` to have a minimum near that
    of ``g``: above ``L_f / mu``, the ratio of the curvature of ``f`` to the least of ``g``.

    ``central``: ``y+ ~ argmin g + f/s``, ``y- ~ argmin g - f/s``, and ``[f_lam(y+) + f_lam(y-)] / 2 +
    (s/2) [g_lam(y+) - g_lam(y-)]``, whose bias is ``O(1/s^2)`` where both objectives are smooth. It takes one more
    minimization (``z`` is still what is returned, and where ``outer_value`` is taken).

    References: Kwon, Kwon, Wright & Nowak (2023), "A fully first-order method for stochastic bilevel
    optimization", algorithm 1 (without its momentum: the inner solver has one); ``central``: the second-order
    case of F2SA-p, Chen, Li, Chayti & Zhang (2025), "Faster gradient methods for highly-smooth stochastic bilevel
    optimization".

    Args:
        penalty: ``s``: a number, or ``t -> number`` where ``t`` counts the estimator's steps from 0, which should
            rise; ``10 (1 + t)^(1/7)`` by default.
        central: Differences to both sides.
    """

    name: ClassVar[str] = "f2sa"
    requires: ClassVar[frozenset[str]] = frozenset({"stationary_point"})

    penalty: Schedule = rising
    central: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule("F2SA", "penalty", self.penalty)

    def estimate(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
    ) -> HypergradientEstimate:
        state = EstimatorState() if state is None else state
        assert inner_solver is not None  # see check
        s = scheduled("F2SA", "penalty", self.penalty, int(state.numbers.get("count", 0.0)))
        outer_batch = problem.outer_batch(step)
        y_before, z_before = self._both(inner_params, state)
        z = in_words(
            run_inner(problem, inner_solver, z_before, outer_params, state),
            "F2SA",
            "inner problem",
        )
        tensors: Params = {}

        warm = bool(state.inner_index)

        def shifted(name: str, share: float, before: Params) -> InnerSolution:
            """``argmin g + share f``, from ``before``."""

            def objective(w: Params, lam: Params, batch: Batch):  # type: ignore[no-untyped-def]
                g = problem.inner_objective(dict(w), dict(lam), batch)
                return g + share * problem.outer_objective(dict(w), dict(lam), outer_batch)

            found = inner_solve(
                BilevelProblem(objective, problem.outer_objective, problem.inner_batch),
                inner_solver,
                before,
                outer_params,
                start=state.inner_index,
                state=unpacked(state.tensors, f"{name} solver/") if warm else None,
            )
            tensors.update(packed(found.state, f"{name} solver/"))
            what = f"g {'+' if share > 0 else '-'} f/s with s={s:.3g} (raise penalty= if it has no minimum)"
            return in_words(found, "F2SA", what)

        above, below = shifted("y", 1.0 / s, y_before), z
        if self.central:
            before = (part(state.tensors, "y-/") if warm else {}) or y_before
            below = shifted("y-", -1.0 / s, before)
            tensors |= {f"y-/{k}": v for k, v in below.inner_params.items()}
        batch = problem.inner_batch(state.inner_index + z.num_steps)

        def at(solution: InnerSolution, outer: bool) -> Slopes:
            objective = problem.outer_objective if outer else problem.inner_objective
            label = "outer_objective" if outer else "inner_objective"
            where = _tree.detach(solution.inner_params), outer_params
            return outer_slopes(objective, *where, outer_batch if outer else batch, label)

        g_above, g_below = at(above, False), at(below, False)
        scale = 0.5 * s if self.central else s
        gap = difference(g_above.outer, g_below.outer)
        indirect: Cotangents = {k: None if d is None else scale * d for k, d in gap.items()}
        f = at(above, True)
        direct = f.outer
        if self.central:
            other = {k: None if d is None else -d for k, d in at(below, True).outer.items()}
            total = difference(direct, other)
            direct = {k: None if d is None else 0.5 * d for k, d in total.items()}
        num_steps = z.num_steps + above.num_steps + (below.num_steps if self.central else 0)
        stats = {
            "num_inner_steps": float(num_steps),
            "penalty": s,
            "gap": float(g_above.value - g_below.value),
        }
        return self._estimate(
            problem,
            outer_params,
            step,
            state,
            z,
            above.inner_params,
            f.value,
            (direct, indirect),
            stats,
            (above.result, below.result),
            tensors,
        )
