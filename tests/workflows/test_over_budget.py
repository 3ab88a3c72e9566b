"""P10: an agent that may not go on waits where it is, says so, and goes on; under time skipping, the world faked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
from fakes import World, answer, event
from talking import ask, deliver
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.testing import WorkflowEnvironment

from workflows import names
from workflows.budget import (
    Cost,
    Lifted,
    LiftRequest,
    Limit,
    LimitScope,
    Need,
    Per,
    Refusal,
    Spent,
    Standing,
    refusal,
    window,
)
from workflows.messages import Decision, Intervention, Status, ThinkRequest, ToolCall, ToolResult
from workflows.spec import BudgetSpec, ControlSpec, MailboxSpec, ToolControl

Eventually = Callable[..., Awaitable[Any]]
ME = Intervention(by="tester", reason="a test")
STEP = Need(tokens=11, micro_usd=250, turns=0)


@dataclass
class Bank:
    """A model that keeps to the limits of the spec, by the server's clock; each call takes what `STEP` says."""

    env: WorkflowEnvironment
    world: World
    days: dict[str, Spent] = field(default_factory=dict)
    calls: int = 1
    """How many steps a turn has."""

    async def think(self, request: ThinkRequest) -> Decision:
        now = await self.env.get_current_time()
        limits = self.world.spec.budget.limits if request.limits is None else request.limits
        if refused := refusal([self._standing(limit, now) for limit in limits], STEP):
            return Decision(head=request.head or "", refused=refused)
        day = now.date().isoformat()
        self.days[day] = self._spent(day, STEP)
        calls = [ToolCall(id="a", name="look")] if request.step < self.calls else []
        made = answer(" ".join(e.id for e in request.events) or "done", request, *calls)
        return made.model_copy(update={"cost": Cost(micro_usd=250)})

    def _standing(self, limit: Limit, now: datetime) -> Standing:
        day = self.days.get(now.date().isoformat(), Spent())
        more = sum(lift.request.tokens for lift in self.world.lifts if lift.per is limit.per)
        return Standing(limit=limit, spent=day, lifted=Spent(tokens=more), until=window(limit.per, now).end)

    def _spent(self, day: str, need: Need) -> Spent:
        before = self.days.get(day, Spent())
        return Spent(tokens=before.tokens + need.tokens, calls=before.calls + 1)


def banked(env: WorkflowEnvironment, tokens: int, *, per: Per = Per.DAY, calls: int = 1) -> tuple[World, Bank]:
    """A world whose agents may spend so many tokens."""
    spec = ControlSpec(
        digest="s",
        mailbox=MailboxSpec(events_per_turn=1),
        budget=BudgetSpec(limits=(Limit(per=per, tokens=tokens),)),
        tools={"look": ToolControl()},
    )
    world = World(spec=spec, tool=lambda request: ToolResult(call_id=request.call.id, name="look", content="seen"))
    bank = Bank(env, world, calls=calls)
    world.think_with = bank.think
    return world, bank


async def over_budget(handle: WorkflowHandle[Any, Any], waiting: int = 0) -> Status | None:
    """The agent's status, once it waits for its budget with so much mail behind it."""
    status: Status = await handle.query(names.STATUS, result_type=Status)
    return status if status.state == names.OVER_BUDGET and status.waiting == waiting else None


async def state_attribute(handle: WorkflowHandle[Any, Any]) -> object:
    return (await handle.describe()).search_attributes.get(names.STATE_ATTRIBUTE)


async def lift(handle: WorkflowHandle[Any, Any], **request: Any) -> Lifted:
    made: Lifted = await handle.execute_update(
        names.LIFT_BUDGET, LiftRequest(**{"id": "l-1", "by": "ada", "reason": "a sale", **request}), result_type=Lifted
    )
    return made


async def stop(handle: WorkflowHandle[Any, Any]) -> None:
    await handle.execute_update(names.STOP, ME, result_type=Status)
    await handle.result()


def answered(world: World) -> list[str]:
    return [reference.id for reply in world.replies for reference in reply.answers]


async def test_an_agent_over_its_budget_waits_until_the_day_ends(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Nothing is lost meanwhile: the turn waits at its step, mail behind it; the operator sees it and is told once."""
    world, _ = banked(skipping, 25, calls=2)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await deliver(client, agent_id, queue, event(2), event(3))
        status = await eventually(lambda: over_budget(handle, waiting=1))
        assert await state_attribute(handle) == [names.OVER_BUDGET]
        await eventually(lambda: len(world.lifecycle(names.BUDGET_EXCEEDED_TYPE)) == 1)
        midnight = status.refused.until
        assert midnight == window(Per.DAY, await skipping.get_current_time()).end
        before = len(world.thoughts)
        await skipping.sleep(midnight - await skipping.get_current_time() - timedelta(minutes=1))
        assert answered(world) == ["event-1"]
        assert len(world.thoughts) - before <= 24, "it looks once an hour, and no more"
        await skipping.sleep(timedelta(minutes=2))
        await eventually(lambda: len(world.replies) == 2)
        await eventually(lambda: over_budget(handle))
        await eventually(lambda: len(world.lifecycle(names.BUDGET_EXCEEDED_TYPE)) == 2)
        await skipping.sleep(timedelta(days=1))
        await eventually(lambda: len(world.replies) == 3)
        assert await state_attribute(handle) == ["active"]
        end: Status = await handle.query(names.STATUS, result_type=Status)
        await stop(handle)
    assert status.doing.startswith("over budget; turn 2, step 1 waits: the key's budget of 25 tokens a day: 22 tokens")
    assert answered(world) == ["event-1", "event-2", "event-3"]
    assert [reply.steps for reply in world.replies] == [2, 2, 2]
    assert (end.cost, end.refused, end.model_calls) == (Cost(micro_usd=1500), None, 6)
    assert [reply.cost for reply in world.replies] == [Cost(micro_usd=500)] * 3
    told = world.lifecycle(names.BUDGET_EXCEEDED_TYPE)[0]
    assert (told.data["scope"], told.data["limit"], told.data["step"]) == ("key", 25, 1)
    assert str(told.data["message"]) == str(status.refused)


async def test_a_person_can_allow_more(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The limit it waits for need not be named; who and why is kept, told, and once, however often it is sent."""
    world, _ = banked(skipping, 15, per=Per.TOTAL, calls=2)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: over_budget(handle))
        with pytest.raises(WorkflowUpdateFailedError) as nothing:
            await lift(handle)
        lifted = await lift(handle, tokens=10)
        await eventually(lambda: len(world.replies) == 1)
        with pytest.raises(WorkflowUpdateFailedError) as unnamed:
            await lift(handle, tokens=10)
        await eventually(lambda: len(world.lifecycle(names.BUDGET_LIFTED_TYPE)) == 1)
        status: Status = await handle.query(names.STATUS, result_type=Status)
        await stop(handle)
    assert (lifted.scope, lifted.per, lifted.tokens) == (LimitScope.KEY, Per.TOTAL, 10)
    (record,) = world.lifts
    assert (record.workflow_id, record.turn, record.request.by) == (agent_id, 1, "ada")
    assert "how much more" in str(nothing.value.cause)
    assert "waits for no limit" in str(unnamed.value.cause)
    assert any(item.text == "allowed 10 tokens more by ada: a sale" for item in status.recent)


async def test_an_agent_goes_on_when_a_neighbour_was_allowed_more_or_its_spec_allows_more(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """It is told to look again, or looks within the hour; its turn keeps everything else it began with."""
    world, bank = banked(skipping, 11, per=Per.TOTAL, calls=2)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: over_budget(handle))
        bank.days.clear()
        await handle.signal(names.CHECK_BUDGET)
        await eventually(lambda: len(world.replies) == 1)
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: over_budget(handle))
        world.spec = world.spec.model_copy(update={"digest": "s2", "budget": BudgetSpec()})
        await skipping.sleep(timedelta(hours=1, minutes=1))
        await eventually(lambda: len(world.replies) == 2)
        await stop(handle)
    assert [request.spec_digest for request in world.thoughts if request.turn == 2] == ["s", "s", "s"]
    assert answered(world) == ["event-1", "event-2"]


async def test_an_agent_over_its_budget_can_be_stopped_and_goes_on_when_woken(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The turn is kept as it is; who asked is told to ask again, and gets that turn's reply."""
    world, bank = banked(skipping, 11, per=Per.TOTAL, calls=2)
    async with world.workers(client, queue):
        asking = asyncio.create_task(ask(client, agent_id, queue, "hello?", "q-1"))
        handle = client.get_workflow_handle(agent_id)
        await eventually(lambda: bool(world.lifecycle(names.BUDGET_EXCEEDED_TYPE)))
        await stop(handle)
        with pytest.raises(WorkflowUpdateFailedError) as stopped:
            await asking
        assert world.snapshots[agent_id].is_over_budget
        woken = await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: over_budget(woken, waiting=1))
        assert await state_attribute(woken) == [names.OVER_BUDGET]
        bank.days.clear()
        await woken.signal(names.CHECK_BUDGET)
        reply = await ask(client, agent_id, queue, "hello?", "q-1")
        assert await eventually(lambda: over_budget(woken))
        await lift(woken, tokens=100)
        await eventually(lambda: len(world.replies) == 2)
        await stop(woken)
    assert "ask again" in str(stopped.value.cause)
    assert reply.turn == 1
    assert answered(world) == ["q-1", "event-2"]
    assert len(world.lifecycle(names.BUDGET_EXCEEDED_TYPE)) == 2, "of each turn once"


async def test_a_model_of_unknown_price_is_not_called_under_a_limit_in_dollars(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """It waits, and says what to do; once the price is known it goes on."""
    refused = Refusal(
        scope=LimitScope.KEY,
        per=Per.TOTAL,
        measure="usd",  # type: ignore[arg-type]
        limit=5_000_000,
        spent=0,
        needed=None,
        unpriced="openai-chat:house (pool house)",
    )
    world = World()
    world.think_with = lambda request: (
        Decision(head="", refused=refused) if len(world.thoughts) == 1 else answer("fine", request)
    )
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        status = await eventually(lambda: over_budget(handle))
        await handle.signal(names.CHECK_BUDGET)
        await eventually(lambda: len(world.replies) == 1)
        await stop(handle)
    assert "the price of openai-chat:house (pool house) is not known" in status.doing


async def test_a_paused_agent_over_its_budget_is_shown_as_over_budget_when_resumed(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """What the Web UI's list says is what holds it up."""
    world, bank = banked(skipping, 11, per=Per.TOTAL, calls=2)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: over_budget(handle))
        seen = []
        for update in (names.PAUSE, names.RESUME, names.PAUSE):
            await handle.execute_update(update, ME, result_type=Status)
            seen.append(await state_attribute(handle))
        bank.days.clear()
        await handle.signal(names.CHECK_BUDGET)
        await eventually(lambda: len(world.replies) == 1)
        assert await state_attribute(handle) == ["paused"]
        await stop(handle)
    assert seen == [["paused"], [names.OVER_BUDGET], ["paused"]]
