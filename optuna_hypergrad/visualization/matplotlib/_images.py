"""Tensors that are pictures: distilled images, a decay for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optuna.study import Study

from ...stores import TensorStore
from .._images import TITLE, read_images
from .._style import INK
from .._tensors import Source
from ._imports import imports, new_axes, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_images(
    source: Source,
    name: str | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    labels: Sequence[object] | None = None,
    columns: int | None = None,
    n: int = 100,
    log: bool | None = None,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot a tensor that is one or more pictures, in a grid, with Matplotlib.

    See :func:`optuna_hypergrad.visualization.plot_images` for what is shown.

    Example::

        from optuna_hypergrad.visualization.matplotlib import plot_images

        plot_images(study, "images", shape=(8, 8)).figure.savefig("images.pdf")

    Args:
        source: A study, a trial, or a tensor.
        name: A hyperparameter, or ``"name/entry"``. The largest by default.
        shape: Of one picture, where the tensor has another.
        labels: What stands above each picture.
        columns: Of the grid.
        n: At most so many pictures.
        log: From black to white in the logarithm; by default as the hyperparameter was suggested.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes; empty ones, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter, or it has been removed.
        HyperparameterError: if it is not image-shaped, or there are not as many labels as pictures.
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    info = read_images(source, name, shape, labels, columns, n, log, study, tensor_store)
    title = TITLE if info is None else info.title
    size = (6.0, 4.0)
    if info is not None:
        height, width = info.pixels.shape[:2]
        size = (6.0, 0.5 + 6.0 * height / width)
    ax = new_axes(ax, title, "", "", size)
    if info is None:
        return ax
    ax.imshow(info.pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for text, x, y in info.labels:
        ax.text(x, y - 3, plain(text), ha="center", va="bottom", fontsize="small", color=INK)
    ax.set_axis_off()
    return ax
