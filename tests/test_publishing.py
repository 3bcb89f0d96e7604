"""What a study publishes: attributes of its trials, a note, plots, and artifacts of the best trial."""

from __future__ import annotations

import contextlib
import copy
import csv
import inspect
import io
import itertools
import json
import logging
import math
import re
import sqlite3
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import optuna_dashboard
import pytest
import torch
from conftest import open_storage, url_of
from matplotlib.image import imread
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from optuna_dashboard._note import get_note, save_note
from optuna_dashboard._serializer import serialize_frozen_trial
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import _optuna, dashboard, outer_telling
from optuna_hypergrad.dashboard import artifacts, note, pictures, plots, publishing
from optuna_hypergrad.dashboard.findings import find
from optuna_hypergrad.dashboard.pace import Pace
from optuna_hypergrad.stores import TensorStore, change_study_attributes
from optuna_hypergrad.stores._published import is_published
from optuna_hypergrad.studies import telling
from optuna_hypergrad.trial_attributes import described, summaries_in, summary_of, value_kind_of

F64 = torch.float64
QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}


@ohg.differentiable
def objective(trial: Any) -> Tensor:
    """Its least value is at ``t = 0.3`` under ``kind = a``; ``t`` is drawn to its upper bound elsewhere."""
    kind = trial.suggest_categorical("kind", ["a", "b"])
    t = trial.suggest_tensor("t", (8, 8), 1e-2, 1.0, log=True, init=0.5, dtype=F64)
    x = trial.suggest_float("x", -1.0, 2.0)
    target = 0.3 if kind == "a" else 2.0
    return (t - target).pow(2).sum() + (x - 0.5) ** 2


def study_in(storage: BaseStorage, name: str = "decays", **settings: Any) -> optuna.Study:
    sampler = ohg.HypergradientSampler(seed=0, **settings)
    return optuna.create_study(
        study_name=name, storage=storage, sampler=sampler, load_if_exists=True
    )


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    study = study_in(open_storage("sqlite", tmp_path))
    study.optimize(objective, n_trials=7)
    return study


def system_attrs(study: optuna.Study) -> dict[str, Any]:
    return study._storage.get_study_system_attrs(study._study_id)


def files_of(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> dict[str, bytes]:
    """As the dashboard lists and serves them."""
    shown = serialize_frozen_trial(study._study_id, trial, system_attrs(study))["artifacts"]
    store = TensorStore.of_study(study).artifact_store
    found = {}
    for meta in shown:
        with store.open_reader(meta["artifact_id"]) as file:
            found[meta["filename"]] = file.read()
    return found


def published_blobs(study: optuna.Study) -> set[str]:
    stored = TensorStore.of_study(study).artifact_store.stored()  # type: ignore[attr-defined]
    return {a.artifact_id for a in stored if is_published(a.artifact_id)}


# Attributes of trials


def test_norm_is_that_of_the_projected_gradient_in_natural_steps(study: optuna.Study) -> None:
    for trial in study.trials:
        kind, x = trial.params["kind"], trial.params["x"]
        try:
            t = ohg.load_tensors(trial, study=study)["t"].numpy()
        except ohg.MissingTensorError:
            continue
        slope = 2 * (t - (0.3 if kind == "a" else 2.0)) * t  # by the logarithm
        slope[(t >= 1.0) & (slope < 0)] = 0.0
        slope_of_x = 2 * (x - 0.5) * 0.3  # in tenths of the range
        if (x <= -1.0 and slope_of_x > 0) or (x >= 2.0 and slope_of_x < 0):
            slope_of_x = 0.0
        truth = math.sqrt((slope**2).sum() + slope_of_x**2)
        assert trial.user_attrs["hypergradient_norm"] == pytest.approx(truth, rel=1e-12)
        assert trial.user_attrs["num_hyperparameters"] == 65
        assert trial.user_attrs["value_kind"] == "cold"
    kinds = {t.params["kind"] for t in study.trials}
    assert kinds == {"a", "b"}


def test_norm_leaves_out_what_a_bound_holds_back(tmp_path: Path) -> None:
    @ohg.differentiable
    def held(trial: Any) -> Tensor:
        t = trial.suggest_tensor("t", (3,), 0.0, 1.0, init=torch.tensor([0.0, 1.0, 0.5], dtype=F64))
        return (torch.tensor([1.0, -1.0, 4.0], dtype=F64) * t).sum()

    for direction, truth in (("minimize", 0.4), ("maximize", math.sqrt(0.01 + 0.01 + 0.16))):
        study = optuna.create_study(direction=direction, sampler=ohg.HypergradientSampler(seed=0))
        study.optimize(held, n_trials=1)
        assert study.trials[0].user_attrs["hypergradient_norm"] == pytest.approx(truth, rel=1e-12)


def test_place_of_a_trial_on_its_trajectory(study: optuna.Study) -> None:
    steps: dict[int, list[int]] = {}
    for trial in study.trials:
        claim = trial.system_attrs["hypergrad:claim"]
        assert trial.user_attrs["trajectory"] == claim["trajectory"]
        steps.setdefault(claim["trajectory"], []).append(trial.user_attrs["trajectory_step"])
    assert all(found == list(range(len(found))) for found in steps.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_summary(dtype: torch.dtype) -> None:
    value = torch.rand(40, 50, dtype=F64, generator=torch.Generator().manual_seed(0)).to(dtype)
    value[:4], value[4:5] = 0.0, 1.0
    found = summary_of(value, ohg.Domain(0.0, 1.0))
    exact = value.double().numpy()
    assert found["shape"] == [40, 50]
    for name, q in QUANTILES.items():
        assert found[name] == pytest.approx(np.quantile(exact, q), rel=1e-3, abs=1e-3)
    assert found["norm"] == pytest.approx(np.linalg.norm(exact), rel=1e-3)
    assert found["at_low"] == pytest.approx((exact == 0).mean(), rel=1e-3)
    assert found["at_high"] == pytest.approx((exact == 1).mean(), rel=1e-3)
    assert "at_low" not in summary_of(value, ohg.Domain())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entries_that_came_back_from_logarithms_are_at_their_bounds(dtype: torch.dtype) -> None:
    """As after a step: projected in the logarithm, ``exp(log(low))`` lies a little inside."""
    domain = ohg.Domain(1e-6, 10.0, log=True)
    value = torch.tensor([1e-6, 1e-6, 2e-6, 1.0, 9.99, 10.0], dtype=dtype).clamp(
        *domain.bounds_as(torch.ones((), dtype=dtype))
    )
    back = domain.to_external(domain.to_internal(value))
    found = summary_of(back, domain)
    assert found["at_low"] == pytest.approx(2 / 6, rel=1e-3)
    assert found["at_high"] == pytest.approx(1 / 6, rel=1e-3)


def test_summary_of_a_million_entries_is_close_and_short() -> None:
    value = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    found = summary_of(value, ohg.Domain())
    assert found["max"] == pytest.approx(float(value.max()), rel=1e-3)
    for name in ("q05", "q25", "q50", "q75", "q95"):
        exact = float(np.quantile(value.numpy(), QUANTILES[name]))
        assert found[name] == pytest.approx(exact, abs=0.02)
    assert len(json.dumps(found)) < 250


def test_only_the_largest_tensors_are_summarized() -> None:
    @ohg.differentiable
    def many(trial: Any) -> Tensor:
        params = {f"layer{i}": torch.zeros(i + 1) for i in range(9)}
        tree = trial.suggest_tensor_like("decay", params, 1e-3, 1.0, log=True)
        return sum(v.square().sum() for v in tree.values())  # type: ignore[return-value]

    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(many, n_trials=1)
    (trial,) = study.trials
    assert list(summaries_in(trial.user_attrs)) == [f"decay/layer{i}" for i in (8, 7, 6, 5)]
    assert trial.user_attrs["num_hyperparameters"] == 45


def test_attributes_that_an_objective_has_set_stay(tmp_path: Path) -> None:
    @ohg.differentiable
    def own(trial: Any) -> Tensor:
        trial.set_user_attr("trajectory", "mine")
        return (trial.suggest_float("x", 0.0, 1.0) - 0.3) ** 2

    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(own, n_trials=2)
    assert [t.user_attrs["trajectory"] for t in study.trials] == ["mine", "mine"]
    assert study.trials[1].user_attrs["trajectory_step"] == 1


def test_products_and_estimator_of_a_solve() -> None:
    a = torch.diag(torch.linspace(1.0, 2.0, 5, dtype=F64))

    def inner(w: Any, lam: Any, batch: None) -> Tensor:
        return w["w"] @ a @ w["w"] / 2 - lam["x"] * w["w"].sum()

    @ohg.differentiable
    def solved(trial: Any) -> Tensor:
        x = trial.suggest_float("x", -1.0, 1.0)
        w = ohg.solve(
            inner,
            {"w": torch.zeros(5, dtype=F64)},
            {"x": x},
            estimator=ohg.Implicit(ohg.Neumann(7, alpha=0.5)),
        )
        return (w["w"] - 0.1).pow(2).sum()

    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(solved, n_trials=2)
    for trial in study.trials:
        assert trial.user_attrs["num_products"] == 7
        assert trial.user_attrs["estimator"] == "Implicit(Neumann(num_steps=7, alpha=0.5))"


@dataclass(frozen=True)
class Refusing:
    """Its defaults are none that it takes."""

    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("rank must be at least 1.")


def test_settings_in_short() -> None:
    assert (
        described(ohg.Implicit(ohg.CG(max_steps=5), damping=0.1))
        == "Implicit(CG(max_steps=5), damping=0.1)"
    )
    assert described(ohg.Unroll()) == "Unroll()"
    assert described(Refusing(3)) == "Refusing(rank=3)"
    assert (
        len(
            described(
                ohg.TwoPhase(ohg.Unroll(truncation=5), ohg.Implicit(ohg.CG(rtol=1e-9)), switch=200)
            )
        )
        <= 120
    )


def inner_of(w: Any, lam: Any, batch: None) -> Tensor:
    return ((w["w"] - 1.0) ** 2).sum() / 2 + (lam["decay"] * w["w"] ** 2).sum() / 2


def outer_of(w: Any, lam: Any, batch: None) -> Tensor:
    return ((w["w"] - 0.4) ** 2).sum()


def whole_run(trial: optuna.Trial, **settings: Any) -> float:
    step_size = trial.suggest_float("step_size", 0.2, 0.3)
    found = ohg.minimize_bilevel(
        ohg.BilevelProblem(inner_of, outer_of),
        {"w": torch.zeros(3, dtype=F64)},
        {"decay": torch.full((3,), 0.1, dtype=F64)},
        inner_solver=ohg.GradientDescent(step_size, max_steps=5),
        estimator=ohg.Implicit(ohg.Neumann(4, alpha=0.2)),
        bounds={"decay": ohg.Domain(1e-3, 10.0, log=True)},
        num_steps=12,
        final_eval="retrain",
        trial=trial,
        **settings,
    )
    trial.set_user_attr("norms", [r["hypergradient_norm"] for r in found.history])
    trial.set_user_attr("lengths", [r["step_length"] for r in found.history])
    return found.outer_value


def test_attributes_of_a_bilevel_run() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(whole_run, n_trials=1)
    (trial,) = study.trials
    found = trial.user_attrs
    assert (found["outer_steps"], found["num_products"], found["num_hyperparameters"]) == (
        12,
        48,
        3,
    )
    assert found["hypergradient_norm"] == found["norms"][-1]
    assert found["estimator"] == "Implicit(Neumann(num_steps=4, alpha=0.2))"
    assert "value_kind" not in found
    assert value_kind_of(trial) == "warm"
    assert value_kind_of(_told(trial, found["retrained_value"])) == "retrained"
    assert value_kind_of(_told(trial, 123.0)) is None
    final = ohg.load_tensors(study)["bilevel"]["decay"]
    summary = summaries_in(found)["bilevel/decay"]
    assert summary["max"] == pytest.approx(float(final.max()), rel=1e-3)
    assert len(trial.intermediate_values) == 12
    assert found["lengths"][0] == pytest.approx(0.1 * math.sqrt(3), rel=1e-6)  # Adam's first step


def _told(trial: optuna.trial.FrozenTrial, value: float) -> optuna.trial.FrozenTrial:
    told = copy.deepcopy(trial)
    told.values = [value]
    return told


def test_a_bilevel_run_that_is_not_to_publish() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: whole_run(trial, publish=False), n_trials=1)
    assert study.trials[0].user_attrs.keys() == {
        "warm_value", "retrained_value", "norms", "lengths",
    }  # fmt: skip


def test_a_study_that_is_not_to_publish(tmp_path: Path) -> None:
    study = study_in(open_storage("sqlite", tmp_path), publish=False)
    study.optimize(objective, n_trials=3)
    assert all(t.user_attrs == {} for t in study.trials)
    assert system_attrs(study) == {}


def test_publish_is_a_yes_or_a_no() -> None:
    with pytest.raises(ValueError, match="True or False"):
        ohg.HypergradientSampler(publish="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_study_of_another_sampler_publishes_nothing(kind: str, tmp_path: Path) -> None:
    study = study_in(open_storage(kind, tmp_path))
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=4)
    assert all(t.user_attrs == {} for t in study.trials)
    assert system_attrs(study) == {}
    with pytest.raises(ohg.HypergradError, match="has had a hypergradient"):
        dashboard.publish(study)


# The note


def test_note_says_what_the_study_holds(study: optuna.Study) -> None:
    body, best = get_note(study), study.best_trial
    assert "**Trials**: 7 (7 complete)" in body
    assert f"**Best value**: {best.value:.6g}, in trial {best.number} (cold)" in body
    assert "**Tuned by hypergradients**: 65 numbers" in body
    number = best.user_attrs["trajectory"]
    steps = sum(t.user_attrs["trajectory"] == number for t in study.trials)
    assert f"**Best trajectory**: {number}, {steps} step" in body
    assert f"at `kind={best.params['kind']}`" in body
    summary = summaries_in(best.user_attrs)["t"]
    assert (
        f"| `t` | 8 x 8 | {summary['min']:.6g} | {summary['q50']:.6g} | {summary['max']:.6g} |"
        in body
    )
    code = (
        body.partition("```python\n")[2]
        .partition("\n```")[0]
        .replace("storage=...", "storage=storage")
    )
    found: dict[str, Any] = {"storage": study._storage}
    exec(code, found)
    assert torch.equal(found["tensors"]["t"], ohg.load_tensors(best, study=study)["t"])


def test_note_of_a_study_that_maximizes(tmp_path: Path) -> None:
    study = optuna.create_study(
        storage=open_storage("sqlite", tmp_path),
        direction="maximize",
        sampler=ohg.HypergradientSampler(seed=0),
    )
    study.optimize(ohg.differentiable(lambda t: -objective_value(t)), n_trials=6)
    body = get_note(study)
    assert f"**Best value**: {study.best_value:.6g}, in trial {study.best_trial.number}" in body
    ranks = [
        line.split("|")[3]
        for line in body.splitlines()
        if line.startswith("| ") and "`kind=" in line
    ]
    assert [float(r) for r in ranks] == sorted(map(float, ranks), reverse=True)


def objective_value(trial: Any) -> Tensor:
    trial.suggest_categorical("kind", ["a", "b"])
    return (trial.suggest_float("x", 0.0, 1.0) - 0.3) ** 2


def test_note_of_others_stays(study: optuna.Study) -> None:
    ours = get_note(study)
    save_note(study, f"# Mine\n\nAbove.\n\n{ours}\n\nBelow.")
    version = system_attrs(study)["dashboard:note_ver"]
    study.optimize(objective, n_trials=2)
    body = get_note(study)
    assert body.startswith("# Mine\n\nAbove.\n\n[//]: #")
    assert body.endswith("\n\nBelow.")
    assert "**Trials**: 9 (9 complete)" in body
    assert body.count(note.BEGIN) == body.count(note.END) == 1
    assert system_attrs(study)["dashboard:note_ver"] == version  # who is editing it can save it
    save_note(study, "Nothing of yours, please " * 300)
    dashboard.publish(study)
    assert get_note(study).startswith("Nothing of yours, please " * 299)
    assert get_note(study).rstrip().endswith(note.END)
    save_note(study, "x")
    dashboard.publish(study)
    assert get_note(study).startswith("x\n\n[//]: #")


def test_note_with_half_of_our_marks_is_left_alone() -> None:
    ours = note.merged("", "one")
    assert note.merged(ours, "one") == ours
    assert note.merged(note.BEGIN + "\n\nmine", "two").startswith(
        note.BEGIN + "\n\nmine\n\n" + note.BEGIN
    )
    twice = note.merged(note.BEGIN + "\n\nmine", "two")
    assert note.merged(twice, "three") == twice.replace("two", "three")
    assert note.merged("mine\n\n" + note.END, "two").startswith("mine\n\n" + note.END + "\n\n")


def test_our_marks_in_names_are_no_marks() -> None:
    named = f"a study `{note.END}`, and another\n- {note.BEGIN}"
    ours = note.merged("mine", named)
    assert note.merged(ours, named) == ours
    assert note.merged(ours, "two") == note.merged("mine", "two")


def test_note_that_was_saved_with_other_line_ends() -> None:
    ours = note.merged("mine\n\nand more", "one")
    again = note.merged(ours.replace("\n", "\r\n"), "two")
    assert again == note.merged("mine\r\n\r\nand more", "two")


def test_note_with_hostile_names(tmp_path: Path) -> None:
    names = [
        "a|b",
        "`x`",
        "<img src=x onerror=alert(1)>",
        "![x](http://evil/x.png)",
        "line\nbreak",
        "```\n# x",
    ]

    @ohg.differentiable
    def hostile(trial: Any) -> Tensor:
        trial.suggest_categorical("kind", names)
        loss = torch.zeros((), dtype=F64)
        for name in names[:4]:
            loss = loss + (trial.suggest_tensor(name, (2,), 0.0, 1.0, dtype=F64) - 0.3).pow(2).sum()
        return loss

    study = study_in(open_storage("sqlite", tmp_path), "x'''\n```\n# <b>")
    study.optimize(hostile, n_trials=8)
    body = get_note(study)
    for line in body.splitlines():
        if line.startswith("|"):
            cells = line.replace("\\|", "").strip("|").split("|")
            assert len(cells) == 6, line
    plain = re.sub(r"^```python\n.*?^```$", "", body, flags=re.M | re.S)
    assert "load_tensors" not in plain
    for name in names[2:4]:
        for at in _all(plain, name):
            assert plain.count("`", 0, at) % 2 == 1, plain  # inside of code


def _all(text: str, part: str) -> list[int]:
    return [i for i in range(len(text)) if text.startswith(part, i)]


def test_note_warns(tmp_path: Path) -> None:
    study = optuna.create_study(
        storage=open_storage("sqlite", tmp_path), sampler=optuna.samplers.RandomSampler(seed=0)
    )
    study.optimize(whole_run, n_trials=2)
    study.tell(study.ask(), state=TrialState.FAIL)
    dashboard.publish(study)
    body = get_note(study)
    assert "1 of 3 trials failed" in body
    assert (
        f"**Best value**: {study.best_value:.6g}, in trial {study.best_trial.number} (warm)" in body
    )
    assert "return retrained_value" in body.replace("\\", "")
    warm, retrained = (study.best_trial.user_attrs[f"{k}_value"] for k in ("warm", "retrained"))
    assert f"{warm:.6g} at the end of the best trial" in body
    assert f"{retrained:.6g} trained again from scratch" in body
    bounded = study_in(open_storage("sqlite", tmp_path), "bounded")
    bounded.optimize(ohg.differentiable(_to_the_bound), n_trials=6)
    assert "100 % of t are at their upper bound" in get_note(bounded).replace("\\", "")


@pytest.fixture
def warnings(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """What Optuna's loggers warn of."""
    caplog.set_level(logging.WARNING, logger="optuna")
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    return caplog


def test_infeasible_trials_are_said_to_be_so(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    best = {}
    for name, feasible in (("some", 2), ("none", -1)):

        @ohg.differentiable
        def constrained(trial: Any, feasible: int = feasible) -> Tensor:
            trial.set_constraint("c", 0.0 if trial.number == feasible else 1.0)
            return (
                (trial.suggest_tensor("t", (4,), 0.0, 1.0, init=0.9, dtype=F64) - 0.2).pow(2).sum()
            )

        study = study_in(open_storage("sqlite", tmp_path), name, retention=ohg.Retention(every=1))
        study.optimize(constrained, n_trials=4)
        warnings.clear()
        tensors = ohg.load_tensors(study)["t"]
        body = get_note(study)
        [trial] = (t for t in study.trials if f", in trial {t.number} (" in body)
        assert torch.equal(tensors, ohg.load_tensors(trial, study=study)["t"])
        assert "**Best trajectory**: 0" in body
        assert ("No trial is feasible" in body) == (feasible < 0)
        assert ("is feasible: each violates" in warnings.text) == (feasible < 0)
        best[name] = trial.number
    assert best == {"some": 2, "none": min(study.trials, key=lambda t: t.values[0]).number}


def test_a_bilevel_run_has_hypergradients_of_its_own(warnings: pytest.LogCaptureFixture) -> None:
    study = study_in(InMemoryStorage())
    study.optimize(whole_run, n_trials=2)
    assert "No hypergradient was reported" not in warnings.text
    study.optimize(lambda trial: trial.suggest_float("y", 0.0, 1.0), n_trials=1)
    assert "No hypergradient was reported" in warnings.text


def _to_the_bound(trial: Any) -> Tensor:
    return (trial.suggest_tensor("t", (4,), 0.0, 1.0, init=0.9, dtype=F64) - 5.0).pow(2).sum()


# When and where


def test_studies_in_memory_wait_until_they_are_asked() -> None:
    study = study_in(InMemoryStorage())
    study.optimize(objective, n_trials=3)
    assert system_attrs(study) == {}
    dashboard.publish(study)
    assert "**Trials**: 3 (3 complete)" in get_note(study)


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgresql", "mariadb"])
def test_every_storage(kind: str, tmp_path: Path) -> None:
    study = study_in(open_storage(kind, tmp_path))
    study.optimize(objective, n_trials=4)
    assert "**Trials**: 4 (4 complete)" in get_note(study)
    before = system_attrs(study)
    dashboard.publish(study)
    assert system_attrs(study) == before  # idempotent
    assert set(files_of(study, study.best_trial)) == {
        artifacts.EXTREMES,
        artifacts.HISTOGRAMS,
        "t.png",
    }
    figures = get_plotly_graph_objects(system_attrs(study))
    assert set(figures) == {plots.TRAJECTORIES, plots.NORMS, plots.TENSOR}
    assert all(
        len(text) < plots.MAX_BYTES and json.loads(text)["data"] for text in figures.values()
    )


def test_a_long_study_is_published_as_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        publishing, "_publish", lambda study, trials, store: seen.append(len(trials))
    )
    monkeypatch.setattr(publishing, "Pace", lambda share: Pace(share, first=0.0))
    study = study_in(open_storage("sqlite", tmp_path))
    study.optimize(objective, timeout=1e9, n_trials=3, callbacks=[lambda s, t: s.stop()])
    assert seen == [1]


def test_pace() -> None:
    now = [0.0]
    pace = Pace(0.1, first=1.0, clock=lambda: now[0])
    assert not pace.allows()
    pace.begin()
    now[0] = 9.0
    assert not pace.allows()
    now[0] = 10.0
    assert pace.allows()
    with pace.spending():
        now[0] = 12.0
    now[0] = 19.9
    assert not pace.allows()
    now[0] = 20.1
    assert pace.allows()


def test_share_of_a_study_of_short_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    spent = []
    monkeypatch.setattr(
        publishing, "Pace", lambda share: Pace(share, clock=lambda: next(clock) / 2)
    )
    monkeypatch.setattr(publishing, "_publish", lambda *_: spent.append(1))
    study = study_in(open_storage("journal", tmp_path))
    for _ in range(40):
        study.optimize(ohg.differentiable(objective_value), n_trials=1)
    assert 0 < len(spent) < 8


def test_the_last_of_many_trials_is_known() -> None:
    seen = []

    def looking(study: optuna.Study, number: int) -> None:
        seen.append(_optuna.is_last_of_many())

    class Looking(optuna.samplers.RandomSampler):
        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            looking(study, trial.number)

    study = optuna.create_study(sampler=Looking())
    study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=3)
    assert seen == [False, False, True]
    study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=1)
    study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=2, n_jobs=2)
    study.tell(study.ask(), 1.0)
    assert seen[3:] == [False] * 4


def test_nobody_hears_of_it_without_the_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = publishing.importlib.util.find_spec
    monkeypatch.setattr(
        publishing.importlib.util,
        "find_spec",
        lambda name: None if name == "optuna_dashboard" else real(name),
    )
    optuna.logging.enable_propagation()
    study = study_in(open_storage("sqlite", tmp_path))
    with caplog.at_level(logging.DEBUG):
        study.optimize(objective, n_trials=3)
    optuna.logging.disable_propagation()
    assert system_attrs(study) == {}
    assert all("hypergradient_norm" in t.user_attrs for t in study.trials)
    assert [r for r in caplog.records if "dashboard" in r.getMessage()] == []
    with pytest.raises(ohg.HypergradError, match="pip install"):
        dashboard.publish(study)


@pytest.mark.parametrize(
    "broken", ["set_user_attributes", "change_study_attributes", "find", "files_of"]
)
def test_a_trial_never_fails_by_publishing(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*arguments: Any, **settings: Any) -> None:
        calls.append(1)
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(publishing, broken, fail)
    study = study_in(open_storage("sqlite", tmp_path))
    study.optimize(objective, n_trials=4)
    assert calls
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 4
    monkeypatch.undo()
    publishing.PUBLISHER.flush()  # what failed is done later
    assert "**Trials**: 4 (4 complete)" in get_note(study)


def test_a_trial_never_fails_by_what_it_would_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no numbers")

    monkeypatch.setattr(outer_telling, "summaries_of", fail)
    monkeypatch.setattr(telling, "summaries_of", fail)
    study = study_in(open_storage("sqlite", tmp_path))
    study.optimize(objective, n_trials=2)
    study.optimize(whole_run, n_trials=1)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3
    assert not any(k.startswith("tensor:") for t in study.trials for k in t.user_attrs)


def test_publishing_changes_nothing_that_is_computed(tmp_path: Path) -> None:
    values = []
    for publish in (True, False):
        study = study_in(open_storage("sqlite", tmp_path), str(publish), publish=publish)
        study.optimize(objective, n_trials=9)
        values.append([(t.value, t.params) for t in study.trials])
    assert values[0] == values[1]


def test_a_study_without_tensors_needs_no_place_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(study: optuna.Study) -> None:
        raise ohg.StorageError("There is no place of its own for tensors.")

    study = study_in(open_storage("sqlite", tmp_path))
    monkeypatch.setattr(study.sampler, "store_of", nowhere)
    study.optimize(ohg.differentiable(objective_value), n_trials=6)
    assert "**Trials**: 6 (6 complete)" in get_note(study)
    assert set(get_plotly_graph_objects(system_attrs(study))) == {plots.TRAJECTORIES, plots.NORMS}


def test_a_study_that_can_only_be_read_is_not_published(
    study: optuna.Study, tmp_path: Path
) -> None:
    where = f"sqlite:///file:{tmp_path}/study.db?mode=ro&uri=true"
    storage = optuna.storages.RDBStorage(where, skip_table_creation=True)
    read = optuna.load_study(study_name=study.study_name, storage=storage)
    with pytest.raises(ohg.StorageError, match=r"refuses to be written to .*readonly database"):
        dashboard.publish(read)
    storage.engine.dispose()


def test_under_hyperband(tmp_path: Path) -> None:
    study = optuna.create_study(
        storage=open_storage("sqlite", tmp_path),
        sampler=ohg.HypergradientSampler(seed=0),
        pruner=optuna.pruners.HyperbandPruner(),
    )

    def reporting(trial: Any) -> Tensor:
        loss = objective_value(trial)
        trial.report(float(loss.detach()), 1)
        return loss

    study.optimize(ohg.differentiable(reporting), n_trials=5)
    assert "**Trials**: 5 (5 complete)" in get_note(study)


def test_threads_publish_one_note(tmp_path: Path) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    study.optimize(objective, n_trials=8, n_jobs=2)
    publishing.PUBLISHER.flush()
    body = get_note(study)
    assert body.count(note.BEGIN) == 1
    assert "**Trials**: 8 (8 complete)" in body
    assert len(files_of(study, study.best_trial)) == 3
    assert len(published_blobs(study)) == 3


@pytest.mark.parametrize("why", ["too large", "no tensor"])
def test_a_figure_that_is_not_drawn_any_more_does_not_stay_as_it_was(
    study: optuna.Study, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = get_plotly_graph_objects(system_attrs(study))
    assert set(before) == {plots.TRAJECTORIES, plots.NORMS, plots.TENSOR}
    if why == "too large":
        monkeypatch.setattr(plots, "MAX_BYTES", 10)
    else:
        monkeypatch.setattr(publishing, "find", lambda *a: replace(find(*a), summaries={}))
    dashboard.publish(study)
    after = get_plotly_graph_objects(system_attrs(study))
    gone = set(before) if why == "too large" else {plots.TENSOR}
    assert {name for name, text in after.items() if not json.loads(text)["data"]} == gone
    monkeypatch.undo()
    dashboard.publish(study)
    assert get_plotly_graph_objects(system_attrs(study)) == before


def test_nobody_can_write_a_note_while_it_is_written(tmp_path: Path) -> None:
    """What somebody saves in the dashboard meanwhile would be overwritten."""
    path = tmp_path / "study.db"
    study = optuna.create_study(storage=f"sqlite:///{path}")
    save_note(study, "mine")
    refused = []

    def change(known: Mapping[str, Any]) -> dict[str, Any]:
        with contextlib.closing(sqlite3.connect(path, timeout=0.0)) as other:
            try:
                other.execute("UPDATE study_system_attributes SET value_json = '\"theirs\"'")
                other.commit()
            except sqlite3.OperationalError as error:
                refused.append(str(error))
        return {key: f"{value} and ours" for key, value in known.items() if "str" in key}

    change_study_attributes(study._storage, study._study_id, note.PREFIX, change)
    assert refused == ["database is locked"]
    assert get_note(study) == "mine and ours"


def test_a_process_publishes_at_its_end(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import multiprocessing
        import optuna, torch
        import optuna_hypergrad as ohg
        Any, F64, Tensor = object, torch.float64, torch.Tensor
        HERE

        def work(seed):
            study = optuna.load_study(
                study_name="runs", storage={url_of("sqlite", tmp_path)!r}, sampler=optuna.samplers.RandomSampler(seed)
            )
            study.optimize(whole_run, n_trials=1)

        if __name__ == "__main__":
            optuna.create_study(study_name="runs", storage={url_of("sqlite", tmp_path)!r})
            child = multiprocessing.get_context("fork").Process(target=work, args=(1,))
            child.start()
            child.join()
            work(2)
            import optuna_hypergrad.visualization, sys
            assert "matplotlib" not in sys.modules
        """
    )
    functions = "".join(map(inspect.getsource, (inner_of, outer_of, whole_run)))
    (tmp_path / "script.py").write_text(script.replace("HERE", functions))
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True, timeout=200)
    study = optuna.load_study(study_name="runs", storage=open_storage("sqlite", tmp_path))
    body = get_note(study)
    assert "**Trials**: 2 (2 complete)" in body
    assert f"**Best value**: {study.best_value:.6g}" in body
    assert artifacts.EXTREMES in files_of(study, study.best_trial)


def test_a_study_that_took_the_place_of_a_deleted_one_is_left_alone(tmp_path: Path) -> None:
    publisher, storage = publishing.Publisher(), open_storage("sqlite", tmp_path)
    study = study_in(storage, publish=False)
    study.optimize(objective, n_trials=2)
    publisher.tell_study(study, None, lambda s: TensorStore.of_study(s))
    optuna.delete_study(study_name="decays", storage=storage)
    other = study_in(storage, "other", publish=False)
    other.optimize(objective, n_trials=2)
    assert other._study_id == study._study_id
    publisher.flush()
    assert system_attrs(other) == {}


# Artifacts


def test_extreme_hyperparameters_are_those_of_the_best_trial(study: optuna.Study) -> None:
    best = study.best_trial
    value = ohg.load_tensors(best, study=study)["t"]
    rows = list(csv.DictReader(io.StringIO(files_of(study, best)[artifacts.EXTREMES].decode())))
    assert [int(r["rank"]) for r in rows] == [*range(1, 26), *range(40, 65)]
    ordered = sorted(value.flatten().tolist(), reverse=True)
    for row in rows:
        assert row["hyperparameter"] == "t"
        i, j = map(int, row["index"].split())
        assert float(row["value"]) == float(value[i, j]) == ordered[int(row["rank"]) - 1]
    for trial in study.trials:
        if trial.number != best.number:
            assert files_of(study, trial) == {}


def test_names_in_a_spreadsheet_are_no_formulas() -> None:
    content = artifacts.files_of({"=1+1": torch.zeros(2), 'a,"b\n': torch.ones(1)}, {})[0].content
    rows = list(csv.reader(io.StringIO(content.decode())))
    assert [r[0] for r in rows[1:]] == ["'=1+1", "'=1+1", 'a,"b\\n']


def test_histogram_is_a_picture_with_a_size() -> None:
    value = torch.tensor([1.0, 1.0, 10.0, 100.0, 100.0, 100.0])
    picture = ET.fromstring(
        pictures.histograms_svg([("<a&b>", value, True), ("flat", torch.ones(3), False)])
    )
    assert (picture.get("width"), picture.get("height")) == ("640", "400")
    texts = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "<a&b>: 6 numbers, logarithmic" in texts
    assert {"1", "10", "100", "3"} <= set(texts)
    bars = [r for r in picture.iter("{http://www.w3.org/2000/svg}rect") if r.get("fill") != "white"]
    heights = [float(b.get("height")) for b in bars[:3]]  # type: ignore[arg-type]
    assert [h / max(heights) for h in heights] == pytest.approx([2 / 3, 1 / 3, 1.0], abs=0.01)


@pytest.mark.parametrize(
    ("shape", "is_image"),
    [
        ((8, 8), True), ((28, 28), True), ((10, 8, 8), True), ((3, 8, 8), True), ((5, 1, 8, 12), True),
        ((5, 3, 8, 8), True), ((64,), False), ((64, 10), False), ((5, 4, 8, 8), False), ((4, 4), False), ((600, 600), False),
    ],
)  # fmt: skip
def test_images(shape: tuple[int, ...], is_image: bool) -> None:
    assert pictures.is_image_shaped(shape) == is_image
    if not is_image:
        return
    value = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    shown = imread(io.BytesIO(pictures.png_of(value, log=False)))
    first = value[0] if len(shape) == 4 else value
    if len(shape) == 3 and shape[0] != 3:
        first = value[0]
    h, w = shape[-2:]
    images = (
        {3: 1, 4: shape[0]}.get(len(shape), 1) if shape[0] == 3 or len(shape) != 3 else shape[0]
    )
    across = math.ceil(math.sqrt(images))
    factor = (shown.shape[1]) // (across * (w + 1) - 1)
    tile = shown[: h * factor : factor, : w * factor : factor]
    truth = (value - value.min()) / (value.max() - value.min())
    mine = truth[0] if len(shape) == 4 or (len(shape) == 3 and shape[0] != 3) else truth
    wanted = mine.numpy()
    if wanted.ndim == 3:
        wanted = wanted.transpose(1, 2, 0)
        wanted = wanted[..., 0] if wanted.shape[-1] == 1 else wanted
        assert first.shape[0] in (1, 3)
    assert tile == pytest.approx(wanted, abs=0.5 / 255 + 1e-6)


def test_a_flat_image_and_a_logarithmic_one() -> None:
    assert len(np.unique(imread(io.BytesIO(pictures.png_of(torch.ones(8, 8), log=False))))) == 1
    steps = torch.logspace(-3, 0, 64, dtype=F64).reshape(8, 8)
    shown = imread(io.BytesIO(pictures.png_of(steps, log=True)))[::64, ::64]
    assert shown.flatten() == pytest.approx(np.linspace(0, 1, 64), abs=0.01)


def test_artifacts_of_a_former_best_trial_go(tmp_path: Path) -> None:
    study = study_in(open_storage("sqlite", tmp_path))
    study.optimize(objective, n_trials=2)
    first, before = study.best_trial, published_blobs(study)
    assert len(before) == 3
    study.optimize(objective, n_trials=8)
    best = study.best_trial
    assert best.number != first.number
    assert files_of(study, first) == {}
    assert len(files_of(study, best)) == 3
    after = published_blobs(study)
    assert len(after) == 3
    assert not before & after
    keys = [k for k in system_attrs(study) if k.startswith("dashboard:artifacts:")]
    assert len(keys) == 3
    assert not TensorStore.of_study(study).sweep(min_age=-60).orphans
    assert len(files_of(study, best)) == 3


def test_artifacts_in_a_journal_are_marked_as_gone(tmp_path: Path) -> None:
    study = study_in(open_storage("journal", tmp_path))
    study.optimize(objective, n_trials=2)
    study.optimize(objective, n_trials=8)
    assert files_of(study, study.trials[0]) == {}
    assert len(files_of(study, study.best_trial)) == len(published_blobs(study)) == 3


def test_what_is_deleted_in_the_dashboard_stays_deleted(study: optuna.Study) -> None:
    best = study.best_trial
    shown = serialize_frozen_trial(1, best, system_attrs(study))["artifacts"]
    for meta in shown:
        key = f"dashboard:artifacts:{best._trial_id}:{meta['artifact_id']}"
        study._storage.set_study_system_attr(study._study_id, key, json.dumps(None))
        TensorStore.of_study(study).artifact_store.remove(meta["artifact_id"])
    dashboard.publish(study)
    assert files_of(study, best) == {}
    assert published_blobs(study) == set()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_copied_study_has_artifacts_of_its_own(kind: str, tmp_path: Path) -> None:
    storage = open_storage(kind, tmp_path)
    study = study_in(storage)
    study.optimize(objective, n_trials=3)
    shown = files_of(study, study.best_trial)
    optuna.copy_study(
        from_study_name="decays", from_storage=storage, to_storage=storage, to_study_name="copy"
    )
    copied = study_in(storage, "copy")
    copied.optimize(objective, n_trials=2)
    assert "**Trials**: 5 (5 complete)" in get_note(copied)
    assert len(files_of(copied, copied.best_trial)) == 3
    assert files_of(study, study.best_trial) == shown
    assert "**Trials**: 3 (3 complete)" in get_note(study)


def test_a_deleted_study_leaves_artifacts_to_a_sweep(study: optuna.Study) -> None:
    other = study_in(study._storage, "other")
    other.optimize(objective, n_trials=2)
    optuna.delete_study(study_name="decays", storage=study._storage)
    store = TensorStore.of_study(other)
    before = published_blobs(other)
    assert len(before) == 6
    assert {o.artifact_id for o in store.sweep(min_age=-60).orphans} >= {
        b for b in before if b not in _listed(other)
    }
    assert published_blobs(other) == _listed(other)


def _listed(study: optuna.Study) -> set[str]:
    return {
        k.rpartition(":")[2] for k in system_attrs(study) if k.startswith("dashboard:artifacts:")
    }


def test_version_of_the_dashboard() -> None:
    """Its formats are written without it; they are checked against this one."""
    assert optuna_dashboard.__version__.startswith("0.2")
