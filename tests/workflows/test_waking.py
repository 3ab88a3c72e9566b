"""An agent that wakes itself, awake or hibernating; under time skipping, the world faked."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from fakes import World, answer, event
from talking import ask, deliver
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.testing import WorkflowEnvironment

from workflows import names
from workflows.messages import Alarm, Decision, Intervention, Status, ThinkRequest, ToolCall, ToolRequest, ToolResult
from workflows.spec import ControlSpec, ToolControl, WakeUpsSpec

Eventually = Callable[..., Awaitable[Any]]
ME = Intervention(by="tester", reason="a test")
TOOLS = (names.WAKE_ME, names.LIST_WAKE_UPS, names.CANCEL_WAKE_UP)


def spec(**fields: Any) -> ControlSpec:
    tools = {name: ToolControl(built_in=True) for name in TOOLS}
    return ControlSpec.model_validate({"digest": "s", "tools": tools, "wake_ups": WakeUpsSpec(), **fields})


def heeding(request: ThinkRequest) -> Decision:
    """Calls what the event's data says, and answers with what it was shown."""
    if request.results:
        return answer(" | ".join(result.content for result in request.results), request)
    calls = [
        ToolCall(id=f"c{number}", name=one["tool"], arguments=json.dumps(one["with"]))
        for received in request.events
        if isinstance(received.data, dict)
        for number, one in enumerate(received.data.get("calls", []))  # type: ignore[arg-type]
        if isinstance(one, dict)
    ]
    if calls:
        return answer("", request, *calls)
    told = [one.data.get("note", one.id) if isinstance(one.data, dict) else one.id for one in request.events]
    return answer(" ".join(map(str, told)), request)


def calling(number: int, tool: str = names.WAKE_ME, **arguments: object) -> Any:
    return event(number, data={"calls": [{"tool": tool, "with": arguments}]})


def waking(number: int, note: str, within: str) -> Any:
    return calling(number, note=note, **{"in": within})


def world_of(**fields: Any) -> World:
    return World(think_with=heeding, spec=spec(**fields))


def texts(world: World) -> list[str]:
    return [reply.text for reply in world.replies]


async def answered(world: World, count: int, eventually: Eventually) -> None:
    await eventually(lambda: len(world.replies) == count)


async def status(handle: WorkflowHandle) -> Status:
    return await handle.query(names.STATUS, result_type=Status)


async def closed(client: Client, agent_id: str, eventually: Eventually) -> None:
    async def is_closed() -> bool:
        return (await client.get_workflow_handle(agent_id).describe()).status is WorkflowExecutionStatus.COMPLETED

    await eventually(is_closed)


def wakes(world: World) -> list[dict[str, Any]]:
    """The data of the wake-up events that the model was shown, in order."""
    shown = [one for request in world.thoughts for one in request.events if one.type == names.WAKE_TYPE]
    return [one.data for one in shown if isinstance(one.data, dict)]


async def test_an_agent_wakes_itself_at_its_time_and_once(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """It waits, and says until when; then its note comes as an event, which is answered as any other."""
    world = world_of()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, waking(1, "is it there?", "3 days"))
        await answered(world, 1, eventually)
        (wake_up,) = (await status(handle)).wake_ups
        assert wake_up.id == "1-1-0"
        assert wake_up.due == wake_up.set_at + timedelta(days=3)
        assert (await status(handle)).doing.startswith("waiting for events; wakes itself at 20")
        await skipping.sleep(timedelta(days=2, hours=23))
        assert len(world.replies) == 1
        await skipping.sleep(timedelta(hours=2))
        await answered(world, 2, eventually)
        await skipping.sleep(timedelta(days=30))
        assert not (await status(handle)).wake_ups
    assert not world.tool_requests, "no activity has run it"
    (told,) = wakes(world)
    assert (told["note"], told["late_seconds"]) == ("is it there?", 0)
    assert texts(world)[1] == "is it there?"
    (reference,) = world.replies[1].answers
    assert (reference.type, reference.source, reference.id) == (names.WAKE_TYPE, agent_id, f"{agent_id}/wake/1-1-0")


async def test_wrong_arguments_are_told_and_the_agent_can_put_them_right(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    world = world_of(wake_ups={"at_most": 1})
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, waking(1, "x", "soon"))
        await answered(world, 1, eventually)
        await deliver(client, agent_id, queue, waking(2, "x", "3 days"))
        await answered(world, 2, eventually)
        await deliver(client, agent_id, queue, waking(3, "y", "3 days"))
        await answered(world, 3, eventually)
    assert "'soon' is no duration" in texts(world)[0]
    assert texts(world)[1].startswith("Set: you are woken at ")
    assert "1 wake-ups are set already" in texts(world)[2]


async def test_several_wake_ups_ring_each_at_its_time_and_a_cancelled_one_never(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    world = world_of()
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, waking(1, "late", "3 days"))
        await answered(world, 1, eventually)
        await deliver(client, agent_id, queue, waking(2, "early", "1 day"))
        await answered(world, 2, eventually)
        await deliver(client, agent_id, queue, waking(3, "never", "2 days"))
        await answered(world, 3, eventually)
        await deliver(client, agent_id, queue, calling(4, names.CANCEL_WAKE_UP, id="3-1-0"))
        await answered(world, 4, eventually)
        await skipping.sleep(timedelta(days=10))
        await answered(world, 6, eventually)
    assert [told["note"] for told in wakes(world)] == ["early", "late"]


async def test_an_event_that_is_waited_for_brings_the_note_with_it(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Other events don't; and its latest time is void then. The event and the note are one turn."""
    world = world_of()
    async with world.workers(client, queue):
        first = calling(1, note="thank the carrier", when="parcel.*", **{"in": "9 days"})
        await deliver(client, agent_id, queue, first)
        await answered(world, 1, eventually)
        await deliver(client, agent_id, queue, event(2, kind="order.paid"))
        await answered(world, 2, eventually)
        await deliver(client, agent_id, queue, event(3, kind="parcel.delivered"))
        await answered(world, 3, eventually)
        await skipping.sleep(timedelta(days=10))
    assert texts(world)[1:] == ["event-2", "event-3 thank the carrier"]
    (told,) = wakes(world)
    assert told["event"]["id"] == "event-3"


async def test_a_hibernating_agent_wakes_as_if_it_had_never_slept(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Its workflow is closed meanwhile, for months; an alarm wakes it. Mail in between changes nothing."""
    world = world_of(hibernate_after=timedelta(hours=1))
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, waking(1, "happy new year", "200 days"))
        await answered(world, 1, eventually)
        (wake_up,) = (await status(handle)).wake_ups
        await skipping.sleep(timedelta(days=50))
        await closed(client, agent_id, eventually)
        assert world.snapshots[agent_id].wake_ups == [wake_up]
        await deliver(client, agent_id, queue, waking(2, "spring", "10 days"))
        await answered(world, 2, eventually)
        await skipping.sleep(timedelta(days=1))
        await closed(client, agent_id, eventually)
        await skipping.sleep(timedelta(days=48))
        await answered(world, 3, eventually)
        await skipping.sleep(timedelta(days=120))
        await answered(world, 4, eventually)
        await closed(client, agent_id, eventually)
        await skipping.sleep(timedelta(days=300))
    assert [told["note"] for told in wakes(world)] == ["spring", "happy new year"]
    assert len(world.replies) == 4
    assert world.alarms[0].due == world.alarms[-1].due == wake_up.due


async def test_a_wake_up_that_is_near_keeps_the_agent_open(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """To close, and be woken within the time it would have waited, would only be work."""
    world = world_of(hibernate_after=timedelta(hours=1))
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, waking(1, "soon", "30 min"))
        await answered(world, 1, eventually)
        await skipping.sleep(timedelta(minutes=31))
        await answered(world, 2, eventually)
        await skipping.sleep(timedelta(hours=2))
        await closed(client, agent_id, eventually)
    assert not world.alarms


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_stopped_agent_is_woken_too(
    skipping: WorkflowEnvironment,
    client: Client,
    queue: str,
    agent_id: str,
    eventually: Eventually,
    *,
    cancelled: bool,
) -> None:
    """As the next event would wake it; so is one whose workflow is cancelled from outside."""
    world = world_of()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, waking(1, "still here", "2 days"))
        await answered(world, 1, eventually)
        if cancelled:
            await handle.cancel()
            await eventually(lambda: world.alarms)
        else:
            await handle.execute_update(names.STOP, ME, result_type=Status)
            await handle.result()
        await skipping.sleep(timedelta(days=3))
        await answered(world, 2, eventually)
        again = client.get_workflow_handle(agent_id)
        assert (await again.describe()).run_id != handle.first_execution_run_id
    assert texts(world)[1] == "still here"


async def test_a_paused_agent_does_not_wake_until_it_is_resumed(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """What is due waits with the mail, and says how late it is no more than when it came."""
    world = world_of()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, waking(1, "hello", "2 days"))
        await answered(world, 1, eventually)
        await handle.execute_update(names.PAUSE, ME, result_type=Status)
        await skipping.sleep(timedelta(days=3))

        async def waits() -> bool:
            return (await status(handle)).waiting == 1

        await eventually(waits)
        assert len(world.replies) == 1
        await handle.execute_update(names.RESUME, ME, result_type=Status)
        await answered(world, 2, eventually)
    assert texts(world)[1] == "hello"


async def test_a_wake_up_that_is_due_in_a_turn_waits_for_its_end(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The turn of a call that waits for days is finished first; how late it is then is told."""
    tools = {name: ToolControl(built_in=True) for name in TOOLS}
    order = ToolControl(answer_within=timedelta(days=3))
    world = world_of(tools={**tools, "order": order})
    world.tool = ordered
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, waking(1, "drink", "1 day"))
        await answered(world, 1, eventually)
        await deliver(client, agent_id, queue, calling(2, "order"))
        await eventually(lambda: world.lifecycle(names.TOOL_WAITING_TYPE))
        await skipping.sleep(timedelta(days=2))
        assert len(world.replies) == 1
        await skipping.sleep(timedelta(days=2))
        await answered(world, 3, eventually)
    (told,) = wakes(world)
    assert told["late_seconds"] >= timedelta(days=1).total_seconds()


def ordered(request: ToolRequest) -> ToolResult:
    return ToolResult(call_id=request.call.id, name=request.call.name, content="ordered")


async def test_a_question_is_answered_while_a_wake_up_waits(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    world = world_of()
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, waking(1, "hello", "2 days"))
        await answered(world, 1, eventually)
        reply = await ask(client, agent_id, queue, "Are you there?")
    assert reply.turn == 2


async def test_an_alarm_that_is_early_is_no_harm(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Clocks differ: an agent that is woken before its time by its own clock goes to sleep again, and sets another."""
    world = world_of(hibernate_after=timedelta(hours=1))
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, waking(1, "now", "10 days"))
        await answered(world, 1, eventually)
        await skipping.sleep(timedelta(days=1))
        await closed(client, agent_id, eventually)
        now: datetime = await skipping.get_current_time()
        alarm = client.get_workflow_handle(names.alarm_id(agent_id))
        await alarm.signal(names.SET_ALARM, Alarm(workflow_id=agent_id, due=now))
        await eventually(lambda: len(world.alarms) == 1)
        await skipping.sleep(timedelta(hours=5))
        await eventually(lambda: len(world.alarms) == 2)
        assert len(world.replies) == 1
        await skipping.sleep(timedelta(days=9))
        await answered(world, 2, eventually)
    assert texts(world)[1] == "now"
