"""What a bilevel run tells the trial that it is: its curve as it goes on, and numbers about it at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from . import _optuna
from .outer_run import OuterRun
from .search_space import Domain
from .stores import TensorStore, saying_what_has_no_room
from .trial_attributes import (
    COLD_VALUE,
    ESTIMATOR,
    HYPERGRADIENT_NORM,
    NUM_HYPERPARAMETERS,
    NUM_PRODUCTS,
    OUTER_STEPS,
    RETRAINED_VALUE,
    VALUE_KIND,
    WARM_VALUE,
    described,
    summaries_of,
)

if TYPE_CHECKING:
    import optuna

    from .hypergradients import AbstractHypergradientEstimator

ValueKind = Literal["cold", "warm", "retrained"]


@runtime_checkable
class _Publishes(Protocol):
    """A sampler that says whether its studies are published, and does it."""

    publishes: bool


def report(trial: optuna.Trial, value: float, step: int) -> None:
    with saying_what_has_no_room(f"The value of trial {trial.number} at outer step {step}"):
        trial.report(value, step)


def report_again(
    trial: optuna.Trial, history: list[dict[str, float]], report_every: int
) -> set[int]:
    """Give a trial that continues another one's checkpoint the curve up to there.

    Returns:
        Steps that the trial has reported, also after the checkpoint: they are done again.
    """
    known = set(_optuna.current(trial).intermediate_values)
    for step in range(0, len(history), report_every):
        if step not in known:
            report(trial, history[step]["outer_value"], step)
    return known


def tell_values(
    trial: optuna.Trial, kind: ValueKind, value: float, retrained: float | None
) -> None:
    with saying_what_has_no_room(f"The values that trial {trial.number} ended with"):
        trial.set_user_attr(COLD_VALUE if kind == "cold" else WARM_VALUE, value)
        if retrained is None:
            trial.set_user_attr(VALUE_KIND, kind)
        else:  # which of the two will be the trial's value is up to the objective
            trial.set_user_attr(RETRAINED_VALUE, retrained)


def publish_run(
    trial: optuna.Trial,
    run: OuterRun,
    name: str,
    estimator: AbstractHypergradientEstimator,
    domains: Mapping[str, Domain],
    store: TensorStore,
) -> None:
    """User attributes about the run; and of its study as a whole what is due, where no sampler of ours will do it."""
    if run.history:
        last = run.history[-1]
        _optuna.logger.info(
            f"Trial {trial.number}: {name!r} has taken {run.step} outer steps. Value {last['outer_value']:.6g}, norm of "
            f"the hypergradient {last['hypergradient_norm']:.3g}."
        )
    from .dashboard.publishing import PUBLISHER  # a face: it looks at runs, and not they at it

    PUBLISHER.tell_trial(
        trial.study,
        _optuna.frozen_of(trial),
        lambda: attributes_of(run, name, estimator, domains),
        anew=True,
    )
    if _optuna.find_sampler(trial.study.sampler, _Publishes) is None:
        PUBLISHER.tell_study(trial.study, None, lambda study: store)


def attributes_of(
    run: OuterRun,
    name: str,
    estimator: AbstractHypergradientEstimator,
    domains: Mapping[str, Domain],
) -> dict[str, Any]:
    """Of a run that has ended."""
    products = [record["num_hvps"] for record in run.history if "num_hvps" in record]
    values = {f"{name}/{k}": v for k, v in run.outer_params.items()}
    return {
        NUM_HYPERPARAMETERS: sum(v.numel() for v in values.values()),
        OUTER_STEPS: run.step,
        ESTIMATOR: described(estimator),
        **({HYPERGRADIENT_NORM: run.history[-1]["hypergradient_norm"]} if run.history else {}),
        **({NUM_PRODUCTS: sum(products)} if products else {}),
        **summaries_of(values, {f"{name}/{k}": d for k, d in domains.items()}),
    }
