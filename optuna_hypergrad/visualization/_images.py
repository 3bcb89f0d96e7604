"""Tensors that are pictures: distilled images, a decay for each pixel."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.study import Study

from .. import _optuna
from .._arguments import check_count
from .._errors import HyperparameterError
from .._png import Pixels, to_png
from .._words import shortened
from ..stores import TensorStore
from ._imports import go, imports
from ._style import escaped, layout
from ._tensors import Array, Source, read_values

if TYPE_CHECKING:
    import plotly

TITLE = "Images"
_MOST_PIXELS = 4_000_000
_LEAST_SIDE = 560


@dataclass(frozen=True)
class ImagesInfo:
    """What the figure shows.

    Args:
        title: With what is black and what is white.
        pixels: All pictures in one, with margins between them, ``(height, width)`` or ``(height, width, 3)``.
        labels: Text, and where it stands: the middle of the upper edge of a picture.
        left_out: So many pictures are not shown.
    """

    title: str
    pixels: Pixels
    labels: list[tuple[str, float, float]]
    left_out: int


def read_images(
    source: Source,
    name: str | None,
    shape: tuple[int, ...] | None,
    labels: Sequence[object] | None,
    columns: int | None,
    n: int,
    log: bool | None,
    study: Study | None,
    tensor_store: TensorStore | None,
) -> ImagesInfo | None:
    """What :func:`plot_images` shows; ``None`` for nothing."""
    check_count("plot_images", "columns", columns, 1, none=True)
    check_count("plot_images", "n", n, 1)
    values = read_values(source, name, log, study, tensor_store, guess=False)
    if values is None:
        return None
    if len(values.entries) != 1:
        known = ", ".join(repr(k) for k in list(values.entries)[:8])
        raise HyperparameterError(
            f"{values.name or 'What was given'!r} is a dict of tensors. Say which one is to be drawn: name=, one of "
            f"{known} after its name and a slash."
        )
    (array,) = values.entries.values()
    images = as_images(array, shape, values.name or "tensor")
    shown, left_out = images[:n], max(len(images) - n, 0)
    if labels is not None and len(labels) != len(images):
        raise HyperparameterError(
            f"labels= names {len(labels)} pictures, and there are {len(images)}: give one for each."
        )
    if left_out:
        _optuna.logger.warning(f"{left_out} of {len(images)} pictures are not drawn: n={n}.")
    gray, black, white = to_bytes(shown, values.log)
    pixels, places = _grid(gray, columns, labels is not None)
    texts = [] if labels is None else [str(text) for text in labels[:n]]
    title = f"{shortened(values.name, 44) or TITLE}: black is {black:.3g}, white {white:.3g}"
    return ImagesInfo(
        title + (", logarithmic" if values.log else ""),
        pixels,
        [(text, x, y) for text, (x, y) in zip(texts, places, strict=False)],
        left_out,
    )


def as_images(array: Array, shape: tuple[int, ...] | None, name: str) -> Array:
    """``(count, height, width)`` or ``(count, height, width, 3)``.

    Args:
        shape: Of one picture: ``(height, width)`` or ``(channels, height, width)``; ``None`` for what the last
            axes are.

    Raises:
        HyperparameterError: if it is not image-shaped.
    """
    if shape is not None:
        size = math.prod(shape)
        if len(shape) not in (2, 3) or size < 1 or array.size % size:
            raise HyperparameterError(
                f"shape={shape!r} cannot be that of pictures in {name!r}, which has shape {list(array.shape)}: give "
                "(height, width) or (channels, height, width)."
            )
        array = array.reshape(-1, *shape)
    elif array.ndim == 2:
        array = array[None]
    if array.ndim == 3 and shape is None and array.shape[0] == 3 and min(array.shape[1:]) > 3:
        array = array[None]
    if array.ndim == 4 and array.shape[1] in (1, 3):
        array = array[:, 0] if array.shape[1] == 1 else np.moveaxis(array, 1, -1)
    elif array.ndim != 3:
        raise HyperparameterError(
            f"{name!r} has shape {list(array.shape)}, which is none of pictures: (height, width), (count, height, "
            "width), or (count, channels, height, width) with 1 or 3 channels. Say which of its numbers are one: "
            "shape=(height, width)."
        )
    if not array.size:
        raise HyperparameterError(f"{name!r} has no entries to draw.")
    return array


def to_bytes(images: Array, log: bool = False) -> tuple[Pixels, float, float]:
    """From the smallest number, which is black, to the largest; and these two. What is not finite is black."""
    there = images[np.isfinite(images)]
    low, high = (float(there.min()), float(there.max())) if there.size else (0.0, 1.0)
    scaled = images.astype(np.float64)
    bottom, top = (math.log(low), math.log(high)) if log else (low, high)
    if log:
        scaled = np.log(scaled)
    scaled = (scaled - bottom) / ((top - bottom) or 1.0)
    scaled = np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)
    return np.round(255 * np.clip(scaled, 0.0, 1.0)).astype(np.uint8), low, high


def _grid(
    images: Pixels, columns: int | None, has_labels: bool
) -> tuple[Pixels, list[tuple[float, float]]]:
    """All in one picture, enlarged where they are small, and where each begins."""
    count, height, width = images.shape[:3]
    columns = min(columns or math.ceil(math.sqrt(count * height / width)), count)
    rows = -(-count // columns)
    scale = max(1, min(math.ceil(_LEAST_SIDE / (columns * width)), 40))
    while scale > 1 and rows * columns * height * width * scale**2 > _MOST_PIXELS:
        scale -= 1
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    gap = max(2, round(0.06 * width))
    above = max(gap, 22) if has_labels else gap
    whole = np.full(
        (rows * (height + above) + gap, columns * (width + gap) + gap, *images.shape[3:]),
        255,
        np.uint8,
    )
    places = []
    for i, image in enumerate(images):
        y = above + (i // columns) * (height + above)
        x = gap + (i % columns) * (width + gap)
        whole[y : y + height, x : x + width] = image
        places.append((x + width / 2, float(y)))
    return whole, places


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
) -> plotly.graph_objects.Figure:
    """Plot a tensor that is one or more pictures, in a grid; all have the same scale, which the title tells.

    Example::

        from optuna_hypergrad.visualization import plot_images

        plot_images(study, "images", shape=(8, 8), labels=range(10)).show()

    Args:
        source: A study, whose best trial is taken; a trial; a ``FrozenTrial`` together with ``study=``; or a tensor:
            ``(height, width)``, ``(count, height, width)``, or ``(count, channels, height, width)`` with 1 or 3
            channels.
        name: A hyperparameter, or ``"name/entry"`` for one entry of a dict of tensors. The largest by default.
        shape: Of one picture, where the tensor has another: ``(height, width)`` or ``(channels, height, width)``.
        labels: What stands above each picture.
        columns: Of the grid.
        n: At most so many pictures.
        log: From black to white in the logarithm; by default where the hyperparameter was suggested so.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.

    Returns:
        A figure; an empty one, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter, or it has been removed.
        HyperparameterError: if it is not image-shaped, or there are not as many labels as pictures.
        ImportError: if plotly is not installed.
    """
    imports.check()
    info = read_images(source, name, shape, labels, columns, n, log, study, tensor_store)
    if info is None:
        return go.Figure(layout=layout(TITLE, "", ""))
    figure = go.Figure(layout=layout(escaped(info.title), "", ""))
    picture = base64.b64encode(to_png(info.pixels)).decode("ascii")
    figure.add_trace(go.Image(source=f"data:image/png;base64,{picture}", hoverinfo="skip"))
    for text, x, y in info.labels:
        figure.add_annotation(
            x=x, y=y, text=escaped(text), showarrow=False, yanchor="bottom", font={"size": 12}
        )
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    height, width = info.pixels.shape[:2]
    side = 640
    return figure.update_layout(
        width=side,
        height=90 + round(side * height / width),
        margin={"l": 10, "r": 10, "t": 70, "b": 10},
    )
