"""Record the lives that `test_replay.py` replays: `python tests/workflows/record_histories.py [NAME ...]`.

Each life is a short script against `AgentWorkflow` on a dev server with the world faked; its runs are written to
`histories/NAME-N.json`. Histories of earlier releases are worth keeping: record a new name rather than an old one
again, unless no release has made that history.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import World, answer, event
from pydantic import JsonValue
from servers import TemporalServer, eventually
from temporalio import activity
from temporalio.client import Client, WithStartWorkflowOperation, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError

from workers.wiring import start_options
from workflows import names
from workflows.budget import Lifted, LiftRequest, LimitScope, Measure, Per, Refusal
from workflows.events import Delivery, Event, hold, hold_digest, release
from workflows.messages import (
    AskRequest,
    DecideRequest,
    Decision,
    Intervention,
    Occurrence,
    Reply,
    RewindRequest,
    Rewound,
    Settlement,
    Status,
    SteerRequest,
    ThinkRequest,
    ToolCall,
    ToolRequest,
    ToolResult,
)
from workflows.names import Address
from workflows.quiet_hours import Hush, LookRequest, QuietHours
from workflows.spec import BudgetSpec, ControlSpec, MailboxSpec, ToolControl
from workflows.state import AgentInput
from workflows.steering import Effect

HISTORIES = Path(__file__).parent / "histories"
SUGGEST_AFTER = 60
_QUEUE = "recorder"
_ME = Intervention(by="recorder", reason="for the record")


@dataclass
class Life:
    """One agent, and what a script does to it."""

    client: Client
    name: str
    world: World = field(default_factory=World)

    @property
    def address(self) -> Address:
        return Address("recorded", "desk", self.name)

    @property
    def handle(self) -> WorkflowHandle[object, object]:
        """Its newest run."""
        return self.client.get_workflow_handle(names.workflow_id(self.address))

    async def deliver(self, *events: Event) -> None:
        await self.client.start_workflow(
            names.WORKFLOW_TYPE,
            AgentInput(),
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            start_signal=names.DELIVER,
            start_signal_args=[Delivery(events=list(events))],
            **start_options(self.address, _QUEUE),
        )

    async def ask(self, question_id: str) -> Reply:
        return await self.client.execute_update_with_start_workflow(
            names.ASK,
            AskRequest(text="Where is it?", id=question_id),
            start_workflow_operation=WithStartWorkflowOperation(
                names.WORKFLOW_TYPE,
                AgentInput(),
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                **start_options(self.address, _QUEUE),
            ),
            result_type=Reply,
        )

    async def steer(self, update: str) -> None:
        await self.handle.execute_update(update, _ME, result_type=Status)

    async def move(self, update: str, entry: str) -> None:
        """Rewind it, or begin it as a fork."""
        await self.client.execute_update_with_start_workflow(
            update,
            RewindRequest(entry=entry, by=_ME.by, reason=_ME.reason),
            start_workflow_operation=WithStartWorkflowOperation(
                names.WORKFLOW_TYPE,
                AgentInput(),
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                **start_options(self.address, _QUEUE),
            ),
            result_type=Rewound,
        )

    async def replies(self, count: int) -> None:
        """Wait until so many are published."""
        await eventually(lambda: len(self.world.replies) >= count)

    async def stop(self) -> None:
        handle = self.handle
        await self.steer(names.STOP)
        await handle.result()


def _with_tools(request: ThinkRequest) -> Decision:
    """Calls three tools: one that works, one that breaks, one that is not there."""
    if request.results:
        return answer("; ".join(result.content for result in request.results), request)
    calls = [ToolCall(id=f"call-{n}", name=name) for n, name in enumerate(("look", "break", "fly"))]
    return answer("", request, *calls)


async def plain(life: Life) -> None:
    """Two turns, one with several events."""
    await life.deliver(event(1))
    await life.replies(1)
    await life.deliver(event(2), event(3))
    await life.replies(2)
    await life.stop()


async def tools(life: Life) -> None:
    """A step with three tool calls, and one after it."""

    def run(request: object) -> ToolResult:
        call = request.call  # type: ignore[attr-defined]
        if call.name == "break":
            raise RuntimeError("it is stuck")
        return ToolResult(call_id=call.id, name=call.name, content="seen")

    life.world.think_with = _with_tools
    life.world.tool = run
    life.world.spec = ControlSpec(digest="s", tools={"look": ToolControl(), "break": ToolControl(repeatable=False)})
    await life.deliver(event(1))
    await life.replies(1)
    await life.stop()


async def duplicates(life: Life) -> None:
    """Events again: within a delivery, while they wait, after they were answered."""
    life.world.spec = ControlSpec(digest="s", mailbox=MailboxSpec(events_per_turn=1))
    await life.deliver(event(1), event(1), event(2))
    await life.replies(2)
    await life.deliver(event(2), event(3))
    await life.replies(3)
    await life.stop()


async def compacted(life: Life) -> None:
    """In its second turn the conversation is summed up first."""

    def think(request: ThinkRequest) -> Decision:
        if request.may_compact and request.turn > 1:
            return Decision(head=request.head or "", compact=True)
        return answer("heard", request)

    life.world.think_with = think
    life.world.spec = ControlSpec(digest="spec-1", compact=True)
    await life.deliver(event(1))
    await life.replies(1)
    await life.deliver(event(2))
    await life.replies(2)
    await life.stop()


def _asking(request: ThinkRequest) -> Decision:
    """In its first turn it calls a tool that waits, beside one that does not."""
    if request.turn > 1 or request.results:
        return answer("; ".join(result.content for result in request.results) or "heard", request)
    refund = ToolCall(id="call-0", name="refund", arguments='{"amount_cents": 30000}')
    return answer("", request, refund, ToolCall(id="call-1", name="look"))


def _waiting(life: Life, **refund: object) -> None:
    life.world.think_with = _asking
    life.world.tool = lambda request: ToolResult(call_id=request.call.id, name=request.call.name, content="done")
    tools = {"refund": ToolControl.model_validate({"repeatable": False, **refund}), "look": ToolControl()}
    life.world.spec = ControlSpec(digest="spec-1", tools=tools)


async def approved(life: Life) -> None:
    """A call waits for its approval, through several runs, and is then made; a reminder and a late word on the way."""
    _waiting(life, approval={"remind_seconds": 1})
    await life.deliver(event(1))
    await eventually(lambda: life.world.lifecycle(names.APPROVAL_REMINDER_TYPE))
    for number in range(2, 16):
        await life.deliver(event(number))
    call = names.call_key(life.handle.id, 1, 1, 0)
    await life.handle.execute_update(
        names.DECIDE, DecideRequest(call=call, approve=True, by="recorder"), result_type=Settlement
    )
    await life.replies(2)
    data: JsonValue = {"call": call, "approve": False}
    await life.deliver(Event(id="late", source="test", type=names.DECIDE_TYPE, subject="key", data=data))
    await life.stop()


async def refused(life: Life) -> None:
    """Nobody decides in time: it is not made."""
    _waiting(life, approval={"expires_seconds": 2})
    await life.deliver(event(1))
    await life.replies(1)
    await life.stop()


async def late(life: Life) -> None:
    """An answer comes from outside; and one never."""
    _waiting(life, answer_within=timedelta(days=1).total_seconds())
    await life.deliver(event(1))
    await eventually(lambda: life.world.lifecycle(names.TOOL_WAITING_TYPE))
    call = names.call_key(life.handle.id, 1, 1, 0)
    data: JsonValue = {"call": call, "content": "It has arrived."}
    await life.deliver(Event(id="word", source="test", type=names.COMPLETE_TYPE, subject="key", data=data))
    await life.replies(1)
    await life.stop()


async def unanswered(life: Life) -> None:
    """No answer comes from outside: the outcome is unknown, and that is told."""
    _waiting(life, answer_within=1)
    await life.deliver(event(1))
    await life.replies(1)
    await life.stop()


async def question(life: Life) -> None:
    """A question, the same again, and one between events."""
    await life.ask("q-1")
    await life.ask("q-1")
    await life.deliver(event(1))
    await life.ask("q-2")
    await life.replies(3)
    await life.stop()


async def steered(life: Life) -> None:
    """Paused with mail waiting, resumed, stopped, woken by an event, stopped again."""
    await life.deliver(event(1))
    await life.replies(1)
    await life.steer(names.PAUSE)
    await life.deliver(event(2))
    await life.steer(names.RESUME)
    await life.replies(2)
    await life.stop()
    await life.deliver(event(2), event(3))
    await life.replies(3)
    await life.stop()


async def continued(life: Life) -> None:
    """Continue-as-new between turns, and in the middle of a turn with tools."""

    def think(request: ThinkRequest) -> Decision:
        long = any(e.id == "event-long" for e in request.events) or request.results
        if long and request.step < 9:
            return answer("", request, ToolCall(id=f"call-{request.step}", name="look"))
        return answer("done", request)

    life.world.think_with = think
    life.world.tool = lambda request: ToolResult(call_id=request.call.id, name="look", content="seen")
    life.world.spec = ControlSpec(digest="s", tools={"look": ToolControl()}, budget=BudgetSpec(steps_per_turn=10))
    for number in range(1, 6):
        await life.deliver(event(number))
        await life.replies(number)
    await life.deliver(event("long"))
    await life.replies(6)
    await life.stop()


async def failed(life: Life) -> None:
    """A turn the model refuses, one whose call fails for good, one that is answered."""

    def think(request: ThinkRequest) -> Decision:
        if request.turn == 1:
            return Decision(head="entry-1", error="400: no such parameter")
        if request.turn == 2:
            raise ApplicationError("no such spec", type="Final", non_retryable=True)
        return answer("fine", request)

    life.world.think_with = think
    for number in range(1, 4):
        await life.deliver(event(number))
        await life.replies(number)
    await life.stop()


async def cancelled(life: Life) -> None:
    """Cancelled in the middle of a turn, and woken."""
    thinking = asyncio.Event()

    async def think(request: ThinkRequest) -> Decision:
        if not thinking.is_set():
            thinking.set()
            raise ApplicationError("busy", type="RetryLater", next_retry_delay=timedelta(hours=1))
        return answer("done", request)

    life.world.think_with = think
    await life.deliver(event(1))
    await thinking.wait()
    handle = life.handle
    await handle.cancel()
    await eventually(lambda: handle.id in life.world.snapshots)
    await life.deliver(event(2))
    await life.replies(2)
    await life.stop()


async def hibernated(life: Life) -> None:
    """Idle for longer than its spec allows, and woken."""
    life.world.spec = ControlSpec(digest="s", hibernate_after=timedelta(seconds=1))
    await life.deliver(event(1))
    await life.handle.result()
    await life.deliver(event(1), event(2))
    await life.handle.result()


async def held(life: Life) -> None:
    """Mail behind two dead letters: a question passes, one is redriven, the other dropped; idle, it does not sleep."""
    life.world.spec = ControlSpec(digest="s", hibernate_after=timedelta(seconds=1))
    await life.deliver(event(1), hold("t/0/2", "not JSON"), event(3), hold("t/0/4", "not JSON"), event(5))
    await life.replies(1)
    await life.ask("q-1")
    await life.deliver(event(2).model_copy(update={"fills": hold_digest("t/0/2")}))
    await life.replies(3)
    await life.deliver(release("t/0/4", "ada", "a test"))
    await life.replies(4)
    await life.handle.result()


async def rewound(life: Life) -> None:
    """Rewound while idle, in mid-turn, with mail waiting, and asleep."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def think(request: ThinkRequest) -> Decision:
        if any(e.id == "event-slow" for e in request.events):
            begun.set()
            await go_on.wait()
        return answer("done", request)

    life.world.think_with = think
    await life.deliver(event(1))
    await life.replies(1)
    first = life.world.replies[0].entry
    assert first
    await life.deliver(event(2))
    await life.replies(2)
    await life.move(names.REWIND, first)
    await life.deliver(event("slow"))
    await begun.wait()
    rewinding = asyncio.create_task(life.move(names.REWIND, first))
    await life.deliver(event(3))
    go_on.set()
    await rewinding
    await life.replies(4)
    await life.stop()
    await life.move(names.REWIND, first)
    await life.deliver(event(4))
    await life.replies(5)
    await life.stop()


async def forked(life: Life) -> None:
    """Begins behind another agent's entry; the same again is refused."""
    await life.move(names.FORK, "an entry of another")
    with contextlib.suppress(WorkflowUpdateFailedError):
        await life.move(names.FORK, "another entry")
    await life.deliver(event(1))
    await life.replies(1)
    await life.stop()


async def repaired(life: Life) -> None:
    """An answer that is sent back and then fits, and one that never does."""

    def think(request: ThinkRequest) -> Decision:
        if request.turn == 1 and request.repair:
            return answer("{}", request).model_copy(update={"data": {}})
        return answer("hm", request).model_copy(update={"faults": ["the answer is not JSON"]})

    life.world.think_with = think
    life.world.spec = ControlSpec(digest="s", repairs=2)
    await life.deliver(event(1))
    await life.replies(1)
    await life.ask("q-1")
    await life.stop()


async def speechless(life: Life) -> None:
    """A model that says nothing, and then something; and one that says nothing at all."""

    def think(request: ThinkRequest) -> Decision:
        text = "Here." if request.turn == 1 and request.repair else ""
        return answer(text, request).model_copy(update={"empty": not text})

    life.world.think_with = think
    await life.deliver(event(1))
    await life.replies(1)
    await life.ask("q-1")
    await life.stop()


async def looping(life: Life) -> None:
    """A model that makes one call again and again, until it gets no tools."""

    def think(request: ThinkRequest) -> Decision:
        if request.tools_allowed:
            return answer("", request, ToolCall(id=f"call-{request.step}", name="look"))
        return answer("I do not know.", request)

    life.world.think_with = think
    life.world.tool = lambda request: ToolResult(call_id=request.call.id, name="look", content="seen")
    life.world.spec = ControlSpec(digest="s", tools={"look": ToolControl()}, budget=BudgetSpec(steps_per_turn=50))
    await life.deliver(event(1))
    await life.replies(1)
    await life.stop()


async def over_budget(life: Life) -> None:
    """Over its budget: looks again, is stopped and woken, until it is allowed more."""
    limit = Refusal(scope=LimitScope.KEY, per=Per.TOTAL, measure=Measure.TOKENS, limit=10, spent=10, needed=5)

    def think(request: ThinkRequest) -> Decision:
        if request.step == 2 and not life.world.lifts:
            return Decision(head=request.head or "", refused=limit)
        return answer("done", request, *([ToolCall(id="call-1", name="look")] if request.step == 1 else []))

    life.world.think_with = think
    life.world.tool = lambda request: ToolResult(call_id=request.call.id, name="look", content="seen")
    life.world.spec = ControlSpec(digest="s", tools={"look": ToolControl()})
    await life.deliver(event(1))
    await eventually(lambda: bool(life.world.lifecycle(names.BUDGET_EXCEEDED_TYPE)))
    seen = len(life.world.thoughts)
    await life.handle.signal(names.CHECK_BUDGET)
    await eventually(lambda: len(life.world.thoughts) > seen)
    await life.stop()
    await life.deliver(event(2))
    await eventually(lambda: len(life.world.thoughts) > seen + 1)
    request = LiftRequest(id="l-1", scope=limit.scope, per=limit.per, tokens=100, by=_ME.by, reason=_ME.reason)
    await life.handle.execute_update(names.LIFT_BUDGET, request, result_type=Lifted)
    await life.replies(2)
    await life.stop()


def _waking(life: Life, within: float, **spec: object) -> None:
    """In its first turn it sets a wake-up and makes a call beside it."""

    def think(request: ThinkRequest) -> Decision:
        if request.turn > 1 or request.results:
            return answer("; ".join(result.content for result in request.results) or "awake", request)
        set_it = ToolCall(id="call-0", name=names.WAKE_ME, arguments=f'{{"note": "look again", "in": {within}}}')
        wrong = ToolCall(id="call-1", name=names.WAKE_ME, arguments="{}")
        return answer("", request, set_it, wrong, ToolCall(id="call-2", name="look"))

    life.world.think_with = think
    life.world.tool = lambda request: ToolResult(call_id=request.call.id, name="look", content="seen")
    tools = {"look": ToolControl(), names.WAKE_ME: ToolControl(built_in=True)}
    life.world.spec = ControlSpec.model_validate({"digest": "s", "tools": tools, "wake_ups": {}, **spec})


def _held(life: Life, *calls: ToolCall) -> tuple[asyncio.Semaphore, asyncio.Event]:
    """First steps wait until they are let go: what says that one has begun, and what lets them go."""
    began, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def think(request: ThinkRequest) -> Decision:
        if request.step == 1:
            began.release()
            while not go_on.is_set():
                activity.heartbeat()
                await asyncio.sleep(0.05)
            return answer("", request, *calls) if calls else answer("done", request)
        return answer("done", request)

    life.world.think_with = think
    life.world.tool = lambda request: ToolResult(call_id=request.call.id, name="look", content="seen")
    rules = [{"types": [f"test.{effect.value}"], "then": effect} for effect in Effect]
    mailbox = MailboxSpec.model_validate({"during_turn": rules})
    life.world.spec = ControlSpec(digest="s", mailbox=mailbox, tools={"look": ToolControl()})
    return began, go_on


async def joined(life: Life) -> None:
    """In mid-turn comes what joins it, what waits and what is rejected, and a person's words."""
    began, go_on = _held(life, ToolCall(id="call-1", name="look"))
    await life.deliver(event(1))
    await began.acquire()
    await life.deliver(event(2), event(3, kind="test.merge"), event(4, kind="test.reject"))
    await life.handle.execute_update(names.STEER, SteerRequest(text="Mind it.", by="ada"), result_type=Status)
    go_on.set()
    await life.replies(2)
    await life.stop()


async def interrupted(life: Life) -> None:
    """An event interrupts a model call; then a turn is cancelled in its model call, and one while a tool works."""
    began, go_on = _held(life)
    await life.deliver(event(1))
    await began.acquire()
    await life.deliver(event(2, kind="test.interrupt"))
    await life.replies(1)
    await life.deliver(event(3))
    await began.acquire()
    await life.steer(names.CANCEL_TURN)
    await life.replies(2)
    began, go_on = _held(life, ToolCall(id="call-1", name="look"))
    go_on.set()
    looking, looked = asyncio.Event(), asyncio.Event()

    async def look(request: ToolRequest) -> ToolResult:
        looking.set()
        await looked.wait()
        return ToolResult(call_id=request.call.id, name="look", content="seen")

    life.world.tool = look
    await life.deliver(event(4))
    await looking.wait()
    await life.steer(names.CANCEL_TURN)
    looked.set()
    await life.replies(3)
    await life.stop()


async def drained(life: Life) -> None:
    """Stopped in mid-turn, it answers its mail first."""
    began, go_on = _held(life)
    await life.deliver(event(1))
    await began.acquire()
    await life.deliver(event(2))
    await life.handle.execute_update(names.STOP, Intervention(by="ada", drain=True), result_type=Status)
    go_on.set()
    await life.handle.result()


async def woken(life: Life) -> None:
    """Wakes itself while it is open."""
    _waking(life, 2)
    await life.deliver(event(1))
    await life.replies(2)
    await life.stop()


async def alarmed(life: Life) -> None:
    """Hibernates, and is woken by its alarm, and hibernates again."""
    _waking(life, 4, hibernate_after=timedelta(seconds=1))
    await life.deliver(event(1))
    await life.handle.result()
    await life.replies(2)
    await life.handle.result()


async def scheduled(life: Life) -> None:
    """An event comes by a schedule, whose workflow ends when it is answered; one has given up waiting."""
    schedule = names.schedule_id(names.ScheduleId(life.address.tenant, life.address.agent, life.name))
    occurrence = Occurrence(
        workflow_id=names.workflow_id(life.address), type=names.SCHEDULE_TYPE, data={"text": "Look."}
    )
    first = await life.client.start_workflow(
        names.OCCURRENCE_TYPE, occurrence, id=f"{schedule}-2026-03-01T09:00:00Z", task_queue=_QUEUE
    )
    await first.result()
    await life.replies(1)
    await life.steer(names.PAUSE)
    impatient = occurrence.model_copy(update={"wait": timedelta(seconds=1)})
    second = await life.client.start_workflow(
        names.OCCURRENCE_TYPE, impatient, id=f"{schedule}-2026-03-02T09:00:00Z", task_queue=_QUEUE
    )
    await second.result()
    await life.steer(names.RESUME)
    await life.replies(2)
    await life.stop()


async def quiet(life: Life) -> None:
    """Mail waits for the end of quiet hours, also for the end of the next ones; a question does not."""

    def look(request: LookRequest) -> Hush:
        is_quiet = len(life.world.looks) in {1, 3}
        until = request.at + timedelta(seconds=3 if is_quiet else 1)
        return Hush(hours=request.hours, quiet=is_quiet, until=until)

    life.world.look_with = look
    hours = QuietHours(start="22:00", end="07:00")
    life.world.spec = ControlSpec(digest="s", quiet_hours=hours, hibernate_after=timedelta(seconds=2))
    await life.deliver(event(1))
    await life.ask("q-1")
    await life.replies(2)
    await life.handle.result()
    await life.deliver(event(2))
    await life.replies(3)
    await life.handle.result()


_STACK_TRACE = re.compile(r'"stackTrace": "(?:[^"\\]|\\.)*"')

LIVES: tuple[Callable[[Life], Awaitable[None]], ...] = (
    plain,
    tools,
    duplicates,
    question,
    steered,
    continued,
    failed,
    cancelled,
    hibernated,
    held,
    rewound,
    forked,
    compacted,
    repaired,
    over_budget,
    approved,
    refused,
    late,
    unanswered,
    woken,
    alarmed,
    speechless,
    looping,
    joined,
    interrupted,
    drained,
    scheduled,
    quiet,
)


async def record(wanted: list[str]) -> None:
    """Run the lives of these names (all when there are none) and write their histories."""
    suggest = f"limit.historyCount.suggestContinueAsNew={SUGGEST_AFTER}"
    with TemporalServer(arguments=["--dynamic-config-value", suggest]) as server:
        client = await Client.connect(
            server.address, data_converter=pydantic_data_converter, identity="record_histories.py"
        )
        for script in LIVES:
            name = script.__name__
            if wanted and name not in wanted:
                continue
            life = Life(client, name)
            async with life.world.workers(client, _QUEUE):
                await script(life)
            agent = names.workflow_id(life.address)
            await _write(client, agent, name)
            await _write(client, names.alarm_id(agent), f"{name}_alarm")
            for number in (1, 2):
                schedule = names.schedule_id(names.ScheduleId("recorded", "desk", name))
                await _write(client, f"{schedule}-2026-03-0{number}T09:00:00Z", f"{name}_occurrence_{number}")


async def _write(client: Client, workflow_id: str, name: str) -> None:
    runs = [run async for run in client.list_workflows(f"WorkflowId = '{workflow_id}'")]  # newest first
    for old in HISTORIES.glob(f"{name}-*.json"):
        old.unlink()
    for number, run in enumerate(sorted(runs, key=lambda run: run.start_time), 1):
        history = await client.get_workflow_handle(run.id, run_id=run.run_id).fetch_history()
        file = HISTORIES / f"{name}-{number}.json"
        # Where in our files an activity failed is of this machine, and of no use to a replay.
        file.write_text(_STACK_TRACE.sub('"stackTrace": ""', history.to_json()) + "\n", encoding="utf-8")
        print(f"{file}: {len(history.events)} events")  # noqa: T201  # this is a command


if __name__ == "__main__":
    HISTORIES.mkdir(exist_ok=True)
    asyncio.run(record(sys.argv[1:]))
