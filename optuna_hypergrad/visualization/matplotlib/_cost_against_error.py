"""What estimates cost, and how far off they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._cost_against_error import COST, ERROR, TITLE, Records, read_costs
from .._style import color
from ._imports import imports, legend, new_axes, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_cost_against_error(
    records: Records,
    *,
    label: str = "label",
    cost: str = "cost",
    error: str = "error",
    cost_name: str = COST,
    error_name: str = ERROR,
    ax: Axes | None = None,
) -> Axes:
    """Plot what estimates cost against how far off they are, on logarithmic axes, with Matplotlib.

    Example::

        from optuna_hypergrad.visualization.matplotlib import plot_cost_against_error

        plot_cost_against_error({"CG": [(10, 0.3), (20, 0.01)]}).figure.savefig("costs.pdf")

    Args:
        records: By method, pairs ``(cost, error)``; or one dict for each point, or a pandas ``DataFrame``.
        label: What the method is called in such a dict or table.
        cost: Likewise, of a point.
        error: Likewise.
        cost_name: On the axis.
        error_name: On the axis.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes; empty ones, with a warning, where there are no points.

    Raises:
        ValueError: for records that lack something.
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    info = read_costs(records, label, cost, error)
    ax = new_axes(ax, TITLE, cost_name, error_name)
    if not info.lines:
        return ax
    for i, (name, (costs, errors)) in enumerate(info.lines.items()):
        marker = "." if len(costs) <= 40 else None
        ax.plot(costs, errors, color=color(i), marker=marker, linewidth=1.5, label=plain(name))
    ax.set_xscale("log")
    ax.set_yscale("log")
    legend(ax)
    return ax
