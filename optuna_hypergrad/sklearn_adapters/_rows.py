"""True scores: fits by scikit-learn on the folds, a row of ``cv_results_`` each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, Trial

from ._adapter import Split


class FailedTrialError(ValueError):
    """A setting cannot be fitted; ``args`` say why."""


class FrozenSplits:
    """Splits that were made before, in the place of a splitter."""

    def __init__(self, splits: list[Split]) -> None:
        self.splits = splits

    def split(self, *args: Any, **kwargs: Any) -> Iterator[Split]:
        return iter(self.splits)

    def get_n_splits(self, *args: Any, **kwargs: Any) -> int:
        return len(self.splits)


class Rows:
    """Evaluates settings by scikit-learn.

    Args:
        evaluate: What ``BaseSearchCV`` gives to ``_run_search``.
        splits: Of all trials.
        metric: The score that counts, as ``cv_results_`` names it.

    Attributes:
        numbers: Of the trials that have a row.
        scores: Mean test scores, a row each.
    """

    def __init__(
        self, evaluate: Callable[..., dict[str, Any]], splits: FrozenSplits, metric: str
    ) -> None:
        self._evaluate, self._splits, self._metric = evaluate, splits, metric
        self._results: dict[str, Any] = {}
        self.numbers: list[int] = []
        self.scores: list[float] = []

    def add(
        self,
        trials: Sequence[Trial | FrozenTrial],
        settings: Sequence[dict[str, Any]],
        losses: Sequence[float] | None = None,
    ) -> None:
        """Fit and score ``settings``, those of ``trials``.

        Args:
            losses: The followed losses, which are shown beside the scores.

        Raises:
            FailedTrialError: if every fit failed.
            ValueError: if there are several scores, and none of them counts.
        """
        numbers = [t.number for t in trials]
        more: dict[str, Any] = {"trial_number": numbers}
        if losses is not None:
            more["followed_loss"] = list(losses)
        try:
            self._results = self._evaluate(list(settings), cv=self._splits, more_results=more)
        except ValueError as error:
            if "fits failed" not in str(error):
                raise
            raise FailedTrialError(str(error)) from error
        key = f"mean_test_{self._metric}"
        if key not in self._results:
            found = sorted(k[10:] for k in self._results if k.startswith("mean_test_"))
            raise ValueError(
                f"scoring gives several scores ({found}); name the one to search for by refit=."
            )
        self.numbers += numbers
        self.scores = [float(s) for s in self._results[key]]

    def last_split_scores(self) -> list[float]:
        """Of the folds of the last row."""
        splits = range(self._splits.get_n_splits())
        return [float(self._results[f"split{i}_test_{self._metric}"][-1]) for i in splits]


def distinct(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those whose parameters differ, to two digits, from those of the ones before."""
    found: dict[str, FrozenTrial] = {}
    for trial in trials:
        shown = {
            k: f"{v:.2g}" if isinstance(v, (float, np.floating)) else repr(v)
            for k, v in trial.params.items()
        }
        found.setdefault(repr(sorted(shown.items())), trial)
    return list(found.values())
