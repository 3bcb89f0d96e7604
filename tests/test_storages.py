"""Every storage that Optuna has, with the place for tensors that belongs to it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import PROXIES, open_storage
from long_run import CutOffError, long_run
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.stores import (
    AtomicFileSystemArtifactStore,
    MemoryArtifactStore,
    RDBArtifactStore,
)
from optuna_hypergrad.studies.events import CLAIM

OWN_PLACE: dict[str, type | None] = {
    "memory": MemoryArtifactStore,
    "sqlite": RDBArtifactStore,
    "postgresql": RDBArtifactStore,
    "mariadb": RDBArtifactStore,
    "journal": AtomicFileSystemArtifactStore,
    "grpc": None,
    "grpc-postgresql": None,
}
# The second proxy's tensors go to the database behind it, past the proxy.
every_storage = pytest.mark.parametrize("kind", OWN_PLACE)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@ohg.differentiable
def objective(trial: Any) -> Tensor:
    scale = trial.suggest_float("scale", 0.1, 10.0, log=True)
    shift = trial.suggest_tensor("shift", (3, 2), -1.0, 1.0)
    tree = trial.suggest_tensor_like("tree", {"w": torch.zeros(4)}, 1e-3, 10.0, log=True)
    return (
        (scale * shift - 0.3).pow(2).sum() + scale.log() ** 2 + (tree["w"].log() + 1).pow(2).sum()
    )


class Place:
    """One kind of storage, opened again for each study, as another process would."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.directory = kind, directory
        self.tensors: Any = None
        if kind == "grpc":
            self.tensors = directory / "tensors"
        elif kind in PROXIES:
            self.tensors = RDBArtifactStore(open_storage(PROXIES[kind], directory))
        self._memory = InMemoryStorage()

    def storage(self) -> BaseStorage:
        return self._memory if self.kind == "memory" else open_storage(self.kind, self.directory)

    def study(self, **settings: Any) -> optuna.Study:
        settings = {"seed": 0, "tensor_store": self.tensors, **settings}
        return optuna.create_study(
            study_name="s",
            storage=self.storage(),
            sampler=ohg.HypergradientSampler(**settings),
            load_if_exists=True,
        )

    def store(self) -> ohg.TensorStore:
        """All of it, and nobody else's."""
        found = ohg.TensorStore.of_study(self.study(), self.tensors)
        return ohg.TensorStore(found.artifact_store, found._storage, exclusive=True)

    def blobs(self) -> set[str]:
        return {a.artifact_id for a in self.store().artifact_store.stored()}  # type: ignore[attr-defined]


@pytest.fixture
def place(kind: str, tmp_path: Path) -> Place:
    return Place(kind, tmp_path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    study = Place("memory", tmp_path_factory.mktemp("expected")).study()
    study.optimize(objective, n_trials=7)
    return study


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(
        same(one[k], other[k]) if isinstance(one[k], dict) else torch.equal(one[k], other[k])
        for k in one
    )


@every_storage
def test_tensors_of_a_study_have_their_place(
    kind: str, place: Place, expected: optuna.Study
) -> None:
    if OWN_PLACE[kind] is None:
        study = place.study(tensor_store=None)
        with pytest.raises(
            ohg.StorageError, match=r"GrpcStorageProxy has no place .*tensor_store="
        ):
            study.optimize(objective, n_trials=1)
        optuna.delete_study(study_name="s", storage=study._storage)
    else:
        artifacts = ohg.TensorStore.of_study(place.study()).artifact_store
        assert type(artifacts) is OWN_PLACE[kind]
    for trials in (4, 3):
        place.study().optimize(objective, n_trials=trials)
    study = place.study()
    assert [(t.params, t.values) for t in study.trials] == [
        (t.params, t.values) for t in expected.trials
    ]
    assert same(ohg.load_tensors(study), ohg.load_tensors(expected))
    last, other = study.trials[-1], expected.trials[-1]
    assert same(ohg.load_tensors(last, study=study), ohg.load_tensors(other, study=expected))


@pytest.mark.parametrize("kind", ["memory", "journal", "grpc"])
def test_a_storage_that_waits_has_the_place_of_what_it_waits_for(kind: str, tmp_path: Path) -> None:
    waiting = ohg.RetryingStorage(Place(kind, tmp_path).storage())
    study = optuna.create_study(storage=waiting, sampler=ohg.HypergradientSampler(seed=0))
    if OWN_PLACE[kind] is None:
        with pytest.raises(ohg.StorageError, match="GrpcStorageProxy has no place"):
            study.optimize(objective, n_trials=1)
        return
    study.optimize(objective, n_trials=1)
    assert type(ohg.TensorStore.of_study(study).artifact_store) is OWN_PLACE[kind]
    assert ohg.load_tensors(study)["shift"].shape == (3, 2)


@every_storage
def test_what_is_not_kept_goes_and_what_nobody_needs_is_swept(kind: str, place: Place) -> None:
    keeping = ohg.Retention(newest=1, best=1, every=0)
    study = place.study(retention=keeping)
    study.optimize(objective, n_trials=6)
    for trial in place.study().trials:
        if trial.number in (study.best_trial.number, 4, 5):  # 4: the newest when 5 was stored
            assert ohg.load_tensors(trial, study=study)["shift"].shape == (3, 2)
            continue
        with pytest.raises(ohg.MissingTensorError, match="retention"):
            ohg.load_tensors(trial, study=study)
    kept = place.blobs()
    assert place.store().sweep(min_age=-60).orphans == ()
    optuna.delete_study(study_name="s", storage=place.storage())
    report = place.store().sweep(dry_run=True, min_age=-60)
    assert {o.artifact_id for o in report.orphans} == place.blobs() == kept
    assert place.store().sweep(min_age=-60).removed
    assert place.blobs() == set()


@pytest.mark.parametrize("kind", ["memory", "sqlite", "mariadb", "journal", "grpc"])
def test_a_run_that_was_cut_off_goes_on(kind: str, place: Place, tmp_path: Path) -> None:
    study = place.study()
    study.optimize(lambda trial: long_run(trial, cut_at=5), n_trials=1, catch=(CutOffError,))
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
    retry(study, study.trials[0])
    seen: list[int] = []
    again = place.study(seed=1)
    again.optimize(lambda trial: long_run(trial, seen=seen), n_trials=1)
    assert seen == [4, 5, 6, 7]  # the checkpoint is from after step 3
    failed, resumed = again.trials
    whole = optuna.create_study(sampler=ohg.HypergradientSampler(seed=2))
    whole.enqueue_trial(failed.params)
    whole.optimize(long_run, n_trials=1)
    assert resumed.value == whole.best_value
    assert same(
        ohg.load_tensors(resumed, study=again), ohg.load_tensors(whole.trials[0], study=whole)
    )


@pytest.mark.parametrize("kind", PROXIES)
def test_workers_behind_a_proxy_share_no_step(kind: str, place: Place) -> None:
    workers, trials = 4, 5
    place.study()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            place.study(seed=None).optimize(objective, n_trials=trials)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    study = place.study()
    assert [t.number for t in study.trials] == list(range(workers * trials))
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}
    parents = [p for t in study.trials if (p := t.system_attrs[CLAIM]["parent"]) is not None]
    assert len(parents) == len(set(parents))
    assert ohg.load_tensors(study)["shift"].shape == (3, 2)
    assert place.store().verify().damaged == ()
