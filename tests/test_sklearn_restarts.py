"""Searches of vectors without a guard: descents from several starts, one after the other in a study."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import Lasso, Ridge
from sklearn.pipeline import make_pipeline

from optuna_hypergrad import (
    FeatureWeights,
    HypergradientSearchCV,
    TensorDistribution,
    load_tensors,
)
from optuna_hypergrad.sklearn_adapters import _restarts
from optuna_hypergrad.sklearn_adapters._cross_validated import CrossValidatedLoss
from optuna_hypergrad.sklearn_adapters._rows import FailedTrialError

WEIGHTS = "featureweights__weights"
SPACE: dict[str, Any] = {WEIGHTS: TensorDistribution("per_feature", 1e-2, 1e2)}
LASSO = make_pipeline(FeatureWeights(), Lasso(alpha=0.05))


def sparse(n: int, p: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(n, p)), np.zeros(p)
    w[:k] = rng.normal(size=k)
    y = x @ w
    y = y / y.std() + rng.normal(size=n)
    return x, (y - y.mean()) / y.std()


def watched(estimator: Any, space: Any, data: Any, **settings: Any) -> tuple[Any, dict[int, Any]]:
    """A search, and the weights and the numbers of the first trial of each descent."""
    starts: dict[int, Any] = {}

    def note(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.params["descent"] not in starts and trial.value is not None:
            (weights,) = load_tensors(trial, study=study).values()
            starts[trial.params["descent"]] = (weights.numpy().copy(), trial)

    settings = {"cv": 4, "guard": None, "random_state": 0, "callbacks": [note], **settings}
    return HypergradientSearchCV(estimator, space, **settings).fit(*data), starts


def least(study: optuna.Study, descents: range) -> float:
    found = [t.value for t in study.trials if t.params["descent"] in descents]
    return min(v for v in found if v is not None)


def test_other_starts_find_other_minima_of_a_sparse_model() -> None:
    search, starts = watched(LASSO, SPACE, sparse(150, 60, 8), n_trials=70)
    first, bounds = starts[0][0], (1e-2, 1e2)
    assert np.ptp(first) == 0
    for number, factor in ((1, 10.0), (2, 30.0)):
        expected = np.full(60, np.clip(factor * first[0], *bounds))
        assert starts[number][0] == pytest.approx(expected, rel=1e-12)
    study = search.study_
    assert len(study.trials) == 70
    assert list(starts) == list(range(len(starts)))
    assert starts[3][1].value == pytest.approx(least(study, range(3)), rel=1e-9)
    assert study.best_value < 0.997 * least(study, range(1))
    assert search.cv_results_["followed_loss"].min() == pytest.approx(study.best_value)
    assert WEIGHTS in search.best_params_
    assert "descent" not in search.best_params_


def test_numbers_begin_with_the_vectors() -> None:
    space = {**SPACE, "lasso__alpha": FloatDistribution(1e-3, 1.0, log=True)}
    search, starts = watched(LASSO, space, sparse(150, 20, 5), n_trials=45)
    alphas = [t.params["lasso__alpha"] for _, t in starts.values()]
    assert alphas[1] == pytest.approx(alphas[0], rel=1e-12)
    assert starts[1][0] == pytest.approx(np.minimum(10 * starts[0][0], 1e2), rel=1e-12)
    assert len(set(search.study_.trials_dataframe()["params_lasso__alpha"])) > 20


def test_a_penalty_per_target_is_looser_where_it_is_smaller() -> None:
    x, y = sparse(80, 5, 5)
    space = {"alpha": TensorDistribution("per_target", 1e-3, 1e3)}
    search, starts = watched(Ridge(), space, (x, np.stack([y, x[:, 0] - y], 1)), n_trials=40)
    assert starts[1][0] == pytest.approx(starts[0][0] / 10, rel=1e-12)
    assert search.best_params_["alpha"].shape == (2,)


def test_few_trials_are_spent_on_one_start() -> None:
    search, starts = watched(LASSO, SPACE, sparse(150, 30, 8), n_trials=24)
    study = search.study_
    assert len(starts) >= 2
    assert starts[1][1].number > 24 - _restarts._LEAST
    assert starts[1][1].value == pytest.approx(least(study, range(1)), rel=1e-9)
    assert study.best_value <= least(study, range(1))


@pytest.mark.parametrize(
    ("number", "left", "factor"),
    [(1, 40, 10.0), (2, 15, 30.0), (2, 14, 1.0), (3, 40, 1.0), (4, 40, 3.0), (6, 40, 0.3), (7, 40, 1.0), (8, 40, 3.0)],
)  # fmt: skip
def test_the_turns_of_starts(number: int, left: int, factor: float) -> None:
    assert _restarts._factor(number, left) == factor


def kept(path: Any, **more: Any) -> HypergradientSearchCV:
    settings = {"n_trials": 28, "cv": 3, "random_state": 0, "resume": True, "guard": None}
    search = HypergradientSearchCV(
        LASSO, SPACE, storage=f"sqlite:///{path}", study_name="a", **settings, **more
    )
    return search.fit(*sparse(60, 8, 3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> HypergradientSearchCV:
    return kept(tmp_path_factory.mktemp("whole") / "a.db")


@pytest.mark.parametrize("cut_at", [3, 20])
def test_a_search_that_was_cut_goes_on_to_the_bit(
    tmp_path: Any, cut_at: int, whole: HypergradientSearchCV
) -> None:
    def cut(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number == cut_at:
            study.stop()

    first = kept(tmp_path / "cut.db", callbacks=[cut])
    assert len(first.study_.trials) == cut_at + 1
    second = kept(tmp_path / "cut.db")
    for one, other in zip(whole.study_.trials, second.study_.trials, strict=True):
        assert one.values == other.values
        assert one.params == other.params
    assert second.best_params_[WEIGHTS].tolist() == whole.best_params_[WEIGHTS].tolist()
    numbers = [t.params["descent"] for t in whole.study_.trials]
    assert numbers[3] < numbers[20] == numbers[19]


def test_a_start_without_a_loss_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CrossValidatedLoss.__call__

    def fails(self: Any, chosen: Any, values: Any) -> Any:
        if values[WEIGHTS].mean() > 9:
            raise FailedTrialError("too loose")
        return real(self, chosen, values)

    monkeypatch.setattr(CrossValidatedLoss, "__call__", fails)
    space = {WEIGHTS: TensorDistribution("per_feature", 1e-2, 2e1)}
    with pytest.warns(FitFailedWarning, match="too loose"):
        search, starts = watched(LASSO, space, sparse(80, 6, 3), n_trials=60)
    study = search.study_
    assert 1 not in starts
    assert 3 in starts
    assert sum(t.params["descent"] == 1 for t in study.trials) == 1


def test_a_search_ends_where_nothing_is_left_to_gain() -> None:
    space = {WEIGHTS: TensorDistribution("per_feature", 0.9, 1.1)}
    search, _ = watched(LASSO, space, sparse(80, 10, 4), n_trials=40)
    trials = search.study_.trials
    last = trials[-1].params["descent"]
    of_last = [t.value for t in trials if t.params["descent"] == last]
    others = [t.value for t in trials if t.params["descent"] < last]
    assert len(trials) < 40
    assert min(of_last) == pytest.approx(min(others), rel=1e-6)
