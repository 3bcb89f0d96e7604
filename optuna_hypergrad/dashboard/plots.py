"""Three small figures on the study's page: trajectories, norms of hypergradients, the largest tensor over outer steps.

In the format of ``optuna_dashboard/_custom_plot_data.py``: plotly's JSON in a study's system attribute, which the
dashboard sends whole each time it asks. It cuts the JSON into many attributes; one is enough where it fits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from ..stores import MAX_ATTRIBUTE_BYTES
from .findings import Findings

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PREFIX = "dashboard:plot_data:"
TRAJECTORIES, NORMS, TENSOR = "hypergrad-trajectories", "hypergrad-norms", "hypergrad-tensor"
MAX_BYTES = 30_000
"""Of one figure; a larger one is left out."""
_PIECE_LENGTH = MAX_ATTRIBUTE_BYTES // 2  # quotes are escaped where it is stored


def drawn(study: Study, trials: Sequence[FrozenTrial], findings: Findings) -> dict[str, str]:
    """Those figures of a study that there is something in, as JSON by identifier; none without plotly.

    Args:
        trials: All of the study's, as they are to be shown.
    """
    if importlib.util.find_spec("plotly") is None:
        return {}
    view = _optuna.ViewStudy.of(study, trials)
    found = {name: figure.to_json() for name, figure in _figures(view, findings)}
    return {name: text for name, text in found.items() if len(text) <= MAX_BYTES}


def _figures(study: Study, findings: Findings) -> Iterator[tuple[str, Figure]]:
    from ..visualization import (
        plot_hypergradient_norms,
        plot_tensor_evolution,
        plot_trajectories,
    )

    yield TRAJECTORIES, plot_trajectories(study)
    yield NORMS, plot_hypergradient_norms(study)
    if findings.summaries:
        yield TENSOR, plot_tensor_evolution(study, next(iter(findings.summaries)))


def changed(known: Mapping[str, Any], figures: Mapping[str, str]) -> dict[str, Any]:
    """The attributes that show ``figures``, and nothing else of ours."""
    found: dict[str, Any] = {}
    for name, text in figures.items():
        pieces = [text[i : i + _PIECE_LENGTH] for i in range(0, len(text), _PIECE_LENGTH)]
        found |= {f"{PREFIX}{name}:{i}": piece for i, piece in enumerate(pieces)}
        found |= {k: "" for k in known if k.startswith(f"{PREFIX}{name}:") and k not in found}
    return found
