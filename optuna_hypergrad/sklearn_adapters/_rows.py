"""True scores: fits by scikit-learn on the folds, a row of ``cv_results_`` each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, Trial

from ._adapter import Split
from ._weighting import SampleWeighting


class FailedTrialError(ValueError):
    """A setting cannot be fitted; ``args`` say why."""


def as_indices(splits: Iterable[tuple[Any, Any]], num_samples: int) -> list[Split]:
    """Splits as arrays of indices from 0 on, where a user's own are lists, masks, or counted from the end.

    Raises:
        ValueError: for a mask of another length.
    """

    def of(given: Any) -> np.ndarray:
        part = np.asarray(given)
        if part.dtype == bool:
            if len(part) != num_samples:
                raise ValueError(
                    f"cv= has a mask of {len(part)} samples, and there are {num_samples}."
                )
            return np.flatnonzero(part)
        if not part.size:
            return part.astype(np.intp)
        return np.where(part < 0, part + num_samples, part) if part.min() < 0 else part

    return [(of(train), of(test)) for train, test in splits]


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
        weighting: Passes sample weights that are searched to the fits.

    Attributes:
        numbers: Of the trials that have a row.
        scores: Mean test scores, a row each.
    """

    def __init__(
        self,
        evaluate: Callable[..., dict[str, Any]],
        splits: FrozenSplits,
        metric: str,
        weighting: SampleWeighting | None = None,
    ) -> None:
        self._evaluate, self._splits, self._metric = evaluate, splits, metric
        self._weighting = weighting
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
            ValueError: if there are several scores, and none of them has the name of the one that counts.
        """
        numbers = [t.number for t in trials]
        more: dict[str, Any] = {"trial_number": numbers}
        if losses is not None:
            more["followed_loss"] = list(losses)
        if self._weighting is None:
            self._add(list(settings), more)
        else:
            for i, setting in enumerate(settings):
                row = {k: v[i : i + 1] for k, v in more.items()}
                self._add([self._weighting.taken_from(setting)], row)
        self._metric = self._resolved()
        self.numbers += numbers
        self.scores = [float(s) for s in self._results[f"mean_test_{self._metric}"]]

    def _resolved(self) -> str:
        """The name of the score that counts: what a callable returns is known now only."""
        found = [k[10:] for k in self._results if k.startswith("mean_test_")]
        if self._metric in found:
            return self._metric
        if found == ["score"] or self._metric == "score":  # refit names none
            return found[0]
        raise ValueError(
            "For multi-metric scoring, the parameter refit must be set to a scorer key or a callable to refit an "
            f"estimator, and refit={self._metric!r} is none of {sorted(found)}."
        )

    def _add(self, settings: list[dict[str, Any]], more: dict[str, Any]) -> None:
        try:
            self._results = self._evaluate(settings, cv=self._splits, more_results=more)
        except ValueError as error:
            if "fits failed" not in str(error):
                raise
            raise FailedTrialError(str(error)) from error

    def last_split_scores(self) -> list[float]:
        """Of the folds of the last row."""
        splits = range(self._splits.get_n_splits())
        return [float(self._results[f"split{i}_test_{self._metric}"][-1]) for i in splits]


def distinct(
    trials: Iterable[tuple[FrozenTrial, dict[str, Any]]], at_most: int
) -> list[tuple[FrozenTrial, dict[str, Any]]]:
    """Those whose settings differ, to two digits, from those of the ones before."""
    found: dict[str, tuple[FrozenTrial, dict[str, Any]]] = {}
    for trial, setting in trials:
        shown = {k: _rounded(v) for k, v in setting.items()}
        found.setdefault(repr(sorted(shown.items())), (trial, setting))
        if len(found) == at_most:
            break
    return list(found.values())


def _rounded(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:.2g}"
    if isinstance(value, np.ndarray):
        return " ".join(map(_rounded, value.tolist()))
    if isinstance(value, dict):
        return repr({k: _rounded(v) for k, v in value.items()})
    return repr(value)
