"""A real PostgreSQL for tests: made for a session, password-protected, on a free port of its own.

The fixtures `server` and `postgres` are known to all tests; where no PostgreSQL is installed, tests
that use them are skipped with a notice.
"""

from __future__ import annotations

import glob
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

USER, DATABASE = "autofr", "postgres"


def binaries() -> Path | None:
    """The folder of `initdb` and `postgres`, the newest of several."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=_version)
    on_path = shutil.which("initdb")
    places = [*found, *([on_path] if on_path else [])]
    return Path(places[-1]).parent if places else None


def _version(path: str) -> float:
    return float(Path(path).parents[1].name)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Postgres:
    """A server with its data in a folder; it can be killed, started again, and emptied."""

    def __init__(self, folder: Path, bin_: Path) -> None:
        self.folder, self._bin = folder, bin_
        self.data, self.port = folder / "data", free_port()
        self.password = secrets.token_hex(8)
        self._born: subprocess.Popen[bytes] | None = None
        (folder / "password").write_text(self.password)
        if os.geteuid() == 0:  # initdb refuses root
            owner = pwd.getpwnam("nobody")
            for path in (folder, folder / "password"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        command = ["initdb", "-D", self.data, "-U", USER, "-A", "scram-sha-256", "--no-sync"]
        self._run(*command, f"--pwfile={folder / 'password'}", "-E", "UTF8", "--locale=C")

    @property
    def url(self) -> str:
        """The address of the database, with its password."""
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{DATABASE}"

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def start(self) -> None:
        """Start the server, and wait until it answers; after `kill` it recovers first."""
        settings = ["listen_addresses=127.0.0.1", f"port={self.port}", "fsync=off"]
        settings += [f"unix_socket_directories={self.folder}", "max_connections=60"]
        options = [word for one in settings for word in ("-c", one)]
        with (self.folder / "log").open("ab") as log:
            self._born = subprocess.Popen(
                [*self._as_user(), self._bin / "postgres", "-D", self.data, *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        self._wait()

    def kill(self) -> None:
        """End the server and all its connections at once, as a power failure does."""
        assert self._born
        os.kill(self.pid, signal.SIGKILL)
        self._born.wait()

    def restart(self) -> None:
        """Kill it, and start it again."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End the server at once, but in order."""
        if self._born and self._born.poll() is None:
            os.kill(self.pid, signal.SIGQUIT)
            self._born.wait(20)

    def ended(self) -> bool:
        """Whether it has ended, by whatever."""
        return self._born is not None and self._born.poll() is not None

    def answers(self) -> bool:
        """Whether it does; where it has ended, it is started."""
        if self.ended():
            self.start()
        return self._open()

    def query(self, statement: str) -> list[tuple]:
        """What a statement gives, over a connection of its own."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            found = connection.execute(statement)
            return found.fetchall() if found.description else []

    def empty(self) -> None:
        """Forget everything, and everybody who is connected."""
        others = "FROM pg_stat_activity WHERE datname = current_database()"
        self.query(f"SELECT pg_terminate_backend(pid) {others} AND pid <> pg_backend_pid()")
        self.query("DROP SCHEMA public CASCADE; CREATE SCHEMA public")

    def _wait(self) -> None:
        until = time.monotonic() + 30
        while not self._open():
            if time.monotonic() > until:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.1)

    def _open(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *arguments: object) -> None:
        command = [*self._as_user(), str(self._bin / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, check=False)
        assert done.returncode == 0, done.stderr

    def _as_user(self) -> list[str]:
        return ["setpriv", "--reuid=nobody", "--clear-groups", "--"] if os.geteuid() == 0 else []


@contextmanager
def running(folder: Path) -> Iterator[Postgres]:
    """A running server with its data in an empty folder."""
    found = binaries()
    if found is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    pytest.importorskip("psycopg")
    one = Postgres(folder, found)
    try:
        one.start()
        yield one
    finally:
        one.stop()


@contextmanager
def public_folder() -> Iterator[Path]:
    """An empty folder that may be given to the server's user, unlike those of tests."""
    folder = Path(tempfile.mkdtemp(prefix="autofr-postgres-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    """A running server, the same for a whole session."""
    with public_folder() as folder, running(folder) as one:
        yield one


@pytest.fixture
def postgres(server: Postgres) -> Iterator[Postgres]:
    """The running server, as new."""
    server.empty()
    yield server
    if server.ended():  # a test killed it
        server.start()
