"""The entries of each tensor of a dict: one box for each layer of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.study import Study

from ...stores import TensorStore
from .._layers import TITLE, read_layers
from .._style import BLUE, INK
from .._tensors import Source
from ._imports import imports, new_axes, plain, room

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_layers(
    source: Source,
    name: str | None = None,
    *,
    log: bool | None = None,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot how the hyperparameters of each layer are distributed, with Matplotlib.

    See :func:`optuna_hypergrad.visualization.plot_layers` for what is shown.

    Example::

        from optuna_hypergrad.visualization.matplotlib import plot_layers

        plot_layers(study, "decay").figure.savefig("layers.pdf")

    Args:
        source: A study, a trial, or a dict of tensors.
        name: A hyperparameter that is a dict of tensors. The largest by default.
        log: A logarithmic axis; by default as the hyperparameter was suggested.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes; empty ones, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter, or it has been removed.
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    info = read_layers(source, name, log, study, tensor_store)
    if info is None:
        return new_axes(ax, TITLE, "Value", "")
    count = len(info.layers)
    ax = new_axes(ax, info.title, info.axis, "", (7.2, 1.2 + 0.35 * count))
    if info.log:
        ax.set_xscale("log")
    if info.layers:
        low, first, middle, third, high = zip(*(layer.box for layer in info.layers), strict=True)
        ends = min(low), max(high)
        room(ax, ends, info.log, "x")
        if ends[0] < ends[1]:
            ax.set_xlim(_widened(*ends, info.log))
        rows, widths = range(count), [b - a for a, b in zip(first, third, strict=True)]
        ax.hlines(rows, low, high, color=BLUE, linewidth=1.2)
        ax.plot([*low, *high], [*rows, *rows], "|", color=BLUE, markersize=7)
        ax.barh(rows, widths, 0.5, first, color="#bfdbeb", edgecolor=BLUE, zorder=2)
        ax.plot(middle, rows, "|", color=BLUE, markersize=13, markeredgewidth=2.2, zorder=3)
    ax.set_yticks(
        range(count), [plain(layer.words) for layer in info.layers], fontsize="small", color=INK
    )
    ax.set_ylim(count - 0.4, -0.6)
    return ax


def _widened(low: float, high: float, log: bool) -> tuple[float, float]:
    """A little room at both ends."""
    if log:
        factor = (high / low) ** 0.04
        return low / factor, high * factor
    width = 0.04 * (high - low)
    return low - width, high + width
