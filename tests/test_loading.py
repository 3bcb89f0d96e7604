"""Tensors come back: of another step, in a module's layout, or a sentence says why not."""

from __future__ import annotations

from typing import Any

import drawn_studies as figures
import optuna
import pytest
import torch
from optuna.storages import BaseStorage
from torch import Tensor, nn

import optuna_hypergrad as ohg
from optuna_hypergrad import visualization as vis
from optuna_hypergrad._words import ranges


@ohg.differentiable
def two_settings(trial: Any) -> Tensor:
    kind = trial.suggest_categorical("kind", ["a", "b"])
    x = trial.suggest_tensor("x", (3,), -1.0, 1.0, dtype=torch.float64)
    trial.set_user_attr("mean", float(x.detach().mean()))
    return (x - 0.1 * trial.number).square().sum() + (kind == "b")


def study_with_trajectories(storage: BaseStorage | None = None, **retention: Any) -> optuna.Study:
    keep = ohg.Retention(**{"every": 1, **retention})
    sampler = ohg.HypergradientSampler(seed=0, retention=keep)
    study = optuna.create_study(storage=storage, sampler=sampler)
    study.optimize(two_settings, n_trials=9)
    return study


def test_a_step_is_one_of_the_same_trajectory(storage: BaseStorage) -> None:
    study = study_with_trajectories(storage)
    members: dict[int, list[optuna.trial.FrozenTrial]] = {}
    for trial in study.trials:
        members.setdefault(trial.system_attrs["hypergrad:claim"]["trajectory"], []).append(trial)
    assert len(members) > 1
    for trials in members.values():
        for asked in trials:
            for step, trial in enumerate(trials):
                x = ohg.load_tensors(asked, step=step, study=study)["x"]
                assert float(x.mean()) == pytest.approx(trial.user_attrs["mean"], rel=1e-12)
                assert torch.equal(x, ohg.load_tensors(trial, study=study)["x"])
    best = study.best_trial
    own = members[best.system_attrs["hypergrad:claim"]["trajectory"]]
    for step, trial in enumerate(own):
        x = ohg.load_tensors(study, "x", step)["x"]
        assert torch.equal(x, ohg.load_tensors(trial, study=study)["x"])


def test_a_step_that_is_gone_says_which_are_left() -> None:
    study = figures.new_study(newest=1, best=0, every=4)
    study.optimize(figures.with_tensors, n_trials=7)
    with pytest.raises(ohg.MissingTensorError) as caught:
        ohg.load_tensors(study.trials[6], "decay", step=2, study=study)
    assert "The tensor 'decay' of step 2 of the trajectory of trial 6" in str(caught.value)
    assert "has been removed by the retention policy" in str(caught.value)
    assert "those of steps 0, 4 to 6 are in the store" in str(caught.value)
    with pytest.raises(ohg.MissingTensorError, match="the last one is step 6"):
        ohg.load_tensors(study.trials[6], step=7, study=study)
    for wrong in (-1, 1.5, "2", True):
        with pytest.raises(ValueError, match="load_tensors needs step"):
            ohg.load_tensors(study.trials[6], step=wrong, study=study)
    store = study.sampler.store_of(study)
    for trial in study.trials:
        store.discard(*store.pointers(trial))
    with pytest.raises(ohg.MissingTensorError, match="nothing of it is in the store"):
        ohg.load_tensors(study.trials[6], step=4, study=study)


def test_a_step_that_failed_says_so() -> None:
    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        x = trial.suggest_tensor("x", (2,), -1.0, 2.0)
        return x.square().sum() * (float("nan") if trial.number == 2 else 1.0)

    study = figures.new_study(every=1)
    study.optimize(objective, n_trials=5)
    ohg.load_tensors(study.trials[0], step=3, study=study)
    with pytest.raises(ohg.MissingTensorError, match="was never stored: it failed, or was cut off"):
        ohg.load_tensors(study.trials[0], step=2, study=study)


def test_the_step_of_a_run_is_its_last() -> None:
    study = figures.runs()
    found = ohg.load_tensors(study, step=9)["bilevel"]["x"]
    assert torch.equal(found, ohg.load_tensors(study)["bilevel"]["x"])
    with pytest.raises(ohg.MissingTensorError, match="that of step 9 is in the store"):
        ohg.load_tensors(study, step=3)


def test_names_that_do_not_exist() -> None:
    study = figures.tensors()
    with pytest.raises(
        ohg.MissingTensorError,
        match=r"no tensor 'decays'; it has 'decay', 'tree' \(did you mean 'decay'\?\)\.",
    ):
        ohg.load_tensors(study, "decays")
    with pytest.raises(ohg.MissingTensorError, match=r"it has 'decay', 'tree'\.$"):
        ohg.load_tensors(study, "momentum")
    with pytest.raises(
        ohg.MissingTensorError,
        match=r"'x' of trial \d+ .* is a number, no tensor: trial.params\['x'\]",
    ):
        ohg.load_tensors(figures.numbers().trials[0], "x", study=figures.numbers())


def test_a_study_that_is_not_ours() -> None:
    study = figures.foreign()
    with pytest.raises(ohg.MissingTensorError, match="stored when a trial that suggests tensors"):
        ohg.load_tensors(study)
    with pytest.raises(ohg.MissingTensorError, match=r"Trial 0 .* has no tensors"):
        ohg.load_tensors(study.trials[0], step=3, study=study)
    with pytest.raises(ohg.MissingTensorError, match="no trial is completed yet"):
        ohg.load_tensors(figures.failed_only(), step=0)


def test_the_layout_of_a_module() -> None:
    study = figures.tensors()
    net = figures.network()
    found = ohg.load_tensors(study, like=net)
    assert list(found) == [name for name, _ in net.named_parameters()]
    tree = ohg.load_tensors(study)["tree"]
    assert tree.keys() == found.keys()
    assert all(torch.equal(found[k], tree[k]) for k in tree)
    left = net.load_state_dict(found, strict=False)
    assert not left.unexpected_keys
    assert all("running" in key or "num_batches" in key for key in left.missing_keys)
    assert torch.equal(net[0].weight, tree["0.weight"])
    reordered = dict(reversed(list(net.named_parameters())))
    assert list(ohg.load_tensors(study, "tree", like=reordered)) == list(reordered)
    assert ohg.load_tensors(study, "tree", 0, net).keys() == found.keys()


def test_weights_of_a_module_go_back_into_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    net[0].bias.requires_grad_(False)

    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        w = trial.suggest_module("net", net)
        out = torch.func.functional_call(net, w, torch.ones(1, 2, dtype=torch.float64))
        return (out - 3.0).square().sum()

    study = figures.new_study()
    study.optimize(objective, n_trials=8)
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    other.load_state_dict(net.state_dict())
    left = other.load_state_dict(ohg.load_tensors(study, like=other), strict=False)
    assert left.missing_keys == ["0.bias"]
    out = other(torch.ones(1, 2, dtype=torch.float64))
    assert float((out - 3.0).square().sum().detach()) == pytest.approx(study.best_value, abs=1e-12)


def test_a_layout_that_fits_nothing_or_twice() -> None:
    study = figures.tensors()
    with pytest.raises(
        ohg.HyperparameterError,
        match=r"like the given Linear: 'decay' is one tensor.*'tree' has an entry '0.bias'",
    ):
        ohg.load_tensors(study, like=nn.Linear(4, 3))
    other = {k: torch.zeros(*v.shape, 2) for k, v in figures.network().named_parameters()}
    with pytest.raises(ohg.HyperparameterError, match=r"of shape \(3,\) and not \(3, 2\)"):
        ohg.load_tensors(study, like=other)
    with pytest.raises(TypeError, match="like= takes a module or a dict of tensors, not int"):
        ohg.load_tensors(study, like=3)

    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        both = [trial.suggest_tensor_like(n, {"w": torch.zeros(2)}, -1.0, 1.0) for n in "ab"]
        return sum((t["w"] - 0.5).square().sum() for t in both)

    study = figures.new_study()
    study.optimize(objective, n_trials=1)
    with pytest.raises(ohg.HyperparameterError, match=r"'a', 'b' are all laid out like.* name="):
        ohg.load_tensors(study, like={"w": torch.zeros(2)})
    assert ohg.load_tensors(study, "b", like={"w": torch.zeros(2)})["w"].tolist() == [0.0, 0.0]


def test_numbers_in_words() -> None:
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7, 8"


def test_a_damaged_step_does_not_hide_the_others() -> None:
    study = figures.new_study(every=1)
    study.optimize(figures.with_tensors, n_trials=4)
    other = optuna.create_study(sampler=study.sampler)
    store = study.sampler.store_of(study)
    for trial in study.trials:
        if trial.number == 1:
            (pointer,) = store.pointers(trial, "decay", "value")
            trial.system_attrs[pointer.key] = {**trial.system_attrs[pointer.key], "step": "first"}
        other.add_trial(trial)
    with figures.told() as warnings:
        found = ohg.load_tensors(other.trials[3], "decay", step=2, study=other, tensor_store=store)
    assert torch.equal(found["decay"], ohg.load_tensors(study, "decay", 2)["decay"])
    assert ["is not a pointer to tensors" in w and "left out" in w for w in warnings] == [True]
    with figures.told():
        figure = vis.plot_tensor_evolution(other, "decay", tensor_store=store, quantiles=[0.5])
    assert list(figure.data[0].x) == [0, 2, 3]
