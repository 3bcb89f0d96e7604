"""A storage that waits for its server, and does nothing twice."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from conftest import open_storage, server
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.trial import TrialState, create_trial
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.stores import _retrying, plain_rdb
from optuna_hypergrad.studies.retrying_storage import KEY, REMOTE_KEY, RetryingStorage

KINDS = ("sqlite", "postgresql", "mariadb")


class LosesAnswers:
    """Has the next calls of a storage's own backend carried out, and their answers lost; or not even
    carried out."""

    def __init__(self, storage: RetryingStorage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend = storage._backend
        self.patch = monkeypatch
        self.count = 0

    def in_(self, name: str, times: int, carried_out: bool) -> None:
        real: Callable[..., Any] = getattr(self.backend, name)
        left = [times]

        def broken(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if not left[0]:
                return real(*args, **kwargs)
            left[0] -= 1
            if carried_out:
                real(*args, **kwargs)
            raise ConnectionResetError("cut")

        self.patch.setattr(self.backend, name, broken)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retrying, "_LONGEST_PAUSE", 0.02)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[RetryingStorage]:
    storage = RetryingStorage(f"sqlite:///{tmp_path}/study.db", patience=5.0)
    yield storage
    close(storage)


@pytest.fixture
def loses(opened: RetryingStorage, monkeypatch: pytest.MonkeyPatch) -> LosesAnswers:
    return LosesAnswers(opened, monkeypatch)


def close(storage: RetryingStorage) -> None:
    storage.remove_session()
    rdb = plain_rdb(storage)
    assert rdb is not None
    rdb.engine.dispose()


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_trial_is_created_once(
    opened: RetryingStorage, loses: LosesAnswers, carried_out: bool
) -> None:
    study = optuna.create_study(storage=opened)
    loses.in_("create_new_trial", 2, carried_out)
    study.ask()
    assert [t.number for t in study.trials] == [0]
    assert loses.count == (1 if carried_out else 3)
    assert KEY not in study.trials[0].system_attrs
    study.enqueue_trial({"x": 1.0})
    study.add_trial(create_trial(value=2.0))
    assert [t.state.name for t in study.trials] == ["RUNNING", "WAITING", "COMPLETE"]


def test_a_trial_is_created_once_by_a_client_of_a_server_that_retries_too(
    opened: RetryingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Remote(RetryingStorage):
        passes_calls_through = False

        def create_new_trial(self, study_id: int, template_trial: Any = None) -> int:
            return self._backend.create_new_trial(study_id, template_trial)

        def _shown(self, trial: Any) -> Any:
            return trial

    client = RetryingStorage(Remote(opened), patience=5.0)
    study = optuna.create_study(storage=client)
    loses = LosesAnswers(client, monkeypatch)
    for _ in range(2):
        loses.in_("create_new_trial", 1, True)
        study.ask()
    assert [t.number for t in study.trials] == [0, 1]
    assert not any(t.system_attrs.keys() & {KEY, REMOTE_KEY} for t in study.trials)


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_final_state_is_set_once(
    opened: RetryingStorage, loses: LosesAnswers, carried_out: bool
) -> None:
    study = optuna.create_study(storage=opened)
    trial = study.ask()
    loses.in_("set_trial_state_values", 1, carried_out)
    study.tell(trial, 3.0)
    assert study.trials[0].value == 3.0
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        opened.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [3.0])


def test_a_state_that_somebody_else_has_set_is_not_ours(
    opened: RetryingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(storage=opened)
    trial = study.ask()
    backend = opened._backend
    real = backend.set_trial_state_values
    first = [True]

    def broken(trial_id: int, state: TrialState, values: Any = None) -> bool:
        if first.pop() if first else False:
            real(trial_id, TrialState.FAIL)
            raise ConnectionResetError
        return real(trial_id, state, values)

    monkeypatch.setattr(backend, "set_trial_state_values", broken)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        study.tell(trial, 3.0)


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_study_is_created_and_removed_once(
    opened: RetryingStorage, loses: LosesAnswers, carried_out: bool
) -> None:
    loses.in_("create_new_study", 1, carried_out)
    optuna.create_study(study_name="s", storage=opened)
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        optuna.create_study(study_name="s", storage=opened)
    optuna.create_study(storage=opened)
    assert len(opened.get_all_studies()) == 2
    loses.in_("delete_study", 1, carried_out)
    optuna.delete_study(study_name="s", storage=opened)
    with pytest.raises(KeyError):
        opened.delete_study(77)


@pytest.mark.parametrize("lost", ["before", "after", "to another"])
def test_a_waiting_trial_is_claimed_once(
    lost: str, opened: RetryingStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna_hypergrad.studies import retrying_storage

    study = optuna.create_study(study_name="s", storage=opened)
    study.enqueue_trial({"x": 0.5})
    real = retrying_storage.claim_waiting_trial
    calls: list[int] = []

    def broken(rdb: RDBStorage, trial_id: int, attributes: Any) -> bool:
        calls.append(1)
        if len(calls) == 1:
            if lost == "after":
                real(rdb, trial_id, attributes)
            if lost == "to another":
                real(rdb, trial_id, {KEY: "another"})
            raise ConnectionResetError
        return real(rdb, trial_id, attributes)

    monkeypatch.setattr(retrying_storage, "claim_waiting_trial", broken)
    trial = study.ask()
    assert trial.number == (1 if lost == "to another" else 0)
    assert (trial.suggest_float("x", 0, 1) == 0.5) == (lost != "to another")
    assert study.trials[0].datetime_start is not None


def test_it_warns_and_gives_up_in_words(
    opened: RetryingStorage, loses: LosesAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    logger = logging.getLogger("optuna.hypergradients")
    monkeypatch.setattr(logger, "warning", lambda text, *a, **k: said.append(str(text)))
    study = optuna.create_study(storage=opened)
    loses.in_("get_all_trials", 2, False)
    assert study.trials == []
    assert "is lost (ConnectionResetError). Trying again for 5 s" in said[0]
    assert "answers again" in said[1]
    assert len(said) == 2
    opened.patience = 0.05
    loses.in_("get_all_trials", 10**6, False)
    with pytest.raises(ohg.ConnectionLostError, match=r"for 0\.05 s .*patience="):
        study.get_trials()


def test_other_errors_pass_at_once(opened: RetryingStorage, loses: LosesAnswers) -> None:
    with pytest.raises(KeyError):
        opened.get_trial(5)
    with pytest.raises(ValueError, match="patience"):
        RetryingStorage("sqlite://", patience=-1)
    with pytest.raises(ValueError, match="patience"):
        RetryingStorage("sqlite://", patience=float("nan"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_in_it_is_the_study_without_it(kind: str, tmp_path: Path) -> None:
    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        n = trial.suggest_int("n", 0, 2)
        t = trial.suggest_tensor("t", 3, -1.0, 1.0)
        return (t - 0.3).pow(2).sum() + n

    def run(storage: BaseStorage, trials: int) -> optuna.Study:
        study = optuna.create_study(
            study_name="s",
            storage=storage,
            sampler=ohg.HypergradientSampler(seed=1),
            load_if_exists=True,
        )
        study.enqueue_trial({"n": 1})
        study.optimize(objective, n_trials=trials)
        return study

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = run(open_storage(kind, tmp_path / "a"), 10)
    inner = open_storage(kind, tmp_path / "b")
    assert isinstance(inner, RDBStorage)
    wrapped = run(RetryingStorage(inner), 10)
    assert [t.value for t in plain.trials] == [t.value for t in wrapped.trials]
    assert [t.params for t in plain.trials] == [t.params for t in wrapped.trials]
    one, other = ohg.load_tensors(plain), ohg.load_tensors(wrapped)
    assert bool((one["t"] == other["t"]).all())
    assert isinstance(
        ohg.TensorStore.of_study(wrapped).artifact_store,
        type(ohg.TensorStore.of_study(plain).artifact_store),
    )


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_what_is_wrong_for_good_is_not_waited_for(kind: str) -> None:
    url = sa.make_url(server(kind).new_database()).set(database="there_is_none")
    with pytest.raises(Exception, match=r"(?i)there_is_none") as caught:
        RetryingStorage(url.render_as_string(hide_password=False), patience=30.0)
    assert not isinstance(caught.value, ohg.ConnectionLostError)


def test_it_can_be_pickled_and_shows_no_password(opened: RetryingStorage) -> None:
    study = optuna.create_study(storage=opened)
    copied = pickle.loads(pickle.dumps(opened))
    assert copied.get_all_trials(study._study_id) == []
    assert copied.patience == 5.0
    assert "patience=5" in repr(copied)
    close(copied)


def test_a_storage_without_a_database_is_passed_through() -> None:
    storage = RetryingStorage(InMemoryStorage())
    study = optuna.create_study(storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert len(study.trials) == 3
    assert storage.get_heartbeat_interval() is None
    assert "InMemoryStorage" in repr(storage)
