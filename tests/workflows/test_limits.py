"""Temporal refuses what has 2 MB, for ever: an agent never asks for that. On the dev server, which has these limits."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime

import pytest
from fakes import World, answer, event
from hypothesis import given
from hypothesis import strategies as st
from servers import TemporalServer, eventually
from talking import ask, deliver
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowUpdateFailedError,
)
from temporalio.contrib.pydantic import pydantic_data_converter

from workflows import names
from workflows.events import Event, Outgoing
from workflows.mailbox import Mailbox, size
from workflows.messages import Decision, Intervention, Reply, Status, ThinkRequest, ToolCall, ToolResult
from workflows.spec import ControlSpec, MailboxSpec, ToolControl
from workflows.state import AgentState, shortened

ME = Intervention(by="tester", reason="a test")
LARGE = "x" * 240_000


class Agent:
    """An agent of the test's own, on a real server."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.queue = f"test-{uuid.uuid4()}"
        self.id = f"agent/acme/tester/{uuid.uuid4()}"

    @property
    def handle(self) -> WorkflowHandle[object, object]:
        return self.client.get_workflow_handle(self.id)

    async def deliver(self, *events: Event) -> None:
        await deliver(self.client, self.id, self.queue, *events)

    async def ask(self, text: str) -> Reply:
        return await ask(self.client, self.id, self.queue, text, "question")

    async def status(self) -> Status:
        return await self.handle.query(names.STATUS, result_type=Status)

    async def stop(self) -> None:
        await self.handle.execute_update(names.STOP, ME, result_type=Status)
        await self.handle.result()


@pytest.fixture
async def agent(temporal_server: TemporalServer) -> Agent:
    return Agent(await Client.connect(temporal_server.address, data_converter=pydantic_data_converter))


def answered(world: World) -> list[str]:
    return [reference.id for reply in world.replies for reference in reply.answers]


async def test_many_large_events_are_spread_over_turns(agent: Agent) -> None:
    """Ten events of 240 KB wait: each is answered, in turns that travel."""
    world = World()
    async with world.workers(agent.client, agent.queue):
        await agent.deliver()
        await agent.handle.execute_update(names.PAUSE, ME, result_type=Status)
        for number in range(10):
            await agent.deliver(event(number, data=LARGE))
        await agent.handle.execute_update(names.RESUME, ME, result_type=Status)
        await eventually(lambda: len(answered(world)) == 10)
        await agent.stop()
    assert answered(world) == [f"event-{number}" for number in range(10)]


async def test_a_step_that_calls_many_talkative_tools_goes_on(agent: Agent) -> None:
    """Seventy calls at once, each with 50,000 characters: the model is shown as much of each as travels."""
    calls = [ToolCall(id=f"c{number}", name="look") for number in range(70)]

    def think(request: ThinkRequest) -> Decision:
        return answer("", request, *calls) if request.step == 1 else answer("done", request)

    world = World(
        think_with=think,
        tool=lambda request: ToolResult(call_id=request.call.id, name="look", content="é" * 50_000),
        spec=ControlSpec(digest="s", tools={"look": ToolControl()}),
    )
    async with world.workers(agent.client, agent.queue):
        await agent.deliver(event(1))
        await eventually(lambda: bool(world.replies))
        await agent.stop()
    results = world.thoughts[1].results
    assert [result.call_id for result in results] == [call.id for call in calls]
    assert len(world.tool_requests) == 64
    assert "shortened, since many tools were called at once" in results[0].content
    assert results[-1].content.startswith("Not run: a step may call 64 tools")


async def test_thousands_of_duplicates_are_reported_in_portions(agent: Agent) -> None:
    """After offsets were reset: what is to be published is more than travels at once."""
    world = World(spec=ControlSpec(digest="s", mailbox=MailboxSpec(events_per_turn=100)))
    events = [event(number) for number in range(1500)]
    async with world.workers(agent.client, agent.queue):
        for portion in range(0, 1500, 500):
            await agent.deliver(*events[portion : portion + 500])
        await agent.deliver(*events[:1000])
        await agent.deliver(*events[:1000])
        await agent.deliver(*events[:1000])
        await eventually(lambda: len(world.lifecycle(names.DUPLICATE_TYPE)) == 3000, seconds=60)
        await eventually(lambda: len(answered(world)) == 1500, seconds=60)
        await agent.stop()


async def test_mail_that_comes_while_a_cancelled_agent_keeps_its_state_is_kept_too(agent: Agent) -> None:
    """P1: cancelled from the Web UI, with mail arriving in that moment: whoever wakes the agent finds all of it."""
    world = World()
    keeping, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        keeping.set()
        await go_on.wait()

    world.before_snapshot = hold
    async with world.workers(agent.client, agent.queue):
        await agent.deliver(event(1))
        await eventually(lambda: len(world.replies) == 1)
        await agent.handle.cancel()
        await keeping.wait()
        await agent.deliver(event(2))
        go_on.set()
        with pytest.raises(WorkflowFailureError):
            await agent.handle.result()
        await agent.deliver(event(3))
        await eventually(lambda: set(answered(world)) == {"event-1", "event-2", "event-3"})
        await agent.stop()
    by_id = {reply.id: [reference.id for reference in reply.answers] for reply in world.replies}
    assert sorted(one for ids in by_id.values() for one in ids) == ["event-1", "event-2", "event-3"]


async def test_a_question_in_the_turn_in_progress_is_answered_before_the_agent_stops(agent: Agent) -> None:
    """Half a turn is no answer: who asked waits for the end of it, and so does the stop."""
    thinking, go_on = asyncio.Event(), asyncio.Event()

    async def think(request: ThinkRequest) -> Decision:
        thinking.set()
        await go_on.wait()
        return answer("the whole answer", request)

    world = World(think_with=think)
    async with world.workers(agent.client, agent.queue):
        asking = asyncio.create_task(agent.ask("Well?"))
        await thinking.wait()
        await agent.handle.execute_update(names.STOP, ME, result_type=Status)
        go_on.set()
        assert (await asking).text == "the whole answer"
        await agent.handle.result()


async def test_a_paused_agent_that_sleeps_refuses_questions_and_shows_that_it_is_paused(agent: Agent) -> None:
    """Paused, then stopped: a question wakes it, is refused with the reason, and the Web UI says paused."""
    world = World()
    async with world.workers(agent.client, agent.queue):
        await agent.deliver()
        await agent.handle.execute_update(names.PAUSE, ME, result_type=Status)
        await agent.stop()
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await agent.ask("Are you there?")
        assert "paused by tester" in str(refused.value.cause)
        about = await agent.handle.describe()
        assert about.search_attributes[names.STATE_ATTRIBUTE] == ["paused"]
        await agent.stop()


async def test_a_question_that_is_a_book_is_refused(agent: Agent) -> None:
    """P14: said at once, and nothing is kept of it."""
    world = World()
    async with world.workers(agent.client, agent.queue):
        await agent.deliver()
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await agent.ask("x" * 100_001)
        assert "at most 100000" in str(refused.value.cause)
        assert (await agent.status()).accepted == 0
        await agent.stop()


@given(st.lists(st.text(max_size=50), min_size=1, max_size=20), st.integers(20, 400))
def test_results_are_cut_to_their_share_and_no_further(texts: list[str], limit: int) -> None:
    """All results stay, in order; together they have about `limit` bytes, and what fits is left alone."""
    results = [ToolResult(call_id=str(number), name="t", content=text) for number, text in enumerate(texts)]
    cut = shortened(results, limit)
    assert [result.call_id for result in cut] == [result.call_id for result in results]
    total = sum(len(text.encode()) for text in texts)
    if total <= limit:
        assert cut == results
    for before, after in zip(results, cut, strict=True):
        kept = after.content.partition("\n[shortened")[0]
        assert before.content.startswith(kept)
        assert after == before or len(kept.encode()) <= limit // len(results)


@given(st.lists(st.integers(0, 300_000), max_size=12))
def test_what_waits_is_weighed(sizes: list[int]) -> None:
    """The mailbox knows how much it holds, and a turn takes no more than travels, yet always something."""
    mailbox = Mailbox()
    mailbox.accept([event(number, data="x" * length) for number, length in enumerate(sizes)], horizon=100)
    turn = 0
    while mailbox.waiting:
        assert mailbox.waiting_bytes == sum(size(waiting) for waiting in mailbox.waiting)
        turn += 1
        taken = mailbox.take(turn, 10)
        assert taken
        assert len(taken) == 1 or sum(size(one) for one in taken) <= 512 * 1024
    assert mailbox.waiting_bytes == 0
    assert AgentState(mailbox=mailbox).fits


@given(replies=st.integers(0, 30), mail=st.integers(0, 8))
def test_what_is_carried_is_weighed_with_what_is_not_published_yet(replies: int, mail: int) -> None:
    """A turn that continues as new in its middle carries its outbox along: thousands of reported duplicates, say."""
    said = Outgoing(topic="t", id="i", type="t", source="s", time=datetime(2026, 11, 25, tzinfo=UTC), data={"x": LARGE})
    state = AgentState(outbox=[said] * replies)
    state.mailbox.accept([event(number, data=LARGE) for number in range(mail)], horizon=100)
    assert not state.fits or len(state.model_dump_json()) < 1_600_000
    assert state.fits or replies + mail > 4
