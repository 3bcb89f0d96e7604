"""What estimates cost, and how far off they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import _optuna
from ._imports import go, imports
from ._style import color, escaped, layout, value_axis

if TYPE_CHECKING:
    import plotly

TITLE = "Cost against Error"
COST, ERROR = "Cost", "Relative error"
Records = Any
"""See :func:`plot_cost_against_error`."""


@dataclass(frozen=True)
class CostsInfo:
    """By method: its points, the cheapest first."""

    lines: dict[str, tuple[list[float], list[float]]]

    @property
    def costs(self) -> list[float]:
        return [c for costs, _ in self.lines.values() for c in costs]

    @property
    def errors(self) -> list[float]:
        return [e for _, errors in self.lines.values() for e in errors]


def read_costs(records: Records, label: str, cost: str, error: str) -> CostsInfo:
    """What :func:`plot_cost_against_error` shows; says so where that is nothing or not all."""
    points: dict[str, list[tuple[float, float]]] = {}
    left_out = 0
    for name, c, e in _rows(records, label, cost, error):
        if 0 < c < math.inf and 0 < e < math.inf:
            points.setdefault(name, []).append((c, e))
        else:
            left_out += 1
    if left_out:
        _optuna.logger.warning(
            f"{left_out} records have a cost or an error that is not finite or not above 0, and no place on "
            "logarithmic axes. They are left out."
        )
    elif not points:
        _optuna.logger.warning("There are no records of costs and errors.")
    lines = {n: tuple(map(list, zip(*sorted(p), strict=True))) for n, p in points.items()}
    return CostsInfo(lines)  # type: ignore[arg-type]


def _rows(
    records: Records, label: str, cost: str, error: str
) -> Iterable[tuple[str, float, float]]:
    if hasattr(records, "to_dict") and hasattr(records, "columns"):
        records = records.to_dict("records")
    if isinstance(records, Mapping):
        for name, pairs in records.items():
            for pair in pairs:
                if len(pair) != 2:
                    raise ValueError(
                        f"plot_cost_against_error takes pairs (cost, error) of {name!r}, got {pair!r:.80}."
                    )
                yield str(name), float(pair[0]), float(pair[1])
        return
    for record in records:
        missing = [k for k in (label, cost, error) if k not in record]
        if missing:
            raise ValueError(
                f"plot_cost_against_error needs {', '.join(map(repr, missing))} in each record, which has "
                f"{', '.join(map(repr, list(record)[:8]))}: say what they are called (label=, cost=, error=)."
            )
        yield str(record[label]), float(record[cost]), float(record[error])


def plot_cost_against_error(
    records: Records,
    *,
    label: str = "label",
    cost: str = "cost",
    error: str = "error",
    cost_name: str = COST,
    error_name: str = ERROR,
) -> plotly.graph_objects.Figure:
    """Plot what estimates cost against how far off they are, one line for each method, on logarithmic axes.

    Example::

        from optuna_hypergrad.visualization import plot_cost_against_error

        plot_cost_against_error({"CG": [(10, 0.3), (20, 0.01)], "Neumann": [(10, 0.5), (20, 0.2)]}).show()

    Args:
        records: By method, pairs ``(cost, error)``; or one dict for each point, or a pandas ``DataFrame``.
        label: What the method is called in such a dict or table.
        cost: Likewise, of a point.
        error: Likewise.
        cost_name: On the axis: ``"Gradient evaluations"``.
        error_name: On the axis.

    Returns:
        A figure; an empty one, with a warning, where there are no points.

    Raises:
        ValueError: for records that lack something.
        ImportError: if plotly is not installed.
    """
    imports.check()
    info = read_costs(records, label, cost, error)
    figure = go.Figure(layout=layout(TITLE, escaped(cost_name), escaped(error_name)))
    for i, (name, (costs, errors)) in enumerate(info.lines.items()):
        figure.add_scatter(
            x=costs,
            y=errors,
            mode="lines+markers" if len(costs) <= 40 else "lines",
            line={"color": color(i), "width": 1.8},
            marker={"size": 6},
            name=escaped(name),
            hovertemplate="%{x:.4g}: %{y:.3g}",
        )
    figure.update_xaxes(value_axis(True, info.costs))
    figure.update_yaxes(value_axis(True, info.errors))
    return figure.update_layout(showlegend=bool(info.lines))
