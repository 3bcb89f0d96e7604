"""Estimators side by side on one problem: what each costs, and how far off it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import _optuna, _tree
from .._errors import HypergradError, RequirementError
from .._typing import Params
from ..hypergradients import AbstractHypergradientEstimator, Implicit, hypergradient
from ..ihvp import Direct
from ..inner import AbstractInnerSolver
from ..problem import AbstractProblem

Estimators = Mapping[str, AbstractHypergradientEstimator | Sequence[AbstractHypergradientEstimator]]


def sweep_estimators(
    problem: AbstractProblem,
    inner_params: Params,
    outer_params: Params,
    estimators: Estimators,
    *,
    truth: Params | None = None,
    inner_solver: AbstractInnerSolver | None = None,
) -> list[dict[str, Any]]:
    """Estimate one hypergradient in many ways: a record of each, as ``plot_cost_against_error`` takes them.

    Example::

        import optuna_hypergrad as ohg
        from optuna_hypergrad.visualization import plot_cost_against_error, sweep_estimators

        found = sweep_estimators(problem, w, lam, {
            "CG": [ohg.Implicit(ohg.CG(max_steps=k)) for k in (2, 5, 10, 20)],
            "Neumann": [ohg.Implicit(ohg.Neumann(k)) for k in (2, 5, 10, 20)],
        })
        plot_cost_against_error(found, cost_name="Hessian-vector products").show()

    Args:
        problem: Objectives and batches.
        inner_params: The inner solution, where ``inner_solver`` is ``None``; otherwise where that begins.
        outer_params: The hyperparameters at which it is taken.
        estimators: By method, one or several of them.
        truth: The hypergradient; ``Implicit(Direct())`` by default, for up to a few thousand inner parameters.
        inner_solver: What solves the inner problem each time.

    Returns:
        One dict for each estimator: ``label``, ``cost`` (Hessian-vector products), ``error`` (of the
        hypergradient, relative to the truth), ``result`` (empty, or why it is no success), and its other counts. What
        raised is left out, with a warning.

    Raises:
        RequirementError: if the truth is zero.
        HypergradError: if it is to be found, and cannot be.
    """
    if truth is None:
        exact = Implicit(Direct())
        settings: dict[str, Any] = {"estimator": exact, "inner_solver": inner_solver}
        truth = hypergradient(problem, inner_params, outer_params, **settings).value
    size = float(_tree.norm(truth))
    if not 0 < size < math.inf:
        raise RequirementError(
            f"sweep_estimators: the true hypergradient has norm {size:g}, so no error is relative to it. Choose "
            "outer_params where it is neither zero nor infinite."
        )
    found = []
    for label, given in estimators.items():
        for estimator in given if isinstance(given, Sequence) else [given]:
            try:
                estimate = hypergradient(
                    problem,
                    inner_params,
                    outer_params,
                    estimator=estimator,
                    inner_solver=inner_solver,
                    throw=False,
                )
            except HypergradError as error:
                _optuna.logger.warning(f"{label}: {type(error).__name__}: {error} It is left out.")
                continue
            off = float(_tree.norm(_tree.sub(truth, estimate.value)))
            stats = dict(estimate.stats)
            found.append(
                {
                    "label": label,
                    "cost": stats.pop("num_hvps", math.nan),
                    "error": off / size,
                    "result": estimate.result.message,
                    **stats,
                }
            )
    return found
