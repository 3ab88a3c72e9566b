"""Tool calls that wait: for a human's decision, or for an answer from outside. On a Temporal server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from fakes import World, answer, event
from servers import TemporalServer
from talking import cancel, deliver
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment

from workflows import names
from workflows.approval import ApprovalPolicy
from workflows.events import Event
from workflows.messages import (
    CompleteRequest,
    DecideRequest,
    Decision,
    Intervention,
    Settlement,
    Status,
    ThinkRequest,
    ToolCall,
    ToolOutcome,
    ToolRequest,
    ToolResult,
    Waits,
)
from workflows.spec import ControlSpec, ToolControl

Eventually = Callable[..., Awaitable[Any]]
ME = Intervention(by="tester", reason="a test")
REFUND = ToolCall(id="c1", name="refund", arguments=json.dumps({"amount_cents": 30_000}))
LOOK = ToolCall(id="c2", name="look")
ORDER = ToolCall(id="c3", name="order")
POLICY = ApprovalPolicy.model_validate(
    {
        "default": "allow",
        "rules": [
            {"when": {"amount_cents": {"above": 900_000}}, "then": "refuse"},
            {"when": {"amount_cents": {"above": 20_000}}, "then": "ask"},
        ],
    }
)


def spec(policy: ApprovalPolicy = POLICY, **refund: Any) -> ControlSpec:
    return ControlSpec(
        digest="s",
        tools={
            "refund": ToolControl(approval=policy, **{"repeatable": False, **refund}),
            "look": ToolControl(),
            "order": ToolControl(answer_within=timedelta(days=3), repeatable=False),
        },
    )


def calling(*calls: ToolCall) -> Callable[[ThinkRequest], Decision]:
    """A model that makes these calls, and then answers with their results."""

    def think(request: ThinkRequest) -> Decision:
        if request.results:
            return answer(" | ".join(f"{result.name}: {result.content}" for result in request.results), request)
        if request.turn > 1:
            return answer("heard " + " ".join(one.id for one in request.events), request)
        return answer("", request, *calls)

    return think


def did(request: ToolRequest) -> ToolResult:
    return ToolResult(call_id=request.call.id, name=request.call.name, content="done")


def world_of(*calls: ToolCall, policy: ApprovalPolicy = POLICY, **refund: Any) -> World:
    return World(think_with=calling(*calls), tool=did, spec=spec(policy, **refund))


async def status(handle: WorkflowHandle) -> Status:
    return await handle.query(names.STATUS, result_type=Status)


async def waiting(handle: WorkflowHandle, eventually: Eventually) -> Status:
    async def waits() -> Status | None:
        now = await status(handle)
        return now if now.state == "waiting" else None

    now: Status = await eventually(waits)
    return now


async def decide(handle: WorkflowHandle, call: str, *, approve: bool, by: str = "ada", why: str = "fine") -> Settlement:
    request = DecideRequest(call=call, approve=approve, by=by, why=why)
    return await handle.execute_update(names.DECIDE, request, result_type=Settlement)


def made(world: World) -> list[str]:
    return [request.call.name for request in world.tool_requests]


def key(agent_id: str, number: int = 0) -> str:
    return names.call_key(agent_id, 1, 1, number)


async def test_a_call_waits_for_its_approval_and_is_then_made_once(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """It shows what it waits for; its siblings are made meanwhile, mail is accepted, and who decided is recorded."""
    world = world_of(REFUND, LOOK)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        now = await waiting(handle, eventually)
        await eventually(lambda: made(world) == ["look"])
        await eventually(lambda: world.lifecycle(names.APPROVAL_REQUESTED_TYPE))
        await deliver(client, agent_id, queue, event(2))
        (open_call,) = now.open_calls
        assert (open_call.call, open_call.tool, open_call.waits_for) == (key(agent_id), "refund", Waits.APPROVAL)
        assert now.doing == f"turn 1; waits for approval of refund {REFUND.arguments} ({key(agent_id)})"
        settled = await decide(handle, key(agent_id), approve=True, why="a good customer")
        assert (settled.approved, settled.by) == (True, "ada")
        await eventually(lambda: len(world.replies) == 2)
        again = await decide(handle, key(agent_id), approve=True)
        assert again.call == key(agent_id)
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await decide(handle, key(agent_id), approve=False, by="bob")
        assert isinstance(refused.value.cause, ApplicationError)
        assert refused.value.cause.type == names.SETTLED
        assert "was approved by ada" in refused.value.cause.message
        assert not (await status(handle)).open_calls
    assert sorted(made(world)) == ["look", "refund"]
    assert world.replies[0].text == "refund: done | look: done"
    (requested,) = world.lifecycle(names.APPROVAL_REQUESTED_TYPE)
    (decided,) = world.lifecycle(names.APPROVAL_DECIDED_TYPE)
    assert requested.data["arguments"] == REFUND.arguments
    assert (decided.data["approved"], decided.data["by"], decided.data["why"]) == (True, "ada", "a good customer")
    (record,) = world.approvals
    assert (record.call, record.approved, record.by, record.why) == (key(agent_id), True, "ada", "a good customer")


async def test_a_call_waits_through_many_runs(eventually: Eventually, brief_server: TemporalServer) -> None:
    """Mail comes, the history grows, and the agent goes on as new with open calls, and their siblings' results."""
    client = await Client.connect(brief_server.address, data_converter=pydantic_data_converter)
    agent_id, queue = f"agent/acme/tester/{uuid4()}", str(uuid4())
    world = world_of(REFUND, LOOK, ORDER)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        first = (await handle.describe()).run_id
        for number in range(2, 40):
            await deliver(client, agent_id, queue, event(number))
            await eventually(lambda number=number: _has_accepted(handle, number))
        now = await waiting(handle, eventually)
        assert (await handle.describe()).run_id != first
        assert sorted(made(world)) == ["look", "order"]
        assert [one.tool for one in now.open_calls] == ["refund", "order"]
        await decide(handle, key(agent_id), approve=True)
        request = CompleteRequest(call=key(agent_id, 2), content="It has arrived.")
        await handle.execute_update(names.COMPLETE, request, result_type=Settlement)
        await eventually(lambda: sum(len(reply.answers) for reply in world.replies) == 39)
        await stop(handle)
    assert sorted(made(world)) == ["look", "order", "refund"]
    assert world.replies[0].text == "refund: done | look: done | order: It has arrived."
    assert len(world.lifecycle(names.APPROVAL_REQUESTED_TYPE)) == 1
    answered = [reference.id for reply in world.replies for reference in reply.answers]
    assert answered == [f"event-{number}" for number in range(1, 40)]


async def _has_accepted(handle: WorkflowHandle, number: int) -> bool:
    return (await status(handle)).accepted == number


async def stop(handle: WorkflowHandle) -> None:
    await handle.execute_update(names.STOP, ME, result_type=Status)
    await handle.result()


@pytest.fixture(scope="module")
def brief_server() -> Iterator[TemporalServer]:
    """A server that suggests continue-as-new early."""
    with TemporalServer(arguments=["--dynamic-config-value", "limit.historyCount.suggestContinueAsNew=60"]) as server:
        yield server


async def test_a_refused_call_is_not_made_and_the_agent_is_told_by_whom_and_why(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    world = world_of(REFUND)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await waiting(handle, eventually)
        await decide(handle, key(agent_id), approve=False, why="too much")
        await eventually(lambda: len(world.replies) == 1)
    assert made(world) == []
    (result,) = world.thoughts[1].results
    assert result.outcome is ToolOutcome.ERROR
    assert result.content.startswith("Not made: this call was refused by ada at ")
    assert result.content.endswith(": too much.")


async def test_what_policy_refuses_or_allows_waits_for_nobody(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    small = ToolCall(id="c1", name="refund", arguments='{"amount_cents": 1}')
    huge = ToolCall(id="c2", name="refund", arguments='{"amount_cents": 1000000}')
    unknown = ToolCall(id="c3", name="fly")
    world = world_of(small, huge, unknown)
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
    assert [request.call.id for request in world.tool_requests] == ["c1"]
    one, two, three = world.thoughts[1].results
    assert one.content == "done"
    assert two.content == "Not made: you may not call refund with these arguments."
    assert three.content.startswith("There is no tool 'fly'")
    assert not world.lifecycle(names.APPROVAL_REQUESTED_TYPE)


@pytest.mark.parametrize("on_expiry", ["refuse", "allow"])
async def test_an_approval_reminds_and_expires(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually, on_expiry: str
) -> None:
    """After its time the stated default is the decision, and people were reminded until then."""
    policy = POLICY.model_copy(
        update={"expires_seconds": 86_400 * 2, "remind_seconds": 4 * 3600, "on_expiry": on_expiry}
    )
    world = world_of(REFUND, policy=policy)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await waiting(handle, eventually)
        await skipping.sleep(timedelta(hours=9))
        await eventually(lambda: len(world.lifecycle(names.APPROVAL_REMINDER_TYPE)) == 2)
        await skipping.sleep(timedelta(hours=40))
        await eventually(lambda: len(world.replies) == 1)
    assert made(world) == (["refund"] if on_expiry == "allow" else [])
    (decided,) = world.lifecycle(names.APPROVAL_DECIDED_TYPE)
    assert decided.data["approved"] is (on_expiry == "allow")
    assert (decided.data["by"], decided.data["why"]) == ("perennial", "nobody has decided within 2 days, 0:00:00")
    reminders = world.lifecycle(names.APPROVAL_REMINDER_TYPE)
    assert len({reminder.id for reminder in reminders}) == len(reminders) == 11


def by_event(kind: str, number: int, **data: object) -> Event:
    return Event(id=f"word-{number}", source="crm", type=kind, subject="key", data=data)  # type: ignore[arg-type]


async def test_a_decision_comes_as_an_event_too(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """It is no mail for the model; one that can't be taken, and one that comes again, is told and has no effect."""
    world = world_of(REFUND)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await waiting(handle, eventually)
        await deliver(
            client,
            agent_id,
            queue,
            by_event(names.DECIDE_TYPE, 1, call="agent/of/somebody/else/1/1/0", approve=True),
            by_event(names.DECIDE_TYPE, 2, approve="who knows"),
            by_event(names.DECIDE_TYPE, 3, call=key(agent_id), approve=True, why="by the CRM"),
        )
        await eventually(lambda: len(world.replies) == 1)
        late = by_event(names.DECIDE_TYPE, 4, call=key(agent_id), approve=False)
        await deliver(client, agent_id, queue, by_event(names.DECIDE_TYPE, 3, call=key(agent_id), approve=True), late)
        await eventually(lambda: len(world.lifecycle(names.CALL_MISSED_TYPE)) == 3)
        await eventually(lambda: len(world.lifecycle(names.DUPLICATE_TYPE)) == 1)
        now = await status(handle)
    assert made(world) == ["refund"]
    assert world.approvals[0].by == "crm"
    assert len(world.replies) == 1
    assert (now.turn, now.waiting) == (1, 0)
    missed = [str(message.data["why"]) for message in world.lifecycle(names.CALL_MISSED_TYPE)]
    assert "No call agent/of/somebody/else/1/1/0 waits for a decision here." in missed[0]
    assert "approve" in missed[1]
    assert "was approved by crm" in missed[2]


@pytest.mark.parametrize("early", [False, True])
async def test_an_answer_from_outside(
    client: Client, queue: str, agent_id: str, eventually: Eventually, *, early: bool
) -> None:
    """It may come days after the call has returned, or before."""
    calls: list[str] = []

    async def order(request: ToolRequest) -> ToolResult:
        calls.append(request.idempotency_key)
        if early:
            await complete(request.idempotency_key)
        return did(request)

    async def complete(call: str) -> Settlement:
        handle = client.get_workflow_handle(agent_id)
        request = CompleteRequest(call=call, content="It has arrived.", by="supplier")
        return await handle.execute_update(names.COMPLETE, request, result_type=Settlement)

    world = World(think_with=calling(ORDER), tool=order, spec=spec())
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        if not early:
            now = await waiting(handle, eventually)
            assert [one.waits_for for one in now.open_calls] == [Waits.ANSWER]
            await eventually(lambda: world.lifecycle(names.TOOL_WAITING_TYPE))
            await complete(calls[0])
        await eventually(lambda: len(world.replies) == 1)
        if not early:
            assert (await complete(calls[0])).call == key(agent_id)
    assert calls == [key(agent_id)]
    assert world.replies[0].text == "order: It has arrived."
    assert [kept.content for kept in world.kept_results] == ["It has arrived."]
    (completed,) = world.lifecycle(names.TOOL_COMPLETED_TYPE)
    assert completed.data["by"] == "supplier"
    assert len(world.lifecycle(names.TOOL_WAITING_TYPE)) == (not early)


async def test_an_answer_that_never_comes_is_unknown_and_the_owner_is_told(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    world = world_of(ORDER)
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: world.lifecycle(names.TOOL_WAITING_TYPE))
        await skipping.sleep(timedelta(days=4))
        await eventually(lambda: len(world.replies) == 1)
        failed = by_event(names.COMPLETE_TYPE, 1, call=key(agent_id), content="too late")
        await deliver(client, agent_id, queue, failed)
        await eventually(lambda: len(world.lifecycle(names.CALL_MISSED_TYPE)) == 1)
    (result,) = world.thoughts[1].results
    assert result.outcome is ToolOutcome.UNKNOWN
    assert result.content == "No answer came within 3 days, 0:00:00. Whether it took effect is not known."
    (told,) = world.lifecycle(names.TOOL_UNKNOWN_TYPE)
    assert (told.data["call"], told.data["tool"]) == (key(agent_id), "order")


async def test_an_agent_that_is_cancelled_while_a_call_waits_goes_on_waiting_when_woken(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The open call is in its snapshot, and what was done is not done again."""
    world = world_of(REFUND, LOOK)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await waiting(handle, eventually)
        await eventually(lambda: made(world) == ["look"])
        await cancel(handle)
        assert agent_id in world.snapshots
        word = by_event(names.DECIDE_TYPE, 1, call=key(agent_id), approve=True)
        await deliver(client, agent_id, queue, word)
        await eventually(lambda: len(world.replies) == 1)
    assert made(world) == ["look", "refund"]
    assert world.replies[0].text == "refund: done | look: done"
    assert len(world.lifecycle(names.APPROVAL_REQUESTED_TYPE)) == 1


async def test_a_call_that_is_cut_off_is_not_made_again(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P9: an agent is cancelled while a call is made that must not be repeated: its outcome is unknown."""
    begun = asyncio.Event()

    async def hang(request: ToolRequest) -> ToolResult:
        begun.set()
        await asyncio.Event().wait()
        return did(request)

    small = ToolCall(id="c1", name="refund", arguments='{"amount_cents": 1}')
    world = world_of(small)
    world.tool = hang
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await begun.wait()
        await cancel(handle)
        assert agent_id in world.snapshots
        world.tool = did
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: len(world.replies) == 2)
    assert len(world.tool_requests) == 1
    (result,) = world.thoughts[1].results
    assert (result.outcome, result.content) == (
        ToolOutcome.UNKNOWN,
        "It was cut off. Whether it took effect is not known.",
    )


async def test_a_stopped_or_paused_agent_still_takes_a_decision(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """What is in hand is finished: also when that takes a human's word."""
    world = world_of(REFUND)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await waiting(handle, eventually)
        await handle.execute_update(names.PAUSE, ME, result_type=Status)
        await handle.execute_update(names.STOP, ME, result_type=Status)
        now = await status(handle)
        assert "waits for approval of refund" in now.doing
        await decide(handle, key(agent_id), approve=True)
        await handle.result()
    assert made(world) == ["refund"]
    assert len(world.replies) == 1


async def test_a_paused_agent_is_shown_as_paused_whatever_its_calls_come_to(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P13: the Web UI's filter does not lose it when the turn goes on and ends."""
    world = world_of(REFUND)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await waiting(handle, eventually)
        await handle.execute_update(names.PAUSE, ME, result_type=Status)
        await decide(handle, key(agent_id), approve=True)
        await eventually(lambda: len(world.replies) == 1)
        about = await handle.describe()
    assert about.search_attributes[names.STATE_ATTRIBUTE] == ["paused"]
