"""Three small figures on the study's page: trajectories, norms of hypergradients, the largest tensor over outer steps.

In the format of ``optuna_dashboard/_custom_plot_data.py``: plotly's JSON in a study's system attribute, which the
dashboard sends whole each time it asks. It cuts the JSON into many attributes; one is enough where it fits.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._errors import HypergradError
from ..stores import MAX_ATTRIBUTE_BYTES, TensorStore
from .findings import Findings

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PREFIX = "dashboard:plot_data:"
TRAJECTORIES, NORMS, TENSOR = "hypergrad-trajectories", "hypergrad-norms", "hypergrad-tensor"
MAX_BYTES = 30_000
"""Of one figure; a larger one is left out."""
NOTHING = (
    '{"data": [], "layout": {"title": {"text": "Nothing to draw, or too much for this page"}}}'
)
"""In place of a figure that was there: it would go on to show the study as it once was."""
_PIECE_LENGTH = MAX_ATTRIBUTE_BYTES // 2  # quotes are escaped where it is stored


def drawn(
    study: Study, trials: Sequence[FrozenTrial], findings: Findings, store: TensorStore | None
) -> dict[str, str]:
    """The figures of a study as JSON by identifier, :data:`NOTHING` where there is nothing in one; none without plotly.

    Args:
        trials: All of the study's, as they are to be shown.
        store: Of its tensors; ``None`` where there are none.
    """
    if importlib.util.find_spec("plotly") is None:
        return {}
    view = _optuna.ViewStudy.of(study, trials)
    found = dict.fromkeys((TRAJECTORIES, NORMS, TENSOR), NOTHING)
    with _in_silence():
        for name, draw in _figures(view, findings, store).items():
            try:
                figure = draw()
            except HypergradError as error:
                _optuna.logger.debug(f"{name}: not drawn ({error})")
                continue
            text = figure.to_json()
            if figure.data and len(text) <= MAX_BYTES:
                found[name] = text
    return found


def _figures(
    study: Study, findings: Findings, store: TensorStore | None
) -> dict[str, Callable[[], Figure]]:
    from ..visualization import (
        plot_hypergradient_norms,
        plot_tensor_evolution,
        plot_trajectories,
    )

    figures: dict[str, Callable[[], Figure]] = {
        TRAJECTORIES: lambda: plot_trajectories(study),
        NORMS: lambda: plot_hypergradient_norms(study),
    }
    if findings.summaries and store is not None:
        largest = next(iter(findings.summaries))
        figures[TENSOR] = lambda: plot_tensor_evolution(study, largest, tensor_store=store)
    return figures


@contextmanager
def _in_silence() -> Iterator[None]:
    """Nobody has asked for these figures: what they would say of what they lack is not said in this thread."""
    here = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != here or record.levelno <= logging.DEBUG

    _optuna.logger.addFilter(passes)
    try:
        yield
    finally:
        _optuna.logger.removeFilter(passes)


def changed(known: Mapping[str, Any], figures: Mapping[str, str]) -> dict[str, Any]:
    """The attributes that show ``figures``."""
    found: dict[str, Any] = {}
    for name, text in figures.items():
        if text == NOTHING and not known.get(f"{PREFIX}{name}:0"):
            continue
        pieces = [text[i : i + _PIECE_LENGTH] for i in range(0, len(text), _PIECE_LENGTH)]
        found |= {f"{PREFIX}{name}:{i}": piece for i, piece in enumerate(pieces)}
        found |= {k: "" for k in known if k.startswith(f"{PREFIX}{name}:") and k not in found}
    return found
