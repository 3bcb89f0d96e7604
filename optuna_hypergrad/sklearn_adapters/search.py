"""A scikit-learn search that is an Optuna study, and goes along hypergradients where it can."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.model_selection import check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.utils import get_tags, indexable
from sklearn.utils._param_validation import Interval, StrOptions

from ..check_report import HypergradientReport
from ..studies import differentiable
from ._context import SearchContext
from ._distributions import space_of, suggest
from ._following import NotFollowedError
from ._gradient_check import checked
from ._guarded import guarded_search
from ._nested import can_nest
from ._objective import LOSS, TrialLoss
from ._restarts import restarted_search
from ._rows import FrozenSplits, Rows
from ._run import Run
from ._settings import enqueue_each
from ._study import check_url, completed, finished
from ._study_search import StudySearch
from ._threads import one_thread


class HypergradientSearchCV(StudySearch):
    """Search over the parameters of an estimator or pipeline by cross-validation, as an Optuna study.

    In place of ``GridSearchCV`` and its siblings: the same attributes after ``fit``, the same metadata routing, any
    estimator. The splits of ``cv`` are made once and are the same for all trials.

    Where the last step is an estimator that an adapter knows (``Ridge``, ``KernelRidge``, ``Lasso``, ``ElasticNet``,
    ``LogisticRegression``, ``LinearSVC``, ``SVC``, ``SVR``; of exactly this class), its continuous hyperparameters (with a
    ``FloatDistribution`` without a step, above 0; dense data) move by the hypergradient of a cross-validated *loss*: a trial is one
    evaluation of it with its gradient over all folds. A descent begins at the best of about four points that are spread over
    the space (of more where the best of them have the same loss, as of a sparse model without features); where numbers alone
    are searched, one that creeps (six trials without a loss lower by .02 %) has ended, and the next one (under the same
    choices) begins at the best of eight more points for each number, away from all that were tried. Transformers before it are
    fitted once per fold and setting. Everything else is left to the sampler's base sampler, in the same study; where that is at
    most eight combinations of choices (no numbers), and ``sampler`` is not given, the first
    trials are one under each of them. A parameter of a step for which something is chosen is left out where that lacks it. At the
    end the best ``n_rescored`` settings are fitted by scikit-learn and ranked by the true score. Otherwise a trial is the mean score of scikit-learn's own fits, and the study a
    common one. :attr:`followed_` says which of the two it was, and why.

    *Vectors of hyperparameters* have a :class:`TensorDistribution`: the ``weights`` of a :class:`FeatureWeights` right before
    the last step (penalties or length scales per feature), its ``sample_weight`` (of the training samples in fits, not in
    scores; the refit has them, too), its ``class_weight``, and an ``alpha`` per target of ``Ridge`` and ``KernelRidge``. They are tensors of the
    study, not parameters, and arrays in ``best_params_`` (``class_weight`` a dict). Many of them fit noise: with
    ``guard="nested"`` they are first tied, all entries of a vector equal, for up to half of the trials; then nested
    cross-validation says whether (with a confidence of 95 %) and how far they may depart from that, by a penalty on the logarithms of the
    departures; then, where it pays, they are free within it. :attr:`nested_` has the estimates. It takes about
    ``n_splits * (n_splits - 1) * 100`` fits of a fold by the adapter; ``guard=None`` does without, and believes what it sees. Then, if nothing else than what moves by hypergradients is
    searched, there are descents from several starts, one after the other (``"descent"`` in the parameters of a trial), as far as
    ``n_trials`` go: losses over vectors have many minima.

    Args:
        estimator: Anything with ``fit``; a pipeline's parameters are named ``step__parameter``.
        param_distributions: By parameter name, one of ``optuna.distributions``, a :class:`TensorDistribution`, or a list of
            choices (of any kind). ``"auto"``: the usual ranges of the last step's differentiable hyperparameters.
        scoring, n_jobs, refit, cv, verbose, pre_dispatch, error_score, return_train_score: As in ``GridSearchCV``;
            ``n_jobs`` is of scikit-learn's fits. With several scores, ``refit`` names the one that is searched for; where it is a
            function or ``False``, that is the first.
            ``verbose`` lets Optuna tell of each trial, too.
        n_trials: Settings to try, in all; with ``resume``, those of earlier fits count (of those that other processes run meanwhile,
            only what was over when this one began).
        timeout: Seconds after which no further trial begins. (It is looked at between trials; one with which a descent begins also
            takes the fits of a scan.)
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
            folds as user attribute ``split_scores``; trials that failed have the reason as user attribute ``failure``. A
            guarded one has :attr:`nested_` as user attribute ``guard``.
        followed_: What a trial's value is, and how the hyperparameters move. Losses are those of exact fits; scikit-learn's
            iterative ones stop earlier, so that their scores may differ in the last digits (lower ``tol``).
        nested_: Of a guarded search, what nested cross-validation has found: a :class:`NestedChoice`, whose ``loss`` is an
            estimate for what no hyperparameter was fitted to, beside the ``followed_loss`` of ``cv_results_`` that was
            minimized. ``None`` if the search was cut before; an
            ``AttributeError`` that says so without vectors, or with ``guard=None``.
        cv_results_: As in ``GridSearchCV``, for what scikit-learn fitted: with ``trial_number``, and ``followed_loss``
            (without a penalty) where there is one. A trial of which every fit failed has no row, nor has one of an earlier fit
            with which ``resume`` goes on, but for the best: those are in :attr:`study_`.
        n_fits_: Fits of a fold, by the adapter (to find a start, in trials, in nested folds) and by scikit-learn, without the
            refit.
        best_estimator_, best_params_, best_score_, best_index_, scorer_, n_splits_, refit_time_, multimetric_: As in
            ``GridSearchCV``; so are ``classes_``, ``n_features_in_`` and ``feature_names_in_``.

    Raises:
        ValueError: from ``fit``, before any fit of the estimator, for an unknown parameter name, a range or a shape that does not
            fit, an empty search space, vectors where there is no hypergradient, or a ``refit`` that is none of several scores;
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

    def fit(self, X: Any, y: Any = None, **params: Any) -> HypergradientSearchCV:
        """Search, and fit the best estimator to all data.

        Args:
            X: ``(n_samples, n_features)``, or what the estimator takes.
            y: Targets, or ``None``.
            **params: Routed to the estimator, the scorer and the splitter, as in ``GridSearchCV``.
        """
        check_url(self.storage)
        if y is None and get_tags(self.estimator).target_tags.required:
            self._get_scorers()  # what cannot be scored at all is said first
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None: its estimator, "
                f"{type(self.estimator).__name__}, needs one."
            )
        self._data, self._routed, self._weighting = (X, y, params), None, None
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

    def __getattr__(self, name: str) -> Any:
        """Says why there is no :attr:`nested_`, where there is none."""
        if name == "nested_":
            why = "this one is not fitted"
            if "study_" in self.__dict__:
                why = "this one has guard=None" if self.guard is None else "this one had no vectors"
            raise AttributeError(
                f"nested_ is what nested cross-validation has found, in a search over vectors with guard='nested'; {why}."
            )
        return object.__getattribute__(self, name)  # once more, for what it says

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
                f"guard={self.guard!r} compares what is found on nested folds, and cv={self.cv!r:.80} makes no two folds of "
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
            vectors_only = bool(space.vectors) and len(dict(space.items())) == len(followed.floats)
            objective = TrialLoss(followed, guarded, restarted=vectors_only and not guarded)
            evaluated = differentiable(objective)
            optimize = functools.partial(run.optimize, evaluated)
            if guarded:
                with one_thread():
                    self.nested_ = guarded_search(
                        study, objective, optimize, self.n_trials, self._sampler_with
                    )
            elif objective.restarted:
                restarted_search(study, objective, optimize, self.n_trials, self._sampler_with)
            else:
                if self.sampler is None:
                    enqueue_each(study, space, set(followed.floats), self.n_trials)
                run.optimize(evaluated, self.n_trials - len(finished(study)))
        best = completed(study)
        self.n_fits_ = len(rows.numbers) * len(splits.splits)
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
            self.n_fits_ = followed.num_fits + len(rows.numbers) * len(splits.splits)
            study.set_user_attr(
                "scores", dict(zip(map(str, rows.numbers), rows.scores, strict=True))
            )
        elif best[0].number not in rows.numbers:  # of an earlier fit
            rows.add(best[:1], [space.decode(best[0].params)])
