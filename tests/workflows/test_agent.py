"""What `AgentWorkflow` decides, on a Temporal server, with the world replaced by fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from fakes import World, answer, event
from talking import ask, cancel, deliver
from temporalio import activity
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from typing_extensions import override

from workflows import names
from workflows.errors import Remedy, activity_error
from workflows.messages import (
    Decision,
    Intervention,
    PublishRequest,
    SpecRequest,
    Status,
    ThinkRequest,
    ToolCall,
    ToolOutcome,
    ToolRequest,
    ToolResult,
    TurnOutcome,
)
from workflows.spec import BudgetSpec, ControlSpec, MailboxSpec, ToolControl
from workflows.state import AgentState

Eventually = Callable[..., Awaitable[object]]
ME = Intervention(by="tester", reason="a test")


async def status(handle: WorkflowHandle) -> Status:
    return await handle.query(names.STATUS, result_type=Status)


async def stop(handle: WorkflowHandle) -> None:
    await handle.execute_update(names.STOP, ME, result_type=Status)
    await handle.result()


def answered(world: World) -> list[str]:
    return [reference.id for reply in world.replies for reference in reply.answers]


async def test_an_event_is_answered_once_under_a_deterministic_id(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P1, P2: events are answered in order, each once; the reply names what it answers, and each duplicate is told."""
    world = World(spec=ControlSpec(digest="s", mailbox=MailboxSpec(events_per_turn=1)))
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1), event(2), event(1), event(1))
        await eventually(lambda: len(world.replies) == 2)
        await stop(handle)
    assert answered(world) == ["event-1", "event-2"]
    assert [reply.id for reply in world.replies] == [f"{agent_id}/1/0", f"{agent_id}/2/0"]
    dropped = world.lifecycle(names.DUPLICATE_TYPE)
    assert [message.data["id"] for message in dropped] == ["event-1", "event-1"]
    assert len({message.id for message in dropped}) == 2, "or whoever drops repetitions would count one"
    assert [m.data["outcome"] for m in world.lifecycle(names.TURN_COMPLETED_TYPE)] == ["completed", "completed"]


async def test_each_step_builds_on_the_entry_before_it(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """The workflow hands on the head and only what is new: never the conversation."""
    world = World()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: len(world.replies) == 2)
        await stop(handle)
    first, second = world.thoughts
    assert first.head is None
    assert second.head == answer("", first).head
    assert [e.id for e in second.events] == ["event-2"]


async def test_duplicates_are_dropped_after_continue_as_new_and_after_close(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P1: what an agent has seen it has seen, also when its workflow has been closed and woken again."""
    world = World()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await stop(handle)
        handle = await deliver(client, agent_id, queue, event(1), event(2))
        await eventually(lambda: len(world.replies) == 2)
        now = await status(handle)
        await stop(handle)
    assert answered(world) == ["event-1", "event-2"]
    assert (now.accepted, now.duplicates, now.turn) == (2, 1, 2)
    assert world.thoughts[1].head == answer("", world.thoughts[0]).head


async def test_ask_returns_the_reply_and_the_same_one_when_asked_again(
    client: Client, queue: str, agent_id: str
) -> None:
    """`ask` is answered once under its id: a repetition gets the reply of then, without a model call."""
    world = World(think_with=lambda request: answer(f"to {request.events[0].data}", request))
    async with world.workers(client, queue):
        first = await ask(client, agent_id, queue, "hello?", "q-1")
        again = await ask(client, agent_id, queue, "hello?", "q-1")
        await stop(client.get_workflow_handle(agent_id))
    assert first.text == "to {'text': 'hello?'}"
    assert again.id == first.id
    assert len(world.thoughts) == 1
    assert [request.turn for request in world.recalled] == [1]


async def test_a_question_has_a_turn_of_its_own(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """A person waits for the answer to the question, not to the mail around it."""
    world = World()
    handle = await deliver(client, agent_id, queue, event(1))
    async with world.workers(client, queue):
        reply = await ask(client, agent_id, queue, "hello?", "q-1")
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: sorted(answered(world)) == ["event-1", "event-2", "q-1"])
        await stop(handle)
    assert [reference.id for reference in reply.answers] == ["q-1"]


async def test_tools_run_with_an_idempotency_key_and_their_results_go_into_the_next_step(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P9: each call of a step has a key of its own, derived from turn, step and place."""
    calls = [ToolCall(id="a", name="look"), ToolCall(id="b", name="look"), ToolCall(id="c", name="fly")]

    def think(request: ThinkRequest) -> Decision:
        if request.step == 1:
            return answer("", request, *calls)
        return answer(", ".join(result.content for result in request.results), request)

    world = World(
        think_with=think,
        tool=lambda request: ToolResult(call_id=request.call.id, name="look", content=f"seen {request.call.id}"),
        spec=ControlSpec(digest="s", tools={"look": ToolControl()}),
    )
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await stop(handle)
    assert world.replies[0].text == "seen a, seen b, There is no tool 'fly'. Tools you may call: look."
    assert sorted(r.idempotency_key for r in world.tool_requests) == [f"{agent_id}/1/1/0", f"{agent_id}/1/1/1"]
    assert (world.replies[0].steps, world.replies[0].tool_calls) == (2, 3)


@pytest.mark.parametrize(
    ("repeatable", "tries", "outcome"), [(True, 3, ToolOutcome.ERROR), (False, 1, ToolOutcome.UNKNOWN)]
)
async def test_a_tool_that_breaks_is_repeated_only_if_it_may_be(
    client: Client,
    queue: str,
    agent_id: str,
    eventually: Eventually,
    repeatable: bool,
    tries: int,
    outcome: ToolOutcome,
) -> None:
    """P9: at most once where a tool is not repeatable, and then its outcome is reported as unknown."""

    def think(request: ThinkRequest) -> Decision:
        return answer("", request, ToolCall(id="a", name="pay")) if request.step == 1 else answer("done", request)

    def pay(request: ToolRequest) -> ToolResult:
        raise RuntimeError("the bank is closed")

    world = World(
        think_with=think,
        tool=pay,
        spec=ControlSpec(digest="s", tools={"pay": ToolControl(repeatable=repeatable, attempts=3)}),
    )
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await stop(handle)
    assert len(world.tool_requests) == tries
    (result,) = world.thoughts[1].results
    assert result.outcome is outcome
    assert "the bank is closed" in result.content


async def test_in_its_last_step_a_turn_has_to_answer(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P10: a model that calls tools for ever is held to its steps per turn."""
    world = World(
        think_with=lambda request: answer("still at it", request, ToolCall(id="a", name="look")),
        tool=lambda request: ToolResult(call_id="a", name="look", content="nothing"),
        spec=ControlSpec(digest="s", budget=BudgetSpec(steps_per_turn=3), tools={"look": ToolControl()}),
    )
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await stop(handle)
    assert [request.tools_allowed for request in world.thoughts] == [True, True, False]
    assert len(world.tool_requests) == 2
    assert world.replies[0].text == "still at it"


async def test_a_refused_model_call_fails_the_turn_and_the_owner_is_told(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P11: a final error ends the turn; the agent goes on with the next event."""

    def think(request: ThinkRequest) -> Decision:
        if request.turn == 1:
            return Decision(head="entry-1", error="400: no such parameter")
        return answer("fine", request)

    world = World(think_with=think)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: len(world.replies) == 2)
        now = await status(handle)
        await stop(handle)
    failed, fine = world.replies
    assert (failed.outcome, failed.error) == (TurnOutcome.FAILED, "400: no such parameter")
    assert fine.outcome is TurnOutcome.COMPLETED
    assert world.thoughts[1].head == "entry-1"
    assert [m.data["error"] for m in world.lifecycle(names.TURN_FAILED_TYPE)] == ["400: no such parameter"]
    assert now.failed_turns == 1


async def test_a_model_that_is_away_for_hours_delays_the_answer_and_loses_nothing(
    skipping: WorkflowEnvironment, client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """P11: Temporal retries, after what the server asked for."""

    def think(request: ThinkRequest) -> Decision:
        if len(world.thoughts) < 3:
            raise ApplicationError("busy", type="RetryLater", next_retry_delay=timedelta(hours=2))
        return answer("at last", request)

    world = World(think_with=think)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await skipping.sleep(timedelta(hours=5))
        await eventually(lambda: len(world.replies) == 1)
        await stop(handle)
    assert world.replies[0].text == "at last"


async def test_a_paused_agent_accepts_mail_and_answers_when_resumed(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Paused: no turn begins, mail waits, `ask` is refused with who paused it and why."""
    world = World()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        await handle.execute_update(names.PAUSE, ME, result_type=Status)
        await deliver(client, agent_id, queue, event(2), event(3))
        paused = await eventually(lambda: _when(handle, lambda now: now.waiting == 2))
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await ask(client, agent_id, queue, "are you there?")
        assert len(world.thoughts) == 1
        await handle.execute_update(names.RESUME, ME, result_type=Status)
        await eventually(lambda: len(world.replies) == 2)
        await stop(handle)
    assert paused.state == "paused"
    assert paused.doing == "paused by tester: a test; 2 events wait"
    assert "paused by tester: a test" in str(refused.value.cause)
    assert answered(world) == ["event-1", "event-2", "event-3"]
    assert len(world.lifecycle(names.AGENT_PAUSED_TYPE)) == 1


async def test_a_stopped_agent_keeps_its_waiting_mail_and_takes_it_when_woken(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """Nothing is lost at a stop: the snapshot holds the mail, and the next event wakes the agent."""
    world = World()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue)
        await handle.execute_update(names.PAUSE, ME, result_type=Status)
        await deliver(client, agent_id, queue, event(1))
        await stop(handle)
        assert [e.id for e in world.snapshots[agent_id].mailbox.waiting] == ["event-1"]
        handle = await deliver(client, agent_id, queue, event(2))
        await handle.execute_update(names.RESUME, ME, result_type=Status)
        await eventually(lambda: len(world.replies) == 1)
        await stop(handle)
    assert answered(world) == ["event-1", "event-2"]


async def test_an_agent_cancelled_in_the_middle_of_a_turn_goes_on_with_it_when_woken(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """A cancellation from the Web UI is not a loss: the turn in progress is in the snapshot."""
    thinking = asyncio.Event()

    async def think(request: ThinkRequest) -> Decision:
        if not thinking.is_set():
            thinking.set()
            await asyncio.Event().wait()
        return answer("done", request)

    world = World(think_with=think)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await thinking.wait()
        await cancel(handle)
        assert agent_id in world.snapshots
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: len(world.replies) == 2)
        await stop(client.get_workflow_handle(agent_id))
    assert answered(world) == ["event-1", "event-2"]
    assert [(r.turn, r.step) for r in world.thoughts] == [(1, 1), (1, 1), (2, 1)]


async def test_an_idle_agent_hibernates_and_the_next_event_wakes_it(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """After its idle time an agent closes, keeping its snapshot; it wakes as if it had never slept."""
    world = World(spec=ControlSpec(digest="s", hibernate_after=timedelta(days=30)))
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await handle.result()
        assert world.snapshots[agent_id].turn == 1
        handle = await deliver(client, agent_id, queue, event(1), event(2))
        await handle.result()
    assert answered(world) == ["event-1", "event-2"]


async def test_a_new_spec_is_taken_up_with_the_next_turn(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """A running agent follows its spec: what changed holds from the next turn on."""
    world = World()
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: len(world.replies) == 1)
        world.spec = ControlSpec(digest="spec-2")
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: len(world.replies) == 2)
        await stop(handle)
    assert [request.spec_digest for request in world.thoughts] == ["spec-1", "spec-2"]


async def test_a_reply_kafka_will_never_take_does_not_stop_the_agent(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """A final publish error is shown, and the agent goes on."""

    async def publish(request: PublishRequest) -> None:
        if any(m.type == names.REPLY_TYPE and m.data["turn"] == 1 for m in request.messages):
            raise ApplicationError("too large", type="Final", non_retryable=True)

    world = World(publish_with=publish)
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: _when(handle, lambda now: now.replies == 1))
        await deliver(client, agent_id, queue, event(2))
        await eventually(lambda: len(world.replies) == 1)
        now = await status(handle)
        await stop(handle)
    assert answered(world) == ["event-2"]
    assert any("could not be published: too large" in item.text for item in now.recent)


async def test_a_workflow_id_that_is_no_address_fails_at_once(client: Client, queue: str) -> None:
    """P14: whoever starts an agent under a wrong id is told what an id looks like."""
    world = World()
    async with world.workers(client, queue):
        handle = await client.start_workflow(names.WORKFLOW_TYPE, id=f"order-42-{queue}", task_queue=queue)
        with pytest.raises(Exception) as failed:  # noqa: PT011  # the cause is what matters
            await handle.result()
    assert "expected agent/TENANT/AGENT/KEY" in str(failed.value.__cause__)


async def _when(handle: WorkflowHandle, holds: Callable[[Status], bool]) -> Status | None:
    now = await status(handle)
    return now if holds(now) else None


async def test_a_pause_that_comes_while_the_snapshot_is_written_is_kept(
    client: Client, queue: str, agent_id: str, eventually: Eventually
) -> None:
    """A person who pauses an agent in the moment in which it goes to sleep has paused it."""
    world = World(spec=ControlSpec(digest="s", hibernate_after=timedelta(seconds=1)))
    handle = client.get_workflow_handle(agent_id)

    async def pause() -> None:
        world.before_snapshot = None
        await handle.execute_update(names.PAUSE, Intervention(by="ada"), result_type=Status)

    world.before_snapshot = pause
    async with world.workers(client, queue):
        await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: agent_id in world.snapshots)
        await deliver(client, agent_id, queue, event(2))

        async def waits() -> bool:
            status = await handle.query(names.STATUS, result_type=Status)
            return (status.state, status.waiting) == ("paused", 1)

        await eventually(waits)
        await handle.execute_update(names.RESUME, Intervention(by="ada"), result_type=Status)
        await eventually(lambda: len(world.replies) == 2)


class Away(World):
    """A world whose ledger and specs are away at first."""

    tries: int = 0

    def _try(self) -> None:
        self.tries += 1
        if self.tries <= 4:  # three within the workflow task, and one of those that an operator sees
            raise activity_error(Remedy.RETRY_LATER, "The ledger did not work.")


class WithoutSpec(Away):
    @override
    @activity.defn(name="load_spec")
    async def load_spec(self, request: SpecRequest) -> ControlSpec | None:
        self._try()
        return await super().load_spec(request)


class WithoutState(Away):
    @override
    @activity.defn(name="wake")
    async def wake(self, workflow_id: str) -> AgentState | None:
        self._try()
        return await super().wake(workflow_id)


@pytest.mark.parametrize("world", [WithoutSpec(), WithoutState()], ids=["spec", "state"])
async def test_what_is_away_is_waited_for(
    client: Client, queue: str, agent_id: str, eventually: Eventually, world: Away
) -> None:
    """P6: for longer than a workflow task lasts; the agent does not fail, and no mail is lost."""
    async with world.workers(client, queue):
        handle = await deliver(client, agent_id, queue, event(1))
        await eventually(lambda: answered(world) == ["event-1"])
        assert world.tries == 5
        await stop(handle)
