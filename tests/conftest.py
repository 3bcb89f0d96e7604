"""Shared by all tests. Keep it small."""

from __future__ import annotations

import atexit
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from grpc_server import GrpcServer, connect
from optuna.storages import (
    BaseStorage,
    GrpcStorageProxy,
    InMemoryStorage,
    JournalStorage,
    RDBStorage,
)
from optuna.storages.journal import JournalFileBackend
from servers import SERVERS, Server, UnavailableError

pytest.register_assert_rewrite("optuna.testing.pytest_samplers", "optuna.testing.pytest_storages")
optuna.logging.set_verbosity(optuna.logging.ERROR)
# Otherwise torch.compile tries out in each process which of the processor's instructions the C++ compiler knows.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

STORAGES = ("memory", "sqlite", "journal")
DATABASES = ("sqlite", "postgresql", "mariadb")
PROXIES = {"grpc": "sqlite", "grpc-postgresql": "postgresql"}
"""Optuna's gRPC proxy by what is behind it."""

PASSWORD = "pa:ss w@rd/%3F'\"#"
LONG = ("mutants", "readme", "hostile_rows", "damaged_blobs", "faults_growth", "quickstart", "examples", "connection_loss",
        "compiled_steps", "dashboard", "faults_kth_write")  # fmt: skip
"""Files of few tests that take long. They begin first: at the end, one worker would be left alone with them."""

_running: dict[tuple[str, bool], Server] = {}
_opened: list[RDBStorage | GrpcStorageProxy] = []
_proxies: list[GrpcServer] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sizes = Counter(item.path for item in items)
    long = {f"test_{name}" for name in LONG}
    items.sort(key=lambda item: (item.path.stem not in long, -sizes[item.path], item.path))


def server(kind: str, *, secured: bool = False) -> Server:
    """The server of one of ``SERVERS`` for all tests of this run; skips where there can be none.

    Args:
        secured: one that demands ``PASSWORD``.
    """
    if (kind, secured) not in _running:
        try:
            _running[kind, secured] = SERVERS[kind](PASSWORD if secured else None)
        except UnavailableError as error:
            pytest.skip(f"no {kind}: {error}")
        atexit.register(_running[kind, secured].close)
    return _running[kind, secured]


def open_storage(kind: str, directory: Path) -> BaseStorage:
    """A storage of one of ``STORAGES``, ``SERVERS`` or ``PROXIES``; opened again, it holds what it held
    (memory excepted), also in another process.
    """
    if kind == "memory":
        return InMemoryStorage()
    if kind in SERVERS:
        _opened.append(RDBStorage(url_of(kind, directory)))
        return _opened[-1]
    if kind in PROXIES:
        _opened.append(connect(_proxy_port(kind, directory)))
        return _opened[-1]
    if kind == "sqlite":
        opened = RDBStorage(url_of(kind, directory))
        opened.engine.dispose()
        sa.event.listen(opened.engine, "connect", _without_waiting_for_the_disk)
        return opened
    return JournalStorage(JournalFileBackend(str(directory / "study.log")))


def url_of(kind: str, directory: Path) -> str:
    """Of the database that ``open_storage`` opens: SQLite's, or one of ``SERVERS``."""
    if kind == "sqlite":
        return f"sqlite:///{directory}/study.db"
    address = directory / "url"
    if not address.exists():
        address.write_text(server(kind).new_database())
    return address.read_text()


def _proxy_port(kind: str, directory: Path) -> int:
    address = directory / "port"
    if not address.exists():
        try:
            _proxies.append(GrpcServer(url_of(PROXIES[kind], directory)))
            atexit.register(_proxies[-1].close)
        except UnavailableError as error:
            pytest.skip(f"no gRPC: {error}")
        address.write_text(str(_proxies[-1].port))
    return int(address.read_text())


def _without_waiting_for_the_disk(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")


def close_opened() -> None:
    """What ``open_storage`` has opened; done after each test."""
    while _opened:
        opened = _opened.pop()
        opened.remove_session()
        if isinstance(opened, RDBStorage):
            opened.engine.dispose()
        else:
            opened.close()
    while _proxies:
        _proxies.pop().close()


@pytest.fixture(autouse=True)
def closed_connections() -> Iterator[None]:
    yield
    close_opened()


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BaseStorage]:
    opened = open_storage(request.param, tmp_path)
    yield opened
    opened.remove_session()
    if isinstance(opened, RDBStorage):
        opened.engine.dispose()
