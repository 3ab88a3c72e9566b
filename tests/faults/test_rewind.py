"""P6, P8: kill -9 in the middle of a rewind changes nothing: it is made once, and the next turn goes on behind it.

The middle is held open by a lock on the ledger, for which the recording of the rewind has to wait.
"""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager

import pytest
import pytest_asyncio
from servers import eventually
from stack import Stack
from temporalio.api.enums.v1 import PendingActivityState
from traffic import letter, workflow_of

from activities.entries import Entry
from activities.ledger import sqlite_file
from workers import history
from workers.embedded import AGENT, TEMPORAL
from workers.exits import CommandError
from workflows import names
from workflows.messages import RewindRequest, Rewound


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """The store's agents; each test has a key of its own."""
    async with Stack(tmp_path_factory.mktemp("rewind")) as running:
        yield running


async def _past(stack: Stack, key: str) -> list[Entry]:
    """Two turns of an agent, and their entries."""
    for number in (1, 2):
        await stack.send(letter(key, f"[[say Answer {number}.]]"))
        await stack.all_answered()
    return await _entries(stack, key)


async def _entries(stack: Stack, key: str) -> list[Entry]:
    async with stack.ledger() as ledger:
        return await ledger.transcript(workflow_of(key), limit=10)


async def _rewinds(stack: Stack, key: str) -> list[Rewound]:
    async with stack.ledger() as ledger:
        return await ledger.rewinds(workflow_of(key))


@contextmanager
def _ledger_locked(stack: Stack) -> Iterator[None]:
    """While nobody can write to the ledger."""
    with closing(sqlite3.connect(str(sqlite_file(stack.ledger_url)), isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("ROLLBACK")


async def _rewind(stack: Stack, key: str, entry: Entry) -> Rewound:
    """As a person who tries again when a server does not answer."""
    request = RewindRequest(entry=entry.id, id=f"rewind {key}", by="tests", reason="kill -9")
    address = names.parse_workflow_id(workflow_of(key))

    async def made() -> Rewound | None:
        try:
            return await history.rewind(stack.client, stack.settings, address, request, seconds=90)
        except CommandError:
            return None

    return await eventually(made, 100)


async def _recording(stack: Stack, key: str) -> bool:
    """Whether the agent's rewind is being recorded."""
    described = await stack.client.get_workflow_handle(workflow_of(key)).describe()
    started = PendingActivityState.PENDING_ACTIVITY_STATE_STARTED
    pending = described.raw_description.pending_activities
    return any(call.activity_type.name == "record_rewind" and call.state == started for call in pending)


async def _goes_on_behind(stack: Stack, key: str, past: list[Entry]) -> None:
    """One rewind is recorded, the turn after it hangs on its entry, and the oracle has no complaint."""
    await stack.all_answered()
    (made,) = await _rewinds(stack, key)
    assert (made.head, made.old_head, made.turn) == (past[0].id, past[1].id, 2)
    entries = await _entries(stack, key)
    assert [(entry.turn, entry.parent) for entry in entries] == [(1, None), (2, past[0].id), (3, past[0].id)]
    assert stack.replies(key) == ["Answer 1.", "Answer 2.", "Answer 3."]
    assert (await stack.tally()).kept


@pytest.mark.parametrize("process", [AGENT, TEMPORAL])
async def test_a_process_that_is_killed_while_a_rewind_is_recorded_costs_nothing(stack: Stack, process: str) -> None:
    """Whoever asked gets the answer, and mail that came meanwhile is taken behind the entry."""
    key = f"{process}-killed"
    past = await _past(stack, key)
    with _ledger_locked(stack):
        rewinding = asyncio.create_task(_rewind(stack, key, past[0]))
        await eventually(lambda: _recording(stack, key))
        stack.kill(process)
    await stack.ready_again(process)
    await stack.send(letter(key, "[[say Answer 3.]]"))
    await rewinding
    await _goes_on_behind(stack, key, past)


async def test_a_rewind_that_was_recorded_and_not_reported_is_made_once(stack: Stack) -> None:
    """On disk, and everything killed before Temporal knew of it: it is found, and not made again."""
    past = await _past(stack, "unreported")
    rewinding = await _recorded_and_not_reported(stack, "unreported", past[0])
    stack.kill(TEMPORAL)
    for process in (TEMPORAL, AGENT):
        await stack.ready_again(process)
    await stack.send(letter("unreported", "[[say Answer 3.]]"))
    await rewinding
    await _goes_on_behind(stack, "unreported", past)


async def test_an_agent_that_is_terminated_right_after_a_rewind_was_recorded_wakes_rewound(stack: Stack) -> None:
    """Its workflow never knew: the ledger does."""
    past = await _past(stack, "terminated")
    rewinding = await _recorded_and_not_reported(stack, "terminated", past[0])
    rewinding.cancel()
    stack.kill(TEMPORAL, signal.SIGCONT)
    await stack.client.get_workflow_handle(workflow_of("terminated")).terminate()
    await stack.ready_again(AGENT)
    await stack.send(letter("terminated", "[[say Answer 3.]]"))
    await _goes_on_behind(stack, "terminated", past)


async def _recorded_and_not_reported(stack: Stack, key: str, entry: Entry) -> asyncio.Task[Rewound]:
    """Rewind, with the record on disk, Temporal suspended before it could be told, and the agent worker killed."""
    with _ledger_locked(stack):
        rewinding = asyncio.create_task(_rewind(stack, key, entry))
        await eventually(lambda: _recording(stack, key))
        stack.kill(TEMPORAL, signal.SIGSTOP)
    await eventually(lambda: _rewinds(stack, key))
    stack.kill(AGENT)
    return rewinding
