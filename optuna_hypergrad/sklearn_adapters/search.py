"""A scikit-learn search that is an Optuna study, and goes along hypergradients where it can."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.model_selection import check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.utils import check_random_state, get_tags, indexable
from sklearn.utils._param_validation import Interval, StrOptions

from .. import _optuna
from ..check_report import HypergradientReport
from ..step_rules import TrustRegion
from ..stores import Retention
from ..studies import HypergradientSampler, differentiable
from ._adapter import AbstractAdapter, Split
from ._context import SearchContext
from ._distributions import Space, space_of, suggest
from ._folds import last_step
from ._following import Followed, NotFollowedError, one_thread
from ._gradient_check import checked
from ._guarded import guarded_search
from ._nested import can_nest
from ._objective import LOSS, TrialLoss
from ._rows import FrozenSplits, Rows
from ._run import Run
from ._study import completed, fingerprint, finished, open_study, quiet
from ._vectors import SAMPLE_WEIGHT, is_sample_weight
from ._weighting import SampleWeighting
from .adapters import adapter_of, known_types


class HypergradientSearchCV(BaseSearchCV):  # type: ignore[misc]
    """Search over the parameters of an estimator or pipeline by cross-validation, as an Optuna study.

    In place of ``GridSearchCV`` and its siblings: the same attributes after ``fit``, the same metadata routing, any
    estimator. The splits of ``cv`` are made once and are the same for all trials.

    Where the last step is an estimator that an adapter knows (``Ridge``, ``LogisticRegression``), its continuous
    hyperparameters (with a ``FloatDistribution`` without a step, above 0; dense data) move by the hypergradient of a
    cross-validated *loss*: a trial is one evaluation of it with its gradient over all folds. A descent begins at the best of
    about four points that are spread over the space. Transformers before it are fitted once per fold and setting. Everything
    else is left to the sampler's base sampler, in the same study. At the end the best ``n_rescored`` settings are fitted by
    scikit-learn and ranked by the true score. Otherwise a trial is the mean score of scikit-learn's own fits, and the study a
    common one. :attr:`followed_` says which of the two it was, and why.

    *Vectors of hyperparameters* have a :class:`TensorDistribution`: the ``weights`` of a :class:`FeatureWeights` right before
    the last step (penalties or length scales per feature), its ``sample_weight`` (of the training samples in fits, not in
    scores; the refit has them, too), its ``class_weight``, and an ``alpha`` per target of ``Ridge``. They are tensors of the
    study, not parameters, and arrays in ``best_params_`` (``class_weight`` a dict). Many of them fit noise: with
    ``guard="nested"`` they are first tied, all entries of a vector equal, for up to half of the trials; then nested
    cross-validation says whether and how far they may depart from that, by a penalty on the logarithms of the
    departures; then, where it pays, they are free within it. :attr:`nested_` has the estimates. It takes about
    ``n_splits * (n_splits - 1) * 100`` fits of a fold by the adapter; ``guard=None`` does without, and believes what it sees.

    Args:
        estimator: Anything with ``fit``; a pipeline's parameters are named ``step__parameter``.
        param_distributions: By parameter name, one of ``optuna.distributions``, a :class:`TensorDistribution`, or a list of
            choices (of any kind). ``"auto"``: the usual ranges of the last step's differentiable hyperparameters.
        scoring, n_jobs, refit, cv, verbose, pre_dispatch, error_score, return_train_score: As in ``GridSearchCV``;
            ``n_jobs`` is of scikit-learn's fits. With several scores, ``refit`` names the one that is searched for.
            ``verbose`` lets Optuna tell of each trial, too.
        n_trials: Settings to try, in all; with ``resume``, those of earlier fits count.
        timeout: Seconds after which no further trial begins.
        n_rescored: Settings that are ranked by the true score at the end.
        sampler: Of the study. By default a :class:`HypergradientSampler` where there are hypergradients, and a
            ``TPESampler`` where there are none. It is copied for each fit.
        storage: URL or Optuna storage of the study; in memory by default.
        study_name: In ``storage``. A name that is taken gets a number, so that the fits of clones never mix.
        resume: Continue the study of ``study_name`` that has the same data, splits, estimator and distributions, if there
            is one: a search that was killed goes on, as if nothing had been, to the bit. (Every fit then starts from nothing,
            and takes a little longer.)
        callbacks: Called with ``(study, frozen_trial)`` after each trial, as by ``study.optimize``; may call
            ``study.stop()``.
        guard: ``"nested"`` or ``None``: whether vectors are held together where they would fit noise.
        random_state: Of the default sampler.

    Attributes:
        study_: The study. Its values are the followed losses (to be minimized; of vectors that are free, with their penalty,
            and the loss itself as user attribute ``followed_loss``) or mean scores (to be maximized), with the scores of the
            folds as user attribute ``split_scores``. A guarded one has :attr:`nested_` as user attribute ``guard``.
        followed_: What a trial's value is, and how the hyperparameters move. Losses are those of exact fits; scikit-learn's
            iterative ones stop earlier, so that their scores may differ in the last digits (lower ``tol``).
        nested_: Of a guarded search, what nested cross-validation has found: a :class:`NestedChoice`, whose ``loss`` is an
            estimate for what no hyperparameter was fitted to, beside the ``followed_loss`` of ``cv_results_`` that was
            minimized. ``None`` if the search was cut before.
        cv_results_: As in ``GridSearchCV``, for what scikit-learn fitted: with ``trial_number``, and ``followed_loss``
            (without a penalty) where there is one. A trial of which every fit failed has no row.
        best_estimator_, best_params_, best_score_, best_index_, scorer_, n_splits_, refit_time_, multimetric_: As in
            ``GridSearchCV``; so are ``classes_``, ``n_features_in_`` and ``feature_names_in_``.

    Raises:
        ValueError: from ``fit``, before any fit of the estimator, for an unknown parameter name, a range or a shape that does not
            fit, an empty search space, vectors where there is no hypergradient, or several scores without one to search for;
            afterwards if every trial failed.
        TypeError: for what is no distribution.

    Reference: Pedregosa (2016), "Hyperparameter optimization with approximate gradient"; for many kinds of models,
    Bertrand et al. (2022), "Implicit differentiation for fast hyperparameter selection in non-smooth convex learning".
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseSearchCV._parameter_constraints,
        "param_distributions": [dict, StrOptions({"auto"})],
        "n_trials": [Interval(Integral, 1, None, closed="left")],
        "timeout": [Interval(Real, 0, None, closed="neither"), None],
        "n_rescored": [Interval(Integral, 1, None, closed="left")],
        "sampler": [BaseSampler, None],
        "storage": [str, BaseStorage, None],
        "study_name": [str, None],
        "resume": ["boolean"],
        "callbacks": [list, tuple, None],
        "guard": [StrOptions({"nested"}), None],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        estimator: BaseEstimator,
        param_distributions: dict[str, Any] | str = "auto",
        *,
        scoring: Any = None,
        n_jobs: int | None = None,
        refit: bool | str | Callable[..., int] = True,
        cv: Any = None,
        verbose: int = 0,
        pre_dispatch: int | str = "2*n_jobs",
        error_score: float | str = np.nan,
        return_train_score: bool = False,
        n_trials: int = 30,
        timeout: float | None = None,
        n_rescored: int = 3,
        sampler: BaseSampler | None = None,
        storage: str | BaseStorage | None = None,
        study_name: str | None = None,
        resume: bool = False,
        callbacks: Sequence[Callable[[Study, optuna.trial.FrozenTrial], None]] | None = None,
        guard: str | None = "nested",
        random_state: Any = None,
    ) -> None:
        super().__init__(
            estimator=estimator,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            error_score=error_score,
            return_train_score=return_train_score,
        )
        self.param_distributions = param_distributions
        self.n_trials = n_trials
        self.timeout = timeout
        self.n_rescored = n_rescored
        self.sampler = sampler
        self.storage = storage
        self.study_name = study_name
        self.resume = resume
        self.callbacks = callbacks
        self.guard = guard
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        own = get_tags(self.estimator)
        tags.target_tags = copy.deepcopy(own.target_tags)
        tags.input_tags.allow_nan = own.input_tags.allow_nan
        return tags

    def fit(self, X: Any, y: Any = None, **params: Any) -> HypergradientSearchCV:
        """Search, and fit the best estimator to all data.

        Args:
            X: ``(n_samples, n_features)``, or what the estimator takes.
            y: Targets, or ``None``.
            **params: Routed to the estimator, the scorer and the splitter, as in ``GridSearchCV``.
        """
        if y is None and get_tags(self.estimator).target_tags.required:
            self._get_scorers()  # what cannot be scored at all is said first
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None: its estimator, "
                f"{type(self.estimator).__name__}, needs one."
            )
        self._data: tuple[Any, Any, dict[str, Any]] = X, y, params
        self._routed: Any = None
        self._weighting: SampleWeighting | None = None
        self.__dict__.pop("nested_", None)
        try:
            super().fit(X, y, **params)
            weighting: Any = self._weighting
            if weighting is not None:
                weighting.complete(self.cv_results_)
        finally:
            del self._data, self._routed, self._weighting
            self.__dict__.pop("_sampler_with", None)
        return self

    def check_hypergradient(
        self,
        X: Any,
        y: Any,
        *,
        at: dict[str, Any] | None = None,
        rtol: float = 1e-3,
        seed: int = 0,
        **params: Any,
    ) -> HypergradientReport:
        """Compare the hypergradient of the cross-validated loss with finite differences, for which each fold is fitted again.

        Nothing is searched, and the search stays as it is. In a note, the loss itself is compared with scikit-learn's own fits
        and score.

        Args:
            X, y, **params: As for :meth:`fit`.
            at: Values by parameter name, arrays for vectors; by default, where a search would begin.
            rtol: Relative error up to which it is right.
            seed: Of the directions in which vectors are moved.

        Returns:
            A report to print; true unless something is wrong.

        Raises:
            ValueError: where there is no hypergradient to check, and why.
        """
        probe = clone(self).set_params(resume=False)
        probe._validate_params()
        X, y = indexable(X, y)
        probe._data, probe._routed, probe._weighting = (X, y, params), None, None
        probe._checked_cv_orig = check_cv(self.cv, y, classifier=is_classifier(self.estimator))
        space = space_of(self.estimator, self._distributions())
        metric, splits = self._metric(), probe._splits()
        try:
            followed = probe._followed(space, metric, splits, warm=False)
        except NotFollowedError as reason:
            raise ValueError(f"There is no hypergradient to check: {reason}.") from reason
        with one_thread():
            return checked(followed, self.estimator, self._scoring(metric), at, rtol, seed)

    def _run_search(
        self, evaluate_candidates: Callable[..., dict[str, Any]], *, callback_ctx: Any = None
    ) -> None:
        if callback_ctx is None:  # scikit-learn before 1.9
            self._search(evaluate_candidates)
            return
        context = SearchContext(callback_ctx, self)
        self._search(functools.partial(evaluate_candidates, callback_ctx=context))
        context.end()

    def _search(self, evaluate_candidates: Callable[..., dict[str, Any]]) -> None:
        space = space_of(self.estimator, self._distributions())
        metric, splits = self._metric(), FrozenSplits(self._splits())
        followed = self._follow(space, metric, splits.splits)
        guarded = followed is not None and bool(space.vectors) and self.guard is not None
        if followed is not None and guarded and not can_nest(splits.splits, followed.is_usable):
            raise ValueError(
                f"guard={self.guard!r} compares what is found on nested folds, and cv={self.cv!r} makes no two folds of "
                f"which each can be split by the other. Use more folds, or guard=None."
            )
        study = self.study_ = self._open(space, splits, followed is not None)
        self._weighting = self._weighting_of(space)
        rows = Rows(evaluate_candidates, splits, metric, self._weighting)
        run = Run(study, self.error_score == "raise", self.timeout, self.callbacks, self.verbose)
        run.callbacks += self._reseeding(study)
        if followed is None:

            def scored(trial: optuna.Trial) -> float:
                chosen = {k: suggest(trial, k, d) for k, d in space.items()}
                rows.add([trial], [space.decode(chosen)])
                trial.set_user_attr("split_scores", rows.last_split_scores())
                return rows.scores[-1]

            run.optimize(scored, self.n_trials - len(finished(study)))
        else:
            objective = TrialLoss(followed, guarded)
            evaluated = differentiable(objective)
            if guarded:
                optimize = functools.partial(run.optimize, evaluated)
                with one_thread():
                    self.nested_ = guarded_search(
                        study, objective, optimize, self.n_trials, self._sampler_with
                    )
            else:
                run.optimize(evaluated, self.n_trials - len(finished(study)))
        best = completed(study)
        if not best and rows.numbers:
            return  # their scores are NaN: scikit-learn warns, and fits one of them
        if not best:
            raise ValueError(
                f"No trial of study {study.study_name!r} was completed. "
                f"{run.failures[-1] if run.failures else 'Give it more time (timeout=).'}"
            )
        if followed is not None:
            shown = objective.ranked(study, best, self.n_rescored)
            losses = [float(t.user_attrs.get(LOSS, t.value or 0.0)) for t, _ in shown]
            rows.add([t for t, _ in shown], [s for _, s in shown], losses=losses)
            study.set_user_attr(
                "scores", dict(zip(map(str, rows.numbers), rows.scores, strict=True))
            )
        elif best[0].number not in rows.numbers:  # of an earlier fit
            rows.add(best[:1], [space.decode(best[0].params)])

    def _weighting_of(self, space: Space) -> SampleWeighting | None:
        """Of the fits, where sample weights are searched."""
        _, prefix = last_step(self.estimator)
        for name in space.vectors:
            if is_sample_weight(self.estimator, name):
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
        """The score that is searched for, as ``cv_results_`` names it."""
        if isinstance(self.refit, str):
            return self.refit
        if isinstance(self.scoring, (list, tuple, dict, set)):
            raise ValueError(
                f"scoring names several scores; name the one to search for by refit=, not {self.refit!r:.80}."
            )
        return "score"

    def _scoring(self, metric: str) -> Any:
        """The score of this name, as ``scoring`` gives it."""
        if metric == "score":
            return self.scoring
        return self.scoring.get(metric) if isinstance(self.scoring, dict) else metric

    def _splits(self) -> list[Split]:
        X, y, params = self._data
        routed = self._get_routed_params_for_fit(params).splitter.split
        splits = list(self._checked_cv_orig.split(X, y, **routed))
        if self.resume:
            again = list(self._checked_cv_orig.split(X, y, **routed))
            if not all(np.array_equal(a[1], b[1]) for a, b in zip(splits, again, strict=True)):
                raise ValueError(
                    f"resume=True continues a study of the same splits, and cv={self.cv!r} gives others each time; give "
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
        loss = adapter.followed_loss(self._scoring(metric))
        return Followed(
            *(adapter, self.estimator, space, loss, X, y, splits, weights, weighted),
            warm=warm and not self.resume,
        )

    def _open(self, space: Space, splits: FrozenSplits, follows: bool) -> Study:
        if self.resume and (self.storage is None or self.study_name is None):
            raise ValueError("resume=True needs storage= and study_name= to find the study again.")
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        sampler: BaseSampler = TPESampler(seed=seed)
        if follows or self.sampler is not None:
            self._sampler_with = functools.partial(self._sampler, seed)
            sampler = self._sampler_with()
        self._seed = None if follows or self.sampler is not None else seed
        digest = ""
        if self.storage is not None:
            digest = self._digest(space, splits, follows)
        direction: Literal["minimize", "maximize"] = "minimize" if follows else "maximize"
        with quiet(self.verbose):
            return open_study(
                self.storage, self.study_name, sampler, direction, digest, self.resume
            )

    def _sampler(self, seed: int, radius: float = 1.0) -> BaseSampler:
        """The user's, or one whose first step is at most of this length."""
        if self.sampler is not None:
            return copy.deepcopy(self.sampler)
        kept = Retention(best=self.n_rescored, every=0)
        rule = TrustRegion(radius=radius)
        return HypergradientSampler(seed=seed, retention=kept, optimizer=rule)

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
