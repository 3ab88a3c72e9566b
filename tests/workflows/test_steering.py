"""What a new event does to a turn in progress: the spec's rules, a person's words, and a cancelled turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from fakes import World, answer, event
from hypothesis import given
from hypothesis import strategies as st
from talking import deliver
from temporalio import activity
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError

from workflows import names
from workflows.approval import ApprovalPolicy, Permission
from workflows.events import Event, hold
from workflows.mailbox import Mailbox
from workflows.messages import (
    AskRequest,
    Decision,
    Intervention,
    Reply,
    RewindRecord,
    RewindRequest,
    Rewound,
    Status,
    SteerRequest,
    ThinkRequest,
    ToolCall,
    ToolRequest,
    ToolResult,
    TurnOutcome,
    Usage,
)
from workflows.spec import ControlSpec, MailboxSpec, ToolControl
from workflows.steering import MOST_INTERRUPTIONS, Effect, TurnRule, effect

Eventually = Callable[..., Awaitable[Any]]
ADA = Intervention(by="ada", reason="the wrong customer")
RULES = (
    TurnRule(types=["news.joins"], then=Effect.MERGE),
    TurnRule(types=["news.urgent"], then=Effect.INTERRUPT),
    TurnRule(types=["news.void", names.ASK_TYPE], then=Effect.REJECT),
)
LOOK = ToolCall(id="c1", name="look")


# The rules -----------------------------------------------------------------------------------------------------------


def test_the_first_rule_that_fits_decides() -> None:
    """Types are globs; what no rule is about waits."""
    rules = (
        TurnRule(types=["store.order.cancelled"], then=Effect.INTERRUPT),
        TurnRule(types=["store.order.*", "store.note"], then=Effect.MERGE),
    )
    found = {kind: effect(rules, event(1, kind=f"store.{kind}")) for kind in ("order.cancelled", "order.paid", "stock")}
    assert found == {"order.cancelled": Effect.INTERRUPT, "order.paid": Effect.MERGE, "stock": Effect.QUEUE}


def test_a_person_s_words_join_whatever_the_rules_say() -> None:
    """And interrupt, if the person says so."""
    everything = (TurnRule(types=["*"], then=Effect.REJECT),)
    words = event(1, kind=names.STEER_TYPE, data={"text": "Stop that.", "interrupt": False})
    assert effect(everything, words) is Effect.MERGE
    assert effect((), words.model_copy(update={"data": {"text": "Now!", "interrupt": True}})) is Effect.INTERRUPT


def test_what_keeps_the_order_is_never_steered() -> None:
    """A hold is no mail."""
    assert effect((TurnRule(types=["*"], then=Effect.REJECT),), hold("t/0/1", "unreadable")) is Effect.QUEUE


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=30), st.integers(0, 12))
def test_joining_takes_the_oldest_that_may_and_leaves_the_rest_in_order(
    mail: list[tuple[bool, int]], limit: int
) -> None:
    """Nothing is lost or taken twice, and never more than the limit."""
    events = [event(n, kind="joins" if may else "waits", data="x" * size) for n, (may, size) in enumerate(mail)]
    mailbox = Mailbox()
    mailbox.accept(events, horizon=1000)
    joined = mailbox.join(3, lambda one: one.type == "joins", limit)
    may_join = [one for one in events if one.type == "joins"]
    assert joined == may_join[:limit]
    assert mailbox.waiting == [one for one in events if one not in joined]
    assert [mailbox.turn_of(one.digest) for one in joined] == [3] * len(joined)
    assert mailbox.accept(joined, horizon=1000) == joined, "sent again they are duplicates"


def test_nothing_joins_past_a_hold_but_a_person_s_words() -> None:
    """`order: strict`: what may have been before it is not known."""
    mailbox = Mailbox()
    before, behind = event(1, kind="joins"), event(2, kind="joins")
    words = event(3, kind=names.STEER_TYPE, data={"text": "Go on."})
    mailbox.accept([before, hold("t/0/7", "unreadable"), behind, words], horizon=1000)
    assert mailbox.join(1, lambda _: True, 10) == [before, words]


# In a turn -----------------------------------------------------------------------------------------------------------


class Thinking:
    """A model whose first call in a turn is held until the test lets go, or until it is cancelled."""

    def __init__(self, *calls: ToolCall, held: int = 1) -> None:
        self._calls = calls
        self._held = held
        self.began = asyncio.Semaphore(0)
        self.go_on = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, request: ThinkRequest) -> Decision:
        if request.step <= self._held:
            self.began.release()
            try:
                while not self.go_on.is_set():
                    activity.heartbeat()
                    await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            if self._calls and not request.results:
                return answer("", request, *self._calls)
        said = [*(one.content for one in request.results), *(one.id for one in request.events)]
        return answer(" ".join(said) or "done", request)


def world_of(thinking: Thinking, **spec: Any) -> World:
    control = ControlSpec(
        digest="s", mailbox=MailboxSpec(during_turn=RULES), tools={"look": ToolControl(repeatable=False)}, **spec
    )
    return World(think_with=thinking, tool=_looked, spec=control)


def _looked(request: ToolRequest) -> ToolResult:
    return ToolResult(call_id=request.call.id, name=request.call.name, content="seen")


async def status(handle: WorkflowHandle) -> Status:
    return await handle.query(names.STATUS, result_type=Status)


def news(number: int, kind: str) -> Event:
    return event(number, kind=f"news.{kind}")


def answered(reply: Reply) -> list[str]:
    return [reference.id for reference in reply.answers]


async def test_what_merges_joins_the_next_step_and_what_queues_waits(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The turn's reply answers it too; what no rule is about is answered by the next turn, in order."""
    thinking = Thinking(LOOK)
    world = world_of(thinking)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await thinking.began.acquire()
        await deliver(client, agent_id, queue, event(2), news(3, "joins"))
        await eventually(lambda: _waits(handle, 2))
        thinking.go_on.set()
        await eventually(lambda: len(world.replies) == 2)
    first, second = world.replies
    assert (answered(first), first.text) == (["event-1", "event-3"], "seen event-3")
    assert answered(second) == ["event-2"]
    shown = [[one.id for one in thought.events] for thought in world.thoughts]
    assert shown == [["event-1"], ["event-3"], ["event-2"], []], "each turn looks once"


async def _waits(handle: WorkflowHandle, count: int) -> bool:
    return (await status(handle)).waiting == count


async def test_what_comes_too_late_to_merge_is_answered_by_the_next_turn(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """An answer that is there is not held back."""
    thinking = Thinking()
    world = world_of(thinking)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await thinking.began.acquire()
        await deliver(client, agent_id, queue, news(2, "joins"))
        await eventually(lambda: _waits(handle, 1))
        thinking.go_on.set()
        await eventually(lambda: len(world.replies) == 2)
    assert [answered(reply) for reply in world.replies] == [["event-1"], ["event-2"]]


async def test_an_interruption_cancels_the_model_call_and_is_taken_at_once(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P6: the call is really cancelled, its step is closed, and the next one has the new event; both are answered."""
    thinking = Thinking()
    world = world_of(thinking)
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, event(1))
        await thinking.began.acquire()
        await deliver(client, agent_id, queue, news(2, "urgent"))
        await eventually(lambda: len(world.replies) == 1)
        await eventually(lambda: thinking.cancelled == 1)
    (reply,) = world.replies
    assert (answered(reply), reply.steps) == (["event-1", "event-2"], 1)
    (closing,) = world.closings
    assert (closing.step.step, [one.id for one in closing.step.events]) == (1, ["event-1"])
    assert (closing.why, closing.cancelled) == ("A new event came: news.urgent", False)
    last = world.thoughts[-1]
    assert (last.step, [one.id for one in last.events]) == (2, ["event-2"])
    assert last.head == answer("", closing.step).head, "it goes on behind what was given up"
    (told,) = world.lifecycle(names.TURN_INTERRUPTED_TYPE)
    assert told.data["events"][0]["id"] == "event-2"


async def test_an_answer_that_was_recorded_before_the_interruption_counts(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P6: it is paid, so it is given; what came is answered by the next turn."""
    thinking = Thinking()
    world = world_of(thinking)
    world.recorded = Decision(head="a" * 64, text="Already said.", usage=Usage(input_tokens=5), model="m")
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, event(1))
        await thinking.began.acquire()
        await deliver(client, agent_id, queue, news(2, "urgent"))
        thinking.go_on.set()
        await eventually(lambda: len(world.replies) == 2)
    if world.closings:
        assert world.replies[0].text == "Already said."
    assert [answered(reply) for reply in world.replies] == [["event-1"], ["event-2"]]
    assert not world.lifecycle(names.TURN_INTERRUPTED_TYPE)


async def test_interruptions_are_bounded(client: Client, queue: str, agent_id: str, eventually: Eventually) -> None:
    """A stream of urgent events can't keep an agent from ever answering."""
    thinking = Thinking(held=10_000)
    world = world_of(thinking)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(0))
        for number in range(1, MOST_INTERRUPTIONS + 1):
            await thinking.began.acquire()
            await deliver(client, agent_id, queue, news(number, "urgent"))
        await thinking.began.acquire()
        await deliver(client, agent_id, queue, news(99, "urgent"))
        await eventually(lambda: _waits(handle, 1))
        thinking.go_on.set()
        await eventually(lambda: len(world.replies) == 2)
    assert len(world.closings) == MOST_INTERRUPTIONS
    assert answered(world.replies[0]) == [f"event-{number}" for number in range(MOST_INTERRUPTIONS + 1)]
    assert world.replies[0].steps == 1
    assert answered(world.replies[1]) == ["event-99"]


async def test_what_is_rejected_is_told_and_not_taken(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Only during a turn; sent again it is a duplicate, and when the agent is idle another one is taken."""
    thinking = Thinking()
    world = world_of(thinking)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await thinking.began.acquire()
        await deliver(client, agent_id, queue, news(2, "void"))
        await eventually(lambda: _rejected(handle, 1))
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await handle.execute_update(names.ASK, AskRequest(text="How far?"), result_type=Reply)
        assert isinstance(refused.value.cause, ApplicationError)
        assert refused.value.cause.type == names.BUSY
        thinking.go_on.set()
        await eventually(lambda: len(world.replies) == 1)
        await deliver(client, agent_id, queue, news(2, "void"), news(3, "void"))
        await eventually(lambda: len(world.replies) == 2)
        now = await status(handle)
    assert [answered(reply) for reply in world.replies] == [["event-1"], ["event-3"]]
    (told,) = world.lifecycle(names.REJECTED_TYPE)
    assert told.data == {"source": "test", "id": "event-2", "type": "news.void"}
    assert (now.accepted, now.rejected, now.duplicates) == (2, 2, 1)


async def _rejected(handle: WorkflowHandle, count: int) -> bool:
    return (await status(handle)).rejected == count


# A person's words ----------------------------------------------------------------------------------------------------


async def test_words_to_an_agent_at_work_join_its_turn(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Also where the spec has no rules; said again with the same id, they count once."""
    thinking = Thinking(LOOK)
    world = World(think_with=thinking, tool=_looked, spec=ControlSpec(digest="s", tools={"look": ToolControl()}))
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await thinking.began.acquire()
        words = SteerRequest(text="Mind the dog.", by="ada", id="w-1")
        for _ in range(2):
            await handle.execute_update(names.STEER, words, result_type=Status)
        thinking.go_on.set()
        await eventually(lambda: len(world.replies) == 1)
    (reply,) = world.replies
    assert answered(reply) == ["event-1", "w-1"]
    said = world.thoughts[1].events[0]
    assert (said.source, said.data) == ("ada", {"text": "Mind the dog.", "interrupt": False})


async def test_urgent_words_interrupt(client: Client, queue: str, agent_id: str, eventually: Eventually) -> None:
    """Without any rule in the spec."""
    thinking = Thinking()
    world = World(think_with=thinking)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await thinking.began.acquire()
        await handle.execute_update(
            names.STEER, SteerRequest(text="Not so.", by="ada", id="w-1", interrupt=True), result_type=Status
        )
        await eventually(lambda: len(world.replies) == 1)
    assert [one.step.step for one in world.closings] == [1]
    assert answered(world.replies[0]) == ["event-1", "w-1"]


async def test_words_to_an_idle_agent_begin_a_turn(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """They are answered as a question whose answer nobody waits for."""
    world = World()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await handle.execute_update(names.STEER, SteerRequest(text="Look again.", id="w-1"), result_type=Status)
        await eventually(lambda: len(world.replies) == 2)
    assert answered(world.replies[1]) == ["w-1"]


# A turn that is cancelled --------------------------------------------------------------------------------------------


async def test_a_cancelled_turn_ends_without_an_answer_and_mail_goes_on(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P6: its model call is cancelled; who and why is told; its events count as answered."""
    thinking = Thinking()
    world = world_of(thinking)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await thinking.began.acquire()
        await deliver(client, agent_id, queue, event(2))
        now = await handle.execute_update(names.CANCEL_TURN, ADA, result_type=Status)
        assert now.doing == "turn 1 is being cancelled by ada: the wrong customer"
        await eventually(lambda: thinking.cancelled == 1)
        thinking.go_on.set()
        await eventually(lambda: len(world.replies) == 2)
        await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.lifecycle(names.DUPLICATE_TYPE)) == 1)
        now = await status(handle)
    first, second = world.replies
    assert (first.outcome, answered(first)) == (TurnOutcome.CANCELLED, ["event-1"])
    assert first.error == "The turn was cancelled by ada: the wrong customer"
    assert (first.steps, first.text) == (0, "")
    assert (second.outcome, answered(second)) == (TurnOutcome.COMPLETED, ["event-2"])
    assert [closing.cancelled for closing in world.closings] == [True]
    (told,) = world.lifecycle(names.TURN_CANCELLED_TYPE)
    assert told.data["outcome"] == "cancelled"
    assert now.failed_turns == 0


async def test_tool_calls_under_way_are_finished_and_no_others_are_made(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P9: what was done is kept with the closed step, for the agent to know of."""
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slow(request: ToolRequest) -> ToolResult:
        began.set()
        await go_on.wait()
        return _looked(request)

    thinking = Thinking(LOOK)
    thinking.go_on.set()
    world = world_of(thinking)
    world.tool = slow
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await began.wait()
        await handle.execute_update(names.CANCEL_TURN, ADA, result_type=Status)
        go_on.set()
        await eventually(lambda: len(world.replies) == 1)
    assert world.replies[0].outcome is TurnOutcome.CANCELLED
    (closing,) = world.closings
    assert [result.content for result in closing.step.results] == ["seen"]
    assert len(world.thoughts) == 1


async def test_a_turn_that_waits_for_approval_can_be_cancelled(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The call is not made, whoever would decide later is told so."""
    thinking = Thinking(LOOK)
    thinking.go_on.set()
    policy = ApprovalPolicy(default=Permission.ASK)
    world = World(
        think_with=thinking, tool=_looked, spec=ControlSpec(digest="s", tools={"look": ToolControl(approval=policy)})
    )
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: _is(handle, "waiting"))
        await handle.execute_update(names.CANCEL_TURN, ADA, result_type=Status)
        await eventually(lambda: len(world.replies) == 1)
    assert world.replies[0].outcome is TurnOutcome.CANCELLED
    assert not world.tool_requests
    (approval,) = world.approvals
    assert (approval.approved, approval.why) == (False, "The turn was cancelled by ada: the wrong customer")
    (result,) = world.closings[0].step.results
    assert result.content.startswith("Not made: this call was refused")


async def _is(handle: WorkflowHandle, state: str) -> bool:
    return (await status(handle)).state == state


async def test_an_agent_in_no_turn_has_none_to_cancel(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """It says so."""
    world = World()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await eventually(lambda: _is(handle, "idle"))
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await handle.execute_update(names.CANCEL_TURN, ADA, result_type=Status)
    assert isinstance(refused.value.cause, ApplicationError)
    assert refused.value.cause.type == names.NO_TURN


# Stopping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drain", [False, True])
async def test_a_stop_with_drain_answers_the_mail_that_waits(
    client: Client, queue: str, agent_id: str, eventually: Eventually, *, drain: bool
) -> None:
    """Without it, what waits is kept for the next time the agent is woken."""
    thinking = Thinking()
    world = World(think_with=thinking, spec=ControlSpec(digest="s", mailbox=MailboxSpec(events_per_turn=1)))
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await thinking.began.acquire()
        await deliver(client, agent_id, queue, event(2), event(3))
        await handle.execute_update(names.STOP, Intervention(by="ada", drain=drain), result_type=Status)
        thinking.go_on.set()
        await handle.result()
    assert len(world.replies) == (3 if drain else 1)
    assert len(world.snapshots[agent_id].mailbox.waiting) == (0 if drain else 2)


async def test_mail_that_comes_while_an_idle_agent_closes_is_taken(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P1: here it comes while the close waits for an update; it used to sleep in the snapshot until the next event."""
    world = World(spec=ControlSpec(digest="s", hibernate_after=timedelta(seconds=1)))
    go_on = asyncio.Event()

    async def hold_on(_: RewindRecord) -> None:
        await go_on.wait()

    async def has_been_idle() -> bool:
        history = await handle.fetch_history()
        return any(one.event_type == EventType.EVENT_TYPE_TIMER_FIRED for one in history.events)

    world.rewind_with = hold_on
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        request = RewindRequest(entry=world.replies[0].entry or "", id="r-1")
        rewinding = asyncio.create_task(handle.execute_update(names.REWIND, request, result_type=Rewound))
        await eventually(has_been_idle)
        await deliver(client, agent_id, queue, event(2))
        go_on.set()
        await rewinding
        await eventually(lambda: len(world.replies) == 2)
