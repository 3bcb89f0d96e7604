"""The spectral density of the inner Hessian, out of a probe of the curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...curvature_report import CurvatureReport
from .._spectrum import DENSITY, EIGENVALUE, TITLE, Reports, read_spectra
from .._style import color
from ._imports import imports, legend, new_axes, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_spectrum(report: Reports, *, ax: Axes | None = None) -> Axes:
    """Plot the spectral density of the inner Hessian, on a logarithmic axis, with Matplotlib.

    Example::

        import optuna_hypergrad as ohg
        from optuna_hypergrad.visualization.matplotlib import plot_spectrum

        plot_spectrum(ohg.probe_curvature(problem, w, lam)).figure.savefig("spectrum.pdf")

    Args:
        report: What ``probe_curvature`` returned; or several by name, for comparison.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: for anything else.
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    spectra = read_spectra(report)
    ax = new_axes(ax, TITLE, EIGENVALUE, DENSITY)
    if isinstance(report, CurvatureReport):
        report.plot(ax)
    else:
        for i, one in enumerate(spectra):
            ax.fill_between(one.x, one.floor, one.y, color=color(i), alpha=0.25, linewidth=0)
            ax.plot(one.x, one.y, color=color(i), linewidth=1, label=plain(one.name))
        ax.set_yscale("log")
        legend(ax)
    ax.set_xlabel(EIGENVALUE)
    ax.set_ylabel(DENSITY)
    return ax
