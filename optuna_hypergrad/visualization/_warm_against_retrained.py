"""What warm-started runs claimed, and what training again with their hyperparameters gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.study import Study
from optuna.trial import FrozenTrial

from .. import _optuna
from .._words import shortened
from ..trial_attributes import RETRAINED_VALUE
from ._curves import VALUES_OF_A_RUN, finite, is_run, number, thinned
from ._imports import go, imports
from ._style import BLUE, GRAY, escaped, layout

if TYPE_CHECKING:
    import plotly

TITLE, RETRAINED = "Warm against Retrained", "Retrained value"
DIAGONAL = "Equal"
_MOST = 500


@dataclass(frozen=True)
class Pair:
    """One trial: its value at the end of the run, and that of its hyperparameters in a new training."""

    trial: int
    during: float
    retrained: float
    words: str


@dataclass(frozen=True)
class PairsInfo:
    """What the figure shows. ``kind`` is what the values during the runs are: warm or cold."""

    kind: str
    pairs: list[Pair]

    @property
    def ends(self) -> tuple[float, float]:
        """Of the diagonal."""
        numbers = [v for p in self.pairs for v in (p.during, p.retrained)]
        return min(numbers), max(numbers)


def read_pairs(study: Study) -> PairsInfo:
    """What :func:`plot_warm_against_retrained` shows; says so where that is nothing or not all."""
    trials = [t for t in _optuna.all_trials(study) if is_run(t) and t.state.is_finished()]
    found = [(kind, pair) for t in trials for kind, pair in _pair(t)]
    if not found:
        _optuna.logger.warning(
            f"Study {study.study_name!r} does not have any retrained values: they come from "
            'minimize_bilevel(..., trial=trial, final_eval="retrain").'
        )
    elif len(found) < len(trials):
        _optuna.logger.warning(
            f"{len(trials) - len(found)} of {len(trials)} runs of study {study.study_name!r} have no retrained value "
            "and are left out."
        )
    kinds = sorted({kind for kind, _ in found})
    pairs = [pair for _, pair in found]
    return PairsInfo(
        " or ".join(reversed(kinds)) or "warm", [pairs[i] for i in thinned(len(pairs), _MOST)]
    )


def _pair(trial: FrozenTrial) -> list[tuple[str, Pair]]:
    retrained = trial.user_attrs.get(RETRAINED_VALUE)
    for attribute in VALUES_OF_A_RUN:
        during = trial.user_attrs.get(attribute)
        if finite(during) and finite(retrained):
            words = ", ".join(f"{n}={number(v)}" for n, v in trial.params.items())
            pair = Pair(trial.number, float(during), float(retrained), shortened(words, 120))  # type: ignore[arg-type]
            return [(attribute.partition("_")[0], pair)]
    return []


def plot_warm_against_retrained(study: Study) -> plotly.graph_objects.Figure:
    """Plot what each bilevel run ended with against what its hyperparameters gave in a training from scratch.

    A warm-started run flatters itself: its hyperparameters were tuned to the weights that it had. How far points
    are from the diagonal says by how much.

    Reference: Vicol, Lorraine, Pedregosa, Duvenaud & Grosse (2022), "On implicit bias in overparameterized bilevel
    optimization".

    Example::

        from optuna_hypergrad.visualization import plot_warm_against_retrained

        plot_warm_against_retrained(study).show()

    Args:
        study: Whose trials are runs of ``minimize_bilevel(..., trial=trial, final_eval="retrain")``.

    Returns:
        A figure; an empty one, with a warning, where no run was retrained.

    Raises:
        ImportError: if plotly is not installed.
    """
    imports.check()
    info = read_pairs(study)
    figure = go.Figure(layout=layout(TITLE, f"{info.kind.capitalize()} value", RETRAINED))
    if not info.pairs:
        return figure
    figure.add_scatter(
        x=list(info.ends),
        y=list(info.ends),
        mode="lines",
        line={"color": GRAY, "dash": "dot", "width": 1},
        name=DIAGONAL,
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[p.during for p in info.pairs],
        y=[p.retrained for p in info.pairs],
        customdata=[[p.trial, escaped(p.words)] for p in info.pairs],
        mode="markers",
        marker={"color": BLUE, "size": 9, "line": {"color": "white", "width": 1}},
        name="Trials",
        hovertemplate="trial %{customdata[0]}: %{x:.6g}, retrained %{y:.6g}<br>%{customdata[1]}<extra></extra>",
    )
    return figure
