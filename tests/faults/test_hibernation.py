"""P1, P6: kill -9 while an agent falls asleep: it wakes as if it had never slept, and knows what it has answered."""

from __future__ import annotations

import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing

import pytest
import pytest_asyncio
from held import hold_inserts, is_written, let_go
from servers import eventually
from stack import Stack
from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError
from traffic import letter, workflow_of

from activities.ledger import sqlite_file
from workers.embedded import AGENT, TEMPORAL

_SPEC = """
name: customer-service
tenant: store
instructions: You answer customers.
hibernate_after_seconds: 0.5
"""

pytestmark = pytest.mark.slow


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("hibernation")
    specs = folder / "specs"
    specs.mkdir()
    (specs / "customer-service.yaml").write_text(_SPEC)
    async with Stack(folder / "state", specs=specs) as running:
        await running.send(letter("first", "[[say Hello.]]"))
        await eventually(lambda: asleep(running, "first"), 60)  # the ledger's tables are there now
        yield running


async def asleep(stack: Stack, key: str) -> bool:
    """Whether the agent's newest run has closed by itself."""
    try:
        described = await stack.client.get_workflow_handle(workflow_of(key)).describe()
    except RPCError:  # it has not begun
        return False
    return described.status is WorkflowExecutionStatus.COMPLETED


@pytest.mark.parametrize("done", [False, True])
async def test_an_agent_killed_while_it_falls_asleep_forgets_nothing(stack: Stack, *, done: bool) -> None:
    """In the middle of writing its snapshot, or when that is written and Temporal does not know of it."""
    key = f"customer-{int(done)}"
    path = sqlite_file(stack.ledger_url)
    assert path
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        hold_inserts(database, "snapshots", ends=done)
        await stack.send(letter(key, "[[say First.]]", f"{key}/first"))
        await stack.all_answered()
        await eventually(lambda: is_written(database))
        if done:
            stack.kill(TEMPORAL, signal.SIGSTOP)
            kept = "SELECT count(*) FROM snapshots WHERE workflow_id = ?"
            await eventually(lambda: database.execute(kept, [workflow_of(key)]).fetchone() == (1,), 60)
        killed = (AGENT, TEMPORAL) if done else (AGENT,)
        for process in killed:
            stack.kill(process)
        await eventually(lambda: not is_written(database))
        let_go(database)
    for process in reversed(killed):
        await stack.ready_again(process)
    await eventually(lambda: asleep(stack, key), 90)
    await stack.send(letter(key, "[[say First.]]", f"{key}/first"), letter(key, "[[say Second.]]", f"{key}/second"))
    await stack.all_answered()
    tally = await stack.tally()
    assert tally.kept, tally
    assert stack.replies(key) == ["First.", "Second."]
    first, second = (await stack.recorded())[workflow_of(key)]
    assert (second.parent, second.turn) == (first.id, 2), "it goes on behind what it has said"
    await eventually(lambda: asleep(stack, key), 60)  # or the next test would hold this agent's snapshot
