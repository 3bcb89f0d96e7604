"""Numbers that mean something, and sentences about those that do not."""

from __future__ import annotations

import numbers


def check_count(owner: str, name: str, value: object, least: int, *, none: bool = False) -> None:
    """Refuse anything but an integer from ``least`` on, or ``None`` if that has a meaning.

    Raises:
        ValueError: naming both.
    """
    if value is None and none:
        return
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (whole and value >= least):  # type: ignore[operator]
        kind = "" if whole else ", an integer"
        end = f"{',' if kind else ''} or None" if none else ""
        raise ValueError(f"{owner} needs {name} >= {least}{kind}{end}, got {value!r:.80}.")


def is_number(value: object) -> bool:
    """Whether it is a real number, NaN included, and no ``bool``."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_budget(owner: str, value: object) -> None:
    """Refuse anything but a positive number of bytes; infinity is one.

    Raises:
        ValueError: naming ``owner``.
    """
    if not (is_number(value) and value > 0):  # type: ignore[operator]
        raise ValueError(f"{owner} needs memory_budget > 0 bytes, a number, got {value!r:.80}.")
