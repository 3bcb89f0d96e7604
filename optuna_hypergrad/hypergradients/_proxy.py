"""What proxies share: a function ``w_hat(lam)`` is fitted around the current ``lam``, and differentiated there."""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import check_count, is_number
from .._errors import HyperparameterError, RequirementError
from .._results import Result
from .._typing import Batch, Objective, Params
from ..inner import AbstractInnerSolver, AbstractStepSolver, HeavyBall, InnerSolution, inner_solve
from ..inner._base import AbstractBlackBox, InnerState
from ..operators import scalar
from ..problem import BilevelProblem
from ._around import Around, names_seen
from ._base import AbstractHypergradientEstimator, refuse_solver_hyperparameters, run_inner
from ._estimate import Cotangents, EstimatorState, HypergradientEstimate
from ._outer_gradients import _finite, _first_failure, combine, nothing_found, outer_gradients


@dataclass(frozen=True)
class AbstractProxy(AbstractHypergradientEstimator):
    """Settings of all proxies; a method is the function that is fitted (:meth:`start`, :meth:`respond`)."""

    sees: ClassVar[str] = (
        "A proxy sees what the inner or outer objective uses, not how the inner solver moves: Unroll sees that."
    )
    solves: ClassVar[bool]
    """Whether the inner solver moves the inner parameters that the function starts from."""

    fit: AbstractStepSolver = field(
        default_factory=lambda: HeavyBall(0.05, max_steps=20, momentum=0.9)
    )
    scale: float = 0.1
    log: tuple[str, ...] = ()
    seed: int = 0
    max_hyperparameters: int = 100

    @property
    def carries(self) -> str:
        return "its fitted response"

    def __post_init__(self) -> None:
        label = type(self).__name__
        if not isinstance(self.fit, AbstractStepSolver) or self.fit.hyperparameters():
            raise ValueError(
                f"{label} needs a step solver without hyperparameters, such as HeavyBall(0.05, max_steps=20), as fit=, got "
                f"{self.fit!r:.80}."
            )
        if not (is_number(self.scale) and 0 < self.scale < math.inf):
            raise ValueError(f"{label} needs scale > 0, finite, got {self.scale!r:.80}.")
        if not (isinstance(self.log, tuple) and all(isinstance(k, str) for k in self.log)):
            raise ValueError(f"{label} needs log= to be a tuple of names, got {self.log!r:.80}.")
        check_count(label, "seed", self.seed, 0)
        check_count(label, "max_hyperparameters", self.max_hyperparameters, 1)

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        label = type(self).__name__
        refuse_solver_hyperparameters(label, inner_solver, outer_params)
        if isinstance(inner_solver, AbstractBlackBox):
            raise RequirementError(
                f"{label} fits a response to the inner objective, and a black box has none; use ZerothOrder."
            )
        size = _tree.num_entries(outer_params)
        if size > self.max_hyperparameters:
            raise RequirementError(
                f"{label} learns from random perturbations how the inner parameters respond to each of {size} "
                f"hyperparameters; it is refused above {self.max_hyperparameters} (max_hyperparameters). Use Implicit "
                f"or Unroll, whose cost does not grow with their number."
            )
        for name in self.log:
            if name not in outer_params:
                raise HyperparameterError(
                    f"{label}: log= names {name!r}, which is not among outer_params ({sorted(outer_params)})."
                )
            if not bool((outer_params[name] > 0).all()):
                raise HyperparameterError(
                    f"{label}: log= names {name!r}, whose least entry is {float(outer_params[name].min()):.3g}; only "
                    f"a positive hyperparameter has a logarithm. Take it out of log=."
                )

    @abc.abstractmethod
    def start(self, inner_params: Params, around: Around) -> Params:
        """What is fitted, before any fit."""

    @abc.abstractmethod
    def respond(self, fitted: Params, anchor: Params, offset: Tensor, delta: Tensor) -> Params:
        """``w_hat`` at a displacement ``delta`` from ``lam``; differentiable in ``fitted`` and ``delta``.

        Args:
            fitted: As from :meth:`start`.
            anchor: The inner parameters.
            offset: From where ``lam`` was at the first estimate to where it is.
            delta: ``(N,)``, as ``offset``.
        """

    def scales(self, around: Around, state: EstimatorState) -> Tensor:
        """Standard deviations of the perturbations, ``(N,)``."""
        return around.zeros() + self.scale

    def tuned(
        self, problem: BilevelProblem, w_hat: WHat, around: Around, step: int, state: EstimatorState
    ) -> Params:
        """What else is learned after the fit, and remembered."""
        return {}

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
        begun = time.perf_counter()
        solver = inner_solver if self.solves else None
        inner = run_inner(problem, solver, inner_params, outer_params, state)
        solved_at = time.perf_counter()
        around = Around(outer_params, self.log)
        origin = state.tensors.get("origin", around.position())
        w_hat = WHat(self, inner.inner_params, around.position() - origin)
        index, stats = (
            state.inner_index + inner.num_steps,
            {"num_inner_steps": float(inner.num_steps)},
        )
        after = replace(state, inner_index=index, solver_state=inner.state or None)
        nothing = nothing_found(inner, outer_params, stats, after)
        if not _tree.all_finite(inner.inner_params):
            return nothing
        fit = self._fit(problem, w_hat, around, index, state)
        if not _tree.all_finite(fit.inner_params):
            said = f"{type(self).__name__}, fitting its response: {fit.result.message}"
            return replace(nothing, result=Result(fit.result.status, said))
        w_hat = replace(w_hat, fitted=fit.inner_params)
        w, pull = w_hat.with_pullback(around.zeros())
        value, slope, direct = outer_gradients(problem, w, outer_params, step)
        pulled = around.pulled(pull(slope))
        seen = names_seen(problem, w, outer_params, index)
        indirect: Cotangents = {k: v if k in seen else None for k, v in pulled.items()}
        found = combine(direct, indirect, outer_params, type(self).__name__, self.sees)
        tensors = {"origin": origin, **_prefixed("proxy/", fit.inner_params)}
        tensors |= packed("fit/", fit.state)
        tensors |= self.tuned(problem, w_hat, around, step, state)
        return HypergradientEstimate(
            found,
            value,
            w,
            _first_failure(inner.result, _finite(found, value)),
            stats
            | {
                "num_fits": float(fit.num_steps),
                "seconds_inner": solved_at - begun,
                "seconds_backward": time.perf_counter() - solved_at,
            },
            EstimatorState(
                index if self.solves else index + fit.num_steps,
                inner.state or None,
                tensors,
                {"num_fits": state.numbers.get("num_fits", 0.0) + fit.num_steps},
            ),
        )

    def _fit(
        self,
        problem: BilevelProblem,
        w_hat: WHat,
        around: Around,
        first_batch: int,
        state: EstimatorState,
    ) -> InnerSolution:
        """Steps on the inner objective at pairs of perturbed hyperparameters, from where the last ones ended."""
        begun = int(state.numbers.get("num_fits", 0.0))
        fitted, expected = _part("proxy/", state.tensors), self.start(w_hat.anchor, around)
        if fitted and {k: v.shape for k, v in fitted.items()} != {
            k: v.shape for k, v in expected.items()
        }:
            raise RequirementError(
                f"The state that {type(self).__name__} was handed is one of another problem or other settings: its "
                f"response has other shapes. Begin anew, with state=None or in a new trial."
            )
        scales = self.scales(around, state)

        def drawn(index: int) -> tuple[Batch, Tensor]:
            batch = problem.inner_batch(first_batch + index - begun)
            return batch, scales * around.drawn(self.seed, 0, index)

        def objective(fitted: Params, _: Params, given: tuple[Batch, Tensor]) -> Tensor:
            at = replace(w_hat, fitted=fitted)
            value = paired(problem.inner_objective, at, around, *given, "inner_objective")
            return value / scales.square().mean() if self.solves else value

        return inner_solve(
            BilevelProblem(objective, objective, drawn),
            self.fit,
            fitted or expected,
            {},
            start=begun,
            state=unpacked("fit/", state.tensors),
        )


@dataclass(frozen=True)
class WHat:
    """``delta -> w_hat``, with what it is made of."""

    proxy: AbstractProxy
    anchor: Params
    offset: Tensor
    fitted: Params = field(default_factory=dict)

    def __call__(self, delta: Tensor) -> Params:
        return self.proxy.respond(self.fitted, self.anchor, self.offset, delta)

    def with_pullback(self, delta: Tensor) -> tuple[Params, Callable[[Params], Tensor]]:
        """``w_hat``, and the map that pulls a gradient with respect to it back to ``delta``."""
        at = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            w = self(at)

        def pull(slope: Params) -> Tensor:
            (found,) = torch.autograd.grad(
                tuple(w.values()), at, tuple(slope[k] for k in w), materialize_grads=True
            )
            return found

        return _tree.detach(w), pull


def paired(
    objective: Objective, w_hat: WHat, around: Around, batch: Batch, delta: Tensor, label: str
) -> Tensor:
    """The mean at ``delta`` and ``-delta``: gradients of the two that do not belong to the response cancel."""
    both = [scalar(objective(w_hat(d), around.moved(d), batch), label) for d in (delta, -delta)]
    return 0.5 * (both[0] + both[1])


def packed(prefix: str, memory: InnerState) -> Params:
    """A solver's memory as named tensors."""
    return {f"{prefix}{role}/{k}": v for role, tree in memory.items() for k, v in tree.items()}


def unpacked(prefix: str, tensors: Params) -> InnerState | None:
    """What :func:`packed` was given; ``None`` for a fresh one."""
    memory: InnerState = {}
    for name, v in _part(prefix, tensors).items():
        role, _, own = name.partition("/")
        memory.setdefault(role, {})[own] = v
    return memory or None


def _prefixed(prefix: str, tree: Params) -> Params:
    return {prefix + k: v for k, v in tree.items()}


def _part(prefix: str, tensors: Params) -> Params:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
