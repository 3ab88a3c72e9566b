"""A conversation that has grown too long is summed up, whatever dies meanwhile. The whole stack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from servers import eventually
from stack import Stack, perennial
from traffic import letter, workflow_of

from activities.entries import Entry
from workers.embedded import AGENT, MODEL
from workflows import names

SPEC = """
name: customer-service
tenant: store
instructions: Answer the customers.
context: {tokens: 1000, compact: true}
mailbox: {events_per_turn: 1}
"""


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    specs = tmp_path / "specs"
    specs.mkdir()
    (specs / "customer-service.yaml").write_text(SPEC)
    latency = {"PERENNIAL_REHEARSAL_LATENCY": "0.5"}
    async with Stack(tmp_path / "state", specs=specs, variables=latency) as running:
        yield running


async def transcript(stack: Stack, key: str) -> list[Entry]:
    async with stack.ledger() as ledger:
        return await ledger.transcript(workflow_of(key), limit=100)


async def write(stack: Stack, key: str, number: int) -> None:
    text = f"[[say I have read letter {number}.]] {number} " + "x" * 400
    await stack.send(letter(key, text, f"{key}-{number}"))


@pytest.mark.timeout(180)
async def test_kill_9_while_a_conversation_is_summed_up(stack: Stack, tmp_path: Path) -> None:
    """Issue 4, point 4 and P6: it is summed up once, all is answered, and what is pinned stays."""
    summary: Entry | None = None
    written = 0
    while summary is None:
        written += 1
        assert written < 15
        await write(stack, "calm", written)
        await stack.all_answered()
        summary = next((entry for entry in await transcript(stack, "calm") if entry.summary), None)
    assert summary.summary
    assert "more messages" in summary.summary.text
    assert summary.turn == written

    for number in range(1, written):
        await write(stack, "killed", number)
    await stack.all_answered()
    state = tmp_path / "state"
    first = (await transcript(stack, "killed"))[0]
    pinned = await perennial(
        *("pins", "add", "customer-service/killed", first.id[:12], "--why", "terms", "--json"), state=state
    )
    assert pinned.status == 0, pinned.err
    await write(stack, "killed", written)
    key = names.call_key(workflow_of("killed"), written, 1)

    async def summing_up() -> bool:
        call = (await stack.calls()).get(key)
        return bool(call and not call.answered)

    await eventually(summing_up)
    stack.kill(MODEL)
    stack.kill(AGENT)
    await stack.all_answered()
    entries = await transcript(stack, "killed")
    assert [entry.turn for entry in entries if entry.summary] == [written]
    assert stack.replies("killed") == stack.replies("calm")
    tally = await stack.tally()
    assert tally.kept, tally
    shown = await perennial("show", "customer-service/killed", state=state)
    assert "sums up" in shown.out
    listed = await perennial("pins", "customer-service/killed", state=state)
    assert first.id[:12] in listed.out
    assert "terms" in listed.out
    gone = await perennial("pins", "remove", "customer-service/killed", first.id[:12], state=state)
    assert "No entry" in gone.err + gone.out
