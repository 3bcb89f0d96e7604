"""Text for a terminal: nothing in it acts on the terminal, and a table fits into its width."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 100
"""Columns, where there is no terminal that has so many."""
_LEAST_WIDTH, _MOST_WIDTH = 60, 140
_GAP = "  "


def width() -> int:
    """Columns of the terminal (or of the environment variable ``COLUMNS``); :data:`WIDTH` in a file or a pipe."""
    return min(max(shutil.get_terminal_size((WIDTH, 24)).columns, _LEAST_WIDTH), _MOST_WIDTH)


def plain(text: str) -> str:
    """``text`` with escapes such as ``\\x1b`` for all but visible characters and the space."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fit(text: str, width: int, right: bool = False) -> str:
    """``text`` in exactly ``width`` columns, cut with an ellipsis if it is longer."""
    if columns(text) > width:
        kept, used = [], 0
        for c in text:
            used += columns(c)
            if used > width - 1:
                break
            kept.append(c)
        text = "".join(kept) + "…"
    space = " " * (width - columns(text))
    return space + text if right else text + space


def columns(text: str) -> int:
    """Columns that a terminal takes for ``text``."""
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@dataclass(frozen=True)
class Column:
    """Of a table.

    Args:
        right: Whether its cells are aligned to the right, as numbers are.
        least: Columns to which it may be cut; ``None`` for never. Of a column that is aligned to the right, only the
            title is cut.
    """

    title: str
    right: bool = False
    least: int | None = None


def table(layout: Sequence[Column], rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Lines of at most :func:`width` columns, the titles first. Cells are made :func:`plain`."""
    cells = [[c.title for c in layout], *([plain(cell) for cell in row] for row in rows)]
    widths = [max(columns(row[i]) for row in cells) for i in range(len(layout))]
    least = [
        c.least
        if c.least is None or not c.right
        else max(c.least, *(columns(row[i]) for row in cells[1:]), 0)
        for i, c in enumerate(layout)
    ]
    room = width() - len(indent) - len(_GAP) * (len(layout) - 1)
    while sum(widths) > room:
        spare = [0 if n is None else w - n for n, w in zip(least, widths, strict=True)]
        widest = max(range(len(layout)), key=lambda i: (spare[i] > 0, widths[i]))
        if spare[widest] <= 0:
            break
        others = sorted((w for w, s in zip(widths, spare, strict=True) if s > 0), reverse=True)[1:]
        step = min(sum(widths) - room, spare[widest])
        if others:
            step = min(step, max(1, widths[widest] - others[0]))
        widths[widest] -= step
    return [
        (
            indent
            + _GAP.join(
                fit(cell, w, c.right) for cell, w, c in zip(row, widths, layout, strict=True)
            )
        ).rstrip()
        for row in cells
    ]
