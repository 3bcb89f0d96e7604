"""Trajectories: what the sampler decides, what the base sampler sees, and who works on what."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from conftest import open_storage
from optuna.distributions import BaseDistribution
from optuna.pruners import HyperbandPruner, MedianPruner
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GridSampler,
    PartialFixedSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from optuna_hypergrad import _optuna
from optuna_hypergrad.studies import (
    DifferentiableTrial,
    HypergradientSampler,
    differentiable,
    load_tensors,
    recording,
    report_hypergradient,
)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def claims(study: Study) -> list[dict[str, Any]]:
    return [t.system_attrs["hypergrad:claim"] for t in study.trials]


def trajectories(study: Study) -> list[int]:
    return [c["trajectory"] for c in claims(study)]


@differentiable
def mixed(trial: Any) -> Tensor:
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    size = trial.suggest_int("size", 1, 4)
    x = trial.suggest_float("x", 1e-3, 1e3, log=True)
    y = trial.suggest_float("y", -5.0, 5.0)
    ground = {"a": 0.0, "b": 1.0, "c": 0.3}[kind] + 0.2 * abs(size - 2)
    return ground + (x.log() - size) ** 2 + (y - 1) ** 4


# Without gradients


def plain(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -3.0, 3.0)
    n = trial.suggest_int("n", 1, 9)
    kind = trial.suggest_categorical("kind", ["a", "b"])
    return x**2 + n + (kind == "a")


@pytest.mark.parametrize("kind", ["tpe", "random", "cmaes", "qmc"])
def test_without_gradients_it_is_the_base_sampler(kind: str) -> None:
    def make() -> BaseSampler:
        if kind == "cmaes":
            return CmaEsSampler(seed=4, warn_independent_sampling=False)
        if kind == "qmc":
            return QMCSampler(seed=4, warn_independent_sampling=False)
        return TPESampler(seed=4) if kind == "tpe" else RandomSampler(seed=4)

    bare = optuna.create_study(sampler=make())
    bare.optimize(plain, n_trials=25)
    wrapped = optuna.create_study(sampler=HypergradientSampler(make()))
    wrapped.optimize(plain, n_trials=25)
    assert [t.params for t in wrapped.trials] == [t.params for t in bare.trials]
    assert not any(k.startswith("hypergrad") for t in wrapped.trials for k in t.system_attrs)


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_without_gradients_it_says_so_once() -> None:
    listener = Listener()
    logger = optuna.logging.get_logger("optuna.hypergradients")
    logger.addHandler(listener)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=HypergradientSampler())
        study.optimize(plain, n_trials=4)
    finally:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logger.removeHandler(listener)
    (said,) = listener.messages
    assert "TPESampler" in said
    assert "@differentiable" in said


# Trajectories


def test_a_lone_trajectory_goes_on_until_it_is_over_and_then_another_starts() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        x = trial.suggest_float("x", 1e-3, 1e3, log=True)
        return (x.log() - 1.3).abs() ** 1.5

    study = optuna.create_study(sampler=HypergradientSampler(seed=0, max_steps=7))
    study.optimize(objective, n_trials=21)
    assert Counter(trajectories(study)) == {0: 7, 7: 7, 14: 7}
    assert [c["source"] for c in claims(study) if c["parent"] is None] == ["init", "base", "base"]
    assert study.best_value < 1e-3


def test_patience_ends_a_trajectory() -> None:
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -1.0, 1.0)
        report_hypergradient(trial, {"x": 1.0})
        return -float(trial.number) if trial.number < 3 else x * 0.0

    study = optuna.create_study(sampler=HypergradientSampler(seed=0, patience=3))
    study.optimize(objective, n_trials=7)
    assert trajectories(study)[:6] == [0] * 6
    assert trajectories(study)[6] == 6


def test_tensors_alone_start_again_from_the_best_point() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        t = trial.suggest_tensor("t", 3, 0.0, 1.0, dtype=torch.float64)
        return (t - torch.tensor([0.1, 0.2, 0.9])).pow(4).sum()

    study = optuna.create_study(sampler=HypergradientSampler(seed=0, max_steps=4))
    study.optimize(objective, n_trials=5)
    assert trajectories(study) == [0, 0, 0, 0, 4]
    best = min(study.trials[:4], key=lambda t: t.value)
    assert claims(study)[4]["source"] == str(best.number)
    assert study.trials[4].value == best.value


def test_the_base_sampler_sees_one_trial_for_each_trajectory() -> None:
    seen: list[list[FrozenTrial]] = []

    class Watching(RandomSampler):
        def infer_relative_search_space(
            self, study: Study, trial: FrozenTrial
        ) -> dict[str, BaseDistribution]:
            seen.append(study.get_trials())
            return super().infer_relative_search_space(study, trial)

    study = optuna.create_study(sampler=HypergradientSampler(Watching(seed=0)))
    study.optimize(mixed, n_trials=40)
    shown = [t for t in seen[-1] if t.state.is_finished()]
    ids = sorted(set(trajectories(study)))
    assert {t.number for t in shown} <= set(ids)
    assert len(shown) >= len(ids) - 1
    for trial in shown:
        assert trial.params.keys() == {"kind", "size"}
        steps = [
            t.value
            for t, i in zip(study.trials, trajectories(study), strict=True)
            if i == trial.number
        ]
        assert trial.value in steps
        assert trial.params == {k: study.trials[trial.number].params[k] for k in trial.params}


def test_scalars_alone_show_the_base_sampler_their_starts() -> None:
    seen: list[list[FrozenTrial]] = []

    class Watching(RandomSampler):
        def sample_relative(
            self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
        ) -> dict[str, Any]:
            seen.append(study.get_trials())
            return {}

    @differentiable
    def objective(trial: Any) -> Tensor:
        return (trial.suggest_float("x", -3.0, 3.0) - 0.7).abs() ** 1.5

    study = optuna.create_study(sampler=HypergradientSampler(Watching(seed=0), max_steps=5))
    study.optimize(objective, n_trials=16)
    assert [t.number for t in seen[-1]] == [0, 5, 10, 15]
    assert [t.params for t in seen[-1][:3]] == [study.trials[i].params for i in (0, 5, 10)]
    values = [t.value for t in study.trials]
    assert [t.value for t in seen[-1][:3]] == [min(values[i : i + 5]) for i in (0, 5, 10)]


def test_settings_race_and_the_bad_ones_wait() -> None:
    study = optuna.create_study(sampler=HypergradientSampler(seed=1, start="best", slice_steps=1))
    study.optimize(mixed, n_trials=60)
    steps = Counter(trajectories(study))
    settings = {i: (study.trials[i].params["kind"], study.trials[i].params["size"]) for i in steps}
    assert len(set(settings.values())) >= 6
    assert study.best_params["kind"] == "a"
    assert study.best_params["size"] == 2
    assert study.best_value < 1e-3
    spent = Counter[str]()
    for i, n in steps.items():
        spent[settings[i][0]] += n
    assert spent["a"] > spent["b"]


def test_new_settings_start_from_the_best_point_or_where_one_asks() -> None:
    for start, source in (("best", None), ("base", "base"), ("init", "init")):
        study = optuna.create_study(sampler=HypergradientSampler(seed=1, start=start))  # type: ignore[arg-type]
        study.optimize(mixed, n_trials=12)
        opened = [c for c in claims(study) if c["parent"] is None][1:]
        assert opened
        first = study.trials[opened[0]["trajectory"]]
        if source is None:
            donor = study.trials[int(opened[0]["source"])]
            assert donor.value == min(t.value for t in study.trials[: first.number])
            assert {k: first.params[k] for k in "xy"} == {k: donor.params[k] for k in "xy"}
        else:
            assert opened[0]["source"] == source
        if start == "init":
            assert first.params["x"] == pytest.approx(1.0)
            assert first.params["y"] == 0.0


def test_maximize_is_minimize_upside_down(storage: BaseStorage) -> None:
    for tensors in (False, True):

        def loss(trial: Any, tensors: bool = tensors) -> Tensor:
            x = trial.suggest_float("x", 1e-3, 1e3, log=True, init=100.0)
            value = (x.log() - 1) ** 2
            if tensors:
                value = value + (trial.suggest_tensor("t", 2, -1.0, 1.0) - 0.5).pow(2).sum()
            return value

        down = optuna.create_study(sampler=HypergradientSampler(seed=0))
        down.optimize(differentiable(loss), n_trials=10)
        up = optuna.create_study(
            study_name=f"up{tensors}",
            storage=storage,
            direction="maximize",
            sampler=HypergradientSampler(seed=0),
        )
        up.optimize(differentiable(lambda t: -loss(t)), n_trials=10)
        assert [t.params for t in up.trials] == [t.params for t in down.trials]
        assert [-t.value for t in up.trials] == [t.value for t in down.trials]
        if tensors:
            assert torch.equal(load_tensors(up)["t"], load_tensors(down)["t"])


def test_conditional_hyperparameters(storage: BaseStorage) -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        kind = trial.suggest_categorical("kind", ["ridge", "kernel", "none"])
        if kind == "none":
            return torch.tensor(4.0)
        alpha = trial.suggest_float("alpha", 1e-4, 1e4, log=True)
        if kind == "ridge":
            return (alpha.log() - 2) ** 2 + 0.5
        degree = trial.suggest_int("degree", 1, 3)
        gamma = trial.suggest_float("gamma", 1e-4, 1e4, log=True)
        scale = trial.suggest_tensor("scale", degree, 0.0, 1.0)
        return (alpha.log() + 1) ** 2 + (gamma.log() - degree) ** 2 + (scale - 0.5).pow(2).sum()

    study = optuna.create_study(storage=storage, sampler=HypergradientSampler(seed=2))
    study.optimize(objective, n_trials=40)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert {t.params["kind"] for t in study.trials} == {"ridge", "kernel", "none"}
    assert study.best_value < 0.01
    nothing = [t.number for t in study.trials if t.params["kind"] == "none"]
    claimed = [study.trials[n].system_attrs.get("hypergrad:claim") for n in nothing]
    assert all(c is None or c["parent"] is None for c in claimed)


def test_shapes_may_follow_a_discrete_hyperparameter() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        width = trial.suggest_int("width", 1, 4)
        layers = {"w": torch.zeros(width, 2), "b": torch.zeros(width)}
        decay = trial.suggest_tensor_like("decay", layers, 1e-4, 1e4, log=True)
        return sum((d.log() - 1).pow(2).mean() for d in decay.values()) + 0.1 * width

    study = optuna.create_study(sampler=HypergradientSampler(seed=2))
    study.optimize(objective, n_trials=30)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert load_tensors(study)["decay"]["w"].shape == (study.best_params["width"], 2)
    assert study.best_value < 0.11


BASES = {
    "TPE": lambda: TPESampler(seed=0, n_startup_trials=3),
    "TPE by groups": lambda: TPESampler(seed=0, group=True, n_startup_trials=3),
    "random": lambda: RandomSampler(seed=0),
    "QMC": lambda: QMCSampler(seed=0, warn_independent_sampling=False),
    "CMA-ES": lambda: CmaEsSampler(seed=0, warn_independent_sampling=False),
    "grid": lambda: GridSampler({"kind": ["a", "b", "c"], "size": [1, 2, 3, 4]}, seed=0),
}


@pytest.mark.parametrize("base", BASES)
def test_other_base_samplers(base: str) -> None:
    study = optuna.create_study(sampler=HypergradientSampler(BASES[base]()))
    study.optimize(mixed, n_trials=45)
    assert len(study.trials) == 45
    assert study.best_value < 0.35
    assert len({(t.params["kind"], t.params["size"]) for t in study.trials}) >= 4


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_base_sampler_that_unpickles_what_is_stored_is_named_once(
    wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(_optuna.logger, "warning", lambda text, *a: said.append(text))

    def base() -> BaseSampler:
        inside = CmaEsSampler(seed=0, warn_independent_sampling=False)
        return PartialFixedSampler({"kind": "a"}, inside) if wrapped else inside

    for make, kind, named in ((base, "memory", 0), (TPESampler, "sqlite", 0), (base, "sqlite", 1)):
        sampler = HypergradientSampler(make())
        study = optuna.create_study(storage=open_storage(kind, tmp_path), sampler=sampler)
        study.optimize(mixed, n_trials=3)
        assert sum("CmaEsSampler" in text and "pickle" in text for text in said) == named


def test_a_fixed_number_stays_and_the_others_move() -> None:
    sampler = HypergradientSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(mixed, n_trials=3)
    study.sampler = PartialFixedSampler({"y": 3.0, "kind": "a", "size": 2}, sampler)
    study.optimize(mixed, n_trials=15)
    tried = study.trials[3:]
    assert {(t.params["y"], t.params["kind"], t.params["size"]) for t in tried} == {(3.0, "a", 2)}
    assert min(t.value for t in tried) == pytest.approx(16.0, abs=0.05)


def test_trials_of_other_samplers_are_shown_to_the_base_sampler() -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(mixed, n_trials=5)
    study.sampler = HypergradientSampler(seed=0)
    study.optimize(mixed, n_trials=10)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert len(study.trials) == 15


# Failures


def test_a_failed_start_is_not_started_again() -> None:
    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -2.0, 2.0)
        report_hypergradient(trial, {"x": 2 * x})
        return float("nan") if trial.number in (0, 1) else x**2

    study = optuna.create_study(sampler=HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=8)
    assert trajectories(study)[:3] == [0, 1, 2]
    assert len({t.params["x"] for t in study.trials[:3]}) == 3
    assert study.best_value < 0.1


def test_exceptions_that_are_caught_take_the_step_back() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        x = trial.suggest_float("x", 1e-4, 1e4, log=True, init=100.0)
        t = trial.suggest_tensor("t", 2, -1.0, 1.0)
        if trial.number in (1, 4):
            raise MemoryError
        return x.log() ** 4 + (t - 0.5).pow(4).sum()

    study = optuna.create_study(sampler=HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=14, catch=MemoryError)
    assert trajectories(study) == [0] * 14
    assert study.best_value < 0.05


@pytest.mark.parametrize("pruner", [MedianPruner(n_startup_trials=2), HyperbandPruner(1, 4)])
def test_pruners(pruner: optuna.pruners.BasePruner, storage: BaseStorage) -> None:
    @differentiable
    def objective(trial: DifferentiableTrial) -> Tensor:
        loss = mixed_with_tensor(trial)
        for step in range(4):
            trial.report(float(loss.detach()) + 1.0 / (step + 1), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return loss

    def mixed_with_tensor(trial: DifferentiableTrial) -> Tensor:
        kind = trial.suggest_categorical("kind", ["a", "b", "c"])
        x = trial.suggest_float("x", 1e-3, 1e3, log=True)
        t = trial.suggest_tensor("t", 2, 0.0, 1.0)
        return {"a": 0, "b": 1, "c": 0.3}[kind] + (x.log() - 1) ** 2 + (t - 0.1).pow(2).sum()

    study = optuna.create_study(
        study_name="pruned", storage=storage, pruner=pruner, sampler=HypergradientSampler(seed=0)
    )
    study.optimize(objective, n_trials=30)
    states = Counter(t.state for t in study.trials)
    assert states[TrialState.PRUNED] > 0
    assert states[TrialState.PRUNED] + states[TrialState.COMPLETE] == 30
    assert study.best_value < study.trials[0].value


def test_a_trial_that_is_told_elsewhere(storage: BaseStorage) -> None:
    """Numbers need nothing but the storage; tensors are done again."""
    sampler = HypergradientSampler(seed=0)
    study = optuna.create_study(study_name="s", storage=storage, sampler=sampler)
    for _ in range(6):
        trial = DifferentiableTrial.of(study.ask())
        x = trial.suggest_float("x", -2.0, 2.0)
        value = trial.backward((x - 0.7).abs() ** 1.5)
        elsewhere = optuna.load_study(
            study_name="s", storage=storage, sampler=HypergradientSampler(seed=0)
        )
        elsewhere.tell(trial.number, value)
    assert trajectories(study) == [0] * 6
    assert study.best_value < 0.05


def test_a_sampler_can_be_copied_and_pickled() -> None:
    import copy
    import pickle

    sampler = HypergradientSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(mixed, n_trials=3)
    reference = optuna.create_study(sampler=HypergradientSampler(seed=0))
    reference.optimize(mixed, n_trials=6)
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        again = optuna.create_study(sampler=twin)
        for trial in study.trials:
            again.add_trial(trial)
        again.optimize(mixed, n_trials=3)
        assert [t.params for t in again.trials] == [t.params for t in reference.trials]


@differentiable
def of_tensors(trial: Any) -> Tensor:
    return (trial.suggest_tensor("t", 3, -1.0, 1.0) - 0.3).pow(4).sum()


def test_another_optimizer_begins_another_trajectory_of_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sgd(tensors: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(tensors, lr=0.1)

    said: list[str] = []
    study = optuna.create_study(sampler=HypergradientSampler(seed=0, optimizer=sgd))
    study.optimize(of_tensors, n_trials=2)
    study.sampler = HypergradientSampler(seed=0, optimizer=torch.optim.SGD)
    study.optimize(of_tensors, n_trials=1)
    assert trajectories(study) == [0, 0, 0]
    logger = logging.getLogger("optuna.hypergradients")
    monkeypatch.setattr(logger, "warning", lambda text, *a, **k: said.append(str(text)))
    study.sampler = HypergradientSampler(seed=0)
    study.optimize(of_tensors, n_trials=2)
    assert trajectories(study) == [0, 0, 0, 3, 3]
    (warning,) = said
    assert (
        "taken by 'TorchOptimizer (SGD)', and optimizer= of this sampler is 'TrustRegion'"
        in warning
    )
    assert "damaged" not in warning


def test_an_outcome_that_does_not_name_its_rule_is_gone_on_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = optuna.create_study(sampler=HypergradientSampler(seed=0))
    with monkeypatch.context() as patch:
        patch.setattr(recording, "name_of", lambda rule: None)
        study.optimize(of_tensors, n_trials=2)
    assert all("rule" not in t.system_attrs["hypergrad:outcome"] for t in study.trials)
    study.sampler = HypergradientSampler(seed=0)
    study.optimize(of_tensors, n_trials=1)
    assert trajectories(study) == [0, 0, 0]


# Workers


def assert_no_step_is_done_twice(study: Study) -> None:
    done = [(c["trajectory"], c["parent"]) for c in claims(study) if c["parent"] is not None]
    assert len(done) == len(set(done))
    for trial in study.trials:
        outcome = trial.system_attrs["hypergrad:outcome"]
        claim = trial.system_attrs["hypergrad:claim"]
        assert (outcome["trajectory"], outcome["parent"]) == (claim["trajectory"], claim["parent"])


def test_a_step_may_have_a_lower_number_than_the_one_it_follows(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage, sampler=HypergradientSampler(seed=0))

    def work(trial: optuna.Trial) -> None:
        own = DifferentiableTrial.of(trial)
        study.tell(trial, own.backward((own.suggest_float("x", -3.0, 3.0) - 0.7) ** 4))

    work(study.ask())
    slow, quick = study.ask(), study.ask()
    work(quick)
    work(slow)
    assert [c["parent"] for c in claims(study)] == [None, 2, 0]
    study.sampler = HypergradientSampler(seed=0)
    work(study.ask())
    assert claims(study)[-1]["parent"] == slow.number


def test_retention_keeps_the_state_of_a_trajectory_that_was_opened_meanwhile() -> None:
    study = optuna.create_study(sampler=HypergradientSampler(seed=1))

    def evaluate(trial: DifferentiableTrial) -> float:
        trial.suggest_categorical("kind", ["a", "b", "c"])
        t = trial.suggest_tensor("t", (5,), -2.0, 2.0)
        return trial.backward(((t - 0.5) ** 2).mean())

    running = [DifferentiableTrial.of(study.ask()) for _ in range(4)]
    for trial, value in [(t, evaluate(t)) for t in running]:
        study.tell(trial, value)
    store = study.sampler.store_of(study)
    for trial in study.trials:
        (pointer,) = store.pointers(trial, "trajectory", "step_state")
        assert store.load(pointer)


@pytest.mark.parametrize("tensors", [False, True])
def test_threads_never_take_the_same_step(storage: BaseStorage, tensors: bool) -> None:
    together = threading.Barrier(4, timeout=60)

    @differentiable
    def objective(trial: Any) -> Tensor:
        x = trial.suggest_float("x", 1e-3, 1e3, log=True)
        loss = (x.log() - 1) ** 4
        if tensors:
            loss = loss + (trial.suggest_tensor("t", 2, 0.0, 1.0) - 0.2).pow(2).sum()
        if trial.number < 8:
            together.wait()
        return loss

    study = optuna.create_study(storage=storage, sampler=HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=24, n_jobs=4)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 24
    assert_no_step_is_done_twice(study)
    steps = Counter(trajectories(study))
    assert sorted(steps)[:4] == [0, 1, 2, 3]  # nobody waited
    assert [claims(study)[i]["source"] for i in range(4)].count("init") == 1
    assert len({t.params["x"] for t in study.trials[:4]}) == 4
    assert max(steps.values()) >= 4


def test_tensors_alone_do_not_start_twice_at_the_same_point() -> None:
    together = threading.Barrier(2, timeout=60)
    starts: dict[int, Tensor] = {}

    @differentiable
    def objective(trial: Any) -> Tensor:
        t = trial.suggest_tensor("t", 5, 0.0, 1.0)
        starts[trial.number] = t.detach().clone()
        together.wait()
        return (t - 0.2).pow(2).sum()

    study = optuna.create_study(sampler=HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=2, n_jobs=2)
    assert not torch.equal(starts[0], starts[1])


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_workers_with_their_own_samplers(kind: str, tmp_path: Path) -> None:
    optuna.create_study(study_name="s", storage=open_storage(kind, tmp_path))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            storage = open_storage(kind, tmp_path)
            study = optuna.load_study(
                study_name="s", storage=storage, sampler=HypergradientSampler(seed=0)
            )
            study.optimize(mixed, n_trials=8)
            storage.remove_session()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    study = optuna.load_study(study_name="s", storage=open_storage(kind, tmp_path))
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 32
    assert_no_step_is_done_twice(study)


# Cost


def test_work_per_trial_does_not_grow_with_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finished trial is decoded once: attributes are read a constant number of times a trial."""
    from optuna_hypergrad.studies import events

    reads = 0
    original = events.long_attribute

    def counting(attributes: dict[str, Any], key: str) -> dict[str, Any] | None:
        nonlocal reads
        reads += 1
        return original(attributes, key)

    monkeypatch.setattr(events, "long_attribute", counting)
    counts = []
    study = optuna.create_study(sampler=HypergradientSampler(seed=0, start="best", slice_steps=1))
    for _ in range(3):
        reads = 0
        study.optimize(mixed, n_trials=25)
        counts.append(reads)
    assert counts[2] <= counts[0] + 25


def test_a_thousand_numbers_fit_into_small_attributes(tmp_path: Path) -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        x = [trial.suggest_float(f"x{i:04d}", 1e-3, 1e3, log=True) for i in range(1500)]
        return (torch.stack(x).log() - 1).pow(2).mean()

    study = optuna.create_study(sampler=HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=4)
    assert study.best_value < 0.2
    for trial in study.trials:
        for value in trial.system_attrs.values():
            assert len(repr(value)) < 48_000


def test_more_numbers_than_an_attribute_holds() -> None:
    def objective(trial: optuna.Trial) -> float:
        x = np.array([trial.suggest_float(f"x{i}", -3.0, 3.0) for i in range(5000)])
        report_hypergradient(trial, {f"x{i}": 2 * v for i, v in enumerate(x)})
        return float((x**2).sum())

    study = optuna.create_study(sampler=HypergradientSampler(RandomSampler(seed=0)))
    study.optimize(objective, n_trials=3)
    assert trajectories(study) == [0, 0, 0]
    assert study.best_value < 0.5 * study.trials[0].value
    attrs = study.trials[0].system_attrs
    assert all(len(repr(v)) < 48_000 for v in attrs.values())


# Against the alternatives


def mixed_task(seed: int) -> Any:
    """Two discrete hyperparameters and sixteen numbers, whose best values depend on them."""
    rng = np.random.RandomState(seed)
    cost = rng.permutation(np.linspace(0.0, 3.0, 8))
    center = torch.tensor(rng.randn(16) * 2)
    by_kind, by_size = torch.tensor(rng.randn(8, 16) * 0.5), torch.tensor(rng.randn(16) * 0.1)
    stiffness, best = torch.logspace(-1.5, 0.5, 16, dtype=torch.float64), rng.uniform(2, 14)

    def objective(trial: Any) -> Any:
        kind = trial.suggest_categorical("kind", list("abcdefgh"))
        size = trial.suggest_int("size", 0, 15)
        x = [trial.suggest_float(f"x{i:02d}", 1e-4, 1e4, log=True) for i in range(16)]
        u = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in x]).log()
        i = "abcdefgh".index(kind)
        away = u - center - by_kind[i] - by_size * (size - 8)
        ground = float(cost[i]) + 0.03 * (size - best) ** 2
        return ground + (stiffness * away**2).mean()

    return objective


def test_trajectories_beat_sampling_and_tpe_beats_random_settings() -> None:
    def best(sampler: BaseSampler, seed: int) -> float:
        objective = mixed_task(seed)
        study = optuna.create_study(sampler=sampler)
        if isinstance(sampler, HypergradientSampler):
            study.optimize(differentiable(objective), n_trials=80)
        else:
            study.optimize(lambda t: float(objective(t)), n_trials=80)
        return study.best_value

    seeds = range(12)
    ours = [best(HypergradientSampler(seed=s), s) for s in seeds]
    random: Sequence[float] = [best(HypergradientSampler(RandomSampler(seed=s)), s) for s in seeds]
    tpe = [best(TPESampler(seed=s), s) for s in seeds]
    assert np.median(ours) < 0.1 * np.median(tpe)
    assert np.median(ours) < np.median(random)
