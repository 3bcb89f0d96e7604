"""Connections break in mid-study: nobody dies, nothing is lost, and nothing is done twice."""

from __future__ import annotations

import io
import itertools
import logging
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import connection_losses as losses
import optuna
import pytest
import sqlalchemy as sa
from conftest import server
from connection_losses import (
    WRITES,
    Disturber,
    facts,
    lose_answers_to_writes,
    lose_each_answer,
    objective,
    open_study,
    tensors_of,
    tune,
)
from cutting_proxy import CuttingProxy
from optuna.storages import RDBStorage
from optuna.trial import TrialState

import optuna_hypergrad as ohg
from optuna_hypergrad.stores import RDBArtifactStore, _retrying, _schema, plain_rdb

SERVER_KINDS = ("postgresql", "mariadb")
TRIALS = 14


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retrying, "_LONGEST_PAUSE", 0.1)


@pytest.fixture(autouse=True)
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of connections; leases say more, those of an earlier test's database, too, which is gone."""
    said: list[str] = []

    def hear(text: object, *arguments: Any, **settings: Any) -> None:
        if not str(text).startswith("A lease could not be renewed"):
            said.append(str(text))

    monkeypatch.setattr(logging.getLogger("optuna.hypergradients"), "warning", hear)
    return said


class Through:
    """A new database behind a proxy, and storages on it that are closed in the end."""

    def __init__(self, kind: str) -> None:
        self.server = server(kind)
        self.proxy = CuttingProxy(self.server.port)
        self.direct_url = self.server.new_database()
        self.url = self.proxy.url(self.direct_url)
        self._opened: list[Any] = []

    def storage(self, patience: float = 60.0) -> ohg.RetryingStorage:
        self._opened.append(ohg.RetryingStorage(self.url, patience=patience))
        return self._opened[-1]

    def directly(self) -> RDBStorage:
        self._opened.append(RDBStorage(self.direct_url))
        return self._opened[-1]

    def close(self) -> None:
        self.proxy.let_through()
        for storage in self._opened:
            storage.remove_session()
            rdb = plain_rdb(storage)
            assert rdb is not None
            rdb.engine.dispose()
        self.proxy.close()


@pytest.fixture(params=SERVER_KINDS)
def through(request: pytest.FixtureRequest) -> Iterator[Through]:
    opened = Through(request.param)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def undisturbed() -> Callable[[int], optuna.Study]:
    known: dict[int, optuna.Study] = {}

    def run(trials: int) -> optuna.Study:
        if trials not in known:
            known[trials] = open_study(optuna.storages.InMemoryStorage())
            known[trials].optimize(objective(), n_trials=trials)
        return known[trials]

    return run


def assert_same(one: optuna.Study, other: optuna.Study) -> None:
    assert len(one.trials) == len(other.trials)
    for a, b in zip(facts(one), facts(other), strict=True):
        assert a == b
    assert tensors_of(one) == tensors_of(other)


def test_five_cuts_change_nothing(
    through: Through, undisturbed: Callable[[int], optuna.Study], warned: list[str]
) -> None:
    disturber = Disturber(through.proxy)
    study = open_study(through.storage())

    def during(number: int) -> None:
        if number in (2, 4, 6, 8, 10):
            disturber.next()
            assert study.sampler._leases.renew()

    study.optimize(objective(during), TRIALS)
    assert through.proxy.num_cut >= 4
    assert not through.proxy.is_waiting
    assert_same(study, undisturbed(TRIALS))
    assert sum("is lost (" in text for text in warned) >= 4
    assert sum("answers again" in text for text in warned) == len(warned) / 2


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_changes_nothing(
    crash: bool, through: Through, undisturbed: Callable[[int], optuna.Study], warned: list[str]
) -> None:
    started = []

    def during(number: int) -> None:
        if number == 2:
            through.server.stop(crash=crash)
            started.append(losses.in_background(lambda: (time.sleep(0.3), through.server.start())))

    study = open_study(through.storage())
    study.optimize(objective(during), n_trials=5)
    started[0].join()
    assert_same(study, undisturbed(5))
    assert "Trying again for 60 s" in warned[0]
    assert "answers again after" in warned[-1]


def test_no_answer_to_any_commit_is_missed(
    through: Through, undisturbed: Callable[[int], optuna.Study]
) -> None:
    study = open_study(through.storage())
    assert lose_answers_to_writes(study, through.proxy) == len(WRITES)
    assert lose_each_answer(study, through.proxy, b"COMMIT") >= 15
    assert_same(study, undisturbed(len(study.trials)))


LATE = {
    "creation": (b"INSERT INTO trials", b"COMMIT"),
    "save": (b"INSERT INTO hypergrad_blobs", b"COMMIT"),
    "end": (b"UPDATE trials", b"COMMIT", b"UPDATE trials", b"COMMIT"),
    "claim": (b"UPDATE trials", b"COMMIT"),
}


@pytest.mark.parametrize("through", ["postgresql"], indirect=True)
def test_what_the_server_does_after_the_cut_is_not_done_again(through: Through) -> None:
    """Each commit takes longer than it takes to come back and look."""
    late, whole = (open_study(s) for s in (through.storage(), optuna.storages.InMemoryStorage()))
    for study in (late, whole):
        study.optimize(objective(), n_trials=1)
    _have_commits_take(0.25, through.direct_url, "trials", "hypergrad_blobs")
    for what, requests in LATE.items():
        if what == "claim":
            for study in (late, whole):
                study.enqueue_trial({"n": 1})
        through.proxy.lose_answer_to(*requests, at_once=True)
        before = through.proxy.num_cut
        for study in (late, whole):
            study.optimize(objective(), n_trials=1)
        assert through.proxy.num_cut > before, what
        assert_same(late, whole)


def _have_commits_take(seconds: float, url: str, *tables: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN IF current_setting('test.slept', true) IS DISTINCT FROM '1' THEN "
            f"PERFORM pg_sleep({seconds}), set_config('test.slept', '1', true); "
            "END IF; RETURN NULL; END $$"
        )
        for table in tables:
            connection.exec_driver_sql(
                f"CREATE CONSTRAINT TRIGGER slowly AFTER INSERT OR UPDATE ON {table} "
                "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slowly()"
            )
    engine.dispose()


@pytest.mark.parametrize("through", ["mariadb"], indirect=True)
def test_a_spent_patience_loses_nothing(
    through: Through, undisturbed: Callable[[int], Any]
) -> None:
    def during(number: int) -> None:
        if number == 3:
            through.proxy.refuse()

    study = open_study(through.storage(patience=0.2))
    with pytest.raises(
        ohg.ConnectionLostError, match=r"for 0\.2 s .*Nothing that was stored is lost"
    ):
        study.optimize(objective(during), n_trials=5)
    store = ohg.TensorStore.of_study(study)
    assert isinstance(store.artifact_store, RDBArtifactStore)
    for access in (
        lambda: store.artifact_store.open_reader("x"),
        lambda: store.artifact_store.write_many({"x": b"1"}),
        lambda: list(store.artifact_store.stored()),
        lambda: store.sweep(dry_run=True),
        lambda: store.save(1, 1, "t", "value", 0, {}),
        lambda: store.save_all_soon(1, 1, 0, {}).result(),
        lambda: ohg.RetryingStorage(through.url, patience=0),
    ):
        with pytest.raises(ohg.ConnectionLostError, match=r"for 0(\.2)? s"):
            access()
    through.proxy.let_through()
    study = open_study(through.storage())
    assert facts(study)[:3] == facts(undisturbed(3))
    assert study.trials[3].state == TrialState.RUNNING
    assert tensors_of(study) == tensors_of(undisturbed(3))


def test_a_long_run_survives(through: Through) -> None:
    disturber = Disturber(through.proxy, seed=1)

    def run(storage: Any, during: Callable[[int], None]) -> optuna.Study:
        study = optuna.create_study(
            study_name=losses.NAME, storage=storage, pruner=optuna.pruners.NopPruner()
        )
        study.optimize(lambda trial: tune(trial, during), n_trials=1)
        return study

    cut = run(through.storage(), lambda step: disturber.next() if step % 2 == 1 else None)
    whole = run(optuna.storages.InMemoryStorage(), lambda step: None)
    assert through.proxy.num_cut >= 4
    assert_same(cut, whole)


def test_a_tensor_is_read_across_cuts(
    through: Through, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna_hypergrad.stores import rdb

    monkeypatch.setattr(rdb, "CHUNK_BYTES", 1000)
    store = RDBArtifactStore(through.storage())
    data = bytes(range(256)) * 20
    store.write("a", io.BytesIO(data))
    through.proxy.cut()
    reader = store.open_reader("a")
    found = b""
    while part := reader.read(1500):
        through.proxy.cut()
        found += part
    assert found == data
    through.proxy.cut()
    assert [a.artifact_id for a in store.stored()] == ["a"]
    through.proxy.cut()
    store.remove("a")
    assert bool(warned) == (through.server.kind == "postgresql")  # on MariaDB, the pool looks first


def test_workers_may_make_the_tables_at_the_same_time(through: Through) -> None:
    store = RDBArtifactStore(through.directly())
    errors: list[Exception] = []
    together = threading.Barrier(6)

    def make() -> None:
        with store._engine.connect():  # one for each, in the pool
            together.wait()
        try:
            _schema._create_tables(store._storage)
        except Exception as error:
            errors.append(error)

    for thread in [losses.in_background(make) for _ in range(together.parties)]:
        thread.join()
    assert not errors
    store.write("a", io.BytesIO(b""))


class Unseekable(io.RawIOBase):
    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)


@pytest.mark.parametrize("way", ["write", "unseekable", "write_many"])
def test_an_artifact_is_replaced_in_one_piece(way: str, through: Through) -> None:
    """Whatever is lost, whoever looks finds the old content or the new one."""
    store, direct = RDBArtifactStore(through.storage()), RDBArtifactStore(through.directly())
    ways: dict[str, Callable[[bytes], None]] = {
        "write": lambda data: store.write("a", io.BytesIO(data)),
        "unseekable": lambda data: store.write("a", Unseekable(data)),  # type: ignore[arg-type]
        "write_many": lambda data: store.write_many({"a": data, "b": data}),
    }
    contents = [bytes([n]) * 1000 for n in range(8)]
    ways[way](contents[0])
    for k, (old, new) in enumerate(itertools.pairwise(contents), 1):
        seen = []
        through.proxy.lose_answer_to(*[b"COMMIT"] * k)
        sa.event.listen(
            store._engine, "begin", lambda _, seen=seen: seen.append(direct.open_reader("a").read())
        )
        ways[way](new)
        assert set(seen) <= {old, new}
        assert direct.open_reader("a").read() == new
        through.proxy.let_through()


def test_a_finished_trial_gets_no_attribute(through: Through) -> None:
    """Not even from a save that had begun when it was marked as failed."""
    storage, other = through.storage(), through.directly()
    study = optuna.create_study(study_name="s", storage=storage)
    trial_id = study.ask()._trial_id
    store = RDBArtifactStore(storage)
    store.write("a", io.BytesIO(b""))
    mark = other.scoped_session()
    mark.execute(sa.text(f"UPDATE trials SET state = 'FAIL' WHERE trial_id = {trial_id}"))
    failures: list[Exception] = []

    def save() -> None:
        try:
            store.write_with_attributes({"b": (b"1",)}, trial_id, ["key"], lambda: {"key": 1}, [])
        except Exception as error:
            failures.append(error)

    saving = losses.in_background(save)
    saving.join(0.3)
    mark.commit()
    saving.join()
    assert [type(e).__name__ for e in failures] == ["UpdateFinishedTrialError"]
    assert "key" not in study.trials[0].system_attrs
    assert [a.artifact_id for a in store.stored()] == ["a"]


def test_a_locked_file_is_waited_for(
    tmp_path: Path, undisturbed: Callable[[int], optuna.Study], warned: list[str]
) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    rdb = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 0.02}})
    held = []

    def hold() -> None:
        with closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            held.append(1)
            time.sleep(0.3)
            connection.execute("COMMIT")

    def during(number: int) -> None:
        if number % 2:
            losses.in_background(hold)
            while len(held) < number / 2:
                time.sleep(0.01)

    study = open_study(ohg.RetryingStorage(rdb))
    study.optimize(objective(during), n_trials=5)
    assert_same(study, undisturbed(5))
    assert not warned
    rdb.remove_session()
    rdb.engine.dispose()


_GRPC_SERVER = """
import sys
from optuna.storages import RDBStorage, run_grpc_proxy_server
run_grpc_proxy_server(RDBStorage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_grpc_proxy_may_be_restarted(
    tmp_path: Path, undisturbed: Callable[[int], optuna.Study], warned: list[str]
) -> None:
    pytest.importorskip("grpc")
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", _GRPC_SERVER]
    command += [f"sqlite:///{tmp_path}/study.db", str(port)]
    processes = [subprocess.Popen(command)]
    proxy = optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=port)
    try:
        proxy.wait_server_ready(60)

        def during(number: int) -> None:
            if number == 2:
                processes[-1].kill()
                processes[-1].wait()
                processes.append(subprocess.Popen(command))

        study = open_study(ohg.RetryingStorage(proxy), tensor_store=str(tmp_path / "tensors"))
        study.optimize(objective(during), n_trials=5)
        assert_same(study, undisturbed(5))
        assert any("is lost" in w for w in warned)  # the thread of the lease may say so first
        assert any("answers again" in w for w in warned)
    finally:
        proxy.close()
        for process in processes:
            process.kill()
            process.wait()
