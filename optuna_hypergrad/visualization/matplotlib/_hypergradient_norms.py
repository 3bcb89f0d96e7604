"""How large the hypergradient is at each outer step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from optuna.study import Study

from ...stores import TensorStore
from .._hypergradient_norms import NORM, STEP, TITLE, read_norms
from .._style import INK, LIGHT, color
from ._imports import imports, legend, new_axes, plain, room, whole_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_hypergradient_norms(
    study: Study,
    *,
    n_trajectories: int | None = 10,
    tensor_store: TensorStore | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the norm of the hypergradient over outer steps, one line for each trajectory, with Matplotlib.

    See :func:`optuna_hypergrad.visualization.plot_hypergradient_norms` for what is shown.

    Example::

        from optuna_hypergrad.visualization.matplotlib import plot_hypergradient_norms

        plot_hypergradient_norms(study).figure.savefig("norms.pdf")

    Args:
        study: A study with one objective.
        n_trajectories: So many, the best ones, get a color, and the others are gray. ``None`` for all.
        tensor_store: Where checkpoints are, if it is not where the study's sampler puts them.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes; empty ones, with a warning, where there is nothing to show.

    Raises:
        RequirementError: for a study with several objectives.
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    info = read_norms(study, n_trajectories, tensor_store)
    ax = new_axes(ax, TITLE, STEP, NORM)
    if not info.lines:
        return ax
    label: str | None = info.name_of_rest
    for line in info.rest:
        norms = [n or math.nan for n in line.norms]
        ax.plot(line.steps, norms, color=LIGHT, linewidth=0.8, label=label, zorder=1)
        label = None
    for i, line in enumerate(info.lines):
        norms = [n or math.nan for n in line.norms]
        marker = "." if len(norms) <= 60 else None
        ax.plot(
            line.steps,
            norms,
            color=color(i),
            linewidth=1.4,
            marker=marker,
            label=plain(line.curve.label),
        )
    if info.zeros:
        steps = [step for step, _ in info.zeros]
        floor = [info.floor] * len(steps)
        ax.scatter(
            steps, floor, s=30, c="white", marker="v", edgecolors=INK, label="Exactly 0", zorder=4
        )
    ax.set_yscale("log")
    whole_axis(ax, (s for line in [*info.lines, *info.rest] for s in line.steps))
    room(ax, (n for line in [*info.lines, *info.rest] for n in line.norms), True)
    legend(ax)
    return ax
