"""Which trial of a study is the best: one rule for its note, its figures and its tensors."""

from __future__ import annotations

from collections.abc import Iterable

from optuna.trial import FrozenTrial, TrialState

from ..stores._retention import is_feasible


def ranked(trials: Iterable[FrozenTrial], sign: float) -> list[FrozenTrial]:
    """Complete trials, the best first: feasible ones before others, earlier ones before as good ones.

    Args:
        sign: 1 where the one objective is minimized, -1 where it is maximized.
    """
    complete = [t for t in trials if t.state is TrialState.COMPLETE and t.values is not None]
    return sorted(complete, key=lambda t: (not is_feasible(t), sign * t.values[0], t.number))
