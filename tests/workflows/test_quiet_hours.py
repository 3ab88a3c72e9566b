"""When it is quiet, by clocks that are put forward and back; and an agent that is not to be disturbed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from fakes import World, answer, echo, event
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from talking import ask, deliver
from temporalio.client import Client, WorkflowHandle
from temporalio.testing import WorkflowEnvironment

from workflows import names
from workflows.events import hold
from workflows.mailbox import Mailbox
from workflows.messages import Decision, Intervention, Status, ThinkRequest, ToolCall
from workflows.quiet_hours import QuietHours, look
from workflows.spec import ControlSpec, ToolControl

Eventually = Callable[..., Awaitable[Any]]
ME = Intervention(by="tester", reason="a test")

ZONES = ("UTC", "Europe/Lisbon", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca", "Pacific/Apia")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
TIMES = st.integers(0, 24 * 60 - 1).map(lambda minutes: f"{minutes // 60:02}:{minutes % 60:02}")
INSTANTS = st.datetimes(datetime(2005, 1, 1), datetime(2035, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001  # as asked


@st.composite
def quiet_hours(draw: st.DrawFn) -> QuietHours:
    start, end = draw(TIMES), draw(TIMES)
    days = draw(st.sets(st.sampled_from(DAYS), min_size=1))
    assume(start != end or len(days) < len(DAYS))
    return QuietHours(start=start, end=end, days=",".join(sorted(days)), time_zone=draw(st.sampled_from(ZONES)))


def at(text: str, zone: str = "Europe/Lisbon", fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).astimezone(UTC)


def looked(hours: QuietHours, now: datetime) -> tuple[bool, datetime]:
    hush = look(hours, now, ZoneInfo(hours.time_zone))
    return hush.quiet, hush.until


NIGHTS = QuietHours(start="22:00", end="07:00", time_zone="Europe/Lisbon")


@pytest.mark.parametrize(
    ("hours", "now", "quiet", "until"),
    [
        (NIGHTS, at("2026-07-01T21:59:59"), False, at("2026-07-01T22:00")),
        (NIGHTS, at("2026-07-01T22:00"), True, at("2026-07-02T07:00")),
        (NIGHTS, at("2026-07-02T06:59:59"), True, at("2026-07-02T07:00")),
        (NIGHTS, at("2026-07-02T07:00"), False, at("2026-07-02T22:00")),
        # Put forward at 01:00 on 29 March, and back at 02:00 on 25 October: the night is shorter, and longer.
        (NIGHTS, at("2026-03-28T22:00"), True, at("2026-03-28T22:00") + timedelta(hours=8)),
        (NIGHTS, at("2026-10-24T22:00"), True, at("2026-10-24T22:00") + timedelta(hours=10)),
        (
            QuietHours(start="01:30", end="03:00", time_zone="Europe/Lisbon"),  # there is no 01:30: from the change on
            at("2026-03-29T00:59"),
            False,
            datetime(2026, 3, 29, 1, tzinfo=UTC),
        ),
        (
            QuietHours(start="01:30", end="01:45", time_zone="Europe/Lisbon"),  # all of it is left out
            at("2026-03-29T00:59"),
            False,
            at("2026-03-30T01:30"),
        ),
        (
            QuietHours(start="00:00", end="01:30", time_zone="Europe/Lisbon"),  # 01:30 comes twice: to the last
            at("2026-10-25T00:30"),
            True,
            at("2026-10-25T01:30", fold=1),
        ),
        (
            QuietHours(start="01:30", end="05:00", time_zone="Europe/Lisbon"),  # from the first
            at("2026-10-25T01:45"),
            True,
            at("2026-10-25T05:00"),
        ),
        (
            QuietHours(start="00:00", end="00:00", days="sat,sun", time_zone="Europe/Lisbon"),  # a weekend is one
            at("2026-07-04T12:00"),
            True,
            at("2026-07-06T00:00"),
        ),
        (
            QuietHours(start="18:00", end="08:00", days="fri", time_zone="Europe/Lisbon"),
            at("2026-07-04T09:00"),
            False,
            at("2026-07-10T18:00"),
        ),
    ],
)
def test_it_is_quiet_by_the_clock_on_the_wall(
    hours: QuietHours, now: datetime, quiet: bool, until: datetime
) -> None:  # of a table
    """From the first minute to before the last, also where a clock is put forward or back."""
    assert looked(hours, now) == (quiet, until)


@given(quiet_hours(), INSTANTS, st.floats(0, 1, exclude_max=True))
def test_what_was_seen_holds_until_the_time_it_says(hours: QuietHours, now: datetime, part: float) -> None:
    """An agent looks once, and not again until then: it must be the same at any time in between, and change then."""
    quiet, until = looked(hours, now)
    assert until > now
    assert until - now <= timedelta(days=9)
    between = now + (until - now) * part
    assume(between < until)
    assert looked(hours, between) == (quiet, until)
    assert looked(hours, until)[0] is not quiet


@given(quiet_hours(), INSTANTS)
def test_it_is_quiet_when_the_wall_says_so(hours: QuietHours, now: datetime) -> None:
    """Checked in another way, on days on which nobody touches the clock."""
    zone = ZoneInfo(hours.time_zone)
    days = (now + timedelta(days=number) for number in range(-2, 3))
    assume(len({day.astimezone(zone).utcoffset() for day in days}) == 1)
    wall = now.astimezone(zone)
    clock, today = f"{wall:%H:%M}", DAYS[wall.isoweekday() % 7]
    yesterday = DAYS[(wall.isoweekday() - 1) % 7]
    begun = hours.days.split(",")
    if hours.start < hours.end:
        expected = today in begun and hours.start <= clock < hours.end
    else:
        expected = (today in begun and clock >= hours.start) or (yesterday in begun and clock < hours.end)
    assert looked(hours, now)[0] == expected


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"from": 1320, "to": "07:00"}, "from\n  Input should be a valid string"),
        ({"from": "22:00", "to": "7:00"}, "to\n  String should match"),
        ({"from": "24:00", "to": "07:00"}, "from\n  String should match"),
        ({"from": "22:00"}, "to\n  Field required"),
        ({"from": "22:00", "to": "22:00"}, "it would be quiet for ever"),
        ({"from": "22:00", "to": "07:00", "days": "someday"}, "'someday' is not between 0 and 6, or sun, mon"),
    ],
)
def test_a_mistake_in_quiet_hours_is_named(fields: dict[str, Any], complaint: str) -> None:
    """P14: what was wrong, and what was expected."""
    with pytest.raises(ValidationError) as refused:
        QuietHours.model_validate(fields)
    assert complaint in str(refused.value)


def test_quiet_hours_are_read_again_as_they_were_written() -> None:
    """They are carried in histories."""
    hours = QuietHours(start="22:00", end="07:00", excepted=("a.*",))
    assert QuietHours.model_validate_json(hours.model_dump_json()) == hours
    assert '"from":"22:00"' in hours.model_dump_json()


# Mail ----------------------------------------------------------------------------------------------------------------


def test_in_quiet_hours_questions_and_what_is_excepted_are_taken_in_order() -> None:
    """P2: among themselves; what stands behind a dead letter waits for it all the same."""
    quiet = QuietHours(start="22:00", end="07:00", excepted=("urgent.*",))
    mailbox = Mailbox()
    question = event("q", kind=names.ASK_TYPE)
    mailbox.accept(
        [
            event(1),
            event(2, kind="urgent.a"),
            event(3, kind="urgent.b"),
            event(4),
            event(5, kind="urgent.c"),
            hold("t/0/1", "not JSON"),
            event(6, kind="urgent.d"),
            question,
        ],
        horizon=100,
    )
    taken = []
    while mailbox.is_ready(quiet):
        taken.append([one.id for one in mailbox.take(len(taken) + 1, 10, quiet)])
    assert taken == [["event-2", "event-3"], ["event-5"], ["event-q"]]
    assert [one.id for one in mailbox.take(9, 10)] == ["event-1", "event-4"]


# An agent ------------------------------------------------------------------------------------------------------------


async def quiet_for(skipping: WorkflowEnvironment, hours: int, **fields: Any) -> ControlSpec:
    """The spec of an agent for which it is quiet now, and for so many hours more."""
    now = await skipping.get_current_time()
    start, end = now - timedelta(hours=1), now + timedelta(hours=hours)
    quiet = {"from": f"{start:%H:%M}", "to": f"{end:%H:%M}", "except": ["urgent.*"]}
    return ControlSpec.model_validate({"digest": "s", "quiet_hours": quiet, **fields})


async def status(handle: WorkflowHandle[Any, Any]) -> Status:
    return await handle.query(names.STATUS, result_type=Status)


async def becomes(handle: WorkflowHandle[Any, Any], state: str, eventually: Eventually) -> Status:
    async def is_so() -> Status | None:
        now = await status(handle)
        return now if now.state == state else None

    found: Status = await eventually(is_so)
    return found


async def test_mail_waits_for_the_end_of_quiet_hours(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Also an agent's first; the status says until when. It looks at the clock once, whatever comes meanwhile."""
    world = World(spec=await quiet_for(skipping, 5))
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        now = await becomes(handle, "quiet", eventually)
        assert now.doing.startswith("quiet until 20")
        assert now.doing.endswith(" UTC; 1 events wait")
        await deliver(client, agent_id, queue, event(2))
        await skipping.sleep(timedelta(hours=3))
        assert not world.replies
        assert len(world.looks) == 1
        await skipping.sleep(timedelta(hours=3))
        await eventually(lambda: len(world.replies) == 1)
        await skipping.sleep(timedelta(hours=1))
        await deliver(client, agent_id, queue, event(3))
        await eventually(lambda: len(world.replies) == 2)
    assert [reply.text for reply in world.replies] == ["event-1 event-2", "event-3"]
    assert len(world.looks) == 2, "and at their end"


async def test_questions_and_excepted_events_disturb_it_nevertheless(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The rest waits on, in its order."""
    world = World(spec=await quiet_for(skipping, 5))
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await becomes(handle, "quiet", eventually)
        assert (await ask(client, agent_id, queue, "Are you there?", "q-1")).text == "q-1"
        await deliver(client, agent_id, queue, event(2), event(3, kind="urgent.fire"))
        await eventually(lambda: len(world.replies) == 2)
        await becomes(handle, "quiet", eventually)
        await skipping.sleep(timedelta(hours=6))
        await eventually(lambda: len(world.replies) == 3)
    assert [reply.text for reply in world.replies] == ["q-1", "event-3", "event-1 event-2"]


async def test_a_wake_up_waits_for_the_end_of_quiet_hours(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """As all mail does; a turn that has begun is finished, and may set it."""
    world = World(spec=await quiet_for(skipping, 5, tools={names.WAKE_ME: ToolControl(built_in=True)}))

    def think(request: ThinkRequest) -> Decision:
        calls = [ToolCall(id="c", name=names.WAKE_ME, arguments='{"note": "x", "in": "1 h"}')]
        return answer("", request, *calls) if (request.turn, request.step) == (1, 1) else echo(request)

    world.think_with = think
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1, kind="urgent.fire"))
        await eventually(lambda: len(world.replies) == 1)
        await skipping.sleep(timedelta(hours=2))
        await becomes(handle, "quiet", eventually)
        assert len(world.replies) == 1
        await skipping.sleep(timedelta(hours=4))
        await eventually(lambda: len(world.replies) == 2)
    assert world.replies[1].text == f"{agent_id}/wake/1-1-0"


async def test_an_agent_that_is_stopped_in_quiet_hours_keeps_its_mail(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    world = World(spec=await quiet_for(skipping, 5, hibernate_after=timedelta(minutes=5)))
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await becomes(handle, "quiet", eventually)
        await skipping.sleep(timedelta(hours=1))
        assert (await status(handle)).state == "quiet", "it does not hibernate on mail"
        await handle.execute_update(names.STOP, ME, result_type=Status)
        await eventually(lambda: agent_id in world.snapshots)
        await skipping.sleep(timedelta(hours=6))
        assert not world.replies
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: len(world.replies) == 1)
    assert world.replies[0].text == "event-1 event-2"
