"""`order: strict`: what comes behind a dead letter waits for it. The whole stack, with the command that people use."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from servers import eventually
from stack import STORE, Stack, perennial
from temporalio.service import RPCError

from workers.embedded import AGENT, INGEST, TEMPORAL
from workflows import names
from workflows.agent import AgentWorkflow
from workflows.messages import AskRequest, Status
from workflows.names import Address

TOPIC = "store.payments"
SPEC = """
name: bookkeeper
tenant: store
instructions: Book what you are told.
order: strict
mailbox: {{events_per_turn: 1}}
subscriptions:
  - {{topic: store.payments, key: {key}}}
"""


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    specs = tmp_path / "specs"
    specs.mkdir()
    (specs / "bookkeeper.yaml").write_text(SPEC.format(key="data.account"))
    shutil.copy(STORE / "security.yaml", specs)  # relaxed, and nothing to it
    async with Stack(tmp_path / "state", specs=specs) as running:
        yield running


def payment(account: str, number: int, **data: str) -> bytes:
    event = {
        "specversion": "1.0",
        "id": f"{account}-{number}",
        "source": "/bank",
        "type": "store.payment",
        "subject": account,
        "data": {"account": account, "text": f"[[say booked {number}]]", **data},
    }
    return json.dumps(event).encode()


def keyless(account: str, number: int) -> bytes:
    """The bank has forgotten to say in the data which account it is."""
    event = json.loads(payment(account, number))
    del event["data"]["account"]
    return json.dumps(event).encode()


def bookkeeper(account: str) -> str:
    return names.workflow_id(Address("store", "bookkeeper", account))


async def status(stack: Stack, account: str) -> Status:
    return await stack.client.get_workflow_handle(bookkeeper(account)).query(AgentWorkflow.status)


async def held(stack: Stack, account: str, behind: int) -> Status:
    """The agent's status, once so many events wait behind a dead letter."""

    async def waits() -> Status | None:
        try:
            now = await status(stack, account)
        except RPCError:
            return None  # it has had no mail yet
        return now if now.state == "held" and now.waiting == behind + 1 else None

    found = await eventually(waits)
    assert found
    return found


async def booked(stack: Stack, account: str, count: int) -> list[str]:
    """The ids of the payments that the agent has taken, in order, once there are so many."""

    async def enough() -> list[str] | None:
        async with stack.ledger() as ledger:
            entries = await ledger.transcript(bookkeeper(account), limit=100)
        taken = [reference.id for entry in entries for reference in entry.answers if reference.source == "/bank"]
        return taken if len(taken) >= count else None

    found = await eventually(enough)
    assert found
    return found


async def test_mail_behind_a_dead_letter_waits_until_that_is_dropped(stack: Stack, tmp_path: Path) -> None:
    """Whatever dies meanwhile. Other agents do not notice, and a person is answered."""
    await stack.send(payment("a", 1), b"not JSON", payment("a", 2), payment("b", 1), topic=TOPIC)
    await stack.send(b"also not JSON", topic=TOPIC, key=b"a")
    await stack.send(payment("a", 3), topic=TOPIC)
    assert await booked(stack, "b", 1) == ["b-1"]
    assert await booked(stack, "a", 2) == ["a-1", "a-2"], "a record without a key holds nobody"
    waiting = await held(stack, "a", behind=1)
    assert waiting.held_by
    assert waiting.held_by.startswith(f"{TOPIC}/")

    for process in (AGENT, INGEST, TEMPORAL):
        stack.kill(process)
    for process in (TEMPORAL, AGENT, INGEST):
        await stack.ready_again(process)
    handle = stack.client.get_workflow_handle(bookkeeper("a"))
    reply = await handle.execute_update(AgentWorkflow.ask, AskRequest(text="[[say I wait for the bank.]]"))
    assert reply.text.endswith("I wait for the bank.")
    await stack.send(payment("a", 4), topic=TOPIC)
    await held(stack, "a", behind=2)

    state = tmp_path / "state"
    listed = (await perennial("dlq", "list", "--json", state=state)).json
    (letter,) = [one for one in listed if one["letter"]["held"]]
    assert letter["letter"]["held"] == [bookkeeper("a")]
    shown = await perennial("dlq", "show", letter["id"], state=state)
    assert f"{bookkeeper('a')}: later mail waits" in shown.out
    dropped = await perennial("dlq", "drop", letter["id"], "--why", "noise on the line", state=state)
    assert dropped.status == 0, dropped.err
    assert await booked(stack, "a", 4) == ["a-1", "a-2", "a-3", "a-4"]
    assert (await status(stack, "a")).held_by is None


async def test_a_redriven_event_is_taken_in_its_old_place(stack: Stack, tmp_path: Path) -> None:
    """Redriven too early it comes back as another letter; once the spec is mended, all goes on in the bank's order."""
    state = tmp_path / "state"
    await stack.send(payment("a", 1), keyless("a", 2), payment("a", 3), payment("a", 4), topic=TOPIC)
    await held(stack, "a", behind=2)
    early = await perennial("dlq", "redrive", "--all", state=state)
    assert early.status == 0, early.err

    async def back_again() -> bool:
        letters = (await perennial("dlq", "list", "--json", state=state)).json
        return len(letters) == 1 and letters[0]["letter"]["held"] == [bookkeeper("a")]

    await eventually(back_again, 60)
    (tmp_path / "specs" / "bookkeeper.yaml").write_text(SPEC.format(key="subject"))
    # Killed before it has committed, it would read the early one again by the mended spec, and rightly accept it.
    reader = stack.pid(INGEST)
    stack.kill(INGEST, signal.SIGTERM)
    await eventually(lambda: stack.pid(INGEST) != reader)
    await stack.ready_again(INGEST)
    await stack.send(payment("a", 5), topic=TOPIC)
    await held(stack, "a", behind=3)
    mended = await perennial("dlq", "redrive", "--all", "--why", "the spec named the wrong field", state=state)
    assert mended.status == 0, mended.err
    assert await booked(stack, "a", 5) == ["a-1", "a-2", "a-3", "a-4", "a-5"]
    assert (await status(stack, "a")).duplicates == 0
