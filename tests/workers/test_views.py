"""How replies, lifecycle and agents read: models in, lines out."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from pydantic import JsonValue

from activities.entries import AssistantMessage, Entry, ToolMessage, UserMessage
from workers import views
from workers.doctor import Check
from workers.report import AgentReport
from workflows import names
from workflows.events import Event
from workflows.messages import Reply, ToolCall, ToolOutcome, TurnOutcome, Usage
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
        (names.DUPLICATE_TYPE, {"source": "/s", "id": "7", "type": "t"}, f"duplicate  {WHO}  dropped t 7 of /s"),
        (names.REPLY_TYPE, {"odd": True}, f"reply      {WHO}  of a form not known here: {{'odd': True}}"),
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
