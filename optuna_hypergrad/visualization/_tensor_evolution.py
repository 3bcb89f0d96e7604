"""The distribution of a tensor of hyperparameters over the outer steps of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.study import Study

from ..stores import TensorStore
from ._evolution import QUANTILES, EvolutionInfo, Mode, read_evolution
from ._imports import go, imports
from ._style import BLUE, escaped, faded, layout, value_axis, whole_axis

if TYPE_CHECKING:
    import plotly


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
) -> plotly.graph_objects.Figure:
    """Plot how the entries of a tensor are distributed, over the outer steps of its trajectory.

    Those steps are shown whose tensors are in the store: by default the newest two, the best, and every tenth trial
    (``HypergradientSampler(retention=...)``). Where each trial is a whole bilevel run, the final values of each
    are shown, by trial. Only quantiles and counts are in the figure, however many entries there are.

    Example::

        from optuna_hypergrad.visualization import plot_tensor_evolution

        plot_tensor_evolution(study, "decay").show()
        plot_tensor_evolution(study, "decay", mode="histogram").show()

    Args:
        study: A study with one objective.
        name: A hyperparameter, or ``"name/entry"`` for one entry of a dict of tensors, all of which are taken
            together otherwise. The largest by default.
        trajectory: The number of the trial that began it; that of the best trial that has tensors by default.
        mode: ``"quantiles"``: bands; ``"histogram"``: a column for each step.
        quantiles: In increasing order; bands are between the first and the last, the second and the last but one...
        n_steps: At most so many of the steps, evenly spread; ``None`` for all.
        log: A logarithmic axis; by default where the hyperparameter was suggested so, and for runs where it
            spans two orders of magnitude.
        tensor_store: Where they are, if it is not where the study's sampler puts them.

    Returns:
        A figure; an empty one, with a warning, where no trial has tensors.

    Raises:
        MissingTensorError: if there is no such hyperparameter or trajectory, or its tensors have been removed.
        RequirementError: for a study with several objectives.
        ImportError: if plotly is not installed.
    """
    imports.check()
    info = read_evolution(study, name, trajectory, mode, quantiles, n_steps, log, tensor_store)
    figure = go.Figure(layout=layout(escaped(info.title), info.axis, escaped(info.name or "Value")))
    if not info.x:
        return figure
    ends = [v for row in info.table for v in row] if not info.edges else info.edges
    figure.update_yaxes(value_axis(info.log, ends)).update_xaxes(whole_axis(info.x))
    if info.edges:
        return figure.add_trace(_columns(info))
    for depth, (low, high) in enumerate(info.bands):
        figure.add_traces(_band(info, low, high, depth))
    if len(info.levels) % 2:
        figure.add_trace(_middle(info))
    return figure.update_layout(hovermode="x", showlegend=True)


def _band(info: EvolutionInfo, low: int, high: int, depth: int) -> list[Any]:
    alpha = (0.13, 0.2, 0.3)[min(depth, 2)]
    edge = {"width": 0.8, "color": faded(BLUE, 0.45)}
    mode = "lines" if len(info.x) > 1 else "markers"
    names = [percent(info.levels[i]) for i in (low, high)]
    group = {"legendgroup": names[0], "mode": mode, "line": edge, "x": info.x}
    return [
        go.Scatter(
            **group,
            y=info.level(high),
            showlegend=False,
            name=names[1],
            hovertemplate="%{y:.4g}",
        ),
        go.Scatter(
            **group,
            y=info.level(low),
            fill="tonexty",
            fillcolor=faded(BLUE, alpha),
            name=f"{names[0]} to {names[1]}",
            hovertemplate=f"%{{y:.4g}}<extra>{names[0]}</extra>",
        ),
    ]


def _middle(info: EvolutionInfo) -> Any:
    i = len(info.levels) // 2
    return go.Scatter(
        x=info.x,
        y=info.level(i),
        customdata=info.trials,
        mode="lines+markers",
        line={"color": BLUE, "width": 2.2},
        marker={"size": 5},
        name=percent(info.levels[i]),
        hovertemplate="%{y:.4g} (trial %{customdata})",
    )


def _columns(info: EvolutionInfo) -> Any:
    edges = np.array(info.edges)
    middles = np.sqrt(edges[1:] * edges[:-1]) if info.log else 0.5 * (edges[1:] + edges[:-1])
    return go.Heatmap(
        x=info.x,
        y=[float(f"{v:.6g}") for v in middles],
        z=np.array(info.shares).T.tolist(),
        colorscale=[[0.0, "#ffffff"], [0.02, "#dbe9f6"], [0.25, "#6baed6"], [1.0, "#08306b"]],
        zmin=0,
        colorbar={"title": {"text": "% of entries"}},
        hovertemplate=f"{info.axis.lower()} %{{x}}, near %{{y:.4g}}: %{{z}} %<extra></extra>",
    )


def percent(level: float) -> str:
    """A quantile in words."""
    return {0.0: "minimum", 0.5: "median", 1.0: "maximum"}.get(level, f"{100 * level:g} %")
