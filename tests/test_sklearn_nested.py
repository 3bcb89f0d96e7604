"""The guard of vectors: what nested cross-validation may see, how it decides, and that what it leaves free generalizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    LeaveOneOut,
    RepeatedKFold,
    ShuffleSplit,
    TimeSeriesSplit,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from optuna_hypergrad import FeatureWeights, HypergradientSearchCV, TensorDistribution
from optuna_hypergrad.sklearn_adapters import _nested, adapter_of
from optuna_hypergrad.sklearn_adapters._cross_validated import CrossValidatedLoss, Data
from optuna_hypergrad.sklearn_adapters._distributions import Space
from optuna_hypergrad.sklearn_adapters._vectors import Vectors

WEIGHTS = "featureweights__weights"
SPACE = {WEIGHTS: TensorDistribution("per_feature", 1e-2, 1e2)}
RIDGE = make_pipeline(StandardScaler(), FeatureWeights(), Ridge())


def sparse(n: int, p: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, p))
    return x, x[:, :4] @ [3.0, -2.0, 2.0, 1.0] + generator.normal(size=n)


def tied(search: HypergradientSearchCV) -> Any:
    """The pipeline with the best weights that are all equal."""
    trial = min(
        (t for t in search.study_.trials if t.params["guard:phase"] == "tied"),
        key=lambda t: t.value,
    )
    weights = np.full(search.n_features_in_, trial.params[f"{WEIGHTS}:tied"])
    return clone(search.estimator).set_params(**{WEIGHTS: weights})


def test_weights_are_freed_where_that_generalizes():
    x, y = sparse(800, 80)
    search = HypergradientSearchCV(RIDGE, SPACE, n_trials=40, cv=4, random_state=0)
    search.fit(x[:60], y[:60])
    assert search.nested_.tau is not None
    assert search.nested_.loss < 0.9 * search.nested_.tied_loss
    errors = [
        mean_squared_error(y[60:], m.fit(x[:60], y[:60]).predict(x[60:]))
        for m in (clone(search.best_estimator_), tied(search))
    ]
    assert errors[0] < 0.6 * errors[1]
    assert search.study_.user_attrs["guard"]["loss"] == search.nested_.loss
    found = search.cv_results_["followed_loss"][search.best_index_]
    assert found < search.nested_.loss  # what was minimized is too good to be true


def test_weights_stay_tied_where_they_would_fit_noise():
    x, y = load_breast_cancer(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(y))
    (x, y), (x_test, y_test) = ((x[c], y[c]) for c in (chosen[:150], chosen[150:]))
    model = make_pipeline(StandardScaler(), FeatureWeights(), LogisticRegression(max_iter=1000))
    search = HypergradientSearchCV(
        model, SPACE, n_trials=30, cv=4, scoring="neg_log_loss", random_state=0
    ).fit(x, y)
    assert search.nested_.tau is None
    assert search.nested_.loss == search.nested_.tied_loss
    assert len(set(search.best_params_[WEIGHTS])) == 1
    free = clone(search).set_params(guard=None).fit(x, y)
    losses = [log_loss(y_test, m.predict_proba(x_test)) for m in (search, free)]
    assert losses[1] > 1.3 * losses[0]


def test_no_choice_has_seen_what_it_is_judged_by(monkeypatch):
    """Other targets in an outer fold change its losses, and none of the points that are judged there."""
    x, y = sparse(60, 5)
    monkeypatch.setattr(_nested, "_MAX_FREE", 4)
    seen: list[list[np.ndarray]] = []
    real = _nested._judged

    def judged(loss: Any, chosen: Any, values: Any) -> Any:
        if np.array_equal(loss.splits[0][1], np.arange(20)):
            seen[-1].append(values[WEIGHTS].numpy().copy())
        return real(loss, chosen, values)

    monkeypatch.setattr(_nested, "_judged", judged)
    monkeypatch.setattr(_nested, "_HOPELESS", np.inf)
    losses = []
    for targets in (y, np.concatenate([y[:20][::-1] * 3 - 5, y[20:]])):
        seen.append([])
        search = HypergradientSearchCV(RIDGE, SPACE, n_trials=4, cv=KFold(3), random_state=0)
        search.set_params(scoring="neg_mean_squared_error")
        with monkeypatch.context() as fixed:  # the scale of the penalty is one number of all data
            fixed.setattr(
                "optuna_hypergrad.sklearn_adapters._guarded.nested_choice",
                lambda *a: _nested.nested_choice(*a[:-1], 1.0),
            )
            search.fit(x, targets)
        losses.append(search.nested_.fold_losses)
    assert len(seen[0]) == len(seen[1]) == 1 + len(_nested.TAUS)
    assert all(a.tolist() == b.tolist() for a, b in zip(*seen, strict=True))
    assert losses[0][0] != losses[1][0]
    assert losses[0][1] != losses[1][1]


@pytest.mark.parametrize(
    "cv",
    [
        KFold(4),
        TimeSeriesSplit(4),
        LeaveOneOut(),
        RepeatedKFold(n_splits=5, n_repeats=10, random_state=0),
        ShuffleSplit(6, random_state=0),
        GroupKFold(4),
    ],
    ids=lambda c: type(c).__name__,
)
def test_inner_folds_keep_to_the_outer_ones(cv):
    n, groups = 48, np.arange(48) // 4
    splits = list(cv.split(np.zeros(n), groups=groups if isinstance(cv, GroupKFold) else None))
    folds = _nested._outer_folds(splits, lambda s: len(s[0]) > 0 and len(s[1]) > 0)
    assert 2 <= len(folds) <= _nested.MAX_FOLDS
    for (train, test), parts in folds:
        assert not set(train) & set(test)
        assert len(train) >= 0.5 * np.median([len(a) for a, _ in splits]) or isinstance(
            cv, TimeSeriesSplit
        )
        for part in parts:
            assert not set(part[0]) & set(part[1])
            assert not (set(part[0]) | set(part[1])) & set(test)
            if isinstance(cv, GroupKFold):
                assert not set(groups[part[0]]) & set(groups[part[1]])
            if isinstance(cv, TimeSeriesSplit):
                assert max(part[0]) < min(part[1])
                assert max(part[1]) < min(test)


@pytest.mark.parametrize("guard", ["nested", None])
def test_splits_may_be_lists_masks_and_counted_from_the_end(guard):
    x, y = sparse(40, 5)
    of_arrays = list(KFold(3).split(x))
    every = np.arange(40)
    ways = {
        "arrays": of_arrays,
        "lists": [(a.tolist(), b.tolist()) for a, b in of_arrays],
        "masks": [(np.isin(every, a), np.isin(every, b)) for a, b in of_arrays],
        "end": [(a, b - 40) for a, b in of_arrays],
    }
    found = {}
    for way, cv in ways.items():
        search = HypergradientSearchCV(RIDGE, SPACE, n_trials=4, cv=cv, guard=guard, random_state=0)
        search.fit(x, y)
        losses = search.nested_.fold_losses if guard else None
        found[way] = losses, [t.value for t in search.study_.trials], search.best_score_
    assert all(f == found["arrays"] for f in found.values())
    short = [(a[:-1], b) for a, b in ways["masks"]]
    with pytest.raises(ValueError, match="a mask of 39 samples, and there are 40"):
        HypergradientSearchCV(RIDGE, SPACE, cv=short, guard=guard).fit(x, y)


def judged(losses: Any, influences: Any = None) -> _nested.Judged:
    if influences is None:
        influences = [np.zeros(2) for _ in losses]
    return _nested.Judged(np.array(losses), [np.array(i) for i in influences])


@pytest.mark.parametrize(
    ("losses", "tau"),
    [
        ([[1.0, 0.9, 0.5], [1.0, 0.9, 0.52], [1.0, 0.9, 0.48]], 0.0),  # clearly better, freer and freer
        ([[1.0, 0.9, 0.7], [1.0, 0.9, 1.1], [1.0, 0.9, 0.75]], 0.5),  # the freest is best, but not surely better than it
        ([[1.0, 1.5, 2.0], [1.0, 0.4, 0.2], [1.0, 0.9, 1.0]], None),  # nothing is sure
        ([[1.0, 0.5, 2.0], [1.0, 0.9, 2.0], [1.0, 0.8, 2.0]], None),  # nor is what three folds agree on: by 2.31 errors
        ([[1.0, 0.5, 2.0], [1.0, 0.7, 2.0], [1.0, 0.6, 2.0]], 0.5),  # by 6.9: t of 2 degrees of freedom is 2.92
        ([[1.0, 1.1, 2.0], [1.0, 1.2, 2.0]], None),  # worse and worse
        ([[1.0, np.inf, 0.5], [1.0, 0.9, 0.52]], 0.0),  # what cannot be fitted is not chosen
        ([[1.0, np.inf, 0.5], [1.0, 0.9, np.inf]], None),
        ([[np.inf, 0.1, 0.1], [1.0, 1.1, 1.2], [1.0, 1.1, 1.2]], None),  # nor judged where the tied solution cannot be
        ([[np.inf, 0.1, 0.1], [1.0, 0.1, 0.1]], None),  # one fold says nothing
        ([[np.inf, 0.1, 0.1], [np.inf, 0.1, 0.1]], None),
    ],
)  # fmt: skip
def test_the_choice_is_the_stiffest_of_the_best_if_it_is_surely_better_than_tied(losses, tau):
    array = np.array(losses)
    choice = _nested._decide(judged(array[:, 0]), [judged(c) for c in array[:, 1:].T], [0.5, 0.0])
    assert choice.tau == tau
    assert choice.loss == (
        choice.tied_loss if tau is None else choice.losses[[0.5, 0.0].index(tau)]
    )
    assert _nested.NestedChoice.from_json(choice.to_json()) == choice


@pytest.mark.parametrize(("spread", "tau"), [(0.02, 0.0), (0.5, None)])
def test_folds_that_agree_by_chance_do_not_untie_where_samples_differ_widely(spread, tau):
    """A gain of 0.1 in each of three folds, which comes from all samples, or from a few of them."""
    tied = judged([1.0, 1.0, 1.0], np.kron(np.eye(3), [spread, -spread]))
    free = judged([0.9, 0.91, 0.89], np.zeros((3, 6)))
    choice = _nested._decide(tied, [free], [0.0])
    assert choice.tau == tau
    between, within = 0.01 / 3**0.5, (3 * 2 * spread**2) ** 0.5 / 3
    assert choice.errors == pytest.approx([max(between, within)])


def test_samples_that_several_folds_test_are_not_counted_as_others():
    """Four folds, of which two and two test the same ten samples: the error is that of two means of ten, not of four."""
    x, y = sparse(80, 5)
    tests = np.arange(10), np.arange(10), np.arange(10, 20), np.arange(10, 20)
    trains = [np.r_[np.arange(20, 80)[i % 2 :: 2], tests[(i + 2) % 4]] for i in range(4)]
    cv = list(zip(trains, tests, strict=True))
    seen = []

    def noted(of):
        def with_influences(self, *given):
            found = of(self, *given)
            seen.append(found[0][1].numpy())
            return found

        return with_influences

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CrossValidatedLoss, "with_influences", noted(CrossValidatedLoss.with_influences)
        )
        search = HypergradientSearchCV(
            RIDGE, SPACE, scoring="neg_mean_squared_error", n_trials=4, cv=cv, random_state=0
        ).fit(x, y)
    tied, first = seen[:4], seen[4:8]
    moved = [b - a for a, b in zip(tied, first, strict=True)]
    alike = np.square(moved[0] + moved[1]).sum() + np.square(moved[2] + moved[3]).sum()
    losses = np.array(search.nested_.fold_losses)
    between = (losses[:, 1] - losses[:, 0]).std(ddof=1) / 2
    assert search.nested_.errors[0] == pytest.approx(max(between, alike**0.5 / 4), rel=1e-9)
    assert alike**0.5 / 4 > between  # otherwise nothing is shown


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("model", "scoring"),
    [(Ridge(), "r2"), (Ridge(), "neg_mean_squared_error"), (LogisticRegression(tol=1e-10), "neg_log_loss")],
    ids=["r2", "squares", "log"],
)  # fmt: skip
def test_influences_are_those_of_more_weight_on_a_sample(model, scoring, weighted):
    """Against differences of the loss with a little more of the weight on one sample; the mean loss has its textbook error."""
    x, y = sparse(24, 4)
    y = y if scoring != "neg_log_loss" else (y > 0).astype(int)
    weights = 0.5 + np.random.default_rng(1).random(24) if weighted else np.ones(24)
    adapter = adapter_of(model)
    assert adapter is not None
    loss, train, test = adapter.followed_loss(scoring), np.arange(16), np.arange(16, 24)

    def over(weights: np.ndarray) -> CrossValidatedLoss:
        given = Space({}, {}, {}), loss, Vectors({}, np.empty(0)), Data(x, y, weights, True)
        return CrossValidatedLoss(adapter, model, *given, [(train, test)], True, lambda n: None)

    ((value, influences),) = over(weights).with_influences({}, {})
    assert value == pytest.approx(float(over(weights)({}, {})), rel=1e-12)
    shares = weights[test] / weights[test].sum()
    step, expected = 1e-6, []
    for i in range(8):
        ends = []
        for sign in (1, -1):
            moved = shares * (1 - sign * step) + sign * step * (np.arange(8) == i)
            ends.append(float(over(np.concatenate([weights[train], moved]))({}, {})))
        expected.append(shares[i] * (ends[0] - ends[1]) / (2 * step))
    found = influences.numpy() * np.sqrt(1 - np.square(shares).sum())
    assert found == pytest.approx(np.array(expected), rel=1e-6, abs=1e-9)
    if scoring == "neg_mean_squared_error" and not weighted:
        errors = (y[test] - model.fit(x[train], y[train]).predict(x[test])) ** 2
        assert float(influences.square().sum()) == pytest.approx(errors.var(ddof=1) / 8)
