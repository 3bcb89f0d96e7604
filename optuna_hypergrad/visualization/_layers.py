"""The entries of each tensor of a dict: one box for each layer of a network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.study import Study

from .._words import shortened
from ..stores import TensorStore
from ._imports import go, imports
from ._style import BLUE, escaped, faded, layout, value_axis
from ._tensors import Source, quantiles, read_values

if TYPE_CHECKING:
    import plotly

TITLE = "Hyperparameters by Layer"
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Layer:
    """One tensor. ``box``: minimum, quartiles and maximum of its finite entries."""

    name: str
    shape: tuple[int, ...]
    box: tuple[float, ...]

    @property
    def words(self) -> str:
        return f"{shortened(self.name, 48)} {list(self.shape)}"


@dataclass(frozen=True)
class LayersInfo:
    """What the figure shows, in the order of the dict."""

    title: str
    axis: str
    log: bool
    layers: list[Layer]


def read_layers(
    source: Source,
    name: str | None,
    log: bool | None,
    study: Study | None,
    tensor_store: TensorStore | None,
) -> LayersInfo | None:
    """What :func:`plot_layers` shows; ``None`` for nothing."""
    values = read_values(source, name, log, study, tensor_store)
    if values is None:
        return None
    layers = [
        Layer(key or values.name, array.shape, tuple(quantiles(array, LEVELS)))
        for key, array in values.entries.items()
    ]
    shown = [layer for layer in layers if not math.isnan(layer.box[0])]
    return LayersInfo(f"Layers of {values.described}", values.axis, values.log, shown)


def plot_layers(
    source: Source,
    name: str | None = None,
    *,
    log: bool | None = None,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
) -> plotly.graph_objects.Figure:
    """Plot how the hyperparameters of each layer are distributed, one box for each tensor of a dict.

    A box is from quartile to quartile, with a line at the median; whiskers are from the smallest entry to the
    largest.

    Example::

        from optuna_hypergrad.visualization import plot_layers

        plot_layers(study, "decay").show()  # of trial.suggest_tensor_like("decay", dict(net.named_parameters()), ...)

    Args:
        source: A study, whose best trial is taken; a trial; a ``FrozenTrial`` together with ``study=``; or values:
            a dict of tensors by name.
        name: A hyperparameter that is a dict of tensors. The largest by default.
        log: A logarithmic axis; by default where the hyperparameter was suggested so, or, where that is not known,
            spans two orders of magnitude.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.

    Returns:
        A figure; an empty one, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter, or it has been removed.
        ImportError: if plotly is not installed.
    """
    imports.check()
    info = read_layers(source, name, log, study, tensor_store)
    if info is None:
        return go.Figure(layout=layout(TITLE, "Value", ""))
    figure = go.Figure(layout=layout(escaped(info.title), escaped(info.axis), ""))
    boxes = list(zip(*(layer.box for layer in info.layers), strict=True))
    if boxes:
        low, first, middle, third, high = map(list, boxes)
        figure.add_box(
            y=list(range(len(info.layers))),
            lowerfence=low,
            q1=first,
            median=middle,
            q3=third,
            upperfence=high,
            orientation="h",
            line={"color": BLUE, "width": 1.5},
            fillcolor=faded(BLUE, 0.25),
            name=escaped(info.axis),
        )
    texts = [escaped(layer.words) for layer in info.layers]
    count = len(texts)
    figure.update_yaxes(range=[count - 0.4, -0.6], tickvals=list(range(count)), ticktext=texts)
    figure.update_xaxes(value_axis(info.log, (v for layer in info.layers for v in layer.box)))
    return figure.update_layout(height=190 + 34 * count, showlegend=False)
