"""What a search knows of its space, its score and its study before a trial begins."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import optuna
import sklearn
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from sklearn.base import clone
from sklearn.model_selection._search import BaseSearchCV
from sklearn.utils import check_random_state, get_tags
from sklearn.utils.validation import _num_samples

from .. import _optuna
from ..step_rules import TrustRegion
from ..stores import Retention
from ..studies import HypergradientSampler
from ._adapter import AbstractAdapter, Split
from ._descent import IMPATIENT
from ._distributions import Space
from ._folds import last_step
from ._following import Followed, NotFollowedError
from ._losses import by_name
from ._rows import FrozenSplits, as_indices
from ._study import fingerprint, finished, open_study, quiet
from ._vectors import SAMPLE_WEIGHT, is_sample_weight
from ._weighting import SampleWeighting
from .adapters import adapter_of, known_types
from .tensor_distribution import TensorDistribution

_NOISE = 1.0
"""Losses of exact fits have kinks, and no noise: it takes more of a surprise to be taken for it."""


class StudySearch(BaseSearchCV):  # type: ignore[misc]
    """A search whose trials are those of a study; :class:`HypergradientSearchCV` is the one to use."""

    _data: tuple[Any, Any, dict[str, Any]]
    _routed: Any
    _weighting: SampleWeighting | None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        own = get_tags(self.estimator)
        tags.target_tags = copy.deepcopy(own.target_tags)
        tags.input_tags.allow_nan = own.input_tags.allow_nan
        searched = self.param_distributions if isinstance(self.param_distributions, dict) else {}
        if any(isinstance(d, TensorDistribution) for d in searched.values()):
            tags.input_tags.sparse = False  # adapters take dense data
        return tags

    def _weighting_of(self, space: Space) -> SampleWeighting | None:
        """Of the fits, where sample weights are searched."""
        _, prefix = last_step(self.estimator)
        for name in space.vectors:
            if not is_sample_weight(self.estimator, name):
                continue
            if sklearn.get_config()["enable_metadata_routing"]:
                raise ValueError(
                    f"{name!r} is searched, and goes to fit without being routed: use "
                    "sklearn.config_context(enable_metadata_routing=False)."
                )
            return SampleWeighting(name, f"{prefix}{SAMPLE_WEIGHT}", self._routed.estimator.fit)
        return None

    def _get_routed_params_for_fit(self, params: dict[str, Any]) -> Any:
        routed = super()._get_routed_params_for_fit(params)
        if self._routed is None:  # the one that fits and the refit read
            self._routed = routed
        return routed

    def _select_best_index(self, refit: Any, refit_metric: str, results: dict[str, Any]) -> int:
        index = int(super()._select_best_index(refit, refit_metric, results))
        if self._weighting is not None:
            self._weighting.put_back(index)
        return index

    def _distributions(self) -> dict[str, Any]:
        if isinstance(self.param_distributions, dict):
            return self.param_distributions
        leaf, prefix = last_step(self.estimator)
        adapter = adapter_of(leaf)
        if adapter is None:
            raise ValueError(
                f'param_distributions="auto" knows the usual ranges of {", ".join(known_types())}, not of '
                f"{type(leaf).__name__}; give a distribution by parameter name."
            )
        return {prefix + name: usual for name, usual in adapter.usual.items()}

    def _metric(self) -> str:
        """The score that is searched for, as ``cv_results_`` names it: of several the first, if ``refit`` names none."""
        if isinstance(self.refit, str):
            return self.refit
        if isinstance(self.scoring, (set, frozenset)):
            return str(min(self.scoring))
        if isinstance(self.scoring, (list, tuple, dict)):
            return str(next(iter(self.scoring)))
        return "score"

    def _scoring(self, metric: str) -> Any:
        """The score of this name, as ``scoring`` gives it."""
        if metric == "score":
            return self.scoring
        return self.scoring.get(metric) if isinstance(self.scoring, dict) else metric

    def _splits(self) -> list[Split]:
        X, y, params = self._data
        routed = self._get_routed_params_for_fit(params).splitter.split
        splits = as_indices(self._checked_cv_orig.split(X, y, **routed), _num_samples(X))
        if self.resume:
            again = as_indices(self._checked_cv_orig.split(X, y, **routed), _num_samples(X))
            if not all(np.array_equal(a[1], b[1]) for a, b in zip(splits, again, strict=True)):
                raise ValueError(
                    f"resume=True continues a study of the same splits, and cv={self.cv!r:.80} gives others each time; give "
                    f"it a random_state."
                )
        return splits

    def _follow(self, space: Space, metric: str, splits: list[Split]) -> Followed | None:
        """What hypergradients follow, or ``None``; :attr:`followed_` says it in words."""
        try:
            followed = self._followed(space, metric, splits)
        except NotFollowedError as reason:
            if space.vectors:
                raise ValueError(
                    f"{', '.join(map(repr, space.vectors))} can only be searched by hypergradients: {reason}."
                ) from reason
            self.followed_ = f"the score, without hypergradients: {reason}"
            return None
        near = "" if followed.loss.is_score else ", which stands for the score"
        moved = ", ".join(followed.names)
        self.followed_ = f"{followed.loss.label}{near}, by the hypergradients of {moved}"
        return followed

    def _followed(
        self, space: Space, metric: str, splits: list[Split], warm: bool = True
    ) -> Followed:
        leaf, prefix = last_step(self.estimator)
        adapter: AbstractAdapter | None = adapter_of(leaf)
        X, y, params = self._data
        if adapter is None:
            raise NotFollowedError(f"there is no adapter for {type(leaf).__name__}")
        if self.sampler is not None and not _optuna.find_sampler(
            self.sampler, HypergradientSampler
        ):
            raise NotFollowedError(f"{type(self.sampler).__name__} takes none")
        if y is None:
            raise NotFollowedError("there are no targets")
        routed = self._get_routed_params_for_fit(params)
        given, scored = dict(routed.estimator.fit), dict(routed.scorer.score)
        weights = given.pop(f"{prefix}sample_weight", None)
        weighted = weights is not None and scored.get("sample_weight") is weights
        if given or scored.keys() - ({"sample_weight"} if weighted else set()):
            names = ", ".join(sorted({*given, *scored}))
            raise NotFollowedError(f"fit or the score are given {names}")
        loss = adapter.followed_loss(by_name(self._scoring(metric)))
        return Followed(
            *(adapter, self.estimator, space, loss, X, y, splits, weights, weighted),
            warm=warm and not self.resume,
        )

    def _open(self, space: Space, splits: FrozenSplits, follows: bool) -> Study:
        if self.resume and (self.storage is None or self.study_name is None):
            raise ValueError("resume=True needs storage= and study_name= to find the study again.")
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        if follows or self.sampler is not None:
            self._sampler_with = functools.partial(self._sampler, seed, bool(space.vectors))
            sampler = self._sampler_with()
        else:
            sampler = TPESampler(seed=seed)
        self._seed = None if follows or self.sampler is not None else seed
        digest = ""
        if self.storage is not None:
            digest = self._digest(space, splits, follows)
        direction: Literal["minimize", "maximize"] = "minimize" if follows else "maximize"
        with quiet(self.verbose):
            return open_study(
                self.storage, self.study_name, sampler, direction, digest, self.resume
            )

    def _sampler(self, seed: int, of_vectors: bool, **settings: float) -> BaseSampler:
        """The user's, or one whose rule has these settings.

        Where numbers alone are searched, descents end when they creep, and each begins where a scan says.
        """
        if self.sampler is not None:
            own: BaseSampler = copy.deepcopy(self.sampler)
            return own
        kept = Retention(best=self.n_rescored, every=0)
        usual = {} if of_vectors else IMPATIENT
        rule = TrustRegion(**{"noise": _NOISE, **usual, **settings})
        shown = self.storage is not None  # nobody else sees a study in memory
        return HypergradientSampler(
            seed=seed,
            retention=kept,
            optimizer=rule,
            publish=shown,
            start="init" if of_vectors else "given",
        )

    def _digest(self, space: Space, splits: FrozenSplits, follows: bool) -> str:
        """Of all that a trial's value depends on but its parameters."""
        estimator, scoring = clone(self.estimator), self.scoring
        if callable(scoring):
            scoring = f"{getattr(scoring, '__module__', '')}.{getattr(scoring, '__qualname__', repr(scoring))}"
        settings = type(estimator).__qualname__, estimator.get_params(deep=True), scoring
        followed = self.followed_ if follows else ""
        searched = {k: repr(d) for k, d in [*space.items(), *space.vectors.items()]}
        if space.vectors:
            searched["guard="] = repr(self.guard)
        try:
            return fingerprint(*settings, followed, searched, *self._data, splits.splits)
        except Exception as error:
            if self.resume:
                raise ValueError(
                    f"resume=True has to tell whether data and settings are the same, and they cannot be compared: {error}"
                ) from error
            return ""

    def _reseeding(self, study: Study) -> list[Callable[[Study, optuna.trial.FrozenTrial], None]]:
        """Where nobody named a sampler, TPE is seeded by the number of each trial: a resumed search is the same search."""
        if self._seed is None:
            return []
        seed = self._seed

        def seeded(study: Study, number: int) -> None:
            study.sampler = _optuna.seeded_copy(TPESampler(), [seed, number])

        seeded(study, len(finished(study)))
        return [lambda study, trial: seeded(study, trial.number + 1)]
