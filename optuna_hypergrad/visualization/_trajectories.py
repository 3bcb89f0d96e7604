"""The value over the outer steps of each trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._arguments import check_count
from .._words import shortened
from ._curves import (
    LEAST_POINTS,
    OTHER_TRIALS,
    OTHERS,
    Curve,
    Curves,
    name_of_others,
    number,
    points_of_each,
    read_curves,
    thinned,
    with_gaps,
)
from ._imports import go, imports
from ._style import GRAY, INK, LIGHT, color, escaped, layout, value_axis, whole_axis
from ._tensors import spans_decades

if TYPE_CHECKING:
    import plotly

TITLE, STEP = "Trajectories", "Outer step"
_WORDS = 160


@dataclass(frozen=True)
class Line:
    """A trajectory as it is drawn: ``curve`` at some of its points."""

    curve: Curve
    points: list[int]
    color: str

    @property
    def steps(self) -> list[int]:
        return [self.curve.steps[i] for i in self.points]

    @property
    def values(self) -> list[float]:
        return [self.curve.values[i] for i in self.points]

    @property
    def trials(self) -> list[int]:
        return [self.curve.trials[i] for i in self.points]


@dataclass(frozen=True)
class TrajectoriesInfo:
    """What the figure shows.

    Args:
        lines: Those that have a color.
        rest: Those that have none.
        others: Trials that are no part of any, with what is shown of them.
        best: Step, value and trial of the best one.
    """

    target_name: str
    log: bool
    lines: list[Line]
    rest: list[Line]
    name_of_rest: str
    others: list[tuple[int, float]]
    best: tuple[int, float, int] | None

    @property
    def is_empty(self) -> bool:
        return not (self.lines or self.others)

    @property
    def values(self) -> list[float]:
        """All that is drawn."""
        return [v for line in [*self.lines, *self.rest] for v in line.values] + [
            v for _, v in self.others
        ]

    @property
    def steps(self) -> list[int]:
        return [s for line in [*self.lines, *self.rest] for s in line.steps]


def read_trajectories(
    study: Study,
    target: Callable[[FrozenTrial], float] | None,
    target_name: str,
    n_trajectories: int | None,
    log: bool | None,
) -> TrajectoriesInfo:
    """What :func:`plot_trajectories` shows; says so where that is nothing."""
    check_count("plot_trajectories", "n_trajectories", n_trajectories, 1, none=True)
    if target is not None and not callable(target):
        raise ValueError(f"plot_trajectories needs target(trial) -> float, got {target!r:.80}.")
    found = read_curves(study, target)
    if not found.curves:
        what = "completed trials" if not found.others else "trajectories: none had a hypergradient"
        _optuna.logger.warning(f"Study {study.study_name!r} does not have any {what}.")
    ranked = found.ranked()
    most = len(ranked) if n_trajectories is None else n_trajectories
    shown = sorted(ranked[:most], key=lambda c: c.id)
    rest = sorted(ranked[most:], key=lambda c: c.id)
    drawn = thinned(len(rest), OTHERS)
    whole = n_trajectories is None
    info = TrajectoriesInfo(
        target_name,
        False,
        _lines(found, shown, None if whole else points_of_each(len(shown))),
        _lines(found, [rest[i] for i in drawn], LEAST_POINTS),
        name_of_others(len(drawn), len(rest)),
        _others(found, target, None if whole else OTHER_TRIALS),
        _best(found),
    )
    return replace(info, log=spans_decades([info.values]) if log is None else log)


def _lines(found: Curves, curves: list[Curve], points: int | None) -> list[Line]:
    """With so many points of each; all for ``None``."""
    place = found.place_of_best()
    lines = []
    for i, curve in enumerate(curves):
        keep = []
        if place is not None and place[0] is curve and place[1] in curve.steps:
            keep = [curve.steps.index(place[1])]
        n = len(curve.steps)
        lines.append(Line(curve, thinned(n, n if points is None else points, keep), color(i)))
    return lines


def _others(
    found: Curves, target: Callable[[FrozenTrial], float] | None, most: int | None
) -> list[tuple[int, float]]:
    shown = [(t.number, t.values[0] if target is None else float(target(t))) for t in found.others]
    return shown if most is None else [shown[i] for i in thinned(len(shown), most)]


def _best(found: Curves) -> tuple[int, float, int] | None:
    place = found.place_of_best()
    if found.best is None:
        return None
    if place is None:
        return 0, found.best.values[0], found.best.number
    return place[1], place[2], found.best.number


def plot_trajectories(
    study: Study,
    *,
    target: Callable[[FrozenTrial], float] | None = None,
    target_name: str = "Objective Value",
    n_trajectories: int | None = 10,
    log: bool | None = None,
) -> plotly.graph_objects.Figure:
    """Plot the value over outer steps, one line for each trajectory.

    A trajectory is named by the trial that began it and by its setting of the discrete hyperparameters.
    A bilevel run inside one trial is a line as well: what it has reported, and, as a circle, what the trial
    returned (which may be of another kind: retrained rather than warm). A star marks the best trial, crosses
    trials without a hypergradient. Steps that failed are left out.

    Example::

        from optuna_hypergrad.visualization import plot_trajectories

        plot_trajectories(study).show()

    Args:
        study: A study with one objective.
        target: What to show of a trial, instead of its value: ``lambda t: t.user_attrs["test_error"]``.
        target_name: On the axis.
        n_trajectories: So many, the best ones, get a color, and the others are gray; long ones are thinned out.
            ``None`` for all of everything.
        log: A logarithmic axis; by default where values are positive and span two orders of magnitude.

    Returns:
        A figure; an empty one, with a warning, where there is nothing to show.

    Raises:
        RequirementError: for a study with several objectives.
        ImportError: if plotly is not installed.
    """
    imports.check()
    info = read_trajectories(study, target, target_name, n_trajectories, log)
    figure = go.Figure(layout=layout(TITLE, STEP, escaped(target_name)))
    if info.is_empty:
        return figure
    figure.update_yaxes(value_axis(info.log, info.values)).update_xaxes(whole_axis(info.steps))
    figure.add_traces([*_rest(info), *_others_trace(info), *map(_trace, info.lines)])
    figure.add_traces([*_returned(info), *_star(info)])
    return figure.update_layout(showlegend=True)


def _trace(line: Line) -> Any:
    words = escaped(shortened(line.curve.words, _WORDS))
    return go.Scatter(
        x=line.steps,
        y=line.values,
        customdata=line.trials,
        mode="lines+markers" if len(line.points) <= 60 else "lines",
        line={"color": line.color, "width": 1.8},
        marker={"size": 4},
        name=escaped(line.curve.label),
        hovertemplate=f"trial %{{customdata}}, step %{{x}}: %{{y:.6g}}<br>{words}<extra></extra>",
    )


def _rest(info: TrajectoriesInfo) -> list[Any]:
    """All in one trace, with gaps."""
    if not info.rest:
        return []
    x, y, trials = with_gaps((line.steps, line.values, line.trials) for line in info.rest)
    return [
        go.Scatter(
            x=x,
            y=y,
            customdata=trials,
            mode="lines" if any(len(line.points) > 1 for line in info.rest) else "markers",
            line={"color": LIGHT, "width": 1},
            name=info.name_of_rest,
            hovertemplate="trial %{customdata}, step %{x}: %{y:.6g}<extra></extra>",
        )
    ]


def _others_trace(info: TrajectoriesInfo) -> list[Any]:
    if not info.others:
        return []
    return [
        go.Scatter(
            x=[0] * len(info.others),
            y=[value for _, value in info.others],
            customdata=[number for number, _ in info.others],
            mode="markers",
            marker={"color": GRAY, "symbol": "x-thin-open", "size": 7},
            name="No hypergradient",
            hovertemplate="trial %{customdata}: %{y:.6g}<extra></extra>",
        )
    ]


def _returned(info: TrajectoriesInfo) -> list[Any]:
    ends = [line for line in [*info.lines, *info.rest] if line.curve.returned is not None]
    if not ends:
        return []
    places = [line.curve.returned for line in ends]
    return [
        go.Scatter(
            x=[p[0] for p in places if p is not None],
            y=[p[1] for p in places if p is not None],
            customdata=[line.curve.id for line in ends],
            mode="markers",
            marker={
                "color": [line.color if line in info.lines else LIGHT for line in ends],
                "symbol": "circle-open",
                "size": 8,
                "line": {"width": 2},
            },
            name="Returned",
            hovertemplate="trial %{customdata} returned %{y:.6g}<extra></extra>",
        )
    ]


def _star(info: TrajectoriesInfo) -> list[Any]:
    if info.best is None:
        return []
    step, value, trial = info.best
    return [
        go.Scatter(
            x=[step],
            y=[value],
            customdata=[trial],
            mode="markers",
            marker={
                "symbol": "star",
                "size": 14,
                "color": "#f2c200",
                "line": {"width": 1, "color": INK},
            },
            name=f"Best: {number(value)}",
            hovertemplate="best: trial %{customdata}, step %{x}: %{y:.6g}<extra></extra>",
        )
    ]
