"""Descents of numbers from several starts: where they begin, when they end, and what they find together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from sklearn.datasets import make_moons
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import Lasso, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from torch import Tensor

from optuna_hypergrad import (
    FeatureWeights,
    HypergradientSampler,
    HypergradientSearchCV,
    SolverError,
    TensorDistribution,
    differentiable,
)
from optuna_hypergrad._results import Result, Status
from optuna_hypergrad.search_space import Domain
from optuna_hypergrad.sklearn_adapters._descent import IMPATIENT, scan, scan_elsewhere
from optuna_hypergrad.sklearn_adapters._following import Followed
from optuna_hypergrad.sklearn_adapters._objective import TrialLoss
from optuna_hypergrad.step_rules import StepState, TrustRegion
from optuna_hypergrad.studies.events import Claim

SPACE = {
    "C": FloatDistribution(1e-2, 1e3, log=True),
    "gamma": FloatDistribution(1e-5, 1e1, log=True),
}
DOMAINS = {"a": Domain(1e-3, 1e3, True), "b": Domain(0.0, 1.0, False)}


def sinc() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    x = rng.uniform(-3, 3, size=(150, 2))
    y = np.sinc(x[:, 0]) + 0.3 * x[:, 1] + 0.1 * rng.standard_t(2, size=150)
    return StandardScaler().fit_transform(x), (y - y.mean()) / y.std()


def of_moons(num_samples: int = 300, **settings: Any) -> HypergradientSearchCV:
    x, y = make_moons(num_samples, noise=0.3, random_state=0)
    cv = StratifiedKFold(5, shuffle=True, random_state=0)
    search = HypergradientSearchCV(SVC(), SPACE, cv=cv, random_state=0, **settings)
    return search.fit(StandardScaler().fit_transform(x), y)


def starts(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    claims = [Claim.of(t) for t in study.trials]
    return [
        t for t, c in zip(study.trials, claims, strict=True) if c is not None and c.parent is None
    ]


def test_a_search_leaves_the_valley_of_its_first_descent() -> None:
    study = of_moons().study_
    assert min(t.value for t in study.trials[:6]) > 0.2  # as a straight line separates them
    assert study.best_value < 0.0935  # a grid of 12 x 12 points has that, after 720 fits
    begun = starts(study)
    assert 2 <= len(begun) <= 8
    assert [begun[0].number, begun[0].params["C"]] == [0, pytest.approx(66.6, rel=1e-2)]


def test_so_it_does_under_choices() -> None:
    x, y = sinc()
    space = {**SPACE, "shrinking": CategoricalDistribution([True, False])}
    cv = KFold(5, shuffle=True, random_state=0)
    search = HypergradientSearchCV(SVR(epsilon=0.02), space, cv=cv, n_trials=60, random_state=0)
    search.fit(x, y)
    grid = {"C": np.geomspace(1e-2, 1e3, 6), "gamma": np.geomspace(1e-5, 1e1, 7)}
    usual = GridSearchCV(SVR(epsilon=0.02), grid, cv=cv, scoring="neg_mean_squared_error")
    assert search.study_.best_value < -usual.fit(x, y).best_score_ * 1.01


def test_a_search_that_was_cut_goes_on_to_the_bit(tmp_path: Any) -> None:
    def cut(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number == at:
            study.stop()

    def kept(name: str, **more: Any) -> optuna.Study:
        file = f"sqlite:///{tmp_path / name}"
        settings = {"storage": file, "study_name": "s", "n_trials": 18, "n_rescored": 1, **more}
        return of_moons(100, resume=True, **settings).study_

    whole = kept("whole.db")
    begun = [t.number for t in starts(whole)]
    at = begun[1] - 1  # before the second scan
    assert len(kept("cut.db", callbacks=[cut]).trials) == at + 1
    again = kept("cut.db")
    assert [t.params for t in again.trials] == [t.params for t in whole.trials]
    assert [t.values for t in again.trials] == [t.values for t in whole.trials]


def losses_to(a: float, b: float, seen: list[dict[str, float]]) -> Any:
    def losses(values: dict[str, Tensor], first: int, last: int) -> Tensor:
        seen.append({k: float(v) for k, v in values.items()})
        gap = (values["a"].log() - math.log(a)) ** 2 + (values["b"] - b) ** 2
        return (1 + gap).expand(last - first)

    return losses


def test_a_scan_goes_on_where_the_loss_is_flat() -> None:
    seen: list[float] = []

    def losses(values: dict[str, Tensor], first: int, last: int) -> Tensor:
        seen.append(float(values["a"]))
        gap = (values["a"].log() - math.log(300.0)) ** 2
        return gap.clamp(max=1.5).expand(last - first)  # the same below 88

    one = {"a": DOMAINS["a"]}
    found = scan(losses, one, {}, 1)
    assert 88 < found["a"] == min(seen, key=lambda a: abs(math.log(a / 300.0)))
    assert 8 < len(set(seen)) <= 3 + 8


def test_a_point_that_is_given_twice_is_not_flat() -> None:
    seen: list[dict[str, float]] = []
    scan(losses_to(1.0, 1.0, seen), DOMAINS, {n: d.midpoint() for n, d in DOMAINS.items()}, 1)
    assert len(seen) == 5


def test_a_scan_of_what_is_flat_everywhere_ends() -> None:
    seen: list[float] = []

    def losses(values: dict[str, Tensor], first: int, last: int) -> Tensor:
        seen.append(float(values["a"]))
        return torch.ones(last - first)

    scan(losses, {"a": DOMAINS["a"]}, {}, 5)
    assert len(set(seen)) == 3 + 3 * 8


@pytest.mark.parametrize("guard", ["nested", None])
def test_vectors_of_a_sparse_model_start_where_it_has_features(guard: str | None) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 5))
    y = x @ rng.normal(size=5) + rng.normal(size=60)
    pipeline = make_pipeline(StandardScaler(), FeatureWeights(), Lasso())
    space = {"featureweights__weights": TensorDistribution("per_feature", 1e-2, 1e1)}
    search = HypergradientSearchCV(pipeline, space, guard=guard, random_state=0).fit(x, y)
    tied = make_pipeline(StandardScaler(), Lasso())
    grid = {"lasso__alpha": [10.0, 1.0, 0.1]}
    assert search.best_score_ > GridSearchCV(tied, grid).fit(x, y).best_score_


def test_further_scans_look_elsewhere() -> None:
    first: list[dict[str, float]] = []
    scan(losses_to(1.0, 0.5, first), DOMAINS, {}, 1)
    visited = [{"a": a, "b": b} for a, b in ((1.0, 0.5), (0.01, 0.2), (100.0, 0.8), (30.0, 0.3))]
    others: list[list[dict[str, float]]] = [[], []]
    for number, seen in enumerate(others, 1):
        found = scan_elsewhere(losses_to(1.0, 0.5, seen), DOMAINS, visited, number, 1)
        assert 8 <= len(seen) < 16  # of sixteen, those near what was visited are left out
        size = math.log(1e6) * 10.0  # a unit of b is a tenth of its range
        near = 0.5 * math.sqrt(size / 16)
        for point in seen:
            for known in visited:
                apart = abs(math.log(point["a"] / known["a"])), 10 * abs(point["b"] - known["b"])
                assert max(apart) > near
        assert found == min(seen, key=lambda p: math.log(p["a"]) ** 2 + (p["b"] - 0.5) ** 2)
    points = [tuple(p.values()) for seen in (first, *others) for p in seen]
    assert len(set(points)) == len(points)


def test_where_all_is_known_the_farthest_point_is_next() -> None:
    a, b = np.geomspace(1e-3, 1e3, 20), np.linspace(0, 1, 20)
    everywhere = [{"a": float(p), "b": float(q)} for p in a for q in b]
    seen: list[dict[str, float]] = []
    found = scan_elsewhere(losses_to(1.0, 0.5, seen), DOMAINS, everywhere, 1, 5)
    assert not seen

    def gap(point: dict[str, float]) -> float:
        return min(
            max(abs(math.log(point["a"] / v["a"])), 10 * abs(point["b"] - v["b"]))
            for v in everywhere
        )

    scan_elsewhere(losses_to(1.0, 0.5, seen), DOMAINS, [], 1, 1)
    assert len(seen) == 16
    assert gap(found) == pytest.approx(max(map(gap, seen)), rel=1e-12)

    def fails(values: dict[str, Tensor], first: int, last: int) -> Tensor:
        return torch.full((last - first,), math.nan)

    assert scan_elsewhere(fails, DOMAINS, [], 1, 5) in seen


def of_ridge(storage: Any, n_trials: int, low: float = 1e-6, high: float = 1e2) -> optuna.Study:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    y = x[:, 0] + (rng.uniform(size=60) > 0.5)
    space = {"alpha": FloatDistribution(low, high, log=True)}
    settings = {"storage": storage, "study_name": "s", "resume": True, "random_state": 0}
    search = HypergradientSearchCV(Ridge(), space, cv=3, n_trials=n_trials, **settings)
    return search.fit(x, y).study_


def test_no_descent_is_repeated_in_a_small_range() -> None:
    study = of_ridge(optuna.storages.InMemoryStorage(), 14, 1.0, 2.0)
    begun = [t.params["alpha"] for t in starts(study)]
    assert len(begun) >= 3
    assert len(set(begun)) == len(begun)


@pytest.mark.parametrize("where", ["scanned", "scanned_elsewhere"])
def test_a_search_that_was_cut_in_a_scan_goes_on_to_the_bit(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = of_ridge(optuna.storages.InMemoryStorage(), 24)
    assert len(starts(whole)) > 2

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    cut = optuna.storages.InMemoryStorage()
    with monkeypatch.context() as patched:
        patched.setattr(Followed, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            of_ridge(cut, 24)
    again = of_ridge(cut, 25)  # the one that was cut counts
    values = [(t.params, t.values) for t in again.trials if t.state == TrialState.COMPLETE]
    assert values == [(t.params, t.values) for t in whole.trials]


def test_a_start_that_fails_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    true = TrialLoss.__call__

    def fails_twice(loss: TrialLoss, trial: Any) -> Tensor:
        found = true(loss, trial)
        if trial.number < 2:
            raise SolverError("It is not solved.", Result(Status.NONFINITE, "It is not solved."))
        return found

    monkeypatch.setattr(TrialLoss, "__call__", fails_twice)
    with pytest.warns(FitFailedWarning):
        study = of_ridge(optuna.storages.InMemoryStorage(), 5)
    assert [t.state == TrialState.FAIL for t in study.trials] == [True, True, False, False, False]
    assert len({t.params["alpha"] for t in study.trials[:3]}) == 3


def test_two_searches_at_once_begin_in_different_places(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, true, within = optuna.storages.InMemoryStorage(), Followed.scanned, [0]

    def beside(followed: Followed, *given: Any) -> dict[str, float]:
        within[0] += 1
        if within[0] == 1:
            of_ridge(storage, 1)  # while this one looks for a start
        return true(followed, *given)

    monkeypatch.setattr(Followed, "scanned", beside)
    study = of_ridge(storage, 1)
    assert within == [1]
    assert len({t.params["alpha"] for t in study.trials}) == len(study.trials) == 2


def of_vectors(n_trials: int, **settings: Any) -> optuna.Study:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3))
    search = HypergradientSearchCV(
        make_pipeline(FeatureWeights(), Ridge()),
        {"featureweights__weights": TensorDistribution((3,), 1e-3, 1e3, log=True)},
        cv=3,
        n_trials=n_trials,
        guard=None,
        **settings,
    )
    return search.fit(x, x[:, 0] + 0.3 * rng.normal(size=30)).study_


def test_starts_of_vectors_need_no_tied_trials() -> None:
    sampler = HypergradientSampler(start="given", max_steps=3, seed=0)
    assert len(starts(of_vectors(5, sampler=sampler))) == 2


def test_a_search_of_vectors_that_was_cut_in_its_first_scan_goes_on_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    def kept(storage: Any, n_trials: int) -> optuna.Study:
        settings = {"storage": storage, "study_name": "s", "resume": True, "random_state": 0}
        return of_vectors(n_trials, **settings)

    whole = kept(optuna.storages.InMemoryStorage(), 45)
    assert len({t.params["descent"] for t in whole.trials}) > 1
    cut = optuna.storages.InMemoryStorage()
    with monkeypatch.context() as patched:
        patched.setattr(Followed, "scanned", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kept(cut, 45)
    again = [t for t in kept(cut, 46).trials if t.state == TrialState.COMPLETE]
    assert [t.values for t in again] == [t.values for t in whole.trials]


def test_a_start_is_given_every_time() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        x = trial.suggest_float("x", -3.0, 3.0, init=2.9 - 0.4 * trial.number)
        return (x - 0.7) ** 4  # type: ignore[no-any-return]

    study = optuna.create_study(sampler=HypergradientSampler(start="given", max_steps=4, seed=0))
    study.optimize(objective, n_trials=12)
    begun = starts(study)
    assert len(begun) > 2
    assert all(t.params["x"] == pytest.approx(2.9 - 0.4 * t.number) for t in begun)
    with pytest.raises(ValueError, match='"init" or "given"'):
        HypergradientSampler(start="elsewhere")  # type: ignore[arg-type]


@pytest.mark.parametrize(("rtol", "ends"), [(0.0, False), (1e-3, True)])
def test_what_creeps_has_ended(rtol: float, ends: bool) -> None:
    """Values that fall by a ten thousandth each time, and a slope that promises more."""
    rule = TrustRegion(**{**IMPATIENT, "rtol": rtol, "ftol": 0.0})
    point = {"x": torch.zeros(2, dtype=torch.float64)}
    slope = {"x": torch.tensor([1.0, -1.0], dtype=torch.float64)}
    bounds = {"x": -100.0}, {"x": 100.0}
    state = rule.init(point, *bounds)
    stops: list[str | None] = []
    for i in range(20):
        proposal = rule.step(state, point, 1 - 1e-4 * i, slope, *bounds)
        point, state = proposal.point, proposal.state
        stops.append(proposal.stop)
    assert isinstance(state, StepState)
    found = [i for i, s in enumerate(stops) if s is not None and "of its size" in s]
    assert found[:1] == ([6] if ends else [])
