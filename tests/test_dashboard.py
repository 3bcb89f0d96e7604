"""The dashboard in a browser: no page is blank or complains, and its numbers are those of the database."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from browser import Browser, NoBrowserError, View
from conftest import open_storage, url_of
from matplotlib.image import imread
from optuna_dashboard._note import get_note
from optuna_dashboard._serializer import serialize_frozen_trial
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import dashboard
from optuna_hypergrad.stores import TensorStore

F64 = torch.float64


@ohg.differentiable
def objective(trial: Any) -> Tensor:
    kind = trial.suggest_categorical("kind", ["a", "b|c"])
    pixels = trial.suggest_tensor("pixels", (4, 12, 12), 1e-3, 10.0, log=True, init=0.1, dtype=F64)
    x = trial.suggest_float("x", -1.0, 2.0)
    target = torch.linspace(-2.0, 1.0, 144, dtype=F64).reshape(12, 12)
    return 1 + ((pixels.log10() - target) ** 2).mean() + (x - 0.5) ** 2 + 0.1 * (kind == "a")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a database in it that holds two studies."""
    path = tmp_path_factory.mktemp("dashboard")
    storage = open_storage("sqlite", path)
    sampler = ohg.HypergradientSampler(seed=0)
    study = optuna.create_study(storage=storage, study_name="pixels", sampler=sampler)
    study.optimize(objective, n_trials=12)
    plain = optuna.create_study(storage=storage, study_name="plain")
    plain.optimize(lambda t: t.suggest_float("x", 0.0, 1.0), n_trials=3)
    storage.engine.dispose()  # type: ignore[attr-defined]
    return path


@pytest.fixture(scope="module")
def address(directory: Path) -> Iterator[str]:
    """Of the command's server."""
    command = [
        sys.executable,
        "-m",
        "optuna_hypergrad",
        "dashboard",
        url_of("sqlite", directory),
        "--port",
        "0",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/dashboard", line)
        assert found, (line, process.communicate())
        yield found.group()
        process.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        opened = Browser()
    except NoBrowserError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.fixture
def study(directory: Path) -> optuna.Study:
    return optuna.load_study(study_name="pixels", storage=open_storage("sqlite", directory))


def check(view: View, colors: int = 20) -> View:
    """No page is blank, and none complains."""
    assert view.errors == []
    pixels = imread(io.BytesIO(view.png))[::4, ::4, :3].reshape(-1, 3)
    assert len(np.unique((pixels * 255).astype(int), axis=0)) > colors
    return view


def test_page_of_a_study(browser: Browser, address: str, study: optuna.Study) -> None:
    view = check(browser.look(f"{address}/studies/1", words=("Best Trial",), plots=6))
    best = study.best_trial
    assert f"Best Trial (number={best.number})" in view.text
    assert repr(best.value) in view.text
    figures = {p["title"]: p["data"] for p in view.plots}
    values = [t.value for t in study.trials]
    assert any(trace.get("y") == values for p in view.plots for trace in p["data"])  # the history
    lines = {t["name"]: t for t in figures["Trajectories"]}
    for trial in study.trials:
        place = trial.user_attrs["trajectory"], trial.user_attrs["trajectory_step"]
        (line,) = [v for k, v in lines.items() if k.startswith(f"Trajectory {place[0]}:")]
        assert line["y"][line["x"].index(place[1])] == trial.value
    drawn = [y for t in figures["Hypergradient Norms"] for y in t["y"] if y is not None]
    assert sorted(drawn) == sorted(t.user_attrs["hypergradient_norm"] for t in study.trials)
    (evolution,) = [d for title, d in figures.items() if title.startswith("Evolution of pixels")]
    assert any("median" in t.get("name", "") for t in evolution)


def test_page_of_analytics(browser: Browser, address: str, study: optuna.Study) -> None:
    view = check(
        browser.look(f"{address}/studies/1/analytics", words=("Slice", "Contour"), plots=3)
    )
    points = [
        t
        for p in view.plots
        for t in p["data"]
        if t.get("mode") == "markers" and len(t.get("y", ())) == 12
    ]
    assert any(sorted(t["y"]) == sorted(x.value for x in study.trials) for t in points)
    axes = browser.evaluate(
        "[...document.querySelectorAll('[role=combobox]')].map(e => e.innerText)"
    )
    assert any(text.startswith("Param") for text in axes)


def test_numeric_attributes_are_slice_axes(address: str) -> None:
    found = asked(f"{address.removesuffix('/dashboard')}/api/studies/1")
    sortable = {a["key"] for a in found["union_user_attrs"] if a["sortable"]}
    assert {
        "hypergradient_norm",
        "num_hyperparameters",
        "trajectory",
        "trajectory_step",
    } <= sortable
    assert {"norm:pixels", "at_low:pixels", "at_high:pixels"} <= sortable
    assert "tensor:pixels" not in sortable


def test_list_of_trials(browser: Browser, address: str, study: optuna.Study) -> None:
    view = check(browser.look(f"{address}/studies/1/trials", words=("12 Trials", "Trial 11")))
    assert view.text.count("Complete") >= 12
    assert repr(study.trials[0].value) in view.text  # the first is open


def test_page_of_the_best_trial(browser: Browser, address: str, study: optuna.Study) -> None:
    best = study.best_trial
    view = browser.look(
        f"{address}/studies/1/trials?numbers={best.number}", words=("Artifacts", "histograms.svg")
    )
    check(view)
    assert repr(best.value) in view.text
    assert f"x {best.params['x']!r}" in view.text
    for key, value in best.user_attrs.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        assert f"{key} {shown}" in view.text
    loaded = browser.evaluate(
        "[...document.querySelectorAll('img')].map(i => [i.naturalWidth, i.complete]).filter(([w, c]) => w > 0 && c)"
        ".length"
    )
    assert loaded == 2  # the histogram and the images


def test_page_of_the_note(browser: Browser, address: str, study: optuna.Study) -> None:
    view = check(browser.look(f"{address}/studies/1/note", words=("Hypergradients",)))
    best = study.best_trial
    assert f"Best value: {best.value:.6g}, in trial {best.number} (cold)" in view.text
    assert "Trials: 12 (12 complete)" in view.text
    assert "kind=b|c" in view.text
    assert "[//]" not in view.text
    assert "optuna-hypergrad:" not in view.text
    tables = browser.evaluate("document.querySelectorAll('table').length")
    assert tables == 2
    assert get_note(study).count("| ---:") >= 2


def test_page_of_a_study_that_is_not_ours(browser: Browser, address: str) -> None:
    view = check(browser.look(f"{address}/studies/2", words=("Best Trial",), plots=3))
    assert not [p for p in view.plots if p["title"]]


def test_list_of_studies(browser: Browser, address: str) -> None:
    check(browser.look(address, words=("pixels", "plain")), colors=8)


def test_artifacts_are_served_and_have_no_part_in_the_page(
    address: str, study: optuna.Study
) -> None:
    system = study._storage.get_study_system_attrs(1)
    best = study.best_trial
    listed = serialize_frozen_trial(1, best, system)["artifacts"]
    assert {a["mimetype"] for a in listed} == {"text/csv", "image/svg+xml", "image/png"}
    store = TensorStore.of_study(study).artifact_store
    for meta in listed:
        url = f"{address.removesuffix('/dashboard')}/artifacts/1/{best._trial_id}/{meta['artifact_id']}"
        with urllib.request.urlopen(url) as answer, store.open_reader(meta["artifact_id"]) as file:
            assert answer.read() == file.read()
            assert answer.headers["Content-Type"].startswith(meta["mimetype"])
            assert answer.headers["Content-Security-Policy"] == "sandbox allow-scripts"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
    (pointer,) = TensorStore.of_study(study).pointers(best, "pixels", "value")
    with pytest.raises(urllib.error.HTTPError, match="404"):  # a tensor is nobody's artifact
        urllib.request.urlopen(
            f"{address.removesuffix('/dashboard')}/artifacts/1/{best._trial_id}/{pointer.blob}"
        )


def asked(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def test_deleting_a_study_in_the_dashboard_removes_its_artifacts(tmp_path: Path) -> None:
    storage = open_storage("sqlite", tmp_path)
    study = optuna.create_study(storage=storage, sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=3)
    store = TensorStore.of_study(study).artifact_store
    before = {a.artifact_id for a in store.stored("0d15-")}  # type: ignore[attr-defined]
    assert len(before) == 3
    status, _ = requested(dashboard.wsgi(study), "DELETE", "/api/studies/1", {})
    assert status.startswith("204")
    assert not list(store.stored("0d15-"))  # type: ignore[attr-defined]


def requested(application: Any, method: str, path: str, data: Any = None) -> tuple[str, bytes]:
    body = json.dumps(data).encode()
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
    }
    status: list[str] = []
    answer = b"".join(application(environ, lambda s, headers, error=None: status.append(s)))
    return status[0], answer


def test_a_study_in_memory_is_published_where_it_is_served() -> None:
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=3)
    status, answer = requested(dashboard.wsgi(study), "GET", "/api/studies/0")
    assert status.startswith("200"), answer
    found = json.loads(answer)
    assert "**Trials**: 3 (3 complete)" in found["note"]["body"]
    (artifacts,) = [t["artifacts"] for t in found["trials"] if t["artifacts"]]
    path = f"/artifacts/0/{study.best_trial._trial_id}/{artifacts[0]['artifact_id']}"
    status, answer = requested(dashboard.wsgi(study), "GET", path)
    assert (status[:3], bool(answer)) == ("200", True)


def test_a_storage_without_a_place_for_tensors_is_refused() -> None:
    class Elsewhere(optuna.storages.InMemoryStorage):
        passes_calls_through = False

    class Proxy(optuna.storages.BaseStorage):  # type: ignore[misc]
        pass

    Proxy.__abstractmethods__ = frozenset()
    with pytest.raises(ohg.StorageError, match="no place of its own"):
        dashboard.wsgi(Proxy())  # type: ignore[abstract]
    assert dashboard.wsgi(Elsewhere()) is not None


@pytest.mark.parametrize(
    ("host", "said"),
    [("300.1.1.1", "no address of this machine"), ("192.0.2.1", "no address of this machine")],
)
def test_an_address_that_is_none_of_this_machine_is_refused(host: str, said: str) -> None:
    with pytest.raises(ohg.HypergradError, match=said):
        dashboard.run_server(optuna.storages.InMemoryStorage(), host, 0)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ohg.HypergradError, match=f"Port {port} of 127.0.0.1 is taken"):
            dashboard.run_server(optuna.storages.InMemoryStorage(), port=port)


class _Served(Exception):
    pass


def test_an_address_of_ipv6_is_served() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")

    def started(address: str) -> None:
        assert re.fullmatch(r"http://\[::1\]:\d+/dashboard", address)
        raise _Served

    with pytest.raises(_Served):
        dashboard.run_server(optuna.storages.InMemoryStorage(), "::1", 0, started=started)


@pytest.mark.parametrize(
    ("typed", "said"), [("sqlite:///{}/typo.db", "no file"), ("{}/typo.log", "no Journal file")]
)
def test_a_storage_that_is_not_there_is_not_made(typed: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ohg.StorageError, match=f"There is {said}"):
        dashboard.wsgi(typed.format(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_storage_is_served_by_where_it_is(kind: str, tmp_path: Path) -> None:
    optuna.create_study(study_name="here", storage=open_storage(kind, tmp_path))
    where = url_of(kind, tmp_path) if kind == "sqlite" else str(tmp_path / "study.log")
    status, answer = requested(dashboard.wsgi(where), "GET", "/api/studies")
    assert (status[:3], b"here" in answer) == ("200", True)


def test_without_the_package_the_server_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(ohg.HypergradError, match=r"pip install 'optuna_hypergrad\[dashboard\]'"):
        dashboard.wsgi("sqlite://")
