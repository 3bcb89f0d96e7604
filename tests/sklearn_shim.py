"""Stand-ins for ``GridSearchCV`` and ``RandomizedSearchCV`` that are searches of ours: the same arguments, the same points in the same order."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from sklearn.model_selection import ParameterGrid, ParameterSampler

from optuna_hypergrad.sklearn_adapters import HypergradientSearchCV


class Points(BaseSampler):
    """Goes through given points; values are places in the lists of choices."""

    def __init__(self, places: list[dict[str, int]]) -> None:
        self.places = places

    def infer_relative_search_space(self, *args: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, *args: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Any, trial: Any, name: str, distribution: BaseDistribution
    ) -> Any:
        assert isinstance(distribution, CategoricalDistribution)
        return distribution.choices[self.places[trial.number][name]]


class _Ours(HypergradientSearchCV):
    """A search of ours that is given all of its points."""

    def _points(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _search(self, evaluate_candidates: Any) -> None:
        points = self._points()
        choices: dict[str, list[Any]] = {}
        places: list[dict[str, int]] = []
        for point in points:
            places.append({})
            for name, value in point.items():
                known = choices.setdefault(name, [])
                known.append(value)
                places[-1][name] = len(known) - 1
        kept = self.__dict__.copy()
        self.param_distributions, self.n_trials = choices, len(points)
        self.sampler = Points(places)
        try:
            super()._search(evaluate_candidates)
        finally:
            for name in ("param_distributions", "n_trials", "sampler"):
                self.__dict__[name] = kept[name]


class GridSearchCV(_Ours):
    def __init__(
        self,
        estimator: Any,
        param_grid: Any,
        *,
        scoring: Any = None,
        n_jobs: Any = None,
        refit: Any = True,
        cv: Any = None,
        verbose: int = 0,
        pre_dispatch: Any = "2*n_jobs",
        error_score: Any = np.nan,
        return_train_score: bool = False,
    ) -> None:
        super().__init__(
            estimator,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            error_score=error_score,
            return_train_score=return_train_score,
        )
        self.param_grid = param_grid

    def _points(self) -> list[dict[str, Any]]:
        return list(ParameterGrid(self.param_grid))


class RandomizedSearchCV(_Ours):
    def __init__(
        self,
        estimator: Any,
        param_distributions: Any,
        *,
        n_iter: int = 10,
        scoring: Any = None,
        n_jobs: Any = None,
        refit: Any = True,
        cv: Any = None,
        verbose: int = 0,
        pre_dispatch: Any = "2*n_jobs",
        random_state: Any = None,
        error_score: Any = np.nan,
        return_train_score: bool = False,
    ) -> None:
        super().__init__(
            estimator,
            param_distributions,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            random_state=random_state,
            error_score=error_score,
            return_train_score=return_train_score,
        )
        self.n_iter = n_iter

    def _points(self) -> list[dict[str, Any]]:
        return list(
            ParameterSampler(self.param_distributions, self.n_iter, random_state=self.random_state)
        )


def swapped(source: str) -> str:
    """The module's source, in which the two names are ours."""
    for name in ("GridSearchCV", "RandomizedSearchCV"):
        line = f"    {name},\n"
        assert source.count(line) >= 1
        source = source.replace(line, "", 1)
    source = source.replace("@pytest.mark.thread_unsafe\n", "")  # a marker of theirs
    return source.replace(
        "from sklearn.model_selection import (",
        "from sklearn_shim import GridSearchCV, RandomizedSearchCV\nfrom sklearn.model_selection import (",
        1,
    )
