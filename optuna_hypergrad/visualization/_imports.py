"""Plotly, if it is installed. What is missing is told when a figure is drawn."""

from __future__ import annotations

import importlib
from typing import Any

from .._optuna import try_import

go: Any = None
with try_import() as imports:
    go = importlib.import_module("plotly.graph_objects")

__all__ = ["go", "imports", "is_available"]


def is_available() -> bool:
    """Whether these figures can be drawn: plotly is installed."""
    return bool(imports.is_successful())
