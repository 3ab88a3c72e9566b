"""Strings that outlive a release: each is taken apart by its inverse, and each literal is pinned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflows import names
from workflows.agent import AgentWorkflow
from workflows.names import Address

PARTS = st.text(min_size=1, max_size=20)
ADDRESSES = st.builds(Address, PARTS, PARTS, PARTS)

GOLDEN = {
    "WORKFLOW_TYPE": "AgentWorkflow",
    "ALARM_TYPE": "AlarmWorkflow",
    "SET_ALARM": "set",
    "OCCURRENCE_TYPE": "OccurrenceWorkflow",
    "ANSWERED": "answered",
    "SCHEDULE_TYPE": "perennial.schedule.v1",
    "SCHEDULE_SOURCE": "perennial/schedules",
    "WAKE_TYPE": "perennial.wake.v1",
    "WAKE_ME": "wake_me",
    "LIST_WAKE_UPS": "list_wake_ups",
    "CANCEL_WAKE_UP": "cancel_wake_up",
    "STREAM_TOPIC": "agents.stream",
    "STREAM_TYPE": "perennial.stream.v1",
    "MOVING": "Moving",
    "REFUSED": "Refused",
    "GONE_ON": "GoneOn",
    "REWIND": "rewind",
    "FORK": "fork",
    "LIFT_BUDGET": "lift_budget",
    "CHECK_BUDGET": "check_budget",
    "DECIDE": "decide",
    "COMPLETE": "complete",
    "NOT_OPEN": "NotOpen",
    "SETTLED": "Settled",
    "APPROVAL_REQUESTED_TYPE": "perennial.approval.requested.v1",
    "APPROVAL_REMINDER_TYPE": "perennial.approval.reminder.v1",
    "APPROVAL_DECIDED_TYPE": "perennial.approval.decided.v1",
    "TOOL_WAITING_TYPE": "perennial.tool.waiting.v1",
    "TOOL_COMPLETED_TYPE": "perennial.tool.completed.v1",
    "TOOL_UNKNOWN_TYPE": "perennial.tool.unknown.v1",
    "CALL_MISSED_TYPE": "perennial.call.missed.v1",
    "DECIDE_TYPE": "perennial.approval.decide.v1",
    "COMPLETE_TYPE": "perennial.tool.complete.v1",
    "IDEMPOTENCY_META": "perennial/idempotencyKey",
    "READ_RESULT": "read_result",
    "DELIVER": "deliver",
    "ASK": "ask",
    "PAUSE": "pause",
    "RESUME": "resume",
    "STOP": "stop",
    "STATUS": "status",
    "EVENTS_TOPIC": "agents.events",
    "REPLIES_TOPIC": "agents.replies",
    "ACTIVITY_TOPIC": "agents.activity",
    "DEAD_LETTER_TOPIC": "agents.events.dlq",
    "REPLY_TYPE": "perennial.reply.v1",
    "TURN_COMPLETED_TYPE": "perennial.turn.completed.v1",
    "TURN_FAILED_TYPE": "perennial.turn.failed.v1",
    "DUPLICATE_TYPE": "perennial.event.duplicate.v1",
    "AGENT_PAUSED_TYPE": "perennial.agent.paused.v1",
    "AGENT_RESUMED_TYPE": "perennial.agent.resumed.v1",
    "AGENT_STOPPED_TYPE": "perennial.agent.stopped.v1",
    "AGENT_REWOUND_TYPE": "perennial.agent.rewound.v1",
    "AGENT_FORKED_TYPE": "perennial.agent.forked.v1",
    "BUDGET_EXCEEDED_TYPE": "perennial.budget.exceeded.v1",
    "BUDGET_LIFTED_TYPE": "perennial.budget.lifted.v1",
    "OVER_BUDGET": "over budget",
    "ASK_TYPE": "perennial.ask.v1",
    "HOLD_TYPE": "perennial.hold.v1",
    "RELEASE_TYPE": "perennial.release.v1",
    "HOLD_SOURCE": "perennial/dead-letters",
    "TENANT_ATTRIBUTE": "PerennialTenant",
    "AGENT_ATTRIBUTE": "PerennialAgent",
    "STATE_ATTRIBUTE": "PerennialState",
    "STEER": "steer",
    "CANCEL_TURN": "cancel_turn",
    "NO_TURN": "NoTurn",
    "BUSY": "Busy",
    "TURN_CANCELLED_TYPE": "perennial.turn.cancelled.v1",
    "TURN_INTERRUPTED_TYPE": "perennial.turn.interrupted.v1",
    "REJECTED_TYPE": "perennial.event.rejected.v1",
    "STEER_TYPE": "perennial.steer.v1",
}


@given(address=ADDRESSES)
def test_a_workflow_id_says_its_address(address: Address) -> None:
    """parse(build(x)) == x, whatever the parts hold: slashes, percent signs, emoji, spaces."""
    assert names.parse_workflow_id(names.workflow_id(address)) == address


@given(address=ADDRESSES)
def test_a_workflow_id_is_printable_ascii_in_four_parts(address: Address) -> None:
    """It stands in URLs, in Kafka keys and in CloudEvents' `source` as it is."""
    text = names.workflow_id(address)
    assert text.isascii()
    assert text.isprintable()
    assert " " not in text
    assert text.count("/") == 3


@given(one=ADDRESSES, other=ADDRESSES)
def test_two_agents_never_share_a_workflow_id(one: Address, other: Address) -> None:
    """P1: mail for one is never taken by the other."""
    assert (names.workflow_id(one) == names.workflow_id(other)) == (one == other)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address("acme", "logistics", "order-42"), "agent/acme/logistics/order-42"),
        (Address("acme", "desk", "a/b c%"), "agent/acme/desk/a%2Fb%20c%25"),
        (Address("acme", "desk", "élan"), "agent/acme/desk/%C3%A9lan"),
    ],
)
def test_the_form_of_a_workflow_id_never_changes(address: Address, text: str) -> None:
    """Agents that run today are found under these ids for years."""
    assert names.workflow_id(address) == text
    assert names.parse_workflow_id(text) == address


def test_ids_of_what_an_agent_produces_never_change() -> None:
    """Consumers drop repetitions by these ids, and tools by these keys: also those made before a deploy."""
    agent = "agent/acme/logistics/order-42"
    assert names.reply_id(agent, 3, 0) == "agent/acme/logistics/order-42/3/0"
    assert names.lifecycle_id(agent, 3, "paused-1") == "agent/acme/logistics/order-42/3/paused-1"
    assert names.call_key(agent, 3, 2) == "agent/acme/logistics/order-42/3/2"
    assert names.call_key(agent, 3, 2, 0) == "agent/acme/logistics/order-42/3/2/0"
    assert names.delta_id(agent, 3, 2, 1, 7) == "agent/acme/logistics/order-42/3/2/1/7"
    assert names.wake_id(agent, "3-2-0") == "agent/acme/logistics/order-42/wake/3-2-0"
    assert names.alarm_id(agent) == "alarm/acme/logistics/order-42"
    schedule = names.ScheduleId("acme", "logistics", "a/b")
    assert names.schedule_id(schedule) == "schedule/acme/logistics/a%2Fb"
    assert names.model_queue("perennial") == "perennial.models"


@given(
    one=st.tuples(st.integers(0, 50), st.integers(0, 50), st.none() | st.integers(0, 50)),
    other=st.tuples(st.integers(0, 50), st.integers(0, 50), st.none() | st.integers(0, 50)),
)
def test_two_calls_never_share_a_key(one: tuple[int, int, int | None], other: tuple[int, int, int | None]) -> None:
    """P9: a key that two calls shared would suppress one of them."""
    agent = "agent/acme/logistics/order-42"
    assert (names.call_key(agent, *one) == names.call_key(agent, *other)) == (one == other)


def test_the_constants_never_change() -> None:
    """Every string constant is pinned; a new one has to be written down here too."""
    constants = {
        name: value
        for name, value in vars(names).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, str)
    }
    assert constants == GOLDEN


def test_the_workflow_answers_to_these_names() -> None:
    """The type, signal, updates and query that clients in any language call are those of this module."""
    definition = AgentWorkflow.__temporal_workflow_definition  # type: ignore[attr-defined]
    assert definition.name == names.WORKFLOW_TYPE
    assert set(definition.signals) == {names.DELIVER, names.CHECK_BUDGET}
    steering = {names.PAUSE, names.RESUME, names.STOP, names.REWIND, names.FORK, names.LIFT_BUDGET}
    in_a_turn = {names.STEER, names.CANCEL_TURN, names.DECIDE, names.COMPLETE}
    assert set(definition.updates) == {names.ASK, *steering, *in_a_turn}
    assert set(definition.queries) == {names.STATUS}


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        (Address("", "desk", "a"), "needs a tenant"),
        (Address("acme", "", "a"), "needs an? agent"),
        (Address("acme", "desk", ""), "needs a key"),
        (Address("acme", "desk", "x" * 1000), "1016 bytes long; Temporal takes 1000"),
        (Address("acme", "desk", "é" * 170), "1036 bytes long"),
    ],
)
def test_an_address_that_is_none_is_refused(address: Address, complaint: str) -> None:
    """P14: the error says which part is wrong."""
    with pytest.raises(ValueError, match=complaint):
        names.workflow_id(address)


@pytest.mark.parametrize(
    "text",
    ["", "order-42", "agent/acme/desk", "agent/acme/desk/", "agent//desk/a", "agent/a/b/c/d", "Agent/acme/desk/a"],
)
def test_a_workflow_id_of_something_else_is_refused(text: str) -> None:
    """P14: the error shows the text and the form that was expected."""
    with pytest.raises(ValueError, match="expected agent/TENANT/AGENT/KEY") as refused:
        names.parse_workflow_id(text)
    assert repr(text) in str(refused.value)


def test_where_facts_are_kept_never_changes() -> None:
    """They would be there and not be found."""
    address = Address("store", "customer-service", "a/b")
    assert names.memory_place(address, "tenant") == "agent/store"
    assert names.memory_place(address, "agent") == "agent/store/customer-service"
    assert names.memory_place(address, "key") == names.workflow_id(address) == "agent/store/customer-service/a%2Fb"
    assert names.memory_place(address, "team", "parcels") == "team/store/parcels"
    assert names.memory_place(address._replace(tenant="a/b"), "team", "c/d") == "team/a%2Fb/c%2Fd"


def test_an_agent_in_no_team_has_no_place_of_one() -> None:
    """P14: and the error says whose it would have been."""
    with pytest.raises(ValueError, match="agent/store/desk/a is in no team"):
        names.memory_place(Address("store", "desk", "a"), "team")


@given(ADDRESSES, st.integers(0, 10**6), st.integers(0, 1000), st.integers(0, 100))
def test_a_call_s_key_is_taken_apart_again(address: Address, turn: int, step: int, call: int) -> None:
    """Whoever decides about a call has its key alone."""
    agent = names.workflow_id(address)
    assert names.parse_call_key(names.call_key(agent, turn, step, call)) == (agent, turn, step, call)


@pytest.mark.parametrize("text", ["", "agent/a/b/c", "agent/a/b/c/1/2", "agent/a/b/c/1/2/x", "a/b/c/d/1/2/3"])
def test_what_is_no_call_s_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected agent/"):
        names.parse_call_key(text)


@given(PARTS, PARTS, PARTS)
def test_a_schedule_s_id_says_whose_it_is(tenant: str, agent: str, name: str) -> None:
    schedule = names.ScheduleId(tenant, agent, name)
    assert names.parse_schedule_id(names.schedule_id(schedule)) == schedule


@pytest.mark.parametrize("text", ["", "nightly", "schedule/a/b", "schedule/a/b/c/d", "schedule/a//c", "agent/a/b/c"])
def test_a_schedule_of_somebody_else_is_none_of_ours(text: str) -> None:
    assert names.parse_schedule_id(text) is None


def test_an_agent_knows_the_occurrences_of_its_schedules() -> None:
    """It lets no workflow end that is another's, whatever an event from outside says."""
    agent, occurrence = "agent/acme/desk/all", "schedule/acme/desk/nightly-2026-03-01T09:00:00Z"
    assert names.is_occurrence_for(agent, names.SCHEDULE_SOURCE, occurrence)
    assert not names.is_occurrence_for(agent, "somebody", occurrence)
    assert not names.is_occurrence_for(agent, names.SCHEDULE_SOURCE, "schedule/acme/desk-2/nightly-2026")
    assert not names.is_occurrence_for(agent, names.SCHEDULE_SOURCE, "agent/acme/desk/all")
