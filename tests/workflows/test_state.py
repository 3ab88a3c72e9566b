"""The agent's control state: what earlier and later releases wrote still loads, and a turn is kept in it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from workflows.events import Event, EventReference, Outgoing
from workflows.messages import (
    Decision,
    Intervention,
    Reply,
    Status,
    ToolCall,
    ToolResult,
    TurnOutcome,
    Usage,
)
from workflows.spec import ControlSpec, ToolControl
from workflows.state import AgentInput, AgentState, Snapshot

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
AGENT = "agent/acme/desk/a"

FIRST_RELEASE = """
{
  "mailbox": {
    "waiting": [{"id": "e2", "source": "store", "type": "store.order", "subject": "a", "data": {"n": 1}}],
    "seen": {"1a349002d3a7763f5d1ad3f6a1c2e017": 1, "c0ffee": 0},
    "accepted": 2,
    "duplicates": 1
  },
  "head": "entry-1",
  "turn": 2,
  "current": {
    "number": 2,
    "started": "2026-01-02T03:04:05Z",
    "answers": [{"source": "store", "id": "e1", "type": "store.order"}],
    "step": 2,
    "events": [],
    "results": [{"call_id": "c1", "name": "look", "content": "seen", "outcome": "ok"}],
    "usage": {"input_tokens": 10, "output_tokens": 1},
    "tool_calls": 1
  },
  "spec": {
    "digest": "spec-1",
    "budget": {"steps_per_turn": 10},
    "mailbox": {"events_per_turn": 10, "remember_ids": 1000},
    "hibernate_after": "P1D",
    "tools": {"look": {"timeout": "PT1M", "repeatable": true, "attempts": 5}}
  },
  "paused": {"by": "ops", "reason": "a check"},
  "outbox": [
    {"topic": "agents.replies", "id": "agent/acme/desk/a/1/0", "type": "perennial.reply.v1",
     "source": "agent/acme/desk/a", "subject": "a", "time": "2026-01-02T03:04:05Z", "extensions": {"agent": "desk"},
     "data": {"text": "hello"}}
  ],
  "usage": {"input_tokens": 20, "output_tokens": 2},
  "model_calls": 2,
  "tool_calls": 1,
  "replies": 1,
  "failed_turns": 0,
  "recent": [{"at": "2026-01-02T03:04:05Z", "text": "a line"}]
}
"""
"""A state as the first release kept it, in the middle of a turn. It is never edited, only added to."""


def event(number: int) -> Event:
    return Event(id=f"e{number}", source="store", type="store.order")


def reply(text: str = "hello", outcome: TurnOutcome = TurnOutcome.COMPLETED, error: str | None = None) -> Reply:
    return Reply(id=f"{AGENT}/1/0", workflow_id=AGENT, turn=1, text=text, outcome=outcome, error=error)


def test_a_state_of_the_first_release_still_loads() -> None:
    """A snapshot lies in the ledger for years; every part of it is understood."""
    state = AgentState.model_validate_json(FIRST_RELEASE)
    assert (state.head, state.turn, state.replies, state.model_calls, state.tool_calls) == ("entry-1", 2, 1, 2, 1)
    assert [waiting.id for waiting in state.mailbox.waiting] == ["e2"]
    assert state.mailbox.turn_of("1a349002d3a7763f5d1ad3f6") == 1, "digests were longer then"
    assert state.current is not None
    assert (state.current.number, state.current.step, state.current.started) == (2, 2, NOW)
    assert [result.content for result in state.current.results] == ["seen"]
    assert state.spec is not None
    assert state.spec.hibernate_after == timedelta(days=1)
    assert state.spec.tools == {"look": ToolControl()}
    assert state.paused == Intervention(by="ops", reason="a check")
    assert state.outbox[0].data == {"text": "hello"}
    assert state.recent[0].text == "a line"


def test_a_state_without_any_field_is_that_of_a_new_agent() -> None:
    """Every field has a default, so whatever an older release did not know is missing without harm."""
    assert AgentState.model_validate_json("{}") == AgentState()
    assert AgentInput.model_validate_json("{}") == AgentInput()
    for name in AgentState.model_fields:
        kept = AgentState.model_validate_json(FIRST_RELEASE).model_dump(mode="json", exclude={name})
        assert getattr(AgentState.model_validate(kept), name) == getattr(AgentState(), name)


def test_fields_of_a_newer_release_are_ignored() -> None:
    """After a rollback the older release goes on with what it understands."""
    newer = """{"turn": 3, "memory_budget": 7, "mailbox": {"accepted": 4, "priority": []},
        "current": {"number": 3, "started": "2026-01-02T03:04:05Z", "approvals": [1]}, "paused": {"until": "noon"}}"""
    state = AgentState.model_validate_json(newer)
    assert (state.turn, state.mailbox.accepted, state.paused) == (3, 4, Intervention())
    snapshot = f'{{"workflow_id": "{AGENT}", "run_id": "r", "state": {newer}, "kept_by": "worker"}}'
    assert Snapshot.model_validate_json(snapshot).state == state


def test_nothing_is_lost_on_the_way_through_continue_as_new() -> None:
    """The state comes out as it went in, the order of what was seen included."""
    state = AgentState.model_validate_json(FIRST_RELEASE)
    again = AgentInput.model_validate_json(AgentInput(state=state).model_dump_json())
    assert again.state == state
    assert list(again.state.mailbox.seen) == list(state.mailbox.seen)


def test_a_turn_takes_mail_records_steps_and_ends() -> None:
    """What is new is shown to the model once; head, usage and counts grow with each step."""
    state = AgentState()
    state.mailbox.accept([event(1), event(2), event(3)], horizon=100)
    turn = state.begin_turn(NOW, limit=2)
    assert (turn.number, turn.step, state.current) == (1, 1, turn)
    assert turn.answers == [EventReference(source="store", id=f"e{n}", type="store.order") for n in (1, 2)]
    assert [shown.id for shown in turn.events] == ["e1", "e2"]
    assert state.mailbox.turn_of(event(1).digest) == 1

    used = Usage(input_tokens=10, output_tokens=1)
    state.record_step(turn, Decision(head="one", tool_calls=[ToolCall(id="c", name="look")], usage=used))
    assert (turn.events, turn.step, state.head) == ([], 2, "one")
    results = [ToolResult(call_id="c", name="look", content="seen")]
    state.record_tools(turn, results)
    assert (turn.results, turn.tool_calls, state.tool_calls) == (results, 1, 1)
    state.record_step(turn, Decision(head="two", text="hello", usage=used))
    assert (turn.results, turn.step, state.head) == ([], 3, "two")
    assert turn.usage == state.usage == Usage(input_tokens=20, output_tokens=2)

    state.end_turn(NOW, reply())
    assert state.current is None
    assert (state.replies, state.failed_turns, state.model_calls) == (1, 0, 2)
    assert state.begin_turn(NOW, limit=2).number == 2


def test_a_failed_turn_is_counted_and_its_reason_shown() -> None:
    """P13: an operator sees in the recent lines why there was no answer."""
    state = AgentState()
    state.begin_turn(NOW, limit=1)
    state.end_turn(NOW, reply("", TurnOutcome.FAILED, "400: no such model"))
    assert (state.replies, state.failed_turns) == (1, 1)
    assert state.recent[-1].text == "→ 400: no such model"


def test_recent_lines_are_few_and_short() -> None:
    """They are part of every snapshot and of the Web UI's details."""
    state = AgentState()
    for number in range(50):
        state.note(NOW, f"{number}\n  {'word ' * 100}")
    assert len(state.recent) == 10
    assert state.recent[-1].text.startswith("49 word word")
    assert state.recent[-1].text.endswith("…")
    assert all(len(item.text) == 160 for item in state.recent)


def test_the_state_says_in_words_what_the_agent_does() -> None:
    """P13: idle, about to work, working, paused, with who, why and how much waits."""
    state = AgentState()
    assert state.activity() == ("idle", "waiting for events")
    state.mailbox.accept([event(1), event(2)], horizon=100)
    assert state.activity() == ("working", "about to take 2 waiting events")
    state.paused = Intervention(by="ops", reason="a check")
    assert state.activity() == ("paused", "paused by ops: a check; 2 events wait")
    state.paused = Intervention()
    assert state.activity() == ("paused", "paused; 2 events wait")
    state.begin_turn(NOW, limit=1)
    assert state.activity() == ("working", "turn 1, step 1: store.order")


def test_status_tells_all_counts() -> None:
    """What `status` answers is what the state holds; for a new agent too."""
    state = AgentState.model_validate_json(FIRST_RELEASE)
    status = state.status(AGENT)
    assert status == Status(
        workflow_id=AGENT,
        state="working",
        doing="turn 2, step 2: store.order",
        turn=2,
        head="entry-1",
        waiting=1,
        accepted=2,
        duplicates=1,
        replies=1,
        failed_turns=0,
        model_calls=2,
        tool_calls=1,
        usage=Usage(input_tokens=20, output_tokens=2),
        spec_digest="spec-1",
        recent=state.recent,
    )
    assert AgentState().status(AGENT).spec_digest == ""
    assert AgentState(spec=ControlSpec(digest="d"), outbox=[_outgoing()]).status(AGENT).spec_digest == "d"


def _outgoing() -> Outgoing:
    return Outgoing(topic="t", id="i", type="y", source=AGENT, time=NOW)
