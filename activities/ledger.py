"""The ledger: the append-only store of entries, specs, long results and snapshots, on SQLite or PostgreSQL.

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
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, TypeAdapter
from sqlalchemy import (
    CTE,
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
    delete,
    event,
    exists,
    func,
    insert,
    literal,
    select,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from typing_extensions import override

from activities.entries import AssistantMessage, Entry, MemoryMessage, Message, ToolMessage, canonical
from workflows.errors import Remedy, activity_error
from workflows.events import DIGEST_CHARACTERS
from workflows.messages import Approval, Rewound
from workflows.spec import ListedTool, ResolvedSpec
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

_LISTING_KEY = ("tenant", "agent", "version", "server")
_TOOLS = TypeAdapter(list[ListedTool])
_DIGEST = re.compile("[0-9a-f]{16,64}")

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

# By which turn an event was taken, for ever: an agent itself remembers the newest only.
_taken = Table(
    "taken",
    _metadata,
    Column("workflow_id", String, primary_key=True),
    Column("digest", String(DIGEST_CHARACTERS), primary_key=True),
    Column("turn", Integer, nullable=False),
)

# What tools returned that was too long to be shown whole, by the SHA-256 of its UTF-8 encoding.
_results = Table(
    "results",
    _metadata,
    Column("tenant", String, primary_key=True),  # nobody reads another tenant's
    Column("digest", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

# The tools of MCP servers as they were when a version of an agent's YAML file first needed them.
_listings = Table(
    "listings",
    _metadata,
    Column("tenant", String, primary_key=True),
    Column("agent", String, primary_key=True),
    Column("version", String(64), primary_key=True),  # SHA-256 of the file
    Column("server", String, primary_key=True),
    Column("body", LargeBinary, nullable=False),
    Column("listed_at", String, nullable=False),
)

# Model calls as they were begun.
_calls = Table(
    "calls",
    _metadata,
    Column("number", _number, primary_key=True, autoincrement=True),
    Column("workflow_id", String, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("recorded_before", Boolean, nullable=False),  # always false; kept, since older ledgers have it
    Column("begun_at", String, nullable=False),
)


# The entries that stand for what was before them (see `entries.SummaryMessage`).
_summaries = Table("summaries", _metadata, Column("id", String(64), ForeignKey("entries.id"), primary_key=True))

# The entries that an agent is shown for ever, whatever is summed up.
_pins = Table(
    "pins",
    _metadata,
    Column("workflow_id", String, primary_key=True),
    Column("entry", String(64), ForeignKey("entries.id"), primary_key=True),
    Column("by", String, nullable=False),
    Column("why", String, nullable=False),
    Column("pinned_at", String, nullable=False),
)

# Which entries agents went on behind, other than by taking turns: rewinds, and forks, which leave no head.
_rewinds = Table(
    "rewinds",
    _metadata,
    Column("number", _number, primary_key=True, autoincrement=True),
    Column("workflow_id", String, nullable=False),
    Column("request", String, nullable=False),
    Column("turn", Integer, nullable=False),
    Column("head", String(64), ForeignKey("entries.id"), nullable=False),
    Column("old_head", String(64), ForeignKey("entries.id")),
    Column("body", LargeBinary, nullable=False),
    UniqueConstraint("workflow_id", "request", "turn"),
    Index("rewinds_of", "workflow_id", "number"),
    Index("rewinds_to", "head"),
)

# What was decided about tool calls that waited for it.
_approvals = Table(
    "approvals",
    _metadata,
    Column("call", String, primary_key=True),
    Column("workflow_id", String, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("decided_at", String, nullable=False),
    Index("approvals_of", "workflow_id", "decided_at"),
)

_KEYS = {
    "entries": (_entries.c.turn, _entries.c.step),
    "snapshots": (_snapshots.c.number,),
    "rewinds": (_rewinds.c.number,),
    "taken": (_taken.c.digest,),
    "specs": (_specs.c.digest,),
}
"""By table: the columns that, of one agent, are its key."""


class Pin(BaseModel):
    """An entry that an agent is shown for ever, who pinned it, and why."""

    workflow_id: str
    entry: str
    by: str
    why: str
    pinned_at: str
    """UTC, ISO 8601."""


class Totals(BaseModel):
    """What the ledger holds, over all agents."""

    agents: int
    entries: int
    snapshots: int
    calls_begun: int
    """Model calls that were begun."""
    calls_repeated: int
    """Calls begun again for a step that had none recorded: their first try failed, or its worker died."""

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
        self._made: set[MetaData] = set()
        """Tables that are known to be there, beside the ledger's own."""
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

    async def append(
        self,
        entry: Entry,
        *,
        along: Callable[[Connection], None] | None = None,
        tables: MetaData | None = None,
    ) -> Entry:
        """Record a step. Returns the entry that is recorded for it: this one, or the one that was there before.

        Args:
            entry: the step.
            along: what to write in the same transaction, if nothing was there before.
            tables: those that `along` needs, made when missing.

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
                characters=characters(entry),
                body=entry.encode(),
            )
            try:
                inserted = connection.execute(insertion.execution_options(preserve_rowcount=True)).rowcount == 1
            except IntegrityError as error:  # the foreign key: every other conflict is none
                raise _fault(
                    f"The ledger at {self.place} has no entry {entry.parent}, the parent of turn {entry.turn}, "
                    f"step {entry.step} of {entry.workflow_id}. Do all workers use the same ledger?"
                ) from error
            recorded = _entry_at(connection, entry.workflow_id, entry.turn, entry.step)
            assert recorded is not None, "it was there, or has just been inserted"
            if recorded.answers and recorded.id == entry.id:
                connection.execute(self._insert_new(_taken).values(_takings(entry)))
            if recorded.summary and recorded.summary.text:
                connection.execute(self._insert_new(_summaries).values(id=recorded.id))
            if inserted and along is not None:
                along(connection)
            return recorded

        return await self._run(write, writes=True, tables=tables)

    async def taken(self, workflow_id: str, digests: Collection[str]) -> dict[str, int]:
        """Those of these events that the agent has taken, however long ago, each with its first turn."""
        query = select(_taken.c.digest, _taken.c.turn).where(
            _taken.c.workflow_id == workflow_id, _taken.c.digest.in_(digests)
        )
        return await self._read(lambda connection: {row.digest: row.turn for row in connection.execute(query)})

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

    async def summary(self, head: str) -> Entry | None:
        """The newest summary in the conversation that ends with `head`, which may be it."""
        has = exists().where(_summaries.c.id == _entries.c.id)
        first = select(_entries.c.id, _entries.c.parent, has.label("sums_up")).where(_entries.c.id == head)
        line = first.cte("line", recursive=True)
        before = select(_entries.c.id, _entries.c.parent, has).join_from(line, _entries, _entries.c.id == line.c.parent)
        line = line.union_all(before.where(~line.c.sums_up))
        query = select(*_record).join_from(line, _entries, _entries.c.id == line.c.id).where(line.c.sums_up)

        def read(connection: Connection) -> Entry | None:
            row = connection.execute(query).one_or_none()
            return _decode(row) if row else None

        return await self._read(read)

    async def pin(self, workflow_id: str, entry: str, *, by: str, why: str) -> None:
        """Show an agent this entry of its conversation for ever. Pinned again, it has no further effect."""
        pin = {"workflow_id": workflow_id, "entry": entry, "by": by, "why": why, "pinned_at": _now()}
        await self._write(lambda connection: connection.execute(self._insert_new(_pins).values(**pin)))

    async def unpin(self, workflow_id: str, entry: str) -> bool:
        """Let an entry be summed up again; False if it was not pinned."""
        gone = delete(_pins).where(_pins.c.workflow_id == workflow_id, _pins.c.entry == entry)
        return await self._write(lambda connection: connection.execute(gone).rowcount == 1)

    async def pins(self, workflow_id: str) -> list[Pin]:
        """The agent's pinned entries, in the order in which they were made."""
        query = (
            select(_pins)
            .join_from(_pins, _entries, _entries.c.id == _pins.c.entry)
            .where(_pins.c.workflow_id == workflow_id)
            .order_by(_entries.c.turn, _entries.c.step)
        )
        return await self._read(lambda connection: [Pin(**row._asdict()) for row in connection.execute(query)])

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

    # Branches: rewinds, forks, the transcript as a tree ------------------------------------------------------------

    async def entries(self, ids: Sequence[str]) -> list[Entry]:
        """These entries, in this order; those that are not there are left out."""
        query = select(*_record).where(_entries.c.id.in_(ids))

        def read(connection: Connection) -> list[Entry]:
            found = {row.id: _decode(row) for row in connection.execute(query)}
            return [found[one] for one in ids if one in found]

        return await self._read(read)

    async def head(self, workflow_id: str) -> str | None:
        """The entry that an agent goes on behind: its newest, or the one it was rewound to since."""

        def read(connection: Connection) -> str | None:
            newest = connection.execute(
                select(_entries.c.id, _entries.c.turn)
                .where(_entries.c.workflow_id == workflow_id)
                .order_by(_entries.c.turn.desc(), _entries.c.step.desc())
                .limit(1)
            ).one_or_none()
            rewound = _rewinds_of(connection, workflow_id, limit=1)
            if rewound and (newest is None or rewound[0].turn >= newest.turn):
                return rewound[0].head
            return newest.id if newest else None

        return await self._read(read)

    async def put_rewind(self, rewound: Rewound) -> Rewound:
        """Record a rewind or fork; with its number. One that is recorded for the same request and turn stays."""
        insertion = self._insert_new(_rewinds).values(
            workflow_id=rewound.workflow_id,
            request=rewound.id,
            turn=rewound.turn,
            head=rewound.head,
            old_head=rewound.old_head,
            body=rewound.model_dump_json(exclude={"number"}).encode(),
        )

        def write(connection: Connection) -> Rewound:
            connection.execute(insertion)
            made = [_rewinds.c.request == rewound.id, _rewinds.c.turn == rewound.turn]
            return _rewinds_of(connection, rewound.workflow_id, *made)[0]

        return await self._write(write)

    async def rewinds(self, workflow_id: str, *, after: int = 0, limit: int | None = None) -> list[Rewound]:
        """The rewinds of an agent with a greater number, oldest first; the newest `limit` of them."""
        return await self._read(
            lambda connection: _rewinds_of(connection, workflow_id, _rewinds.c.number > after, limit=limit)
        )

    async def rewind_of(self, workflow_id: str, request: str) -> Rewound | None:
        """The newest rewind that was made for this request."""
        found = await self._read(
            lambda connection: _rewinds_of(connection, workflow_id, _rewinds.c.request == request, limit=1)
        )
        return found[0] if found else None

    async def origin(self, workflow_id: str) -> Rewound | None:
        """Where an agent was forked from; None when it was not."""
        found = await self._read(
            lambda connection: _rewinds_of(connection, workflow_id, _rewinds.c.old_head.is_(None), limit=1)
        )
        return found[0] if found else None

    async def forks(self, ids: Collection[str]) -> list[Rewound]:
        """The forks that begin behind these entries."""
        query = select(_rewinds).where(_rewinds.c.head.in_(ids), _rewinds.c.old_head.is_(None))
        query = query.order_by(_rewinds.c.number)
        return await self._read(lambda connection: [_rewound(row) for row in connection.execute(query)])

    async def starting_with(self, workflow_id: str, prefix: str, *, above: str | None, limit: int) -> list[str]:
        """The ids with this beginning of an agent's entries, and of `above` and what comes before it."""
        matches = _entries.c.id.between(prefix, prefix + "g")  # ids are hexadecimal

        def read(connection: Connection) -> list[str]:
            own = select(_entries.c.id).where(_entries.c.workflow_id == workflow_id, matches).limit(limit)
            found = set(connection.execute(own).scalars())
            if above:
                line = _line(above)
                shared = select(line.c.id).where(line.c.id.between(prefix, prefix + "g")).limit(limit)
                found |= set(connection.execute(shared).scalars())
            return sorted(found)

        return await self._read(read)

    async def on_line(self, head: str, ids: Collection[str]) -> set[str]:
        """Those of these entries that are in the conversation that ends with `head`."""
        line = _line(head)
        query = select(line.c.id).where(line.c.id.in_(ids))
        return await self._read(lambda connection: set(connection.execute(query).scalars()))

    async def line(self, head: str, *, limit: int) -> list[str]:
        """The ids of an entry and of those before it, newest first, at most `limit`."""
        line = _line(head, limit)
        query = select(line.c.id).order_by(line.c.depth)
        return await self._read(lambda connection: list(connection.execute(query).scalars()))

    async def left_behind(self, old_head: str, head: str) -> tuple[str | None, list[str]]:
        """The newest entry that both conversations have, and the ids of what only that of `old_head` has, in order."""
        old, new = _line(old_head, name="old"), _line(head, name="new")
        query = select(old.c.id, old.c.parent).where(old.c.id.not_in(select(new.c.id))).order_by(old.c.depth.desc())

        def read(connection: Connection) -> tuple[str | None, list[str]]:
            rows = connection.execute(query).all()
            return (rows[0].parent, [row.id for row in rows]) if rows else (old_head, [])

        return await self._read(read)

    # As it is stored: for `activities.verify` --------------------------------------------------------------------

    async def agents(self, *, after: str, limit: int) -> list[str]:
        """The workflow ids of which the ledger has anything, in order, from behind this one."""

        def read(connection: Connection) -> list[str]:
            found: set[str] = set()
            for table in (_entries, _snapshots, _rewinds, _taken):
                last = after
                for _ in range(limit):  # each found by its index: a DISTINCT would read the whole table
                    query = select(func.min(table.c.workflow_id)).where(table.c.workflow_id > last)
                    next_one: str | None = connection.execute(query).scalar_one_or_none()
                    if next_one is None:
                        break
                    found.add(last := next_one)
            return sorted(found)[:limit]

        return await self._read(read)

    async def rows(
        self, table: str, *, of: str | None = None, after: Sequence[Any] = (), limit: int, **among: Collection[Any]
    ) -> list[dict[str, Any]]:
        """Rows of a table as they are, unchecked, in the order of their key, from behind this one.

        Args:
            table: a key of `_KEYS`.
            of: only of this agent.
            after: the key behind which to begin; empty: from the first.
            limit: how many at most.
            among: by column, the values wanted.
        """
        source, key = _metadata.tables[table], _KEYS[table]
        query = select(*source.c).order_by(*key).limit(limit)
        if of is not None:
            query = query.where(source.c.workflow_id == of)
        if after:
            query = query.where(tuple_(*key) > tuple_(*map(literal, after)))
        for name, values in among.items():
            query = query.where(source.c[name].in_(values))
        return await self._read(lambda connection: [dict(row) for row in connection.execute(query).mappings()])

    async def size(self, workflow_id: str | None) -> int:
        """How many rows there are to look at, of an agent or of all, specs included."""

        def read(connection: Connection) -> int:
            total = 0
            for name in _KEYS:
                table = _metadata.tables[name]
                query = select(func.count()).select_from(table)
                if workflow_id is not None and name != "specs":
                    query = query.where(table.c.workflow_id == workflow_id)
                total += connection.execute(query).scalar_one()
            return total

        return await self._read(read)

    async def known(self, table: str, ids: Collection[str]) -> set[str]:
        """Those of these ids that are there, of entries or of specs."""
        column = _entries.c.id if table == "entries" else _specs.c.digest
        query = select(column).where(column.in_(ids))
        return await self._read(lambda connection: set(connection.execute(query).scalars()))

    # Specs, long results, snapshots, calls ----------------------------------------------------------------------------

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

    async def put_listing(
        self, agent: tuple[str, str], version: str, server: str, tools: list[ListedTool]
    ) -> list[ListedTool]:
        """Record the tools of an MCP server for a version of an agent's file; what is recorded: the first that came."""
        key = dict(zip(_LISTING_KEY, (*agent, version, server), strict=True))
        insertion = self._insert_new(_listings).values(**key, body=_TOOLS.dump_json(tools), listed_at=_now())
        await self._write(lambda connection: connection.execute(insertion))
        recorded = await self.get_listing(agent, version, server)
        assert recorded is not None, "it was there, or has just been inserted"
        return recorded

    async def get_listing(self, agent: tuple[str, str], version: str, server: str) -> list[ListedTool] | None:
        """The tools of an MCP server as recorded for a version of an agent's file, if they are."""
        key = zip(_LISTING_KEY, (*agent, version, server), strict=True)
        query = select(_listings.c.body).where(*(_listings.c[name] == value for name, value in key))
        body = await self._read(lambda connection: connection.execute(query).scalar_one_or_none())
        return None if body is None else _TOOLS.validate_json(body)

    async def put_result(self, tenant: str, text: str) -> str:
        """Keep what a tool returned; its digest, the SHA-256 of its UTF-8 encoding."""
        body = text.encode()
        digest = hashlib.sha256(body).hexdigest()
        insertion = self._insert_new(_results).values(tenant=tenant, digest=digest, body=body)
        await self._write(lambda connection: connection.execute(insertion))
        return digest

    async def get_result(self, tenant: str, digest: str) -> str | None:
        """What a tool returned, by its digest or the beginning of it (16 characters or more); None: there is none."""
        if not _DIGEST.fullmatch(digest):
            return None
        query = (
            select(_results.c.digest, _results.c.body)
            .where(_results.c.tenant == tenant, _results.c.digest >= digest, _results.c.digest < f"{digest}g")
            .limit(1)
        )
        row = await self._read(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            return None
        if hashlib.sha256(row.body).hexdigest() != row.digest:
            raise _changed(f"result {row.digest}", "its hash is another")
        return str(row.body, encoding="utf-8")

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

    async def put_approval(self, approval: Approval) -> None:
        """Record what was decided about a call. The first decision about it counts."""
        insertion = self._insert_new(_approvals).values(
            call=approval.call,
            workflow_id=approval.workflow_id,
            body=canonical(approval),
            decided_at=approval.decided_at.astimezone(UTC).isoformat(),
        )
        await self._write(lambda connection: connection.execute(insertion))

    async def approvals(self, workflow_id: str | None, *, limit: int) -> list[Approval]:
        """What was decided about calls of an agent, or of all, the newest first, at most `limit`."""
        query = select(_approvals.c.body).order_by(_approvals.c.decided_at.desc()).limit(limit)
        if workflow_id is not None:
            query = query.where(_approvals.c.workflow_id == workflow_id)
        rows = await self._read(lambda connection: list(connection.execute(query).scalars()))
        return [Approval.model_validate_json(body) for body in rows]

    async def begin_call(self, workflow_id: str, turn: int, step: int) -> bool:
        """Note that a model call is about to be made; False, and it is not to be, if its step is recorded by now."""
        values = {"workflow_id": workflow_id, "turn": turn, "step": step}
        recorded = exists().where(*(_entries.c[name] == value for name, value in values.items()))
        note = (
            insert(_calls)
            .from_select(
                [*values, "recorded_before", "begun_at"],
                select(*(literal(value) for value in values.values()), recorded, literal(_now())).where(~recorded),
            )
            .execution_options(preserve_rowcount=True)
        )
        return await self._write(lambda connection: connection.execute(note).rowcount == 1)

    async def totals(self) -> Totals:
        """What the ledger holds."""

        def read(connection: Connection) -> Totals:
            def number(query: Any) -> int:
                return int(connection.execute(query).scalar_one())

            begun = number(select(func.count()).select_from(_calls))
            steps = select(_calls.c.workflow_id, _calls.c.turn, _calls.c.step).distinct().subquery()
            return Totals(
                agents=number(select(func.count(_entries.c.workflow_id.distinct()))),
                entries=number(select(func.count()).select_from(_entries)),
                snapshots=number(select(func.count()).select_from(_snapshots)),
                calls_begun=begun,
                calls_repeated=begun - number(select(func.count()).select_from(steps)),
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

    async def transact(self, work: Callable[[Connection], T], *, writes: bool, tables: MetaData) -> T:
        """For what shares the ledger's database: do this in one transaction, with tables that are made when missing.

        Raises:
            ApplicationError: RetryLater: the database did not do it. Other errors are those of `work`.
        """
        return await self._run(work, writes=writes, tables=tables)

    async def _run(self, work: Callable[[Connection], T], *, writes: bool, tables: MetaData | None = None) -> T:
        """Do this in one transaction, on a thread of our own."""

        def run() -> T:
            with (
                self._connected(tables).connect().execution_options(perennial_writes=writes) as connection,
                connection.begin(),
            ):
                return work(connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run)
        except (SQLAlchemyError, OSError) as error:
            cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
            raise _fault(f"The ledger at {self.place} did not work: {' '.join(str(cause).split())}") from error

    def _connected(self, tables: MetaData | None) -> Engine:
        """The database, with its tables, and these."""
        with self._setup:
            if self._engine is None:
                engine = _open(self._url)
                try:
                    _make_tables(engine)
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            if tables is not None and tables not in self._made:
                with self._engine.begin() as connection:
                    _create(connection, tables)
                self._made.add(tables)
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
        _create(connection, _metadata)
        version = connection.execute(select(func.max(_schema.c.version))).scalar_one_or_none()
        if version is None:
            connection.execute(insert(_schema).values(version=_SCHEMA_VERSION))
        elif version > _SCHEMA_VERSION:
            raise _fault(
                f"The ledger has schema version {version}, and this release knows version {_SCHEMA_VERSION}: "
                "use a newer release of Perennial"
            )


def _create(connection: Connection, tables: MetaData) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_SETUP_LOCK)))
    tables.create_all(connection)


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


def _line(head: str, limit: int | None = None, *, name: str = "line") -> CTE:
    """An entry and those before it: id, parent, and how far back it is."""
    first = select(_entries.c.id, _entries.c.parent, literal(0).label("depth")).where(_entries.c.id == head)
    line = first.cte(name, recursive=True)
    before = select(_entries.c.id, _entries.c.parent, line.c.depth + 1)
    before = before.join_from(line, _entries, _entries.c.id == line.c.parent)
    return line.union_all(before if limit is None else before.where(line.c.depth + 1 < limit))


def _rewinds_of(connection: Connection, workflow_id: str, *conditions: Any, limit: int | None = None) -> list[Rewound]:
    query = select(_rewinds).where(_rewinds.c.workflow_id == workflow_id, *conditions)
    query = query.order_by(_rewinds.c.number.desc()).limit(limit)
    return [_rewound(row) for row in reversed(connection.execute(query).all())]


def _rewound(row: Row[Any]) -> Rewound:
    return Rewound.model_validate_json(row.body).model_copy(update={"number": row.number})


def _decode(row: Any) -> Entry:
    """The entry in a row of `_record`.

    Raises:
        ApplicationError: RetryLater: it is not what was recorded.
    """
    try:
        return entry_in(row._asdict())
    except ValueError as error:
        raise _changed(f"entry {row.id}", str(error)) from error


def entry_in(row: Mapping[str, Any]) -> Entry:
    """The entry in a row; the columns it was found by have to say what the hashed body says.

    Raises:
        ValueError: it is not what was recorded; how it differs.
    """
    if not isinstance(row["body"], bytes) or hashlib.sha256(row["body"]).hexdigest() != row["id"]:
        raise ValueError("its hash is another")
    entry = Entry.model_validate_json(row["body"])
    for name in ("workflow_id", "turn", "step", "parent"):
        if row[name] != getattr(entry, name):
            raise ValueError(f"its {name} was {getattr(entry, name)!r}, and is {row[name]!r}")
    return entry


def _changed(what: str, how: str) -> Exception:
    return _fault(f"The ledger's {what} is not what was recorded: {how}. Restore a backup.")


def _takings(entry: Entry) -> list[dict[str, object]]:
    of = {"workflow_id": entry.workflow_id, "turn": entry.turn}
    return [{**of, "digest": digest} for digest in {reference.digest for reference in entry.answers}]


def characters(entry: Entry) -> int:
    """About how much of a model's context the entry takes. It is stored, and `activities.verify` compares."""
    return sum(_MESSAGE_OVERHEAD + sum(map(len, texts(message))) for message in entry.messages)


def texts(message: Message) -> Iterable[str]:
    """What of a message takes up a model's context."""
    if isinstance(message, ToolMessage):
        yield message.content
        return
    if isinstance(message, MemoryMessage):
        return  # shown in its own turn only, see `conversation.shown`
    yield message.text
    if isinstance(message, AssistantMessage):
        yield from (f"{call.name}{call.arguments}" for call in message.tool_calls)
        yield message.vendor or ""


def _now() -> str:
    return datetime.now(UTC).isoformat()
