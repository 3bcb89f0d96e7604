"""Database servers of our own: PostgreSQL and MariaDB, each in a new directory, on a free port, for a while.

Debian's packages are ``postgresql`` and ``mariadb-server``; ``.ci/run`` installs them where it may. A server
refuses to run as root: root starts it as ``nobody``.
"""

from __future__ import annotations

import abc
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import sqlalchemy as sa
from cutting_proxy import CuttingProxy

__all__ = [
    "SERVERS",
    "CuttingProxy",
    "MariaDB",
    "PostgreSQL",
    "Server",
    "UnavailableError",
    "free_port",
]

_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/sbin", "/usr/local/sbin", "/usr/local/bin")
_PATIENCE = 60.0


class UnavailableError(Exception):
    """Why there can be no such server here."""


class Server(abc.ABC):
    """A server that was started. ``stop`` and ``start`` keep its data and port; ``close`` removes everything.

    Args:
        password: without which it lets nobody in; it lets everybody in if there is none.
    """

    kind: ClassVar[str]
    package: ClassVar[str]
    programs: ClassVar[tuple[str, ...]]
    driver: ClassVar[str]
    user: ClassVar[str]
    """Who may do everything."""

    def __init__(self, password: str | None = None) -> None:
        self.password = password
        self._programs = {name: _find(name, self.package) for name in self.programs}
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.kind}-"))
        self._user = _another_user() if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(self.directory, self._user.pw_uid, self._user.pw_gid)
        self.port = free_port()
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._initialize()
            self.start()
        except BaseException:
            self.close()
            raise

    def url(self, database: str, user: str | None = None, password: str | None = None) -> str:
        """What SQLAlchemy calls a database of this server; as its superuser, if no other is named."""
        if user is None:
            user, password = self.user, self.password if password is None else password
        url = sa.URL.create(self.driver, user, password, "127.0.0.1", self.port, database)
        url = url.update_query_dict(self._query())
        return url.render_as_string(hide_password=False)

    @abc.abstractmethod
    def _initialize(self) -> None: ...

    @abc.abstractmethod
    def _command(self) -> list[str]:
        """Of the server in the foreground."""

    def new_database(self) -> str:
        """The URL of a database with nothing in it."""
        self._count += 1
        name = f"test_{self._count}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, statement: str) -> None:
        """One statement with the server's own rights, outside of any transaction."""
        engine = sa.create_engine(self.url(self._system()), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql(statement)
        finally:
            engine.dispose()

    def start(self) -> None:
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._as_user(self._command()), stdout=log, stderr=log, start_new_session=True
            )
        _wait(self._answers, self._why)

    def stop(self, *, crash: bool = False) -> None:
        """Shut it down, or kill it in the middle of whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        if crash:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, self._farewell())
        process.wait(_PATIENCE)

    def close(self) -> None:
        self.stop(crash=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _system(self) -> str:
        return self.kind

    def _query(self) -> dict[str, str]:
        return {}

    def _file(self, name: str, content: str) -> Path:
        """Made for the server alone to read."""
        path = self.directory / name
        path.write_text(content, encoding="utf-8")
        path.chmod(0o600)
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)
        return path

    def _farewell(self) -> signal.Signals:
        return signal.SIGTERM

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise UnavailableError(f"{self.kind} has stopped: {self._why()}")
        try:
            self.execute("SELECT 1")
        except sa.exc.DBAPIError:
            return False
        return True

    def _why(self) -> str:
        log = self.directory / "log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else ""

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            self._as_user(list(command)),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.directory,
        )
        if done.returncode:
            raise UnavailableError(f"{command[0]} failed: {done.stderr[-500:]}")

    def _as_user(self, command: list[str]) -> list[str]:
        if self._user is None:
            return command
        ids = [f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups"]
        return ["setpriv", *ids, "--", *command]


class PostgreSQL(Server):
    kind = "postgresql"
    package = "postgresql"
    programs = ("initdb", "postgres")
    driver = "postgresql+psycopg"
    user = "postgres"

    def _initialize(self) -> None:
        data = str(self.directory / "data")
        rest = ["-U", self.user, "--no-sync", "-E", "UTF8", "--locale=C"]
        if self.password is None:
            rest += ["-A", "trust"]
        else:
            rest += ["-A", "scram-sha-256", f"--pwfile={self._file('password', self.password)}"]
        self._run(self._programs["initdb"], "-D", data, *rest)

    def _command(self) -> list[str]:
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.directory,
            "max_connections": 200,
            # A killed server loses nothing that the system has; only the machine itself may not stop.
            "fsync": "off",
            "full_page_writes": "off",
        }
        chosen = [a for k, v in settings.items() for a in ("-c", f"{k}={v}")]
        return [self._programs["postgres"], "-D", str(self.directory / "data"), *chosen]

    def _system(self) -> str:
        return "postgres"

    def _farewell(self) -> signal.Signals:
        return signal.SIGINT  # without waiting for clients to go


class MariaDB(Server):
    kind = "mariadb"
    package = "mariadb-server"
    programs = ("mariadb-install-db", "mariadbd")
    driver = "mysql+pymysql"
    user = "root"

    def _initialize(self) -> None:
        data = f"--datadir={self.directory / 'data'}"
        rest = ("--auth-root-authentication-method=normal", "--skip-test-db")
        self._run(self._programs["mariadb-install-db"], "--no-defaults", data, *rest)
        secret = (self.password or "").replace("\\", "\\\\").replace("'", "\\'")
        # Read at every start, before anybody may connect.
        self._file("first", f"ALTER USER 'root'@'localhost' IDENTIFIED BY '{secret}';\n")

    def _command(self) -> list[str]:
        return [
            self._programs["mariadbd"],
            "--no-defaults",
            f"--datadir={self.directory / 'data'}",
            "--bind-address=127.0.0.1",
            f"--port={self.port}",
            f"--socket={self.directory / 'socket'}",
            f"--pid-file={self.directory / 'pid'}",
            f"--init-file={self.directory / 'first'}",
            "--max-connections=200",
            "--innodb-flush-log-at-trx-commit=2",  # as in PostgreSQL above
            "--innodb-flush-method=nosync",
            "--skip-innodb-doublewrite",
            "--sync-binlog=0",
        ]

    def _system(self) -> str:
        return "mysql"

    def _query(self) -> dict[str, str]:
        return {"charset": "utf8mb4"}


SERVERS: dict[str, type[Server]] = {c.kind: c for c in (PostgreSQL, MariaDB)}


def _find(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is not None:
        return found
    for pattern in _FOLDERS:
        for path in sorted(Path("/").glob(f"{pattern[1:]}/{program}"), reverse=True):
            return str(path)
    raise UnavailableError(f"there is no {program}; install Debian's package {package}")


def _another_user() -> pwd.struct_passwd:
    if shutil.which("setpriv") is None:
        raise UnavailableError("root cannot start it as another user without setpriv")
    return pwd.getpwnam("nobody")


def free_port() -> int:
    """Below those that the system gives to clients: free again after the server's next start, and
    nobody who tries to reach a stopped server connects to themselves.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise UnavailableError("there is no free port")


def _wait(ready: Callable[[], bool], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            raise UnavailableError(f"it does not answer after {_PATIENCE:g} s: {why()}")
        time.sleep(0.05)
