"""Learned weights of samples, beside what is known about these samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optuna.study import Study

from ...stores import TensorStore
from .._sample_weights import SHARE, TITLE, WEIGHT, read_weights
from .._tensors import Source
from ._imports import imports, new_axes, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_sample_weights(
    source: Source,
    name: str | None = None,
    truth: Any = None,
    *,
    names: tuple[str, str] = ("clean", "corrupted"),
    bins: int = 40,
    log: bool | None = None,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot how learned weights of samples are distributed, by what is known about them, with Matplotlib.

    See :func:`optuna_hypergrad.visualization.plot_sample_weights` for what is shown.

    Example::

        from optuna_hypergrad.visualization.matplotlib import plot_sample_weights

        plot_sample_weights(weights, truth=labels == true_labels).figure.savefig("weights.pdf")

    Args:
        source: The weights themselves, a study, or a trial.
        name: A hyperparameter, or ``"name/entry"``. The largest by default.
        truth: Whether each sample is sound; ``None`` where nobody knows.
        names: What sound samples, and others, are called.
        bins: Of the histograms.
        log: A logarithmic axis; by default as the hyperparameter was suggested.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes; empty ones, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter, or it has been removed.
        HyperparameterError: if ``truth`` does not have one truth value for each weight.
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    info = read_weights(source, name, truth, names, bins, log, study, tensor_store)
    if info is None:
        return new_axes(ax, TITLE, WEIGHT, SHARE)
    ax = new_axes(ax, info.title, info.axis, SHARE)
    for group in info.groups:
        ax.stairs(group.shares, info.edges, color=group.color, alpha=0.3, fill=True)
        ax.stairs(
            group.shares, info.edges, color=group.color, linewidth=1.5, label=plain(group.label)
        )
    if info.log:
        ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize="small", frameon=False)
    return ax
