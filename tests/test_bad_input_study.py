"""Bad input on the Optuna side: refused with words, and nothing that was stored is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState
from torch import Tensor, nn

from optuna_hypergrad import (
    HypergradError,
    HyperparameterError,
    ObjectiveError,
    RequirementError,
    SolverError,
    StorageError,
    ZeroHypergradientError,
)
from optuna_hypergrad.studies import (
    DifferentiableTrial,
    HypergradientSampler,
    differentiable,
    load_tensors,
    report_hypergradient,
)

Objective = Callable[[Any], Any]
INF, NAN = float("inf"), float("nan")


def make_study(storage: BaseStorage | None = None, **settings: Any) -> optuna.Study:
    return optuna.create_study(
        study_name="s",
        storage=storage,
        sampler=HypergradientSampler(seed=0, **settings),
        load_if_exists=True,
    )


def suggesting(suggest: Objective) -> Objective:
    def objective(trial: Any) -> Tensor:
        suggested = suggest(trial)
        raise AssertionError(f"work was done with {suggested}")

    return objective


UNUSABLE = {
    "reversed bounds": (lambda t: t.suggest_float("p", 1.0, 0.0), "swap"),
    "reversed bounds of a tensor": (lambda t: t.suggest_tensor("p", 2, 1.0, 0.0), "swap"),
    "reversed bounds of a dict": (
        lambda t: t.suggest_tensor_like("p", {"a": torch.ones(2)}, 1.0, 0.0),
        "swap",
    ),
    "NaN bound": (lambda t: t.suggest_tensor("p", 2, NAN, 0.0), "NaN"),
    "a bound that is no number": (lambda t: t.suggest_float("p", "0", 1.0), "give a float"),
    "infinite bound of a number": (lambda t: t.suggest_float("p", 0.0, INF), "suggest_tensor"),
    "zero with log": (lambda t: t.suggest_float("p", 0.0, 1.0, log=True), "log=False"),
    "negative with log": (lambda t: t.suggest_tensor("p", 2, -1.0, 1.0, log=True), "raise low"),
    "infinite with log": (lambda t: t.suggest_tensor("p", 2, 1.0, INF, log=True), "finite high"),
    "init outside": (lambda t: t.suggest_float("p", 0.0, 1.0, init=2.0), "widen the bounds"),
    "init NaN": (lambda t: t.suggest_float("p", 0.0, 1.0, init=NAN), "outside"),
    "init infinite": (lambda t: t.suggest_tensor("p", 2, -INF, INF, init=INF), "outside"),
    "init of a tensor outside": (
        lambda t: t.suggest_tensor("p", 2, 0.0, 1.0, init=torch.tensor([0.5, 3.0])),
        "clamp",
    ),
    "init of a tensor NaN": (
        lambda t: t.suggest_tensor("p", 2, 0.0, 1.0, init=torch.tensor([0.5, NAN])),
        "not finite",
    ),
    "init of another shape": (
        lambda t: t.suggest_tensor("p", (2, 3), 0.0, 1.0, init=torch.zeros(3)),
        r"shape \(3,\), not \(2, 3\)",
    ),
    "init of another dtype": (
        lambda t: t.suggest_tensor(
            "p", 2, 0.0, 1.0, init=torch.zeros(2, dtype=torch.float64), dtype=torch.float32
        ),
        "init.to",
    ),
    "init of integers": (
        lambda t: t.suggest_tensor("p", 2, 0.0, 1.0, init=np.zeros(2, dtype=int)),
        "floating",
    ),
    "init with a step": (
        lambda t: t.suggest_float("p", 0.0, 1.0, step=0.5, init=0.5),
        "enqueue_trial",
    ),
    "dtype of integers": (
        lambda t: t.suggest_tensor("p", 2, 0.0, 1.0, dtype=torch.int64),
        "floating-point",
    ),
    "complex dtype": (
        lambda t: t.suggest_tensor("p", 2, 0.0, 1.0, dtype=torch.complex64),
        "floating-point",
    ),
    "negative shape": (lambda t: t.suggest_tensor("p", (2, -1), 0.0, 1.0), "positive integers"),
    "empty shape": (lambda t: t.suggest_tensor("p", (0,), 0.0, 1.0), "at least one entry"),
    "broken shape": (lambda t: t.suggest_tensor("p", (2, 1.5), 0.0, 1.0), "positive integers"),
    "empty dict": (lambda t: t.suggest_tensor_like("p", {}, 0.0, 1.0), "non-empty"),
    "dict of lists": (lambda t: t.suggest_tensor_like("p", {"a": [1.0]}, 0.0, 1.0), "tensors"),
    "dict of integers": (
        lambda t: t.suggest_tensor_like("p", {"a": torch.arange(3)}, 0.0, 1.0),
        "floating-point",
    ),
    "init with other keys": (
        lambda t: t.suggest_tensor_like(
            "p", {"a": torch.ones(1)}, 0.0, 1.0, init={"b": torch.ones(1)}
        ),
        "keys of params",
    ),
    "no module": (lambda t: t.suggest_module("p", torch.ones(1)), r"torch\.nn\.Module"),
    "module without weights": (lambda t: t.suggest_module("p", nn.ReLU()), "no weights"),
    "empty name": (lambda t: t.suggest_tensor("", 2, 0.0, 1.0), "non-empty string"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_hyperparameters_are_refused_before_work(case: str) -> None:
    suggest, remedy = UNUSABLE[case]
    study = make_study()
    with pytest.raises(HyperparameterError, match=remedy) as raised:
        study.optimize(differentiable(suggesting(suggest)), n_trials=1)
    assert "'p'" in str(raised.value) or "'p/" in str(raised.value) or case == "empty name"


TWICE = {
    "bounds": lambda t: (t.suggest_float("p", 0.0, 1.0), t.suggest_float("p", 0.0, 2.0)),
    "log": lambda t: (t.suggest_float("p", 0.1, 1.0), t.suggest_float("p", 0.1, 1.0, log=True)),
    "number and tensor": lambda t: (
        t.suggest_float("p", 0.0, 1.0),
        t.suggest_tensor("p", (), 0.0, 1.0),
    ),
    "shape": lambda t: (t.suggest_tensor("p", 2, 0.0, 1.0), t.suggest_tensor("p", 3, 0.0, 1.0)),
    "dtype": lambda t: (
        t.suggest_tensor("p", 2, 0.0, 1.0),
        t.suggest_tensor("p", 2, 0.0, 1.0, dtype=torch.float64),
    ),
    "entry of a dict": lambda t: (
        t.suggest_tensor_like("p", {"a": torch.ones(1)}, 0.0, 1.0),
        t.suggest_tensor("p/a", 2, 0.0, 1.0),
    ),
}


@pytest.mark.parametrize("case", TWICE)
def test_one_name_for_two_things_in_a_trial(case: str) -> None:
    study = make_study()
    with pytest.raises(HyperparameterError, match="'p"):
        study.optimize(differentiable(suggesting(TWICE[case])), n_trials=1)


def good(trial: Any) -> Tensor:
    p = trial.suggest_float("p", 0.1, 1.0)
    q = trial.suggest_tensor("q", 2, 0.0, 1.0)
    return (p - 0.4) ** 4 + (q - 0.2).pow(4).sum()


ACROSS = {
    "bounds": lambda t: t.suggest_float("p", 0.0, 2.0) ** 2,
    "log": lambda t: t.suggest_float("p", 0.1, 1.0, log=True) ** 2,
    "a number becomes a tensor": lambda t: t.suggest_tensor("p", (), 0.1, 1.0) ** 2,
    "a tensor becomes a number": lambda t: t.suggest_float("q", 0.0, 1.0) ** 2,
    "shape": lambda t: t.suggest_tensor("q", 3, 0.0, 1.0).sum(),
    "dtype": lambda t: t.suggest_tensor("q", 2, 0.0, 1.0, dtype=torch.float64).sum(),
    "bounds of a tensor": lambda t: t.suggest_tensor("q", 2, 0.0, 3.0).sum(),
    "a tensor becomes a dict": lambda t: t.suggest_tensor_like("q", {"a": torch.ones(2)}, 0.0, 1.0)[
        "a"
    ].sum(),
}


@pytest.mark.parametrize("case", ACROSS)
def test_one_name_for_two_things_in_a_study(case: str, storage: BaseStorage) -> None:
    study = make_study(storage)
    study.optimize(differentiable(good), n_trials=3)
    before = [(t.params, t.values) for t in study.trials]
    tensors = load_tensors(study)
    study = make_study(storage)  # a new sampler, as in another process
    with pytest.raises(HyperparameterError, match=r"'[pq]'"):
        study.optimize(differentiable(ACROSS[case]), n_trials=1)
    assert [(t.params, t.values) for t in study.trials[:3]] == before
    assert torch.equal(load_tensors(study)["q"], tensors["q"])
    value = study.best_value
    study.optimize(differentiable(good), n_trials=2)
    assert study.best_value < value
    assert study.trials[4].system_attrs["hypergrad:claim"]["trajectory"] == 0


def test_plain_bounds_that_change_are_refused_too() -> None:
    def objective(trial: optuna.Trial) -> float:
        p = trial.suggest_float("p", 0.0, 1.0 + trial.number)
        report_hypergradient(trial, {"p": 2 * p})
        return p**2

    study = make_study()
    with pytest.raises(HyperparameterError, match=r"'p'.*high=1.0"):
        study.optimize(objective, n_trials=2)


def leaf(trial: Any) -> Tensor:
    return trial.suggest_float("p", 0.1, 1.0)


LOSSES: dict[str, tuple[Objective, type[HypergradError], str]] = {
    "no path": (lambda t: leaf(t).detach() ** 2, ObjectiveError, "no path to 'p'"),
    "a float": (lambda t: float(leaf(t).detach()), ObjectiveError, "Return the loss tensor"),
    "nothing": (lambda t: leaf(t) and None, ObjectiveError, "NoneType"),
    "two values": (lambda t: (leaf(t), leaf(t)), ObjectiveError, "tuple"),
    "not scalar": (lambda t: leaf(t) * torch.ones(3), ObjectiveError, "mean"),
    "no entry": (lambda t: leaf(t) * torch.ones(0), ObjectiveError, "one number"),
    "NaN at the start": (lambda t: leaf(t) * NAN, ObjectiveError, "init="),
    "infinite at the start": (lambda t: leaf(t) / 0.0, ObjectiveError, "inf"),
    "one unused": (
        lambda t: (t.suggest_float("unused", 0.0, 1.0), leaf(t) ** 2)[1],
        ZeroHypergradientError,
        "'unused'",
    ),
    "entry unused": (
        lambda t: t.suggest_tensor_like(
            "d", {"used": torch.ones(1), "not": torch.ones(1)}, 0.0, 2.0
        )["used"].sum(),
        ZeroHypergradientError,
        "'d/not'",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_without_a_hypergradient(case: str) -> None:
    objective, kind, words = LOSSES[case]
    study = make_study()
    with pytest.raises(kind, match=words):
        study.optimize(differentiable(objective), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL
    study.optimize(differentiable(lambda t: leaf(t) ** 2), n_trials=2)
    assert study.trials[1].params == {"p": 0.55}


def test_unused_can_be_allowed() -> None:
    @differentiable(allow_unused=True)
    def objective(trial: Any) -> Tensor:
        x, y = trial.suggest_float("x", -1.0, 1.0), trial.suggest_float("y", -1.0, 1.0)
        return (x - 0.5) ** 2 if trial.number % 2 else (x - 0.5) ** 2 + y**2

    study = make_study()
    study.optimize(objective, n_trials=4)
    assert study.best_value < 0.1


def test_writing_into_a_leaf() -> None:
    def in_place(trial: Any) -> Tensor:
        p = leaf(trial)
        with torch.no_grad():
            p.mul_(0.5)
        return p**2

    def behind_its_back(trial: Any) -> Tensor:
        q = trial.suggest_tensor("q", 3, 0.0, 1.0)
        q.data[1] = 0.25
        return q.sum()

    for objective, name in ((in_place, "'p'"), (behind_its_back, "'q'")):
        with pytest.raises(ObjectiveError, match=rf"{name} in place.*clone"):
            make_study().optimize(differentiable(objective), n_trials=1)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_non_finite_loss_takes_the_step_back(bad: float, direction: str) -> None:
    sign = 1.0 if direction == "minimize" else -1.0

    @differentiable
    def objective(trial: Any) -> Tensor:
        p = trial.suggest_float("p", 1e-4, 1e4, log=True, init=100.0)
        q = trial.suggest_tensor("q", 2, 0.0, 1.0)
        loss = sign * (p.log() ** 2 + (q - 0.25).pow(2).sum())
        return loss * bad if trial.number in (2, 3) else loss

    study = optuna.create_study(sampler=HypergradientSampler(seed=0), direction=direction)
    study.optimize(objective, n_trials=14)
    states = [t.state for t in study.trials]
    assert states[2:4] == [TrialState.FAIL] * 2
    assert states.count(TrialState.FAIL) == 2
    x = [t.params["p"] for t in study.trials]
    assert abs(np.log(x[3] / x[1])) < abs(np.log(x[2] / x[1]))
    assert sign * study.best_value < 0.05


def test_non_finite_gradient_takes_the_step_back() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        p = trial.suggest_float("p", 1e-4, 1e4, log=True, init=100.0)
        loss = p.log() ** 2
        if trial.number == 2:
            loss = loss + 0.0 * (p - p.detach()).sqrt()  # derivative 0 * inf
        return loss

    study = make_study()
    study.optimize(objective, n_trials=12)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert study.best_value < 0.05


def test_a_failed_inner_solve_takes_the_step_back() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        p = trial.suggest_float("p", 1e-4, 1e4, log=True, init=100.0)
        if trial.number == 2:
            raise SolverError("The inner solve did not converge; give it more steps.")
        return p.log() ** 2

    study = make_study()
    study.optimize(objective, n_trials=10)
    assert [t.number for t in study.trials if t.state == TrialState.FAIL] == [2]
    assert study.best_value < 0.05


def test_multi_objective_study() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=HypergradientSampler())
    with pytest.raises(RequirementError, match="2 objectives"):
        study.optimize(differentiable(leaf), n_trials=1)
    with pytest.raises(ValueError, match="one objective"):
        study.optimize(lambda t: (t.suggest_float("x", 0, 1), 0.0), n_trials=1)


class NowhereStorage(InMemoryStorage):
    """Like a gRPC proxy: a storage without a place for tensors."""


def test_storage_that_cannot_hold_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna_hypergrad.stores import MemoryArtifactStore

    monkeypatch.setattr(MemoryArtifactStore, "beside", classmethod(lambda cls, storage: None))
    study = make_study(NowhereStorage())
    with pytest.raises(StorageError, match="tensor_store="):
        study.optimize(
            differentiable(suggesting(lambda t: t.suggest_tensor("p", 2, 0.0, 1.0))), n_trials=1
        )
    study = make_study(NowhereStorage())
    study.optimize(differentiable(lambda t: leaf(t) ** 2), n_trials=3)
    assert study.best_value < study.trials[0].value


def test_another_sampler_cannot_suggest_tensors() -> None:
    study = optuna.create_study(sampler=RandomSampler())
    with pytest.raises(HyperparameterError, match=r"'p'.*RandomSampler.*HypergradientSampler"):
        study.optimize(
            differentiable(suggesting(lambda t: t.suggest_tensor("p", 2, 0.0, 1.0))), n_trials=1
        )


REPORTS: dict[str, tuple[dict[str, Any], type[HypergradError], str]] = {
    "unknown name": ({"alhpa": 1.0}, HyperparameterError, "did you mean 'alpha'"),
    "integer": ({"n": 1.0}, HyperparameterError, "'n'"),
    "category": ({"c": 1.0}, HyperparameterError, "'c'"),
    "with a step": ({"coarse": 1.0}, HyperparameterError, "step="),
    "a vector": ({"alpha": [1.0, 2.0]}, ObjectiveError, "one number"),
    "words": ({"alpha": "steep"}, ObjectiveError, "not a number"),
    "shape": ({"t": torch.ones(3)}, ObjectiveError, r"shape \(3,\)"),
    "keys": ({"d": {"b": torch.ones(2)}}, ObjectiveError, "keys 'a'"),
}


@pytest.mark.parametrize("case", REPORTS)
def test_reported_gradients_that_make_no_sense(case: str) -> None:
    gradients, kind, words = REPORTS[case]

    @differentiable
    def objective(trial: DifferentiableTrial) -> float:
        trial.suggest_float("alpha", 0.0, 1.0)
        trial.suggest_float("coarse", 0.0, 1.0, step=0.5)
        trial.suggest_int("n", 0, 3)
        trial.suggest_categorical("c", ["x", "y"])
        trial.suggest_tensor("t", 2, 0.0, 1.0)
        trial.suggest_tensor_like("d", {"a": torch.ones(2)}, 0.0, 1.0)
        report_hypergradient(trial, gradients)
        raise AssertionError("accepted")

    with pytest.raises(kind, match=words):
        make_study().optimize(objective, n_trials=1)


def test_commit_checks_names_and_bounds() -> None:
    def objective(trial: DifferentiableTrial, value: dict[str, Tensor]) -> float:
        trial.suggest_tensor("t", 2, 0.0, 1.0)
        trial.commit(value)
        return 0.0

    for value, words in (
        ({"other": torch.ones(2)}, "'other'"),
        ({"t": torch.ones(3)}, "shape"),
        ({"t": 2 * torch.ones(2)}, "outside"),
    ):
        with pytest.raises((HyperparameterError, ObjectiveError), match=words):
            make_study().optimize(differentiable(lambda t, v=value: objective(t, v)), n_trials=1)


SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"base_sampler": "tpe"}, TypeError, "base_sampler"),
    ({"base_sampler": HypergradientSampler()}, TypeError, "itself"),
    ({"optimizer": "no-such"}, ValueError, "no-such"),
    ({"optimizer": 3}, TypeError, "optimizer"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": 0.5}, ValueError, "seed"),
    ({"start": "anywhere"}, ValueError, "start"),
    ({"slice_steps": 0}, ValueError, "slice_steps"),
    ({"reduction": 1}, ValueError, "reduction"),
    ({"max_steps": 0}, ValueError, "max_steps"),
    ({"patience": 0}, ValueError, "patience"),
    ({"lease": 0}, ValueError, "lease"),
    ({"lease": "5"}, ValueError, "lease"),
    ({"lease": True}, ValueError, "lease"),
    ({"lease": float("nan")}, ValueError, "lease"),
]


@pytest.mark.parametrize(("settings", "kind", "words"), SETTINGS)
def test_settings_out_of_range(settings: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        HypergradientSampler(**settings)


def test_things_that_are_no_trials() -> None:
    with pytest.raises(TypeError, match="not int"):
        differentiable(leaf)(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of"):
        DifferentiableTrial()
    with pytest.raises(TypeError, match=r"optuna\.Trial"):
        DifferentiableTrial.of(optuna.trial.FixedTrial({}))  # type: ignore[arg-type]


def test_replay_without_tensors_says_what_is_missing() -> None:
    with pytest.raises(HyperparameterError, match="load_tensors"):
        differentiable(good)(optuna.trial.FixedTrial({"p": 0.5}))
    with pytest.raises(HyperparameterError, match="shape"):
        differentiable(good)(optuna.trial.FixedTrial({"p": 0.5, "q": torch.ones(3)}))  # type: ignore[dict-item]
