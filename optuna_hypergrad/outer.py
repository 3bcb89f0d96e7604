"""The outer loop: solve, differentiate, step, project; report, prune, checkpoint, resume."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from . import _optuna
from ._arguments import check_count
from ._errors import HyperparameterError, SolverError
from ._progress import advance, progress_bar
from ._results import SUCCESS, Result
from ._typing import Params
from .checkpoint import Checkpoints, check_same, settings_of
from .hypergradients import AbstractHypergradientEstimator, Implicit
from .hypergradients._base import check_methods, run_inner
from .hypergradients._outer_gradients import outer_value_at
from .inner import (
    AbstractCurvatureSolver,
    AbstractInnerSolver,
    AbstractStepSolver,
    InnerSolution,
    inner_solve,
)
from .outer_run import OptimizerFactory, OuterRun
from .outer_start import check_start, domains_of, first_start, start_at
from .outer_telling import ValueKind, publish_run, report, report_again, tell_values
from .problem import AbstractProblem, BilevelProblem, check_problem
from .search_space import Domain

if TYPE_CHECKING:
    import optuna

MAX_REPORTS = 200
DEFAULT_OPTIMIZER: OptimizerFactory = functools.partial(torch.optim.Adam, lr=0.1)
_names_of: weakref.WeakKeyDictionary[optuna.Trial, set[str]] = weakref.WeakKeyDictionary()
"""Of the runs that each trial object has begun."""


@dataclass(frozen=True)
class BilevelResult:
    """Where a bilevel run ended.

    Attributes:
        outer_params: ``lam`` after the last outer step: external values, inside their bounds.
        inner_params: ``w`` after a last inner solve at that ``lam``; after the last step, with estimators that move it
            by one at a time.
        outer_value: ``f(w, lam)`` there.
        value_kind: What ``outer_value`` is: ``"cold"`` or ``"warm"``. Warm-started values flatter.
        retrained_value: ``f`` after training again from the first ``inner_params`` with the final
            ``lam`` (``final_eval="retrain"``), else ``None``.
        retrained_params: ``w`` of that training, else ``None``.
        history: One dict per outer step: ``outer_value``, ``hypergradient_norm`` (in internal
            coordinates, entries that a bound holds back left out), ``step_length`` (of the step that
            followed, in the same coordinates), and the estimator's stats.
        result: Success, or how the run failed.
    """

    outer_params: Params
    inner_params: Params
    outer_value: float
    value_kind: ValueKind
    retrained_value: float | None = None
    retrained_params: Params | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    result: Result = SUCCESS


def minimize_bilevel(
    problem: AbstractProblem,
    inner_params: Params | Callable[[int], Params],
    outer_params: Params,
    *,
    inner_solver: AbstractInnerSolver,
    num_steps: int,
    estimator: AbstractHypergradientEstimator | None = None,
    optimizer: OptimizerFactory = DEFAULT_OPTIMIZER,
    lr_lambda: Callable[[int], float] | None = None,
    bounds: Mapping[str, Domain | tuple[float, float]] | None = None,
    warm_start: bool = True,
    burn_in: int = 0,
    final_eval: Literal["retrain"] | None = None,
    retrain_steps: int | None = None,
    trial: optuna.Trial | None = None,
    checkpoint_every: int | None = None,
    name: str = "bilevel",
    progress: bool = False,
    publish: bool = True,
    throw: bool = True,
) -> BilevelResult:
    """Minimize ``f(w*(lam), lam)`` over ``lam`` by hypergradients.

    Args:
        problem: Objectives and batches: a :class:`BilevelProblem`, or :class:`Episodes`, whose tasks are others at
            each outer step.
        inner_params: ``w_0``; never written to. For cold starts it may be a function ``step -> w_0``, which gives
            equal tensors for equal outer steps: a fresh initialization at each of them (and at step ``num_steps``
            for the solve after the last one).
        outer_params: ``lam_0``: floating-point tensors of any shape; never written to.
        inner_solver: Its ``max_steps`` is the number of inner steps between outer steps
            (``HeavyBall(step_size=0.2, max_steps=10)``: ten).
        num_steps: Outer steps.
        estimator: Of the hypergradient; ``Implicit()`` by default. For networks give it damping, or
            the ``GaussNewton`` curvature: away from a minimum the Hessian is not positive definite.
        optimizer: Factory of the outer optimizer. It moves *internal* coordinates: ``log lam`` where
            the bounds say ``log=True``, ``lam / unit`` elsewhere, where ``unit`` is a tenth of a bounded
            range unless :class:`Domain` is given one. With Adam at ``lr=0.1`` a decay in ``log`` changes
            by a tenth of a factor of e at a time, and a weight in [0, 1] by 0.01.
        lr_lambda: The outer optimizer's ``lr`` at outer step ``t`` is its own times ``lr_lambda(t)``, as in
            ``torch.optim.lr_scheduler.LambdaLR``: ``lambda t: (1 + t) ** -0.5`` for steps that fall.
        bounds: By name, a :class:`Domain` or ``(low, high)``. They hold after every step, exactly.
            Unnamed hyperparameters are unbounded.
        warm_start: Continue the inner problem from where the last outer step left it; otherwise solve
            it from ``inner_params`` each time.
        burn_in: Inner steps before the first outer step (warm starts only).
        final_eval: ``"retrain"`` trains once more from ``inner_params`` with the final ``lam``, the
            honest value beside the warm one (Vicol et al. 2022).
        retrain_steps: Inner steps of that training; by default as many as the run took.
        trial: The Optuna trial that this run is: values are reported to it, its pruner is asked (a
            study's default pruner prunes; warm values flatter, so pass ``NopPruner`` unless meant), and
            checkpoints go to the tensor store of its study. A trial that has a checkpoint is continued
            from it, bit for bit; one whose run was interrupted (its process was killed, Ctrl-C, no room for a
            checkpoint) passes it on to the next trial that begins, where the study's sampler is a
            :class:`HypergradientSampler`. With another one, a killed run is continued only where the
            storage has Optuna's heartbeat with ``RetryHeartbeatStaleTrialCallback``. The final ``lam`` is
            stored there as ``name``, for ``load_tensors``. In a study with several objectives nothing is
            reported and nothing pruned.
        checkpoint_every: Outer steps between checkpoints; with a trial, about twenty in all by default.
            0 for none.
        name: Of the run, where one trial has several, each of which needs its own; of its checkpoint
            and final values.
        progress: Show a progress bar: value, norm of the hypergradient, length of the last step in natural steps, time
            left. It goes below the bar of ``study.optimize(show_progress_bar=True)``, and into notebooks.
        publish: Whether the trial tells about the run: numbers and summaries of the final ``lam`` in user attributes,
            and, in ``optuna-dashboard`` (where that is installed), a note of the study and artifacts of its best trial.
            See :mod:`optuna_hypergrad.dashboard`.
        throw: Raise when a solve fails; otherwise stop there and say so in ``result``.

    Raises:
        HyperparameterError: bounds that cannot be used, a start outside of them, the name of another run
            of this trial, or a checkpoint that was begun otherwise: with other bounds, another
            ``outer_params`` (and, for cold starts, ``inner_params``, of step 0 if it is a function), class of inner
            solver, estimator or optimizer, or with more steps done than ``num_steps``.
        ValueError: for a negative number of steps, or an ``lr_lambda`` that gives no finite number >= 0.
        ProblemError: if ``inner_params`` is a function that cannot be replayed (steps 0 and 1 are asked twice), or gives
            other names, shapes or dtypes at a later step.
        RequirementError: if it is a function, or the problem is :class:`Episodes`, and ``warm_start`` is set.
        SolverError: if a solve failed and ``throw`` is set.
        StorageError: if a checkpoint cannot be stored (:class:`NoSpaceError`: for want of room); the one
            before it is still there.
        optuna.TrialPruned: if the trial's pruner says so.
    """
    estimator = Implicit() if estimator is None else estimator
    check_methods("minimize_bilevel", estimator, inner_solver)
    if not callable(optimizer):
        raise ValueError(
            f"minimize_bilevel needs optimizer= to be a factory, such as functools.partial(torch.optim.Adam, lr=0.1), "
            f"got {optimizer!r:.80}."
        )
    if lr_lambda is not None and not callable(lr_lambda):
        raise ValueError(
            f"minimize_bilevel needs lr_lambda= to be a function of the outer step, such as lambda t: (1 + t) ** -0.5, got "
            f"{lr_lambda!r:.80}."
        )
    for label, number, none in (
        ("num_steps", num_steps, False),
        ("burn_in", burn_in, False),
        ("checkpoint_every", checkpoint_every, True),
        ("retrain_steps", retrain_steps, True),
    ):
        check_count("minimize_bilevel", label, number, 0, none=none)
    domains = domains_of(outer_params, bounds or {})
    first_params = first_start(problem, inner_params, warm_start, num_steps)
    check_problem(problem, first_params, outer_params)
    estimator.check(problem.at(0), inner_solver, first_params, outer_params)
    check_start(outer_params, domains)

    run = OuterRun.start(first_params, outer_params, domains, optimizer, warm_start, lr_lambda)
    if checkpoint_every is None:
        checkpoint_every = max(1, num_steps // 20) if trial is not None else 0
    stored = Checkpoints.of_trial(trial, name) if trial is not None else None
    checkpoints = stored if checkpoint_every else None
    if trial is not None:
        _take_name(trial, name)
    if checkpoints is not None:
        run.settings = settings_of(
            domains,
            run.outer_params,
            None if warm_start else run.inner_params,
            inner_solver=type(inner_solver).__name__,
            estimator=estimator.resumed_as,
            optimizer=run.optimizer_class,
            warm_start=str(warm_start),
        )
    saved = checkpoints.load() if checkpoints is not None else None
    if saved is not None:
        check_same(run.settings, saved[1], num_steps, name)
        run.restore(*saved)
    elif burn_in and warm_start:
        run.burn_in(problem.at(0), inner_solver, burn_in)

    report_every = max(1, math.ceil(num_steps / MAX_REPORTS))
    judged = None if trial is None or _optuna.is_multi_objective(trial.study) else trial
    reported = report_again(judged, run.history, report_every) if judged is not None else set()
    result = SUCCESS
    with checkpoints or contextlib.nullcontext():
        number = None if trial is None else trial.number
        with progress_bar(progress, num_steps, run.step, name, number) as bar:
            while run.step < num_steps:
                given = (
                    run.inner_params
                    if warm_start
                    else start_at(inner_params, run.step, first_params)
                )
                estimate = estimator.estimate(
                    problem.at(run.step),
                    inner_solver,
                    given,
                    run.outer_params,
                    run.step,
                    run.next_state(),
                )
                if not estimate.result:
                    result = replace(
                        estimate.result,
                        message=f"Outer step {run.step} of {name!r}: {estimate.result.message}",
                    )
                    break
                if checkpoints is not None:
                    checkpoints.wait()  # no more than one step that was taken can be lost
                result = run.advance(estimate.value, estimate.inner_params, estimate.state)
                if not result:
                    break
                record = {
                    "outer_value": float(estimate.outer_value),
                    **run.last_norm,
                    **estimate.stats,
                }
                run.history.append(record)
                advance(bar, record)
                is_new = run.step - 1 not in reported
                if judged is not None and is_new and (run.step - 1) % report_every == 0:
                    report(judged, record["outer_value"], run.step - 1)
                due = checkpoint_every and (
                    run.step % checkpoint_every == 0 or run.step == num_steps
                )
                if checkpoints is not None and due:
                    checkpoints.save(run.step, *run.snapshot())
                if judged is not None and judged.should_prune():
                    from optuna import TrialPruned

                    raise TrialPruned(f"{name!r} was pruned at outer step {run.step - 1}.")
        if not result and throw:
            raise SolverError(result.message, result)
        now = problem.at(num_steps)
        first_params = start_at(inner_params, num_steps, first_params)
        last = (
            _final_solve(now, inner_solver, first_params, run)
            if estimator.solves
            else InnerSolution(run.inner_params, {}, 0, math.nan, math.nan)
        )
        if result and not last.result:
            result = last.result
        value = outer_value_at(now, last.inner_params, run.outer_params, num_steps)
        kind: ValueKind = "warm" if warm_start else "cold"
        retrained: float | None = None
        retrained_params: Params | None = None
        if final_eval == "retrain" and result:
            again = _retrain(now, inner_solver, first_params, run, retrain_steps)
            result, retrained_params = again.result, again.inner_params
            retrained = outer_value_at(now, retrained_params, run.outer_params, num_steps)
        if stored is not None:
            stored.save_values(run.step, run.outer_params)
        if trial is not None:
            tell_values(trial, kind, value, retrained)
            if publish and stored is not None:
                publish_run(trial, run, name, estimator, domains, stored.store)
    return BilevelResult(
        outer_params=run.outer_params,
        inner_params=last.inner_params,
        outer_value=value,
        value_kind=kind,
        retrained_value=retrained,
        retrained_params=retrained_params,
        history=run.history,
        result=result,
    )


def _take_name(trial: optuna.Trial, name: str) -> None:
    names = _names_of.setdefault(trial, set())
    if name in names:
        raise HyperparameterError(
            f"name={name!r} has been used by another run of trial {trial.number}, whose checkpoint and final "
            "values have that name; give each run of a trial a name= of its own."
        )
    names.add(name)


def _final_solve(
    problem: BilevelProblem, inner_solver: AbstractInnerSolver, first_params: Params, run: OuterRun
) -> InnerSolution:
    """At the last ``lam``."""
    given = run.inner_params if run.warm_start else first_params
    return run_inner(problem, inner_solver, given, run.outer_params, run.next_state())


def _retrain(
    problem: BilevelProblem,
    inner_solver: AbstractInnerSolver,
    first_params: Params,
    run: OuterRun,
    num_steps: int | None,
) -> InnerSolution:
    """From the first ``w``, at the last ``lam``, with as many inner steps as the run has taken if nobody says."""
    if num_steps is None and isinstance(
        inner_solver, (AbstractStepSolver, AbstractCurvatureSolver)
    ):
        num_steps = run.state.inner_index if run.warm_start else inner_solver.max_steps
    return inner_solve(problem, inner_solver, first_params, run.outer_params, num_steps=num_steps)
