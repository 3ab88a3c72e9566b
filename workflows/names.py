"""Every string that outlives a release: workflow ids, reply ids, topics, queues, event types, handler names.

Each is built by one function here and, where anything reads it, taken apart by its inverse. Changing a literal in
this file breaks running agents; `tests/workflows/test_names.py` pins them.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import quote, unquote

WORKFLOW_TYPE = "AgentWorkflow"
ALARM_TYPE = "AlarmWorkflow"
OCCURRENCE_TYPE = "OccurrenceWorkflow"

# Signal, update and query names.
DELIVER = "deliver"
ASK = "ask"
PAUSE = "pause"
RESUME = "resume"
STOP = "stop"
STEER = "steer"
CANCEL_TURN = "cancel_turn"
REWIND = "rewind"
FORK = "fork"
LIFT_BUDGET = "lift_budget"
CHECK_BUDGET = "check_budget"
DECIDE = "decide"
COMPLETE = "complete"
STATUS = "status"
SET_ALARM = "set"
ANSWERED = "answered"

# Types of the errors with which updates are refused.
MOVING = "Moving"
"""Of an update that is to be made again at once."""
REFUSED = "Refused"
"""Of a rewind or fork that can't be: there is no such entry, or the agent has lived already."""
GONE_ON = "GoneOn"
"""Of a rewind of an agent whose head is no more the one that was to be left."""

NO_TURN = "NoTurn"
"""Of a `cancel_turn` of an agent that is in no turn."""
BUSY = "Busy"
"""Of an `ask` that the agent's spec rejects while a turn is in progress."""

NOT_OPEN = "NotOpen"
"""Of a decision or an answer for a call that waits for none."""
SETTLED = "Settled"
"""Of a decision or an answer for a call that has another one."""

# Topics (DESIGN.md, "Contracts that outlive a release").
EVENTS_TOPIC = "agents.events"
REPLIES_TOPIC = "agents.replies"
ACTIVITY_TOPIC = "agents.activity"
STREAM_TOPIC = "agents.stream"
DEAD_LETTER_TOPIC = "agents.events.dlq"

# Types of the events that Perennial itself produces.
REPLY_TYPE = "perennial.reply.v1"
STREAM_TYPE = "perennial.stream.v1"
TURN_COMPLETED_TYPE = "perennial.turn.completed.v1"
TURN_FAILED_TYPE = "perennial.turn.failed.v1"
TURN_CANCELLED_TYPE = "perennial.turn.cancelled.v1"
TURN_INTERRUPTED_TYPE = "perennial.turn.interrupted.v1"
DUPLICATE_TYPE = "perennial.event.duplicate.v1"
REJECTED_TYPE = "perennial.event.rejected.v1"
AGENT_PAUSED_TYPE = "perennial.agent.paused.v1"
AGENT_RESUMED_TYPE = "perennial.agent.resumed.v1"
AGENT_STOPPED_TYPE = "perennial.agent.stopped.v1"
AGENT_REWOUND_TYPE = "perennial.agent.rewound.v1"
AGENT_FORKED_TYPE = "perennial.agent.forked.v1"
BUDGET_EXCEEDED_TYPE = "perennial.budget.exceeded.v1"
BUDGET_LIFTED_TYPE = "perennial.budget.lifted.v1"
ASK_TYPE = "perennial.ask.v1"
STEER_TYPE = "perennial.steer.v1"
APPROVAL_REQUESTED_TYPE = "perennial.approval.requested.v1"
APPROVAL_REMINDER_TYPE = "perennial.approval.reminder.v1"
APPROVAL_DECIDED_TYPE = "perennial.approval.decided.v1"
TOOL_WAITING_TYPE = "perennial.tool.waiting.v1"
TOOL_COMPLETED_TYPE = "perennial.tool.completed.v1"
TOOL_UNKNOWN_TYPE = "perennial.tool.unknown.v1"
CALL_MISSED_TYPE = "perennial.call.missed.v1"
WAKE_TYPE = "perennial.wake.v1"
"""Of the event with which an agent wakes itself; its source is the agent."""

# Types of the events by which people and systems decide about calls and answer them, as the updates do.
DECIDE_TYPE = "perennial.approval.decide.v1"
COMPLETE_TYPE = "perennial.tool.complete.v1"

# Types and source of the events by which ingest and `perennial dlq` keep an agent's order (see `events.hold`).
HOLD_TYPE = "perennial.hold.v1"
RELEASE_TYPE = "perennial.release.v1"
HOLD_SOURCE = "perennial/dead-letters"

# Type and source of the events that come by a schedule.
SCHEDULE_TYPE = "perennial.schedule.v1"
SCHEDULE_SOURCE = "perennial/schedules"

# What an MCP server finds a call's idempotency key under, in the request's `_meta`.
IDEMPOTENCY_META = "perennial/idempotencyKey"

READ_RESULT = "read_result"
"""The tool by which an agent reads on in a result that was too long to be shown whole; transcripts name it."""

# The tools by which an agent wakes itself; transcripts name them.
WAKE_ME = "wake_me"
LIST_WAKE_UPS = "list_wake_ups"
CANCEL_WAKE_UP = "cancel_wake_up"

# Search attributes, so that the Web UI can filter agents.
TENANT_ATTRIBUTE = "PerennialTenant"
AGENT_ATTRIBUTE = "PerennialAgent"
STATE_ATTRIBUTE = "PerennialState"

OVER_BUDGET = "over budget"
"""In the search attribute: of an agent whose turn waits for its budget."""

_ID_PREFIX = "agent"
_TEAM_PREFIX = "team"
_SCHEDULE_PREFIX = "schedule"
_MAX_ID_BYTES = 1000  # Temporal's limit.maxIDLength


class Address(NamedTuple):
    """Whom an event is for: one agent of one tenant, at one key."""

    tenant: str
    agent: str
    key: str


def workflow_id(address: Address) -> str:
    """The workflow id of an agent: `agent/{tenant}/{agent}/{key}`, parts percent-encoded.

    Raises:
        ValueError: a part is empty, or the id would be longer than Temporal's 1,000 bytes.
    """
    for field, value in zip(address._fields, address, strict=True):
        if not value:
            raise ValueError(f"an agent's address needs a {field}; it is empty in {tuple(address)}")
    text = "/".join((_ID_PREFIX, *(quote(part, safe="") for part in address)))
    if len(text) > _MAX_ID_BYTES:
        raise ValueError(f"the workflow id would be {len(text)} bytes long; Temporal takes {_MAX_ID_BYTES}")
    return text


def parse_workflow_id(text: str) -> Address:
    """The address in a workflow id; the inverse of `workflow_id`.

    Raises:
        ValueError: the text is not an agent's workflow id.
    """
    parts = text.split("/")
    if len(parts) != 1 + len(Address._fields) or parts[0] != _ID_PREFIX or not all(parts):
        raise ValueError(f"{text!r} is not an agent's workflow id; expected agent/TENANT/AGENT/KEY")
    return Address(*(unquote(part) for part in parts[1:]))


def reply_id(agent: str, turn: int, number: int) -> str:
    """The id of a turn's n-th reply, n counted from 0: `{workflow id}/{turn}/{n}`."""
    return f"{agent}/{turn}/{number}"


def lifecycle_id(agent: str, turn: int, what: str) -> str:
    """The id of a lifecycle event; the same event, published again on a retry, has the same id."""
    return f"{agent}/{turn}/{what}"


def delta_id(agent: str, turn: int, step: int, attempt: int, sequence: int) -> str:
    """The id of a part of what a model said, as it said it."""
    return f"{agent}/{turn}/{step}/{attempt}/{sequence}"


def call_key(agent: str, turn: int, step: int, call: int | None = None) -> str:
    """The idempotency key of a model call, or of the n-th tool call a step asked for.

    It is sent on every retry of that call (DESIGN.md, P9).
    """
    key = f"{agent}/{turn}/{step}"
    return key if call is None else f"{key}/{call}"


def parse_call_key(text: str) -> tuple[str, int, int, int]:
    """The workflow id, turn, step and number in a tool call's key; the inverse of `call_key`.

    Raises:
        ValueError: the text is no tool call's key.
    """
    parts = text.split("/")
    agent, numbers = "/".join(parts[:-3]), parts[-3:]
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise ValueError(f"{text!r} is no call's id; expected agent/TENANT/AGENT/KEY/TURN/STEP/NUMBER")
    parse_workflow_id(agent)
    turn, step, call = map(int, numbers)
    return agent, turn, step, call


def wake_id(agent: str, wake_up: str) -> str:
    """The id of the event with which an agent wakes itself: it is the same however often it is told."""
    return f"{agent}/wake/{wake_up}"


def alarm_id(agent: str) -> str:
    """The workflow id of the alarm that wakes this agent while it hibernates: `alarm/{tenant}/{agent}/{key}`."""
    return f"alarm{agent.removeprefix(_ID_PREFIX)}"


class ScheduleId(NamedTuple):
    """Which schedule of which agent."""

    tenant: str
    agent: str
    name: str


def schedule_id(schedule: ScheduleId) -> str:
    """The id of a Temporal Schedule: `schedule/{tenant}/{agent}/{name}`, parts percent-encoded.

    Temporal makes the ids of its occurrences from it: `{schedule id}-{time}`.
    """
    return "/".join((_SCHEDULE_PREFIX, *(quote(part, safe="") for part in schedule)))


def parse_schedule_id(text: str) -> ScheduleId | None:
    """The parts of a schedule's id, the inverse of `schedule_id`; None if it is not one of ours."""
    parts = text.split("/")
    if len(parts) != 1 + len(ScheduleId._fields) or parts[0] != _SCHEDULE_PREFIX or not all(parts):
        return None
    return ScheduleId(*(unquote(part) for part in parts[1:]))


def is_occurrence_for(agent: str, source: str, event: str) -> bool:
    """Whether this event came to an agent by one of its own schedules; then its id is the occurrence's."""
    address = parse_workflow_id(agent)
    place = schedule_id(ScheduleId(address.tenant, address.agent, ""))
    return source == SCHEDULE_SOURCE and event.startswith(place)


def memory_place(address: Address, scope: str, team: str | None = None) -> str:
    """Where the facts of a scope are kept.

    Of `key`, `agent` and `tenant`: the workflow id, cut off behind that part. Of `team`: `team/{tenant}/{team}`, parts
    percent-encoded. Two agents share a place exactly if they share the tenant, and for `agent` the name, for `key` the
    name and the key, for `team` the team.

    Raises:
        ValueError: the scope is `team`, and the agent is in none.
    """
    if scope == "team":
        if not team:
            raise ValueError(f"{workflow_id(address)} is in no team")
        return "/".join((_TEAM_PREFIX, quote(address.tenant, safe=""), quote(team, safe="")))
    parts = {"tenant": 2, "agent": 3, "key": 4}[scope]
    return "/".join(workflow_id(address).split("/")[:parts])


def model_queue(task_queue: str) -> str:
    """The task queue of the model calls of agents that live on `task_queue`."""
    return f"{task_queue}.models"
