"""Learned weights of samples, beside what is known about these samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.study import Study

from .._arguments import check_count
from .._errors import HyperparameterError
from ..stores import TensorStore
from ._imports import go, imports
from ._style import BLUE, RED, escaped, faded, layout, value_axis
from ._tensors import Array, Source, as_array, read_values

if TYPE_CHECKING:
    import plotly

TITLE, WEIGHT, SHARE = "Sample Weights", "Learned weight", "Samples of each kind (%)"


@dataclass(frozen=True)
class Group:
    """Samples of one kind: how many there are in each bin."""

    name: str
    color: str
    counts: list[int]
    mean: float

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def label(self) -> str:
        return f"{self.size:,} {self.name}, mean {self.mean:.3g}"

    @property
    def shares(self) -> list[float]:
        return [100.0 * c / max(self.size, 1) for c in self.counts]


@dataclass(frozen=True)
class WeightsInfo:
    """What the figure shows. ``auroc`` is NaN where there is no truth, or only samples of one kind."""

    axis: str
    log: bool
    edges: list[float]
    groups: list[Group]
    auroc: float

    @property
    def title(self) -> str:
        return TITLE if np.isnan(self.auroc) else f"{TITLE} (AUROC {self.auroc:.3f})"


def auroc(weights: Array, truth: Array) -> float:
    """How often a sample that is true has the larger weight than one that is not; ties count half.

    Reference: Hanley & McNeil (1982), "The meaning and use of the area under a receiver operating characteristic
    (ROC) curve".
    """
    positive = int(truth.sum())
    negative = truth.size - positive
    if not positive or not negative:
        return float("nan")
    _, place, counts = np.unique(weights, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[place.reshape(-1)]
    area = (ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative)
    return float(area)


def read_weights(
    source: Source,
    name: str | None,
    truth: Any,
    names: tuple[str, str],
    bins: int,
    log: bool | None,
    study: Study | None,
    tensor_store: TensorStore | None,
) -> WeightsInfo | None:
    """What :func:`plot_sample_weights` shows; ``None`` for nothing."""
    check_count("plot_sample_weights", "bins", bins, 1)
    if len(names) != 2 or isinstance(names, str):
        raise ValueError(
            f"plot_sample_weights needs names=(of the true ones, of the others), got {names!r:.80}."
        )
    values = read_values(source, name, log, study, tensor_store)
    if values is None:
        return None
    weights = values.flat.astype(np.float64)
    flags = None if truth is None else _flags(truth, weights)
    there = np.isfinite(weights)
    edges = _edges(weights[there], bins, values.log)
    if flags is None:
        groups = [_group("samples", BLUE, weights[there], edges)]
        area = float("nan")
    else:
        groups = [
            _group(names[0], BLUE, weights[there & flags], edges),
            _group(names[1], RED, weights[there & ~flags], edges),
        ]
        area = auroc(weights[there], flags[there])
    axis = f"{WEIGHT} ({values.axis})" if values.name else WEIGHT
    return WeightsInfo(axis, values.log, edges.tolist(), [g for g in groups if g.size], area)


def _flags(truth: Any, weights: Array) -> Array:
    given = as_array(truth).reshape(-1)
    if given.size != weights.size:
        raise HyperparameterError(
            f"truth= has {given.size} entries, and there are {weights.size} weights: give one for each sample."
        )
    if not np.isin(given, (0, 1)).all():
        raise HyperparameterError(
            "truth= must say of each sample whether it is sound: True or False, and not "
            f"{given[~np.isin(given, (0, 1))][0]!r:.40}."
        )
    return given.astype(bool)


def _edges(weights: Array, bins: int, log: bool) -> Array:
    low, high = (float(weights.min()), float(weights.max())) if weights.size else (0.0, 1.0)
    if not low < high:
        room = 0.05 * abs(low) or 0.5
        low, high = low - room, high + room
    edges: Array = np.geomspace(low, high, bins + 1) if log else np.linspace(low, high, bins + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return edges


def _group(name: str, shade: str, weights: Array, edges: Array) -> Group:
    counts, _ = np.histogram(weights, edges)
    return Group(name, shade, counts.tolist(), float(weights.mean()) if weights.size else 0.0)


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
) -> plotly.graph_objects.Figure:
    """Plot how learned weights of samples are distributed, by what is known about these samples.

    The title has the AUROC: how often a sound sample has a larger weight than another one.

    Example::

        from optuna_hypergrad.visualization import plot_sample_weights

        plot_sample_weights(study, "weights", truth=labels == true_labels).show()

    Args:
        source: The weights themselves; or a study, whose best trial is taken; a trial; a ``FrozenTrial`` together
            with ``study=``.
        name: A hyperparameter, or ``"name/entry"`` for one entry of a dict of tensors (``"bilevel/weights"``). The
            largest by default.
        truth: Whether each sample is sound; ``None`` where nobody knows.
        names: What sound samples, and others, are called.
        bins: Of the histograms.
        log: A logarithmic axis; by default where the hyperparameter was suggested so, or, where that is not known,
            spans two orders of magnitude.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.

    Returns:
        A figure; an empty one, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter, or it has been removed.
        HyperparameterError: if ``truth`` does not have one truth value for each weight.
        ImportError: if plotly is not installed.
    """
    imports.check()
    info = read_weights(source, name, truth, names, bins, log, study, tensor_store)
    if info is None:
        return go.Figure(layout=layout(TITLE, WEIGHT, SHARE))
    figure = go.Figure(layout=layout(info.title, escaped(info.axis), SHARE))
    for group in info.groups:
        figure.add_scatter(
            x=[info.edges[0], *info.edges],
            y=[0.0, *group.shares, 0.0],
            customdata=[0, *group.counts, 0],
            mode="lines",
            line={"color": group.color, "shape": "hv", "width": 1.5},
            fill="tozeroy",
            fillcolor=faded(group.color, 0.3),
            name=escaped(group.label),
            hovertemplate="from %{x:.3g}: %{y:.3g} %, %{customdata} samples<extra></extra>",
        )
    figure.update_xaxes(value_axis(info.log, info.edges))
    figure.update_yaxes(rangemode="tozero")
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0.0}
    return figure.update_layout(showlegend=True, legend=legend)
