"""Time and agents: the alarm of one that hibernates, mail that is not from Kafka, and the clock on the wall.

clock = Clock(client, partial(wiring.deliver, client, task_queue))
activities = [clock.set_alarm, clock.deliver]
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from zoneinfo import ZoneInfo

from temporalio import activity
from temporalio.client import Client
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from typing_extensions import override

from workflows import names
from workflows.events import Event
from workflows.interface import ClockActivities
from workflows.messages import Alarm, Mail
from workflows.quiet_hours import Hush, LookRequest, look

Deliver = Callable[[names.Address, Sequence[Event]], Awaitable[None]]
"""Puts events into an agent's mailbox, waking or starting it; with none it only does that."""


class Clock(ClockActivities):
    """Wakes agents, by way of Temporal.

    Args:
        client: of the namespace that the agents live in.
        deliver: hands an agent its mail.
    """

    def __init__(self, client: Client, deliver: Deliver) -> None:
        self._client = client
        self._deliver = deliver

    @override
    @activity.defn(name="set_alarm")
    async def set_alarm(self, alarm: Alarm) -> None:
        address = names.parse_workflow_id(alarm.workflow_id)
        await self._client.start_workflow(
            names.ALARM_TYPE,
            alarm,
            id=names.alarm_id(alarm.workflow_id),
            task_queue=activity.info().task_queue,
            static_summary=f"wakes {address.agent} for {address.key}",
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            start_signal=names.SET_ALARM,
            start_signal_args=[alarm],
        )

    @override
    @activity.defn(name="deliver")
    async def deliver(self, mail: Mail) -> None:
        await self._deliver(names.parse_workflow_id(mail.workflow_id), mail.events)

    @override
    @activity.defn(name="look_at_clock")
    async def look_at_clock(self, request: LookRequest) -> Hush:
        return look(request.hours, request.at, ZoneInfo(request.hours.time_zone))
