"""A database's password appears in no log, warning, error, repr or output."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import traceback
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from conftest import PASSWORD, server
from servers import SERVERS, CuttingProxy
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import cli
from optuna_hypergrad.stores import RDBArtifactStore, _retrying

WRONG = "wr:ong p@ss/%2Fword'\"#"
SHOWN = {
    spelled
    for secret in (PASSWORD, WRONG)
    for part in (secret, *secret.replace("@", " ").replace("/", " ").split())
    for spelled in (
        part,
        repr(part)[1:-1],
        json.dumps(part)[1:-1],
        urllib.parse.quote(part, safe=""),
        urllib.parse.quote_plus(part),
        urllib.parse.unquote(part),
    )
    if len(spelled) > 2
}
"""Every spelling of a password, and of each of its parts."""

FORMS: dict[str, Callable[[sa.engine.URL, str], str]] = {
    "user:password@": lambda url, password: _text(url.set(password=password)),
    "?password=": lambda url, password: _text(
        sa.engine.URL.create(
            url.drivername,
            url.username,
            None,
            url.host,
            url.port,
            url.database,
            {**url.query, "password": password},
        )
    ),
}


def _text(url: sa.engine.URL) -> str:
    return url.render_as_string(hide_password=False)


class Seen:
    """All that was logged, warned of or printed, and what tests add to it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, *things: object) -> None:
        for thing in things:
            self.texts += [str(thing), repr(thing)]
            if isinstance(thing, BaseException):
                self.texts += traceback.format_exception(thing)

    def check(self) -> None:
        for text in self.texts:
            found = [s for s in SHOWN if s in text]
            assert not found, (found, text)


@pytest.fixture
def seen(capfd: pytest.CaptureFixture[str]) -> Iterator[Seen]:
    found = Seen()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.texts.append(logging.Formatter().format(record))

    handler = Handler()
    loggers = [logging.getLogger(name) for name in ("", "optuna", "sqlalchemy", "grpc")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    optuna.logging.enable_propagation()
    logging.getLogger().addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield found
    logging.getLogger().removeHandler(handler)
    optuna.logging.disable_propagation()
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    found.texts += [str(w.message) for w in warned]
    output, error = capfd.readouterr()
    found.texts += [output, error]
    assert len(found.texts) > 2  # there was something to look at
    found.check()


@ohg.differentiable
def objective(trial: Any) -> Tensor:
    return (trial.suggest_tensor("t", (3,), -1.0, 1.0) - 0.3).pow(2).sum()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Callable[[sa.engine.URL, str], str]:
    return FORMS[request.param]


@pytest.fixture(scope="module", params=SERVERS)
def database(request: pytest.FixtureRequest) -> sa.engine.URL:
    return sa.make_url(server(request.param, secured=True).new_database())


def close(storage: ohg.RetryingStorage) -> None:
    storage.remove_session()
    storage._backend._backend.engine.dispose()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retrying, "_LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(_retrying, "_last_loss", -1e9)


def test_the_life_of_a_study(
    database: sa.engine.URL,
    form: Callable[[sa.engine.URL, str], str],
    seen: Seen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = form(database, PASSWORD)
    storage = ohg.RetryingStorage(url)
    sampler = ohg.HypergradientSampler(seed=0)
    study = optuna.create_study(storage=storage, sampler=sampler)
    study.optimize(objective, n_trials=2)
    rdb = storage._backend._backend
    store = ohg.TensorStore.of_study(study)
    seen.add(storage, rdb, RDBArtifactStore(rdb), store, sampler, study, store.verify())
    seen.add(vars(store), vars(RDBArtifactStore(rdb)), store.sweep(dry_run=True))
    close(storage)
    output = str(tmp_path / "out")
    name = ["--study", study.study_name]
    for arguments in (
        ["show", url],
        ["show", url, "--json", *name],
        ["verify", url],
        ["sweep", url, "--dry-run"],
        ["export", url, "-o", output, *name],
    ):
        assert cli.main(arguments) == 0
    monkeypatch.setenv(cli.STORAGE_VARIABLE, url)
    assert cli.main(["show"]) == 0
    assert cli.main(["--help" * 2]) == 2
    assert cli.main(["export", "--study", "nobody", "-o", output]) == 2
    assert cli.main([url]) == 2
    assert cli.main(["show", "--sudy", url]) == 2
    with pytest.raises(SystemExit):
        cli.main(["show", "--help"])


def unusable(database: sa.engine.URL, form: Callable[[sa.engine.URL, str], str]) -> dict[str, str]:
    host = f"127.0.0.1:{database.port}/{database.database}"
    return {
        "wrong password": form(database, WRONG),
        "no such database": form(database.set(database="nowhere"), PASSWORD),
        "nobody listens": form(database.set(port=1), PASSWORD),
        "no such host": form(database.set(host="nowhere.invalid"), PASSWORD),
        "no such driver": form(database.set(drivername="postgresql+nothing"), PASSWORD),
        "no such dialect": form(database.set(drivername="oracel"), PASSWORD),
        "an unknown option": form(database.update_query_dict({"colour": "red"}), PASSWORD),
        "not quoted": f"{database.drivername}://{database.username}:{PASSWORD}@{host}",
        "a port of words": form(database, PASSWORD).replace(str(database.port), "w@rd"),
        "password for a port": f"{database.drivername}://127.0.0.1:{WRONG}/test",
        "no scheme": f"{database.username}:{PASSWORD}@{host}",
    }


@pytest.mark.parametrize(
    "case", unusable(sa.make_url("mysql+pymysql://u@h:1/d"), FORMS["?password="])
)
def test_what_cannot_be_opened(
    case: str, database: sa.engine.URL, form: Callable[[sa.engine.URL, str], str], seen: Seen
) -> None:
    url = unusable(database, form)[case]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        ohg.RetryingStorage(url, patience=0.1)
    seen.add(caught.value)
    assert cli.main(["show", url]) == cli.FAILURE


def test_a_connection_that_is_lost(
    database: sa.engine.URL, form: Callable[[sa.engine.URL, str], str], seen: Seen
) -> None:
    assert database.port is not None
    proxy = CuttingProxy(database.port)
    storage = ohg.RetryingStorage(form(database.set(port=proxy.port), PASSWORD), patience=0.3)
    study = optuna.create_study(storage=storage, sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=1)
    store = ohg.TensorStore.of_study(study)
    trial = study.ask()
    proxy.cut()
    assert len(study.trials) == 2  # with a warning
    proxy.refuse()
    proxy.cut()
    uses: list[Callable[[], Any]] = [
        lambda: study.trials,
        lambda: store.save(study._study_id, trial._trial_id, "t", "value", 0, {}),
        lambda: ohg.load_tensors(study),
        lambda: store.sweep(min_age=-60),
        store.verify,
    ]
    for use in uses:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            use()
        seen.add(caught.value)
    close(storage)
    proxy.close()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_as_a_process(database: sa.engine.URL) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "optuna_hypergrad", "show"],
        env={**os.environ, cli.STORAGE_VARIABLE: FORMS["?password="](database, WRONG)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == cli.FAILURE
    found = Seen()
    found.add(done.stdout, done.stderr)
    found.check()
