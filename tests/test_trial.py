"""What a differentiable trial suggests, records and replays."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage
from optuna.trial import FixedTrial, TrialState
from torch import Tensor, nn

from optuna_hypergrad import HyperparameterError, MissingTensorError, StorageError, _optuna
from optuna_hypergrad.stores import AtomicFileSystemArtifactStore, TensorStore
from optuna_hypergrad.studies import (
    DifferentiableTrial,
    HypergradientSampler,
    differentiable,
    load_tensors,
    report_hypergradient,
)


def make_study(storage: BaseStorage | None = None, **settings: Any) -> optuna.Study:
    settings = {"seed": 0, **settings}
    return optuna.create_study(storage=storage, sampler=HypergradientSampler(**settings))


@differentiable
def everything(trial: Any) -> Tensor:
    width = trial.suggest_int("width", 2, 3)
    kind = trial.suggest_categorical("kind", ["a", "b"])
    coarse = trial.suggest_float("coarse", 0.0, 1.0, step=0.25)
    assert isinstance(width, int)
    assert isinstance(kind, str)
    assert type(coarse) is float
    x = trial.suggest_float("x", 1e-3, 1e3, log=True)
    y = trial.suggest_float("y", -5.0, 5.0)
    decay = trial.suggest_tensor("decay", (width, 2), 1e-6, 1e2, log=True)
    like = trial.suggest_tensor_like("like", {"w/0": torch.zeros(3), "b": torch.ones(1)}, -1.0, 2.0)
    loss = (x.log() - 1) ** 2 + (y - 2) ** 2 + (decay.log() + 1).pow(2).mean() + coarse
    return loss + sum((v - 0.3).pow(2).sum() for v in like.values()) + (kind == "b") + 0.1 * width


def test_each_entry_of_a_dict_may_have_bounds_of_its_own() -> None:
    low, high = {"a": -1.0, "b": 0.1}, {"a": 1.0, "b": 0.3}
    like = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}

    @differentiable
    def objective(trial: DifferentiableTrial) -> Tensor:
        tree = trial.suggest_tensor_like("d", like, low, high)
        return tree["a"].sum() * 1e3 - tree["b"].sum() * 1e3

    study = make_study()
    study.optimize(objective, n_trials=6)
    for trial in study.trials[-2:]:
        found = load_tensors(trial, study=study)["d"]
        assert all(bool(((found[k] >= low[k]) & (found[k] <= high[k])).all()) for k in like)
    assert torch.equal(found["a"], torch.full((3,), -1.0))
    assert torch.equal(found["b"], torch.tensor(0.3).nextafter(torch.tensor(0.0)).expand(2, 2))
    high["b"] = 0.2
    with pytest.raises(HyperparameterError, match="'d' is defined otherwise"):
        study.optimize(objective, n_trials=1)
    del high["b"]
    with pytest.raises(HyperparameterError, match=r"high and params differ in \['b'\]"):
        study.optimize(objective, n_trials=1)


def test_floats_are_leaves_and_the_rest_is_plain() -> None:
    seen = {}

    @differentiable
    def objective(trial: DifferentiableTrial) -> Tensor:
        seen["x"] = trial.suggest_float("x", 0.0, 1.0)
        assert trial.suggest_float("x", 0.0, 1.0) is seen["x"]
        return seen["x"] ** 2

    study = make_study()
    study.optimize(objective, n_trials=1)
    x = seen["x"]
    assert x.is_leaf
    assert x.requires_grad
    assert x.shape == ()
    assert x.dtype is torch.float64
    assert float(x.detach()) == study.trials[0].params["x"] == 0.5
    assert type(study.trials[0].params["x"]) is float


def test_everything_is_tuned_stored_and_replayed(storage: BaseStorage) -> None:
    study = make_study(storage)
    study.optimize(everything, n_trials=12)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 12
    assert study.best_value < study.trials[0].value
    tensors = load_tensors(study)
    assert set(tensors) == {"decay", "like"}
    assert tensors["decay"].shape == (study.best_params["width"], 2)
    assert tensors["like"].keys() == {"w/0", "b"}
    assert load_tensors(study, "decay").keys() == {"decay"}
    replayed = everything(FixedTrial({**study.best_params, **tensors}))
    assert replayed == pytest.approx(study.best_value, abs=1e-12)
    for trial in study.trials:
        assert set(trial.params) == {"width", "kind", "coarse", "x", "y"}
        for name in ("x", "y"):
            distribution = trial.distributions[name]
            assert isinstance(distribution, FloatDistribution)
            assert distribution.low <= trial.params[name] <= distribution.high


def test_frozen_trial_replays_numbers() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        return (trial.suggest_float("x", -1.0, 1.0) - 0.3) ** 2

    study = make_study()
    study.optimize(objective, n_trials=4)
    assert objective(study.best_trial) == study.best_value


def test_first_trajectory_starts_at_init_or_the_middle() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        parts = [
            trial.suggest_float("given", 0.0, 1.0, init=0.125),
            trial.suggest_float("log", 1e-4, 1e2, log=True),
            trial.suggest_float("linear", -1.0, 3.0),
            trial.suggest_tensor("number", 2, 0.0, 1.0, init=0.25).sum(),
            trial.suggest_tensor("unbounded", (), -float("inf"), float("inf")),
            trial.suggest_tensor("tensor", (2,), 0.0, 1.0, init=torch.tensor([0.1, 0.2])).sum(),
            trial.suggest_tensor("array", (2,), 0.0, 1.0, init=np.array([0.5, 1.0])).sum(),
        ]
        return torch.stack([p.double() for p in parts]).pow(2).sum()

    study = make_study()
    study.optimize(objective, n_trials=1)
    params, tensors = study.trials[0].params, load_tensors(study)
    assert params == {"given": 0.125, "log": pytest.approx(0.1), "linear": 1.0}
    assert tensors["number"].tolist() == [0.25, 0.25]
    assert tensors["unbounded"].item() == 0.0
    assert torch.equal(tensors["tensor"], torch.tensor([0.1, 0.2]))
    assert tensors["array"].tolist() == [0.5, 1.0]


def test_enqueued_values_open_a_trajectory_that_goes_on_from_there() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        x = trial.suggest_float("x", -4.0, 4.0)
        y = trial.suggest_float("y", -4.0, 4.0, init=1.0)
        return (x - 0.5) ** 2 + y**2

    study = make_study()
    study.enqueue_trial({"x": 3.0})
    study.optimize(objective, n_trials=4)
    assert study.trials[0].params == {"x": 3.0, "y": 1.0}
    assert study.trials[1].params["x"] < 3.0
    claims = [t.system_attrs["hypergrad:claim"] for t in study.trials]
    assert [c["trajectory"] for c in claims] == [0, 0, 0, 0]


def test_module_weights_as_hyperparameters() -> None:
    torch.manual_seed(0)
    data, target = torch.randn(20, 3), torch.randn(20, 1)

    @differentiable
    def objective(trial: Any) -> Tensor:
        torch.manual_seed(1)
        module = nn.Linear(3, 1)
        weights = trial.suggest_module("net", module)
        assert weights.keys() == {"weight", "bias"}
        return (torch.func.functional_call(module, weights, (data,)) - target).pow(2).mean()

    study = make_study()
    study.optimize(objective, n_trials=10)
    assert study.best_value < 0.9 * study.trials[0].value
    assert load_tensors(study)["net"]["weight"].shape == (1, 3)


def test_tensors_move_like_numbers() -> None:
    """One problem written with numbers, and with a tensor: the same trajectory."""

    @differentiable
    def numbers(trial: Any) -> Tensor:
        x = torch.stack([trial.suggest_float(f"x{i}", 1e-4, 1e4, log=True) for i in range(4)])
        return (x.log() - torch.arange(4)).pow(2).sum()

    @differentiable
    def tensor(trial: Any) -> Tensor:
        x = trial.suggest_tensor("x", (4,), 1e-4, 1e4, log=True, dtype=torch.float64)
        return (x.log() - torch.arange(4)).pow(2).sum()

    values = []
    for objective in (numbers, tensor):
        study = make_study()
        study.optimize(objective, n_trials=8)
        values.append([t.value for t in study.trials])
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_ask_and_tell() -> None:
    study = make_study()
    for _ in range(6):
        trial = DifferentiableTrial.of(study.ask())
        x = trial.suggest_float("x", -2.0, 2.0)
        study.tell(trial, trial.backward((x - 0.7) ** 2))
    assert study.best_value < study.trials[0].value
    assert isinstance(trial, optuna.Trial)
    assert DifferentiableTrial.of(trial) is trial


@pytest.mark.parametrize("kind", ["float", "numpy", "torch"])
def test_gradients_from_elsewhere(storage: BaseStorage, kind: str) -> None:
    convert = {"float": float, "numpy": np.float32, "torch": torch.tensor}[kind]

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 1e-3, 1e3, log=True)
        y = trial.suggest_float("y", -5.0, 5.0)
        report_hypergradient(trial, {"x": convert(2 * np.log(x) / x)})
        report_hypergradient(trial, {"y": convert(2 * (y - 2))})
        return float(np.log(x) ** 2 + (y - 2) ** 2)

    study = make_study(storage)
    study.enqueue_trial({"x": 30.0, "y": -4.0})
    study.optimize(objective, n_trials=16)
    assert study.best_value < 0.1
    assert all(type(v) is float for t in study.trials for v in t.params.values())


def test_gradients_of_tensors_from_elsewhere() -> None:
    @differentiable
    def objective(trial: DifferentiableTrial) -> float:
        x = trial.suggest_tensor("x", (3,), -1.0, 1.0).detach().numpy()
        tree = trial.suggest_tensor_like("tree", {"a": torch.zeros(2)}, -1.0, 1.0)
        a = tree["a"].detach()
        report_hypergradient(trial, {"x": 2 * (x - 0.5), "tree": {"a": 2 * (a - 0.25)}})
        return float(((x - 0.5) ** 2).sum() + (a - 0.25).pow(2).sum())

    study = make_study()
    study.optimize(objective, n_trials=12)
    assert study.best_value < 0.1 * study.trials[0].value


def test_another_sampler_runs_the_same_objective_without_gradients() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        return (trial.suggest_float("x", -1.0, 1.0) - 0.3) ** 2

    random = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=random)
    study.optimize(objective, n_trials=3)
    plain = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    plain.optimize(lambda t: t.suggest_float("x", -1.0, 1.0), n_trials=3)
    assert [t.params for t in study.trials] == [t.params for t in plain.trials]


def test_committed_tensors_are_what_is_stored(storage: BaseStorage) -> None:
    @differentiable
    def objective(trial: DifferentiableTrial) -> float:
        trial.suggest_int("width", 1, 3)
        start = trial.suggest_tensor("x", (2,), 0.0, 1.0)
        tuned = (start.detach() + 0.25).clamp(0.0, 1.0)
        trial.commit({"x": tuned})
        return float(tuned.sum())

    study = make_study(storage, start="init")
    study.optimize(objective, n_trials=3)
    assert load_tensors(study)["x"].tolist() == [0.75, 0.75]
    assert [t.system_attrs["hypergrad:claim"]["trajectory"] for t in study.trials] == [0, 1, 2]


def test_load_tensors_of_one_trial() -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        if trial.number == 2:
            raise optuna.TrialPruned
        return trial.suggest_tensor("x", (2,), 0.0, 1.0).sum()

    study = make_study()
    study.optimize(objective, n_trials=3)
    first = load_tensors(study.trials[0], study=study)
    assert first["x"].tolist() == [0.5, 0.5]
    with pytest.raises(MissingTensorError, match="Trial 2"):
        load_tensors(study.trials[2], study=study)
    with pytest.raises(MissingTensorError, match="no tensor 'y'; it has 'x'"):
        load_tensors(study.trials[0], "y", study=study)
    with pytest.raises(TypeError, match="study="):
        load_tensors(study.trials[0])


def test_load_tensors_of_a_study_whose_best_trial_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        return (trial.suggest_tensor("x", (2,), 0.0, 1.0) ** 2).sum()

    warned: list[str] = []
    monkeypatch.setattr(_optuna.logger, "warning", warned.append)
    study = make_study()
    with pytest.raises(MissingTensorError, match="no trial is completed yet"):
        load_tensors(study)
    study.add_trial(optuna.create_trial(value=-1.0))
    with pytest.raises(MissingTensorError, match="No completed trial"):
        load_tensors(study)
    study.optimize(objective, n_trials=2)
    warned.clear()
    found = load_tensors(study)
    assert torch.equal(found["x"], load_tensors(study.trials[2], study=study)["x"])
    [told] = warned
    assert "Trial 0 " in told
    assert "those of trial 2 " in told
    study.add_trial(optuna.create_trial(value=-2.0, system_attrs=study.trials[2].system_attrs))
    store = study.sampler.store_of(study)  # type: ignore[attr-defined]
    store.discard(*store.pointers(study.trials[2]))
    assert torch.equal(
        load_tensors(study, "x")["x"], load_tensors(study.trials[1], study=study)["x"]
    )
    store.discard(*store.pointers(study.trials[1]))
    with pytest.raises(MissingTensorError, match=r"of trial [23]"):
        load_tensors(study)
    several = optuna.create_study(directions=["minimize"] * 2)
    with pytest.raises(MissingTensorError, match="several objectives"):
        load_tensors(several)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_base_sampler_that_counts_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="Use GridSampler"):
        HypergradientSampler(optuna.samplers.BruteForceSampler())


@pytest.mark.parametrize("path", ["", "file", "file/below"])
def test_a_tensor_store_that_can_be_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file' is not a directory" if path else "empty path"):
        HypergradientSampler(tensor_store=path)


@pytest.mark.parametrize(
    "cause", [NotADirectoryError(20, "Not a directory"), PermissionError(13, "")]
)
def test_a_tensor_store_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: OSError
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise cause

    store = AtomicFileSystemArtifactStore(tmp_path / "tensors")
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(StorageError, match="cannot be written to the directory"):
        store.write("x", io.BytesIO())


def test_a_relative_tensor_store_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        return trial.suggest_tensor("x", (2,), 0.0, 1.0).sum()

    monkeypatch.chdir(tmp_path)
    study = make_study(tensor_store="tensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    study.optimize(objective, n_trials=1)
    assert any((tmp_path / "tensors").iterdir())


def test_a_tensor_store_of_another_storage_is_refused(tmp_path: Path) -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        return trial.suggest_tensor("x", (2,), 0.0, 1.0).sum()

    url, other = f"sqlite:///{tmp_path}/study.db", f"sqlite:///{tmp_path}/other.db"
    study = optuna.create_study(storage=url)
    foreign = optuna.create_study(storage=other)
    study.sampler = HypergradientSampler(tensor_store=TensorStore.of_study(foreign))
    with pytest.raises(StorageError, match="made for another storage"):
        study.optimize(objective, n_trials=1)
    same = optuna.load_study(study_name=study.study_name, storage=url)
    study.sampler = HypergradientSampler(tensor_store=TensorStore.of_study(same))
    study.optimize(objective, n_trials=1)
    assert load_tensors(study)["x"].shape == (2,)


def test_tensor_store_of_the_users_choice(tmp_path: Path) -> None:
    @differentiable
    def objective(trial: Any) -> Tensor:
        return trial.suggest_tensor("x", (2,), 0.0, 1.0).sum()

    study = make_study(tensor_store=tmp_path / "tensors")
    study.optimize(objective, n_trials=3)
    assert any((tmp_path / "tensors").iterdir())
    assert load_tensors(study)["x"].shape == (2,)
