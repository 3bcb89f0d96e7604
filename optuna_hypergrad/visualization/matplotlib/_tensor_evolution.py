"""The distribution of a tensor of hyperparameters over the outer steps of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.study import Study

from ...stores import TensorStore
from .._evolution import QUANTILES, EvolutionInfo, Mode, read_evolution
from .._style import BLUE
from .._tensor_evolution import percent
from ._imports import imports, legend, new_axes, room, whole_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_tensor_evolution(
    study: Study,
    name: str | None = None,
    *,
    trajectory: int | None = None,
    mode: Mode = "quantiles",
    quantiles: Sequence[float] = QUANTILES,
    n_steps: int | None = 60,
    log: bool | None = None,
    tensor_store: TensorStore | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot how the entries of a tensor are distributed, over outer steps, with Matplotlib.

    See :func:`optuna_hypergrad.visualization.plot_tensor_evolution` for what is shown.

    Example::

        from optuna_hypergrad.visualization.matplotlib import plot_tensor_evolution

        plot_tensor_evolution(study, "decay").figure.savefig("decay.pdf")

    Args:
        study: A study with one objective.
        name: A hyperparameter, or ``"name/entry"``; the largest by default.
        trajectory: The number of the trial that began it; that of the best trial by default.
        mode: ``"quantiles"``: bands; ``"histogram"``: a column for each step.
        quantiles: In increasing order.
        n_steps: At most so many of the steps, evenly spread; ``None`` for all.
        log: A logarithmic axis; by default as the hyperparameter was suggested.
        tensor_store: Where they are, if it is not where the study's sampler puts them.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes; empty ones, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter or trajectory, or its tensors have been removed.
        RequirementError: for a study with several objectives.
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    info = read_evolution(study, name, trajectory, mode, quantiles, n_steps, log, tensor_store)
    ax = new_axes(ax, info.title, info.axis, info.name or "Value")
    if not info.x:
        return ax
    whole_axis(ax, info.x)
    if info.log:
        ax.set_yscale("log")
    if info.edges:
        _draw_columns(ax, info)
        return ax
    room(ax, (v for row in info.table for v in row), info.log)
    for depth, (low, high) in enumerate(info.bands):
        label = f"{percent(info.levels[low])} to {percent(info.levels[high])}"
        alpha = (0.13, 0.2, 0.3)[min(depth, 2)]
        ends = info.level(low), info.level(high)
        ax.fill_between(info.x, *ends, color=BLUE, alpha=alpha, linewidth=0, label=label)
        if len(info.x) == 1:
            ax.vlines(info.x, *ends, color=BLUE, alpha=alpha, linewidth=8)
    if len(info.levels) % 2:
        i = len(info.levels) // 2
        label = percent(info.levels[i])
        ax.plot(info.x, info.level(i), color=BLUE, linewidth=1.8, marker=".", label=label)
    legend(ax)
    return ax


def _draw_columns(ax: Any, info: EvolutionInfo) -> None:
    x = np.array(info.x, dtype=float)
    between = 0.5 * (x[1:] + x[:-1])
    ends = (
        [2 * x[0] - between[0], 2 * x[-1] - between[-1]] if len(x) > 1 else [x[0] - 0.5, x[0] + 0.5]
    )
    edges = np.array([ends[0], *between, ends[1]])
    shares = np.array(info.shares).T
    drawn = ax.pcolormesh(
        edges, np.array(info.edges), np.where(shares > 0, shares, np.nan), cmap="Blues", vmin=0
    )
    ax.figure.colorbar(drawn, ax=ax, label="% of entries")
    ax.grid(False)
