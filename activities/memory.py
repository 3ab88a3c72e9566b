"""Memory: the facts agents chose to keep, in the ledger's database.

    memory = Memory(ledger)
    fact = await memory.remember(call, "Prefers to be called Dr. Okafor.", Scope.KEY, pinned=True)
    told = await memory.recall(workflow_id, [Scope.KEY, Scope.TENANT], "how to address her")
    await memory.forget(call, fact.id, [Scope.KEY], why="she asked for it")

A fact belongs to a place: one key of an agent, one agent, a team, or a tenant (`Scope`). Who asks names itself by its
workflow id and the team of its spec, and the places are worked out from that: there is no other way to reach a fact.
Nothing is changed or deleted. What is forgotten has a record beside it, which says by whom, when and why, and is not
recalled.

The database finds the facts that hold one of the words looked for (`_Index`: FTS5 on SQLite, tsvector on PostgreSQL);
`activities.search` says which fits best. With an `Embedder`, facts are also found that mean something near to what is
looked for, whatever their words, and the two orders are made one (`_fitting`). A fact is kept first, and gets its
vector after: where one by the model in use is missing, it is made when the place is next written or read.

What an agent asks for that can't be done is a ValueError, in words for a model.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict
from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    ColumnElement,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Select,
    String,
    Table,
    cast,
    column,
    event,
    exists,
    func,
    insert,
    literal,
    literal_column,
    select,
    table,
)
from sqlalchemy import Column as Col
from sqlalchemy.dialects import postgresql, sqlite
from typing_extensions import override

from activities import search, vectors
from activities.conversation import storable
from activities.entries import Fact
from activities.ledger import Ledger
from workflows import names
from workflows.spec import MemorySpec, Scope

T = TypeVar("T")

MAX_CHARACTERS = 1000
"""Of a fact: it is a sentence or two; what is longer belongs into a file or a database of its own."""
MAX_FACTS = 1000
"""In one place, those that are forgotten not counted."""
MAX_PINNED = 20
_RECALLED = 20
_RECALLED_CHARACTERS = 10_000
_WHY_CHARACTERS = 200
_NEAR = 20
_EMBEDDED_AT_ONCE = 32  # as many as some servers take

_tables = MetaData()
_facts = Table(
    "facts",
    _tables,
    Col("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Col("id", String(16), nullable=False, unique=True),
    Col("call_key", String, nullable=False, unique=True),  # a call that is made again keeps one fact
    Col("place", String, nullable=False, index=True),
    Col("scope", String, nullable=False),
    Col("text", String, nullable=False),
    Col("pinned", Boolean, nullable=False),
    Col("workflow_id", String, nullable=False),
    Col("turn", Integer, nullable=False),
    Col("entry", String(64)),
    Col("kept_at", String, nullable=False),
)
_forgettings = Table(
    "forgettings",
    _tables,
    Col("fact", String(16), primary_key=True),
    Col("call_key", String, nullable=False),
    Col("forgotten_by", String, nullable=False),
    Col("why", String, nullable=False),
    Col("forgotten_at", String, nullable=False),
)
_vectors = Table(
    "fact_vectors",
    _tables,
    Col("fact", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),  # its number
    Col("model", String, primary_key=True),
    Col("vector", LargeBinary, nullable=False),
)
_forgotten = exists().where(_forgettings.c.fact == _facts.c.id)
_entries = table("entries", column("id"), column("workflow_id"), column("turn"), column("step"))  # the ledger's
_ID = re.compile(r"[0-9a-f]{16}")


class Forgetting(BaseModel):
    """By whom, when and why a fact was forgotten."""

    model_config = ConfigDict(frozen=True)

    by: str
    """The agent's workflow id, or a person."""
    why: str
    at: str
    """UTC, ISO 8601."""


class KeptFact(BaseModel):
    """A fact, and whether it counts no more."""

    model_config = ConfigDict(frozen=True)

    fact: Fact
    forgotten: Forgetting | None = None


class Recalled(BaseModel):
    """What was found."""

    model_config = ConfigDict(frozen=True)

    facts: list[Fact]
    """The best first."""
    left_out: int
    """How many more were found."""
    kept: int
    """How many facts there are in these scopes, found or not."""


@dataclass(frozen=True)
class Call:
    """Who keeps or forgets a fact, and in the course of what."""

    workflow_id: str
    turn: int
    key: str
    """The same on every try: what is done once more under it has no further effect."""
    by: str = ""
    """A person; empty: the agent itself."""
    team: str | None = None
    """The agent's team; None: it is in none, and the scope `team` is not there for it."""


class Embedder(Protocol):
    """Makes vectors of texts, as `activities.embeddings` does."""

    name: str
    """Of the model: its vectors are kept under it, and are not compared with those of another."""
    similarity: float
    """How near a fact has to be to be recalled."""

    async def embed(self, texts: Sequence[str], *, query: bool = False) -> list[bytes | None]:
        """A vector of each text, or None where there is none to be had now. Raises nothing."""


class Memory:
    """The facts in a ledger's database. Safe from many tasks at once, and from many processes.

    Args:
        ledger: whose database it is.
        embedder: makes vectors of facts; None: they are found by words alone.
    """

    def __init__(self, ledger: Ledger, embedder: Embedder | None = None) -> None:
        self._ledger = ledger
        self._embedder = embedder

    async def remember(self, call: Call, text: str, scope: Scope, *, pinned: bool = False) -> Fact:
        """Keep a fact. Returns the fact that is kept: what is there already, word for word, is not kept twice.

        Raises:
            ValueError: the text is empty or too long, the place is full, or the scope is the team of an agent in none.
        """
        text = _clean(text)
        if not text:
            raise ValueError("There is nothing to remember: the text is empty.")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"A fact may have {MAX_CHARACTERS:,} characters, and this has {len(text):,}. Remember what matters of "
                "it, in a sentence or two."
            )
        place = _place(call.workflow_id, scope, call.team)

        def write(connection: Connection) -> Fact:
            if known := _found(connection, _facts.c.call_key == call.key):
                return known  # this is a retry
            here = select(_facts).where(_facts.c.place == place, ~_forgotten)
            same = [_facts.c.text == text, *([_facts.c.pinned] if pinned else [])]
            if known := _found(connection, *same, among=here):
                return known
            _refuse_when_full(connection, here, scope, pinned=pinned)
            number = connection.execute(
                _insert_new(connection, _facts)
                .values(
                    id=hashlib.sha256(call.key.encode()).hexdigest()[:16],
                    call_key=call.key,
                    place=place,
                    scope=scope.value,
                    text=text,
                    pinned=pinned,
                    workflow_id=call.workflow_id,
                    turn=call.turn,
                    entry=_entry_of(call),
                    kept_at=_now(),
                )
                .returning(_facts.c.number)
            ).scalar_one_or_none()
            if number is not None:
                _index(connection).add(connection, number, place, list(search.words(text)))
            kept = _found(connection, _facts.c.call_key == call.key)
            assert kept is not None, "it was there, or has just been inserted"
            return kept

        fact = await self._transact(write, writes=True)
        await self._fill([place])
        return fact

    async def recall(  # noqa: PLR0913  # who asks, where to look, and how much to show
        self,
        workflow_id: str,
        scopes: Collection[Scope],
        query: str,
        *,
        team: str | None = None,
        count: int = _RECALLED,
        characters: int = _RECALLED_CHARACTERS,
    ) -> Recalled:
        """The facts that fit a query best; the newest, if there is no word in it. Never raises for its sake.

        Args:
            workflow_id: who asks.
            scopes: where to look.
            query: any text.
            team: the team of who asks.
            count: how many at most.
            characters: how long they may be together.
        """
        places = _places(workflow_id, scopes, team)
        if not places:
            return Recalled(facts=[], left_out=0, kept=0)
        wanted = search.query_words(query)
        near = await self._near(places, query) if wanted else []

        def read(connection: Connection) -> Recalled:
            here = select(_facts).where(_facts.c.place.in_(places), ~_forgotten)
            found = _fitting(connection, here, places, wanted, near) if wanted else _newest(connection, here)
            shown = _within(found, count, characters)
            kept = connection.execute(select(func.count()).select_from(here.subquery())).scalar_one()
            return Recalled(facts=shown, left_out=len(found) - len(shown), kept=kept)

        return await self._transact(read)

    async def fitting(self, workflow_id: str, spec: MemorySpec, arrived: str, *, team: str | None = None) -> list[Fact]:
        """What an agent is reminded of when a turn begins: what is pinned, and what fits the events best."""
        places = _places(workflow_id, spec.read, team)
        if not spec.recalled or not places:
            return []
        wanted = search.query_words(arrived)
        near = await self._near(places, arrived) if wanted else []

        def read(connection: Connection) -> list[Fact]:
            here = select(_facts).where(_facts.c.place.in_(places), ~_forgotten)
            pinned = _newest(connection, here.where(_facts.c.pinned))
            pinned.sort(key=lambda fact: list(Scope).index(fact.scope))  # its own first
            others = here.where(~_facts.c.pinned)
            fitting = _fitting(connection, others, places, wanted, near) if wanted else []
            return _within([*pinned, *fitting], spec.recalled, spec.characters)

        return await self._transact(read)

    async def forget(self, call: Call, fact_id: str, scopes: Collection[Scope], why: str) -> Fact:
        """Let a fact be recalled no more; the fact, and who forgot it and why, stay in the database.

        Raises:
            ValueError: there is no such fact in these scopes, or it is forgotten already, or no reason is given.
        """
        why = _clean(why)[:_WHY_CHARACTERS]
        if not why:
            raise ValueError("Say why the fact is to be forgotten: `why` is empty.")
        fact_id = fact_id.strip()
        places = _places(call.workflow_id, Scope, call.team)
        allowed = _places(call.workflow_id, scopes, call.team)

        def write(connection: Connection) -> Fact:
            # Of a fact that somebody else keeps nothing is said, not even that it is there.
            fact = _found(connection, _facts.c.id == fact_id, _facts.c.place.in_(places))
            if fact is None:
                raise ValueError(_no_such(fact_id))
            if _place(call.workflow_id, fact.scope, call.team) not in allowed:
                may = ", ".join(scopes) or "none"
                raise ValueError(
                    f"Fact {fact_id} is of scope {fact.scope}, and you may forget facts of these scopes: {may}."
                )
            connection.execute(
                _insert_new(connection, _forgettings).values(
                    fact=fact.id,
                    call_key=call.key,
                    forgotten_by=call.by or call.workflow_id,
                    why=why,
                    forgotten_at=_now(),
                )
            )
            recorded = connection.execute(select(_forgettings).where(_forgettings.c.fact == fact.id)).one()
            if recorded.call_key != call.key:
                raise ValueError(
                    f"Fact {fact_id} was forgotten already, at {recorded.forgotten_at} by {recorded.forgotten_by}: "
                    f"{recorded.why}"
                )
            return fact

        if not _ID.fullmatch(fact_id):
            raise ValueError(_no_such(fact_id))
        return await self._transact(write, writes=True)

    async def kept(
        self,
        workflow_id: str,
        scopes: Collection[Scope],
        *,
        team: str | None = None,
        forgotten: bool = False,
        limit: int,
    ) -> list[KeptFact]:
        """What is kept for an agent in these scopes, the newest first, at most `limit`; for people to look at.

        Args:
            workflow_id: the agent.
            scopes: where to look.
            team: the agent's team.
            forgotten: also what is forgotten.
            limit: how many.
        """
        query = (
            select(_facts, _forgettings.c.forgotten_by, _forgettings.c.why, _forgettings.c.forgotten_at)
            .outerjoin(_forgettings, _forgettings.c.fact == _facts.c.id)
            .where(_facts.c.place.in_(_places(workflow_id, scopes, team)))
            .order_by(_facts.c.number.desc())
            .limit(limit)
        )
        if not forgotten:
            query = query.where(_forgettings.c.fact.is_(None))
        return await self._transact(lambda connection: [_kept(row) for row in connection.execute(query)])

    async def _near(self, places: Collection[str], query: str) -> list[int]:
        """The numbers of the facts in these places that are nearest to a query, the nearest first."""
        embedder = self._embedder
        if embedder is None:
            return []
        await self._fill(places)
        of_facts = (
            select(_facts.c.number, _vectors.c.vector)
            .join(_vectors, _vectors.c.fact == _facts.c.number)
            .where(_facts.c.place.in_(places), ~_forgotten, _vectors.c.model == embedder.name)
            .order_by(_facts.c.number.desc())
        )
        kept = await self._transact(lambda connection: [tuple(row) for row in connection.execute(of_facts)])
        (wanted,) = (await embedder.embed([query], query=True)) if kept else [None]
        if wanted is None:
            return []
        return await asyncio.to_thread(
            vectors.nearest, wanted, kept, least=embedder.similarity, count=_NEAR
        )  # not where workflows' tasks run: it may take a while

    async def _fill(self, places: Collection[str]) -> None:
        """Make vectors of facts in these places that have none by this model: of some at a time, the newest first."""
        embedder = self._embedder
        if embedder is None:
            return
        there = exists().where(_vectors.c.fact == _facts.c.number, _vectors.c.model == embedder.name)
        missing = (
            select(_facts.c.number, _facts.c.text)
            .where(_facts.c.place.in_(places), ~_forgotten, ~there)
            .order_by(_facts.c.number.desc())
            .limit(_EMBEDDED_AT_ONCE)
        )
        facts = await self._transact(lambda connection: [tuple(row) for row in connection.execute(missing)])
        made = await embedder.embed([text for _, text in facts]) if facts else []
        rows = [
            {"fact": number, "model": embedder.name, "vector": vector}
            for (number, _), vector in zip(facts, made, strict=True)
            if vector is not None
        ]
        if rows:
            await self._transact(
                lambda connection: connection.execute(_insert_new(connection, _vectors), rows), writes=True
            )

    async def _transact(self, work: Callable[[Connection], T], *, writes: bool = False) -> T:
        return await self._ledger.transact(work, writes=writes, tables=_tables)


# Places --------------------------------------------------------------------------------------------------------------


def _place(workflow_id: str, scope: Scope, team: str | None) -> str:
    return names.memory_place(names.parse_workflow_id(workflow_id), scope, team)


def _places(workflow_id: str, scopes: Iterable[Scope], team: str | None) -> list[str]:
    """The places of these scopes; an agent in no team has none for that scope."""
    return [_place(workflow_id, scope, team) for scope in dict.fromkeys(scopes) if team or scope is not Scope.TEAM]


# Texts ---------------------------------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """What both databases can store."""
    return storable(text).replace("\x00", "\ufffd").strip()


def _no_such(fact_id: str) -> str:
    shown = _clean(fact_id)[:40]
    return f"There is no fact {shown!r} that you may forget. `recall` shows the ids of facts: 16 letters and digits."


def _refuse_when_full(connection: Connection, here: Select[Any], scope: Scope, *, pinned: bool) -> None:
    def count(query: Select[Any]) -> int:
        return connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()

    if count(here) >= MAX_FACTS:
        raise ValueError(
            f"The memory of scope {scope} is full: it holds {MAX_FACTS:,} facts. Forget what matters no more, or put "
            "several facts into one."
        )
    if pinned and count(here.where(_facts.c.pinned)) >= MAX_PINNED:
        raise ValueError(
            f"The memory of scope {scope} holds {MAX_PINNED} pinned facts, and no more can be. Remember it without "
            "pinning it, or forget a pinned fact first."
        )


def _within(facts: Iterable[Fact], count: int, characters: int) -> list[Fact]:
    """The first of these facts, so many and so long together; one that is too long makes room for those behind it."""
    chosen: list[Fact] = []
    for fact in facts:
        if len(chosen) == count:
            break
        if len(fact.text) <= characters:
            chosen.append(fact)
            characters -= len(fact.text)
    return chosen


# Rows ----------------------------------------------------------------------------------------------------------------


def _insert_new(connection: Connection, into: Table) -> Any:
    """An insertion that leaves alone what is there."""
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    return dialect.insert(into).on_conflict_do_nothing()


def _entry_of(call: Call) -> Any:
    """The entry in which the model asked for this call: the newest of the turn, since the turn waits for the call."""
    return (
        select(_entries.c.id)
        .where(_entries.c.workflow_id == call.workflow_id, _entries.c.turn == call.turn)
        .order_by(_entries.c.step.desc())
        .limit(1)
        .scalar_subquery()
    )


def _found(connection: Connection, *conditions: Any, among: Select[Any] | None = None) -> Fact | None:
    query = (select(_facts) if among is None else among).where(*conditions).limit(1)
    row = connection.execute(query).one_or_none()
    return _fact(row) if row is not None else None


def _newest(connection: Connection, here: Select[Any]) -> list[Fact]:
    return [_fact(row) for row in connection.execute(here.order_by(_facts.c.number.desc()))]


def _fitting(
    connection: Connection, here: Select[Any], places: Collection[str], wanted: list[str], near: Sequence[int]
) -> list[Fact]:
    """Those of these facts that hold one of the words, or are among those numbered, the best first.

    Args:
        connection: the database.
        here: the facts.
        places: where they are.
        wanted: the words; of facts that fit them equally, the newest.
        near: the numbers, in an order that counts as much as that by the words.
    """
    found = _newest(connection, here.where(_index(connection).holding(places, wanted)))
    by_words = [found[index] for index in search.ranked(wanted, [fact.text for fact in found])]
    if not near:
        return by_words
    rows = {row.number: _fact(row) for row in connection.execute(here.where(_facts.c.number.in_(near)))}
    by_vectors = [rows[number] for number in near if number in rows]
    facts = {fact.id: fact for fact in (*by_words, *by_vectors)}
    return [facts[one] for one in vectors.fused([[fact.id for fact in order] for order in (by_words, by_vectors)])]


def _fact(row: Row[Any]) -> Fact:
    return Fact(**{name: getattr(row, name) for name in Fact.model_fields})


def _kept(row: Row[Any]) -> KeptFact:
    forgotten = None
    if row.forgotten_by is not None:
        forgotten = Forgetting(by=row.forgotten_by, why=row.why, at=row.forgotten_at)
    return KeptFact(fact=_fact(row), forgotten=forgotten)


def _now() -> str:
    return datetime.now(UTC).isoformat()


# The full-text index -------------------------------------------------------------------------------------------------


class _Index(Protocol):
    """A table beside the facts, which finds them by their words (`search.words`)."""

    ddl: ClassVar[Sequence[str]]

    @staticmethod
    def add(connection: Connection, number: int, place: str, words: list[str]) -> None:
        """Take a fact into the index."""

    @staticmethod
    def holding(places: Collection[str], wanted: list[str]) -> ColumnElement[bool]:
        """The condition that a fact is in one of the places and holds one of the words, or another form of it."""


class _Fts5(_Index):
    """SQLite. The place is in the index too: a common word is looked up among the facts of the place alone."""

    ddl = (
        # The words come as they are to be found. What FTS5 takes for ASCII is letters and digits, and all else.
        "CREATE VIRTUAL TABLE facts_index USING fts5(place, words, content = '', tokenize = 'ascii')",
    )
    _table: ClassVar[Any] = table("facts_index", column("rowid"), column("place"), column("words"))

    @staticmethod
    @override
    def add(connection: Connection, number: int, place: str, words: list[str]) -> None:
        values = {"rowid": number, "place": _Fts5._word_of(place), "words": " ".join(words)}
        connection.execute(insert(_Fts5._table).values(values))

    @staticmethod
    @override
    def holding(places: Collection[str], wanted: list[str]) -> ColumnElement[bool]:
        within = " OR ".join(f'"{_Fts5._word_of(place)}"' for place in places)
        forms = [f'"{form}"' for word in wanted for form in search.shorter_kin(word)]
        exact = [f'"{word}"' + ("*" if search.has_longer_kin(word) else "") for word in wanted]
        match = f"place : ({within}) AND words : ({' OR '.join([*exact, *forms])})"
        index = _Fts5._table
        return _facts.c.number.in_(select(index.c.rowid).where(literal_column("facts_index").op("MATCH")(match)))

    @staticmethod
    def _word_of(place: str) -> str:
        return hashlib.sha256(place.encode()).hexdigest()[:32]


class _Tsvector(_Index):
    """PostgreSQL. The words are lexemes as they are: no configuration of a language has a say."""

    ddl = (
        "CREATE TABLE facts_index (number BIGINT PRIMARY KEY REFERENCES facts, words TSVECTOR NOT NULL)",
        "CREATE INDEX facts_index_words ON facts_index USING gin (words)",
    )
    _table: ClassVar[Any] = table("facts_index", column("number"), column("words"))

    @staticmethod
    @override
    def add(connection: Connection, number: int, place: str, words: list[str]) -> None:
        lexemes = func.array_to_tsvector(cast(words, postgresql.ARRAY(postgresql.TEXT)))
        connection.execute(insert(_Tsvector._table).values(number=number, words=lexemes))

    @staticmethod
    @override
    def holding(places: Collection[str], wanted: list[str]) -> ColumnElement[bool]:
        forms = [f"'{form}'" for word in wanted for form in search.shorter_kin(word)]
        exact = [f"'{word}'" + (":*" if search.has_longer_kin(word) else "") for word in wanted]
        match = cast(literal(" | ".join([*exact, *forms])), postgresql.TSQUERY)
        index = _Tsvector._table
        return exists().where(index.c.number == _facts.c.number, index.c.words.op("@@")(match))


_INDEXES: dict[str, type[_Index]] = {"sqlite": _Fts5, "postgresql": _Tsvector}


def _index(connection: Connection) -> type[_Index]:
    return _INDEXES[connection.dialect.name]


for _name, _kind in _INDEXES.items():
    for _statement in _kind.ddl:
        event.listen(_facts, "after_create", DDL(_statement).execute_if(dialect=_name))  # type: ignore[no-untyped-call]
