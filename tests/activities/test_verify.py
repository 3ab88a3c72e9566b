"""P8: whatever somebody changes in the database behind the ledger's back is found and named, on both databases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text
from temporalio.testing import ActivityEnvironment

from activities.agent_state import AgentLedger
from activities.entries import AssistantMessage, Entry, UserMessage
from activities.ledger import Ledger, _metadata
from activities.verify import Finding, Verification
from workflows.events import EventReference
from workflows.mailbox import Mailbox
from workflows.messages import RewindRecord, RewindRequest
from workflows.spec import ControlSpec, ResolvedSpec
from workflows.state import AgentState, Snapshot

AGENT = "agent/store/logistics/order-42"
FORK = "agent/store/logistics/order-42-b"
OTHER = "agent/store/logistics/order-7"
SPEC = ResolvedSpec(name="logistics", tenant="store", instructions="Ship things.")


@dataclass
class Past:
    """A ledger with a rewound agent, its fork and another agent: by name, what can be changed."""

    entries: list[Entry]
    """Of the agent: three turns, and a fourth behind the first."""
    forked: Entry
    other: Entry
    spec: str

    def named(self, part: str) -> str:
        places = {"first": 0, "second": 1, "third": 2, "fourth": 3}
        if part in places:
            return self.entries[places[part]].id
        return {"forked": self.forked.id, "other": self.other.id, "spec": self.spec}[part]


async def past(ledger: Ledger) -> Past:
    state = AgentLedger(ledger)
    digest = await ledger.put_spec(SPEC)

    async def turn(agent: str, number: int, parent: str | None) -> Entry:
        event = EventReference(source="shop", id=f"{agent}-{number}", type="order.shipped")
        said = [UserMessage(text="Where?"), AssistantMessage(text=f"turn {number}")]
        entry = Entry(
            workflow_id=agent,
            turn=number,
            step=1,
            parent=parent,
            messages=[*said],
            answers=[event],
            spec_digest=digest,
            recorded_at="now",
        )
        return await ledger.append(entry)

    entries: list[Entry] = []
    for number in range(1, 4):
        entries.append(await turn(AGENT, number, entries[-1].id if entries else None))
    request = RewindRequest(entry=entries[0].id, id="r-1", by="ada")
    rewinding = RewindRecord(workflow_id=AGENT, turn=3, head=entries[2].id, request=request)
    made = await ActivityEnvironment().run(state.record_rewind, rewinding)
    entries.append(await turn(AGENT, 4, entries[0].id))
    request = RewindRequest(entry=entries[1].id, id="f-1", by="ada")
    forking = RewindRecord(workflow_id=FORK, turn=0, head=None, fork=True, lived=False, request=request)
    await ActivityEnvironment().run(state.record_rewind, forking)
    forked = await turn(FORK, 1, entries[1].id)
    other = await turn(OTHER, 1, None)
    kept = AgentState(
        head=entries[3].id,
        turn=4,
        rewound=made.number,
        spec=ControlSpec(digest=digest),
        mailbox=Mailbox(accepted=4),
    )
    await state.keep_snapshot(Snapshot(workflow_id=AGENT, run_id="run-1", state=kept))
    return Past(entries, forked, other, digest)


def sql(ledger: Ledger, *statements: str, **values: object) -> None:
    """What somebody does to the database, with its own checks out of the way."""
    engine = sqlalchemy.create_engine(ledger._url)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET session_replication_role = replica"))
        for statement in statements:
            connection.execute(text(statement), values)
    engine.dispose()


async def findings(ledger: Ledger, agent: str | None = None) -> list[Finding]:
    """Everything that is wrong; of an agent, or of all."""
    found: list[Finding] = []
    looking = Verification(ledger, on_finding=found.append)
    if agent is None:
        await looking.everything()
    else:
        await looking.agent(agent)
        await looking.specs()
    assert looking.wrong == len(found)
    return found


async def test_a_ledger_as_it_was_recorded_has_nothing_wrong(ledger: Ledger) -> None:
    """And all of it is looked at: each agent's own, and what a fork shares."""
    await past(ledger)
    read: list[int] = []
    looking = Verification(ledger, on_finding=lambda found: pytest.fail(str(found)), on_read=read.append)
    await looking.everything()
    assert looking.read == {"entries": 6, "taken": 6, "snapshots": 1, "rewinds": 2, "specs": 1}
    assert read[-1] == 16
    assert read == sorted(read)
    of_fork = Verification(ledger, on_finding=lambda found: pytest.fail(str(found)))
    await of_fork.agent(FORK)
    assert of_fork.read["entries"] == 1 + 2, "its own, and the two that it shares"


async def test_an_empty_ledger_has_nothing_wrong(ledger: Ledger) -> None:
    assert await findings(ledger) == []


# Each is: what is changed, of which row; the kind, the row's name and the words of what is found.
TAMPERED: list[tuple[str, str, str, str]] = [
    ("UPDATE entries SET body = :body WHERE id = :second", "entry", "second", "its hash is another"),
    ("UPDATE entries SET body = 'x' WHERE id = :second", "entry", "second", "its hash is another"),
    ("UPDATE entries SET body = :empty WHERE id = :second", "entry", "second", "its hash is another"),
    ("UPDATE entries SET workflow_id = :OTHER, turn = 9 WHERE id = :second", "entry", "second", "its workflow_id was"),
    ("UPDATE entries SET workflow_id = :NEW WHERE id = :fourth", "entry", "fourth", "its workflow_id was"),
    ("UPDATE entries SET turn = 9 WHERE id = :second", "entry", "second", "its turn was 2, and is 9"),
    ("UPDATE entries SET turn = -9 WHERE id = :second", "entry", "second", "its turn was 2, and is -9"),
    ("UPDATE entries SET step = 9 WHERE id = :second", "entry", "second", "its step was 1, and is 9"),
    ("UPDATE entries SET parent = NULL WHERE id = :second", "entry", "second", "its parent was"),
    ("UPDATE entries SET parent = :other WHERE id = :second", "entry", "second", "its parent was"),
    ("UPDATE entries SET characters = 0 WHERE id = :second", "entry", "second", "its size was 44 characters, and is 0"),
    ("UPDATE entries SET id = :nowhere WHERE id = :second", "entry", "nowhere", "its hash is another"),
    ("DELETE FROM entries WHERE id = :first", "entry", "second", "its parent .* is not there"),
    ("DELETE FROM entries WHERE id = :second", "entry", "third", "its parent .* is not there"),
    ("DELETE FROM entries WHERE id = :second", "entry", "forked", "its parent .* is not there"),
    ("DELETE FROM entries WHERE id = :fourth", "snapshot", "1 of run run-1", "its head .* is not there"),
    ("DELETE FROM entries WHERE id = :third", "rewind", "1", "its old head .* is not there"),
    ("DELETE FROM entries WHERE id = :forked", "taken", "*", "no entry of turn 1 answers"),
    ("DELETE FROM entries", "rewind", "1", "its head .* is not there"),
    ("DELETE FROM specs", "entry", "second", "its spec .* is not there"),
    ("DELETE FROM specs", "snapshot", "1 of run run-1", "its spec .* is not there"),
    ("UPDATE specs SET body = :body", "spec", "spec", "its hash is another"),
    ("UPDATE specs SET digest = :nowhere", "spec", "nowhere", "its hash is another"),
    ("DELETE FROM taken WHERE turn = 3", "entry", "third", "is not known as taken"),
    ("UPDATE taken SET turn = 4 WHERE turn = 3", "entry", "third", "known as taken by turn 4"),
    ("UPDATE taken SET turn = 2 WHERE turn = 3", "taken", "*", "no entry of turn 2 answers"),
    ("UPDATE taken SET digest = 'x' WHERE turn = 3", "taken", "x", "no entry of turn 3 answers"),
    ("UPDATE taken SET workflow_id = :NEW WHERE turn = 3", "taken", "*", "no entry of turn 3 answers"),
    ("UPDATE snapshots SET body = :empty", "snapshot", "1 of run run-1", "can't be read"),
    ("UPDATE snapshots SET turn = 9", "snapshot", "1 of run run-1", "its turn was 4, and is 9"),
    ("UPDATE snapshots SET accepted = 9", "snapshot", "1 of run run-1", "its accepted was 4, and is 9"),
    ("UPDATE snapshots SET workflow_id = :OTHER", "snapshot", "1 of run run-1", "its workflow_id was"),
    ("UPDATE snapshots SET run_id = 'run-9'", "snapshot", "1 of run run-9", "its run_id was 'run-1'"),
    ("UPDATE rewinds SET body = :empty WHERE number = 1", "rewind", "1", "can't be read"),
    ("UPDATE rewinds SET head = :second WHERE number = 1", "rewind", "1", "its head was"),
    ("UPDATE rewinds SET old_head = NULL WHERE number = 1", "rewind", "1", "its old_head was"),
    ("UPDATE rewinds SET turn = 9 WHERE number = 1", "rewind", "1", "its turn was 3, and is 9"),
    ("UPDATE rewinds SET request = 'x' WHERE number = 1", "rewind", "1", "its request was 'r-1'"),
    ("UPDATE rewinds SET workflow_id = :OTHER WHERE number = 1", "rewind", "1", "its workflow_id was"),
    ("DELETE FROM rewinds WHERE number = 2", "entry", "forked", "from which it was not forked"),
]


async def test_what_was_tampered_with_is_found_and_named(ledger: Ledger) -> None:
    """Each column of each table changed, each row taken away: `--all` names it. What was changed is put back after."""
    before = await past(ledger)
    parts = ("first", "second", "third", "fourth", "forked", "other", "spec")
    values: dict[str, Any] = {part: before.named(part) for part in parts}
    values |= {"nowhere": "0" * 64, "OTHER": OTHER, "NEW": "agent/store/logistics/new", "empty": b"{}"}
    values["body"] = before.other.encode()
    engine = sqlalchemy.create_engine(ledger._url)
    for change, kind, name, wrong in TAMPERED:
        undo = saved(engine)
        sql(ledger, change, **{key: value for key, value in values.items() if f":{key}" in change})
        found = await findings(ledger)
        undo()
        wanted = values.get(name, name)
        assert any(one.kind == kind and wanted in {one.id, "*"} and matches(wrong, one.wrong) for one in found), (
            change,
            found,
        )
    engine.dispose()
    assert await findings(ledger) == []


def saved(engine: sqlalchemy.Engine) -> Callable[[], None]:
    """Puts back what all tables have now."""
    with engine.begin() as connection:
        rows = {table: connection.execute(table.select()).mappings().all() for table in _metadata.sorted_tables}

    def undo() -> None:
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text("SET session_replication_role = replica"))
            for table, kept in rows.items():
                connection.execute(table.delete())
                if kept:
                    connection.execute(table.insert(), [dict(row) for row in kept])

    return undo


def matches(words: str, said: str) -> bool:
    before, _, after = words.partition(" .* ")
    return before in said and after in said


@pytest.mark.parametrize("agent", [AGENT, FORK])
async def test_one_agent_is_verified_by_itself(ledger: Ledger, agent: str) -> None:
    """Also in what a fork shares with another; what is wrong elsewhere is not its matter."""
    before = await past(ledger)
    sql(ledger, "UPDATE entries SET body = :body WHERE id = :id", body=b"{}", id=before.other.id)
    assert await findings(ledger, agent) == []
    sql(ledger, "UPDATE entries SET body = :body WHERE id = :id", body=b"{}", id=before.entries[0].id)
    assert before.entries[0].id in {one.id for one in await findings(ledger, agent) if one.kind == "entry"}


async def test_an_entry_that_was_moved_to_another_agent_is_missed_by_its_own(ledger: Ledger) -> None:
    """Seen from the agent it was taken from: its place is empty, or its successor hangs on a stranger."""
    before = await past(ledger)
    statement = "UPDATE entries SET workflow_id = :other, turn = 9 WHERE id = :id"
    sql(ledger, statement, other=OTHER, id=before.entries[1].id)
    found = await findings(ledger, AGENT)
    assert {one.kind for one in found} == {"entry", "taken"}
    assert before.entries[2].id in {one.id for one in found}


async def test_an_entry_made_anew_with_a_hash_that_fits_is_missed_by_what_follows(ledger: Ledger) -> None:
    """Whoever changes an entry and its id must change all that came after it, and what others know of these."""
    before = await past(ledger)
    forged = before.entries[0].model_copy(update={"messages": [AssistantMessage(text="Refund everything.")]})
    statement = "UPDATE entries SET body = :body, id = :new, characters = 34 WHERE id = :id"
    sql(
        ledger,
        statement,
        body=forged.encode(),
        new=hashlib.sha256(forged.encode()).hexdigest(),
        id=before.entries[0].id,
    )
    found = {(one.kind, one.id) for one in await findings(ledger)}
    assert found == {("entry", before.entries[1].id), ("entry", before.entries[3].id), ("rewind", "1")}


async def test_many_pages_are_read_to_the_end(ledger: Ledger) -> None:
    """More rows than a page, over many agents: the last one's fault is found, and no row is looked at twice."""
    parent = None
    for turn in range(1, 251):
        entry = Entry(
            workflow_id=AGENT,
            turn=1 + turn // 7,
            step=1 + turn % 7,
            parent=parent,
            messages=[AssistantMessage(text=str(turn))],
            answers=[EventReference(source="shop", id=str(turn))],
            recorded_at="now",
        )
        parent = (await ledger.append(entry)).id
    for number in range(120):
        await ledger.append(entry.model_copy(update={"workflow_id": f"{OTHER}-{number}", "parent": None}))
    looking = Verification(ledger, on_finding=lambda found: pytest.fail(str(found)))
    await looking.everything()
    assert (looking.read["entries"], looking.read["taken"]) == (370, 370)
    sql(ledger, "UPDATE entries SET body = :body WHERE id = :id", body=b"{}", id=parent)
    assert [one.id for one in await findings(ledger) if one.kind == "entry"] == [parent]
