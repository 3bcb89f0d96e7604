"""What a reliability experiment leaves behind: a table beside its script, with the command that made it."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SHOWN = ("optuna", "sqlalchemy", "torch")


def write_table(
    script: str, claim: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()
) -> Path:
    """Write ``<script>.md`` beside ``script`` (give ``__file__``) and print it.

    Args:
        claim: One sentence: what must hold.
        rows: Of the table, all with the keys of the first.
        notes: Further sentences, each a line of its own.
    """
    source = Path(script)
    columns = list(rows[0])
    lines = [
        f"# {claim}",
        "",
        f"`python benchmarks/reliability/{source.name}{''.join(f' {a}' for a in sys.argv[1:])}`, "
        f"{datetime.date.today()}, {_versions()}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows),
    ]
    if notes:
        lines += ["", *(f"* {note}" for note in notes)]
    path = source.with_suffix(".md")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    return path


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _versions() -> str:
    packages = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in _SHOWN)
    return f"Python {platform.python_version()}, {packages}"
