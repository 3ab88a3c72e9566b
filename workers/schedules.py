"""The agents' schedules as Temporal Schedules: made, changed and removed as the specs say. `perennial schedules`.

    changes = await apply(client, settings.task_queue, specs.agents)

A schedule of ours is known by its id (`names.schedule_id`). Whoever has paused one finds it paused after a change.
What can't be done is raised as `CommandError`, whose message is for the person at the terminal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from pydantic import BaseModel
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleCalendarSpec,
    ScheduleDescription,
    ScheduleHandle,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleRange,
    ScheduleUpdate,
    ScheduleUpdateInput,
)
from temporalio.client import ScheduleSpec as Times
from temporalio.service import RPCError, RPCStatusCode

from workers import operations
from workers.exits import CommandError
from workers.settings import Settings
from workflows import names
from workflows.messages import Occurrence
from workflows.names import Address, ScheduleId
from workflows.schedule import Overlap, ScheduleSpec, Span
from workflows.spec import AgentSpec

_RPC = timedelta(seconds=10)
_OVERLAP = {
    Overlap.SKIP: ScheduleOverlapPolicy.SKIP,
    Overlap.BUFFER_ONE: ScheduleOverlapPolicy.BUFFER_ONE,
    Overlap.BUFFER_ALL: ScheduleOverlapPolicy.BUFFER_ALL,
    Overlap.ALLOW_ALL: ScheduleOverlapPolicy.ALLOW_ALL,
}


class Change(BaseModel):
    """What `apply` has done about a schedule."""

    schedule: str
    did: str
    """created, changed, removed, or unchanged."""


class Listed(BaseModel):
    """A schedule, as people are shown it."""

    schedule: str
    """TENANT/AGENT/NAME."""
    agent: str
    """TENANT/AGENT/KEY that it comes to."""
    when: str
    state: str
    """active, paused; missing if the specs have it and Temporal has not; left over the other way round."""
    overlap: str = ""
    next: datetime | None = None
    last: datetime | None = None
    taken: int = 0
    """Occurrences so far."""
    skipped: int = 0
    """Left out, since the one before was not answered yet."""
    note: str = ""


async def apply(client: Client, task_queue: str, specs: Sequence[AgentSpec], *, prune: bool = False) -> list[Change]:
    """Have Temporal keep exactly the schedules that these agents' specs say; those of other agents are left alone.

    Args:
        client: Temporal's.
        task_queue: of the agent workers.
        specs: the agents.
        prune: also remove those of agents that have no spec here.

    Raises:
        RPCError: Temporal is away or refuses; what it refuses of a schedule is said with its name.
    """
    changes = []
    wanted = dict(_wanted(specs))
    for found, (spec, schedule) in wanted.items():
        did = await _keep(client, task_queue, found, spec, schedule)
        changes.append(Change(schedule=shown(found), did=did))
    known = {(spec.tenant, spec.name) for spec in specs}
    for found in await _ours(client):
        if found not in wanted and (prune or (found.tenant, found.agent) in known):
            await handle(client, found).delete(rpc_timeout=_RPC)
            changes.append(Change(schedule=shown(found), did="removed"))
    return changes


async def listed(client: Client, settings: Settings, specs: Sequence[AgentSpec]) -> list[Listed]:
    """All schedules, of the specs and in Temporal.

    Raises:
        CommandError: Temporal is away or refuses.
    """
    wanted = dict(_wanted(specs))
    async with operations.plainly(settings, "The schedules can't be listed"):
        there = await _ours(client)
        return [await _listed(client, found, wanted.get(found)) for found in sorted({*wanted, *there}, key=tuple)]


async def steer(client: Client, settings: Settings, schedule: ScheduleId, what: str, note: str) -> None:
    """Pause, resume, trigger or remove a schedule.

    Raises:
        CommandError: there is no such schedule; Temporal is away or refuses.
    """
    one = handle(client, schedule)
    async with operations.plainly(settings, f"{shown(schedule)} can't be changed"):
        try:
            if what == "pause":
                await one.pause(note=note or None, rpc_timeout=_RPC)
            elif what == "resume":
                await one.unpause(note=note or None, rpc_timeout=_RPC)
            elif what == "trigger":
                await one.trigger(rpc_timeout=_RPC)
            else:
                await one.delete(rpc_timeout=_RPC)
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            raise CommandError(
                f"There is no schedule {shown(schedule)}. `perennial schedules list` shows those there are, "
                "`perennial schedules apply` makes those of the specs."
            ) from error


def resolve(text: str, specs: Sequence[AgentSpec]) -> ScheduleId:
    """The schedule that somebody means by TENANT/AGENT/NAME, AGENT/NAME or its id.

    Raises:
        CommandError: it is none of these.
    """
    parts = (text.removeprefix("schedule/") if names.parse_schedule_id(text) else text).split("/")
    if len(parts) == 3:  # noqa: PLR2004  # TENANT/AGENT/NAME
        return ScheduleId(*parts)
    if len(parts) == 2:  # noqa: PLR2004  # AGENT/NAME
        found = [ScheduleId(spec.tenant, spec.name, parts[1]) for spec in specs if spec.name == parts[0]]
        if len(found) == 1:
            return found[0]
    raise CommandError(f"{text!r} is no schedule; write TENANT/AGENT/NAME, or AGENT/NAME of an agent with a spec.")


def handle(client: Client, schedule: ScheduleId) -> ScheduleHandle:
    """A schedule in Temporal."""
    return client.get_schedule_handle(names.schedule_id(schedule))


def shown(schedule: ScheduleId) -> str:
    """As people name it: TENANT/AGENT/NAME."""
    return "/".join(schedule)


def planned(spec: AgentSpec, schedule: ScheduleSpec, task_queue: str) -> Schedule:
    """A schedule of a spec, as Temporal keeps it."""
    found = ScheduleId(spec.tenant, spec.name, schedule.name)
    text = {"text": schedule.text} if schedule.text else {}
    occurrence = Occurrence(
        workflow_id=names.workflow_id(Address(spec.tenant, spec.name, schedule.key)),
        type=schedule.type,
        data={"schedule": schedule.name, **schedule.data, **text},
        wait=timedelta(0) if schedule.overlap is Overlap.ALLOW_ALL else timedelta(seconds=schedule.wait_seconds),
        when=schedule.when,
        written=_digest(schedule, task_queue),
    )
    return Schedule(
        action=ScheduleActionStartWorkflow(
            names.OCCURRENCE_TYPE,
            occurrence,
            id=names.schedule_id(found),
            task_queue=task_queue,
            static_summary=f"{schedule.name} for {spec.name}/{schedule.key}",
        ),
        spec=_times(schedule),
        policy=SchedulePolicy(
            overlap=_OVERLAP[schedule.overlap], catchup_window=timedelta(seconds=schedule.catch_up_seconds)
        ),
    )


def _times(schedule: ScheduleSpec) -> Times:
    calendars = []
    if schedule.calendar:
        ranges = {name: _ranges(found) for name, found in schedule.calendar.fields.items()}
        any_year = schedule.calendar.year == "*"
        calendars = [
            ScheduleCalendarSpec(
                second=ranges["second"],
                minute=ranges["minute"],
                hour=ranges["hour"],
                day_of_month=ranges["day_of_month"],
                month=ranges["month"],
                day_of_week=ranges["day_of_week"],
                year=[] if any_year else ranges["year"],
            )
        ]
    return Times(
        cron_expressions=[schedule.cron] if schedule.cron else [],
        calendars=calendars,
        intervals=[ScheduleIntervalSpec(every=schedule.every)] if schedule.every else [],
        jitter=timedelta(seconds=schedule.jitter_seconds) if schedule.jitter_seconds else None,
        time_zone_name=schedule.time_zone,
    )


def _ranges(found: Sequence[Span]) -> list[ScheduleRange]:
    return [ScheduleRange(span.start, span.end, span.step) for span in found]


def _digest(schedule: ScheduleSpec, task_queue: str) -> str:
    return hashlib.sha256(f"{task_queue}\n{schedule.model_dump_json()}".encode()).hexdigest()


def _wanted(specs: Sequence[AgentSpec]) -> Iterator[tuple[ScheduleId, tuple[AgentSpec, ScheduleSpec]]]:
    for spec in specs:
        for schedule in spec.schedules:
            yield ScheduleId(spec.tenant, spec.name, schedule.name), (spec, schedule)


async def _keep(client: Client, task_queue: str, found: ScheduleId, spec: AgentSpec, schedule: ScheduleSpec) -> str:
    """Create it, or change it if it is there and another."""
    wanted = planned(spec, schedule, task_queue)
    try:
        there = await _described(client, found)
        if there is None:
            try:
                await client.create_schedule(names.schedule_id(found), wanted, rpc_timeout=_RPC)
            except ScheduleAlreadyRunningError:  # another worker was first
                there = await _described(client, found)
            else:
                return "created"
        known = await _occurrence(client, there) if there else None
        if known and known.written == _digest(schedule, task_queue):
            return "unchanged"

        def changed(was: ScheduleUpdateInput) -> ScheduleUpdate:
            wanted.state = was.description.schedule.state
            return ScheduleUpdate(schedule=wanted)

        await handle(client, found).update(changed, rpc_timeout=_RPC)
    except RPCError as error:
        if error.status != RPCStatusCode.INVALID_ARGUMENT:
            raise
        raise CommandError(f"Temporal does not take the schedule {shown(found)}: {error.message}") from error
    return "changed"


async def _ours(client: Client) -> list[ScheduleId]:
    """The schedules in Temporal whose ids are of our form; one that was just made may not be among them yet."""
    found = [names.parse_schedule_id(one.id) async for one in await client.list_schedules(rpc_timeout=_RPC)]
    return [one for one in found if one]


async def _described(client: Client, found: ScheduleId) -> ScheduleDescription | None:
    try:
        return await handle(client, found).describe(rpc_timeout=_RPC)
    except RPCError as error:
        if error.status == RPCStatusCode.NOT_FOUND:
            return None
        raise


async def _occurrence(client: Client, described: ScheduleDescription) -> Occurrence | None:
    """What a schedule brings; None if it was not made by us."""
    action = described.schedule.action
    if not isinstance(action, ScheduleActionStartWorkflow) or action.workflow != names.OCCURRENCE_TYPE:
        return None
    (occurrence,) = await client.data_converter.decode(action.args, [Occurrence])
    return occurrence if isinstance(occurrence, Occurrence) else None


async def _listed(client: Client, found: ScheduleId, wanted: tuple[AgentSpec, ScheduleSpec] | None) -> Listed:
    described = await _described(client, found)
    if described is None:
        key = f"/{wanted[1].key}" if wanted else ""
        when = wanted[1].when if wanted else ""
        return Listed(schedule=shown(found), agent=f"{found.tenant}/{found.agent}{key}", when=when, state="missing")
    occurrence = await _occurrence(client, described)
    info, state = described.info, described.schedule.state
    agent = "/".join(names.parse_workflow_id(occurrence.workflow_id)) if occurrence else ""
    word = "paused" if state.paused else "active"
    return Listed(
        schedule=shown(found),
        agent=agent,
        when=occurrence.when if occurrence else "",
        state=word if wanted else f"{word}, left over",
        overlap=described.schedule.policy.overlap.name.lower(),
        next=next(iter(info.next_action_times), None) if not state.paused else None,
        last=max((one.scheduled_at for one in info.recent_actions), default=None),
        taken=info.num_actions,
        skipped=info.num_actions_skipped_overlap,
        note=state.note or "",
    )
