"""The command ``optuna-hypergrad``: what it shows, writes, checks and removes, and what it refuses."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import shlex
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import optuna
import pytest
import safetensors.torch
import sqlalchemy as sa
import torch
from conftest import open_storage, server
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from safetensors import safe_open
from servers import SERVERS
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import _files, _terminal, cli
from optuna_hypergrad.stores import RDBArtifactStore, TensorStore, _verifying
from optuna_hypergrad.studies import events, leases
from optuna_hypergrad.studies.inspection import summarize

HOSTILE = [
    "\x1b[31mred\x1b[0m\nnew line\t\x9b2J\x07",
    "\N{PILE OF POO}\N{ZERO WIDTH JOINER}\u6f22\u5b57 \u202egnp",
    "x" * 10_000,
]


@ohg.differentiable
def objective(trial: Any) -> Tensor:
    """To be maximized."""
    kind = trial.suggest_categorical("kind", ["a", "b"])
    rate = trial.suggest_float("rate", 1e-3, 1e2, log=True)
    decay = trial.suggest_tensor("decay", (4, 2), 1e-3, 10.0, log=True)
    tree = trial.suggest_tensor_like("tree", {"w": torch.zeros(3)}, 1e-3, 1e1, log=True)
    loss = (rate.log() - 1) ** 2 + (decay.log() ** 2).mean() + (tree["w"].log() - 0.5).pow(2).sum()
    return -loss - float(kind == "a")


def fill(study: optuna.Study, trials: int) -> None:
    study.sampler = ohg.HypergradientSampler(seed=0)
    study.optimize(objective, n_trials=trials)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with one study, ``decays``, of 14 trials."""
    path = tmp_path_factory.mktemp("cli") / "study.db"
    storage = RDBStorage(f"sqlite:///{path}")
    fill(optuna.create_study(storage=storage, study_name="decays", direction="maximize"), 14)
    storage.engine.dispose()
    return path


@pytest.fixture
def url(made: Path, tmp_path: Path) -> str:
    shutil.copy(made, tmp_path / "study.db")
    return f"sqlite:///{tmp_path}/study.db"


class Command:
    """Runs the command in this process and checks what holds for every run of it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.error = ""

    def __call__(self, *arguments: str, status: int = 0) -> str:
        self._capsys.readouterr()
        found = cli.main(arguments)
        output, self.error = self._capsys.readouterr()
        assert found == status, (output, self.error)
        for c in (output + self.error).replace("\n", ""):
            assert c.isprintable(), repr(c)
        if status == cli.FAILURE:
            assert output == ""
            (line,) = self.error.splitlines()
            assert line.startswith("optuna-hypergrad: ")
            assert line.endswith((".", ")", "...", "?"))
        return output


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.delenv(cli.STORAGE_VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "100")  # a worker of pytest-xdist has those of the terminal
    return Command(capsys)


def opened(url: str) -> tuple[optuna.Study, TensorStore]:
    storage = RDBStorage(url)
    name = optuna.get_all_study_names(storage)[0]
    study = optuna.load_study(study_name=name, storage=storage)
    return study, TensorStore.of_study(study)


def execute(url: str, statement: str, **values: Any) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement), values)
    engine.dispose()


def rows_of(text: str, title: str) -> list[list[str]]:
    """Cells of the table whose first line follows ``title``; cells have single spaces in them."""
    lines = text[text.index(title) :].splitlines()[2:]
    table = lines[: lines.index("")] if "" in lines else lines
    return [[c for c in line.split("  ") if c.strip()] for line in table]


def test_show_a_study(command: Command, url: str) -> None:
    text = command("show", url)
    assert all(_terminal.columns(line) <= 100 for line in text.splitlines())
    study, _ = opened(url)
    assert f"Best       {study.best_value:.6g}, trial {study.best_trial.number}" in text
    assert "Direction  maximize" in text
    assert "Trials     14: 14 complete" in text
    trajectories = rows_of(text, "Trajectories:")
    claims = [events.Claim.of(t) for t in study.trials]
    assert [int(row[0]) for row in trajectories] == sorted({c.trajectory for c in claims if c})
    steps = [sum(c is not None and c.trajectory == int(r[0]) for c in claims) for r in trajectories]
    assert [int(row[2]) for row in trajectories] == steps
    for row in trajectories:
        number = int(row[4])
        assert f"{study.trials[number].value:.6g}" == row[3].strip()
        assert row[5].strip() == f"kind={study.trials[number].params['kind']}"
        members = [
            t for t, c in zip(study.trials, claims, strict=True) if c.trajectory == int(row[0])
        ]  # type: ignore[union-attr]
        assert max(members, key=lambda t: t.value).number == number


def test_show_agrees_with_what_can_be_loaded(command: Command, url: str) -> None:
    study, store = opened(url)
    shown = json.loads(command("show", "--json", url))
    assert (shown["study"], shown["trials"]["complete"]) == ("decays", 14)
    states = set()
    for entry in shown["tensors"]:
        trial = study.trials[entry["trial"]]
        (pointer,) = store.pointers(trial, entry["name"], entry["role"])
        states.add(entry["state"])
        if entry["state"] == "removed":
            with pytest.raises(ohg.MissingTensorError):
                store.load(pointer)
            continue
        loaded = store.load(pointer)
        assert entry["step"] == pointer.step
        for spec, (name, tensor) in zip(entry["tensors"], loaded.items(), strict=True):
            dtype = str(tensor.dtype).removeprefix("torch.")
            assert spec == {"name": name, "dtype": dtype, "shape": list(tensor.shape)}
    assert states == {"stored", "removed"}
    stored = list(store.artifact_store.stored("hg-"))  # type: ignore[attr-defined]
    assert (shown["blobs"], shown["num_bytes"]) == (len(stored), sum(a.size for a in stored))
    text = command("show", url)
    assert f"{len(stored)} stored, {len(shown['tensors']) - len(stored)} removed" in text
    assert len(rows_of(command("show", "--all", url), "Tensors:")) == len(shown["tensors"])
    first = shown["trajectories"][0]
    assert first["source"] == "init"
    assert first["start"] == {"rate": study.trials[0].params["rate"]}


def test_show_studies_of_every_kind(command: Command, url: str) -> None:
    storage = RDBStorage(url)
    optuna.create_study(storage=storage, study_name="empty")
    optuna.create_study(storage=storage, study_name="plain").optimize(lambda t: t.number, 3)
    both = optuna.create_study(storage=storage, study_name="two", directions=["minimize"] * 2)
    both.optimize(lambda t: (t.number, 0.0), 2)
    text = command("show", url)
    rows = [line.split() for line in text.splitlines()[1:5]]
    assert [row[:2] for row in rows] == [
        ["decays", "14"],
        ["empty", "0"],
        ["plain", "3"],
        ["two", "2"],
    ]
    assert "none yet" in command("show", url, "--study", "empty")
    assert "Best       0, trial 0" in command("show", url, "--study", "plain")
    for name in ("empty", "plain", "two"):
        text = command("show", url, "--study", name)
        assert "No trajectories" in text
        assert "No tensors" in text
    assert [s["study"] for s in json.loads(command("show", url, "--json"))["studies"]] == [
        row[0] for row in rows
    ]
    command("show", url, "--study", "nobody", status=2)
    assert "'decays', 'empty', 'plain', 'two'" in command.error
    command("export", url, "-o", "x", status=2)
    assert "--study NAME" in command.error
    command("export", url, "-o", "x", "--study", "plain", status=2)
    assert "has tensors in this store" in command.error
    command("export", url, "-o", "x", "--study", "two", status=2)
    assert "several objectives" in command.error
    for name in ("decays", "empty", "plain", "two"):
        storage.delete_study(storage.get_study_id_from_name(name))
    assert "no studies" in command("show", url)
    command("show", url, "--study", "decays", status=2)


def test_hostile_names_do_not_reach_the_terminal(command: Command, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    storage = RDBStorage(url)
    for name in HOSTILE:

        @ohg.differentiable
        def hostile(trial: Any, name: str = name) -> Tensor:
            kind = trial.suggest_categorical(name[:500], [name, "b"])
            return trial.suggest_tensor(name, (3,), 0.0, 1.0).sum() + float(kind == "b")

        study = optuna.create_study(
            storage=storage,
            study_name=name[:500],  # Optuna's own limit
            sampler=ohg.HypergradientSampler(seed=0),
        )
        study.optimize(hostile, n_trials=2)
        chosen = ("--study", study.study_name)
        text = command("show", "--all", url, *chosen)
        assert max(_terminal.columns(line) for line in text.splitlines()) <= 100
        assert json.loads(command("show", "--json", url, *chosen))["study"] == study.study_name
        command("export", url, "-o", str(tmp_path / "x"), *chosen, "--name", name + "?", status=2)
        assert len(command.error) < 2100
        output = tmp_path / "out.safetensors"
        command("export", url, "-o", str(output), *chosen, "--name", name, "--force")
        assert set(safetensors.torch.load_file(output)) == {name}
    text = command("show", url)
    assert max(_terminal.columns(line) for line in text.splitlines()) <= 100
    command("show", url, "--study", HOSTILE[2], status=2)
    assert len(command.error) < 2100
    execute(url, "UPDATE hypergrad_chunks SET data = x'00'")
    assert "0 ok" in command("verify", url, status=1)


def test_show_who_works_on_what(command: Command, url: str) -> None:
    study, _ = opened(url)
    study.sampler = ohg.HypergradientSampler(seed=0)
    running = study.ask()
    running.suggest_categorical("kind", ["a", "b"])  # the claim is written at the first suggestion
    process = f"process {os.getpid()} on "
    text = command("show", url)
    assert f"trial {running.number} by {process}" in text, text
    (worker,) = [
        w for t in json.loads(command("show", url, "--json"))["trajectories"] for w in t["workers"]
    ]
    assert (worker["trial"], worker["is_gone"]) == (running.number, False)
    storage = study._storage
    trial = study.trials[running.number]
    lease, claim = trial.system_attrs[leases.OWNER], trial.system_attrs[events.CLAIM]
    gone = {**lease, "process": lease["process"].replace(f"|{os.getpid()}|", "|4194305|")}
    storage.set_trial_system_attr(running._trial_id, leases.OWNER, gone)
    assert f"trial {running.number} was left by process 4194305 on" in command("show", url)
    start = {**claim, "trajectory": running.number, "parent": None, "source": "7"}
    storage.set_trial_system_attr(running._trial_id, events.CLAIM, start)
    row = rows_of(command("show", url), "Trajectories:")[-1]
    assert [cell.strip() for cell in row[:3]] == [str(running.number), "trial 7", "0"]
    storage.set_trial_system_attr(running._trial_id, events.GRADIENT, {"names": 3})
    storage.set_trial_system_attr(running._trial_id, events.OUTCOME, {"kind": "good"})
    storage.set_trial_state_values(running._trial_id, TrialState.COMPLETE, [0.0])
    assert f"Damaged: The attribute 'hypergrad:outcome' of trial {running.number}" in command(
        "show", url
    )
    assert len(summarize(study, {}).tensors) > 10


def test_why_a_trajectory_is_over(command: Command, url: str) -> None:
    study, _ = opened(url)
    shown = json.loads(command("show", url, "--json"))["trajectories"]
    stops = {
        o.trajectory: o.stop
        for t in study.trials
        if (o := events.Outcome.of(t)) is not None and o.stop is not None
    }
    assert {t["id"]: t["stop"] for t in shown if t["stop"]} == stops


def snapshot(directory: Path) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in directory.rglob("*")
        if p.is_file()
    }


def without_versions(path: Path) -> None:
    execute(f"sqlite:///{path}", "DELETE FROM alembic_version")


def of_an_older_optuna(path: Path) -> None:
    execute(f"sqlite:///{path}", "UPDATE alembic_version SET version_num = 'v2.6.0.a'")


def of_a_newer_library(path: Path) -> None:
    execute(f"sqlite:///{path}", "UPDATE hypergrad_version SET schema_version = 99")


REFUSED: dict[str, tuple[str, Any, str]] = {
    "no such file": ("sqlite:///{d}/stduy.db", None, "There is no file"),
    "no such file, as a URI": ("sqlite:///file:{d}/stduy.db?uri=true", None, "There is no file"),
    "no such Journal": ("{d}/study.log", None, "There is no Journal file"),
    "in memory": ("sqlite://", None, "in memory"),
    "no tables": ("sqlite:///{d}/empty.db", None, "no Optuna studies"),
    "not a database": ("sqlite:///{d}/noise", None, "not a database"),
    "not a Journal": ("{d}/noise", None, "is not a Journal file"),
    "an SQLite file as a Journal": ("{d}/study.db", None, "Give its URL, 'sqlite:///"),
    "a directory": ("{d}", None, "is a directory"),
    "no such dialect": ("oracel://h/db", None, "no database 'oracel'"),
    "no server": ("postgresql+psycopg://u@127.0.0.1:1/db", None, "refused"),
    "no such host": ("mysql+pymysql://u@nowhere.invalid/db", None, "nowhere.invalid"),
    "not a URL": ("postgresql://u:p@@h:x/db", None, "%40 for @"),
    "no version": ("sqlite:///{d}/study.db", without_versions, "have no version"),
    "an older Optuna": ("sqlite:///{d}/study.db", of_an_older_optuna, "storage upgrade"),
    "a newer library": ("sqlite:///{d}/study.db", of_a_newer_library, "schema version 99"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.usefixtures("url")
def test_looking_changes_nothing(command: Command, tmp_path: Path, kind: str) -> None:
    (tmp_path / "empty.db").touch()
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 8)
    location, prepare, complaint = REFUSED[kind]
    if prepare is not None:
        prepare(tmp_path / "study.db")
    before = snapshot(tmp_path)
    for arguments in (["show"], ["verify"], ["sweep"], ["export", "-o", str(tmp_path / "out")]):
        command(*arguments, location.format(d=tmp_path), status=2)
        assert complaint in command.error
    assert snapshot(tmp_path) == before


def test_looking_at_a_whole_database_changes_nothing(command: Command, url: str) -> None:
    directory = Path(url.removeprefix("sqlite:///")).parent
    before = snapshot(directory)
    command("show", url)
    command("show", url, "--json")
    command("verify", url)
    command("sweep", url, "--dry-run", "--min-age", "0")
    assert snapshot(directory) == before


def test_usage(command: Command, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command("show", status=2)
    assert cli.STORAGE_VARIABLE in command.error
    command(status=2)
    command("shwo", url, status=2)
    assert "'shwo'" in command.error
    command("sweep", url, "--min-age", "-1", status=2)
    command("sweep", url, "--min-age", "nan", status=2)
    command("sweep", url, "--min-age", "abc", status=2)
    assert "'abc' is not a number of seconds" in command.error
    command("export", url, "-o", "", status=2)
    assert "name of a file" in command.error
    command("export", url, status=2)
    command("show", url, "--tensor-store", "/nowhere", status=2)
    expected = command("show", "--study", "decays", url, "--all")
    assert command("show", "--all", "--study", "decays", url) == expected
    assert command("show", url, "--all", "--study", "decays") == expected
    monkeypatch.setenv(cli.STORAGE_VARIABLE, "")
    command("show", status=2)
    assert "Say which storage" in command.error
    monkeypatch.setenv(cli.STORAGE_VARIABLE, url)
    assert command("show", "--all", "--study", "decays") == expected
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])


def test_export_the_best_trial(command: Command, url: str, tmp_path: Path) -> None:
    study, _ = opened(url)
    output = tmp_path / "best.safetensors"
    text = command("export", url, "-o", str(output))
    best = study.best_trial
    assert f"3 tensors of trial {best.number} " in text.replace("2 tensors", "3 tensors")
    expected = ohg.load_tensors(study)
    found = safetensors.torch.load_file(output)
    assert set(found) == {"decay", "tree.w"}
    assert torch.equal(found["decay"], expected["decay"])
    assert torch.equal(found["tree.w"], expected["tree"]["w"])
    with safe_open(output, "pt") as file:
        assert file.metadata() == {
            "study": "decays",
            "trial": str(best.number),
            "value": repr(best.value),
        }
    content = output.read_bytes()
    command("export", url, "-o", str(output), "--trial", "0", status=2)
    assert "--force" in command.error
    assert output.read_bytes() == content
    command("export", url, "-o", str(output), "--trial", "0", "--name", "decay", "--force")
    decay = ohg.load_tensors(study.trials[0], study=study)["decay"]
    assert torch.equal(safetensors.torch.load_file(output)["decay"], decay)
    assert set(snapshot(tmp_path)) == {"study.db", "best.safetensors"}


def test_export_replaces_regular_files_only(command: Command, url: str, tmp_path: Path) -> None:
    target, link, loop = tmp_path / "target", tmp_path / "link", tmp_path / "loop"
    target.write_text("old")
    link.symlink_to("target")
    loop.symlink_to("loop")
    command("export", url, "-o", str(link), status=2)
    assert target.read_text() == "old"
    command("export", url, "-o", str(link), "--force")
    assert link.is_symlink()
    assert set(safetensors.torch.load_file(target)) == {"decay", "tree.w"}
    os.mkfifo(tmp_path / "pipe")
    for path, complaint in (
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "is a directory"),
        (loop, "Cannot write"),
    ):
        command("export", url, "-o", str(path), "--force", status=2)
        assert complaint in command.error
    assert (tmp_path / "pipe").is_fifo()
    assert loop.is_symlink()


def test_export_what_is_not_there(command: Command, url: str, tmp_path: Path) -> None:
    study, store = opened(url)
    output = tmp_path / "out"
    command("export", url, "-o", str(output), "--trial", "14", status=2)
    assert "which has 14" in command.error
    command("export", url, "-o", str(output), "--name", "dacay", status=2)
    assert "has no tensor 'dacay'; it has 'decay', 'tree'" in command.error
    command("export", url, "-o", str(tmp_path / "no" / "out"), status=2)
    assert "No such file or directory" in command.error
    best = study.best_trial
    store.discard(*store.pointers(best, "tree", "value"))
    command("export", url, "-o", str(output), "--trial", str(best.number), status=2)
    assert "retention" in command.error
    assert not output.exists()
    text = command("export", url, "-o", str(output))  # the best one that is whole
    assert f"Trial {best.number} is better" in command.error
    number = int(text.split("trial ")[1].split()[0])
    whole = [t for t in study.trials if t.number % 10 == 0 or t.number >= 12]
    whole = [t for t in whole if t.number != best.number]
    assert number == max(whole, key=lambda t: t.value).number


@pytest.mark.parametrize("fails", ["fsync", "link"])
def test_an_export_is_whole_or_not_there(
    command: Command, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, fails, full)
    output = tmp_path / "out"
    if fails == "link":  # a file system without hard links
        command("export", url, "-o", str(output))
        assert safetensors.torch.load_file(output)
    else:
        command("export", url, "-o", str(output), status=2)
        assert "No space left on device" in command.error
        output.write_text("precious")
        command("export", url, "-o", str(output), "--force", status=2)
        assert output.read_text() == "precious"
    assert set(snapshot(tmp_path)) <= {"study.db", "out"}


def test_an_export_does_not_replace_a_file_that_appears_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ohg.StorageError, match="already"):
        _files.write_file(tmp_path / "out", b"data", overwrite=False)
    assert (tmp_path / "out").read_text() == "precious"
    assert set(snapshot(tmp_path)) == {"out"}


def test_names_that_meet_in_one_file_are_refused(command: Command, tmp_path: Path) -> None:
    @ohg.differentiable
    def ambiguous(trial: Any) -> Tensor:
        tree = trial.suggest_tensor_like("a", {"b": torch.zeros(2)}, 0.0, 1.0)
        return tree["b"].sum() + trial.suggest_tensor("a.b", (2,), 0.0, 1.0).sum()

    url = f"sqlite:///{tmp_path}/study.db"
    sampler = ohg.HypergradientSampler(seed=0)
    optuna.create_study(storage=url, sampler=sampler).optimize(ambiguous, n_trials=1)
    command("export", url, "-o", str(tmp_path / "out"), status=2)
    assert "'a.b'" in command.error
    command("export", url, "-o", str(tmp_path / "out"), "--name", "a.b")


def newest_value(study: optuna.Study, store: TensorStore) -> Any:
    return store.pointers(study.trials[-1], "decay", "value")[0]


def test_verify(command: Command, url: str) -> None:
    study, store = opened(url)
    count = len(list(store.artifact_store.stored("hg-")))  # type: ignore[attr-defined]
    text = command("verify", url)
    assert text.startswith(f"{count} ok (")
    assert text.endswith(" removed by retention, 0 damaged.\n")
    report = store.verify()
    assert len(report.sound) == count
    for pointer in report.removed:
        with pytest.raises(ohg.MissingTensorError):
            store.load(pointer)
    assert report.num_bytes == sum(p.size for p in report.sound)
    assert store.verify([study._study_id]) == report
    assert store.verify([]) == _verifying.VerifyReport((), (), ())

    pointer = newest_value(study, store)
    where = {"i": pointer.blob}
    with study._storage._backend.engine.connect() as connection:  # type: ignore[attr-defined]
        query = sa.text("SELECT data FROM hypergrad_chunks WHERE artifact_id = :i")
        data = bytearray(connection.execute(query, where).scalar())
    data[-1] ^= 1
    execute(
        url, "UPDATE hypergrad_chunks SET data = :d WHERE artifact_id = :i", d=bytes(data), **where
    )
    text = command("verify", url, "--study", "decays", status=1)
    assert f"{count - 1} ok" in text
    assert "1 damaged" in text
    (line,) = [line for line in text.splitlines() if line.startswith("Damaged")]
    for part in ("Study 'decays', trial 13", "SHA-256", pointer.blob, pointer.key, "backup"):
        assert part in line
    command("export", url, "--trial", "13", "-o", "/nowhere/x", status=2)
    assert "SHA-256" in command.error


def test_verify_finds_what_is_lost_and_what_is_no_pointer(command: Command, url: str) -> None:
    study, store = opened(url)
    removed = len(store.verify().removed)
    old = next(p for p in store.verify().sound if p.trial == 0 and p.role == "value")
    store.discard(old)  # as if another retention policy had removed it
    assert len(store.verify().removed) == removed + 1
    pointer = newest_value(study, store)
    store.discard(pointer)  # no policy does that
    execute(
        url,
        "UPDATE trial_system_attributes SET value_json = '{\"format\": 1}' WHERE key = :k "
        "AND trial_id = (SELECT trial_id FROM trials WHERE number = 5)",
        k=pointer.key,
    )
    text = command("verify", url, status=1)
    assert "2 damaged" in text
    assert (
        f"nothing in the store for the tensors 'decay' (role 'value', step {pointer.step})" in text
    )
    assert f"The attribute '{pointer.key}' of trial 5 is not a pointer" in text
    shown = command("show", url)
    assert "1 missing" in shown
    assert f"Damaged: The attribute '{pointer.key}'" in shown


@pytest.mark.parametrize("table", ["trials", "hypergrad_chunks", "sqlite_master"])
def test_a_damaged_page_of_the_database(
    command: Command, url: str, tmp_path: Path, table: str
) -> None:
    path = tmp_path / "study.db"
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        size = connection.execute(sa.text("PRAGMA page_size")).scalar()
        query = "SELECT rootpage FROM sqlite_master WHERE name = :t"
        page = connection.execute(sa.text(query), {"t": table}).scalar() or 1
    engine.dispose()
    data = bytearray(path.read_bytes())
    data[(page - 1) * size + 100 * (page == 1) : page * size] = b"\xff" * (size - 100 * (page == 1))
    path.write_bytes(data)
    output = command("verify", url, status=2 if table == "sqlite_master" else 1)
    told = output + command.error
    assert "Damaged: " in output or "is damaged" in command.error
    assert "malformed" in told
    assert "backup" in told
    if table == "trials":
        assert ".recover" in told
        command("show", url, status=2)
        assert ".recover" in command.error


def test_verify_beside_a_worker(url: str) -> None:
    """What is replaced between reading the pointer and reading the blob is not damage."""
    study, store = opened(url)
    trial = study.ask()
    study_id, trial_id = study._study_id, trial._trial_id
    store.save(study_id, trial_id, "run", "checkpoint", 0, {"x": torch.zeros(3)})
    load, lost = store.load, []

    def meanwhile(pointer: Any, *rest: Any) -> Any:
        if pointer.role == "checkpoint" and not lost:
            lost.append(pointer)
            store.save(study_id, trial_id, "run", "checkpoint", 1, {"x": torch.ones(3)})
        return load(pointer, *rest)

    store.load = meanwhile  # type: ignore[method-assign]
    report = store.verify()
    assert lost
    assert report.damaged == ()
    assert lost[0] not in (*report.sound, *report.removed)
    store.load = load  # type: ignore[method-assign]
    assert len(store.verify().sound) == len(report.sound) + 1
    store.discard(*store.pointers(study.trials[-1], "run"))
    assert len(store.verify().damaged) == 1  # the trial is running: nothing of it may be gone


def test_verify_shows_its_progress_on_stderr(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, store = opened(url)
    store.verify(progress=True)
    output, error = capsys.readouterr()
    assert output == ""
    assert "verify:" in error


def test_sweep(command: Command, url: str) -> None:
    study, store = opened(url)
    blobs = {a.artifact_id for a in store.artifact_store.stored()}  # type: ignore[attr-defined]
    assert command("sweep", url, "--min-age", "0") == "Removed 0 blobs (0.0 MB).\n"
    study._storage.delete_study(study._study_id)
    text = command("sweep", url)
    assert text.startswith(f"Removed 0 blobs (0.0 MB). {len(blobs)} more (")
    assert "younger than 3600 seconds" in text
    text = command("sweep", url, "--min-age", "0", "--dry-run")
    assert text.startswith(f"Would remove {len(blobs)} blobs")
    assert "--force" in command.error
    text = command("sweep", url, "--min-age", "0", "--force")
    assert text.startswith(f"Removed {len(blobs)} blobs")
    assert list(store.artifact_store.stored()) == []  # type: ignore[attr-defined]


def test_tensors_in_a_database_of_their_own(command: Command, tmp_path: Path) -> None:
    url, tensors = f"sqlite:///{tmp_path}/study.db", f"sqlite:///{tmp_path}/tensors.db"
    store = RDBArtifactStore(RDBStorage(tensors))
    sampler = ohg.HypergradientSampler(seed=0, tensor_store=store)
    study = optuna.create_study(storage=url, study_name="decays", sampler=sampler)
    study.optimize(objective, n_trials=2)
    count = len(list(store.stored()))
    command("sweep", tensors, "--min-age", "0", status=2)
    (uuid,) = {a.artifact_id.split("-")[1] for a in store.stored()}
    for part in (f"{uuid} ({count} blobs", "--force", "--tensor-store", "Nothing was removed"):
        assert part in command.error
    assert f"Would remove {count}" in command("sweep", tensors, "--min-age", "0", "--dry-run")
    elsewhere = ("--tensor-store", tensors)
    assert "0 damaged" in command("verify", url, *elsewhere)
    assert "Removed 0 blobs" in command("sweep", url, "--min-age", "0", *elsewhere)
    command("show", url, "--tensor-store", f"sqlite:///{tmp_path}/nowhere.db", status=2)
    assert "There is no file" in command.error
    files = {name for name in snapshot(tmp_path) if not name.endswith("-journal")}
    assert files == {"study.db", "tensors.db"}
    assert len(list(store.stored())) == count


def test_sweep_says_what_it_could_not_read(command: Command, url: str) -> None:
    execute(
        url,
        "UPDATE trial_system_attributes SET value_json = '[]' WHERE key LIKE 'hypergrad:tensor:value:%'",
    )
    command("sweep", url, "--min-age", "0")
    assert "Nothing of its study was removed" in command.error


@pytest.mark.parametrize("kind", ["journal", *SERVERS])
def test_on_other_storages(command: Command, tmp_path: Path, kind: str) -> None:
    storage = open_storage(kind, tmp_path)
    fill(optuna.create_study(storage=storage, study_name="decays", direction="maximize"), 5)
    location = str(tmp_path / "study.log")
    if kind in SERVERS:
        location = (tmp_path / "url").read_text()
        command("show", server(kind).new_database(), status=2)
        assert "no Optuna studies" in command.error
    assert "Trials     5: 5 complete" in command("show", location)
    assert "0 damaged" in command("verify", location)
    assert "Would remove 0 blobs" in command("sweep", location, "--dry-run", "--min-age", "0")
    output = tmp_path / "out"
    command("export", location, "-o", str(output))
    study = optuna.load_study(study_name="decays", storage=storage)
    decay = ohg.load_tensors(study)["decay"]
    assert torch.equal(safetensors.torch.load_file(output)["decay"], decay)


def test_tensors_in_a_directory(command: Command, tmp_path: Path) -> None:
    log, directory = tmp_path / "study.log", tmp_path / "tensors"
    storage = JournalStorage(JournalFileBackend(str(log)))
    sampler = ohg.HypergradientSampler(seed=0, tensor_store=directory)
    study = optuna.create_study(storage=storage, sampler=sampler, direction="maximize")
    study.optimize(objective, n_trials=2)
    assert "--tensor-store" in command("verify", str(log), status=1)
    elsewhere = ("--tensor-store", str(directory))
    assert "0 damaged" in command("verify", str(log), *elsewhere)
    assert "6 stored" in command("show", str(log), *elsewhere)
    (path, *_) = directory.glob("hg-*")
    path.write_bytes(path.read_bytes()[:-1])
    assert path.name in command("verify", str(log), *elsewhere, status=1)
    assert not (tmp_path / "study.log.hypergrad").exists()


def test_errors_in_mid_command_are_one_sentence(
    command: Command, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any) -> None:
        raise optuna.exceptions.StorageInternalError("invalid data?") from sa.exc.OperationalError(
            "SELECT", {}, Exception("server closed the connection\nunexpectedly")
        )

    monkeypatch.setattr(cli.show, "summarize", cut)
    command("show", url, status=2)
    assert "server closed the connection unexpectedly" in command.error


def test_as_a_process(url: str) -> None:
    scripts = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'optuna-hypergrad = "optuna_hypergrad.cli:main"' in scripts
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "optuna_hypergrad", "show", "--study", "nobody"],
        env={**os.environ, cli.STORAGE_VARIABLE: url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert (
        line == "optuna-hypergrad: There is no study 'nobody' in this storage; there is 'decays'."
    )


def test_a_reader_that_has_seen_enough(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["show", url]) == 141


@pytest.mark.parametrize("text", [*HOSTILE, "", "\udcff", "\u00e9", "e\u0301", "\u200b\ufeff"])
def test_text_for_a_terminal(text: str) -> None:
    shown = _terminal.plain(text)
    assert shown.isprintable()
    for width in (1, 2, 5, 30):
        assert _terminal.columns(_terminal.fit(shown, width)) == width
    layout = [_terminal.Column("n", right=True), *[_terminal.Column("t", least=8)] * 5]
    lines = _terminal.table(layout, [["1", *[text] * 5], ["12345", *["short"] * 5]])
    assert all(_terminal.columns(line) <= _terminal.WIDTH for line in lines)
    assert "short" in lines[2]
    assert lines[1].startswith("      1")


# Figures, the dashboard, and where the command runs


def test_every_kind_of_figure(command: Command, url: str, tmp_path: Path) -> None:
    for kind in cli.plot.KINDS:
        path = tmp_path / f"{kind}.json"
        text = command("plot", url, "decays", kind, "-o", str(path))
        assert text == f"Wrote {kind} of study 'decays' to {path}.\n"
        empty = kind == "warm-against-retrained"
        assert bool(json.loads(path.read_text())["data"]) != empty
    study, _ = opened(url)
    drawn = json.loads((tmp_path / "trajectories.json").read_text())["data"]
    values = {y for line in drawn for y in line["y"] if isinstance(y, float)}
    assert {t.value for t in study.trials} <= values


@pytest.mark.parametrize("suffix", [".html", ".svg", ".png", ".pdf"])
def test_figures_in_every_format(command: Command, url: str, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"figure{suffix}"
    arguments = ("plot", "--storage", url, "--study-name", "decays", "tensor-evolution")
    command(*arguments, "--name", "decay", "-o", str(path))
    begins = {".html": b"<!doctype html>", ".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(begins[suffix])
    command(*arguments, "-o", str(path), status=cli.FAILURE)
    assert "--force" in command.error
    command(*arguments, "-o", str(path), "--force")


def test_words_of_plot(
    command: Command, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command("plot", url, "trajectories")
    assert (tmp_path / "trajectories.html").exists()
    monkeypatch.setenv(cli.STORAGE_VARIABLE, url)
    command("plot", "trajectories", "-o", "a.json")
    command("plot", "decays", "trajectories", "-o", "b.json")
    command("plot", url, "trajectories", "-o", "c.json")
    command("plot", "--study", "decays", url, "trajectories", "-o", "d.json")
    found = {(tmp_path / f"{name}.json").read_text() for name in "abcd"}
    assert len(found) == 1
    (tmp_path / "j.log").touch()
    command("plot", "j.log", "trajectories", status=cli.FAILURE)
    assert "There is no study in this storage" in command.error
    command("plot", "one", "two", "three", "trajectories", status=cli.FAILURE)
    command("plot", url, "trajectories", "-o", "e.PNG")
    assert (tmp_path / "e.PNG").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "kept.json").write_text("kept")
    command("plot", url, "trajectories", "-o", "kept.json", status=cli.FAILURE)
    assert "--force" in command.error
    assert (tmp_path / "kept.json").read_text() == "kept"
    command("plot", url, "trajectories", "-o", "nowhere/x.html", status=cli.FAILURE)
    assert "Cannot write 'nowhere/x.html': No such file or directory." in command.error
    command("plot", url, "trajectories", "-o", "x.bmp", status=cli.FAILURE)
    assert ".svg" in command.error


def test_plot_what_is_not_there(command: Command, url: str) -> None:
    command("plot", url, "trajectorys", status=cli.FAILURE)
    assert "Did you mean trajectories?" in command.error
    command("plot", url, "plot_hypergradient_norm", status=cli.FAILURE)
    assert "Did you mean hypergradient-norms?" in command.error
    command("plot", url, "dekays", "layers", status=cli.FAILURE)
    assert "Did you mean 'decays'?" in command.error
    command("plot", url, "layers", "--name", "tre", status=cli.FAILURE)
    assert "'tree'" in command.error
    command("plot", url, "trajectories", "--name", "tree", status=cli.FAILURE)
    assert "whole study" in command.error
    optuna.create_study(storage=url, study_name="plain").optimize(lambda t: t.number, 2)
    command("plot", url, "plain", "trajectories", status=cli.FAILURE)
    assert "optuna.visualization" in command.error


def test_both_ways_to_name_storage_and_study(command: Command, url: str) -> None:
    assert command("show", url) == command("show", "--storage", url, "--study-name", "decays")


def test_a_name_that_is_nearly_right(command: Command, url: str, tmp_path: Path) -> None:
    command("show", url, "--study", "decay", status=cli.FAILURE)
    assert "Did you mean 'decays'?" in command.error
    command("export", url, "-o", str(tmp_path / "x"), "--name", "dacay", status=cli.FAILURE)
    assert "did you mean 'decay'?" in command.error


def test_a_tensor_that_retention_has_removed(command: Command, url: str, tmp_path: Path) -> None:
    study, store = opened(url)
    gone = next(t.number for t in study.trials if _is_gone(store, t))
    command("export", url, "-o", str(tmp_path / "x"), "--trial", str(gone), status=cli.FAILURE)
    assert "retention" in command.error
    assert not (tmp_path / "x").exists()


def _is_gone(store: TensorStore, trial: optuna.trial.FrozenTrial) -> bool:
    try:
        store.load(store.pointers(trial, "decay", "value")[0])
    except ohg.MissingTensorError:
        return True
    return False


def test_a_database_that_another_process_holds(
    command: Command, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *args, **kw: connect(*args, **{**kw, "timeout": 0.1})
    )
    with contextlib.closing(connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        command("show", url, status=cli.FAILURE)
    assert "Another process has been writing" in command.error
    command("show", url)


def test_a_database_that_can_only_be_read(command: Command, url: str, tmp_path: Path) -> None:
    database = tmp_path / "study.db"
    read_only = f"sqlite:///file:{database}?mode=ro&uri=true"
    database.chmod(0o444)
    shown = command("show", read_only)
    assert shown == command("show", url)
    command("plot", read_only, "trajectories", "-o", str(tmp_path / "x.json"))
    command("verify", read_only)
    database.unlink()
    command("show", url, status=cli.FAILURE)
    assert "There is no file" in command.error


def in_terminal(columns: int, *arguments: str) -> str:
    """What the command shows in a terminal of its own."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "optuna_hypergrad", *arguments]
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                more = os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
            if not more:
                break
            shown += more
        assert process.wait() == 0
    os.close(leader)
    return shown.decode().replace("\r\n", "\n")


def test_terminal_of_80_columns_and_a_pipe(url: str, tmp_path: Path) -> None:
    shown = in_terminal(80, "show", url)
    widths = [_terminal.columns(line) for line in shown.splitlines()]
    assert max(widths) <= 80
    study, _ = opened(url)
    assert f"{study.best_value:.6g}, trial {study.best_trial.number}" in shown
    command = [sys.executable, "-m", "optuna_hypergrad", "show", url]
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    with open(tmp_path / "file", "w+") as file:
        subprocess.run(command, stdout=file, check=True, env=environment)
        file.seek(0)
        written = file.read()
    assert 80 < max(_terminal.columns(line) for line in written.splitlines()) <= 100


def test_many_studies_fit_into_80_columns(
    command: Command, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna.create_study(storage=url, study_name="another one with a long name")
    monkeypatch.setenv("COLUMNS", "80")
    lines = command("show", url).splitlines()
    assert max(map(_terminal.columns, lines)) <= 80
    assert any("14" in line and "decays" in line for line in lines)


def test_numbers_are_never_cut() -> None:
    layout = (_terminal.Column("a long title", right=True, least=2), _terminal.Column("x" * 150))
    (title, row) = _terminal.table(layout, [("123456789", "")])
    assert row.split() == ["123456789"]
    assert title.startswith("  a long t…")


def test_show_a_study_that_is_written_to(command: Command, url: str) -> None:
    storage = RDBStorage(url)
    study = optuna.load_study(
        study_name="decays", storage=storage, sampler=ohg.HypergradientSampler(seed=0)
    )
    seen = []

    def watched(trial: Any) -> Tensor:
        seen.append(command("show", url))
        command("verify", url)
        return objective.__wrapped__(trial)  # type: ignore[attr-defined, no-any-return]

    study.optimize(ohg.differentiable(watched), n_trials=3)
    storage.engine.dispose()
    assert [f"{14 + i} complete" in text for i, text in enumerate(seen)] == [True] * 3
    assert all("1 running" in text for text in seen)


def test_help_has_examples_that_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("show", "plot", "export", "verify", "sweep", "dashboard"):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        examples = text.partition("examples:\n")[2].splitlines()
        assert examples
        for example in examples:
            words = shlex.split(example.partition(">")[0])
            assert words[:2] == ["optuna-hypergrad", name]
            cli._parser(None).parse_args(words[1:])
        assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("port", ["-1", "x", "70000"])
def test_a_port_that_is_none(command: Command, url: str, port: str) -> None:
    command("dashboard", url, f"--port={port}", status=cli.FAILURE)
    assert "no port" in command.error


def test_a_port_that_is_taken(command: Command, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command("dashboard", url, "--port", port, status=cli.FAILURE)
        assert f"Port {port} of 127.0.0.1 is taken" in command.error
