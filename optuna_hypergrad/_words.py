"""Names and numbers in sentences."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence


def shortened(text: str, limit: int = 80) -> str:
    """``text``, or what fits of it."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(repr(shortened(n)) for n in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def nearest(name: str | None, known: Collection[str]) -> str:
    """In parentheses, what may have been meant, or nothing."""
    close = difflib.get_close_matches(name or "", known, n=1)
    return f" (did you mean {shortened(close[0])!r}?)" if close else ""


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in words: ``0, 4 to 7, 9``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    told = [
        str(p[0]) if len(p) == 1 else f"{p[0]}, {p[1]}" if len(p) == 2 else f"{p[0]} to {p[-1]}"
        for p in parts
    ]
    return ", ".join(told)
