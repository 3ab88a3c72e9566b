"""A conversation that has grown long is summed up in a step of its own. On a real ledger, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chat_server import Reply, Server, refused, said, serving
from hypothesis import given
from hypothesis import strategies as st
from temporalio.testing import ActivityEnvironment

from activities.compaction import BYTES_PER_TOKEN, Conversations, Shown, size
from activities.conversation import SUM_UP, SUMMARY
from activities.endpoints import ModelsConfig, PoolConfig, Pools
from activities.entries import AssistantMessage, Entry, Message, SummaryMessage, UserMessage
from activities.ledger import Ledger
from activities.model import Model
from workflows import names
from workflows.events import Event
from workflows.messages import CompactRequest, Decision, ThinkRequest, ToolResult, Usage
from workflows.spec import ContextSpec, ResolvedSpec, ToolDefinition

AGENT = "agent/store/logistics/order-42"
TOKENS = 1000
ASKED = SUM_UP.partition("{")[0]


@dataclass
class Agent:
    """An agent that takes turns as its workflow does."""

    ledger: Ledger
    model: Model
    server: Server
    spec: str
    head: str | None = None
    turn: int = 0
    step: int = 1

    async def hear(self, text: str, **request: Any) -> Decision:
        """A turn of one event, in which the conversation is summed up if need be."""
        self.turn, self.step = self.turn + 1, 1
        event = Event(id=f"e{self.turn}", source="shop", type=names.ASK_TYPE, data={"text": text})
        return await self.think(events=[event], **request)

    async def think(self, *, may_compact: bool = True, **request: Any) -> Decision:
        decision = await self.thought(may_compact=may_compact, **request)
        if decision.compact:
            assert may_compact
            self.head = (await self.compact()).head
            self.step += 1
            decision = await self.thought(may_compact=False, **request)
            assert not decision.compact
        self.head, self.step = decision.head, self.step + 1
        return decision

    async def thought(self, **request: Any) -> Decision:
        step: dict[str, Any] = {"workflow_id": AGENT, "turn": self.turn, "step": self.step}
        made = ThinkRequest(**step, head=self.head, spec_digest=self.spec, **request)
        return await ActivityEnvironment().run(self.model.think, made)

    async def compact(self) -> Decision:
        assert self.head
        request = CompactRequest(
            workflow_id=AGENT, turn=self.turn, step=self.step, head=self.head, spec_digest=self.spec
        )
        return await ActivityEnvironment().run(self.model.compact, request)

    async def entries(self) -> list[Entry]:
        return await self.ledger.transcript(AGENT, limit=1000)

    async def summaries(self) -> list[SummaryMessage]:
        return [entry.summary for entry in await self.entries() if entry.summary]

    def shown(self, request: int = -1) -> list[str]:
        """The texts of a request's messages after the instructions."""
        return [str(message.get("content")) for message in self.server.requests[request]["messages"][1:]]

    def asked_to_sum_up(self) -> list[int]:
        """Which requests did."""
        return [n for n in range(len(self.server.requests)) if any(text.startswith(ASKED) for text in self.shown(n))]


@asynccontextmanager
async def living(folder: Path, *replies: Reply, tokens: int = TOKENS) -> AsyncIterator[Agent]:
    spec = ResolvedSpec(
        name="logistics",
        tenant="store",
        instructions="Ship things.",
        tools=[ToolDefinition(name="look", python="tools:look")],
        context=ContextSpec(tokens=tokens, compact=True),
    )
    async with serving(*replies) as server, Ledger(f"sqlite:///{folder}/ledger.db") as ledger:
        config = ModelsConfig(pools={"only": PoolConfig(model="openai-chat:small", base_url=server.url)})
        async with Pools(config, {}) as pools:
            yield Agent(ledger, Model(ledger, pools), server, await ledger.put_spec(spec))


def letter(number: int, length: int = 400) -> str:
    return f"letter {number} " + "x" * length


async def test_what_no_longer_fits_is_summed_up_before_the_call(tmp_path: Path) -> None:
    """The model sees its summary and then the newest letters, word for word; the originals stay in the ledger."""
    async with living(tmp_path, *[said(f"answer {n}") for n in range(40)]) as agent:
        while not agent.asked_to_sum_up():
            assert agent.turn < 20
            await agent.hear(letter(agent.turn + 1))
        (summary,) = await agent.summaries()
        entries = await agent.entries()
    through = [entry.id for entry in entries].index(summary.through)
    shown = agent.shown()
    assert shown[0] == f"{SUMMARY}\n{summary.text}"
    words = [message.text for entry in entries[through + 1 :] for message in entry.messages]
    assert shown[1:] == [word for word in words if word != summary.text][: len(shown) - 1]
    assert shown[-1] == letter(agent.turn)
    put_away = agent.shown(agent.asked_to_sum_up()[0])
    assert put_away[0] == letter(1)
    assert put_away[-2:-1] == [f"answer {through}"]
    assert [entry.messages[0].text for entry in entries[:through]] == [letter(n) for n in range(1, through + 1)]  # type: ignore[union-attr]
    assert all(entry.summary is None for entry in entries[:through])


async def test_each_summary_holds_the_one_before_it(tmp_path: Path) -> None:
    """It rolls on, and what is shown never grows beyond the context."""
    async with living(tmp_path, *[said(f"answer {n}") for n in range(100)]) as agent:
        for number in range(40):
            await agent.hear(letter(number))
        first, second, *_ = agent.asked_to_sum_up()
        summaries = await agent.summaries()
    assert agent.shown(second)[0] == f"{SUMMARY}\n{summaries[0].text}"
    assert agent.shown(second)[-1].startswith(ASKED)
    assert max(sum(map(len, agent.shown(n))) for n in range(len(agent.server.requests))) < TOKENS * BYTES_PER_TOKEN
    assert first < second


async def test_a_step_that_is_summed_up_already_is_not_paid_for_again(tmp_path: Path) -> None:
    """P6: whoever tries again finds the entry; also two at once, and also a workflow that was reset."""
    async with living(tmp_path, *[said(f"answer {n}") for n in range(40)]) as agent:
        while not (await agent.hear(letter(agent.turn), may_compact=True)) or not agent.asked_to_sum_up():
            assert agent.turn < 20
        asked = len(agent.server.requests)
        entry = next(entry for entry in await agent.entries() if entry.summary)
        agent.head, agent.step = entry.parent, entry.step
        again = await asyncio.gather(agent.compact(), agent.compact())
        assert {decision.head for decision in again} == {entry.id}
        assert again[0].usage == Usage(input_tokens=30, output_tokens=4)
        reset = await agent.thought(may_compact=True)
        assert len(agent.server.requests) == asked
    assert reset == Decision(head=entry.parent or "", compact=True)


async def test_a_pinned_entry_is_shown_word_for_word_for_ever(tmp_path: Path) -> None:
    """Until it is unpinned; its calls and results are told as text, since what they belong to is not shown."""
    async with living(tmp_path, *[said(f"answer {n}") for n in range(100)]) as agent:
        await agent.hear("Deliver to the back door only.")
        pinned = agent.head
        assert pinned
        await agent.ledger.pin(AGENT, pinned, by="ada", why="terms")
        for number in range(40):
            await agent.hear(letter(number))
        assert len(agent.asked_to_sum_up()) > 1
        assert agent.shown()[1:3] == ["Deliver to the back door only.", "answer 0"]
        assert await agent.ledger.unpin(AGENT, pinned)
        await agent.hear("And now?")
    assert "Deliver to the back door only." not in agent.shown()


async def test_results_of_the_last_call_put_away_are_summed_up_too(tmp_path: Path) -> None:
    """A long turn is summed up in its middle: no call stands there without its result."""
    calls = [said(None, (f"c{n}", "look", f'{{"n": {n}}}'), finish="tool_calls") for n in range(12)]
    replies = [reply for n, reply in enumerate(calls)]
    async with living(tmp_path, *replies, said("the sum"), *replies) as agent:
        decision = await agent.hear("Look at everything.")
        results = 0
        while not agent.asked_to_sum_up():
            assert results < 11
            call = decision.tool_calls[0]
            result = ToolResult(call_id=call.id, name=call.name, content=f"found {call.arguments} " + "y" * 400)
            results += 1
            decision = await agent.think(results=[result])
        put_away = agent.server.requests[agent.asked_to_sum_up()[0]]["messages"]
    called = [call["id"] for message in put_away for call in message.get("tool_calls") or []]
    answered = [message["tool_call_id"] for message in put_away if message["role"] == "tool"]
    assert called == answered
    assert all("found" in message["content"] for message in put_away if message["role"] == "tool")


@pytest.mark.parametrize("reply", [refused(400, "no such thing"), said("  ")])
async def test_a_model_that_will_not_sum_up_does_not_stop_the_agent(tmp_path: Path, reply: Reply) -> None:
    """It is on record why, and the turn goes on with what fits."""
    async with living(tmp_path, *[said(f"answer {n}") for n in range(40)]) as agent:
        decision = None
        while decision is None or not decision.compact:
            assert agent.turn < 20
            agent.turn, agent.step = agent.turn + 1, 1
            event = Event(id=f"e{agent.turn}", source="shop", type=names.ASK_TYPE, data={"text": letter(agent.turn)})
            decision = await agent.thought(may_compact=True, events=[event])
            agent.head = decision.head or agent.head
        agent.server.replies.insert(0, reply)
        failed = await agent.compact()
        assert failed.error
        agent.head, agent.step = failed.head, 2
        answered = await agent.thought(events=[event])
        assert answered.text.startswith("answer")
        (summary,) = await agent.summaries()
        assert summary.text == ""
        assert await agent.ledger.summary(answered.head) is None
    assert agent.shown()[-1] == letter(agent.turn)


async def test_too_long_to_be_summed_up_at_once_is_summed_up_in_part(tmp_path: Path) -> None:
    """The model says that it is too long: then the older half is, and the rest stays."""
    too_long = refused(400, "too many tokens", code="context_length_exceeded")
    async with living(tmp_path, *[said(f"answer {n}") for n in range(40)]) as agent:
        decision = None
        while decision is None or not decision.compact:
            assert agent.turn < 20
            agent.turn, agent.step = agent.turn + 1, 1
            event = Event(id=f"e{agent.turn}", source="shop", type=names.ASK_TYPE, data={"text": letter(agent.turn)})
            decision = await agent.thought(may_compact=True, events=[event])
            agent.head = decision.head or agent.head
        agent.server.replies.insert(0, too_long)
        await agent.compact()
        whole, half = agent.asked_to_sum_up()
        assert len(agent.shown(half)) < len(agent.shown(whole))
        (summary,) = await agent.summaries()
        entries = await agent.entries()
    through = [entry.id for entry in entries].index(summary.through)
    assert agent.shown(half)[-2] == f"answer {through}"


async def test_behind_an_entry_before_the_summary_there_is_none(tmp_path: Path) -> None:
    """P8: whoever goes back there finds the conversation as it was."""
    async with living(tmp_path, *[said(f"answer {n}") for n in range(40)]) as agent:
        while not agent.asked_to_sum_up():
            assert agent.turn < 20
            await agent.hear(letter(agent.turn + 1))
        entries = await agent.entries()
        agent.head = entries[0].id
        await agent.hear("Where were we?")
    assert agent.shown() == [letter(1), "answer 0", "Where were we?"]


# What is due ----------------------------------------------------------------------------------------------------------


def entries_of(sizes: list[int]) -> list[Entry]:
    made: list[Entry] = []
    for number, length in enumerate(sizes, 1):
        made.append(
            Entry(
                workflow_id=AGENT,
                turn=number,
                step=1,
                parent=made[-1].id if made else None,
                messages=[UserMessage(text="u" * length), AssistantMessage(text="a")],
                recorded_at="2026-11-27T00:00:00+00:00",
            )
        )
    return made


@given(st.lists(st.integers(0, 6000), min_size=1, max_size=30), st.integers(0, 6000), st.sampled_from([1, 2, 4, 8]))
def test_what_is_due_and_what_is_put_away(sizes: list[int], coming: int, share: int) -> None:
    """The newest entry always stays; what is put away is a beginning of the rest; what is kept fits its quarter."""
    spec = ContextSpec(tokens=TOKENS, compact=True)
    recent = entries_of(sizes)
    shown = Shown(spec, None, [], recent, recent[-1])
    older = shown.older
    kept = recent[len(older) :]
    assert kept
    assert older == recent[: len(older)]
    assert len(kept) == 1 or sum(map(size, kept)) <= TOKENS
    new: list[Message] = [UserMessage(text="n" * coming)]
    if shown.crowded(new):
        assert sum(map(size, recent)) + coming > 0.8 * TOKENS * BYTES_PER_TOKEN
        put_away, question = shown.to_sum_up(share)
        assert put_away == older[: len(put_away)]
        assert put_away
        assert isinstance(question[-1], UserMessage)


def test_a_real_count_of_tokens_counts_more_than_the_estimate() -> None:
    """Words that take more tokens than four bytes each: the provider has counted them."""
    spec = ContextSpec(tokens=TOKENS, compact=True)
    recent = entries_of([500, 500, 500, 500])
    assert not Shown(spec, None, [], recent, recent[-1]).crowded([])
    counted = recent[-1].model_copy(update={"usage": Usage(input_tokens=790, output_tokens=20)})
    assert Shown(spec, None, [], [*recent[:-1], counted], counted).crowded([])


async def test_pins_of_another_branch_are_not_shown(tmp_path: Path) -> None:
    """A pinned entry that was left by a rewind is not part of this conversation."""
    async with Ledger(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        first, second, third = [await ledger.append(entry) for entry in entries_of([10, 10, 10])]
        summary = await ledger.append(
            Entry(
                workflow_id=AGENT,
                turn=4,
                step=1,
                parent=third.id,
                messages=[SummaryMessage(text="the sum", through=second.id)],
                recorded_at="2026-11-27T00:00:00+00:00",
            )
        )
        await ledger.pin(AGENT, first.id, by="ada", why="")
        await ledger.pin(AGENT, third.id, by="ada", why="")
        spec = ContextSpec(tokens=TOKENS, compact=True)
        conversations = Conversations(ledger)
        for _ in range(2):
            shown = await conversations.load(AGENT, summary.id, spec)
            assert (shown.summary, list(shown.pinned), list(shown.recent)) == (summary, [first], [third])
        plain = await conversations.load(AGENT, summary.id, ContextSpec(tokens=TOKENS))
        assert plain.entries == [first, second, third], "an agent whose spec turns it off is shown what was said"
        before = await conversations.load(AGENT, second.id, spec)
        assert before.entries == [first, second]
