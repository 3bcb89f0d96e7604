"""The largest and the smallest entries of a tensor, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.study import Study

from ...stores import TensorStore
from .._extreme_hyperparameters import TITLE, Labels, read_extremes
from .._style import BLUE, GRAY, RED
from .._tensors import Source
from ._imports import imports, legend, new_axes, plain, room

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_extreme_hyperparameters(
    source: Source,
    name: str | None = None,
    *,
    n: int = 20,
    labels: Labels | None = None,
    log: bool | None = None,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the largest and the smallest entries of a tensor of hyperparameters, by name, with Matplotlib.

    See :func:`optuna_hypergrad.visualization.plot_extreme_hyperparameters` for what is shown.

    Example::

        from optuna_hypergrad.visualization.matplotlib import plot_extreme_hyperparameters

        plot_extreme_hyperparameters(study, "decay").figure.savefig("extremes.pdf")

    Args:
        source: A study, a trial, a tensor, or a dict of tensors.
        name: A hyperparameter, or ``"name/entry"``. The largest by default.
        n: So many of each end.
        labels: What the entries are called, in order.
        log: A logarithmic axis; by default as the hyperparameter was suggested.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes; empty ones, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter, or it has been removed.
        HyperparameterError: if there are not as many labels as entries.
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    info = read_extremes(source, name, n, labels, log, study, tensor_store)
    if info is None:
        return new_axes(ax, TITLE, "Value", "")
    count = len(info.rows)
    ax = new_axes(ax, info.title, info.axis, "", (7.2, 1.2 + 0.19 * count))
    split = len(info.largest)
    values = [value for _, value in info.rows]
    title = "Largest" if info.smallest else "All"
    ax.plot(values[:split], range(split), "o", color=RED, markersize=5, label=title)
    if info.smallest:
        ax.plot(
            values[split:], range(split, count), "o", color=BLUE, markersize=5, label="Smallest"
        )
    label = f"Median: {info.median:.3g}"
    ax.axvline(info.median, color=GRAY, linestyle=":", linewidth=1, label=label)
    ax.set_yticks(range(count), [plain(label) for label, _ in info.rows], fontsize="small")
    ax.set_ylim(count - 0.4, -0.6)
    room(ax, values, info.log, "x")
    if info.log:
        ax.set_xscale("log")
    legend(ax)
    return ax
