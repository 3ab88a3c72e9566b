"""think: one model call a step, recorded, and never paid for twice. On a real ledger, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from chat_server import Reply, Server, refused, said, serving
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.agent_state import AgentLedger
from activities.conversation import LEFT_OUT, REMINDER
from activities.endpoints import ModelsConfig, PoolConfig, Pools
from activities.entries import (
    AssistantMessage,
    Entry,
    MemoryMessage,
    RepairMessage,
    ToolMessage,
    UserMessage,
    canonical,
)
from activities.ledger import Ledger
from activities.memory import Call, Memory
from activities.model import Model
from activities.prices import Price
from activities.spend import Account, Spending
from activities.steps import new_messages, render
from workers import rehearsal
from workers.rehearsal_rules import Rules
from workflows import names, repair
from workflows.budget import Cost, Limit, Measure, Spent
from workflows.events import Event, EventReference, Outgoing
from workflows.messages import CloseRequest, Decision, Delta, ThinkRequest, ToolCall, ToolOutcome, ToolResult, Usage
from workflows.spec import BudgetSpec, ContextSpec, MemorySpec, ReplyForm, ResolvedSpec, Scope, ToolDefinition

AGENT = "agent/store/logistics/order-42"
SHIPPED = Event(id="e1", source="shop", type="order.shipped", subject="order-42", data={"by": "Größe", "n": 1})
SHIPPED_TEXT = 'Event order.shipped (id e1, subject order-42, from shop)\n{"by":"Größe","n":1}'


@dataclass
class World:
    """An agent's ledger and its model, which is a server on this machine."""

    ledger: Ledger
    model: Model
    server: Server
    spec: str

    async def think(self, *events: Event, surroundings: ActivityEnvironment | None = None, **request: Any) -> Decision:
        """Run the activity as Temporal does; by default the first step of the first turn."""
        step: dict[str, Any] = {"workflow_id": AGENT, "turn": 1, "step": 1, "head": None, "spec_digest": self.spec}
        return await (surroundings or ActivityEnvironment()).run(
            self.model.think, ThinkRequest(**{**step, "events": list(events), **request})
        )

    async def entry(self, turn: int = 1, step: int = 1) -> Entry:
        entry = await self.ledger.find(AGENT, turn, step)
        assert entry is not None
        return entry


@asynccontextmanager
async def world(
    folder: Path,
    *replies: Reply,
    tokens: int = 32_000,
    memory: MemorySpec | None = None,
    reply: ReplyForm | None = None,
    limits: tuple[Limit, ...] = (),
    price: Price | None = None,
) -> AsyncIterator[World]:
    """An agent whose model answers with these."""
    spec = ResolvedSpec(
        name="logistics",
        tenant="store",
        instructions="Ship things.",
        tools=[ToolDefinition(name="look", python="tools:look")],
        context=ContextSpec(tokens=tokens),
        memory=memory,
        reply=reply,
        budget=BudgetSpec(limits=limits),
    )
    async with serving(*replies) as server, Ledger(f"sqlite:///{folder}/ledger.db") as ledger:
        only = PoolConfig(model="openai-chat:small", base_url=server.url, max_output_tokens=1000, price=price)
        config = ModelsConfig(pools={"only": only})
        async with Pools(config, {}) as pools:
            yield World(ledger, Model(ledger, pools), server, await ledger.put_spec(spec))


# A step --------------------------------------------------------------------------------------------------------------


async def test_a_step_is_answered_and_recorded(tmp_path: Path) -> None:
    """The decision is what the entry says; the entry holds the event, the answer and why."""
    async with world(tmp_path, said("On its way.")) as agent:
        decided = await agent.think(SHIPPED)
        entry = await agent.entry()
    assert decided == Decision(
        head=entry.id,
        text="On its way.",
        usage=Usage(input_tokens=30, output_tokens=4),
        model="real-1",
        cost=Cost(unpriced=1),
    )
    assert entry.messages == [UserMessage(text=SHIPPED_TEXT), AssistantMessage(text="On its way.")]
    assert entry.answers == [EventReference(source="shop", id="e1", type="order.shipped")]
    assert (entry.parent, entry.turn, entry.step, entry.spec_digest) == (None, 1, 1, agent.spec)
    assert datetime.fromisoformat(entry.recorded_at).utcoffset() == timedelta()
    assert agent.server.headers[0]["idempotency-key"] == names.call_key(AGENT, 1, 1)


async def test_a_tools_round_trip(tmp_path: Path) -> None:
    """Calls are decided, their results are shown, and the conversation so far with them."""
    async with world(tmp_path, said(None, ("c1", "look", '{"x": 1}'), finish="tool_calls"), said("Found.")) as agent:
        first = await agent.think(SHIPPED)
        assert first.tool_calls == [ToolCall(id="c1", name="look", arguments='{"x": 1}')]
        result = ToolResult(call_id="c1", name="look", content="shelf 3")
        second = await agent.think(step=2, head=first.head, results=[result])
        entry = await agent.entry(step=2)
    assert second.text == "Found."
    assert entry.parent == first.head
    assert entry.messages[0] == ToolMessage(call_id="c1", name="look", content="shelf 3")
    assert [message["role"] for message in agent.server.requests[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
    ]


async def test_a_recorded_step_is_not_paid_for_again(tmp_path: Path) -> None:
    """P6: a retry after the entry was stored makes no HTTP call, and decides the same."""
    async with world(tmp_path, said("first", ("1", "look", "{}")), said("second")) as agent:
        decided = await agent.think(SHIPPED)
        assert await agent.think(SHIPPED) == decided
        assert len(agent.server.requests) == 1


async def test_a_step_recorded_with_other_events_is_not_passed_off_as_theirs(tmp_path: Path) -> None:
    """A workflow that was terminated or reset may come to a recorded step with other events: that is said."""
    async with world(tmp_path, said("about e1")) as agent:
        await agent.think(SHIPPED)
        with pytest.raises(ApplicationError, match="recorded with other events") as refused:
            await agent.think(SHIPPED.model_copy(update={"id": "e2"}))
    assert refused.value.non_retryable
    assert len(agent.server.requests) == 1


async def test_of_two_tries_at_once_both_decide_what_was_recorded(tmp_path: Path) -> None:
    """A worker taken for dead may still answer: the first entry counts, for both."""
    async with world(tmp_path, said("one"), said("other")) as agent:
        decisions = await asyncio.gather(agent.think(SHIPPED), agent.think(SHIPPED))
        entry = await agent.entry()
    assert {decision.head for decision in decisions} == {entry.id}
    assert len({decision.text for decision in decisions}) == 1


async def test_a_try_that_was_frozen_before_its_call_finds_what_another_has_recorded(tmp_path: Path) -> None:
    """P6: it had found nothing, slept, and was taken for dead; it makes no call, and decides what is recorded."""
    async with world(tmp_path, said("of the second try"), said("too late")) as agent:
        find = agent.ledger.find

        async def find_and_freeze(workflow_id: str, turn: int, step: int) -> Entry | None:
            agent.ledger.find = find  # type: ignore[method-assign]
            found = await find(workflow_id, turn, step)
            await agent.think(SHIPPED)
            return found

        agent.ledger.find = find_and_freeze  # type: ignore[method-assign]
        decided = await agent.think(SHIPPED)
        entry = await agent.entry()
        totals = await agent.ledger.totals()
    assert (decided.head, decided.text) == (entry.id, "of the second try")
    assert len(agent.server.requests) == 1
    assert totals.calls_begun == 1


async def test_the_last_step_offers_no_tools(tmp_path: Path) -> None:
    """The model has to answer; calls it makes all the same are neither decided nor recorded."""
    async with world(tmp_path, said("Well.", ("1", "look", "{}"))) as agent:
        decided = await agent.think(SHIPPED, tools_allowed=False)
        assert (decided.text, decided.tool_calls) == ("Well.", [])
        assert (await agent.entry()).messages[-1] == AssistantMessage(text="Well.")
        assert agent.server.requests[0]["tool_choice"] == "none"


async def test_the_conversation_goes_on_from_the_head(tmp_path: Path) -> None:
    """What was said in earlier turns is shown, up to about as many tokens as the spec allows."""
    async with world(tmp_path, said("x" * 3000), said("y" * 3000), said("end"), tokens=1000) as agent:
        first = await agent.think(SHIPPED)
        second = await agent.think(SHIPPED, turn=2, head=first.head)
        await agent.think(SHIPPED, turn=3, head=second.head)
        shown = json.dumps(agent.server.requests[2]["messages"])
    assert "xxx" in json.dumps(agent.server.requests[1]["messages"])
    assert "yyy" in shown
    assert "xxx" not in shown


# Errors --------------------------------------------------------------------------------------------------------------


async def test_a_refused_request_is_recorded_and_decided(tmp_path: Path) -> None:
    """The turn fails with a reason; the retry does not ask again."""
    async with world(tmp_path, refused(400, "no such thing")) as agent:
        decided = await agent.think(SHIPPED)
        entry = await agent.entry()
        assert await agent.think(SHIPPED) == decided
        assert len(agent.server.requests) == 1
    assert decided.error == "pool only: HTTP status 400: no such thing"
    assert (entry.error, entry.answer, entry.messages) == (decided.error, None, [UserMessage(text=SHIPPED_TEXT)])


async def test_what_was_refused_does_not_spoil_the_next_turn(tmp_path: Path) -> None:
    """The event is left out of what is shown from then on."""
    async with world(tmp_path, refused(400), said("fine")) as agent:
        first = await agent.think(SHIPPED)
        second = await agent.think(SHIPPED.model_copy(update={"id": "e2"}), turn=2, head=first.head)
        assert second.text == "fine"
        _, left_out, event = agent.server.requests[1]["messages"]
    assert left_out["content"] == LEFT_OUT
    assert "(id e2," in event["content"]


async def test_a_busy_model_is_tried_again_when_it_says(tmp_path: Path) -> None:
    """P11: nothing is recorded, and Temporal waits as long as the server asks."""
    async with world(tmp_path, refused(429, retry_after="11"), said("now")) as agent:
        with pytest.raises(ApplicationError) as busy:
            await agent.think(SHIPPED)
        assert busy.value.next_retry_delay == timedelta(seconds=11)
        assert await agent.ledger.find(AGENT, 1, 1) is None
        assert (await agent.think(SHIPPED)).text == "now"
        first, second = agent.server.headers
        assert first["idempotency-key"] == second["idempotency-key"]


async def test_a_conversation_that_is_too_long_is_shown_shorter(tmp_path: Path) -> None:
    """Tokens are estimated: what doesn't fit after all must not end the agent."""
    too_long = refused(400, "x", "context_length_exceeded")
    async with world(tmp_path, said("x" * 900), said("y" * 900), too_long, too_long, said("ok"), tokens=1000) as agent:
        first = await agent.think(SHIPPED)
        second = await agent.think(SHIPPED, turn=2, head=first.head)
        assert (await agent.think(SHIPPED, turn=3, head=second.head)).text == "ok"
        sizes = [len(request["messages"]) for request in agent.server.requests[2:]]
        keys = [headers["idempotency-key"] for headers in agent.server.headers[2:]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    assert len(set(keys)) == len(keys)


async def test_an_event_that_alone_is_too_long_is_final(tmp_path: Path) -> None:
    """There is nothing left to show less of."""
    async with world(tmp_path, refused(400, "x", "context_length_exceeded")) as agent:
        assert (await agent.think(SHIPPED)).error is not None
        assert len(agent.server.requests) == 1


# Budgets -------------------------------------------------------------------------------------------------------------

CHEAP = Price(input=Decimal(2), output=Decimal(10))


async def account(agent: World) -> Account:
    """What the agent has spent today, and what is set aside."""
    return (await Spending(agent.ledger).accounts(AGENT))[0]


async def test_what_a_call_costs_is_told_and_kept(tmp_path: Path) -> None:
    """30 tokens in and 4 out; a retry is told the same, and it is counted once."""
    async with world(tmp_path, said("On its way."), price=CHEAP) as agent:
        decided = await agent.think(SHIPPED)
        assert await agent.think(SHIPPED) == decided
        spent = (await account(agent)).spent
    assert decided.cost == Cost(micro_usd=100)
    assert spent == Spent(tokens=34, micro_usd=100, turns=1, calls=1)


async def test_a_call_that_might_break_the_budget_is_not_made(tmp_path: Path) -> None:
    """P10: before the call; nothing is sent, nothing recorded, and with a newer limit the same step is made."""

    def refusals() -> float:
        labels = {"agent": "logistics", "scope": "key", "measure": "usd"}
        return REGISTRY.get_sample_value("perennial_budget_refusals_total", labels) or 0

    before = refusals()
    limit = Limit(usd=Decimal("0.0101"))  # the longest answer alone may cost a cent
    async with world(tmp_path, said("On its way."), price=CHEAP, limits=(limit,)) as agent:
        decided = await agent.think(SHIPPED)
        assert agent.server.requests == []
        assert await agent.ledger.find(AGENT, 1, 1) is None
        assert (await account(agent)).reserved == Spent()
        made = await agent.think(SHIPPED, limits=(Limit(usd=Decimal(1)),))
    assert decided.refused is not None
    assert (decided.refused.measure, decided.refused.spent) == (Measure.USD, 0)
    assert decided.head == ""
    assert refusals() == before + 1
    assert (made.text, made.refused) == ("On its way.", None)


async def test_a_model_whose_price_is_not_known_is_not_called_under_a_limit_in_dollars(tmp_path: Path) -> None:
    """It would count as nothing."""
    async with world(tmp_path, said("On its way."), limits=(Limit(usd=Decimal(100)),)) as agent:
        refused = (await agent.think(SHIPPED)).refused
        assert refused is not None
        assert refused.unpriced == "openai-chat:small (pool only)"
        free = await agent.think(SHIPPED, limits=(Limit(tokens=10_000),))
        assert (await account(agent)).spent.unpriced == 1
    assert free.cost == Cost(unpriced=1)


async def test_a_worker_that_dies_in_its_call_leaves_what_its_retry_takes_over(tmp_path: Path) -> None:
    """Set aside while the model thinks, and once; the truth replaces it."""
    limits = (Limit(tokens=2000),)
    async with world(tmp_path, Reply(hang=True), said("On its way."), limits=limits) as agent:
        dying = asyncio.create_task(agent.think(SHIPPED))
        await agent.server.arrived.wait()
        set_aside = (await account(agent)).reserved
        dying.cancel()
        await asyncio.wait([dying])
        assert (await account(agent)).reserved == set_aside, "as after kill -9"
        await agent.think(SHIPPED)
        after = await account(agent)
    assert set_aside.turns == set_aside.calls == 1
    assert 1000 < set_aside.tokens < 2000, "it fits once, not twice"
    assert (after.spent, after.reserved) == (Spent(tokens=34, turns=1, calls=1, unpriced=1), Spent())


@pytest.mark.parametrize("trouble", [refused(429, retry_after="11"), refused(400)])
async def test_a_call_that_fails_keeps_nothing_from_others(tmp_path: Path, trouble: Reply) -> None:
    """Nobody has answered, and nothing was spent."""
    async with world(tmp_path, trouble, limits=(Limit(tokens=2000),)) as agent:
        with contextlib.suppress(ApplicationError):
            await agent.think(SHIPPED)
        found = await account(agent)
    assert found.reserved == Spent()
    assert found.spent.tokens == found.spent.calls == 0


async def test_an_answer_is_never_longer_than_what_was_set_aside_for_it(tmp_path: Path) -> None:
    """Of a pool that names no longest answer the budget does."""
    server = PoolConfig(model="openai-chat:small", base_url="http://127.0.0.1:9/v1")
    named = server.model_copy(update={"settings": {"max_tokens": 70}})
    config = ModelsConfig(pools={"server": server, "named": named}, routes={"all": ["server", "named"], "n": ["named"]})
    async with Pools(config, {}) as pools:
        assert pools.need("all", 10).tokens == 10 + 8192
        assert pools.need("n", 10).tokens == 80
        with pytest.raises(ApplicationError, match="There is no route 'none'"):
            pools.need("none", 10)
    async with serving(said("Fine.")) as chat, Ledger(f"sqlite:///{tmp_path}/l.db") as ledger:
        pool = PoolConfig(model="openai-chat:small", base_url=chat.url)
        async with Pools(ModelsConfig(pools={"only": pool}), {}) as pools:
            spec = ResolvedSpec(name="logistics", tenant="store", instructions="Ship things.")
            agent = World(ledger, Model(ledger, pools), chat, await ledger.put_spec(spec))
            await agent.think(SHIPPED)
            await agent.think(SHIPPED, turn=2, head=(await agent.entry()).id, limits=(Limit(tokens=100_000),))
    longest = [request.get("max_completion_tokens", request.get("max_tokens")) for request in chat.requests]
    assert longest == [None, 8192]


# Surroundings --------------------------------------------------------------------------------------------------------


async def test_it_heartbeats_while_the_model_thinks(tmp_path: Path) -> None:
    """So that a dead worker is noticed in seconds, however long models may think."""
    surroundings = ActivityEnvironment()
    surroundings.info = replace(surroundings.info, heartbeat_timeout=timedelta(milliseconds=60))
    beats: asyncio.Queue[None] = asyncio.Queue()
    surroundings.on_heartbeat = lambda *_: beats.put_nowait(None)
    async with world(tmp_path, Reply(hang=True)) as agent:
        task = asyncio.create_task(agent.think(SHIPPED, surroundings=surroundings))
        await agent.server.arrived.wait()
        for _ in range(3):
            await beats.get()
        surroundings.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_cancelled_activity_hangs_up(tmp_path: Path) -> None:
    """The HTTP request ends with it, and nothing is recorded."""
    surroundings = ActivityEnvironment()
    async with world(tmp_path, Reply(hang=True)) as agent:
        task = asyncio.create_task(agent.think(SHIPPED, surroundings=surroundings))
        await agent.server.arrived.wait()
        surroundings.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await agent.server.left.wait()
        assert await agent.ledger.find(AGENT, 1, 1) is None


# Events as text ------------------------------------------------------------------------------------------------------


def test_an_event_is_shown_with_its_identity() -> None:
    """The form is fixed: the rehearsal endpoint's rules read it."""
    assert render(SHIPPED) == SHIPPED_TEXT


def test_an_event_is_shown_with_its_time() -> None:
    """When it happened, which may be long before it is read; an agent has no clock of its own."""
    happened = SHIPPED.model_copy(update={"time": datetime(2026, 11, 24, 9, 30, tzinfo=UTC)})
    assert render(happened).startswith(
        "Event order.shipped (id e1, subject order-42, from shop, at 2026-11-24T09:30:00+00:00)\n"
    )


@pytest.mark.parametrize("data", [None, [1, "ü"], "text", {"text": 7}])
def test_an_event_may_carry_anything(data: Any) -> None:
    """Also one that calls itself a question and has no text."""
    event = Event(id="1", source="s", type=names.ASK_TYPE, data=data)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    assert render(event) == f"Event perennial.ask.v1 (id 1, from s)\n{text}"


def test_a_question_is_shown_as_it_was_asked() -> None:
    """A person talks to the agent, not about an event."""
    assert render(Event(id="1", source="s", type=names.ASK_TYPE, data={"text": "Where is it?"})) == "Where is it?"


any_text = st.text(st.sampled_from('aé😀\ud83d\ude00\x00"'), max_size=8)
"""Also halves of surrogate pairs, which JSON can carry and UTF-8 cannot."""


@given(any_text, any_text)
def test_whatever_comes_in_can_be_recorded(data: str, result: str) -> None:
    """Text that no UTF-8 can hold doesn't stop the agent; results come before events."""
    messages = new_messages(
        ThinkRequest(
            workflow_id=AGENT,
            turn=1,
            step=1,
            head=None,
            spec_digest="",
            events=[Event(id="1", source="s", type="t", data={data: [data]})],
            results=[ToolResult(call_id="c", name="look", content=result, outcome=ToolOutcome.UNKNOWN)],
        )
    )
    assert [message.role for message in messages] == ["tool", "user"]
    for message in messages:
        canonical(message)


async def test_an_event_that_is_taken_again_beyond_the_horizon_is_counted(tmp_path: Path) -> None:
    """Issue 3: an agent forgets what is older than `mailbox.remember_ids`; the ledger does not, and tells."""

    def counted() -> float:
        return REGISTRY.get_sample_value("perennial_events_repeated_total", {"agent": "logistics"}) or 0

    before = counted()
    async with world(tmp_path, said("Noted."), said("Noted."), said("Noted.")) as here:
        first = await here.think(SHIPPED)
        await here.think(SHIPPED)  # a retry finds what is recorded
        assert counted() == before
        await here.think(SHIPPED, SHIPPED.model_copy(update={"id": "e2"}), turn=2, head=first.head)
    assert counted() == before + 1


# What it is reminded of ----------------------------------------------------------------------------------------------


async def test_a_turn_begins_with_the_facts_that_fit(tmp_path: Path) -> None:
    """Before the events, in the first step; recorded, so that a retry and the transcript have what was shown."""
    replies = said(None, ("c1", "look", "{}"), finish="tool_calls"), said("On its way."), said("Gone.")
    async with world(tmp_path, *replies, memory=MemorySpec()) as agent:
        memory = Memory(agent.ledger)
        fact = await memory.remember(Call(AGENT, 1, "k1"), "Größe rings twice.", Scope.KEY, pinned=True)
        await memory.remember(Call(AGENT, 1, "k2"), "Likes tents.", Scope.KEY)
        await memory.remember(Call("agent/store/logistics/order-43", 1, "k3"), "Größe is away.", Scope.KEY)
        first = await agent.think(SHIPPED)
        entry = await agent.entry()
        assert entry.messages[:2] == [MemoryMessage(facts=[fact]), UserMessage(text=SHIPPED_TEXT)]
        await memory.forget(Call(AGENT, 1, "f"), fact.id, [Scope.KEY], "moved away")
        assert await agent.think(SHIPPED) == first, "a retry sees what was recorded"
        later = await memory.remember(Call(AGENT, 1, "k4"), "Signs slowly.", Scope.KEY, pinned=True)
        result = ToolResult(call_id="c1", name="look", content="shelf 3")
        second = await agent.think(step=2, head=first.head, results=[result])
        kinds = [type(message) for message in (await agent.entry(step=2)).messages]
        assert kinds == [ToolMessage, AssistantMessage], "once a turn"
        await agent.think(SHIPPED, turn=2, head=second.head)
    shown = [[m["content"] for m in request["messages"] if m["role"] == "user"] for request in agent.server.requests]
    noted, noted_later = (
        f"{REMINDER}\n- {one.text} [{one.id}, key, pinned, kept {one.kept_at[:10]}]" for one in (fact, later)
    )
    assert shown == [[noted, SHIPPED_TEXT], [noted, SHIPPED_TEXT], [SHIPPED_TEXT, noted_later, SHIPPED_TEXT]]


async def test_an_agent_without_memory_is_reminded_of_nothing(tmp_path: Path) -> None:
    """It is off unless the spec turns it on, whatever is there."""
    async with world(tmp_path, said("Fine.")) as agent:
        await Memory(agent.ledger).remember(Call(AGENT, 1, "k"), "Größe rings twice.", Scope.KEY, pinned=True)
        await agent.think(SHIPPED)
        assert (await agent.entry()).messages[0] == UserMessage(text=SHIPPED_TEXT)


async def test_what_an_event_holds_decides_and_not_how_it_is_written(tmp_path: Path) -> None:
    """Texts and numbers, however deep; not the names of fields, which every event has."""
    deep: Any = "Lilas"
    for _ in range(50):
        deep = {"address": [deep]}
    event = SHIPPED.model_copy(update={"data": deep})
    async with world(tmp_path, said("Fine."), memory=MemorySpec()) as agent:
        memory = Memory(agent.ledger)
        await memory.remember(Call(AGENT, 1, "k1"), "An address was wrong.", Scope.KEY)
        fact = await memory.remember(Call(AGENT, 1, "k2"), "Moved to rue des Lilas.", Scope.KEY)
        await agent.think(event)
        assert (await agent.entry()).messages[0] == MemoryMessage(facts=[fact])


# Answers that have to fit --------------------------------------------------------------------------------------------

NUMBERED = ReplyForm(json_schema={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})


def repairs(outcome: str) -> float:
    return REGISTRY.get_sample_value("perennial_reply_repairs_total", {"outcome": outcome}) or 0.0


async def test_an_answer_is_checked_against_the_agents_schema(tmp_path: Path) -> None:
    """The model is told of it; a wrong answer is recorded as it is, and so is what was said of it; then it fits."""
    before = {outcome: repairs(outcome) for outcome in ("fits", "unfit", "other")}
    replies = said("one"), said('{"n": "x"}'), said('{"n": 1}')
    async with world(tmp_path, *replies, reply=NUMBERED) as agent:
        first = await agent.think(SHIPPED)
        told = repair.message(first.faults)
        second = await agent.think(step=2, head=first.head, repair=told)
        third = await agent.think(step=3, head=second.head, repair=repair.message(second.faults))
        again = await agent.think(step=3, head=second.head, repair=repair.message(second.faults))
        assert (await agent.entry()).messages[-1] == AssistantMessage(text="one")
        assert (await agent.entry(step=2)).messages == [
            RepairMessage(text=told),
            AssistantMessage(text='{"n": "x"}'),
        ]
    assert (first.text, first.data, first.faults) == (
        "one",
        None,
        ["the answer is not JSON: Expecting value: line 1 column 1 (char 0)"],
    )
    assert second.faults == ["$.n: 'x' is not of type 'integer'"]
    assert (third.data, third.faults) == ({"n": 1}, [])
    assert again == third, "found in the ledger, it is judged as it was"
    system, *rest = agent.server.requests[1]["messages"]
    assert system["content"].startswith("Ship things.\n\nYour final answer is read by a program.")
    assert '"required": ["n"]' in system["content"]
    assert [message["role"] for message in rest] == ["user", "assistant", "user"]
    assert rest[-1]["content"] == told
    counted = {outcome: repairs(outcome) - number for outcome, number in before.items()}
    assert counted == {"fits": 1, "unfit": 1, "other": 0}, "one that was found was counted when it was made"


async def test_only_a_final_answer_has_to_fit(tmp_path: Path) -> None:
    """Not what is said beside a tool call, and not a call that was refused."""
    calling = said("I look.", ("c1", "look", "{}"), finish="tool_calls")
    async with world(tmp_path, calling, refused(400, "no"), said("fine"), reply=NUMBERED) as agent:
        called = await agent.think(SHIPPED, repair="not so")
        failed = await agent.think(
            step=2, head=called.head, results=[ToolResult(call_id="c1", name="look", content="")]
        )
    assert (called.faults, called.data) == ([], None)
    assert failed.error
    assert failed.faults == []


async def test_an_agent_without_a_schema_is_told_of_none(tmp_path: Path) -> None:
    """Its answers are text, also if they look like JSON."""
    async with world(tmp_path, said('{"n": 1}')) as agent:
        decided = await agent.think(SHIPPED)
    assert (decided.text, decided.data, decided.faults) == ('{"n": 1}', None, [])
    assert agent.server.requests[0]["messages"][0]["content"] == "Ship things."


async def test_an_answer_that_says_nothing_is_told_apart(tmp_path: Path) -> None:
    """Neither text nor calls; and where answers have a schema, its faults say so."""
    calling = said(None, ("c1", "look", "{}"), finish="tool_calls")
    async with world(tmp_path, said(" \n"), said("Here."), calling) as agent:
        assert [(await agent.think(SHIPPED, turn=turn)).empty for turn in (1, 2, 3)] == [True, False, False]
    (tmp_path / "form").mkdir()
    async with world(tmp_path / "form", said(""), reply=NUMBERED) as agent:
        decided = await agent.think(SHIPPED)
    assert (decided.empty, bool(decided.faults)) == (False, True)


# A call that is given up ---------------------------------------------------------------------------------------------


async def test_a_cancelled_call_is_really_cancelled(tmp_path: Path) -> None:
    """The connection to the provider is closed, and nothing is recorded: whoever gave it up closes the step."""
    async with world(tmp_path, Reply(hang=True)) as agent:
        surroundings = ActivityEnvironment()
        calling = asyncio.create_task(agent.think(SHIPPED, surroundings=surroundings))
        await agent.server.arrived.wait()
        surroundings.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await asyncio.wait_for(agent.server.left.wait(), 10)
        assert await agent.ledger.find(AGENT, 1, 1) is None


async def test_the_model_is_shown_what_interrupted_it(tmp_path: Path) -> None:
    """What it had not answered, why it was interrupted, and what has come."""
    async with world(tmp_path, said("Both.")) as agent:
        state = AgentLedger(agent.ledger)
        step = ThinkRequest(workflow_id=AGENT, turn=1, step=1, head=None, spec_digest=agent.spec, events=[SHIPPED])
        closed = await ActivityEnvironment().run(state.close_step, CloseRequest(step=step, why="A new event came: x"))
        await agent.think(asking("And this?"), step=2, head=closed.head)
        (request,) = agent.server.requests
    shown = "\n".join(message["content"] for message in request["messages"] if message["role"] == "user")
    assert shown == (
        f"{SHIPPED_TEXT}\n(You were interrupted before you answered what came last. A new event came: x.)\nAnd this?"
    )


async def test_words_to_an_agent_at_work_stand_for_themselves() -> None:
    """The model is told who says them."""
    words = Event(id="w", source="ada", type=names.STEER_TYPE, data={"text": "Be brief.", "interrupt": False})
    assert render(words) == "(ada says to you while you work:) Be brief."


# Streaming -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def streaming(folder: Path, *, stream: bool = True) -> AsyncIterator[tuple[World, list[Outgoing]]]:
    """An agent whose model is the rehearsal endpoint, and what is told of what it says."""
    told: list[Outgoing] = []
    async with rehearsal.serving(Rules()) as url, Ledger(f"sqlite:///{folder}/ledger.db") as ledger:
        spec = ResolvedSpec(name="logistics", tenant="store", instructions="Ship.", stream=stream)
        pool = PoolConfig(model="openai-chat:rehearsal", base_url=url)
        cut = PoolConfig(model="openai-chat:rehearsal", base_url=url.replace("/v1", "/none"))
        config = ModelsConfig(pools={"away": cut, "only": pool})
        async with Pools(config, {}) as pools:
            model = Model(ledger, pools, told.append)
            yield World(ledger, model, Server(), await ledger.put_spec(spec)), told


def asking(text: str) -> Event:
    return Event(id="q-1", source="perennial/ask", type=names.ASK_TYPE, data={"text": text})


def told_parts(told: list[Outgoing]) -> list[tuple[int, str, str]]:
    found = [Delta.model_validate(one.data) for one in told]
    return [(delta.attempt, delta.kind.value, delta.text) for delta in found]


def attempt(number: int) -> ActivityEnvironment:
    surroundings = ActivityEnvironment()
    surroundings.info = replace(surroundings.info, attempt=number)
    return surroundings


async def test_what_a_model_says_is_told_as_it_says_it(tmp_path: Path) -> None:
    """Each request to a pool begins anew; in the end it is what the entry says. A call found recorded is told whole."""
    async with streaming(tmp_path) as (agent, told):
        decided = await agent.think(asking("[[say It is late.]]"))
        assert decided.text == "It is late."
        assert decided.usage.output_tokens
        first = told_parts(told)
        assert [kind for _, kind, _ in first] == ["start", "start", "text", "end"], "the first pool is away"
        assert "".join(text for _, _, text in first) == "It is late."
        start = Delta.model_validate(told[1].data)
        assert (start.turn, start.step, [one.id for one in start.answers]) == (1, 1, ["q-1"])
        told.clear()
        again = await agent.think(asking("[[say It is late.]]"), surroundings=attempt(2))
    assert again == decided
    assert told_parts(told) == [(2, "start", ""), (2, "text", "It is late."), (2, "end", "")]


async def test_a_call_that_breaks_off_is_told_anew(tmp_path: Path) -> None:
    """P6: the next try has a higher number, and begins with a start; nothing of the first follows it."""
    async with streaming(tmp_path) as (agent, told):
        question = asking("[[cut times=1]] [[say one two three four five]]")
        with pytest.raises(ApplicationError, match="No pool"):
            await agent.think(question)
        assert {kind for _, kind, _ in told_parts(told)} == {"start"}
        await agent.think(question, surroundings=attempt(2))
    retried = [part for part in told_parts(told) if part[0] == 2]
    assert retried[0] == (2, "start", "")
    assert "".join(text for _, _, text in retried) == "one two three four five"
    assert retried[-1] == (2, "end", "")


async def test_agents_that_do_not_ask_for_it_are_not_streamed(tmp_path: Path) -> None:
    """`stream: true` is opt-in."""
    async with streaming(tmp_path, stream=False) as (agent, told):
        assert (await agent.think(asking("[[say Hello.]]"))).text == "Hello."
    assert told == []


async def test_a_server_that_does_not_stream_is_asked_whole(tmp_path: Path) -> None:
    """One that ignores `stream` sends no stream: its answer is told when it is there; the next is asked for whole."""
    told: list[Outgoing] = []
    async with serving(said("It is late.")) as server, Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        spec = ResolvedSpec(name="logistics", tenant="store", instructions="Ship.", stream=True)
        config = ModelsConfig(pools={"only": PoolConfig(model="openai-chat:small", base_url=server.url)})
        async with Pools(config, {}) as pools:
            agent = World(ledger, Model(ledger, pools, told.append), server, await ledger.put_spec(spec))
            first = await agent.think(SHIPPED)
            await agent.think(asking("And now?"), turn=2, head=first.head)
    assert first.text == "It is late."
    assert [bool(request.get("stream")) for request in server.requests] == [True, False, False]
    kinds = [kind for _, kind, _ in told_parts(told)]
    assert kinds == ["start", "start", "text", "end", "start", "text", "end"], "one start is of the try"


async def test_an_empty_stream_does_not_end_streaming(tmp_path: Path) -> None:
    """A model that has nothing to say says so whole too; its server may well stream the next answer."""
    async with serving(said("")) as server, Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        spec = ResolvedSpec(name="logistics", tenant="store", instructions="Ship.", stream=True)
        config = ModelsConfig(pools={"only": PoolConfig(model="openai-chat:small", base_url=server.url)})
        async with Pools(config, {}) as pools:
            agent = World(ledger, Model(ledger, pools, [].append), server, await ledger.put_spec(spec))
            first = await agent.think(SHIPPED)
            await agent.think(asking("And now?"), turn=2, head=first.head)
    assert first.text == ""
    assert [bool(request.get("stream")) for request in server.requests] == [True, False, True, False]
