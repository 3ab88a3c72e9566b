"""P1, P6: kill -9 of the agent worker while an agent waits for its own wake-up changes nothing, awake or asleep."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from servers import eventually
from stack import Stack
from temporalio.client import WorkflowExecutionStatus
from traffic import letter, workflow_of

from activities.entries import Entry
from workers.embedded import AGENT
from workflows import names

_AWAKE, _ASLEEP = "customer-service", "night-desk"
_SPEC = """
name: {name}
tenant: store
instructions: You answer customers.
wake_ups: {{}}
hibernate_after_seconds: {idle}
"""
KEY = "customer-1"

pytestmark = pytest.mark.slow


@pytest_asyncio.fixture(loop_scope="session")
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    specs = tmp_path / "specs"
    specs.mkdir()
    for name, idle in ((_AWAKE, "null"), (_ASLEEP, "0.5")):
        (specs / f"{name}.yaml").write_text(_SPEC.format(name=name, idle=idle))
    async with Stack(tmp_path / "state", specs=specs) as running:
        yield running


async def woken(stack: Stack, agent: str) -> list[Entry]:
    """The entries of the turns in which the agent had woken itself."""
    async with stack.ledger() as ledger:
        entries = await ledger.transcript(workflow_of(KEY, agent), limit=100)
    return [entry for entry in entries if any(answered.type == names.WAKE_TYPE for answered in entry.answers)]


@pytest.mark.parametrize("agent", [_AWAKE, _ASLEEP])
async def test_a_wake_up_rings_once_though_its_worker_was_killed(stack: Stack, agent: str) -> None:
    """Whether a timer of the open agent waits, or the alarm of one whose workflow is closed."""
    wake_me = json.dumps({"note": "[[say I am awake.]]", "in": 6})
    await stack.send(letter(KEY, f"[[call wake_me {wake_me}]] Look again, please.", agent=agent))
    await stack.all_answered()
    handle = stack.client.get_workflow_handle(workflow_of(KEY, agent))

    async def is_closed() -> bool:
        return (await handle.describe()).status is WorkflowExecutionStatus.COMPLETED

    if agent == _ASLEEP:
        await eventually(is_closed)
        await stack.client.get_workflow_handle(names.alarm_id(handle.id)).describe()
    assert not await woken(stack, agent), "this was too slow to try anything"
    stack.kill(AGENT)
    await stack.ready_again(AGENT)
    await eventually(lambda: len(stack.replies(KEY, agent)) == 2)
    if agent == _ASLEEP:
        await eventually(is_closed)
    (entry,) = await woken(stack, agent)
    assert entry.turn == 2
    assert stack.replies(KEY, agent)[1] == "I am awake."
    assert (await stack.tally()).kept
