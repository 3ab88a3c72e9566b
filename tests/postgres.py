"""A real PostgreSQL for tests, on a free port of 127.0.0.1; Debian's package has it (`apt-get install postgresql`).

    with Postgres() as server:
        Ledger(server.new_database())
        server.kill(); server.start()       # broken connections, and recovery on the same port

PostgreSQL refuses to run as root; then it is started as the user `postgres`, or `nobody`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import TypedDict

import psycopg
from psycopg import sql
from servers import Server
from typing_extensions import override

USER = "perennial"
PASSWORD = "correct-horse"
_START_SECONDS = 60
_LESS_DURABLE = ("fsync=off", "full_page_writes=off")
"""Tests kill the server, never the machine. (synchronous_commit stays on: without it, a killed server forgets.)"""


def binaries() -> Path | None:
    """Where PostgreSQL's programs are; None when the server is not installed. The newest version counts."""
    debian = sorted(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), key=lambda folder: int(folder.parent.name))
    on_path = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    for folder in [*reversed(debian), *on_path]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    return None


class Postgres(Server):
    """A PostgreSQL with an empty cluster; what it holds is gone when it is left."""

    def __init__(self) -> None:
        super().__init__()
        found = binaries()
        assert found, "PostgreSQL is not installed; see `binaries`"
        self._bin = found
        self._run_as = _unprivileged()
        self._folder = Path(tempfile.mkdtemp(prefix="perennial-postgres-"))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, database: str = "postgres", *, password: str = PASSWORD) -> str:
        """As it is given to the ledger."""
        return f"postgresql://{USER}:{password}@{self.address}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.url(name)

    @override
    def command(self) -> list[str]:
        options = [f"port={self.port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={self._folder}"]
        settings = [word for option in (*options, *_LESS_DURABLE) for word in ("-c", option)]
        return [str(self._bin / "postgres"), "-D", str(self._data), *settings]

    @override
    def start(self) -> None:
        if not self._data.exists():
            self._make_cluster()
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self._folder, stdout=log, stderr=subprocess.STDOUT, **self._run_as
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            assert self.process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.05)

    @override
    def kill(self) -> None:
        """End it at once, without a goodbye to its clients, as a crash does; the next start recovers.

        SIGQUIT and not SIGKILL, which would leave the server's children to themselves.
        """
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    @override
    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _make_cluster(self) -> None:
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        if self._run_as:
            for path in (self._folder, secret):
                os.chown(path, self._run_as["user"], self._run_as["group"])
        initdb = [str(self._bin / "initdb"), "-D", str(self._data), f"--username={USER}", f"--pwfile={secret}"]
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(
            [*initdb, *options], cwd=self._folder, capture_output=True, text=True, check=False, **self._run_as
        )
        assert made.returncode == 0, made.stdout + made.stderr

    def _answers(self) -> bool:
        """Whether it takes connections: it listens before it does."""
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.url(), connect_timeout=5).close()
            return True
        return False


class _RunAs(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


def _unprivileged() -> _RunAs:
    """Whom to run PostgreSQL as; empty: who we are."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise AssertionError("PostgreSQL does not run as root, and there is no user postgres or nobody")
