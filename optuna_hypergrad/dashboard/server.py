"""``optuna-dashboard`` with the studies' own tensor store behind it, so that it serves what lies there."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import Study

from .. import _optuna
from .._errors import HypergradError
from ..stores import AtomicFileSystemArtifactStore, TensorStore, default_artifact_store
from ..stores._opening import open_existing
from .publishing import publish

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from optuna.artifacts._protocol import ArtifactStore

HOST, PORT = "127.0.0.1", 8080
_ARTIFACTS = "/artifacts/"
_HEADERS = [
    ("Content-Security-Policy", "sandbox allow-scripts"),
    ("X-Content-Type-Options", "nosniff"),
]
"""An artifact is somebody's file: it is shown, but has no part in the page of the dashboard."""

Storage = Study | BaseStorage | str


def wsgi(
    storage: Storage, tensor_store: ArtifactStore | str | os.PathLike[str] | None = None
) -> WSGIApplication:
    """The dashboard of a storage, for a server such as gunicorn.

    Studies in memory are published as they are now: see :func:`~optuna_hypergrad.dashboard.publish`.

    Args:
        storage: A study, its storage, the URL of a database, or the path of a Journal file. Nothing is created there.
        tensor_store: An artifact store, or a directory, if the tensors are not in the study's own database, memory, or
            beside its Journal file.

    Raises:
        HypergradError: if ``optuna-dashboard`` is not installed.
        StorageError: if there is no such storage, or it has no place of its own for tensors, and none is given.
    """
    try:
        import optuna_dashboard
    except ImportError as error:
        raise HypergradError(
            "The dashboard needs the package optuna-dashboard. Install it: pip install 'optuna_hypergrad[dashboard]'."
        ) from error
    opened = _opened(storage)
    if isinstance(tensor_store, (str, os.PathLike)):
        tensor_store = AtomicFileSystemArtifactStore(tensor_store)
    artifacts = default_artifact_store(opened) if tensor_store is None else tensor_store
    if isinstance(opened, InMemoryStorage):
        _publish_all(opened, artifacts)
    return _with_headers(optuna_dashboard.wsgi(opened, artifact_store=artifacts))


def run_server(
    storage: Storage,
    host: str = HOST,
    port: int = PORT,
    tensor_store: ArtifactStore | str | os.PathLike[str] | None = None,
    *,
    started: Callable[[str], None] = print,
) -> None:
    """Serve the dashboard of a storage until it is interrupted.

    Whoever can reach the port can read, change and delete its studies: that is this machine alone, unless ``host``
    says otherwise.

    Args:
        storage: A study, its storage, the URL of a database, or the path of a Journal file. Nothing is created there.
        host: Address to listen at.
        port: 0 for any that is free.
        tensor_store: As for :func:`wsgi`.
        started: Is told the address, once it can be opened.

    Raises:
        HypergradError: if ``optuna-dashboard`` is not installed, ``host`` is no address of this machine, or ``port`` cannot
            be had.
        StorageError: if there is no such storage, or it has no place of its own for tensors, and none is given.
    """
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            _optuna.logger.debug(format % args)

    class Server(WSGIServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    application = wsgi(storage, tensor_store)
    try:
        made = make_server(host, port, application, Server, Quiet)
    except OSError as error:
        raise HypergradError(_refusal(host, port, error)) from error
    with made as server:
        shown = f"[{host}]" if ":" in host else host
        started(f"http://{shown}:{server.server_port}/dashboard")
        server.serve_forever()


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host} is taken, maybe by another dashboard. Choose another one, or 0 for any that is "
            "free."
        )
    if error.errno == errno.EACCES:
        return f"Port {port} may not be used by this user. Choose one from 1024 on."
    return (
        f"{host!r} is no address of this machine at which a server can listen ({error.strerror or error}). "
        f"{HOST!r} is for this machine alone, '0.0.0.0' for all of its networks."
    )


def _opened(storage: Storage) -> BaseStorage:
    if isinstance(storage, Study):
        return _optuna.storage_of(storage)
    return open_existing(storage) if isinstance(storage, str) else storage


def _publish_all(storage: BaseStorage, artifacts: ArtifactStore) -> None:
    """Studies in memory have nobody to look at them before."""
    for name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        try:
            publish(study, tensor_store=TensorStore(artifacts, storage))
        except HypergradError:
            continue  # none of ours


def _with_headers(application: WSGIApplication) -> WSGIApplication:
    def wrapped(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            more = _HEADERS if environ.get("PATH_INFO", "").startswith(_ARTIFACTS) else []
            return start_response(status, [*headers, *more], *rest)

        return application(environ, start)

    return wrapped
