"""What a schedule says, without any server; and one occurrence of it, under time skipping."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from fakes import World, answer, event
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from talking import deliver
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.testing import WorkflowEnvironment

from workflows import names
from workflows.messages import Decision, Intervention, Mail, Occurrence, Status, ThinkRequest
from workflows.schedule import CalendarSpec, ScheduleSpec, Span

Eventually = Callable[..., Awaitable[Any]]
ME = Intervention(by="tester", reason="a test")


def schedule(**fields: Any) -> ScheduleSpec:
    return ScheduleSpec.model_validate({"name": "nightly", **fields})


@pytest.mark.parametrize(
    ("fields", "when"),
    [
        ({"cron": "0 8 * * mon-fri"}, "0 8 * * mon-fri"),
        ({"cron": "*/15  8-18/2 1,15 jan-mar 0,7", "time_zone": "Europe/Lisbon"}, None),
        ({"cron": "@daily"}, "@daily"),
        ({"calendar": {"hour": 8, "minute": "0,30", "day_of_week": "mon-fri"}}, None),
        ({"every": "6 hours"}, "every 6:00:00"),
        ({"every": 90}, "every 0:01:30"),
    ],
)
def test_a_schedule_says_when(fields: dict[str, Any], when: str | None) -> None:
    """By a cron line, by a calendar, or at intervals."""
    said = schedule(**fields).when
    assert said
    assert when is None or said == when


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "give one of cron, calendar and every; given are: none"),
        ({"cron": "@daily", "every": 60}, "given are: cron, every"),
        ({"cron": "0 8 * *"}, "has 4 fields; a cron line has five"),
        ({"cron": "60 8 * * *"}, "'60' is not between 0 and 59"),
        ({"cron": "0 8 * * someday"}, "'someday' is not between 0 and 7, or sun, mon"),
        ({"cron": "0 8-6 * * *"}, "'8-6' is no range that holds anything"),
        ({"cron": "*/0 8 * * *"}, "is no range that holds anything"),
        ({"cron": "@sometimes"}, "has 1 fields"),
        ({"calendar": {"hour": 24}}, "hour: '24' is not between 0 and 23"),
        ({"calendar": {"hours": 2}}, "calendar.hours\n  Extra inputs"),
        ({"every": "often"}, "'often' is no duration"),
        ({"every": 0.5}, "every is a second at least"),
        ({"cron": "@daily", "overlap": "maybe"}, "overlap\n  Input should be 'skip', 'buffer_one'"),
        ({"cron": "@daily", "jitter": 5}, "jitter\n  Extra inputs"),
        ({"cron": "@daily", "name": "A b"}, "name\n"),
    ],
)
def test_a_mistake_in_a_schedule_is_named(fields: dict[str, Any], complaint: str) -> None:
    """P14: what was wrong, and what was expected."""
    with pytest.raises(ValidationError) as refused:
        schedule(**fields)
    assert complaint in str(refused.value)


@given(st.integers(0, 23), st.integers(0, 23), st.integers(1, 24))
def test_a_calendar_s_fields_are_ranges(one: int, other: int, step: int) -> None:
    low, high = sorted((one, other))
    calendar = CalendarSpec(hour=f"{low}-{high}/{step}, {low}", minute="*", day_of_week="sun,fri-sat")
    assert calendar.fields["hour"] == [Span(low, high, step), Span(low, low, 1)]
    assert calendar.fields["minute"] == [Span(0, 59, 1)]
    assert calendar.fields["day_of_week"] == [Span(0, 0, 1), Span(5, 6, 1)]


# An occurrence -------------------------------------------------------------------------------------------------------


def hearing(request: ThinkRequest) -> Decision:
    told = (one.data.get("text") if isinstance(one.data, dict) else one.id for one in request.events)
    return answer(" ".join(str(one) for one in told), request)


async def paused(agent: WorkflowHandle[Any, Any], eventually: Eventually) -> None:
    """Pause the agent once it has nothing to do."""

    async def is_idle() -> bool:
        return (await agent.query(names.STATUS, result_type=Status)).state == "idle"

    await eventually(is_idle)
    await agent.execute_update(names.PAUSE, ME, result_type=Status)


async def over(occurrence: WorkflowHandle[Any, Any], eventually: Eventually) -> None:
    """Wait until it has ended, without letting time go by."""

    async def is_over() -> bool:
        return (await occurrence.describe()).status is WorkflowExecutionStatus.COMPLETED

    await eventually(is_over)


async def begin(
    client: Client, agent_id: str, queue: str, number: int = 1, wait: timedelta = timedelta(days=1)
) -> WorkflowHandle[Any, Any]:
    """What Temporal does when a schedule comes round."""
    address = names.parse_workflow_id(agent_id)
    found = names.schedule_id(names.ScheduleId(address.tenant, address.agent, f"nightly-{address.key}"))
    occurrence = Occurrence(
        workflow_id=agent_id, type=names.SCHEDULE_TYPE, data={"schedule": "nightly", "text": "Look."}, wait=wait
    )
    return await client.start_workflow(
        names.OCCURRENCE_TYPE, occurrence, id=f"{found}-2026-03-0{number}T09:00:00Z", task_queue=queue
    )


async def test_an_occurrence_is_over_when_the_agent_has_answered_it(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """It starts an agent that was not there; its event is one like others. P1: delivered again, it is dropped."""
    world = World(think_with=hearing)
    async with world.workers(client, queue):
        occurrence = await begin(client, agent_id, queue)
        await over(occurrence, eventually)
        await eventually(lambda: len(world.replies) == 1)
        (event_,) = world.thoughts[0].events
        assert world.clock
        await world.clock.deliver(Mail(workflow_id=agent_id, events=[event_]))
        await eventually(lambda: world.lifecycle(names.DUPLICATE_TYPE))
    assert (event_.id, event_.source, event_.type) == (occurrence.id, names.SCHEDULE_SOURCE, names.SCHEDULE_TYPE)
    assert isinstance(event_.data, dict)
    assert event_.data["schedule"] == "nightly"
    assert event_.time is not None
    assert event_.data["scheduled_at"] == event_.time.isoformat(timespec="seconds")
    assert world.replies[0].text == "Look."


async def test_an_occurrence_waits_for_an_agent_that_does_not_answer_and_not_for_ever(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """A paused one keeps the event; the word that it is answered comes too late then, and harms nobody."""
    world = World(think_with=hearing)
    async with world.workers(client, queue):
        agent = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await paused(agent, eventually)
        occurrence = await begin(client, agent_id, queue)
        await skipping.sleep(timedelta(hours=23))
        assert (await occurrence.describe()).status is WorkflowExecutionStatus.RUNNING
        await skipping.sleep(timedelta(hours=2))
        await over(occurrence, eventually)
        await agent.execute_update(names.RESUME, ME, result_type=Status)
        await eventually(lambda: len(world.replies) == 2)
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: len(world.replies) == 3)
    assert world.replies[1].text == "Look."


async def test_an_occurrence_that_waits_for_nothing_is_over_once_it_is_delivered(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """As with `overlap: allow_all`; the mailbox has them in order."""
    world = World(think_with=hearing)
    async with world.workers(client, queue):
        agent = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await paused(agent, eventually)
        for number in (1, 2):
            await over(await begin(client, agent_id, queue, number, timedelta(0)), eventually)
        assert (await agent.query(names.STATUS, result_type=Status)).waiting == 2
        await agent.execute_update(names.STOP, ME, result_type=Status)
        await agent.result()
    assert [one.id[-20:] for one in world.snapshots[agent_id].mailbox.waiting] == [
        "2026-03-01T09:00:00Z",
        "2026-03-02T09:00:00Z",
    ]
