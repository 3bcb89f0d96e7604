"""A TCP proxy that loses connections when it is told to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import sqlalchemy as sa

Direction = Literal["to_server", "from_server"]
_PART = 1 << 16


class CuttingProxy:
    """Stands in front of a server's port on this machine, from now until ``close``.

    Everything passes, also after the server was started again, but for what these methods ask. All
    of them may be called from any thread.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._listener.getsockname()[1])
        self.num_cut = 0
        """Connections that were cut."""
        self.num_refused = 0
        self._lock = threading.Lock()
        self._connections: set[tuple[socket.socket, socket.socket]] = set()
        self._left: dict[Direction, int] = {}
        self._awaited: list[bytes] = []
        self._at_once = False
        self._doomed: socket.socket | None = None  # its next answer is lost
        self._refusing_until = 0.0
        self._start(self._accept)

    def url(self, url: str) -> str:
        """The URL of a database of the server, by way of this proxy."""
        through = sa.make_url(url).set(host="127.0.0.1", port=self.port)
        return through.render_as_string(hide_password=False)

    def cut(self) -> int:
        """Cut every connection now. New ones are let through. How many there were."""
        with self._lock:
            cut = list(self._connections)
            self._connections.clear()
            self.num_cut += len(cut)
        for connection in cut:
            _end(*connection)
        return len(cut)

    def cut_after(self, num_bytes: int, direction: Direction = "from_server") -> None:
        """Let so many more bytes through in this direction (of all connections together), then cut all.

        With 0 bytes ``from_server``, the server does what it is asked next and nobody hears of it.
        """
        with self._lock:
            self._left[direction] = num_bytes

    def lose_answer_to(self, *requests: bytes, at_once: bool = False) -> None:
        """Let requests with these bytes in them (``b"COMMIT"``) through, in this order, and cut before the
        last one is answered.

        Args:
            at_once: do not wait for the answer, so that the server is left working on it.
        """
        with self._lock:
            self._awaited, self._at_once = list(requests), at_once

    @property
    def is_waiting(self) -> bool:
        """Whether a cut that was asked for has not happened yet."""
        with self._lock:
            return bool(self._left or self._awaited) or self._doomed is not None

    def refuse(self, seconds: float = float("inf")) -> None:
        """Cut every connection and refuse new ones, for so long or until ``let_through``."""
        with self._lock:
            self._refusing_until = time.monotonic() + seconds
        self.cut()

    def let_through(self) -> None:
        """Forget every cut and refusal that was asked for."""
        with self._lock:
            self._left.clear()
            self._awaited, self._doomed = [], None
            self._refusing_until = 0.0

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse everything in a ``with`` block."""
        self.refuse()
        try:
            yield
        finally:
            self.let_through()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, function: object, *arguments: object) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = self._connect()
            if server is None:
                client.close()
                continue
            for end in (client, server):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add((client, server))
            self._start(self._pump, client, server, client, "to_server")
            self._start(self._pump, client, server, server, "from_server")

    def _connect(self) -> socket.socket | None:
        with self._lock:
            if time.monotonic() < self._refusing_until:
                self.num_refused += 1
                return None
        try:
            return socket.create_connection(self._server, timeout=10)
        except OSError:
            return None

    def _pump(
        self,
        client: socket.socket,
        server: socket.socket,
        source: socket.socket,
        direction: Direction,
    ) -> None:
        target = server if direction == "to_server" else client
        with suppress(OSError):
            while data := source.recv(_PART):
                passes, cuts = self._judge(data, direction, server)
                target.sendall(data[:passes])
                if cuts:
                    self.cut()
                    break
        with self._lock:
            self._connections.discard((client, server))
        _end(client, server)
        source.close()

    def _judge(self, data: bytes, direction: Direction, server: socket.socket) -> tuple[int, bool]:
        """How many of these bytes pass, and whether everything is cut after them."""
        with self._lock:
            if direction == "to_server" and self._awaited and self._awaited[0] in data:
                del self._awaited[0]
                if not self._awaited and self._at_once:
                    return len(data), True
                self._doomed = None if self._awaited else server
            if self._doomed is server and direction == "from_server":
                self._doomed = None
                return 0, True
            left = self._left.get(direction)
            if left is None:
                return len(data), False
            if len(data) <= left:
                self._left[direction] = left - len(data)
                return len(data), False
            del self._left[direction]
            return left, True


def _end(*sockets: socket.socket) -> None:
    """Wakes those who read from them; each closes its own."""
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
