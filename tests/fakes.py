"""Fakes of the activities: subclasses of the interface, so that mypy and the Worker hold them to its signatures.

world = World(think=lambda request: answer("hello"))
async with world.worker(client, task_queue): ...
world.published, world.thoughts, world.snapshots
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from talking import deliver
from temporalio import activity
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker
from typing_extensions import override

from activities.clock import Clock
from workers.wiring import workflow_runner
from workflows import names
from workflows.agent import AgentWorkflow
from workflows.alarm import AlarmWorkflow
from workflows.budget import Lifted, LiftRecord
from workflows.events import Event, Outgoing
from workflows.interface import (
    BudgetActivities,
    ClockActivities,
    LedgerActivities,
    ModelActivities,
    PublishActivities,
    SpecActivities,
    ToolActivities,
)
from workflows.messages import (
    Alarm,
    Approval,
    CloseRequest,
    CompactRequest,
    Decision,
    Mail,
    PublishRequest,
    Reply,
    ReplyRequest,
    ResultToKeep,
    RewindRecord,
    Rewound,
    SpecRequest,
    ThinkRequest,
    ToolCall,
    ToolRequest,
    ToolResult,
    Usage,
)
from workflows.occurrence import OccurrenceWorkflow
from workflows.quiet_hours import Hush, LookRequest
from workflows.spec import ControlSpec
from workflows.state import AgentState, Snapshot


def event(number: int | str, *, data: object = None, source: str = "test", kind: str = "test.event") -> Event:
    """An event with this id."""
    return Event(id=f"event-{number}", source=source, type=kind, subject="key", data=data)


def answer(text: str, request: ThinkRequest, *calls: ToolCall) -> Decision:
    """A decision whose head is made from the step it belongs to, as the ledger's ids are."""
    head = hashlib.sha256(f"{request.head}{request.turn}{request.step}".encode()).hexdigest()
    usage = Usage(input_tokens=10, output_tokens=1)
    return Decision(head=head, text=text, tool_calls=list(calls), usage=usage, model="scripted")


def sum_up(request: CompactRequest) -> Decision:
    """Sums up; the head is made as `answer` makes it."""
    head = hashlib.sha256(f"{request.head}{request.turn}{request.step}".encode()).hexdigest()
    return Decision(head=head, usage=Usage(input_tokens=100, output_tokens=10), model="scripted")


def echo(request: ThinkRequest) -> Decision:
    """Answers with the ids of the events it was shown."""
    return answer(" ".join(e.id for e in request.events) or "done", request)


@dataclass
class World(
    BudgetActivities,
    ClockActivities,
    ModelActivities,
    ToolActivities,
    LedgerActivities,
    SpecActivities,
    PublishActivities,
):
    """Everything an agent may ask of the world, and a record of what it asked."""

    think_with: Callable[[ThinkRequest], Decision | Awaitable[Decision]] = echo
    compact_with: Callable[[CompactRequest], Decision] = sum_up
    tool: Callable[[ToolRequest], ToolResult | Awaitable[ToolResult]] | None = None
    spec: ControlSpec = field(default_factory=lambda: ControlSpec(digest="spec-1"))
    publish_with: Callable[[PublishRequest], Awaitable[None]] | None = None
    before_snapshot: Callable[[], Awaitable[None]] | None = None

    thoughts: list[ThinkRequest] = field(default_factory=list)
    compactions: list[CompactRequest] = field(default_factory=list)
    tool_requests: list[ToolRequest] = field(default_factory=list)
    published: list[Outgoing] = field(default_factory=list)
    snapshots: dict[str, AgentState] = field(default_factory=dict)
    kept_results: list[ResultToKeep] = field(default_factory=list)
    approvals: list[Approval] = field(default_factory=list)
    recalled: list[ReplyRequest] = field(default_factory=list)
    closings: list[CloseRequest] = field(default_factory=list)
    recorded: Decision | None = None
    """What a step that is closed has recorded already."""
    rewinds: list[RewindRecord] = field(default_factory=list)
    lifts: list[LiftRecord] = field(default_factory=list)
    rewind_with: Callable[[RewindRecord], Awaitable[None]] | None = None
    alarms: list[Alarm] = field(default_factory=list)
    looks: list[LookRequest] = field(default_factory=list)
    look_with: Callable[[LookRequest], Hush] | None = None
    clock: Clock | None = None
    """The real thing, over the workers' client."""

    @property
    def replies(self) -> list[Reply]:
        """Replies published, in order."""
        return [Reply.model_validate(m.data) for m in self.published if m.type == names.REPLY_TYPE]

    def lifecycle(self, kind: str) -> list[Outgoing]:
        """Lifecycle events of one type, in order."""
        return [m for m in self.published if m.type == kind]

    @override
    @activity.defn(name="think")
    async def think(self, request: ThinkRequest) -> Decision:
        self.thoughts.append(request)
        decision = self.think_with(request)
        return decision if isinstance(decision, Decision) else await decision

    @override
    @activity.defn(name="compact")
    async def compact(self, request: CompactRequest) -> Decision:
        self.compactions.append(request)
        return self.compact_with(request)

    @override
    @activity.defn(name="run_tool")
    async def run_tool(self, request: ToolRequest) -> ToolResult:
        self.tool_requests.append(request)
        assert self.tool is not None
        result = self.tool(request)
        return result if isinstance(result, ToolResult) else await result

    @override
    @activity.defn(name="keep_result")
    async def keep_result(self, result: ResultToKeep) -> str:
        self.kept_results.append(result)
        return result.content

    @override
    @activity.defn(name="record_approval")
    async def record_approval(self, approval: Approval) -> None:
        self.approvals.append(approval)

    @override
    @activity.defn(name="close_step")
    async def close_step(self, request: CloseRequest) -> Decision:
        self.closings.append(request)
        if self.recorded is not None:
            return self.recorded
        return answer("", request.step).model_copy(update={"given_up": True, "usage": Usage(), "model": ""})

    @override
    @activity.defn(name="wake")
    async def wake(self, workflow_id: str) -> AgentState | None:
        return self.snapshots.get(workflow_id)

    @override
    @activity.defn(name="keep_snapshot")
    async def keep_snapshot(self, snapshot: Snapshot) -> None:
        if self.before_snapshot is not None:
            await self.before_snapshot()
        self.snapshots[snapshot.workflow_id] = snapshot.state

    @override
    @activity.defn(name="find_reply")
    async def find_reply(self, request: ReplyRequest) -> Reply | None:
        self.recalled.append(request)
        found = [reply for reply in self.replies if reply.turn == request.turn]
        return found[0] if found else None

    @override
    @activity.defn(name="record_rewind")
    async def record_rewind(self, record: RewindRecord) -> Rewound:
        """Every entry is there and on some branch; the ledger's own tests know more."""
        if self.rewind_with is not None:
            await self.rewind_with(record)
        made = [number for number, one in enumerate(self.rewinds, 1) if one.request.id == record.request.id]
        if not made:
            if record.fork and record.lived:
                raise ApplicationError("it has lived already", type=names.REFUSED, non_retryable=True)
            self.rewinds.append(record)
        return Rewound(
            id=record.request.id,
            workflow_id=record.workflow_id,
            turn=record.turn,
            head=record.request.entry,
            head_turn=1,
            head_step=1,
            old_head=None if record.fork else record.head,
            by=record.request.by,
            reason=record.request.reason,
            number=made[0] if made else len(self.rewinds),
        )

    @override
    @activity.defn(name="record_lift")
    async def record_lift(self, record: LiftRecord) -> Lifted:
        self.lifts.append(record)
        return Lifted(
            id=record.request.id,
            workflow_id=record.workflow_id,
            scope=record.scope,
            per=record.per,
            by=record.request.by,
            reason=record.request.reason,
            **record.request.model_dump(include={"tokens", "micro_usd", "turns"}),
        )

    @override
    @activity.defn(name="load_spec")
    async def load_spec(self, request: SpecRequest) -> ControlSpec | None:
        return None if request.known_digest == self.spec.digest else self.spec

    @override
    @activity.defn(name="publish")
    async def publish(self, request: PublishRequest) -> None:
        if self.publish_with is not None:
            await self.publish_with(request)
        self.published.extend(request.messages)

    @override
    @activity.defn(name="set_alarm")
    async def set_alarm(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)
        assert self.clock is not None
        await self.clock.set_alarm(alarm)

    @override
    @activity.defn(name="deliver")
    async def deliver(self, mail: Mail) -> None:
        assert self.clock is not None
        await self.clock.deliver(mail)

    @override
    @activity.defn(name="look_at_clock")
    async def look_at_clock(self, request: LookRequest) -> Hush:
        self.looks.append(request)
        if self.look_with is not None:
            return self.look_with(request)
        assert self.clock is not None
        return await self.clock.look_at_clock(request)

    @asynccontextmanager
    async def workers(self, client: Client, task_queue: str) -> AsyncIterator[None]:
        """The agent worker and the model worker, over these fakes."""

        async def hand_over(address: names.Address, events: Sequence[Event]) -> None:
            await deliver(client, names.workflow_id(address), task_queue, *events)

        self.clock = Clock(client, hand_over)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(
                Worker(
                    client,
                    task_queue=task_queue,
                    workflows=[AgentWorkflow, AlarmWorkflow, OccurrenceWorkflow],
                    activities=[
                        self.run_tool,
                        self.wake,
                        self.keep_snapshot,
                        self.find_reply,
                        self.record_rewind,
                        self.record_lift,
                        self.record_approval,
                        self.close_step,
                        self.keep_result,
                        self.load_spec,
                        self.publish,
                        self.set_alarm,
                        self.deliver,
                        self.look_at_clock,
                    ],
                    workflow_runner=workflow_runner(),
                )
            )
            await stack.enter_async_context(
                Worker(client, task_queue=names.model_queue(task_queue), activities=[self.think, self.compact])
            )
            yield
