"""The spectral density of the inner Hessian, out of a probe of the curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..curvature_report import CurvatureReport
from ._imports import go, imports
from ._style import INK, color, escaped, faded, layout

if TYPE_CHECKING:
    import plotly

TITLE, EIGENVALUE, DENSITY = "Spectrum", "Eigenvalue of the inner Hessian", "Spectral density"
Reports = CurvatureReport | Mapping[str, CurvatureReport]
_POINTS = 800


@dataclass(frozen=True)
class Spectrum:
    """One density, where it is above the floor, and its eigenvalues that are named."""

    name: str
    x: list[float]
    y: list[float]
    floor: float
    marks: list[tuple[float, str]]


def read_spectra(report: Reports) -> list[Spectrum]:
    """What :func:`plot_spectrum` shows."""
    reports = {"": report} if isinstance(report, CurvatureReport) else report
    if not isinstance(reports, Mapping) or not reports:
        given = "an empty one" if isinstance(reports, Mapping) else type(report).__name__
        raise TypeError(
            f"plot_spectrum takes what probe_curvature returned, or a dict of such by name, not {given}."
        )
    found = []
    for name, one in reports.items():
        if not isinstance(one, CurvatureReport):
            raise TypeError(
                f"plot_spectrum takes what probe_curvature returned, not {type(one).__name__} ({name!r})."
            )
        x, y, floor = one.outline(_POINTS)
        shown = sorted(set(_near(y > floor)))
        found.append(Spectrum(name, _short(x[shown]), _short(y[shown]), floor, one.marks()))
    return found


def _short(numbers: Tensor) -> list[float]:
    return [float(f"{v:.5g}") for v in numbers.tolist()]


def _near(above: object) -> list[int]:
    """Places where a density is above its floor, with those beside them; few are in between."""
    flags = list(map(bool, above))  # type: ignore[call-overload]
    near = range(len(flags))
    return [i for i in near if any(flags[max(i - 1, 0) : i + 2]) or i in (0, len(flags) - 1)]


def plot_spectrum(report: Reports) -> plotly.graph_objects.Figure:
    """Plot the spectral density of the inner Hessian, on a logarithmic axis: its integral is 1.

    Example::

        import optuna_hypergrad as ohg
        from optuna_hypergrad.visualization import plot_spectrum

        plot_spectrum(ohg.probe_curvature(problem, inner_params, outer_params)).show()

    Args:
        report: What ``probe_curvature`` returned; or several by name, for comparison.

    Returns:
        A figure.

    Raises:
        TypeError: for anything else.
        ImportError: if plotly is not installed.
    """
    imports.check()
    spectra = read_spectra(report)
    figure = go.Figure(layout=layout(TITLE, EIGENVALUE, DENSITY))
    for i, spectrum in enumerate(spectra):
        figure.add_scatter(
            x=[spectrum.x[0], *spectrum.x, spectrum.x[-1]],
            y=[spectrum.floor, *spectrum.y, spectrum.floor],
            mode="lines",
            line={"color": color(i), "width": 1.2},
            fill="toself",
            fillcolor=faded(color(i), 0.25),
            name=escaped(spectrum.name),
            hoveron="points",
            hovertemplate="near %{x:.4g}: %{y:.3g}<extra></extra>",
        )
        for value, label in spectrum.marks if len(spectra) == 1 else []:
            figure.add_vline(
                x=value,
                line={"color": INK, "dash": "dot", "width": 1},
                annotation={"text": f"{label}: {value:.3g}", "font": {"size": 11}},
                annotation_position="top left" if label == "largest" else "top right",
            )
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return figure.update_layout(showlegend=len(spectra) > 1)
