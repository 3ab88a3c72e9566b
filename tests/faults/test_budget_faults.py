"""P6, P10: kill -9 of the model worker in mid-call: its retry takes over what was set aside; all is counted once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from stack import Stack
from traffic import letter, workflow_of

from activities.spend import Account, Spending
from workers.embedded import MODEL
from workflows.budget import LimitScope, Spent
from workflows.names import memory_place, parse_workflow_id

_SPEC = """
name: customer-service
tenant: store
instructions: You answer customers.
budget:
  limits:
    - {scope: tenant, per: day, tokens: 15000} # one call may take 8,192 and what is sent: two at once do not fit
"""
KEY = "customer-1"


@pytest_asyncio.fixture(loop_scope="session")
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    specs = tmp_path / "specs"
    specs.mkdir()
    (specs / "customer-service.yaml").write_text(_SPEC)
    async with Stack(tmp_path / "state", specs=specs) as running:
        yield running


async def accounts(stack: Stack) -> list[Account]:
    """What was spent today, of the key, the agent and the tenant."""
    address = parse_workflow_id(workflow_of(KEY))
    async with stack.ledger() as ledger:
        spending = Spending(ledger)
        return [(await spending.accounts(memory_place(address, scope.value)))[0] for scope in LimitScope]


@pytest.mark.slow
async def test_a_model_worker_killed_between_setting_aside_and_recording_leaves_the_sum_right(stack: Stack) -> None:
    """The call in flight is made again under what its first try had set aside; others fit in behind it."""
    await stack.send(letter(KEY, "[[latency 3]] [[say Yes.]] Are you there?"))
    await stack.call_in_flight(KEY)
    held = await accounts(stack)
    assert {account.reserved.calls for account in held} == {1}
    stack.kill(MODEL)
    assert [account.reserved for account in await accounts(stack)] == [account.reserved for account in held]
    await stack.all_answered()
    await stack.send(letter(KEY, "[[say Fine.]] And now?"))
    await stack.all_answered()
    async with stack.ledger() as ledger:
        entries = await ledger.transcript(workflow_of(KEY), limit=10)
        totals = await ledger.totals()
    assert totals.calls_begun == 3, "one of them twice"
    used = sum(entry.usage.input_tokens + entry.usage.output_tokens for entry in entries)
    assert used > 0
    for account in await accounts(stack):
        assert account.spent == Spent(tokens=used, turns=2, calls=2), account.place
        assert account.reserved == Spent(), account.place
    assert (await stack.tally()).kept
