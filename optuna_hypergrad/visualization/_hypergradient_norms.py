"""How large the hypergradient is at each outer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._arguments import check_count
from .._errors import StorageError
from .._words import shortened
from ..checkpoint import read_checkpoint
from ..stores import TensorStore
from ..stores._pointer import checkpoint_attributes
from ..studies.events import gradient_of
from ..studies.tensors import store_of
from ..studies.trajectory import Trajectory
from ..trial_attributes import HYPERGRADIENT_NORM, OUTER_STEPS
from ._curves import (
    LEAST_POINTS,
    OTHERS,
    Curve,
    Curves,
    finite,
    name_of_others,
    points_of_each,
    read_curves,
    thinned,
    with_gaps,
)
from ._imports import go, imports
from ._style import LIGHT, color, escaped, layout, value_axis, whole_axis

if TYPE_CHECKING:
    import plotly

TITLE, STEP, NORM = "Hypergradient Norms", "Outer step", "Norm of the hypergradient"

_LARGEST_CHECKPOINT = 1 << 25


@dataclass(frozen=True)
class NormsOfCurve:
    """One trajectory or run: those steps whose norm is known."""

    curve: Curve
    steps: list[int]
    trials: list[int]
    norms: list[float]
    color: str

    def at(self, points: Sequence[int]) -> NormsOfCurve:
        return NormsOfCurve(
            self.curve,
            [self.steps[i] for i in points],
            [self.trials[i] for i in points],
            [self.norms[i] for i in points],
            self.color,
        )


@dataclass(frozen=True)
class NormsInfo:
    """Those that have a color, and those that have none."""

    lines: list[NormsOfCurve]
    rest: list[NormsOfCurve]
    name_of_rest: str = ""

    @property
    def zeros(self) -> list[tuple[int, int]]:
        """Step and trial of norms that are 0, which have no place on a logarithmic axis."""
        return [
            (step, trial)
            for line in [*self.lines, *self.rest]
            for step, trial, norm in zip(line.steps, line.trials, line.norms, strict=True)
            if norm == 0
        ]

    @property
    def floor(self) -> float:
        """Where they are drawn: at the lowest of the others."""
        norms = [n for line in [*self.lines, *self.rest] for n in line.norms if n > 0]
        return min(norms, default=1.0)


def read_norms(
    study: Study, n_trajectories: int | None, tensor_store: TensorStore | None
) -> NormsInfo:
    """What :func:`plot_hypergradient_norms` shows; says so where that is nothing or not all."""
    check_count("plot_hypergradient_norms", "n_trajectories", n_trajectories, 1, none=True)
    found = read_curves(study)
    if not found.curves:
        _optuna.logger.warning(
            f"Study {study.study_name!r} does not have any trajectories: no trial had a hypergradient."
        )
        return NormsInfo([], [])
    store = tensor_store
    if store is None and any(c.is_run for c in found.curves):
        store = store_of(study)
    ranked = [_norms_of(curve, found, store) for curve in found.ranked()]
    known = [line for line in ranked if line.steps]
    missing = sum(len(line.curve.steps) > 0 and not line.steps for line in ranked)
    if missing:
        _optuna.logger.warning(
            f"The hypergradients of {missing} of {len(ranked)} trajectories and runs of study "
            f"{study.study_name!r} are not known (any more): of tensors no norm was recorded, or the checkpoint of "
            "a run is gone. They are left out."
        )
    most = len(known) if n_trajectories is None else n_trajectories
    shown = sorted(known[:most], key=lambda line: line.curve.id)
    rest = sorted(known[most:], key=lambda line: line.curve.id)
    whole = n_trajectories is None
    drawn = [rest[i] for i in thinned(len(rest), OTHERS)]
    return NormsInfo(
        _thinned(shown, None if whole else points_of_each(len(shown))),
        _thinned(drawn, LEAST_POINTS),
        name_of_others(len(drawn), len(rest)),
    )


def _thinned(lines: list[NormsOfCurve], points: int | None) -> list[NormsOfCurve]:
    """With so many points of each; all for ``None``."""
    if points is None:
        return lines
    return [line.at(thinned(len(line.steps), points)) for line in lines]


def _norms_of(curve: Curve, found: Curves, store: TensorStore | None) -> NormsOfCurve:
    steps, trials, norms = [], [], []
    if curve.is_run:
        assert store is not None
        for step, norm in _of_run(found.trials[curve.id], store):
            steps.append(step)
            trials.append(curve.id)
            norms.append(norm)
    else:
        trajectory = found.ledger.trajectories[curve.id]
        for step, number in zip(curve.steps, curve.trials, strict=True):
            known = _of_step(found.trials[number], trajectory, found.sign)
            if known is not None:
                steps.append(step)
                trials.append(number)
                norms.append(known)
    return NormsOfCurve(curve, steps, trials, norms, color(0))


def _of_step(trial: FrozenTrial, trajectory: Trajectory, sign: float) -> float | None:
    """As recorded; or of the gradient, where all of that is in the trial."""
    recorded = trial.user_attrs.get(HYPERGRADIENT_NORM)
    if isinstance(recorded, float) and finite(recorded):
        return recorded
    gradient = gradient_of(trial)
    if gradient is None or trajectory.space.tensors:
        return None
    total = 0.0
    for name, slope in zip(gradient[0], gradient[1].tolist(), strict=True):
        domain, value = trajectory.space.floats[name], float(trial.params[name])
        slope = sign * slope * (value if domain.log else domain.scale)
        held = (value <= domain.low and slope > 0) or (value >= domain.high and slope < 0)
        total += 0.0 if held else slope**2
    return math.sqrt(total)


def _of_run(trial: FrozenTrial, store: TensorStore) -> list[tuple[int, float]]:
    """The history in the newest checkpoint that is left; the last norm alone, where none is."""
    found = _of_checkpoint(trial, store)
    recorded, steps = trial.user_attrs.get(HYPERGRADIENT_NORM), trial.user_attrs.get(OUTER_STEPS)
    if not found and isinstance(recorded, float) and finite(recorded) and type(steps) is int:
        return [(steps - 1, recorded)]
    return found


def _of_checkpoint(trial: FrozenTrial, store: TensorStore) -> list[tuple[int, float]]:
    if not checkpoint_attributes(trial):
        return []
    pointers = store.pointers(trial, role="checkpoint")
    for pointer in sorted(pointers, key=lambda p: -p.step):
        if pointer.size > _LARGEST_CHECKPOINT:
            continue
        try:
            _, numbers = read_checkpoint(store, pointer)
        except StorageError:
            continue
        history = numbers.get("history")
        records = history if isinstance(history, list) else []
        return [
            (step, float(record[HYPERGRADIENT_NORM]))
            for step, record in enumerate(records)
            if isinstance(record, dict) and finite(record.get(HYPERGRADIENT_NORM))
        ]
    return []


def plot_hypergradient_norms(
    study: Study, *, n_trajectories: int | None = 10, tensor_store: TensorStore | None = None
) -> plotly.graph_objects.Figure:
    """Plot the norm of the hypergradient over outer steps, one line for each trajectory.

    Norms are those of the coordinates in which steps are taken (the logarithm where ``log=True``, tenths of a
    bounded range elsewhere), without entries that a bound holds back: 0 at a constrained minimum. Zeros are drawn
    as triangles at the bottom of the logarithmic axis. The norms of a bilevel run inside one trial are in its
    checkpoint, which the newest ones still have; of the others the last norm is known, where it was recorded.

    Example::

        from optuna_hypergrad.visualization import plot_hypergradient_norms

        plot_hypergradient_norms(study).show()

    Args:
        study: A study with one objective.
        n_trajectories: So many, the best ones, get a color, and the others are gray; long ones are thinned out.
            ``None`` for all of everything.
        tensor_store: Where checkpoints are, if it is not where the study's sampler puts them.

    Returns:
        A figure; an empty one, with a warning, where there is nothing to show.

    Raises:
        RequirementError: for a study with several objectives.
        ImportError: if plotly is not installed.
    """
    imports.check()
    info = read_norms(study, n_trajectories, tensor_store)
    figure = go.Figure(layout=layout(TITLE, STEP, NORM))
    if not info.lines:
        return figure.update_yaxes(value_axis(True, []))
    drawn = [*info.lines, *info.rest]
    figure.update_yaxes(value_axis(True, (n for line in drawn for n in line.norms)))
    figure.update_xaxes(whole_axis(s for line in drawn for s in line.steps))
    figure.add_traces([*_rest(info), *map(_trace, info.lines, range(len(info.lines)))])
    figure.add_traces(_zeros(info))
    return figure.update_layout(showlegend=True)


def _trace(line: NormsOfCurve, index: int) -> Any:
    words = escaped(shortened(line.curve.words, 160))
    return go.Scatter(
        x=line.steps,
        y=[n or None for n in line.norms],
        customdata=line.trials,
        mode="lines+markers" if len(line.steps) <= 60 else "lines",
        line={"color": color(index), "width": 1.8},
        marker={"size": 4},
        name=escaped(line.curve.label),
        hovertemplate=f"trial %{{customdata}}, step %{{x}}: %{{y:.4g}}<br>{words}<extra></extra>",
    )


def _rest(info: NormsInfo) -> list[Any]:
    if not info.rest:
        return []
    x, y, trials = with_gaps(
        (line.steps, [n or None for n in line.norms], line.trials) for line in info.rest
    )
    return [
        go.Scatter(
            x=x,
            y=y,
            customdata=trials,
            mode="lines",
            line={"color": LIGHT, "width": 1},
            name=info.name_of_rest,
            hovertemplate="trial %{customdata}, step %{x}: %{y:.4g}<extra></extra>",
        )
    ]


def _zeros(info: NormsInfo) -> list[Any]:
    zeros = info.zeros
    if not zeros:
        return []
    return [
        go.Scatter(
            x=[step for step, _ in zeros],
            y=[info.floor] * len(zeros),
            customdata=[trial for _, trial in zeros],
            mode="markers",
            marker={"symbol": "triangle-down-open", "size": 8, "color": "#24292f"},
            name="Exactly 0",
            hovertemplate="trial %{customdata}, step %{x}: 0<extra></extra>",
        )
    ]
