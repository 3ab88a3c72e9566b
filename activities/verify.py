"""Verify: is the ledger still what was recorded (DESIGN.md, P8)? Every row is read, and whatever is wrong is told.

    checked = Verification(ledger, on_finding=print)
    await checked.agent("agent/store/logistics/order-42")
    await checked.specs()
    checked.read, checked.wrong

    entry      its hash; what it is found by (agent, turn, step, parent) and its size as the hashed body says; its
               parent is there, and so is everything before it, up to the root; its spec is there
    taken      each event that an entry answers is known as taken by that turn, and none else is
    snapshot   it can be read, says of itself what its row says, and its head and spec are there
    rewind     likewise, and the entries it went between are there and in one agent's reach
    spec       its hash

What is not hashed (snapshots, rewinds) can be changed in a way that fits; entries and specs cannot, unless all that
comes after them is made anew. Rows are read in pages, so memory is bounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from activities.entries import Entry
from activities.ledger import Ledger, characters, entry_in
from workflows.messages import Rewound
from workflows.spec import ResolvedSpec
from workflows.state import Snapshot

_PAGE = 100
_KEYS = {"entries": ("turn", "step"), "snapshots": ("number",), "rewinds": ("number",), "taken": ("digest",)}

Row = dict[str, Any]


class Finding(BaseModel):
    """Something that is not what was recorded."""

    kind: str
    """entry, taken, snapshot, rewind or spec."""
    id: str
    agent: str = ""
    """Its workflow id."""
    wrong: str


class Verification:
    """Looks at a ledger, and counts.

    Args:
        ledger: which.
        on_finding: told of whatever is wrong.
        on_read: told how many rows have been read, now and then.
    """

    def __init__(
        self, ledger: Ledger, *, on_finding: Callable[[Finding], None], on_read: Callable[[int], None] = lambda _: None
    ) -> None:
        self._ledger = ledger
        self._on_finding = on_finding
        self._on_read = on_read
        self.read: dict[str, int] = {"entries": 0, "taken": 0, "snapshots": 0, "rewinds": 0, "specs": 0}
        """Rows looked at, by table."""
        self.wrong = 0

    async def everything(self) -> None:
        """Look at all there is."""
        last = ""
        while agents := await self._ledger.agents(after=last, limit=_PAGE):
            for agent in agents:
                await self.agent(agent, shared=False)
            last = agents[-1]
        await self.specs()

    async def agent(self, agent: str, *, shared: bool = True) -> None:
        """Look at all that there is of an agent; `shared`: also at what it has in common with the one it came from."""
        await self._entries(agent)
        await self._taken(agent)
        await self._snapshots(agent)
        origin = await self._rewinds(agent)
        if shared and origin:
            await self._line(origin)

    async def specs(self) -> None:
        """Look at all specs."""
        after: tuple[Any, ...] = ()
        while rows := await self._ledger.rows("specs", after=after, limit=_PAGE):
            for row in rows:
                digest = row["digest"]
                if not isinstance(row["body"], bytes) or hashlib.sha256(row["body"]).hexdigest() != digest:
                    self._tell("spec", digest, "", "its hash is another")
                    continue
                try:
                    ResolvedSpec.model_validate_json(row["body"])
                except ValidationError as error:
                    self._tell("spec", digest, "", f"it can't be read: {_brief(error)}")
            after = (rows[-1]["digest"],)
            self._have_read("specs", len(rows))

    async def _entries(self, agent: str) -> None:
        async for rows in self._pages("entries", agent):
            await self._look_at_entries(rows)

    async def _look_at_entries(self, rows: list[Row]) -> None:
        entries: list[Entry] = []
        for row in rows:
            try:
                entry = entry_in(row)
            except ValidationError as error:
                self._tell("entry", row["id"], row["workflow_id"], f"it can't be read: {_brief(error)}")
            except ValueError as error:
                self._tell("entry", row["id"], row["workflow_id"], str(error))
            else:
                entries.append(entry)
                if row["characters"] != characters(entry):
                    wrong = f"its size was {characters(entry)} characters, and is {row['characters']}"
                    self._tell("entry", row["id"], row["workflow_id"], wrong)
        await self._look_around(entries)
        self._have_read("entries", len(rows))

    async def _look_around(self, entries: list[Entry]) -> None:
        """Whether what these entries refer to is there."""
        parents = {entry.id: entry.workflow_id for entry in entries} | await self._parents_elsewhere(entries)
        specs = await self._ledger.known("specs", {entry.spec_digest for entry in entries if entry.spec_digest})
        by_agent: dict[str, set[str]] = {}
        for entry in entries:
            by_agent.setdefault(entry.workflow_id, set()).update(answer.digest for answer in entry.answers)
        taken = {agent: await self._ledger.taken(agent, digests) for agent, digests in by_agent.items()}
        for entry in entries:
            if entry.parent and entry.parent not in parents:
                self._tell("entry", entry.id, entry.workflow_id, f"its parent {entry.parent} is not there")
            elif entry.parent and parents[entry.parent] != entry.workflow_id:
                origin = await self._ledger.origin(entry.workflow_id)
                if not origin or not await self._ledger.on_line(origin.head, [entry.parent]):
                    wrong = f"its parent {entry.parent} is of {parents[entry.parent]}, from which it was not forked"
                    self._tell("entry", entry.id, entry.workflow_id, wrong)
            if entry.spec_digest and entry.spec_digest not in specs:
                self._tell("entry", entry.id, entry.workflow_id, f"its spec {entry.spec_digest} is not there")
            for answer in entry.answers:
                turn = taken[entry.workflow_id].get(answer.digest)
                if turn is None or turn > entry.turn:
                    known = "not known as taken" if turn is None else f"known as taken by turn {turn}"
                    wrong = f"the event {answer.id} of {answer.source}, which it answers, is {known}"
                    self._tell("entry", entry.id, entry.workflow_id, wrong)

    async def _parents_elsewhere(self, entries: list[Entry]) -> dict[str, str]:
        """The parents that are none of these entries, each with its agent."""
        wanted = {entry.parent for entry in entries if entry.parent} - {entry.id for entry in entries}
        rows = await self._ledger.rows("entries", limit=len(wanted), id=wanted) if wanted else []
        return {row["id"]: row["workflow_id"] for row in rows}

    async def _taken(self, agent: str) -> None:
        async for rows in self._pages("taken", agent):
            digests = {row["digest"]: row["turn"] for row in rows}
            answered: set[tuple[int, str]] = set()
            async for page in self._pages("entries", agent, turn=set(digests.values())):
                answered |= {(row["turn"], digest) for row in page for digest in _answered(row)}
            for digest, turn in digests.items():
                if (turn, digest) not in answered:
                    self._tell("taken", digest, agent, f"no entry of turn {turn} answers the event that it is said to")
            self._have_read("taken", len(rows))

    async def _snapshots(self, agent: str) -> None:
        async for rows in self._pages("snapshots", agent):
            for row in rows:
                name = f"{row['number']} of run {row['run_id']}"
                try:
                    snapshot = Snapshot.model_validate_json(row["body"])
                except ValidationError as error:
                    self._tell("snapshot", name, agent, f"it can't be read: {_brief(error)}")
                    continue
                state = snapshot.state
                said = {"workflow_id": snapshot.workflow_id, "run_id": snapshot.run_id, "turn": state.turn}
                said["accepted"] = state.mailbox.accepted
                self._compare("snapshot", name, agent, row, said)
                await self._require("snapshot", name, agent, "entries", {"head": state.head})
                await self._require("snapshot", name, agent, "specs", {"spec": state.spec.digest if state.spec else ""})
            self._have_read("snapshots", len(rows))

    async def _rewinds(self, agent: str) -> str | None:
        """Look at an agent's rewinds; the entry that it was forked from, if it was."""
        origin = None
        async for rows in self._pages("rewinds", agent):
            for row in rows:
                name = str(row["number"])
                if row["old_head"] is None:
                    origin = row["head"]
                try:
                    made = Rewound.model_validate_json(row["body"])
                except ValidationError as error:
                    self._tell("rewind", name, agent, f"it can't be read: {_brief(error)}")
                    continue
                said = {"workflow_id": made.workflow_id, "request": made.id, "turn": made.turn}
                self._compare("rewind", name, agent, row, {**said, "head": made.head, "old_head": made.old_head})
                ends = {"head": row["head"], "old head": row["old_head"]}
                await self._require("rewind", name, agent, "entries", ends)
            self._have_read("rewinds", len(rows))
        return origin

    async def _line(self, head: str) -> None:
        """Look at an entry and all before it."""
        start: str | None = head
        while start:
            ids = await self._ledger.line(start, limit=_PAGE)
            rows = await self._ledger.rows("entries", limit=_PAGE, id=ids)
            await self._look_at_entries(rows)
            start = next((row["parent"] for row in rows if ids and row["id"] == ids[-1]), None)

    async def _pages(self, table: str, agent: str, **among: Any) -> AsyncIterator[list[Row]]:
        after: tuple[Any, ...] = ()
        while rows := await self._ledger.rows(table, of=agent, after=after, limit=_PAGE, **among):
            yield rows
            after = tuple(rows[-1][name] for name in _KEYS[table])

    def _compare(self, kind: str, name: str, agent: str, row: Row, said: Mapping[str, object]) -> None:
        for column, value in said.items():
            if row[column] != value:
                self._tell(kind, name, agent, f"its {column} was {value!r}, and is {row[column]!r}")

    async def _require(self, kind: str, name: str, agent: str, table: str, ids: Mapping[str, str | None]) -> None:
        known = await self._ledger.known(table, {one for one in ids.values() if one})
        for what, one in ids.items():
            if one and one not in known:
                self._tell(kind, name, agent, f"its {what} {one} is not there")

    def _tell(self, kind: str, name: str, agent: str, wrong: str) -> None:
        self.wrong += 1
        self._on_finding(Finding(kind=kind, id=name, agent=agent, wrong=wrong))

    def _have_read(self, table: str, rows: int) -> None:
        self.read[table] += rows
        self._on_read(sum(self.read.values()))


def _answered(row: Row) -> Iterable[str]:
    """The digests of the events that an entry answers; none if it is not what was recorded: that is told elsewhere."""
    try:
        return [answer.digest for answer in entry_in(row).answers]
    except ValueError:
        return []


def _brief(error: ValidationError) -> str:
    return error.errors()[0]["msg"]
