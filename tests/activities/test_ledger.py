"""The ledger's promises, on SQLite and on a real PostgreSQL: the fixtures `url` and `ledger` are one and the other."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from postgres import PASSWORD, Postgres
from sqlalchemy import text
from temporalio.exceptions import ApplicationError

from activities import ledger as module
from activities.entries import AssistantMessage, Entry, Message, SummaryMessage, ToolMessage, UserMessage
from activities.ledger import Ledger, Totals
from workflows.errors import Remedy
from workflows.events import Event, EventReference
from workflows.mailbox import Mailbox
from workflows.messages import Approval, Rewound, ToolCall, ToolOutcome, Usage
from workflows.spec import ListedTool, ResolvedSpec, ToolDefinition
from workflows.state import AgentState, Snapshot

AGENT = "agent/store/logistics/order-42"
OTHER = "agent/store/logistics/order-43"
ALL = 1_000_000
OVERHEAD = module._MESSAGE_OVERHEAD

SPEC = ResolvedSpec(
    name="logistics",
    tenant="store",
    instructions="Ship things, quickly 🚚.",
    tools=[ToolDefinition(name="look", python="tools:look", timeout=timedelta(seconds=5))],
    hibernate_after=timedelta(minutes=10),
)


def entry(  # every one of them matters to some test
    turn: int = 1,
    step: int = 1,
    *,
    parent: Entry | None = None,
    agent: str = AGENT,
    said: str = "Hello.",
    messages: list[Message] | None = None,
) -> Entry:
    """A step's entry, in which the agent says this."""
    return Entry(
        workflow_id=agent,
        turn=turn,
        step=step,
        parent=parent.id if parent else None,
        messages=[AssistantMessage(text=said)] if messages is None else messages,
        recorded_at="2026-11-24T12:00:00+00:00",
    )


def summing_up(turn: int, step: int, parent: Entry, text: str) -> Entry:
    """An entry that stands for all before its parent."""
    return entry(turn, step, parent=parent, messages=[SummaryMessage(text=text, through=parent.id)])


async def chain(ledger: Ledger, turns: int, *, agent: str = AGENT, said: str = "Hello.") -> list[Entry]:
    """A conversation of so many turns of one step."""
    entries: list[Entry] = []
    for turn in range(1, turns + 1):
        parent = entries[-1] if entries else None
        entries.append(await ledger.append(entry(turn, parent=parent, agent=agent, said=said)))
    return entries


def snapshot(run: str = "run-1", *, turn: int = 0, accepted: int = 0, replies: int = 0, agent: str = AGENT) -> Snapshot:
    """The state with which a run closes; `replies` tells it from others."""
    state = AgentState(turn=turn, mailbox=Mailbox(accepted=accepted), replies=replies)
    return Snapshot(workflow_id=agent, run_id=run, state=state)


def sql(ledger: Ledger, statement: str, **values: object) -> None:
    """What somebody does to the database behind the ledger's back."""
    engine = sqlalchemy.create_engine(ledger._url)
    with engine.begin() as connection:
        connection.execute(text(statement), values)
    engine.dispose()


def chained(error: BaseException) -> str:
    """An error as Temporal's history shows it: with all its causes."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(f"{cause} {cause!r}")
        cause = cause.__cause__ or cause.__context__
    return "\n".join(texts)


def is_retried(error: pytest.ExceptionInfo[ApplicationError]) -> bool:
    """Whether Temporal tries again: mail must wait for the operator, not be lost."""
    return error.value.type == Remedy.RETRY_LATER and not error.value.non_retryable


# Entries -------------------------------------------------------------------------------------------------------------


async def test_an_entry_comes_back_as_it_was_appended(ledger: Ledger) -> None:
    """Every field of an entry is kept, and its id with them."""
    full = Entry(
        workflow_id=AGENT,
        turn=3,
        step=2,
        parent=None,
        messages=[
            ToolMessage(call_id="c1", name="look", content="not found", outcome=ToolOutcome.ERROR),
            UserMessage(text="Where is it?"),
            AssistantMessage(text="", tool_calls=[ToolCall(id="c2", name="look", arguments='{"n":1}')], vendor="{}"),
        ],
        answers=[EventReference(source="shop", id="e1", type="order.shipped")],
        spec_digest="d" * 64,
        model="large",
        rehearsal=True,
        usage=Usage(input_tokens=10, output_tokens=2),
        error="refused",
        recorded_at="2026-11-24T12:00:00+00:00",
    )
    assert await ledger.append(full) == full
    found = await ledger.find(AGENT, 3, 2)
    assert found == full
    assert found.id == full.id
    assert await ledger.context(full.id, max_characters=ALL) == [full]


async def test_a_step_that_is_not_recorded_is_not_found(ledger: Ledger) -> None:
    """P6: only the very step counts, of the very agent."""
    await ledger.append(entry(2, 2))
    for agent, turn, step in [(OTHER, 2, 2), (AGENT, 1, 2), (AGENT, 2, 1), (AGENT, 2, 3)]:
        assert await ledger.find(agent, turn, step) is None


async def test_the_first_entry_of_a_step_stays(ledger: Ledger) -> None:
    """P6: whoever comes second gets the first one's entry; appended again, an entry is itself."""
    first = await ledger.append(entry(said="first"))
    assert await ledger.append(first) == first
    assert await ledger.append(entry(said="second")) == first
    assert await ledger.find(AGENT, 1, 1) == first
    assert await ledger.count(AGENT) == 1


async def test_a_second_entry_whose_parent_is_unknown_gets_the_first(ledger: Ledger) -> None:
    """P6: a step that is recorded is returned whatever the second one looks like."""
    first = await ledger.append(entry(said="first"))
    assert await ledger.append(entry(said="second", parent=entry(9, said="nowhere"))) == first


async def test_twenty_racing_tasks_record_one_entry(ledger: Ledger) -> None:
    """P6: all tries at a step, made at once, end with the same entry; also while the tables are not there yet."""
    recorded = await asyncio.gather(*(ledger.append(entry(said=f"try {n}")) for n in range(20)))
    assert len({one.id for one in recorded}) == 1
    assert await ledger.find(AGENT, 1, 1) == recorded[0]
    assert await ledger.count(AGENT) == 1


_RACER = """
import asyncio, sys
from activities.entries import AssistantMessage, Entry
from activities.ledger import Ledger

async def main() -> None:
    url, name = sys.argv[1:]
    async with Ledger(url) as ledger:
        print("ready", flush=True)
        sys.stdin.readline()
        ids, parent = [], None
        for turn in range(1, 21):
            message = AssistantMessage(text=name)
            entry = await ledger.append(Entry(workflow_id="agent/a/b/c", turn=turn, step=1, parent=parent,
                                              messages=[message], recorded_at="now"))
            parent = entry.id
            ids.append(parent)
        print(*ids, flush=True)

asyncio.run(main())
"""


async def test_racing_processes_make_the_tables_once_and_record_one_chain(url: str) -> None:
    """P6: processes that start together on an empty database all work, and agree on every step."""
    racers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _RACER, url, f"process {number}"), stdin=PIPE, stdout=PIPE, stderr=PIPE
        )
        for number in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert await racer.stdout.readline() == b"ready\n", await racer.communicate()
    answers = await asyncio.gather(*(racer.communicate(b"go\n") for racer in racers))
    assert [racer.returncode for racer in racers] == [0, 0, 0, 0], [error for _, error in answers]
    chains = {ids.decode() for ids, _ in answers}
    assert len(chains) == 1
    ids = chains.pop().split()
    async with Ledger(url) as ledger:
        assert [one.id for one in await ledger.context(ids[-1], max_characters=ALL)] == ids
        assert await ledger.count("agent/a/b/c") == 20


async def test_an_unknown_parent_is_refused(ledger: Ledger) -> None:
    """P8: no entry hangs in the air. The error names the place, the step and the likely reason, and is retried."""
    nowhere = entry(1, said="never recorded")
    with pytest.raises(ApplicationError, match="turn 2, step 1") as error:
        await ledger.append(entry(2, parent=nowhere))
    assert is_retried(error)
    assert nowhere.id in str(error.value)
    assert ledger.place in str(error.value)
    assert await ledger.find(AGENT, 2, 1) is None


@pytest.mark.parametrize(
    "said", ["a\x00b", "🦊 e\u0301 \u202e\u200f \ufdfd", '\\u0000 " \\ \r\n\t', "\ufffd\ufffe\x7f", "", "x" * 3_000_000]
)
async def test_any_text_is_kept_as_it_is(ledger: Ledger, said: str) -> None:
    """Zero characters, emoji, both writing directions, megabytes: what UTF-8 holds comes back unchanged."""
    appended = entry(said=said, messages=[UserMessage(text=said), AssistantMessage(text=said)])
    await ledger.append(appended)
    assert await ledger.find(AGENT, 1, 1) == appended
    assert await ledger.context(appended.id, max_characters=ALL) == [appended]


# Context -------------------------------------------------------------------------------------------------------------


async def test_the_context_is_the_conversation_oldest_first(ledger: Ledger) -> None:
    """The context of an entry is its parents, oldest first, and itself, last; nothing that came after it."""
    entries = await chain(ledger, 5)
    assert await ledger.context(entries[-1].id, max_characters=ALL) == entries
    assert await ledger.context(entries[2].id, max_characters=ALL) == entries[:3]
    assert await ledger.context(entries[0].id, max_characters=ALL) == entries[:1]


async def test_the_context_follows_steps_within_a_turn(ledger: Ledger) -> None:
    """Several steps of a turn are several entries, and all of them are context."""
    first = await ledger.append(entry(1, 1))
    second = await ledger.append(entry(1, 2, parent=first))
    third = await ledger.append(entry(2, 1, parent=second))
    assert await ledger.context(third.id, max_characters=ALL) == [first, second, third]


async def test_the_context_holds_as_many_of_the_newest_entries_as_fit(ledger: Ledger) -> None:
    """To the character: what is full is in, and one character less leaves the oldest out."""
    entries = await chain(ledger, 4, said="x" * 100)
    size = 100 + OVERHEAD
    head = entries[-1].id
    assert await ledger.context(head, max_characters=3 * size) == entries[1:]
    assert await ledger.context(head, max_characters=3 * size - 1) == entries[2:]
    assert await ledger.context(head, max_characters=4 * size) == entries


async def test_the_newest_summary_of_a_conversation_is_found(ledger: Ledger) -> None:
    """On each branch its own, and none before the first; one that says nothing counts as none."""
    first, second = await chain(ledger, 2)
    assert await ledger.summary(second.id) is None
    one = await ledger.append(summing_up(3, 1, second, "one"))
    third = await ledger.append(entry(3, 2, parent=one))
    two = await ledger.append(summing_up(4, 1, third, "two"))
    failed = await ledger.append(summing_up(4, 2, two, ""))
    branch = await ledger.append(entry(5, parent=third))
    assert await ledger.summary(one.id) == await ledger.summary(third.id) == await ledger.summary(branch.id) == one
    assert await ledger.summary(two.id) == await ledger.summary(failed.id) == two
    assert await ledger.summary(first.id) is None
    assert await ledger.append(summing_up(4, 1, third, "other")) == two, "the first one counts"
    assert await ledger.summary(two.id) == two


async def test_pins_are_kept_in_the_order_of_their_entries(ledger: Ledger) -> None:
    """Pinned twice is pinned once, as it was first; unpinned twice is told."""
    first, second = await chain(ledger, 2)
    await ledger.pin(AGENT, second.id, by="ada", why="terms")
    await ledger.pin(AGENT, first.id, by="bob", why="who it is")
    await ledger.pin(AGENT, second.id, by="eve", why="other")
    assert [(pin.entry, pin.by, pin.why) for pin in await ledger.pins(AGENT)] == [
        (first.id, "bob", "who it is"),
        (second.id, "ada", "terms"),
    ]
    assert await ledger.pins("agent/other/one/1") == []
    assert await ledger.unpin(AGENT, second.id)
    assert not await ledger.unpin(AGENT, second.id)
    assert [pin.entry for pin in await ledger.pins(AGENT)] == [first.id]


async def test_the_head_is_always_in_its_context(ledger: Ledger) -> None:
    """The head asked for the tools whose results come next, so it is shown however long it is."""
    first = await ledger.append(entry(1, said="short"))
    head = await ledger.append(entry(2, parent=first, said="x" * 1000))
    assert await ledger.context(head.id, max_characters=10) == [head]
    assert await ledger.context(head.id, max_characters=0) == [head]


async def test_a_long_entry_ends_the_context(ledger: Ledger) -> None:
    """The context has no holes: what is older than an entry that does not fit is left out, however short."""
    first = await ledger.append(entry(1, said="short"))
    long = await ledger.append(entry(2, parent=first, said="x" * 1000))
    head = await ledger.append(entry(3, parent=long, said="short"))
    assert await ledger.context(head.id, max_characters=500) == [head]


async def test_all_that_a_model_is_shown_counts(ledger: Ledger) -> None:
    """Events, tool calls and results, and what a vendor adds take their part of the context, too."""
    call = ToolCall(id="c", name="look", arguments="x" * 96)
    for turn, message in enumerate(
        [
            UserMessage(text="x" * 100),
            ToolMessage(call_id="c", name="look", content="x" * 100),
            AssistantMessage(text="x" * 50, vendor="x" * 50),
            AssistantMessage(tool_calls=[call]),
        ]
    ):
        long = await ledger.append(entry(2 * turn + 1, messages=[message]))
        head = await ledger.append(entry(2 * turn + 2, parent=long, messages=[]))
        assert await ledger.context(head.id, max_characters=99) == [head]
        assert await ledger.context(head.id, max_characters=100 + 3 * OVERHEAD) == [long, head]


async def test_forks_do_not_see_each_other(ledger: Ledger) -> None:
    """P8: two children of one entry share what was before them, and nothing else."""
    root, parent = await chain(ledger, 2)
    here = await ledger.append(entry(3, parent=parent, said="here"))
    there = await ledger.append(entry(4, parent=parent, said="there"))
    abroad = await ledger.append(entry(1, parent=parent, agent=OTHER, said="another agent"))
    for fork in (here, there, abroad):
        assert await ledger.context(fork.id, max_characters=ALL) == [root, parent, fork]


async def test_an_unknown_head_is_said_so(ledger: Ledger) -> None:
    """A head that is not there, as when workers use different ledgers, is an operator's matter: said, and retried."""
    with pytest.raises(ApplicationError, match="has no entry") as error:
        await ledger.context("0" * 64, max_characters=ALL)
    assert is_retried(error)
    assert ledger.place in str(error.value)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nodes=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 40)), min_size=1, max_size=12),
    chosen=st.integers(0, 1000),
    room=st.integers(0, 300),
)
async def test_in_any_tree_the_context_is_the_end_of_the_path_that_fits(
    ledger: Ledger, nodes: list[tuple[int, int]], chosen: int, room: int
) -> None:
    """context(head, n) is the longest suffix of the path from the root to the head that has at most n characters."""
    agent = f"agent/store/tree/{uuid4()}"  # each example grows its trees in a ledger that holds others already
    entries: list[Entry] = []
    paths: list[list[int]] = []
    for number, (choice, size) in enumerate(nodes):
        above = choice % (number + 1) - 1  # -1: a root
        parent = entries[above] if above >= 0 else None
        entries.append(await ledger.append(entry(number + 1, parent=parent, agent=agent, said="x" * size)))
        paths.append([*(paths[above] if above >= 0 else []), number])
    path = paths[chosen % len(nodes)]
    suffixes = [path[start:] for start in range(len(path))]
    fitting = [suffix for suffix in suffixes if sum(nodes[n][1] + OVERHEAD for n in suffix) <= room]
    expected = max([*fitting, path[-1:]], key=len)
    found = await ledger.context(entries[path[-1]].id, max_characters=room)
    assert found == [entries[n] for n in expected]


# Lists ---------------------------------------------------------------------------------------------------------------


async def test_what_was_taken_is_known_for_ever_and_by_its_first_turn(ledger: Ledger) -> None:
    """Issue 3: replay leaves out what an agent has taken, however long ago; an entry that came second took nothing."""
    one, two, three = (EventReference(source="shop", id=str(number), type="order.shipped") for number in (1, 2, 3))
    first = entry(1).model_copy(update={"answers": [one, two, two]})
    await ledger.append(first)
    await ledger.append(entry(1, said="late").model_copy(update={"answers": [three]}))
    await ledger.append(entry(2, parent=first).model_copy(update={"answers": [two]}))
    asked = [reference.digest for reference in (one, two, three)]
    assert await ledger.taken(AGENT, asked) == {one.digest: 1, two.digest: 1}
    assert await ledger.taken(OTHER, asked) == {}
    assert await ledger.taken(AGENT, []) == {}


async def test_the_transcript_is_the_newest_entries_oldest_first(ledger: Ledger) -> None:
    """At most as many as were asked for, of this agent only."""
    entries = await chain(ledger, 12)
    await chain(ledger, 3, agent=OTHER)
    assert await ledger.transcript(AGENT, limit=100) == entries
    assert await ledger.transcript(AGENT, limit=4) == entries[-4:]
    assert await ledger.transcript("agent/store/logistics/nobody", limit=4) == []


async def test_entries_are_ordered_by_turn_and_step_as_numbers(ledger: Ledger) -> None:
    """Not by when they arrived, nor as text: turn 10 comes after turn 9."""
    order = [(9, 1), (9, 2), (10, 1), (10, 9), (10, 10), (11, 1)]
    for turn, step in [order[n] for n in (3, 0, 5, 1, 4, 2)]:
        await ledger.append(entry(turn, step))
    assert [(one.turn, one.step) for one in await ledger.transcript(AGENT, limit=100)] == order
    assert [one.step for one in await ledger.of_turn(AGENT, 10)] == [1, 9, 10]
    assert [(one.turn, one.step) for one in await ledger.since(AGENT, 9, limit=100)] == order[2:]


async def test_since_gives_later_turns_and_the_newest_of_them(ledger: Ledger) -> None:
    """Of this agent, after this turn; when there are too many, the newest."""
    entries = await chain(ledger, 6)
    await chain(ledger, 9, agent=OTHER)
    assert await ledger.since(AGENT, 0, limit=100) == entries
    assert await ledger.since(AGENT, 4, limit=100) == entries[4:]
    assert await ledger.since(AGENT, 1, limit=2) == entries[-2:]
    assert await ledger.since(AGENT, 6, limit=100) == []


async def test_count_is_of_one_agent(ledger: Ledger) -> None:
    """How many entries this agent has, and not another."""
    await chain(ledger, 3)
    await chain(ledger, 2, agent=OTHER)
    assert await ledger.count(AGENT) == 3
    assert await ledger.count("agent/store/logistics/nobody") == 0


# Specs ---------------------------------------------------------------------------------------------------------------


async def test_a_spec_is_kept_once_under_its_digest(ledger: Ledger) -> None:
    """The same spec has one digest, also when it is put at once from many places; another has another."""
    digests = await asyncio.gather(*(ledger.put_spec(SPEC) for _ in range(10)))
    assert len(set(digests)) == 1
    assert await ledger.get_spec(digests[0]) == SPEC
    changed = SPEC.model_copy(update={"instructions": "Ship nothing."})
    assert await ledger.put_spec(changed) != digests[0]
    assert await ledger.get_spec(digests[0]) == SPEC


async def test_an_unknown_spec_is_said_so(ledger: Ledger) -> None:
    """A digest that this ledger does not know is an operator's matter: said, and retried."""
    with pytest.raises(ApplicationError, match="Do all workers use the same ledger") as error:
        await ledger.get_spec("0" * 64)
    assert is_retried(error)


# Snapshots -----------------------------------------------------------------------------------------------------------


async def test_no_snapshot(ledger: Ledger) -> None:
    """An agent that has never closed has none, whatever others have."""
    await ledger.put_snapshot(snapshot(agent=OTHER))
    assert await ledger.get_snapshot(AGENT) is None


async def test_a_snapshot_comes_back_whole(ledger: Ledger) -> None:
    """Waiting mail, seen ids and all else an agent wakes with."""
    event = Event(id="e1", source="shop", type="order.shipped", data={"by": "Größe\x00", "n": [1, None, 0.5]})
    state = AgentState(
        mailbox=Mailbox(waiting=[event], seen={event.digest: 0, "d0": 7}, accepted=2),
        head="a" * 64,
        turn=7,
        spec=SPEC.control("digest"),
        usage=Usage(input_tokens=1),
    )
    kept = Snapshot(workflow_id=AGENT, run_id="run", state=state)
    await ledger.put_snapshot(kept)
    assert await ledger.get_snapshot(AGENT) == kept


async def test_of_one_run_the_last_snapshot_counts(ledger: Ledger) -> None:
    """A run that keeps a snapshot, gets mail and goes on, leaves what it was when it closed."""
    await ledger.put_snapshot(snapshot(turn=1, accepted=1, replies=1))
    await ledger.put_snapshot(snapshot(turn=1, accepted=1, replies=2))
    await ledger.put_snapshot(snapshot(turn=1, accepted=2, replies=3))
    await ledger.put_snapshot(snapshot(turn=2, accepted=2, replies=4))
    assert await ledger.get_snapshot(AGENT) == snapshot(turn=2, accepted=2, replies=4)
    assert (await ledger.totals()).snapshots == 1


async def test_a_late_snapshot_of_the_same_run_does_not_undo_a_later_one(ledger: Ledger) -> None:
    """P1: an attempt that was given up, and arrives after its successor, takes no accepted mail away."""
    await ledger.put_snapshot(snapshot(turn=2, accepted=3))
    await ledger.put_snapshot(snapshot(turn=2, accepted=2))
    await ledger.put_snapshot(snapshot(turn=1, accepted=3))
    assert await ledger.get_snapshot(AGENT) == snapshot(turn=2, accepted=3)


async def test_the_newest_run_wins(ledger: Ledger) -> None:
    """An agent wakes with what its newest run has left, even if that has taken no turn."""
    await ledger.put_snapshot(snapshot("run-1", turn=2, replies=1))
    await ledger.put_snapshot(snapshot("run-2", turn=2, replies=2))
    assert await ledger.get_snapshot(AGENT) == snapshot("run-2", turn=2, replies=2)


@pytest.mark.parametrize("kept_before", [True, False])
async def test_a_late_snapshot_of_an_older_run_is_not_the_newest(ledger: Ledger, *, kept_before: bool) -> None:
    """P1: what an older run still had under way changes nothing for the run that came after it."""
    if kept_before:
        await ledger.put_snapshot(snapshot("run-1", turn=2))
    await ledger.put_snapshot(snapshot("run-2", turn=3))
    await ledger.put_snapshot(snapshot("run-1", turn=2, replies=9))
    assert await ledger.get_snapshot(AGENT) == snapshot("run-2", turn=3)


# Calls and totals ----------------------------------------------------------------------------------------------------


async def test_totals_of_an_empty_ledger(ledger: Ledger) -> None:
    """Nothing is there, and that is no error."""
    nothing = {"agents": 0, "entries": 0, "snapshots": 0, "calls_begun": 0, "calls_repeated": 0}
    assert await ledger.totals() == Totals(**nothing)


async def test_totals_count_what_is_there(ledger: Ledger) -> None:
    """Agents by their entries; calls begun, and begun again."""
    await ledger.begin_call(AGENT, 1, 1)  # its worker dies
    await ledger.begin_call(AGENT, 1, 1)
    await ledger.begin_call(AGENT, 1, 1)
    await ledger.append(entry(1, 1))
    await ledger.begin_call(AGENT, 1, 2)
    await ledger.begin_call(OTHER, 1, 1)
    await ledger.append(entry(1, 1, agent=OTHER))
    await ledger.put_snapshot(snapshot())
    counts = {"agents": 2, "entries": 2, "snapshots": 1, "calls_begun": 5}
    assert await ledger.totals() == Totals(**counts, calls_repeated=2)


async def test_a_call_for_a_recorded_step_is_not_begun(ledger: Ledger) -> None:
    """P6: in the moment of the call, whatever was known before; a step that is not recorded may be begun again."""
    assert await ledger.begin_call(AGENT, 1, 1)
    assert await ledger.begin_call(AGENT, 1, 1)
    await ledger.append(entry(1, 1))
    assert not await ledger.begin_call(AGENT, 1, 1)
    assert await ledger.begin_call(AGENT, 1, 2)
    totals = await ledger.totals()
    assert (totals.calls_begun, totals.calls_repeated) == (3, 1)


# Tampering -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("body", b'{"version":1}'),
        ("body", b""),
        ("workflow_id", "agent/store/logistics/order-1"),
        ("turn", 7),
        ("step", 7),
        ("parent", None),
    ],
)
async def test_what_was_tampered_with_is_noticed(ledger: Ledger, change: str, value: object) -> None:
    """P8: an entry that is not what was recorded is never shown to a model: it is said which, and retried."""
    first, second = await chain(ledger, 2)
    sql(ledger, f"UPDATE entries SET {change} = :value WHERE id = :id", value=value, id=second.id)
    with pytest.raises(ApplicationError, match="is not what was recorded") as error:
        await ledger.context(second.id, max_characters=ALL)
    assert is_retried(error)
    assert second.id in str(error.value)
    assert await ledger.context(first.id, max_characters=ALL) == [first]


async def test_an_exchanged_entry_is_noticed_wherever_it_is_read(ledger: Ledger) -> None:
    """P8: another entry's content, though it is a genuine one, does not pass for this one's."""
    first, second = await chain(ledger, 2)
    sql(ledger, "UPDATE entries SET body = :body WHERE id = :id", body=first.encode(), id=second.id)
    for read in (
        ledger.find(AGENT, 2, 1),
        ledger.of_turn(AGENT, 2),
        ledger.transcript(AGENT, limit=10),
        ledger.since(AGENT, 1, limit=10),
        ledger.append(second),
    ):
        with pytest.raises(ApplicationError, match=second.id):
            await read


async def test_a_spec_that_was_tampered_with_is_noticed(ledger: Ledger) -> None:
    """P8: an agent does not follow instructions that were put into the database by hand."""
    digest = await ledger.put_spec(SPEC)
    body = SPEC.model_copy(update={"instructions": "Refund everything."}).model_dump_json().encode()
    sql(ledger, "UPDATE specs SET body = :body", body=body)
    with pytest.raises(ApplicationError, match=digest):
        await ledger.get_spec(digest)


# The database --------------------------------------------------------------------------------------------------------


async def test_what_is_kept_outlives_the_process(url: str) -> None:
    """Another ledger at the same place finds all of it."""
    async with Ledger(url) as ledger:
        entries = await chain(ledger, 3)
        digest = await ledger.put_spec(SPEC)
        await ledger.put_snapshot(snapshot())
    async with Ledger(url) as ledger:
        assert await ledger.transcript(AGENT, limit=10) == entries
        assert await ledger.get_spec(digest) == SPEC
        assert await ledger.get_snapshot(AGENT) == snapshot()


async def test_many_readers_and_writers_at_once(ledger: Ledger) -> None:
    """Far more tasks than threads and connections: each gets its turn."""

    async def live(number: int) -> list[Entry]:
        entries = await chain(ledger, 5, agent=f"agent/a/b/{number}")
        return await ledger.context(entries[-1].id, max_characters=ALL)

    contexts = await asyncio.gather(*(live(number) for number in range(40)))
    assert [len(context) for context in contexts] == [5] * 40
    assert (await ledger.totals()).entries == 200


async def test_a_newer_schema_is_refused(url: str) -> None:
    """A release does not write into tables it does not know; it says so, and waits to be updated."""
    async with Ledger(url) as ledger:
        await chain(ledger, 1)
        sql(ledger, "UPDATE ledger_schema SET version = version + 1")
    async with Ledger(url) as ledger:
        for attempt in (ledger.count(AGENT), ledger.append(entry(2))):
            with pytest.raises(ApplicationError, match="use a newer release") as error:
                await attempt
            assert is_retried(error)


async def test_errors_do_not_tell_what_was_said(ledger: Ledger) -> None:
    """An error goes into Temporal's history with all its causes: the conversation and the password do not."""
    await chain(ledger, 1)
    sql(ledger, "ALTER TABLE entries RENAME TO entries_away")
    with pytest.raises(ApplicationError, match="did not work") as error:
        await ledger.append(entry(2, said="my card number is 4111"))
    for secret in ("4111", AGENT, PASSWORD):
        assert secret not in chained(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "ledger.db",
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://u:hidden@h/d",
        "postgresql://u:hidden@h:port/d",
        "postgres//u:hidden@h",
    ],
)
def test_a_wrong_url_names_the_setting(wrong: str) -> None:
    """P14: what it has to look like and where it is set, without the password that may be in it."""
    with pytest.raises(ValueError, match="PERENNIAL_LEDGER_URL") as error:
        Ledger(wrong)
    assert "hidden" not in chained(error.value)


def test_the_place_shows_no_password() -> None:
    """Messages name the database; the password stays out of them."""
    assert Ledger("postgresql://me:hidden@db/ledger").place == "postgresql+psycopg://me:***@db/ledger"


# SQLite --------------------------------------------------------------------------------------------------------------


async def fails_plainly(ledger: Ledger, reason: str) -> None:
    """Reading and writing both say where and why, and are retried."""
    for attempt in (ledger.append(entry(9, said="x" * 100_000)), ledger.put_snapshot(snapshot())):
        with pytest.raises(ApplicationError, match=reason) as error:
            await attempt
        assert is_retried(error)
        assert ledger.place in str(error.value)


async def test_sqlite_makes_the_folders_of_its_file(tmp_path: Path) -> None:
    """A fresh state directory need not be made first."""
    async with Ledger(f"sqlite:///{tmp_path}/a/b/ledger.db") as ledger:
        await chain(ledger, 1)
    assert (tmp_path / "a" / "b" / "ledger.db").exists()


async def test_sqlite_where_no_file_can_be(tmp_path: Path) -> None:
    """A path that leads through a file is said plainly; once it is free, the same ledger works."""
    (tmp_path / "file").write_text("")
    async with Ledger(f"sqlite:///{tmp_path}/file/ledger.db") as ledger:
        await fails_plainly(ledger, "File exists|Not a directory")
        (tmp_path / "file").unlink()
        await chain(ledger, 1)


async def test_sqlite_that_is_a_directory(tmp_path: Path) -> None:
    """What can't be opened is said plainly."""
    async with Ledger(f"sqlite:///{tmp_path}") as ledger:
        await fails_plainly(ledger, "unable to open database file")


async def test_sqlite_that_is_no_database(tmp_path: Path) -> None:
    """A file that is something else is said plainly, and left alone; with a database in its place, the ledger works."""
    path = tmp_path / "ledger.db"
    path.write_text("my diary\n" * 1000)
    async with Ledger(f"sqlite:///{path}") as ledger:
        await fails_plainly(ledger, "file is not a database")
        assert path.read_text() == "my diary\n" * 1000
        path.unlink()
        await chain(ledger, 1)


async def test_sqlite_that_is_damaged(tmp_path: Path) -> None:
    """A database whose pages are damaged is said plainly."""
    path = tmp_path / "ledger.db"
    async with Ledger(f"sqlite:///{path}") as ledger:
        await chain(ledger, 20, said="x" * 5000)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    async with Ledger(f"sqlite:///{path}") as ledger:
        await fails_plainly(ledger, "malformed")


async def test_sqlite_on_a_full_disk(tmp_path: Path) -> None:
    """A full disk is said plainly, what was recorded stays, and when there is room again, work goes on."""
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        entries = await chain(ledger, 2)
        assert ledger._engine is not None

        @sqlalchemy.event.listens_for(ledger._engine, "begin")
        def fill_up(connection: sqlalchemy.Connection) -> None:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        pages = 1  # SQLite takes the present size, if that is more
        with pytest.raises(ApplicationError, match="database or disk is full") as error:
            await ledger.append(entry(3, parent=entries[-1], said="x" * 100_000))
        assert is_retried(error)
        assert ledger.place in str(error.value)
        assert await ledger.context(entries[-1].id, max_characters=ALL) == entries
        pages = 1_000_000
        await ledger.append(entry(3, parent=entries[-1], said="x" * 100_000))


async def test_sqlite_opened_by_many_at_once(tmp_path: Path) -> None:
    """All that open a new file at the same time find it with its tables."""
    for number in range(10):
        ledgers = [Ledger(f"sqlite:///{tmp_path}/{number}.db") for _ in range(8)]
        assert await asyncio.gather(*(ledger.count(AGENT) for ledger in ledgers)) == [0] * 8
        for ledger in ledgers:
            await ledger.__aexit__()


async def test_sqlite_that_another_process_is_just_making(tmp_path: Path, eventually: Any) -> None:
    """Who comes second waits, where SQLite itself does not: "database is locked" is no answer."""
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("CREATE TABLE something (x)")
    other.execute("BEGIN IMMEDIATE")
    executed: list[str] = []

    def trace(connection: sqlite3.Connection, _: object) -> None:
        connection.set_trace_callback(executed.append)

    sqlalchemy.event.listen(sqlalchemy.Pool, "connect", trace)
    try:
        async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
            counting = asyncio.create_task(ledger.count(AGENT))
            await eventually(lambda: counting.done() or executed.count("PRAGMA journal_mode = WAL") > 2)
            other.execute("COMMIT")
            assert await counting == 0
    finally:
        sqlalchemy.event.remove(sqlalchemy.Pool, "connect", trace)
        other.close()


async def test_sqlite_waits_for_another_process_that_writes(tmp_path: Path) -> None:
    """A lock that is held for a moment is waited for, not an error."""
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        await chain(ledger, 1)
        other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        appending = asyncio.create_task(ledger.append(entry(2)))
        assert await ledger.count(AGENT) == 1  # readers do not wait
        assert not appending.done()
        other.execute("COMMIT")
        other.close()
        await appending
        assert await ledger.count(AGENT) == 2


# PostgreSQL ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_server(postgres_server: Postgres) -> Iterator[Postgres]:
    """A PostgreSQL of the test's own, which it may kill; `postgres_server` says what follows where there is none."""
    with Postgres() as server:
        yield server


@pytest.fixture
async def on_own_server(own_server: Postgres) -> AsyncIterator[Ledger]:
    """A ledger there."""
    async with Ledger(own_server.new_database()) as ledger:
        yield ledger


async def test_postgresql_that_comes_later(own_server: Postgres, on_own_server: Ledger) -> None:
    """A process may start while the database is away: that is said, with the place and no password, and passes."""
    own_server.kill()
    for _ in range(2):
        with pytest.raises(ApplicationError, match="did not work") as error:
            await on_own_server.append(entry())
        assert is_retried(error)
        assert own_server.address in str(error.value)
        assert PASSWORD not in chained(error.value)
    own_server.start()
    assert await on_own_server.append(entry()) == entry()


async def test_postgresql_that_is_killed_in_between(own_server: Postgres, on_own_server: Ledger) -> None:
    """Connections that broke are replaced without anybody noticing, and what was recorded is there."""
    entries = await chain(on_own_server, 3)
    await asyncio.gather(*(on_own_server.count(AGENT) for _ in range(20)))  # so that there are several connections
    own_server.kill()
    with pytest.raises(ApplicationError) as error:
        await on_own_server.find(AGENT, 1, 1)
    assert is_retried(error)
    own_server.start()
    contexts = await asyncio.gather(*(on_own_server.context(entries[-1].id, max_characters=ALL) for _ in range(20)))
    assert contexts == [entries] * 20
    own_server.kill()
    own_server.start()
    await on_own_server.append(entry(4, parent=entries[-1]))


async def test_postgresql_killed_while_agents_work(
    own_server: Postgres, on_own_server: Ledger, eventually: Any
) -> None:
    """P6: an append that broke off is tried again, and its step is there once."""

    async def appended(number: int, parent: Entry | None) -> Entry:
        while True:
            try:
                return await on_own_server.append(entry(number, parent=parent, said=f"try {uuid4()}"))
            except ApplicationError as error:
                if error.type != Remedy.RETRY_LATER:
                    raise
                await asyncio.sleep(0.01)

    async def live() -> Entry:
        parent = None
        for number in range(1, 301):
            parent = await appended(number, parent)
        assert parent is not None
        return parent

    living = asyncio.create_task(live())

    async def is_half_way() -> bool:
        return await on_own_server.count(AGENT) > 100

    await eventually(is_half_way)
    own_server.kill()
    await asyncio.to_thread(own_server.start)
    head = await living
    context = await on_own_server.context(head.id, max_characters=ALL)
    assert [one.turn for one in context] == list(range(1, 301))
    assert await on_own_server.count(AGENT) == 300


async def test_postgresql_with_a_wrong_password(postgres_server: Postgres) -> None:
    """Said with the user, the place and the reason; the password that was tried is not."""
    async with Ledger(postgres_server.url(password="open-sesame")) as ledger:
        with pytest.raises(ApplicationError, match="password authentication failed") as error:
            await ledger.count(AGENT)
    assert is_retried(error)
    assert postgres_server.address in str(error.value)
    assert "open-sesame" not in chained(error.value)


async def test_postgresql_without_the_database(postgres_server: Postgres) -> None:
    """A database that has not been made is said plainly."""
    async with Ledger(postgres_server.url("nowhere")) as ledger:
        with pytest.raises(ApplicationError, match='database "nowhere" does not exist') as error:
            await ledger.count(AGENT)
    assert is_retried(error)


async def test_postgresql_whose_default_isolation_is_stricter(postgres_server: Postgres) -> None:
    """P6: racing appends agree also where the database's own default would hide the winner from the others."""
    url = postgres_server.new_database()
    async with Ledger(url) as ledger:
        await ledger.count(AGENT)
        name = url.rpartition("/")[2]
        sql(ledger, f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
    async with Ledger(url) as ledger:
        recorded = await asyncio.gather(*(ledger.append(entry(said=f"try {n}")) for n in range(20)))
    assert len({one.id for one in recorded}) == 1


async def test_postgresql_keeps_no_plan_from_when_the_tables_were_small(postgres_server: Postgres) -> None:
    """P7: a statement is planned for the tables as they are; a prepared one would go on reading all of them."""
    async with Ledger(postgres_server.new_database()) as ledger:
        (first,) = await chain(ledger, 1)
        for _ in range(20):  # one after the other, and so on one connection
            await ledger.context(first.id, max_characters=ALL)
        assert ledger._engine is not None
        with ledger._engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() == 0


async def test_postgresql_settings_in_the_url_count(postgres_server: Postgres) -> None:
    """Who needs other time-outs than ours writes them into the URL."""
    async with Ledger(f"{postgres_server.new_database()}?connect_timeout=3&application_name=mine") as ledger:
        await ledger.count(AGENT)
        assert ledger._engine is not None
        with ledger._engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            parameters = driver.info.get_parameters()
    assert (parameters["connect_timeout"], parameters["application_name"]) == ("3", "mine")
    assert parameters["keepalives_idle"] == "10"


# Cost ----------------------------------------------------------------------------------------------------------------

_CROWD = 4000


def rewound(turn: int, head: Entry, old_head: Entry) -> Rewound:
    names = {"workflow_id": AGENT, "head": head.id, "old_head": old_head.id}
    return Rewound(id=f"r-{turn}", turn=turn, head_turn=head.turn, head_step=head.step, **names)


async def crowd(ledger: Ledger) -> Entry:
    """Fill a ledger with one long conversation and what goes with it; its newest entry."""
    entries: list[Entry] = []
    for turn in range(1, _CROWD + 1):
        entries.append(entry(turn, parent=entries[-1] if entries else None, said="x" * 200))
    await ledger.count(AGENT)
    engine = ledger._engine
    assert engine is not None
    with engine.begin() as connection:
        rows = [
            {"id": e.id, "workflow_id": AGENT, "turn": e.turn, "step": 1, "parent": e.parent, "characters": 216,
             "body": e.encode()}
            for e in entries
        ]  # fmt: skip
        connection.execute(module._entries.insert(), rows)
        snapshots = [
            {"workflow_id": AGENT, "run_id": f"run {n}", "turn": n, "accepted": n, "kept_at": "now",
             "body": snapshot(f"run {n}", turn=n).model_dump_json().encode()}
            for n in range(_CROWD)
        ]  # fmt: skip
        connection.execute(module._snapshots.insert(), snapshots)
        rewinds = [
            {"workflow_id": AGENT, "request": str(n), "turn": n, "head": entries[0].id, "old_head": entries[n].id,
             "body": rewound(n, entries[0], entries[n]).model_dump_json().encode()}
            for n in range(_CROWD)
        ]  # fmt: skip
        connection.execute(module._rewinds.insert(), rewinds)
        specs = [{"digest": str(n), "body": b"x" * 200} for n in range(_CROWD)]
        connection.execute(module._specs.insert(), specs)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    return entries[-1]


def plan(connection: sqlalchemy.Connection, statement: str, values: Any) -> list[str]:
    """The tables that a statement reads from end to end."""
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
        words = [row.detail.split() for row in rows]
        return [detail[1] for detail in words if detail[0] == "SCAN"]

    def scanned(node: dict[str, Any]) -> Iterator[str]:
        if node["Node Type"] == "Seq Scan":
            yield node["Relation Name"]
        for child in node.get("Plans", []):
            yield from scanned(child)

    (explained,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", values).scalars()
    tree = json.loads(explained) if isinstance(explained, str) else explained
    return list(scanned(tree[0]["Plan"]))


async def test_no_step_reads_a_table_from_end_to_end(ledger: Ledger) -> None:
    """P7: what a step, a wake-up and a reply ask of the ledger is found by an index, however long the conversation."""
    head = await crowd(ledger)
    digest = await ledger.put_spec(SPEC)
    engine = ledger._engine
    assert engine is not None
    asked: list[tuple[str, Any]] = []

    @sqlalchemy.event.listens_for(engine, "before_cursor_execute")
    def note(_: object, __: object, statement: str, values: Any, *___: object) -> None:
        if statement.startswith(("SELECT", "INSERT", "WITH")):
            asked.append((statement, values))

    newest = await ledger.append(entry(_CROWD + 1, parent=head))
    await ledger.find(AGENT, _CROWD, 1)
    assert len(await ledger.context(newest.id, max_characters=2000)) == 10
    assert len(await ledger.context(newest.id, max_characters=100_000)) == 463
    await ledger.since(AGENT, _CROWD - 5, limit=1000)
    await ledger.of_turn(AGENT, _CROWD)
    await ledger.transcript(AGENT, limit=20)
    await ledger.begin_call(AGENT, _CROWD, 1)
    await ledger.put_spec(SPEC)
    await ledger.get_spec(digest)
    await ledger.put_snapshot(snapshot(turn=1))
    await ledger.get_snapshot(AGENT)
    made = await ledger.put_rewind(rewound(_CROWD + 1, head, newest))
    assert await ledger.rewinds(AGENT, after=made.number - 1) == [made]
    await ledger.rewind_of(AGENT, made.id)
    assert await ledger.head(AGENT) == head.id
    await ledger.entries([head.id])
    await ledger.on_line(head.id, [newest.id])
    assert await ledger.left_behind(newest.id, head.id) == (head.id, [newest.id])
    await ledger.forks([head.id])
    await ledger.starting_with(AGENT, head.id[:12], above=head.id, limit=2)
    sqlalchemy.event.remove(engine, "before_cursor_execute", note)

    assert len(asked) >= 22
    tables = {"entries", "specs", "snapshots", "calls", "rewinds"}
    with engine.connect() as connection:
        scans = {statement: tables & set(plan(connection, statement, values)) for statement, values in asked}
        assert {statement: scanned for statement, scanned in scans.items() if scanned} == {}
        # The check itself can see one:
        assert plan(connection, "SELECT count(body) FROM entries", ()) == ["entries"]


# Long results, listings ----------------------------------------------------------------------------------------------


async def test_a_result_is_found_by_the_beginning_of_its_digest(ledger: Ledger) -> None:
    """Of its tenant alone; kept again, it is kept once. What is no digest finds nothing."""
    text = "an é and a \x00 and more"
    digest = await ledger.put_result("acme", text)
    assert digest == await ledger.put_result("acme", text) == hashlib.sha256(text.encode()).hexdigest()
    await ledger.put_result("acme", "another")
    assert await ledger.get_result("acme", digest[:16]) == text
    assert await ledger.get_result("acme", digest) == text
    for tenant, asked in (("other", digest), ("acme", digest[:15]), ("acme", f"{digest[:16]}%"), ("acme", "0" * 16)):
        assert await ledger.get_result(tenant, asked) is None


async def test_the_first_listing_of_a_version_counts(ledger: Ledger) -> None:
    """Workers may list a server at the same time, and must not offer different tools."""
    desk = ("acme", "desk")
    assert await ledger.get_listing(desk, "v1", "clock") is None
    first, second = [ListedTool(name="now", repeatable=True)], [ListedTool(name="then")]
    assert await ledger.put_listing(desk, "v1", "clock", first) == first
    assert await ledger.put_listing(desk, "v1", "clock", second) == first
    assert await ledger.put_listing(desk, "v2", "clock", second) == second
    assert await ledger.get_listing(desk, "v1", "clock") == first
    assert await ledger.get_listing(desk, "v1", "crm") is None


# Approvals -----------------------------------------------------------------------------------------------------------


def approval(number: int, *, agent: str = AGENT, approved: bool = True) -> Approval:
    at = datetime(2026, 11, 27, 12, number, tzinfo=UTC)
    return Approval(
        workflow_id=agent,
        turn=1,
        call=f"{agent}/1/1/{number}",
        tool="refund",
        arguments="{}",
        approved=approved,
        by="ada",
        why="fine",
        asked_at=at,
        decided_at=at,
    )


async def test_the_first_decision_about_a_call_counts(ledger: Ledger) -> None:
    """Newest first, of one agent or of all."""
    for number in (1, 2):
        await ledger.put_approval(approval(number))
    await ledger.put_approval(approval(1, approved=False))
    await ledger.put_approval(approval(3, agent=OTHER))
    assert await ledger.approvals(AGENT, limit=5) == [approval(2), approval(1)]
    assert await ledger.approvals(None, limit=2) == [approval(3, agent=OTHER), approval(2)]
