"""What warm-started runs claimed, and what training again with their hyperparameters gave."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.study import Study

from .._style import BLUE, GRAY, INK
from .._warm_against_retrained import DIAGONAL, RETRAINED, TITLE, read_pairs
from ._imports import imports, legend, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBERED = 30


def plot_warm_against_retrained(study: Study, *, ax: Axes | None = None) -> Axes:
    """Plot what each bilevel run ended with against a training from scratch, with Matplotlib.

    See :func:`optuna_hypergrad.visualization.plot_warm_against_retrained` for what is shown.

    Example::

        from optuna_hypergrad.visualization.matplotlib import plot_warm_against_retrained

        plot_warm_against_retrained(study).figure.savefig("retrained.pdf")

    Args:
        study: Whose trials are runs of ``minimize_bilevel(..., trial=trial, final_eval="retrain")``.
        ax: Axes to draw on; ``None`` for a new figure.

    Returns:
        The axes; empty ones, with a warning, where no run was retrained.

    Raises:
        ImportError: if Matplotlib is not installed.
    """
    imports.check()
    info = read_pairs(study)
    ax = new_axes(ax, TITLE, f"{info.kind.capitalize()} value", RETRAINED)
    if not info.pairs:
        return ax
    ax.plot(info.ends, info.ends, ":", color=GRAY, linewidth=1, label=DIAGONAL)
    x, y = [p.during for p in info.pairs], [p.retrained for p in info.pairs]
    ax.plot(x, y, "o", color=BLUE, markersize=6, markeredgecolor="white", label="Trials")
    places: dict[tuple[float, float], list[str]] = {}
    for p in info.pairs:
        places.setdefault((p.during, p.retrained), []).append(str(p.trial))
    for place, trials in places.items() if len(info.pairs) <= _NUMBERED else ():
        told = ", ".join(trials)
        ax.annotate(told, place, (5, 4), textcoords="offset points", fontsize="small", color=INK)
    legend(ax)
    return ax
