"""P1, P6: kill -9 of the agent worker while an agent waits for its own wake-up changes nothing, awake or asleep."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from servers import eventually
from stack import Stack
from talking import ask
from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError
from traffic import letter, workflow_of

from activities.entries import Entry
from workers.embedded import AGENT
from workflows import names
from workflows.messages import Status

_AWAKE, _ASLEEP, _QUIET = "customer-service", "night-desk", "day-desk"
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
    now = datetime.now(UTC)
    hours = {"from": f"{now - timedelta(hours=1):%H:%M}", "to": f"{now + timedelta(seconds=90):%H:%M}"}
    quiet = f"{_SPEC}quiet_hours: {json.dumps(hours).replace('{', '{{').replace('}', '}}')}\n"
    (specs / "quiet.yaml").write_text(quiet.format(name=_QUIET, idle="null"))
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


@pytest.mark.timeout(240)
async def test_mail_that_waits_for_the_end_of_quiet_hours_is_answered_then_though_the_worker_was_killed(
    stack: Stack,
) -> None:
    """P1, P6: a question is answered meanwhile; the rest in its turn, once."""
    await stack.send(letter(KEY, "[[say Good morning.]] Hello?", agent=_QUIET))
    handle = stack.client.get_workflow_handle(workflow_of(KEY, _QUIET))

    async def is_quiet() -> bool:
        with contextlib.suppress(RPCError):  # it is not there yet, or its worker is not
            status: Status = await handle.query(names.STATUS, result_type=Status)
            return status.state == "quiet"
        return False

    await eventually(is_quiet)
    stack.kill(AGENT)
    await stack.ready_again(AGENT)
    assert (await ask(stack.client, handle.id, stack.settings.task_queue, "[[say Yes.]] Are you up?")).text == "Yes."
    assert stack.replies(KEY, _QUIET) in ([], ["Yes."])
    await stack.all_answered(150)
    assert stack.replies(KEY, _QUIET) == ["Yes.", "Good morning."]
    assert (await stack.tally()).kept
