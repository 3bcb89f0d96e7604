"""Studies that are copied, renamed in optuna-dashboard, or deleted: their tensors follow, or go."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import DATABASES, open_storage
from optuna.storages import BaseStorage
from optuna_dashboard._app import create_app
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.stores._published import is_published

every_database = pytest.mark.parametrize("kind", DATABASES)


@ohg.differentiable
def objective(trial: Any) -> Tensor:
    width = trial.suggest_int("width", 1, 3)
    x = trial.suggest_float("x", -3.0, 3.0)
    t = trial.suggest_tensor("t", (4, 2), -1.0, 1.0)
    return (x - 1.0) ** 4 + width * (t - 0.3).pow(2).sum()


def study_in(storage: BaseStorage, name: str) -> optuna.Study:
    sampler = ohg.HypergradientSampler(seed=0, retention=ohg.Retention(every=1))
    return optuna.create_study(
        study_name=name, storage=storage, sampler=sampler, load_if_exists=True
    )


def tensors_of(study: optuna.Study) -> list[Tensor]:
    return [ohg.load_tensors(t, study=study)["t"] for t in study.trials]


def ask_dashboard(
    storage: BaseStorage, method: str, path: str, body: dict[str, Any]
) -> tuple[str, Any]:
    """Status and answer of optuna-dashboard's own application."""
    data = json.dumps(body).encode()
    status: list[str] = []
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(data)),
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "wsgi.input": io.BytesIO(data),
        "wsgi.errors": io.StringIO(),
        "wsgi.url_scheme": "http",
    }
    app = create_app(storage)
    answer = b"".join(app(environ, lambda s, headers, error=None: status.append(s)))
    return status[0], json.loads(answer) if answer else None


def orphans(storage: BaseStorage, study: optuna.Study, published: bool = False) -> set[str]:
    """Tensors that nothing refers to; or, with ``published``, what shows some in the dashboard."""
    found = ohg.TensorStore.of_study(study).sweep(dry_run=True, min_age=-60).orphans
    return {o.artifact_id for o in found if is_published(o.artifact_id) == published}


def copy(storage: BaseStorage, study: optuna.Study) -> None:
    optuna.copy_study(
        from_study_name=study.study_name,
        from_storage=storage,
        to_storage=storage,
        to_study_name="new",
    )
    optuna.delete_study(study_name=study.study_name, storage=storage)


def rename(storage: BaseStorage, study: optuna.Study) -> None:
    path = f"/api/studies/{study._study_id}/rename"
    status, answer = ask_dashboard(storage, "POST", path, {"study_name": "new"})
    assert status.startswith("201"), answer


@pytest.mark.parametrize("move", [copy, rename], ids=["copied", "renamed"])
@every_database
def test_a_study_under_another_name_keeps_its_tensors(
    kind: str, move: Callable[[BaseStorage, optuna.Study], None], tmp_path: Path
) -> None:
    storage = open_storage(kind, tmp_path)
    study = study_in(storage, "old")
    study.optimize(objective, n_trials=3)
    before, values = tensors_of(study), [t.values for t in study.trials]
    study_in(storage, "another").optimize(objective, n_trials=1)
    move(storage, study)
    assert sorted(optuna.get_all_study_names(storage)) == ["another", "new"]
    moved = study_in(open_storage(kind, tmp_path), "new")
    assert not orphans(storage, moved)
    assert [t.values for t in moved.trials] == values
    assert all(map(torch.equal, tensors_of(moved), before))
    moved.optimize(objective, n_trials=2)
    assert not orphans(storage, moved)
    assert orphans(storage, moved, published=True)  # what the deleted study has shown
    assert ohg.TensorStore.of_study(moved).sweep(min_age=-60).orphans
    assert all(map(torch.equal, tensors_of(moved)[:3], before))
    steps = [t.system_attrs["hypergrad:claim"]["parent"] for t in moved.trials]
    assert any(parent is not None and parent < 3 for parent in steps[3:])  # it went on
    assert len(tensors_of(study_in(storage, "another"))) == 1


@pytest.mark.parametrize(
    ("kind", "by"), [*((kind, "optuna") for kind in DATABASES), ("sqlite", "dashboard")]
)
def test_a_deleted_study_leaves_what_a_sweep_takes(kind: str, by: str, tmp_path: Path) -> None:
    storage = open_storage(kind, tmp_path)
    study = study_in(storage, "old")
    study.optimize(objective, n_trials=3)
    other = study_in(storage, "another")
    other.optimize(objective, n_trials=2)
    store = ohg.TensorStore.of_study(other)
    own = {p.blob for t in study.trials for p in store.pointers(t)}
    if by == "optuna":
        optuna.delete_study(study_name="old", storage=storage)
    else:
        status, _ = ask_dashboard(storage, "DELETE", f"/api/studies/{study._study_id}", {})
        assert status.startswith("204")
    listed = {a.artifact_id for a in store.artifact_store.stored()}  # type: ignore[attr-defined]
    assert own & listed
    dry = store.sweep(dry_run=True, min_age=-60)
    assert not dry.removed
    assert orphans(storage, other) == own & listed
    assert orphans(storage, other, published=True) == {o.artifact_id for o in dry.orphans} - own
    assert store.sweep(min_age=-60).orphans == dry.orphans
    assert not own & {a.artifact_id for a in store.artifact_store.stored()}  # type: ignore[attr-defined]
    assert store.verify().damaged == ()
    assert len(tensors_of(other)) == 2


@pytest.mark.parametrize(
    ("kind", "to"), [("sqlite", "postgresql"), ("mariadb", "sqlite"), ("journal", "memory")]
)
def test_tensors_are_not_copied_to_another_storage(kind: str, to: str, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    source, target = open_storage(kind, tmp_path), open_storage(to, tmp_path / "to")
    study = study_in(source, "old")
    study.optimize(objective, n_trials=4)
    optuna.copy_study(from_study_name="old", from_storage=source, to_storage=target)
    copied = study_in(target, "old")
    assert [t.values for t in copied.trials] == [t.values for t in study.trials]
    with pytest.raises(ohg.MissingTensorError, match="tensors were not copied with it"):
        ohg.load_tensors(copied)
    copied.optimize(objective, n_trials=2)
    assert len(tensors_of(study)) == 4
    assert ohg.load_tensors(copied.trials[-1], study=copied)["t"].shape == (4, 2)
    assert ohg.TensorStore.of_study(copied).sweep(min_age=-60).orphans == ()


def test_one_sampler_goes_on_with_the_study_that_takes_a_deleted_ones_place(tmp_path: Path) -> None:
    storage = ohg.RetryingStorage(f"sqlite:///{tmp_path}/s.db")  # which Optuna wraps in no cache
    sampler = ohg.HypergradientSampler(seed=0)
    for _ in range(2):
        study = optuna.create_study(study_name="again", storage=storage, sampler=sampler)
        study.optimize(objective, n_trials=5)
        assert study._study_id == 1  # SQLite gives the id again
        assert [t.system_attrs["hypergrad:claim"]["parent"] for t in study.trials[:2]] == [None, 0]
        optuna.delete_study(study_name="again", storage=storage)
