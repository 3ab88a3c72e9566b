"""The ledger: the append-only store of entries, specs and snapshots, on SQLite or PostgreSQL.

    async with Ledger("sqlite:///.perennial/ledger.db") as ledger:      # or postgresql://user:password@host/database
        entry = await ledger.append(entry)                              # returns what is recorded for that step
        newest_first_that_fit = await ledger.context(entry.id, max_characters=128_000)

An entry is stored once for each (workflow id, turn, step): whoever comes second gets the first one's entry (DESIGN.md,
P6). Nothing is ever changed or deleted. What is read is checked against its hash (P8).

The database is connected to, and its tables are made, when first used: a process may start while it is away. Whatever
goes wrong is raised as an ApplicationError of type RetryLater: an operator can mend a database, and mail must wait.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    UniqueConstraint,
    and_,
    create_engine,
    event,
    exists,
    func,
    insert,
    literal,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from typing_extensions import override

from activities.entries import AssistantMessage, Entry, Message, ToolMessage, canonical
from workflows.errors import Remedy, activity_error
from workflows.spec import ResolvedSpec
from workflows.state import Snapshot

T = TypeVar("T")

_SCHEMA_VERSION = 1
_THREADS = 8
_BUSY_SECONDS = 20
_BUSY_PAUSE = 0.01
_SQLITE_SETUP = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",  # an entry is a paid call: it survives a power cut too
    "PRAGMA foreign_keys = ON",
)
# psycopg's settings, which the URL may override.
_POSTGRESQL_SETTINGS = {
    # No prepared statements: the server would go on with plans it made when the tables were small (context: five times
    # slower at 10,000 entries, measured), and a pooler such as PgBouncer does not always bear them.
    "prepare_threshold": None,
    # How long the server may be silent: a network that drops packets must not hold our threads for hours.
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds
}
_SETUP_LOCK = 0x7065_7265_6E6E  # "perenn": PostgreSQL's advisory lock under which the tables are made
_MESSAGE_OVERHEAD = 16
"""Characters a message counts for beside its text: role, ids, punctuation."""

_metadata = MetaData()

_schema = Table("ledger_schema", _metadata, Column("version", Integer, primary_key=True))

_entries = Table(
    "entries",
    _metadata,
    Column("id", String(64), primary_key=True),
    Column("workflow_id", String, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("parent", String(64), ForeignKey("entries.id")),
    Column("characters", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),  # the canonical encoding, whose SHA-256 is the id
    UniqueConstraint("workflow_id", "turn", "step"),
)
_record = (
    _entries.c.id,
    _entries.c.workflow_id,
    _entries.c.turn,
    _entries.c.step,
    _entries.c.parent,
    _entries.c.body,
)
"""What an entry is read from; see `_decode`."""

_specs = Table(
    "specs",
    _metadata,
    Column("digest", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

_number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only what it calls INTEGER

_snapshots = Table(
    "snapshots",
    _metadata,
    Column("number", _number, primary_key=True, autoincrement=True),
    Column("workflow_id", String, nullable=False),
    Column("run_id", String, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("accepted", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("kept_at", String, nullable=False),
    UniqueConstraint("workflow_id", "run_id"),
    Index("snapshots_newest", "workflow_id", "turn", "number"),
)

# Model calls as they were begun; with the entries it tells whether one was paid for twice.
_calls = Table(
    "calls",
    _metadata,
    Column("number", _number, primary_key=True, autoincrement=True),
    Column("workflow_id", String, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("recorded_before", Boolean, nullable=False),
    Column("begun_at", String, nullable=False),
)


class Totals(BaseModel):
    """What the ledger holds, over all agents."""

    agents: int
    entries: int
    snapshots: int
    calls_begun: int
    """Model calls that were begun."""
    calls_repeated: int
    """Calls begun again for a step that had none recorded: their first try failed, or its worker died."""
    calls_paid_twice: int
    """Calls begun for a step whose answer was recorded already; P6 says that there are none."""

    @override
    def __str__(self) -> str:
        return f"{self.agents} agents, {self.entries} entries, {self.snapshots} snapshots"


class Ledger:
    """The ledger at a database URL. Safe from many tasks at once, and from many processes.

    Args:
        url: `sqlite:///path` or `postgresql://user:password@host/database`.

    Raises:
        ValueError: the URL is neither.
    """

    def __init__(self, url: str) -> None:
        self._url = _driver_url(url)
        self.place = self._url.render_as_string(hide_password=True)
        """The URL without the password, for messages."""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="ledger")
        self._engine: Engine | None = None
        self._setup = threading.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._threads.shutdown)
        if self._engine:
            self._engine.dispose()

    # Entries ---------------------------------------------------------------------------------------------------------

    async def find(self, workflow_id: str, turn: int, step: int) -> Entry | None:
        """The entry of a step, if it is recorded."""
        return await self._read(lambda connection: _entry_at(connection, workflow_id, turn, step))

    async def append(self, entry: Entry) -> Entry:
        """Record a step. Returns the entry that is recorded for it: this one, or the one that was there before.

        Raises:
            ApplicationError: RetryLater: the database is away, or does not know the entry's parent.
        """

        def write(connection: Connection) -> Entry:
            insertion = self._insert_new(_entries).values(
                id=entry.id,
                workflow_id=entry.workflow_id,
                turn=entry.turn,
                step=entry.step,
                parent=entry.parent,
                characters=_characters(entry),
                body=entry.encode(),
            )
            try:
                connection.execute(insertion)
            except IntegrityError as error:  # the foreign key: every other conflict is none
                raise _fault(
                    f"The ledger at {self.place} has no entry {entry.parent}, the parent of turn {entry.turn}, "
                    f"step {entry.step} of {entry.workflow_id}. Do all workers use the same ledger?"
                ) from error
            recorded = _entry_at(connection, entry.workflow_id, entry.turn, entry.step)
            assert recorded is not None, "it was there, or has just been inserted"
            return recorded

        return await self._write(write)

    async def context(self, head: str, *, max_characters: int) -> list[Entry]:
        """The conversation that ends with an entry, oldest first: as many of the newest entries as fit.

        The head itself is always there: the results of its tool calls may be what comes next.

        Args:
            head: an entry's id.
            max_characters: of text in the entries' messages.

        Raises:
            ApplicationError: RetryLater: there is no such entry.
        """

        def read(connection: Connection) -> list[Entry]:
            first = select(*_record, _entries.c.characters.label("total"), literal(0).label("depth"))
            chain = first.where(_entries.c.id == head).cte("chain", recursive=True)
            total = chain.c.total + _entries.c.characters
            chain = chain.union_all(
                select(*_record, total, chain.c.depth + 1)
                .join_from(chain, _entries, _entries.c.id == chain.c.parent)
                .where(total <= max_characters)
            )
            rows = connection.execute(select(chain).order_by(chain.c.depth.desc())).all()
            if not rows:
                raise _fault(f"The ledger at {self.place} has no entry {head}. Do all workers use the same ledger?")
            return [_decode(row) for row in rows]

        return await self._read(read)

    async def transcript(self, workflow_id: str, *, limit: int) -> list[Entry]:
        """The newest entries of an agent, oldest first, at most `limit`."""
        return await self._read(lambda connection: _newest(connection, workflow_id, limit))

    async def since(self, workflow_id: str, turn: int, *, limit: int) -> list[Entry]:
        """The entries of an agent's turns after `turn`, oldest first; the newest `limit` of them."""
        return await self._read(lambda connection: _newest(connection, workflow_id, limit, _entries.c.turn > turn))

    async def of_turn(self, workflow_id: str, turn: int) -> list[Entry]:
        """The entries of one turn, in the order of its steps."""
        return await self._read(lambda connection: _newest(connection, workflow_id, None, _entries.c.turn == turn))

    async def count(self, workflow_id: str) -> int:
        """How many entries an agent has."""
        counted = select(func.count()).select_from(_entries).where(_entries.c.workflow_id == workflow_id)
        return await self._read(lambda connection: connection.execute(counted).scalar_one())

    # Specs, snapshots, calls -----------------------------------------------------------------------------------------

    async def put_spec(self, spec: ResolvedSpec) -> str:
        """Keep a spec; its digest, the SHA-256 of its canonical encoding."""
        body = canonical(spec)
        digest = hashlib.sha256(body).hexdigest()
        found = select(exists().where(_specs.c.digest == digest))
        if not await self._read(lambda connection: connection.execute(found).scalar_one()):
            insertion = self._insert_new(_specs).values(digest=digest, body=body)
            await self._write(lambda connection: connection.execute(insertion))
        return digest

    async def get_spec(self, digest: str) -> ResolvedSpec:
        """The spec with this digest.

        Raises:
            ApplicationError: RetryLater: it is not there.
        """
        query = select(_specs.c.body).where(_specs.c.digest == digest)
        body = await self._read(lambda connection: connection.execute(query).scalar_one_or_none())
        if body is None:
            raise _fault(f"The ledger at {self.place} has no spec {digest}. Do all workers use the same ledger?")
        if hashlib.sha256(body).hexdigest() != digest:
            raise _changed(f"spec {digest}", "its hash is another")
        return ResolvedSpec.model_validate_json(body)

    async def put_snapshot(self, snapshot: Snapshot) -> None:
        """Keep an agent's state; of one run the last one counts.

        An attempt that was given up may arrive late. Turns and accepted events only ever grow: who has fewer is late.
        """
        values = {
            "turn": snapshot.state.turn,
            "accepted": snapshot.state.mailbox.accepted,
            "body": snapshot.model_dump_json().encode(),
            "kept_at": _now(),
        }
        insertion = _dialect(self._url).insert(_snapshots)
        upsert = insertion.values(workflow_id=snapshot.workflow_id, run_id=snapshot.run_id, **values)
        upsert = upsert.on_conflict_do_update(
            index_elements=["workflow_id", "run_id"],
            set_=values,
            where=and_(_snapshots.c.turn <= upsert.excluded.turn, _snapshots.c.accepted <= upsert.excluded.accepted),
        )
        await self._write(lambda connection: connection.execute(upsert))

    async def get_snapshot(self, workflow_id: str) -> Snapshot | None:
        """The state that an agent's newest closed run has left."""
        query = (
            select(_snapshots.c.body)
            .where(_snapshots.c.workflow_id == workflow_id)
            .order_by(_snapshots.c.turn.desc(), _snapshots.c.number.desc())
            .limit(1)
        )
        body = await self._read(lambda connection: connection.execute(query).scalar_one_or_none())
        return Snapshot.model_validate_json(body) if body is not None else None

    async def record_call(self, workflow_id: str, turn: int, step: int) -> None:
        """Note that a model call is about to be made, and whether its step was recorded before."""
        values = {"workflow_id": workflow_id, "turn": turn, "step": step}
        recorded = exists().where(*(_entries.c[name] == value for name, value in values.items()))
        note = insert(_calls).from_select(
            [*values, "recorded_before", "begun_at"],
            select(*(literal(value) for value in values.values()), recorded, literal(_now())),
        )
        await self._write(lambda connection: connection.execute(note))

    async def totals(self) -> Totals:
        """What the ledger holds."""

        def read(connection: Connection) -> Totals:
            def number(query: Any) -> int:
                return int(connection.execute(query).scalar_one())

            calls = select(func.count()).select_from(_calls)
            paid_twice = number(calls.where(_calls.c.recorded_before))
            begun = number(calls)
            steps = (
                select(_calls.c.workflow_id, _calls.c.turn, _calls.c.step)
                .where(~_calls.c.recorded_before)
                .distinct()
                .subquery()
            )
            return Totals(
                agents=number(select(func.count(_entries.c.workflow_id.distinct()))),
                entries=number(select(func.count()).select_from(_entries)),
                snapshots=number(select(func.count()).select_from(_snapshots)),
                calls_begun=begun,
                calls_repeated=begun - number(select(func.count()).select_from(steps)) - paid_twice,
                calls_paid_twice=paid_twice,
            )

        return await self._read(read)

    # The database ----------------------------------------------------------------------------------------------------

    def _insert_new(self, table: Table) -> Any:
        """An insertion that leaves alone what is there."""
        return _dialect(self._url).insert(table).on_conflict_do_nothing()

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await self._run(work, writes=False)

    async def _write(self, work: Callable[[Connection], T]) -> T:
        return await self._run(work, writes=True)

    async def _run(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        """Do this in one transaction, on a thread of our own."""

        def run() -> T:
            with (
                self._connected().connect().execution_options(perennial_writes=writes) as connection,
                connection.begin(),
            ):
                return work(connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run)
        except (SQLAlchemyError, OSError) as error:
            cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
            raise _fault(f"The ledger at {self.place} did not work: {' '.join(str(cause).split())}") from error

    def _connected(self) -> Engine:
        """The database, with its tables."""
        with self._setup:
            if self._engine is None:
                engine = _open(self._url)
                try:
                    _make_tables(engine)
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            return self._engine


def sqlite_file(url: str) -> Path | None:
    """The file of a ledger on SQLite; None of one on PostgreSQL.

    Raises:
        ValueError: the URL is neither's.
    """
    parts = _driver_url(url)
    return Path(parts.database) if parts.get_backend_name() == "sqlite" and parts.database else None


def _fault(message: str) -> Exception:
    return activity_error(Remedy.RETRY_LATER, message)


def _driver_url(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # the latter: a port that is no number
        url = None
    if url is not None and url.get_backend_name() == "sqlite" and url.database not in {None, "", ":memory:"}:
        return url.set(drivername="sqlite")
    if url is not None and url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    raise ValueError(
        "a ledger's URL is sqlite:///path or postgresql://user:password@host/database; correct PERENNIAL_LEDGER_URL"
    )


def _dialect(url: URL) -> Any:
    return sqlite if url.get_backend_name() == "sqlite" else postgresql


def _open(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(
            url,
            pool_size=_THREADS,
            max_overflow=0,
            pool_pre_ping=True,  # connections are tried before use: the database may have been restarted since
            isolation_level="READ COMMITTED",  # whatever the server's default: `append` has to see who was first
            hide_parameters=True,  # an error goes into Temporal's history, and what the agent said does not
            connect_args={key: value for key, value in _POSTGRESQL_SETTINGS.items() if key not in url.query},
        )
    assert url.database is not None, "see _driver_url"
    Path(url.database).absolute().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url, pool_size=_THREADS, max_overflow=0, hide_parameters=True, connect_args={"timeout": _BUSY_SECONDS}
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions begin below, not by the driver's guess
        for pragma in _SQLITE_SETUP:
            _patiently(connection, pragma)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later may fail at once when another process writes in between.
        writes = connection.get_execution_options().get("perennial_writes", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _patiently(connection: sqlite3.Connection, pragma: str) -> None:
    """Run a pragma. SQLite does not wait by itself when several processes turn a new file to WAL at once."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute(pragma)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_BUSY_PAUSE)
        else:
            return


def _make_tables(engine: Engine) -> None:
    """Make the tables where they are missing; one process at a time.

    Raises:
        ApplicationError: RetryLater: a newer release has made them.
    """
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_SETUP_LOCK)))
        _metadata.create_all(connection)
        version = connection.execute(select(func.max(_schema.c.version))).scalar_one_or_none()
        if version is None:
            connection.execute(insert(_schema).values(version=_SCHEMA_VERSION))
        elif version > _SCHEMA_VERSION:
            raise _fault(
                f"The ledger has schema version {version}, and this release knows version {_SCHEMA_VERSION}: "
                "use a newer release of Perennial"
            )


def _newest(connection: Connection, workflow_id: str, limit: int | None, *conditions: Any) -> list[Entry]:
    query = (
        select(*_record)
        .where(_entries.c.workflow_id == workflow_id, *conditions)
        .order_by(_entries.c.turn.desc(), _entries.c.step.desc())
        .limit(limit)
    )
    return [_decode(row) for row in reversed(connection.execute(query).all())]


def _entry_at(connection: Connection, workflow_id: str, turn: int, step: int) -> Entry | None:
    found = _newest(connection, workflow_id, 1, _entries.c.turn == turn, _entries.c.step == step)
    return found[0] if found else None


def _decode(row: Row[Any]) -> Entry:
    """The entry in a row of `_record`; the columns it was found by have to say what the hashed body says."""
    if hashlib.sha256(row.body).hexdigest() != row.id:
        raise _changed(f"entry {row.id}", "its hash is another")
    entry = Entry.model_validate_json(row.body)
    for name in ("workflow_id", "turn", "step", "parent"):
        if getattr(row, name) != getattr(entry, name):
            raise _changed(f"entry {row.id}", f"its {name} was {getattr(entry, name)!r}, and is {getattr(row, name)!r}")
    return entry


def _changed(what: str, how: str) -> Exception:
    return _fault(f"The ledger's {what} is not what was recorded: {how}. Restore a backup.")


def _characters(entry: Entry) -> int:
    """About how much of a model's context the entry takes."""
    return sum(_MESSAGE_OVERHEAD + sum(map(len, _texts(message))) for message in entry.messages)


def _texts(message: Message) -> Iterable[str]:
    if isinstance(message, ToolMessage):
        yield message.content
        return
    yield message.text
    if isinstance(message, AssistantMessage):
        yield from (f"{call.name}{call.arguments}" for call in message.tool_calls)
        yield message.vendor or ""


def _now() -> str:
    return datetime.now(UTC).isoformat()
