"""Optuna's gRPC proxy in front of a database, in a process of its own.

Run as a script, this file is the server: ``grpc_server.py URL PORT``.
"""

from __future__ import annotations

import subprocess
import sys
import warnings

import optuna
from optuna.storages import GrpcStorageProxy, get_storage, run_grpc_proxy_server
from servers import UnavailableError, free_port

_PATIENCE = 60.0


class GrpcServer:
    """A proxy server on a free port, from now until ``close``.

    Args:
        url: of the database behind it.

    Raises:
        UnavailableError: where grpcio or protobuf is not installed, or it does not start.
    """

    def __init__(self, url: str) -> None:
        try:
            import google.protobuf  # noqa: F401
            import grpc  # noqa: F401
        except ImportError as error:
            raise UnavailableError(f"{error.name} is not installed") from error
        self.port = free_port()
        self._process = subprocess.Popen([sys.executable, __file__, url, str(self.port)])
        proxy = connect(self.port)
        try:
            proxy.wait_server_ready(_PATIENCE)
        except ConnectionError as error:
            self.close()
            raise UnavailableError(f"the gRPC proxy does not answer: {error}") from error
        finally:
            proxy.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def connect(port: int) -> GrpcStorageProxy:
    """A client of the server on this port of this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return GrpcStorageProxy(host="127.0.0.1", port=port)


def main() -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    url, port = sys.argv[1:]
    run_grpc_proxy_server(get_storage(url), host="127.0.0.1", port=int(port))


if __name__ == "__main__":
    main()
