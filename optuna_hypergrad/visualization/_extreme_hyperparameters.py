"""The largest and the smallest entries of a tensor, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.study import Study

from .._arguments import check_count
from .._errors import HyperparameterError
from .._words import shortened
from ..stores import TensorStore
from ._imports import go, imports
from ._style import BLUE, GRAY, RED, escaped, layout, value_axis
from ._tensors import Array, Source, Values, read_values

if TYPE_CHECKING:
    import plotly

TITLE = "Largest and Smallest Hyperparameters"
Labels = Sequence[str] | Mapping[str, Sequence[str]]
_LONGEST = 48


@dataclass(frozen=True)
class ExtremesInfo:
    """What the figure shows, from the largest down; ``smallest`` is empty where ``largest`` are all there are."""

    title: str
    axis: str
    log: bool
    largest: list[tuple[str, float]]
    smallest: list[tuple[str, float]]
    median: float

    @property
    def rows(self) -> list[tuple[str, float]]:
        return [*self.largest, *self.smallest]


def read_extremes(
    source: Source,
    name: str | None,
    n: int,
    labels: Labels | None,
    log: bool | None,
    study: Study | None,
    tensor_store: TensorStore | None,
) -> ExtremesInfo | None:
    """What :func:`plot_extreme_hyperparameters` shows; ``None`` for nothing."""
    check_count("plot_extreme_hyperparameters", "n", n, 1)
    values = read_values(source, name, log, study, tensor_store)
    if values is None:
        return None
    given = None if labels is None else _checked(labels, values)
    flat = values.flat
    there = np.flatnonzero(np.isfinite(flat))
    order = _ends(flat[there], n)

    def row(place: int) -> tuple[str, float]:
        index = int(there[place])
        label = values.label(index) if given is None else given[index]
        return shortened(label, _LONGEST), float(flat[index])

    rows = [row(int(i)) for i in order]
    split = len(rows) if len(there) <= 2 * n else n
    return ExtremesInfo(
        f"Extremes of {values.described}",
        values.axis,
        values.log,
        rows[:split],
        rows[split:],
        float(np.median(flat[there])) if len(there) else float("nan"),
    )


def _ends(flat: Array, n: int) -> Array:
    """Places of the ``n`` largest and the ``n`` smallest, in falling order; equal ones in order."""
    if flat.size <= 2 * n:
        return np.argsort(-flat, kind="stable")
    chosen = []
    for signed in (-flat, flat):
        edge = np.partition(signed, n - 1)[n - 1]
        candidates = np.flatnonzero(signed < edge)
        equal = np.flatnonzero(signed == edge)[: n - candidates.size]
        candidates = np.sort(np.concatenate([candidates, equal]))
        chosen.append(candidates[np.argsort(signed[candidates], kind="stable")])
    return np.concatenate([chosen[0], chosen[1][::-1]])


def _checked(labels: Labels, values: Values) -> list[str]:
    """One label for each number, in order."""
    parts: list[tuple[str, Sequence[str], int]] = []
    if isinstance(labels, Mapping):
        if labels.keys() != values.entries.keys():
            raise HyperparameterError(
                f"labels= has the keys {sorted(labels)[:5]}, and {values.name!r} has {sorted(values.entries)[:5]}."
            )
        parts = [(k, labels[k], a.size) for k, a in values.entries.items()]
    else:
        parts = [(values.name, labels, values.size)]
    for key, texts, size in parts:
        if len(texts) != size:
            raise HyperparameterError(
                f"labels= names {len(texts)} entries of {key!r}, which has {size}: give one for each, in order."
            )
    return [str(text) for _, texts, _ in parts for text in texts]


def plot_extreme_hyperparameters(
    source: Source,
    name: str | None = None,
    *,
    n: int = 20,
    labels: Labels | None = None,
    log: bool | None = None,
    study: Study | None = None,
    tensor_store: TensorStore | None = None,
) -> plotly.graph_objects.Figure:
    """Plot the largest and the smallest entries of a tensor of hyperparameters, by name.

    Example::

        from optuna_hypergrad.visualization import plot_extreme_hyperparameters

        plot_extreme_hyperparameters(study, "decay", labels=feature_names).show()

    Args:
        source: A study, whose best trial is taken; a trial; a ``FrozenTrial`` together with ``study=``; or values:
            a tensor, or a dict of tensors by name.
        name: A hyperparameter, or ``"name/entry"`` for one entry of a dict of tensors. The largest by default.
        n: So many of each end.
        labels: What the entries are called, in order; for a dict of tensors also a dict of such lists. By default
            ``decay[3, 5]``, and for what was suggested like a module the module's own names, ``0.weight[3, 5]``.
        log: A logarithmic axis; by default where the hyperparameter was suggested so, or, where that is not known,
            spans two orders of magnitude.
        study: That of a ``FrozenTrial``.
        tensor_store: Where they are, if it is not where the study's sampler puts them.

    Returns:
        A figure; an empty one, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter, or it has been removed.
        HyperparameterError: if there are not as many labels as entries.
        ImportError: if plotly is not installed.
    """
    imports.check()
    info = read_extremes(source, name, n, labels, log, study, tensor_store)
    if info is None:
        return go.Figure(layout=layout(TITLE, "Value", ""))
    figure = go.Figure(layout=layout(escaped(info.title), escaped(info.axis), ""))
    count = len(info.rows)
    for title, rows, first, shade in (
        ("Largest", info.largest, 0, RED),
        ("Smallest", info.smallest, len(info.largest), BLUE),
    ):
        if rows:
            figure.add_scatter(
                x=[value for _, value in rows],
                y=list(range(first, first + len(rows))),
                text=[escaped(label) for label, _ in rows],
                mode="markers",
                marker={"color": shade, "size": 8},
                name=title if info.smallest else "All",
                hovertemplate="%{text}: %{x:.6g}<extra></extra>",
            )
    figure.add_scatter(
        x=[info.median, info.median],
        y=[-0.6, count - 0.4],
        mode="lines",
        line={"color": GRAY, "dash": "dot", "width": 1.2},
        name=f"Median: {info.median:.3g}",
        hoverinfo="skip",
    )
    ticks = {"tickvals": list(range(count)), "ticktext": [escaped(label) for label, _ in info.rows]}
    figure.update_yaxes(range=[count - 0.4, -0.6], tickfont={"size": 11}, **ticks)
    figure.update_xaxes(value_axis(info.log, [*(v for _, v in info.rows), info.median]))
    return figure.update_layout(height=170 + 17 * count, showlegend=True)
