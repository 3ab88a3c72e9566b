"""P8: rewinds and forks in the ledger, on SQLite and PostgreSQL: what is recorded, what is left, what a head sees."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities import history
from activities.agent_state import AgentLedger
from activities.entries import AssistantMessage, Entry, Message, ToolMessage, UserMessage
from activities.ledger import Ledger
from workflows import names
from workflows.events import EventReference
from workflows.messages import RewindRecord, RewindRequest, Rewound, ToolCall, ToolOutcome
from workflows.spec import ResolvedSpec, ToolDefinition
from workflows.state import AgentState, Snapshot

AGENT = "agent/store/logistics/order-42"
FORK = "agent/store/logistics/order-42-b"
ALL = 1_000_000
SPEC = ResolvedSpec(
    name="logistics",
    tenant="store",
    instructions="Ship things.",
    tools=[
        ToolDefinition(name="look", python="tools:look"),
        ToolDefinition(name="refund", python="tools:refund", repeatable=False, timeout=timedelta(seconds=5)),
    ],
)


def step(turn: int, number: int = 1, *, parent: Entry | None, agent: str = AGENT, **fields: Any) -> Entry:
    """A step in which the agent says where it is."""
    said: list[Message] = [UserMessage(text="Go."), AssistantMessage(text=f"{turn}.{number}")]
    return Entry(
        workflow_id=agent,
        turn=turn,
        step=number,
        parent=parent.id if parent else None,
        recorded_at="2026-11-24T12:00:00+00:00",
        **{"messages": said, **fields},
    )


async def chain(ledger: Ledger, turns: int, *, after: int = 0, parent: Entry | None = None) -> list[Entry]:
    """So many turns of one step, behind an entry."""
    entries: list[Entry] = []
    for turn in range(after + 1, after + turns + 1):
        event = EventReference(source="shop", id=f"e{turn}", type="order.shipped")
        entries.append(await ledger.append(step(turn, parent=entries[-1] if entries else parent, answers=[event])))
    return entries


async def move(ledger: Ledger, entry: str, *, agent: str = AGENT, fork: bool = False, **record: Any) -> Rewound:
    """What the workflow does: the activity, with the agent's state."""
    state = await wake(ledger, agent) or AgentState()
    request = RewindRequest(entry=entry, by="ada", reason="why not", **record.pop("request", {}))
    if not request.id:
        request = request.model_copy(update={"id": str(uuid4())})
    values = {"turn": state.turn, "head": state.head, "known": state.rewound, "lived": state.head is not None, **record}
    full = RewindRecord(workflow_id=agent, fork=fork, request=request, **values)
    made: Rewound = await ActivityEnvironment().run(AgentLedger(ledger).record_rewind, full)
    return made


async def wake(ledger: Ledger, agent: str = AGENT) -> AgentState | None:
    state: AgentState | None = await ActivityEnvironment().run(AgentLedger(ledger).wake, agent)
    return state


async def keep(ledger: Ledger, state: AgentState, agent: str = AGENT) -> None:
    snapshot = Snapshot(workflow_id=agent, run_id=str(uuid4()), state=state)
    await ActivityEnvironment().run(AgentLedger(ledger).keep_snapshot, snapshot)


# Waking --------------------------------------------------------------------------------------------------------------


async def test_an_agent_that_is_terminated_right_after_a_rewind_wakes_rewound(ledger: Ledger) -> None:
    """P6: what is recorded is done. Its next turn has a new number; what was answered on the old branch is known."""
    entries = await chain(ledger, 3)
    made = await move(ledger, entries[0].id)
    state = await wake(ledger)
    assert state is not None
    assert (state.head, state.turn, state.rewound) == (entries[0].id, 3, made.number)
    assert set(state.mailbox.seen.values()) == {1, 2, 3}
    assert await ledger.head(AGENT) == entries[0].id


async def test_turns_taken_after_a_rewind_count_for_an_agent_that_is_terminated(ledger: Ledger) -> None:
    """The rewind is of the past: the agent goes on behind its newest entry, which hangs where it was rewound to."""
    entries = await chain(ledger, 3)
    await move(ledger, entries[0].id)
    (later,) = await chain(ledger, 1, after=3, parent=entries[0])
    state = await wake(ledger)
    assert state is not None
    assert (state.head, state.turn) == (later.id, 4)
    assert await ledger.context(later.id, max_characters=ALL) == [entries[0], later]
    assert await ledger.head(AGENT) == later.id


async def test_a_snapshot_of_before_the_rewind_does_not_undo_it(ledger: Ledger) -> None:
    """Closed, woken, rewound, terminated; or a snapshot that was being written while it was rewound."""
    entries = await chain(ledger, 3)
    await keep(ledger, AgentState(head=entries[-1].id, turn=3))
    await move(ledger, entries[1].id)
    state = await wake(ledger)
    assert state is not None
    assert state.head == entries[1].id


async def test_a_snapshot_of_after_the_rewind_holds_it(ledger: Ledger) -> None:
    """It is not taken in twice: a later head stays."""
    entries = await chain(ledger, 3)
    made = await move(ledger, entries[1].id)
    (later,) = await chain(ledger, 1, after=3, parent=entries[1])
    await keep(ledger, AgentState(head=later.id, turn=4, rewound=made.number))
    state = await wake(ledger)
    assert state is not None
    assert (state.head, state.turn) == (later.id, 4)


async def test_of_several_rewinds_the_last_counts(ledger: Ledger) -> None:
    """Back, further back, and forward again to what was left."""
    entries = await chain(ledger, 4)
    for entry in (entries[2], entries[0], entries[3]):
        await move(ledger, entry.id)
        state = await wake(ledger)
        assert state is not None
        assert state.head == entry.id


async def test_a_turn_without_an_entry_before_the_rewind_keeps_its_number(ledger: Ledger) -> None:
    """A turn may fail before anything is recorded: the next one must not seem to be older than the rewind."""
    entries = await chain(ledger, 2)
    await move(ledger, entries[0].id, turn=5)
    state = await wake(ledger)
    assert state is not None
    assert state.turn == 5
    (later,) = await chain(ledger, 1, after=5, parent=entries[0])
    state = await wake(ledger)
    assert state is not None
    assert state.head == later.id


async def test_a_rewind_that_the_agent_has_gone_on_without_is_of_the_past(ledger: Ledger) -> None:
    """It was recorded when its agent was terminated, and the next run had woken just before: its turns count."""
    entries = await chain(ledger, 3)
    late = await move(ledger, entries[0].id, request={"id": "r-1"})
    (later,) = await chain(ledger, 1, after=3, parent=entries[-1])
    await keep(ledger, AgentState(head=later.id, turn=4))
    state = await wake(ledger)
    assert state is not None
    assert state.head == later.id
    again = await move(ledger, entries[0].id, request={"id": "r-1"})
    assert again.number > late.number, "whoever asks again is served"
    state = await wake(ledger)
    assert state is not None
    assert state.head == entries[0].id


# Recording -----------------------------------------------------------------------------------------------------------


async def test_a_request_is_recorded_once(ledger: Ledger) -> None:
    """However often and by how many it is tried; also when the agent has gone on since it has taken it in."""
    entries = await chain(ledger, 3)
    tries = await asyncio.gather(*(move(ledger, entries[0].id, request={"id": "r-1"}) for _ in range(8)))
    assert len({made.number for made in tries}) == 1
    await chain(ledger, 1, after=3, parent=entries[0])
    again = await move(ledger, entries[0].id, request={"id": "r-1"}, known=tries[0].number)
    assert again == tries[0]
    assert await ledger.rewinds(AGENT) == [tries[0]]


async def test_who_and_why_and_what_was_left_is_recorded(ledger: Ledger) -> None:
    """For years: it is read from the ledger."""
    entries = await chain(ledger, 3)
    made = await move(ledger, entries[1].id)
    (kept,) = await ledger.rewinds(AGENT)
    assert kept == made
    assert (kept.by, kept.reason) == ("ada", "why not")
    assert (kept.head, kept.head_turn, kept.old_head, kept.steps, kept.turn) == (entries[1].id, 2, entries[2].id, 1, 3)


async def test_an_entry_that_is_not_the_agents_is_refused(ledger: Ledger) -> None:
    """P14: unknown, of another agent: said, and nothing is recorded; and it is not tried again."""
    await chain(ledger, 2)
    foreign = await ledger.append(step(1, parent=None, agent="agent/store/logistics/order-43"))
    for entry, complaint in (("0" * 64, "There is no entry 000"), (foreign.id, "order-43, and on no branch of")):
        with pytest.raises(ApplicationError, match=complaint) as refused:
            await move(ledger, entry)
        assert (refused.value.type, refused.value.non_retryable) == (names.REFUSED, True)
    assert await ledger.rewinds(AGENT) == []


async def test_an_agent_that_has_gone_on_since_is_not_rewound(ledger: Ledger) -> None:
    """Whoever has looked at what a rewind would leave does not leave more than that."""
    entries = await chain(ledger, 3)
    with pytest.raises(ApplicationError, match=f"gone on since, to entry {entries[2].id}") as refused:
        await move(ledger, entries[0].id, request={"over": entries[1].id})
    assert refused.value.type == names.GONE_ON
    await move(ledger, entries[0].id, request={"over": entries[2].id})


# What is left --------------------------------------------------------------------------------------------------------


def asks(*calls: ToolCall) -> list[Message]:
    return [UserMessage(text="Go."), AssistantMessage(tool_calls=list(calls))]


def results(*outcomes: tuple[str, ToolOutcome], calls: tuple[ToolCall, ...] = ()) -> list[Message]:
    told = [ToolMessage(call_id=one, name="t", content="...", outcome=outcome) for one, outcome in outcomes]
    return [*told, AssistantMessage(text="well", tool_calls=list(calls))]


async def test_the_tool_calls_that_were_made_since_are_listed(ledger: Ledger) -> None:
    """Name, arguments, outcome, repeatable; those of the entry rewound to were made after it, and are among them."""
    digest = await ledger.put_spec(SPEC)
    look, refund, fly = (
        ToolCall(id="a", name="look", arguments='{"n":1}'),
        ToolCall(id="b", name="refund", arguments='{"cents":700}'),
        ToolCall(id="a", name="fly"),
    )
    first = await ledger.append(step(1, 1, parent=None, messages=asks(look, refund), spec_digest=digest))
    told = results(("a", ToolOutcome.OK), ("b", ToolOutcome.UNKNOWN), calls=(fly,))
    second = await ledger.append(step(1, 2, parent=first, messages=told, spec_digest=digest))
    third = await ledger.append(step(1, 3, parent=second, messages=results(("a", ToolOutcome.ERROR))))
    last = await ledger.append(step(2, 1, parent=third, messages=asks(look), spec_digest=digest))

    left = await history.left_behind(ledger, last.id, first.id, limit=10)
    assert left.steps == 3
    assert [(c.turn, c.step, c.name, c.arguments, c.outcome, c.repeatable) for c in left.calls] == [
        (1, 1, "look", '{"n":1}', ToolOutcome.OK, True),
        (1, 1, "refund", '{"cents":700}', ToolOutcome.UNKNOWN, False),
        (1, 2, "fly", "{}", ToolOutcome.ERROR, None),
        (2, 1, "look", '{"n":1}', ToolOutcome.UNKNOWN, True),
    ]
    few = await history.left_behind(ledger, last.id, second.id, limit=1, characters=2)
    assert (few.calls_total, [(c.name, c.arguments) for c in few.calls]) == (2, [("fly", "{}")])
    short = await history.left_behind(ledger, last.id, third.id, limit=1, characters=3)
    assert [c.arguments for c in short.calls] == ['{"…']


async def test_calls_that_share_an_id_have_each_its_own_outcome(ledger: Ledger) -> None:
    """A careless server numbers them alike; results come in the order of the calls."""
    calls = [ToolCall(id="a", name="look"), ToolCall(id="a", name="refund")]
    first = await ledger.append(step(1, 1, parent=None, messages=asks(*calls)))
    told = results(("a", ToolOutcome.OK), ("a", ToolOutcome.UNKNOWN))
    last = await ledger.append(step(1, 2, parent=first, messages=told))
    left = await history.left_behind(ledger, last.id, first.id, limit=10)
    assert [(c.name, c.outcome) for c in left.calls] == [("look", ToolOutcome.OK), ("refund", ToolOutcome.UNKNOWN)]


async def test_nothing_is_left_by_going_on_to_what_came_after(ledger: Ledger) -> None:
    """Back to a branch that was left: only what the two do not share is left."""
    digest = await ledger.put_spec(SPEC)
    call = ToolCall(id="a", name="refund")
    root = await ledger.append(step(1, 1, parent=None, messages=asks(call), spec_digest=digest))
    old = await ledger.append(step(1, 2, parent=root, messages=results(("a", ToolOutcome.OK))))
    new = await ledger.append(step(2, 1, parent=root))
    assert await history.left_behind(ledger, root.id, old.id, limit=10) == history.LeftBehind()
    assert await history.left_behind(ledger, old.id, old.id, limit=10) == history.LeftBehind()
    over = await history.left_behind(ledger, new.id, old.id, limit=10)
    assert (over.steps, [c.name for c in over.calls]) == (1, ["refund"])


async def test_a_long_branch_is_left_a_page_at_a_time(ledger: Ledger) -> None:
    """More entries than are read at once: every call is counted, each once."""
    parent = await ledger.append(step(1, parent=None))
    root = parent
    for turn in range(2, 260):
        messages = asks(ToolCall(id="a", name="look"))
        parent = await ledger.append(step(turn, parent=parent, messages=messages))
    left = await history.left_behind(ledger, parent.id, root.id, limit=300)
    assert (left.steps, left.calls_total, [c.turn for c in left.calls]) == (258, 258, list(range(2, 260)))


# Forks ---------------------------------------------------------------------------------------------------------------


async def test_a_fork_shares_what_was_before_and_nothing_after(ledger: Ledger) -> None:
    """Nothing is copied: its first entry hangs on the other's; it knows no event, and has spent nothing."""
    entries = await chain(ledger, 3)
    await move(ledger, entries[1].id, agent=FORK, fork=True)
    state = await wake(ledger, FORK)
    assert state is not None
    assert (state.head, state.turn, state.usage.input_tokens, state.mailbox.seen) == (entries[1].id, 0, 0, {})
    own = await ledger.append(step(1, parent=entries[1], agent=FORK))
    assert await ledger.context(own.id, max_characters=ALL) == [*entries[:2], own]
    assert await ledger.count(AGENT) == 3
    assert await ledger.head(AGENT) == entries[2].id
    assert await ledger.head(FORK) == own.id


async def test_a_fork_can_be_rewound_into_what_it_shares(ledger: Ledger) -> None:
    """What came before the fork is on its branch, and what came after it, with the other agent, is not."""
    entries = await chain(ledger, 3)
    await move(ledger, entries[1].id, agent=FORK, fork=True)
    await ledger.append(step(1, parent=entries[1], agent=FORK))
    await move(ledger, entries[0].id, agent=FORK)
    assert await ledger.head(FORK) == entries[0].id
    with pytest.raises(ApplicationError, match="on no branch of"):
        await move(ledger, entries[2].id, agent=FORK)
    third = f"{FORK}-c"
    await move(ledger, entries[0].id, agent=third, fork=True)
    with pytest.raises(ApplicationError, match="on no branch of"):
        await move(ledger, entries[1].id, agent=third)


async def test_only_a_new_agent_of_the_same_name_is_a_fork(ledger: Ledger) -> None:
    """P14: no conversation is lost to a fork, and none gets to another tenant."""
    entries = await chain(ledger, 1)
    with pytest.raises(ApplicationError, match="has lived already"):
        await move(ledger, entries[0].id, agent=FORK, fork=True, lived=True)
    for stranger in ("agent/other/logistics/1", "agent/store/refunds/1"):
        with pytest.raises(ApplicationError, match="same tenant and agent"):
            await move(ledger, entries[0].id, agent=stranger, fork=True)
    assert await ledger.forks([entries[0].id]) == []


# The tree ------------------------------------------------------------------------------------------------------------


async def test_the_tree_has_the_branches_the_head_and_the_forks(ledger: Ledger) -> None:
    """Parents before children; what the head's conversation holds is marked."""
    one, two, three = await chain(ledger, 3)
    made = await move(ledger, one.id)
    (four,) = await chain(ledger, 1, after=3, parent=one)
    forked = await move(ledger, two.id, agent=FORK, fork=True)
    tree = await history.tree(ledger, AGENT, limit=10)
    assert [entry.id for entry in tree.entries] == [one.id, two.id, four.id, three.id]
    assert (tree.head, tree.line) == (four.id, {one.id, four.id})
    assert (tree.rewinds, tree.forks, tree.origin) == ([made], [forked], None)


async def test_the_tree_is_bounded_and_has_the_head(ledger: Ledger) -> None:
    """The newest entries; and the head, wherever it is."""
    entries = await chain(ledger, 6)
    await move(ledger, entries[0].id)
    tree = await history.tree(ledger, AGENT, limit=2)
    assert [entry.id for entry in tree.entries] == [entries[0].id, entries[4].id, entries[5].id]
    assert tree.line == {entries[0].id}


async def test_the_tree_of_a_fork_begins_with_what_it_shares(ledger: Ledger) -> None:
    """As many as the limit allows; also while it has no entry of its own."""
    entries = await chain(ledger, 4)
    await move(ledger, entries[2].id, agent=FORK, fork=True)
    tree = await history.tree(ledger, FORK, limit=2)
    assert [entry.id for entry in tree.entries] == [entries[1].id, entries[2].id]
    assert tree.head == entries[2].id
    own = await ledger.append(step(1, parent=entries[2], agent=FORK))
    tree = await history.tree(ledger, FORK, limit=3)
    assert [entry.id for entry in tree.entries] == [entries[1].id, entries[2].id, own.id]
    assert tree.line == {entries[1].id, entries[2].id, own.id}


async def test_entries_are_found_by_the_beginning_of_their_id(ledger: Ledger) -> None:
    """Only the agent's own and those it shares; as many as are asked for."""
    entries = await chain(ledger, 3)
    foreign = await ledger.append(step(1, parent=None, agent="agent/store/logistics/order-43"))
    for entry in entries:
        assert await ledger.starting_with(AGENT, entry.id[:20], above=None, limit=2) == [entry.id]
        assert await ledger.starting_with(AGENT, entry.id, above=None, limit=2) == [entry.id]
    assert await ledger.starting_with(AGENT, foreign.id, above=None, limit=2) == []
    assert await ledger.starting_with(AGENT, "", above=None, limit=5) == sorted(entry.id for entry in entries)
    assert len(await ledger.starting_with(AGENT, "", above=None, limit=2)) == 2
    shared = await ledger.starting_with(FORK, "", above=entries[1].id, limit=5)
    assert shared == sorted(entry.id for entry in entries[:2])


# Any life ------------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """What a plain model says of the agents: each one's turns, and the conversation that it goes on behind."""

    turns: dict[str, int] = field(default_factory=dict)
    said: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What was said up to each entry, by its id."""
    heads: dict[str, str] = field(default_factory=dict)
    reach: dict[str, list[str]] = field(default_factory=dict)
    """The entries on an agent's branches."""


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["turn", "turn", "turn", "rewind", "fork", "sleep", "terminate"]),
        st.integers(0, 1000),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
async def test_any_life_gives_the_conversations_that_a_plain_model_says(
    ledger: Ledger, operations: list[tuple[str, int, int]]
) -> None:
    """Turns, rewinds, forks, snapshots and terminations in any order: at each head the context is what was said."""
    base = f"agent/store/tree/{uuid4()}"
    model = Model(turns={base: 0}, reach={base: []})
    states: dict[str, AgentState] = {base: AgentState()}

    async def go(agent: str, entry: str, *, fork: bool = False) -> None:
        state = states[agent]
        made = await move(ledger, entry, agent=agent, fork=fork, turn=state.turn, head=state.head, known=state.rewound)
        state.rewind(made)
        model.heads[agent] = entry

    for what, which, choice in operations:
        agent = sorted(model.turns)[which % len(model.turns)]
        state = states[agent]
        reach = model.reach[agent]
        if what == "turn":
            model.turns[agent] += 1
            for number in range(1, 2 + choice % 3):
                parent = model.heads.get(agent)
                text = f"{agent}/{model.turns[agent]}/{number}"
                entry = await ledger.append(
                    step(model.turns[agent], number, parent=None, agent=agent).model_copy(
                        update={"parent": parent, "messages": [AssistantMessage(text=text)]}
                    )
                )
                model.said[entry.id] = (*model.said.get(parent or "", ()), text)
                model.heads[agent] = state.head = entry.id
                reach.append(entry.id)
            state.turn = model.turns[agent]
        elif what == "rewind" and reach:
            await go(agent, reach[choice % len(reach)])
        elif what == "fork" and reach:
            new = f"{base}-{len(model.turns)}"
            entry_id = reach[choice % len(reach)]
            model.turns[new] = 0
            model.reach[new] = [one for one in model.said if set(model.said[one]) <= set(model.said[entry_id])]
            states[new] = AgentState()
            await go(new, entry_id, fork=True)
        elif what == "sleep":
            await keep(ledger, state, agent)
        if what in {"sleep", "terminate"}:
            states[agent] = await wake(ledger, agent) or AgentState()
        for one, head in model.heads.items():
            context = await ledger.context(head, max_characters=ALL)
            assert tuple(entry.answer.text for entry in context if entry.answer) == model.said[head]
            assert await ledger.head(one) == head
            assert states[one].head == head
            assert states[one].turn == model.turns[one]
