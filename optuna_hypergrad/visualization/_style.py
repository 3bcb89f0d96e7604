"""One look for all figures: colors that people tell apart, a white ground, little JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._imports import go

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7a4bb5",
    "#8c6d31",
    "#b2182b",
    "#4d4d4d",
)
"""After Okabe & Ito (2008), and a few more."""

BLUE, RED = COLORS[0], COLORS[1]
GRAY, LIGHT, INK, GRID = "#8a8f98", "#c8ccd2", "#24292f", "#e6e8eb"


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def faded(hexadecimal: str, alpha: float) -> str:
    """For plotly, which takes ``rgba(r, g, b, a)``."""
    r, g, b = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha:g})"


def layout(title: str, x: str, y: str, **settings: Any) -> Any:
    """A plotly layout; plotly's own default template would be 7 kB of JSON."""
    axis = {
        "gridcolor": GRID,
        "linecolor": LIGHT,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": LIGHT,
        "automargin": True,
    }
    template = {
        "layout": {
            "font": {"color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "colorway": list(COLORS),
            "xaxis": axis,
            "yaxis": axis,
            "hovermode": "closest",
            "hoverlabel": {"align": "left"},
        }
    }
    return go.Layout(
        title={"text": title},
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}},
        template=template,
    ).update(settings)


def value_axis(log: bool, values: Iterable[float | None]) -> dict[str, Any]:
    """Settings of an axis of values: powers of ten only, where there are several of them."""
    if not log:
        return {"type": "linear", "exponentformat": "power"}
    shown = [v for v in values if v is not None and v > 0]
    wide = bool(shown) and max(shown) >= 100 * min(shown)
    return {"type": "log", "exponentformat": "power"} | (
        {"dtick": 1} if wide and max(shown) < 1e9 * min(shown) else {}
    )


def whole_axis(numbers: Iterable[int]) -> dict[str, Any]:
    """Settings of an axis of steps or trials: no ticks between them."""
    shown = list(numbers)
    return {"dtick": 1} if shown and max(shown) - min(shown) <= 8 else {}


def escaped(text: str) -> str:
    """For plotly, which reads a few HTML tags in any text, and ``%{...}`` in templates."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("%{", "%&#123;")
