"""P6, P9: kill -9 while a call waits for people, and right after they have spoken: it is made once, and answered.

How often is judged from outside: by the store's own record of refunds, and by what a tool writes down on each call.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from servers import eventually
from stack import PERENNIAL, Stack, run
from temporalio.service import RPCError
from traffic import letter, workflow_of

from activities.demo_store import DATABASE, effects
from workers.embedded import AGENT, INGEST, TEMPORAL
from workflows import names
from workflows.messages import CompleteRequest, DecideRequest, OpenCall, Settlement, Status, Waits

pytestmark = pytest.mark.slow

_SPEC = """
name: customer-service
tenant: store
instructions: You answer customers.
tools:
  - python: activities.demo_store:refund
    approval: ask
  - python: slow_tools:order_part
    answers: later
"""
_TOOLS = '''
from pathlib import Path

from activities.tools import current_call


def order_part(part: str) -> str:
    """Order a part; the answer comes once it is there."""
    with (Path(__file__).parent / "ordered.txt").open("a") as made:
        made.write(current_call().idempotency_key + "\\n")
    return f"{part} is ordered"
'''
PROCESSES = [AGENT, INGEST, TEMPORAL]
ORDER = '[[call order_part {"part": "a pole"}]]'


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("approval")
    specs = folder / "specs"
    specs.mkdir()
    (specs / "customer-service.yaml").write_text(_SPEC)
    (specs / "slow_tools.py").write_text(_TOOLS)
    async with Stack(folder / "state", specs=specs) as running:
        yield running


def refund(number: int) -> str:
    """A message of the customer of this number that leads to a refund of so many cents."""
    wanted = {"order_id": f"order-{1000 + number}", "amount_cents": 100 + number, "reason": "as agreed"}
    return f"[[call refund {json.dumps(wanted)}]]"


def refunded(stack: Stack, number: int) -> list[int | None]:
    """What the store has paid back to this customer."""
    made = effects(stack.tools / DATABASE)
    return [effect.amount_cents for effect in made if effect.customer_id == f"customer-{number:02}"]


def ordered(stack: Stack, call: str) -> int:
    """How often the tool was called under this key."""
    return (stack.specs / "ordered.txt").read_text().splitlines().count(call)


async def waiting(stack: Stack, key: str, waits_for: Waits) -> OpenCall:
    """The call of this agent that waits, once it does."""
    found: list[OpenCall] = []

    async def waits() -> bool:
        handle = stack.client.get_workflow_handle(workflow_of(key))
        try:
            status = await handle.query(names.STATUS, result_type=Status)
        except RPCError:  # it has not begun to live
            return False
        found[:] = [call for call in status.open_calls if call.waits_for is waits_for]
        return bool(found) and status.state == "waiting"

    await eventually(waits)
    return found[0]


async def by_event(stack: Stack, key: str, kind: str, **data: object) -> None:
    """Settle a call by an event, as any team does; whatever is down, it is there when that is up again."""
    where = ("--tenant", "store", "--agent", "customer-service", "--subject", key)
    variables = {"PERENNIAL_STATE_DIR": str(stack.settings.state_dir), "PERENNIAL_SPECS": str(stack.specs)}
    sent = await run(*(str(PERENNIAL), "send", "--type", kind, *where, "--data", json.dumps(data)), variables=variables)
    assert sent.status == 0, sent.err


@pytest.mark.parametrize("process", PROCESSES)
async def test_what_dies_while_a_call_waits_for_approval_changes_nothing(stack: Stack, process: str) -> None:
    """The decision and more mail come while the process is down; the refund is made once, and all is answered."""
    number = 1 + PROCESSES.index(process)
    key = f"customer-{number:02}"
    await stack.send(letter(key, refund(number)))
    call = await waiting(stack, key, Waits.APPROVAL)
    assert refunded(stack, number) == []
    stack.kill(process)
    await stack.send(letter(key, "[[say Hello.]] Are you there?"))
    await by_event(stack, key, names.DECIDE_TYPE, call=call.call, approve=True, by="ada")
    await stack.ready_again(process)
    await stack.all_answered()
    assert refunded(stack, number) == [100 + number]
    first, second = stack.replies(key)
    assert "refunded_cents" in first
    assert second.endswith("Hello.")
    async with stack.ledger() as ledger:
        (kept,) = await ledger.approvals(workflow_of(key), limit=10)
    assert (kept.call, kept.approved, kept.by) == (call.call, True, "ada")
    assert (await stack.tally()).kept


@pytest.mark.parametrize("process", PROCESSES)
async def test_what_dies_right_after_the_decision_changes_nothing(stack: Stack, process: str) -> None:
    """Whoever decided was told that it is taken: so it is, and the refund is made once."""
    number = 11 + PROCESSES.index(process)
    key = f"customer-{number:02}"
    await stack.send(letter(key, refund(number)))
    call = await waiting(stack, key, Waits.APPROVAL)
    handle = stack.client.get_workflow_handle(workflow_of(key))
    request = DecideRequest(call=call.call, approve=True, by="ada")
    await handle.execute_update(names.DECIDE, request, result_type=Settlement)
    stack.kill(process)
    await stack.ready_again(process)
    await stack.all_answered()
    assert refunded(stack, number) == [100 + number]
    async with stack.ledger() as ledger:
        assert len(await ledger.approvals(workflow_of(key), limit=10)) == 1
    assert (await stack.tally()).kept


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("process", PROCESSES)
async def test_what_dies_between_a_call_and_its_answer_changes_nothing(
    stack: Stack, process: str, *, at_once: bool
) -> None:
    """The call is not made again; its answer comes while the process is down, or had just come when it died."""
    key = f"late-{process}-{at_once}"
    await stack.send(letter(key, ORDER))
    call = await waiting(stack, key, Waits.ANSWER)
    if at_once:
        handle = stack.client.get_workflow_handle(workflow_of(key))
        answer = CompleteRequest(call=call.call, content="It has arrived.", by="supplier")
        await handle.execute_update(names.COMPLETE, answer, result_type=Settlement)
    stack.kill(process)
    if not at_once:
        await by_event(stack, key, names.COMPLETE_TYPE, call=call.call, content="It has arrived.")
    await stack.ready_again(process)
    await stack.all_answered()
    assert ordered(stack, call.call) == 1
    (reply,) = stack.replies(key)
    assert "It has arrived." in reply
    assert (await stack.tally()).kept
