"""DESIGN.md P6: kill -9 any process at any moment; nothing is lost, none answered twice, nothing paid or done twice.

The oracle is that of the demo, `workers/tally.py`: it counts from what was sent, the reply topic, the ledger and the
dead-letter topic.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
import pytest_asyncio
from held import hold_inserts, is_written, let_go
from servers import eventually
from stack import ANY_PORTS, Stack
from temporalio.api.enums.v1 import PendingActivityState
from traffic import fetched, letter, workflow_of

from activities.demo_store import DATABASE, effects
from activities.ledger import sqlite_file
from activities.memory import Memory
from workers.embedded import AGENT, BROKER, INGEST, MODEL, REHEARSAL, TEMPORAL, EmbeddedStack, Ports
from workers.ports import free_ports
from workers.settings import Settings
from workflows.spec import Scope

_SLOW = "[[latency 1.5]] [[say That took a while.]]"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """The store's agents; each test has keys of its own."""
    async with Stack(tmp_path_factory.mktemp("kill")) as running:
        yield running


async def _a_stream(stack: Stack, prefix: str, agents: int = 6, events: int = 3) -> None:
    """Events for several agents, in turn; the first of each agent is sent twice."""
    for number in range(events):
        for agent in range(agents):
            key = f"{prefix}-{agent}"
            value = letter(key, f"[[say Answer {number} to {key}.]]", f"{key}/{number}")
            await stack.send(*[value] * (2 if number == 0 else 1))


@pytest.mark.parametrize("process", [INGEST, AGENT, MODEL, REHEARSAL, TEMPORAL])
async def test_a_process_that_is_killed_during_a_turn_costs_nothing(stack: Stack, process: str) -> None:
    """P6: with a turn in flight and a stream of events on its way, kill -9: all is answered, once, and paid once."""
    slow = f"{process}-slow"
    await stack.send(letter(slow, _SLOW))
    await _a_stream(stack, f"{process}-before")
    await stack.call_in_flight(slow)
    stack.kill(process)
    await _a_stream(stack, f"{process}-after")
    await stack.ready_again(process)
    await stack.all_answered()
    tally = await stack.tally()
    assert tally.kept, tally
    assert tally.failed == 0
    assert tally.accepted == len(stack.expected.pairs)
    assert stack.replies(slow) == ["That took a while."]


async def test_what_was_done_and_not_yet_reported_is_not_done_again(stack: Stack) -> None:
    """P6, P9: a model call recorded, a refund made, and everything killed before Temporal knew: both count once.

    That moment takes a few milliseconds. It is held here by stopping Temporal while the call and the refund are under
    way, so that their results have nowhere to go, and by killing all three when these are on disk.
    """
    thinks, refunds = "customer-01", "customer-02"
    refund = '{"order_id": "order-1002", "amount_cents": 700, "reason": "arrived damaged"}'
    await stack.send(letter(refunds, '[[call look_up_order {"order_id": "order-1002"}]]'))
    await stack.all_answered()  # the store's database is there now
    before = len(effects(stack.tools / DATABASE))
    with closing(sqlite3.connect(stack.tools / DATABASE, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")  # the refund waits for its turn to write
        await stack.send(letter(refunds, f"[[call refund {refund}]]"))
        await eventually(lambda: _in_tool(stack, refunds))
        await stack.send(letter(thinks, _SLOW))
        await stack.call_in_flight(thinks)
        stack.kill(TEMPORAL, signal.SIGSTOP)
        database.execute("ROLLBACK")
    await eventually(lambda: len(effects(stack.tools / DATABASE)) == before + 1)
    async with stack.ledger() as ledger:
        await eventually(lambda: ledger.of_turn(workflow_of(thinks), 1))
        for process in (AGENT, MODEL, TEMPORAL):
            stack.kill(process)
        for process in (TEMPORAL, AGENT, MODEL):
            await stack.ready_again(process)
        await stack.all_answered()
        tally = await stack.tally()
    assert tally.kept, tally
    assert stack.replies(thinks) == ["That took a while."]
    assert [effect.amount_cents for effect in effects(stack.tools / DATABASE)[before:]] == [700]
    for key in (thinks, refunds):
        assert await _tries(stack, key) == 2, "it was made again, since Temporal did not know of it"
    counted = {key: calls for key, calls in (await stack.calls()).items() if workflow_of(thinks) in key}
    assert [(calls.asked, calls.answered) for calls in counted.values()] == [(1, 1)]


@pytest.mark.parametrize("done", [False, True])
async def test_a_fact_is_kept_once_whatever_dies_while_it_is_kept(stack: Stack, *, done: bool) -> None:
    """P6, P9: kill -9 in the middle of `remember`'s transaction, or after it, before Temporal knows: one fact.

    That moment is held by a trigger that has SQLite count: for ever, or until Temporal is stopped.
    """
    key = f"customer-3{int(done)}"
    fact = '{"text": "Leave parcels with Okafor.", "scope": "key", "pinned": true}'
    await stack.send(letter(key, '[[call recall {"query": ""}]]'))
    await stack.all_answered()  # the tables are there now
    path = sqlite_file(stack.ledger_url)
    assert path
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        hold_inserts(database, "facts", ends=done)
        await stack.send(letter(key, f"[[call remember {fact}]]"))
        await eventually(lambda: _in_tool(stack, key))
        await eventually(lambda: is_written(database))
        if done:
            stack.kill(TEMPORAL, signal.SIGSTOP)
            kept = "SELECT count(*) FROM facts WHERE workflow_id = ?"
            await eventually(lambda: database.execute(kept, [workflow_of(key)]).fetchone() == (1,), 60)
        killed = (AGENT, TEMPORAL) if done else (AGENT,)
        for process in killed:
            stack.kill(process)
        await eventually(lambda: not is_written(database))
        let_go(database)
        for process in reversed(killed):
            await stack.ready_again(process)
    await stack.all_answered()
    async with stack.ledger() as ledger:
        facts = await Memory(ledger).kept(workflow_of(key), list(Scope), forgotten=True, limit=10)
    assert [one.fact.text for one in facts] == ["Leave parcels with Okafor."]
    assert await _tries(stack, key) == 2, "it was made again, since Temporal did not know of it"
    assert (await stack.tally()).kept


async def _in_tool(stack: Stack, key: str) -> bool:
    """Whether this agent has a tool call under way."""
    described = await stack.client.get_workflow_handle(workflow_of(key)).describe()
    started = PendingActivityState.PENDING_ACTIVITY_STATE_STARTED
    pending = described.raw_description.pending_activities
    return any(call.activity_type.name == "run_tool" and call.state == started for call in pending)


async def _tries(stack: Stack, key: str) -> int:
    """How often the activity of this agent was tried that was tried most often."""
    history = await stack.client.get_workflow_handle(workflow_of(key)).fetch_history()
    return max(event.activity_task_started_event_attributes.attempt for event in history.events)


async def test_a_killed_broker_forgets_what_it_held_and_nothing_else(tmp_path: Path) -> None:
    """P6: mail that agents had accepted is answered; topics are made again, and what comes then is answered too."""
    async with Stack(tmp_path) as stack:
        await _a_stream(stack, "before")
        await stack.send(letter("slow", _SLOW))
        await stack.call_in_flight("slow")
        await eventually(lambda: _accepted(stack))
        stack.kill(BROKER)
        await stack.ready_again(BROKER)
        await stack.observe_anew()
        await _a_stream(stack, "after")
        # A reply that was on the topic when the broker died may be gone with it; the ledger has it.
        await stack.all_answered(besides="/before-")
        expected = stack.expected
        await eventually(lambda: _recorded(stack, len(expected.pairs)))
        tally = await stack.tally()
    gone = len(stack.unanswered())
    assert tally.accepted == len(expected.pairs)
    assert (tally.lost, tally.answered_twice, tally.paid_twice, tally.failed) == (gone, 0, 0, 0)
    assert stack.replies("slow") == ["That took a while."], "it was published when the broker was back"


async def _recorded(stack: Stack, events: int) -> bool:
    return (await stack.tally()).accepted == events


async def _accepted(stack: Stack) -> bool:
    """Whether all events that were sent are with their agents."""
    expected = stack.expected
    metrics = await fetched(stack.addresses.metrics[INGEST])
    line = next(line for line in metrics.splitlines() if line.startswith("perennial_events_accepted_total{"))
    return float(line.split()[-1]) == len(expected.pairs) + expected.repeated


def test_the_port_of_a_process_that_restarts_is_not_given_to_another_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between kill -9 and its restart nothing listens there; a second stack that starts meanwhile chooses others."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where stacks tell each other which ports are theirs
    usual = Ports(**free_ports(dict.fromkeys(asdict(ANY_PORTS), 0)))

    def new_stack(name: str) -> EmbeddedStack:
        settings = Settings(state_dir=tmp_path / name, _env_file=None)
        return EmbeddedStack(settings, report=lambda _: None, ports=usual)

    first, second = new_stack("first"), new_stack("second")
    assert first._choose_ports() == usual
    others = asdict(second._choose_ports())
    assert not set(others.values()) & set(asdict(usual).values())
    for lock in (*first._port_locks, *second._port_locks):
        os.close(lock)
    third = new_stack("third")
    assert third._choose_ports() == usual, "they are free again once the stacks have ended"
    for lock in third._port_locks:
        os.close(lock)
