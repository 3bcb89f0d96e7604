"""Matplotlib, if it is installed. What is missing is told when a figure is drawn."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..._optuna import try_import
from .._style import COLORS, GRID, INK, LIGHT

plt: Any = None
with try_import() as imports:
    from cycler import cycler

    plt = importlib.import_module("matplotlib.pyplot")
    from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["imports", "is_available", "legend", "new_axes", "plain", "plt", "room", "whole_axis"]


def is_available() -> bool:
    """Whether these figures can be drawn: Matplotlib is installed."""
    return bool(imports.is_successful())


def new_axes(
    ax: Axes | None, title: str, x: str, y: str, size: tuple[float, float] = (7.2, 4.0)
) -> Axes:
    """``ax``, or axes of a new figure, with titles; Matplotlib's settings stay as they are."""
    if ax is None:
        ax = _axes_of_a_new_figure(size)
    ax.set_prop_cycle(cycler(color=COLORS))
    ax.set_title(plain(title), fontsize="large", color=INK)
    ax.set_xlabel(plain(x), color=INK)
    ax.set_ylabel(plain(y), color=INK)
    ax.grid(True, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(LIGHT)
    ax.tick_params(color=LIGHT, labelcolor=INK)
    return ax


def _axes_of_a_new_figure(size: tuple[float, float]) -> Axes:
    figure: Figure = plt.figure(figsize=size, layout="constrained")
    return figure.add_subplot()


def plain(text: str) -> str:
    """Text as it is, for Matplotlib, which would read formulas between dollar signs."""
    return text.replace("$", r"\$")


def whole_axis(ax: Axes, numbers: Iterable[int]) -> None:
    """No ticks between whole numbers on the horizontal axis."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = set(numbers)
    if len(shown) == 1:
        (number,) = shown
        ax.set_xlim(number - 1, number + 1)


def legend(ax: Any) -> None:
    """Beside the axes, where it hides nothing."""
    ax.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def room(ax: Axes, values: Iterable[float], log: bool, axis: str = "y") -> None:
    """Limits of an axis where all ``values`` are one, for which Matplotlib has none."""
    shown = {v for v in values if math.isfinite(v) and (v > 0 or not log)}
    if len(shown) == 1:
        (value,) = shown
        width = 0.1 * abs(value) or 0.1
        ends = (value / 2, value * 2) if log else (value - width, value + width)
        ax.set(**{f"{axis}lim": ends})
