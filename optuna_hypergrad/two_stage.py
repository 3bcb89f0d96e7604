"""Pre-train, then fine-tune: hyperparameters of both stages, judged after the second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ._errors import ProblemError
from ._typing import Batch, Objective, Params
from .hypergradients import AbstractPullbackEstimator, Unroll
from .inner import AbstractStepSolver
from .problem import BilevelProblem, full_batch
from .solve import solve


@dataclass(frozen=True)
class FineTuning:
    """A few steps on another objective, from the parameters that an earlier stage ended with.

    Called with the latter and the outer parameters, it gives the fine-tuned parameters, through which gradients flow
    to both: the cotangent of where it begins is that of the stage before. So stages compose: an outer objective may
    call several, one on the result of the other.

    Reference: Raghu, Lorraine, Kornblith, McDermott & Duvenaud (2021), "Meta-learning to improve pre-training",
    section 3.

    Args:
        objective: ``(inner_params, outer_params, batch) -> scalar tensor``.
        solver: ``HeavyBall(0.1, max_steps=10)``: ten steps. Its own hyperparameters may be outer parameters.
        estimator: Differentiates the steps, their start included: ``Unroll()`` without truncation, or ``Reversible()``.
        batch: ``step -> batch``, equal for equal steps, which are counted from 0 in each fine-tuning.
        start: ``(inner_params, outer_params) -> params`` that the fine-tuning starts with, differentiable: for a new
            last layer, for example. By default those that pre-training ended with.
    """

    objective: Objective
    solver: AbstractStepSolver
    estimator: AbstractPullbackEstimator = field(default_factory=Unroll)
    batch: Callable[[int], Batch] = full_batch
    start: Callable[[Params, Params], Params] | None = None

    def __post_init__(self) -> None:
        for label, given in (("objective", self.objective), ("batch", self.batch)):
            if not callable(given):
                raise ProblemError(f"FineTuning needs a function as {label}, got {given!r:.80}.")
        if not isinstance(self.solver, AbstractStepSolver):
            raise ProblemError(
                f"FineTuning needs a step solver such as HeavyBall(0.1, max_steps=10), whose steps are differentiated, "
                f"as solver, got {self.solver!r:.80}."
            )
        if self.solver.max_steps < 1:
            raise ProblemError("FineTuning needs a solver with max_steps >= 1.")
        if not isinstance(self.estimator, AbstractPullbackEstimator):
            raise ProblemError(
                f"FineTuning needs an estimator that differentiates steps, such as Unroll(), got {self.estimator!r:.80}."
            )
        if "stationary_point" in self.estimator.requires or getattr(
            self.estimator, "truncation", None
        ):
            raise ProblemError(
                f"FineTuning(estimator={self.estimator!r:.80}) does not see where fine-tuning starts, so that nothing "
                f"of pre-training would be learned; use Unroll() without truncation."
            )
        if not (self.start is None or callable(self.start)):
            raise ProblemError(
                f"FineTuning needs a function of (inner_params, outer_params) as start, or None, got {self.start!r:.80}."
            )

    def __call__(self, inner_params: Params, outer_params: Params) -> Params:
        """The fine-tuned parameters.

        Raises:
            SolverError: if a step ends in NaN or infinite values.
        """
        begun = inner_params if self.start is None else self.start(inner_params, outer_params)
        return solve(
            self.objective,
            begun,
            outer_params,
            solver=self.solver,
            estimator=self.estimator,
            inner_batch=self.batch,
        )


def two_stage(
    pretraining_objective: Objective,
    outer_objective: Objective,
    finetuning: FineTuning,
    *,
    pretraining_batch: Callable[[int], Batch] = full_batch,
    outer_batch: Callable[[int], Batch] = full_batch,
) -> BilevelProblem:
    """``min over lam of f(FineTuning(w*(lam), lam), lam)`` with ``w*`` the pre-trained parameters.

    The fine-tuning is a part of the outer objective, so everything that takes a bilevel problem takes this one. With
    ``Implicit`` for the pre-training, the hypergradient is that of the paper: with ``v`` the cotangent of the
    pre-trained parameters and ``d_lam`` that of the hyperparameters, both pulled back through the fine-tuning (and
    the outer objective), it is ``d_lam - M^T H^-1 v``, where ``H`` and ``M`` are second derivatives of the
    pre-training objective (equation 3). :class:`FineTuning`, called on the result, gives the fine-tuned parameters.

    Reference: Raghu, Lorraine, Kornblith, McDermott & Duvenaud (2021), "Meta-learning to improve pre-training",
    algorithm 1.

    Args:
        pretraining_objective: ``(inner_params, outer_params, batch) -> scalar tensor``.
        outer_objective: The same, of the fine-tuned parameters.
        finetuning: What comes between.
        pretraining_batch: ``step -> batch`` of pre-training.
        outer_batch: ``step -> batch`` of the outer objective.

    Raises:
        ProblemError: if ``finetuning`` is none.
    """
    if not isinstance(finetuning, FineTuning):
        raise ProblemError(
            f"two_stage needs FineTuning(objective, solver) as finetuning, got {finetuning!r:.80}."
        )

    def after_both(inner_params: Params, outer_params: Params, batch: Batch) -> Tensor:
        return outer_objective(finetuning(inner_params, outer_params), outer_params, batch)

    return BilevelProblem(pretraining_objective, after_both, pretraining_batch, outer_batch)
