"""How replies, lifecycle and agents read: models in, lines out."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import JsonValue

from activities.entries import AssistantMessage, Entry, Fact, MemoryMessage, RepairMessage, ToolMessage, UserMessage
from activities.memory import Forgetting, KeptFact
from workers import views
from workers.doctor import Check
from workers.history import Node, Plan, TreeReport
from workers.report import AgentReport
from workflows import names
from workflows.events import Event
from workflows.messages import (
    Approval,
    MadeCall,
    Missed,
    OpenCall,
    Reply,
    Rewound,
    Settlement,
    ToolCall,
    ToolOutcome,
    TurnOutcome,
    Usage,
    Waits,
    WakeUp,
)
from workflows.spec import Scope
from workflows.state import AgentState

WHO = "store/logistics/order-42"
WORKFLOW_ID = f"agent/{WHO}"
REPLY = Reply(
    id=f"{WORKFLOW_ID}/3/0",
    workflow_id=WORKFLOW_ID,
    turn=3,
    text="It left\nyesterday.",
    usage=Usage(input_tokens=12, output_tokens=3),
    steps=2,
    tool_calls=1,
    model="rehearsal",
    rehearsal=True,
)

REWOUND = Rewound(
    id="r-1",
    workflow_id=WORKFLOW_ID,
    turn=4,
    head="a" * 64,
    head_turn=2,
    head_step=1,
    old_head="b" * 64,
    by="ann",
    reason="lunch",
    steps=3,
    calls_total=1,
    recorded_at="2026-03-01T12:00:00+00:00",
)


FACT = Fact(
    id="0123456789abcdef",
    text="Has a\ndog.",
    scope=Scope.KEY,
    pinned=True,
    workflow_id=WORKFLOW_ID,
    turn=3,
    entry="e" * 64,
    kept_at="2026-03-01T12:00:00+00:00",
)


CALL = OpenCall(
    call=f"{WORKFLOW_ID}/3/1/0",
    tool="refund",
    arguments='{"amount_cents": 30000}',
    waits_for=Waits.APPROVAL,
    since=datetime(2026, 3, 1, 12, tzinfo=UTC),
)
DECIDED = Settlement(
    call=CALL.call,
    waits_for=Waits.APPROVAL,
    approved=False,
    by="ann",
    why="too much",
    at=CALL.since + timedelta(hours=1),
)


def happened(kind: str, data: JsonValue) -> Event:
    return Event(
        id="1",
        source=WORKFLOW_ID,
        type=kind,
        subject="order-42",
        time=datetime(2026, 3, 1, 12, tzinfo=UTC),
        data=data,
        extensions={"tenant": "store", "agent": "logistics"},
    )


def line(kind: str, data: JsonValue) -> str:
    """A line of tail, without its time."""
    text = views.event(happened(kind, data)).plain
    assert "\n" not in text
    return re.sub(r"^\d\d:\d\d:\d\d  ", "", text)


def test_a_reply_is_one_line_of_tail_and_marked_as_rehearsal() -> None:
    """Issue 2, point 6: what no real model said is marked as such; a real model's words are not."""
    assert line(names.REPLY_TYPE, REPLY.model_dump(mode="json")) == f"reply      {WHO}  [rehearsal] It left yesterday."
    real = REPLY.model_copy(update={"rehearsal": False})
    assert line(names.REPLY_TYPE, real.model_dump(mode="json")) == f"reply      {WHO}  It left yesterday."
    assert views.marked("[rehearsal] once", rehearsal=True) == "[rehearsal] once"
    assert views.reply_cost(REPLY).plain == "turn 3 · 2 steps · 1 tool call · 12 tokens in, 3 out · rehearsal"
    assert views.reply(REPLY).plain == "[rehearsal] It left\nyesterday."


def test_a_reply_of_a_turn_that_failed_tells_why() -> None:
    """Not an empty line."""
    failed = REPLY.model_copy(update={"outcome": TurnOutcome.FAILED, "text": "", "error": "no money left"})
    assert line(names.REPLY_TYPE, failed.model_dump(mode="json")) == f"reply      {WHO}  no answer: no money left"


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        (names.AGENT_PAUSED_TYPE, {"by": "ann", "reason": "lunch"}, f"paused     {WHO}  by ann: lunch"),
        (names.AGENT_STOPPED_TYPE, {"by": "", "reason": ""}, f"stopped    {WHO}  by somebody"),
        (
            names.AGENT_REWOUND_TYPE,
            REWOUND.model_dump(mode="json"),
            (
                f"rewound    {WHO}  goes on behind entry aaaaaaaaaaaa (turn 2, step 1); 3 steps left at entry "
                "bbbbbbbbbbbb, with 1 tool call that a rewind does not undo, by ann: lunch"
            ),
        ),
        (
            names.AGENT_FORKED_TYPE,
            REWOUND.model_copy(update={"old_head": None, "reason": ""}).model_dump(mode="json"),
            f"forked     {WHO}  begins behind entry aaaaaaaaaaaa (turn 2, step 1), by ann",
        ),
        (names.DUPLICATE_TYPE, {"source": "/s", "id": "7", "type": "t"}, f"duplicate  {WHO}  dropped t 7 of /s"),
        (
            names.REJECTED_TYPE,
            {"source": "/s", "id": "7", "type": "t"},
            f"rejected   {WHO}  dropped t 7 of /s, which came during a turn",
        ),
        (
            names.TURN_INTERRUPTED_TYPE,
            {"turn": 3, "step": 2, "events": [{"source": "/s", "id": "7", "type": "t"}]},
            f"cut short  {WHO}  turn 3, step 2, by t 7",
        ),
        (names.REPLY_TYPE, {"odd": True}, f"reply      {WHO}  of a form not known here: {{'odd': True}}"),
        (
            names.APPROVAL_REQUESTED_TYPE,
            CALL.model_dump(mode="json"),
            f'approval   {WHO}  refund {{"amount_cents": 30000}} waits for a decision: call {WORKFLOW_ID}/3/1/0',
        ),
        (
            names.TOOL_WAITING_TYPE,
            CALL.model_copy(update={"waits_for": Waits.ANSWER}).model_dump(mode="json"),
            f'waiting    {WHO}  refund {{"amount_cents": 30000}} waits for its answer: call {WORKFLOW_ID}/3/1/0',
        ),
        (
            names.APPROVAL_DECIDED_TYPE,
            {**CALL.model_dump(mode="json"), **DECIDED.model_dump(mode="json")},
            f'decided    {WHO}  refund {{"amount_cents": 30000}}: refused by ann: too much',
        ),
        (
            names.TOOL_UNKNOWN_TYPE,
            Missed(call=CALL.call, tool="refund", arguments="{}", why="It broke.").model_dump(mode="json"),
            f"unknown    {WHO}  refund {{}}: It broke. Call {WORKFLOW_ID}/3/1/0",
        ),
        (
            names.CALL_MISSED_TYPE,
            Missed(call="x", why="No call x waits here.", by="/crm").model_dump(mode="json"),
            f"not taken  {WHO}  word from /crm: No call x waits here.",
        ),
        ("store.news", {"a": 1}, f"store.news  {WHO}  {{'a': 1}}"),
        ("a\x1b[31m", "b\x07", f"a\\x1b[31m  {WHO}  b\\x07"),
    ],
)
def test_every_kind_of_event_has_its_line(kind: str, data: JsonValue, expected: str) -> None:
    """What we publish reads as a sentence; what we do not know is shown as it is, and harmlessly."""
    assert line(kind, data) == expected


def test_a_step_of_the_transcript_shows_what_was_said_in_its_order() -> None:
    """Event, tool result and its outcome, answer, calls; further lines of a text stand below its first."""
    recorded = Entry(
        workflow_id=WORKFLOW_ID,
        turn=1,
        step=2,
        parent=None,
        messages=[
            UserMessage(text="Where is it?\nPlease."),
            ToolMessage(call_id="c", name="refund", content="too much", outcome=ToolOutcome.ERROR),
            AssistantMessage(text="Wait.", tool_calls=[ToolCall(id="d", name="look_up", arguments='{"id": 1}')]),
        ],
        model="m",
        recorded_at="2026-03-01T12:00:00+00:00",
    )
    heading, *lines = [text.plain for text in views.entry(recorded)]
    assert heading.startswith("turn 1, step 2 · 2026-03-01 ")
    assert heading.endswith(f"entry {recorded.id[:12]}")
    assert lines == [
        "  event: Where is it?\n    Please.",
        f"  refund: ({ToolOutcome.ERROR.value}) too much",
        "  agent: Wait.",
        '  calls: look_up {"id": 1}',
    ]


def test_a_transcript_shows_why_an_answer_was_sent_back() -> None:
    """What the model was told of it, before its next answer."""
    messages = [RepairMessage(text="(Not so.)\n- $: it is empty"), AssistantMessage(text="{}")]
    recorded = Entry(workflow_id=WORKFLOW_ID, turn=4, step=2, parent=None, messages=messages, recorded_at=FACT.kept_at)
    assert [text.plain for text in views.entry(recorded)][1:] == [
        "  sent back: (Not so.)\n    - $: it is empty",
        "  agent: {}",
    ]


def test_a_transcript_shows_what_the_agent_was_reminded_of() -> None:
    """A line for each fact, with the id by which it is forgotten."""
    messages = [MemoryMessage(facts=[FACT]), UserMessage(text="Who barks?")]
    recorded = Entry(workflow_id=WORKFLOW_ID, turn=4, step=1, parent=None, messages=messages, recorded_at=FACT.kept_at)
    assert [text.plain for text in views.entry(recorded)][1:] == [
        "  recalls: Has a\n    dog. (key, 0123456789abcdef)",
        "  event: Who barks?",
    ]


def test_a_fact_is_a_row_with_its_provenance() -> None:
    """Which fact, whose, since when, from which agent, turn and entry; if it is forgotten, by whom and why."""
    gone = Forgetting(by="alice", why="it ran away", at="2026-03-02T12:00:00+00:00")
    fact_id, scope, at, origin, text = views.kept_fact(KeptFact(fact=FACT))
    assert (fact_id, scope, at[:11]) == (FACT.id, "key", "2026-03-01 ")
    assert (origin, text) == (f"{WHO}, turn 3, entry {'e' * 12}", "Has a dog. (pinned)")
    assert re.sub(r"\d\d:\d\d:\d\d", "...", views.kept_fact(KeptFact(fact=FACT, forgotten=gone))[4]) == (
        "Has a dog. (pinned; forgotten 2026-03-02 ... by alice: it ran away)"
    )


def test_an_agent_that_does_not_answer_is_still_shown() -> None:
    """What is known, why the rest is not, and the link to the Web UI."""
    told = AgentReport(
        agent=WHO,
        workflow_id=WORKFLOW_ID,
        state="active",
        awake=True,
        since=None,
        status=None,
        note="the agent does not answer: no agent worker polls",
        steps=3,
        transcript=[],
        link="http://127.0.0.1:8233/x",
    )
    text = "\n".join(part.plain for part in views.report(told))
    assert text == (
        f"{WHO}  active\n"
        "  note     the agent does not answer: no agent worker polls\n"
        "  Web UI   http://127.0.0.1:8233/x\n"
        "\n"
        "transcript not shown"
    )


@pytest.mark.parametrize(
    ("waits_for", "expected"),
    [
        (Waits.APPROVAL, ["waits for a decision refund", f"  perennial approvals approve {CALL.call} --reason ..."]),
        (Waits.ANSWER, ["waits for an answer refund", f"  perennial tool complete {CALL.call} TEXT"]),
    ],
)
def test_an_agent_with_a_call_that_waits_is_shown_with_the_command_that_settles_it(
    waits_for: Waits, expected: list[str]
) -> None:
    """Issue 4, point 2: whoever looks at the agent sees what it waits for, and what to do."""
    call = CALL.model_copy(update={"waits_for": waits_for})
    status = AgentState().status(WORKFLOW_ID).model_copy(update={"open_calls": [call]})
    told = AgentReport(
        agent=WHO,
        workflow_id=WORKFLOW_ID,
        state="waiting",
        awake=True,
        since=None,
        status=status,
        steps=0,
        transcript=[],
        link="http://127.0.0.1:8233/x",
    )
    lines = [line.plain for line in views.report(told)]
    place = next(number for number, line in enumerate(lines) if line.startswith(expected[0]))
    assert lines[place + 1] == expected[1]


def test_an_agent_is_shown_with_its_wake_ups_also_asleep() -> None:
    """Issue 4, point 6: when, and what for."""
    due = datetime(2026, 3, 2, 9, tzinfo=UTC)
    wake_up = WakeUp(id="3-1-0", note="is the parcel there?", set_at=CALL.since, due=due, when="store.parcel.*")
    told = AgentReport(
        agent=WHO,
        workflow_id=WORKFLOW_ID,
        state="asleep",
        awake=False,
        since=None,
        status=AgentState(wake_ups=[wake_up]).status(WORKFLOW_ID),
        steps=0,
        transcript=[],
        link="http://127.0.0.1:8233/x",
    )
    expected = "when store.parcel.* comes, or at 2026-03-02T09:00:00+00:00 at the latest: is the parcel there?"
    assert f"  wakes    {expected}" in [line.plain for line in views.report(told)]


def test_what_was_decided_is_a_row_and_a_line() -> None:
    """With who and why; an expiry reads as one, and nobody as somebody."""
    made = Approval(
        workflow_id=WORKFLOW_ID,
        turn=3,
        call=CALL.call,
        tool="refund",
        arguments='{"a":\n1}',
        approved=True,
        by="",
        why="",
        asked_at=CALL.since,
        decided_at=DECIDED.at,
    )
    _, word, by, why, what, call = views.decision(made)
    assert (word.plain, by, why, what, call) == ("approved", "somebody", "", 'refund {"a": 1}', CALL.call)
    assert views.settled(DECIDED).plain == f"{CALL.call} is refused by ann: too much"
    assert views.open_call(CALL)[2:] == ("", 'refund {"amount_cents": 30000}')


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (names.PAUSE, "is paused; 1 event waiting, until `perennial resume`"),
        (names.RESUME, "goes on: in turn 4"),
        (names.STOP, "goes to sleep; its next event or question wakes it"),
    ],
)
def test_what_steering_came_to_is_said_in_words(update: str, expected: str) -> None:
    """Each of the three, with what a person wants to know of it."""
    status = AgentState().status(WORKFLOW_ID).model_copy(update={"doing": "in turn 4", "waiting": 1})
    assert views.steered(WHO, update, status).plain == f"{WHO} {expected}"


def test_the_doctor_says_for_each_thing_what_to_do() -> None:
    """Aligned; the remedy below what it is for; messages of several lines stay in their column."""
    checks = [
        Check(what="Kafka", ok=True, found="127.0.0.1:9092"),
        Check(what="agent worker", ok=False, found="nobody\npolls", remedy="Start one"),
        Check(what="disk", ok=False, needed=False, found="?"),
    ]
    assert "\n".join(line.plain for line in views.checks(checks)) == (
        "ok       Kafka         127.0.0.1:9092\n"
        "not ok   agent worker  nobody\n"
        "                       polls\n"
        "                       → Start one\n"
        "unclear  disk          ?"
    )


def node(name: str, parent: str | None, turn: int, **more: object) -> Node:
    """An entry in a tree; its id is its name, many times over."""
    given = {"heard": [f"heard {turn}"], "said": f"said {turn}", "calls": [], "rehearsal": False, "error": None}
    place = {"entry": name * 64, "parent": parent * 64 if parent else None, "agent": WHO, "turn": turn, "step": 1}
    marks = {"live": False, "head": False, "forks": [], "left": [], "recorded_at": "2026-03-01T12:00:00+00:00"}
    return Node.model_validate({**given, **place, **marks, **more})


def drawn(nodes: list[Node], **more: object) -> list[str]:
    told = TreeReport.model_validate(
        {"agent": WHO, "workflow_id": WORKFLOW_ID, "head": None, "entries": len(nodes), "nodes": nodes, **more}
    )
    return [re.sub(r"left \d+-\d+-\d+ \S+", "left AT", line.plain.rstrip()) for line in views.tree(told)]


def test_a_tree_is_drawn_with_its_branches_beside_the_conversation() -> None:
    """The conversation goes straight down, what was left is indented beside it, however long; the head is marked."""
    nodes = [
        node("a", None, 1, live=True, forks=["store/logistics/order-42-b"]),
        node("b", "a", 2),
        node("c", "b", 3),
        node("d", "b", 4, calls=["look", "refund"], said="", left=[REWOUND]),
        node("e", "a", 5, error="no\nmoney"),
        node("f", "a", 6, live=True),
        node("0", "f", 7, live=True, head=True, heard=["x" * 80], said="y\x1b[31m" + "z" * 100, rehearsal=True),
    ]
    assert drawn(nodes) == [
        f"{WHO}  7 entries",
        "● turn 1, step 1 · aaaaaaaaaaaa · heard 1 → said 1",
        "    fork: store/logistics/order-42-b begins here",
        "├─ ○ turn 2, step 1 · bbbbbbbbbbbb · heard 2 → said 2",
        "│  ├─ ○ turn 3, step 1 · cccccccccccc · heard 3 → said 3",
        "│  ○ turn 4, step 1 · dddddddddddd · heard 4 → calls look, refund",
        "│      left AT by ann: lunch",
        "├─ ○ turn 5, step 1 · eeeeeeeeeeee · heard 5 → no money",
        "● turn 6, step 1 · ffffffffffff · heard 6 → said 6",
        f"● turn 7, step 1 · 000000000000 · {'x' * 49}… → [rehearsal] y\\x1b[31m{'z' * 68}…  ← head",
    ]


def test_a_tree_says_what_it_does_not_show_and_whose_an_entry_is() -> None:
    """Earlier entries, and those that a fork shares with another agent."""
    nodes = [
        node("b", "a", 2, agent="store/logistics/order-1", live=True),
        node("c", "b", 1, live=True, head=True),
    ]
    assert drawn(nodes, entries=1, forked_from="store/logistics/order-1") == [
        f"{WHO}  1 entry, forked from store/logistics/order-1",
        "⋮ earlier entries are not shown",
        "● turn 2, step 1 · bbbbbbbbbbbb · store/logistics/order-1 · heard 2 → said 2",
        "● turn 1, step 1 · cccccccccccc · heard 1 → said 1  ← head",
    ]


def test_a_deep_tree_is_drawn() -> None:
    """A thousand branches, one off the other."""
    nodes = [node("a", None, 1)]
    for turn in range(2, 1002):
        name, parent = f"{turn:x}.", f"{turn - 1:x}." if turn > 2 else "a"
        nodes += [node(name, parent, turn), node(f"{turn:x}:", parent, turn)]
    assert len(drawn(nodes)) == 1 + len(nodes)


def test_a_plan_names_what_a_rewind_does_not_undo() -> None:
    """Each call with its arguments, its outcome and whether it may be repeated; and how many are not named."""
    calls = [
        MadeCall(turn=3, step=1, name="refund", arguments='{"n":\n1}', outcome=ToolOutcome.OK, repeatable=False),
        MadeCall(turn=3, step=2, name="look", arguments="{}", outcome=ToolOutcome.UNKNOWN, repeatable=True),
        MadeCall(turn=3, step=2, name="fly", arguments="{}", outcome=ToolOutcome.ERROR),
    ]
    plan = Plan(agent=WHO, head="b" * 64, entry="a" * 64, turn=2, step=1, steps=3, calls=calls, calls_total=5)
    assert [line.plain for line in views.plan(plan)] == [
        f"{WHO} goes back to entry aaaaaaaaaaaa (turn 2, step 1): 3 steps left on a branch",
        "Tool calls were made there; a rewind does not undo them:",
        '  turn 3, step 1  refund {"n": 1}  ok, not repeatable',
        "  turn 3, step 2  look {}  unknown, repeatable",
        "  turn 3, step 2  fly {}  error, no such tool",
        "  and 2 more",
    ]
    quiet = plan.model_copy(update={"calls": [], "calls_total": 0, "steps": 1})
    assert [line.plain for line in views.plan(quiet)] == [
        f"{WHO} goes back to entry aaaaaaaaaaaa (turn 2, step 1): 1 step left on a branch"
    ]
