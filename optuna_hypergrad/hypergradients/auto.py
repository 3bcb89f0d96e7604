"""The choice of an estimator, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch

from .. import _tree
from .._arguments import check_budget, check_count
from .._errors import RequirementError
from .._twice import NO_ARGUMENT, goes_through_once_differentiable
from .._typing import Params
from ..inner import AbstractInnerSolver, AbstractStepSolver
from ..inner._base import AbstractBlackBox
from ..operators import scalar
from ..problem import BilevelProblem
from ._base import AbstractHypergradientEstimator
from ._columns import graph_bytes
from ._estimate import EstimatorState, HypergradientEstimate
from ._memory import num_bytes
from ._rewind import within
from .forward_gradient import ForwardGradient
from .forward_mode import ForwardMode
from .implicit import Implicit
from .two_phase import TwoPhase
from .unroll import Unroll
from .zeroth_order import ZerothOrder

Kind = Literal["implicit", "forward", "reverse", "two phases", "differences"]
_KINDS: tuple[Kind, ...] = ("implicit", "forward", "reverse", "two phases", "differences")
_FEW = 50
_DIRECTIONS = 16
_logger = logging.getLogger("optuna.hypergradients")


class Choice(NamedTuple):
    """An estimator, and a sentence that says why it is the one."""

    estimator: AbstractHypergradientEstimator
    reason: str


@dataclass(frozen=True)
class Auto(AbstractHypergradientEstimator):
    """Chooses an estimator by the numbers of hyperparameters, inner parameters and steps, and by what is possible.

    | there is | it takes |
    |---|---|
    | a black box | ``ZerothOrder``, in as many directions as there are hyperparameters, 50 at most |
    | an objective without second derivatives | the same |
    | an inner solution: no solver, a minimizer, or steps until a tolerance is met | ``Implicit`` |
    | a number of steps, and at most 50 hyperparameters | ``ForwardMode``: exact, and no tape |
    | a number of steps that fit into ``memory_budget``, recomputed if need be | ``Unroll`` |
    | more steps than that | ``TwoPhase``: truncated ``Unroll`` first, then ``ForwardGradient`` corrects it |

    Whatever steers the inner solver (step sizes, momenta, weight decay) is never left to ``Implicit``. The choice
    is made once, at the first step of a run, and said in one line at level INFO of the logger
    ``optuna.hypergradients``; it takes about 4 gradient evaluations. :meth:`explain` only says it.

    Reference: the regimes of Shen, Wang, Yang & Xu (2024), "Memory-efficient gradient unrolling for large-scale
    bi-level optimization", table 1.

    Args:
        memory_budget: Bytes for what an estimator keeps of the inner steps.
        seed: Of random directions.
    """

    name: ClassVar[str] = "auto"

    memory_budget: float = 1e9
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget("Auto", self.memory_budget)
        check_count("Auto", "seed", self.seed, 0)

    @property
    def carries(self) -> str:
        return (
            "the method that it chose, and what that hands on (pass Auto().choose(...).estimator)"
        )

    def choose(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> Choice:
        """The estimator for this problem; takes about 4 gradient evaluations."""
        kind, reason = self._kind(problem, inner_solver, inner_params, outer_params)
        return Choice(self._build(kind, inner_solver, inner_params, outer_params), reason)

    def explain(
        self,
        problem: BilevelProblem,
        inner_params: Params,
        outer_params: Params,
        *,
        inner_solver: AbstractInnerSolver | None = None,
    ) -> str:
        """What it would choose, and why, in one line; nothing is run but what the choice takes."""
        choice = self.choose(problem, inner_solver, inner_params, outer_params)
        return f"Auto takes {_short(choice.estimator)}: {choice.reason}"

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        chosen = self.choose(problem, inner_solver, inner_params, outer_params).estimator
        chosen.check(problem, inner_solver, inner_params, outer_params)

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
        numbers = dict(state.numbers)
        chosen = numbers.pop("auto", None)
        if chosen is None:
            kind, reason = self._kind(problem, inner_solver, inner_params, outer_params)
        else:
            kind = _KINDS[int(chosen)]
        estimator = self._build(kind, inner_solver, inner_params, outer_params)
        if chosen is None:
            _logger.info(f"Auto takes {_short(estimator)}: {reason}")
        found = estimator.estimate(
            problem, inner_solver, inner_params, outer_params, step, replace(state, numbers=numbers)
        )
        handed_on = {**found.state.numbers, "auto": float(_KINDS.index(kind))}
        return replace(found, state=replace(found.state, numbers=handed_on))

    def _kind(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> tuple[Kind, str]:
        n, p = _tree.num_entries(outer_params), _tree.num_entries(inner_params)
        sizes = f"{_counted(n, 'hyperparameter')}, {_counted(p, 'inner parameter')}"
        if isinstance(inner_solver, AbstractBlackBox):
            return "differences", f"nothing is known about the black box but its results ({sizes})."
        missing = _missing_derivative(problem, inner_params, outer_params)
        if missing is not None and inner_solver is not None:
            return "differences", (
                f"the inner objective has no second derivatives ({missing}); replace that operation, and there "
                f"are cheaper ways ({sizes})."
            )
        if not isinstance(inner_solver, AbstractStepSolver):
            what = "given" if inner_solver is None else f"found by {type(inner_solver).__name__}"
            return "implicit", f"the inner solution is {what}, however it is reached ({sizes})."
        steps = _counted(inner_solver.max_steps, "inner step")
        steering = sorted(inner_solver.hyperparameters() & outer_params.keys())
        seen = bool(steering) or inner_solver.has_schedule() or inner_solver.weight_decay != 0.0
        if not seen and (inner_solver.rtol > 0 or inner_solver.atol > 0):
            return "implicit", (
                f"{type(inner_solver).__name__} runs until its tolerance is met, and nothing steers it ({sizes}, "
                f"at most {steps})."
            )
        if n <= _FEW:
            few = "is only 1 hyperparameter" if n == 1 else f"are only {n} hyperparameters"
            return "forward", (
                f"there {few}, so forward mode is exact, with no tape "
                f"({_counted(p, 'inner parameter')}, {steps})."
            )
        state = num_bytes(inner_params.values()) * (1 + len(inner_solver.init(inner_params)))
        tape = graph_bytes(problem, inner_params, outer_params, 0) + 2 * state
        try:
            within(self.memory_budget)(inner_solver.max_steps, tape, state)
        except RequirementError:
            return "two phases", (
                f"{steps} of {tape / 1e6:.3g} MB each do not fit into memory_budget={self.memory_budget:.3g} bytes, "
                f"however they are recomputed ({sizes})."
            )
        return "reverse", (
            f"there are many hyperparameters, and {steps} of {tape / 1e6:.3g} MB each fit into "
            f"memory_budget={self.memory_budget:.3g} bytes, some of them recomputed if need be ({sizes})."
        )

    def _build(
        self,
        kind: Kind,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> AbstractHypergradientEstimator:
        n, budget = _tree.num_entries(outer_params), self.memory_budget
        if kind == "implicit":
            return Implicit()
        if kind == "forward":
            return ForwardMode(memory_budget=budget)
        if kind == "reverse":
            return Unroll(memory_budget=budget)
        if kind == "differences":
            rough = any(
                torch.finfo(v.dtype).eps > 1e-10
                for v in (*inner_params.values(), *outer_params.values())
            )
            return ZerothOrder(min(n, _FEW), seed=self.seed, mu=1e-2 if rough else 1e-4)
        assert isinstance(inner_solver, AbstractStepSolver)
        cheap = Unroll(truncation=max(1, inner_solver.max_steps // 50), recompute="tree")
        return TwoPhase(
            cheap,
            ForwardGradient(
                min(n, _DIRECTIONS), seed=self.seed, memory_budget=budget, control_variate=cheap
            ),
        )


def _missing_derivative(
    problem: BilevelProblem, inner_params: Params, outer_params: Params
) -> str | None:
    """What torch says of an inner objective that cannot be differentiated twice; ``None`` if it can."""
    w, lam = _tree.leaves(inner_params), _tree.leaves(outer_params)
    with torch.enable_grad():
        try:
            value = problem.inner_objective(dict(w), dict(lam), problem.inner_batch(0))
        except RuntimeError as error:
            if NO_ARGUMENT not in str(error):
                raise
            return str(error).partition("\n")[0].partition(". ")[0][:120]
        value = scalar(value, "inner_objective")
        if not value.requires_grad:
            return None  # the estimator says what is wrong
        try:
            found = torch.autograd.grad(value, [*w.values()], create_graph=True, allow_unused=True)
            alive = [g for g in found if g is not None and g.requires_grad]
            if goes_through_once_differentiable(alive, value):
                return "a torch.autograd.Function is marked once_differentiable"
            if alive:
                at, ones = [*w.values(), *lam.values()], [torch.ones_like(g) for g in alive]
                torch.autograd.grad(alive, at, ones, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            return str(error).split("\n")[0][:120]
    return None


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _short(estimator: AbstractHypergradientEstimator) -> str:
    if isinstance(estimator, TwoPhase):
        return f"TwoPhase({_short(estimator.first)}, {_short(estimator.second)})"
    settings: tuple[str, ...] = {
        Unroll: ("truncation", "memory_budget"),
        ZerothOrder: ("num_directions", "mu"),
        ForwardGradient: ("num_directions",),
        ForwardMode: (),
        Implicit: (),
    }[type(estimator)]
    if isinstance(estimator, Unroll) and estimator.recompute != "auto":
        settings = ("truncation",)  # it keeps to no budget
    values = {s: getattr(estimator, s) for s in settings}
    named = (
        f"{s}={v}" if isinstance(v, int) else f"{s}={v:.4g}"
        for s, v in values.items()
        if v is not None
    )
    return f"{type(estimator).__name__}({', '.join(named)})"
