"""Tool calls that wait, on the real stack: people see them, and settle them by command, by event or by update."""

from __future__ import annotations

import asyncio
import getpass
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from servers import eventually
from stack import PERENNIAL, Finished, Stack, run
from traffic import letter, workflow_of

from activities.demo_store import DATABASE, effects
from workflows import names
from workflows.messages import CompleteRequest, DecideRequest, Settlement

_SPEC = """
name: customer-service
tenant: store
instructions: You answer customers.
tools:
  - python: desk_tools:pay
    approval:
      default: allow
      rules:
        - when: {amount_cents: {above: 20000}}
          then: ask
      expires_seconds: 86400
  - python: desk_tools:order_part
    answers: later
    answer_within_seconds: 86400
"""
_TOOLS = '''
def pay(amount_cents: int) -> str:
    """Pay."""
    return f"{amount_cents} cents are paid"


def order_part(part: str) -> str:
    """Order a part; the answer comes once it is there."""
    return f"{part} is ordered"
'''
PAY = '[[call pay {"amount_cents": 30000}]]'
ORDER = '[[call order_part {"part": "a pole"}]]'
ME = getpass.getuser()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("approval")
    specs = folder / "specs"
    specs.mkdir()
    (specs / "customer-service.yaml").write_text(_SPEC)
    (specs / "desk_tools.py").write_text(_TOOLS)
    async with Stack(folder / "state", specs=specs) as running:
        yield running


async def perennial(stack: Stack, *arguments: str) -> Finished:
    """Run a command that knows of the stack and of its specs."""
    variables = {"PERENNIAL_STATE_DIR": str(stack.settings.state_dir), "PERENNIAL_SPECS": str(stack.specs)}
    return await run(str(PERENNIAL), *arguments, variables=variables)


async def waiting(stack: Stack, key: str, *group: str) -> list[Any]:
    """The calls of this agent that wait, as the command has them for all agents, once there are some."""
    found: list[Any] = []

    async def listed() -> bool:
        shown = await perennial(stack, *group, "--json")
        assert shown.status == 0, shown.err
        found[:] = [one for one in shown.json if one["agent"] == f"store/customer-service/{key}"]
        return bool(found)

    await eventually(listed)
    return found


async def test_a_person_sees_a_call_and_has_it_made(stack: Stack) -> None:
    """What waits is shown wherever one looks; mail is taken meanwhile; who decided, and why, is kept."""
    who = "store/customer-service/ada"
    await stack.send(letter("ada", PAY))
    (call,) = await waiting(stack, "ada", "approvals")
    assert (call["tool"], call["call"]) == ("pay", f"{workflow_of('ada')}/1/1/0")
    await stack.send(letter("ada", "[[say Later.]] And hello."))
    await eventually(lambda: _has_accepted(stack, "ada", 2))

    listed = await perennial(stack, "approvals", "customer-service/ada")
    assert listed.out.splitlines()[0].split() == ["CALL", "SINCE", "UNTIL", "WHAT"]
    assert 'pay {"amount_cents": 30000}' in listed.out
    assert f"perennial approvals approve {call['call']} --reason" in listed.err
    shown = await perennial(stack, "show", who)
    assert f"perennial approvals approve {call['call']} --reason ..." in shown.out
    assert "waits for approval of pay" in shown.out
    agents = await perennial(stack, "agents", "--json")
    assert {one["agent"]: one["state"] for one in agents.json}[who] == "waiting"
    assert (await perennial(stack, "approvals", "--tenant", "nobody")).err.startswith("No tool call waits")
    assert (await perennial(stack, "tool", "list", "customer-service/ada", "--json")).json == []

    approved = await perennial(stack, "approvals", "approve", call["call"], "--reason", "as agreed")
    assert approved.out == f"{call['call']} is approved by {ME}: as agreed\n", approved.err
    await stack.all_answered()
    first, second = stack.replies("ada")
    assert "30000 cents are paid" in first
    assert second.endswith("Later.")
    again = await perennial(stack, "approvals", "approve", call["call"])
    assert again.status == 0
    otherwise = await perennial(stack, "approvals", "refuse", call["call"])
    assert otherwise.status == 1
    assert f"is settled already: it was approved by {ME} at" in otherwise.err
    decided = await perennial(stack, "approvals", "customer-service/ada", "--decided", "--json")
    assert [(one["call"], one["approved"], one["by"], one["why"]) for one in decided.json] == [
        (call["call"], True, ME, "as agreed")
    ]
    everywhere = await perennial(stack, "approvals", "--decided", "--tenant", "store")
    assert f"approved  {ME}" in everywhere.out
    told = await perennial(stack, "tail", "--from-beginning", "--agent", "customer-service/ada", "--count", "4")
    assert 'pay {"amount_cents": 30000} waits for a decision until' in told.out
    assert f'pay {{"amount_cents": 30000}}: approved by {ME}: as agreed' in told.out
    assert (await stack.tally()).kept


async def _has_accepted(stack: Stack, key: str, events: int) -> bool:
    shown = await perennial(stack, "show", f"customer-service/{key}", "--limit", "0", "--json")
    return bool(shown.json["status"]["accepted"] == events)


async def _by_event(stack: Stack, key: str, kind: str, **data: object) -> None:
    """Have an event of this kind reach the agent by way of Kafka, as any team's would."""
    sent = await perennial(
        stack,
        *("send", "--type", kind, "--tenant", "store", "--agent", "customer-service", "--subject", key),
        *("--source", "/crm", "--data", json.dumps(data)),
    )
    assert sent.status == 0, sent.err


async def test_a_decision_comes_by_kafka(stack: Stack) -> None:
    """No reply of its own: it is no mail. The agent is told who refused, and why, and goes on."""
    await stack.send(letter("bea", PAY))
    (call,) = await waiting(stack, "bea", "approvals")
    await _by_event(stack, "bea", names.DECIDE_TYPE, call=call["call"], approve=False, by="eve", why="too much")
    await stack.all_answered()
    (reply,) = stack.replies("bea")
    assert "was refused by eve at" in reply
    assert "too much" in reply
    decided = await perennial(stack, "approvals", "customer-service/bea", "--decided", "--json")
    assert [(one["approved"], one["by"]) for one in decided.json] == [(False, "eve")]
    assert (await stack.tally()).kept


async def test_a_decision_comes_by_update(stack: Stack) -> None:
    """With the ordinary Temporal client, as from the Web UI."""
    await stack.send(letter("cleo", PAY))
    (call,) = await waiting(stack, "cleo", "approvals")
    request = DecideRequest(call=call["call"], approve=True, by="cleo's boss")
    handle = stack.client.get_workflow_handle(workflow_of("cleo"))
    settlement = await handle.execute_update(names.DECIDE, request, result_type=Settlement)
    assert settlement.approved
    await stack.all_answered()
    assert "30000 cents are paid" in stack.replies("cleo")[0]


async def test_whoever_asks_is_told_that_a_decision_is_waited_for(stack: Stack) -> None:
    """The question need not be asked anew: its reply is there by its id, once somebody has decided."""
    ask = ("ask", "customer-service/gil", PAY, "--id", "q-1", "--timeout")
    asked = await perennial(stack, *ask, "6")
    assert asked.status == 1
    assert "pay waits for a decision: `perennial approvals store/customer-service/gil`" in asked.err
    assert "Ask again with `--id q-1`" in asked.err
    (call,) = await waiting(stack, "gil", "approvals")
    assert (await perennial(stack, "approvals", "approve", call["call"])).status == 0
    again = await perennial(stack, *ask, "60")
    assert "30000 cents are paid" in again.out


@pytest.mark.parametrize("way", ["text", "file", "event", "update"])
async def test_an_answer_comes_from_outside(stack: Stack, tmp_path: Path, way: str) -> None:
    """By the command, in either form, by an event, or by update; the agent goes on with what it says."""
    await stack.send(letter(way, ORDER))
    (call,) = await waiting(stack, way, "tool", "list")
    shown = await perennial(stack, "show", f"customer-service/{way}")
    assert f"perennial tool complete {call['call']} TEXT" in shown.out
    answer = f"It came by {way}."
    if way == "event":
        await _by_event(stack, way, names.COMPLETE_TYPE, call=call["call"], content=answer)
    elif way == "update":
        handle = stack.client.get_workflow_handle(workflow_of(way))
        request = CompleteRequest(call=call["call"], content=answer, by="supplier")
        await handle.execute_update(names.COMPLETE, request, result_type=Settlement)
    else:
        (tmp_path / "answer.txt").write_text(answer)
        said = [answer] if way == "text" else ["--file", str(tmp_path / "answer.txt")]
        completed = await perennial(stack, "tool", "complete", call["call"], *said)
        assert completed.out == f"{call['call']} is answered by {ME}\n", completed.err
    await stack.all_answered()
    assert answer in stack.replies(way)[0]
    assert "is ordered" not in stack.replies(way)[0]


async def test_an_answer_says_what_went_wrong(stack: Stack) -> None:
    """The model is told that the call failed, and with which words."""
    await stack.send(letter("dot", ORDER))
    (call,) = await waiting(stack, "dot", "tool", "list")
    wrong = await perennial(stack, "approvals", "approve", call["call"])
    assert wrong.status == 1
    assert f"is made, and waits for its answer: `perennial tool complete {call['call']}`" in wrong.err
    failed = await perennial(stack, "tool", "complete", call["call"], "The supplier is closed.", "--failed")
    assert failed.status == 0, failed.err
    await stack.all_answered()
    async with stack.ledger() as ledger:
        *_, last = await ledger.transcript(workflow_of("dot"), limit=2)
    assert [message.model_dump()["outcome"] for message in last.messages[:1]] == ["error"]
    assert "The supplier is closed." in last.messages[0].model_dump()["content"]


async def test_the_commands_say_what_they_cannot_do(stack: Stack) -> None:
    """P14: one line, exit status 2 or 1, and no agent begins to live by it."""
    await stack.send(letter("fay", "[[say Hello.]]"))
    await stack.all_answered()
    fay, never = f"{workflow_of('fay')}/1/1/0", f"{workflow_of('nobody')}/1/1/0"
    for status, arguments, complaint in [
        (2, ("approvals", "approve", "order-1"), "'order-1' is no call's id"),
        (2, ("approvals", "refuse", workflow_of("fay")), "is no call's id"),
        (2, ("approvals", "approve"), "Missing argument 'CALL'"),
        (2, ("approvals", "customer-service/fay", "--tenant", "store"), "name one AGENT, or give --tenant"),
        (1, ("approvals", "customer-service/nobody"), "There has never been an agent store/customer-service/nobody"),
        (1, ("approvals", "approve", never), "There has never been an agent store/customer-service/nobody"),
        (1, ("approvals", "approve", fay), f"No call {fay} waits for a decision here. `perennial approvals` and"),
        (1, ("tool", "complete", fay, "Yes."), f"No call {fay} waits for an answer here."),
        (2, ("tool", "complete", fay), "give the answer either as TEXT or by --file"),
        (2, ("tool", "complete", fay, "Yes.", "--file", "-"), "give the answer either as TEXT or by --file"),
        (2, ("tool", "complete", fay, "--file", "/nowhere"), "/nowhere can't be read: No such file"),
        (2, ("tool", "complete", fay, "--file", "/bin/sh"), "/bin/sh is no text in UTF-8"),
    ]:
        refused = await perennial(stack, *arguments)
        assert refused.status == status, (arguments, refused.err)
        assert complaint in refused.err, refused.err
        assert "Traceback" not in refused.err


@pytest.mark.parametrize("verb", ["approve", "refuse"])
async def test_a_big_refund_in_the_demo_company_waits_for_a_person(tmp_path: Path, verb: str) -> None:
    """As the README tells: a colleague asks for it, another one decides; the store's books say what was paid."""
    async with Stack(tmp_path) as stack:
        question = "Refund order-1024, as agreed."
        asking = asyncio.create_task(perennial(stack, "ask", "customer-service/customer-24", question))
        (call,) = await waiting(stack, "customer-24", "approvals")
        assert call["call"] == f"{workflow_of('customer-24')}/1/2/0"
        assert json.loads(call["arguments"])["amount_cents"] == 24900
        assert effects(stack.tools / DATABASE) == []
        decided = await perennial(stack, "approvals", verb, call["call"], "--reason", "I have asked the carrier")
        assert decided.status == 0, decided.err
        asked = await asking
        paid = [effect.amount_cents for effect in effects(stack.tools / DATABASE)]
    assert asked.status == 0, asked.err
    if verb == "approve":
        assert "order-1024 is refunded: 249.00 EUR." in asked.out
        assert paid == [24900]
    else:
        assert f"order-1024 is not refunded. Not made: this call was refused by {ME} at" in asked.out
        assert "I have asked the carrier" in asked.out
        assert paid == []
