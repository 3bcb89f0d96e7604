"""The value over the outer steps of each trajectory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from optuna.study import Study
from optuna.trial import FrozenTrial

from .._curves import number
from .._style import GRAY, INK, LIGHT
from .._trajectories import STEP, TITLE, read_trajectories
from ._imports import imports, legend, new_axes, plain, whole_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_trajectories(
    study: Study,
    *,
    target: Callable[[FrozenTrial], float] | None = None,
    target_name: str = "Objective Value",
    n_trajectories: int | None = 10,
    log: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the value over outer steps, one line for each trajectory, with Matplotlib.

    See :func:`optuna_hypergrad.visualization.plot_trajectories` for what is shown.

    Example::

        from optuna_hypergrad.visualization.matplotlib import plot_trajectories

        plot_trajectories(study).figure.savefig("trajectories.pdf")

    Args:
        study: A study with one objective.
        target: What to show of a trial, instead of its value.
        target_name: On the axis.
        n_trajectories: So many, the best ones, get a color, and the others are gray. ``None`` for all.
        log: A logarithmic axis; by default where values are positive and span two orders of magnitude.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes; empty ones, with a warning, where there is nothing to show.

    Raises:
        RequirementError: for a study with several objectives.
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    info = read_trajectories(study, target, target_name, n_trajectories, log)
    ax = new_axes(ax, TITLE, STEP, target_name)
    if info.is_empty:
        return ax
    whole_axis(ax, info.steps or [0])
    if info.log:
        ax.set_yscale("log")
    label: str | None = info.name_of_rest
    for line in info.rest:
        ax.plot(line.steps, line.values, color=LIGHT, linewidth=0.8, label=label, zorder=1)
        label = None
    if info.others:
        values = [value for _, value in info.others]
        ax.scatter(
            [0] * len(values), values, s=18, c=GRAY, marker="x", label="No hypergradient", zorder=2
        )
    for line in info.lines:
        ax.plot(
            line.steps,
            line.values,
            color=line.color,
            linewidth=1.4,
            marker="." if len(line.points) <= 60 else None,
            label=plain(line.curve.label),
            zorder=3,
        )
    ends = [line for line in info.lines if line.curve.returned is not None]
    for line in ends:
        assert line.curve.returned is not None
        ax.scatter(*line.curve.returned, s=32, c="white", edgecolors=line.color, zorder=4)
    if info.best is not None:
        step, value, _ = info.best
        label = f"Best: {number(value)}"
        ax.scatter(
            step,
            value,
            s=140,
            c="#f2c200",
            marker="*",
            label=label,
            edgecolors=INK,
            linewidths=0.8,
            zorder=5,
        )
    legend(ax)
    return ax
