"""What an agent wakes with and leaves: the ledger's activities, on SQLite and PostgreSQL, and the pure parts."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.testing import ActivityEnvironment

from activities.agent_state import AgentLedger, caught_up, reply_of
from activities.entries import (
    AssistantMessage,
    Entry,
    InterruptMessage,
    Message,
    RepairMessage,
    ToolMessage,
    UserMessage,
)
from activities.ledger import Ledger
from workflows import names, repair
from workflows.events import Event, EventReference
from workflows.mailbox import Mailbox
from workflows.messages import (
    CloseRequest,
    Decision,
    Reply,
    ReplyRequest,
    ThinkRequest,
    ToolCall,
    ToolResult,
    TurnOutcome,
    Usage,
)
from workflows.spec import ReplyForm, ResolvedSpec
from workflows.state import AgentState, CurrentTurn, Snapshot

AGENT = "agent/store/logistics/order-42"
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
CALL = ToolCall(id="c1", name="look")
RESULT = ToolMessage(call_id="c1", name="look", content="found")


def event(number: int) -> Event:
    return Event(id=f"event-{number}", source="shop", type="order.shipped")


def step(turn: int, number: int = 1, *answers: int, parent: Entry | None = None, **fields: object) -> Entry:
    """A step that answers the events with these numbers."""
    return Entry.model_validate(
        {
            "workflow_id": AGENT,
            "turn": turn,
            "step": number,
            "parent": parent.id if parent else None,
            "messages": [UserMessage(text="Where?"), AssistantMessage(text=f"answer {turn}.{number}")],
            "answers": [EventReference(source="shop", id=event(n).id, type="order.shipped") for n in answers],
            "usage": Usage(input_tokens=10, output_tokens=1),
            "model": "large",
            "recorded_at": NOW.isoformat(),
            **fields,
        }
    )


async def recorded(ledger: Ledger, turns: int, *, after: int = 0, parent: Entry | None = None) -> list[Entry]:
    """So many turns of one step, each answering the event of its number."""
    entries: list[Entry] = []
    for turn in range(after + 1, after + turns + 1):
        entries.append(await ledger.append(step(turn, 1, turn, parent=entries[-1] if entries else parent)))
    return entries


async def wake(ledger: Ledger) -> AgentState | None:
    """Run the activity as Temporal does."""
    return await ActivityEnvironment().run(AgentLedger(ledger).wake, AGENT)


async def keep(ledger: Ledger, state: AgentState, run: str = "run-1") -> None:
    """Run the activity as Temporal does."""
    snapshot = Snapshot(workflow_id=AGENT, run_id=run, state=state)
    await ActivityEnvironment().run(AgentLedger(ledger).keep_snapshot, snapshot)


# A step that was given up --------------------------------------------------------------------------------------------


async def close(ledger: Ledger, request: CloseRequest) -> Decision:
    """Run the activity as Temporal does."""
    return await ActivityEnvironment().run(AgentLedger(ledger).close_step, request)


async def given_up(ledger: Ledger, parent: Entry, *, cancelled: bool = False) -> CloseRequest:
    digest = await ledger.put_spec(ResolvedSpec(name="logistics", tenant="store", instructions="Ship."))
    result = ToolResult(call_id="c1", name="look", content="found")
    request = ThinkRequest(
        workflow_id=AGENT, turn=2, step=2, head=parent.id, spec_digest=digest, events=[event(2)], results=[result]
    )
    return CloseRequest(step=request, why="A new event came: news", cancelled=cancelled)


async def test_a_step_that_is_given_up_keeps_what_was_new_in_it(ledger: Ledger) -> None:
    """P1, P9: its event counts as taken and its tool's result is not lost; made again, it is the same step."""
    (first,) = await recorded(ledger, 1)
    request = await given_up(ledger, first)
    decided = await close(ledger, request)
    assert await close(ledger, request) == decided
    entry = await ledger.find(AGENT, 2, 2)
    assert entry is not None
    assert (decided.given_up, decided.head, decided.error, entry.parent) == (True, entry.id, None, first.id)
    assert [message.role for message in entry.messages] == ["tool", "user", "interrupt"]
    assert entry.interruption == InterruptMessage(text="A new event came: news")
    assert await ledger.taken(AGENT, [event(2).digest]) == {event(2).digest: 2}
    state = await wake(ledger)
    assert state is not None
    assert (state.head, state.turn, state.model_calls) == (entry.id, 2, 1)


async def test_an_answer_that_was_recorded_before_is_not_given_up(ledger: Ledger) -> None:
    """P6: it is paid for."""
    (first,) = await recorded(ledger, 1)
    answered = await ledger.append(step(2, 2, 2, parent=first))
    decided = await close(ledger, await given_up(ledger, first))
    assert (decided.given_up, decided.head, decided.text) == (False, answered.id, "answer 2.2")


async def test_nobody_answers_a_step_that_is_given_up(ledger: Ledger) -> None:
    """P6: whoever still calls the model for it finds it recorded."""
    (first,) = await recorded(ledger, 1)
    decided = await close(ledger, await given_up(ledger, first))
    late = await ledger.append(step(2, 2, 2, parent=first))
    assert late.id == decided.head
    assert not await ledger.begin_call(AGENT, 2, 2)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_reply_of_a_turn_that_was_cancelled(ledger: Ledger, *, cancelled: bool) -> None:
    """Found again from the ledger; one that only ended in the middle of an interruption has failed."""
    (first,) = await recorded(ledger, 1)
    await close(ledger, await given_up(ledger, first, cancelled=cancelled))
    reply = reply_of(await ledger.of_turn(AGENT, 2))
    assert reply.outcome is (TurnOutcome.CANCELLED if cancelled else TurnOutcome.FAILED)
    assert reply.error == ("A new event came: news" if cancelled else "the turn ended before there was an answer")
    assert reply.steps == 0


# Waking --------------------------------------------------------------------------------------------------------------


async def test_a_new_agent_wakes_with_nothing(ledger: Ledger) -> None:
    """An agent of which the ledger knows nothing begins its life."""
    assert await wake(ledger) is None


async def test_an_agent_wakes_with_what_it_left(ledger: Ledger) -> None:
    """P1: mail that waits, ids that were seen, the head, spending, a turn in progress: all as when it closed."""
    entries = await recorded(ledger, 2)
    state = AgentState(
        mailbox=Mailbox(waiting=[event(3)], seen={event(1).digest: 1, event(3).digest: 0}, accepted=3, duplicates=2),
        head=entries[-1].id,
        turn=2,
        usage=Usage(input_tokens=20, output_tokens=2),
        replies=2,
    )
    await keep(ledger, state)
    assert await wake(ledger) == state


async def test_an_agent_wakes_with_what_its_newest_run_left(ledger: Ledger) -> None:
    """An agent hibernates many times; the last time counts."""
    for run in range(1, 4):
        await keep(ledger, AgentState(turn=run, replies=run), f"run-{run}")
    assert await wake(ledger) == AgentState(turn=3, replies=3)


async def test_a_terminated_agent_goes_on_behind_its_newest_entry(ledger: Ledger) -> None:
    """P1, P6: no snapshot was left, but what the entries answer is not answered again, and no turn is taken twice."""
    entries = await recorded(ledger, 3)
    state = await wake(ledger)
    assert state is not None
    assert state.head == entries[-1].id
    assert state.turn == 3
    assert state.current is None
    assert state.usage == Usage(input_tokens=30, output_tokens=3)
    assert state.model_calls == 3
    assert state.mailbox.accept([event(1), event(3), event(4)], horizon=1000) == [event(1), event(3)]
    assert state.mailbox.waiting == [event(4)]


async def test_an_agent_terminated_after_it_woke_knows_its_snapshot_and_what_came_after(ledger: Ledger) -> None:
    """P1: a snapshot that is older than the entries is brought up to date with them."""
    entries = await recorded(ledger, 2)
    seen = {event(1).digest: 1, event(2).digest: 2, event(3).digest: 0, event(9).digest: 0}
    mailbox = Mailbox(waiting=[event(3), event(9)], seen=seen, accepted=4)
    usage = Usage(input_tokens=20, output_tokens=2)
    await keep(ledger, AgentState(mailbox=mailbox, head=entries[-1].id, turn=2, usage=usage, model_calls=2))
    later = await recorded(ledger, 2, after=2, parent=entries[-1])

    state = await wake(ledger)

    assert state is not None
    assert state.head == later[-1].id
    assert state.turn == 4
    assert state.usage == Usage(input_tokens=40, output_tokens=4)
    assert state.model_calls == 4
    assert state.mailbox.waiting == [event(9)]  # 3 and 4 are answered
    assert state.mailbox.accepted == 5  # 4 was not known to the snapshot
    assert state.mailbox.seen == {**seen, event(3).digest: 3, event(4).digest: 4}


def test_a_turn_that_ended_before_there_was_an_answer_has_failed() -> None:
    """A reply that is found later says the same as the one that was published."""
    asked = step(1, 1, 1)
    calls = AssistantMessage(tool_calls=[ToolCall(id="c", name="look")])
    reply = reply_of([asked.model_copy(update={"messages": [calls]})])
    assert (reply.outcome, reply.text) == (TurnOutcome.FAILED, "")
    assert reply.error == "the turn ended before there was an answer"


async def test_a_turn_in_progress_is_gone_on_with(ledger: Ledger) -> None:
    """P6: steps of it that the snapshot does not know are found again by their key, not taken for another turn."""
    first = await ledger.append(step(1, 1, 1))
    turn = CurrentTurn(number=1, started=NOW, answers=first.answers, events=[event(1)])
    state = AgentState(turn=1, current=turn)
    await keep(ledger, state)
    await ledger.append(step(1, 2, parent=first))
    assert await wake(ledger) == state


async def test_an_agent_that_was_terminated_after_a_long_life_wakes_with_its_newest_ids(ledger: Ledger) -> None:
    """Waking reads as many entries as an agent remembers ids, the newest; turn and head are always the newest."""
    entries = [step(turn, 1, turn) for turn in range(1, 2011)]
    await asyncio.gather(*(ledger.append(entry) for entry in entries))
    state = await wake(ledger)
    assert state is not None
    assert (state.turn, state.head) == (2010, entries[-1].id)
    assert len(state.mailbox.seen) == 2000
    assert event(10).digest not in state.mailbox.seen
    assert state.mailbox.seen[event(11).digest] == 11


# Replies -------------------------------------------------------------------------------------------------------------


async def test_the_reply_of_an_earlier_turn_is_found(ledger: Ledger) -> None:
    """Who asks again what was answered long ago gets the same reply, made from the entries of that turn alone."""
    before = await ledger.append(step(1))
    asked = [UserMessage(text="Where?"), AssistantMessage(tool_calls=[CALL])]
    first = await ledger.append(step(2, 1, 1, 2, parent=before, messages=asked))
    told: list[Message] = [RESULT, AssistantMessage(text="On its way.")]
    second = await ledger.append(step(2, 2, 3, parent=first, messages=told, model="larger", rehearsal=True))
    await ledger.append(step(3, parent=second))

    reply = await ActivityEnvironment().run(AgentLedger(ledger).find_reply, ReplyRequest(workflow_id=AGENT, turn=2))

    assert reply is not None
    assert reply.id == names.reply_id(AGENT, 2, 0)
    assert (reply.workflow_id, reply.turn) == (AGENT, 2)
    assert reply.text == "On its way."
    assert (reply.outcome, reply.error) == (TurnOutcome.COMPLETED, None)
    assert [reference.id for reference in reply.answers] == ["event-1", "event-2", "event-3"]
    assert reply.usage == Usage(input_tokens=20, output_tokens=2)
    assert (reply.steps, reply.tool_calls) == (2, 1)
    assert (reply.model, reply.rehearsal, reply.entry) == ("larger", True, second.id)


async def test_a_turn_that_is_not_recorded_has_no_reply(ledger: Ledger) -> None:
    """Nothing is made up for a turn that the ledger does not know."""
    await ledger.append(step(1))
    for request in (ReplyRequest(workflow_id=AGENT, turn=2), ReplyRequest(workflow_id="agent/a/b/c", turn=1)):
        assert await ActivityEnvironment().run(AgentLedger(ledger).find_reply, request) is None


def test_the_reply_of_a_turn_that_failed_says_why() -> None:
    """The error of its last step is the reply's, and there is no text."""
    reply = reply_of([step(1, 1, 1, messages=[UserMessage(text="Where?")], error="The request was refused.", model="")])
    assert (reply.outcome, reply.error, reply.text) == (TurnOutcome.FAILED, "The request was refused.", "")
    assert [reference.id for reference in reply.answers] == ["event-1"]


# Catching up, purely -------------------------------------------------------------------------------------------------


def test_without_entries_nothing_changes() -> None:
    """A state that is up to date stays what it is."""
    state = AgentState(turn=3, head="a", current=CurrentTurn(number=3, started=NOW), mailbox=Mailbox(seen={"d0": 3}))
    assert caught_up(state, []) == state


def test_catching_up_leaves_the_given_state_alone() -> None:
    """It gives a new state, and shares nothing with the old one."""
    state = AgentState(mailbox=Mailbox(waiting=[event(1)], seen={event(1).digest: 0}, accepted=1))
    before = state.model_copy(deep=True)
    assert caught_up(state, [step(1, 1, 1)]).mailbox.waiting == []
    assert state == before


def test_a_later_turn_ends_the_one_in_progress() -> None:
    """A turn of which a later run has gone beyond is not gone on with."""
    state = AgentState(turn=1, current=CurrentTurn(number=1, started=NOW))
    assert caught_up(state, [step(2)]).current is None


def test_results_of_tools_are_counted_where_they_were_shown() -> None:
    """As the workflow counts them: each call whose result a model has seen."""
    messages: list[Message] = [RESULT, RESULT, AssistantMessage(text="Found.")]
    assert caught_up(AgentState(tool_calls=1), [step(1, 1), step(1, 2, messages=messages)]).tool_calls == 3


def test_an_event_keeps_the_turn_that_took_it_first() -> None:
    """An id that the snapshot has seen answered is not counted again."""
    state = AgentState(turn=1, mailbox=Mailbox(seen={event(1).digest: 1}, accepted=1))
    mailbox = caught_up(state, [step(2, 1, 1)]).mailbox
    assert (mailbox.seen, mailbox.accepted) == ({event(1).digest: 1}, 1)


@given(
    turns=st.lists(st.lists(st.integers(0, 8), max_size=3), max_size=8),
    waiting=st.sets(st.integers(0, 8)),
    cut=st.integers(0, 8),
)
def test_catching_up_bit_by_bit_comes_to_the_same(turns: list[list[int]], waiting: set[int], cut: int) -> None:
    """P1: whenever the snapshot was taken, what was answered does not wait, what was not does, and all is seen."""
    entries = [step(turn, 1, *answers) for turn, answers in enumerate(turns, 1)]
    events = [event(number) for number in sorted(waiting)]
    mailbox = Mailbox(waiting=events, seen={one.digest: 0 for one in events}, accepted=len(events))
    state = caught_up(AgentState(mailbox=mailbox), entries)
    assert caught_up(caught_up(AgentState(mailbox=mailbox), entries[:cut]), entries[cut:]) == state
    answered = {number for answers in turns for number in answers}
    assert state.mailbox.waiting == [event(number) for number in sorted(waiting - answered)]
    assert set(state.mailbox.seen) == {event(number).digest for number in waiting | answered}
    assert state.mailbox.accepted == len(waiting | answered)
    assert state.mailbox.accept([event(number) for number in sorted(answered)], horizon=1000) == [
        event(number) for number in sorted(answered)
    ]


def test_the_reply_of_a_turn_whose_model_said_nothing_says_so() -> None:
    """As it did when it was given."""
    nothing = [UserMessage(text="Where?"), AssistantMessage(text=" ")]
    reply = reply_of([step(1, 1, 1, messages=nothing)])
    assert (reply.outcome, reply.error) == (TurnOutcome.FAILED, repair.NOTHING)


async def test_the_reply_of_an_agent_whose_answers_have_a_schema_is_found_whole(ledger: Ledger) -> None:
    """Read again from what is recorded, it is the reply that was given: with its data, or failed, and why."""
    spec = ResolvedSpec(
        name="a", tenant="t", instructions="x", reply=ReplyForm(json_schema={"type": "object", "required": ["n"]})
    )
    digest = await ledger.put_spec(spec)
    wrong: list[Message] = [UserMessage(text="Well?"), AssistantMessage(text="{}")]
    right: list[Message] = [RepairMessage(text="no"), AssistantMessage(text='{"n": 1}')]
    one = await ledger.append(step(1, 1, 1, messages=wrong, spec_digest=digest))
    two = await ledger.append(step(1, 2, parent=one, messages=right, spec_digest=digest))
    await ledger.append(step(2, 1, 2, parent=two, messages=wrong, spec_digest=digest))

    async def found(turn: int) -> Reply:
        request = ReplyRequest(workflow_id=AGENT, turn=turn)
        reply = await ActivityEnvironment().run(AgentLedger(ledger).find_reply, request)
        assert reply is not None
        return reply

    repaired, failed = await found(1), await found(2)
    assert (repaired.outcome, repaired.text, repaired.data) == (TurnOutcome.COMPLETED, '{"n": 1}', {"n": 1})
    assert (failed.outcome, failed.text, failed.data) == (TurnOutcome.FAILED, "", None)
    assert failed.error == repair.failure(["$: 'n' is a required property"])
