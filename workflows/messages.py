"""What activities take and give: the data that crosses the border between the workflow and the world.

Everything here is carried in workflow histories, so fields are only ever added, with defaults; unknown ones are
ignored. Conversations never pass through here: the workflow knows the ledger's newest entry (`head`), not its text.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from workflows.budget import Cost, Limit, Refusal
from workflows.events import Event, EventReference, Outgoing


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class Usage(_Message):
    """Tokens a model call used; names as in OpenTelemetry's GenAI conventions (gen_ai.usage.*)."""

    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """The sum of both."""
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
        )


class ToolCall(_Message):
    """A tool call the model asked for."""

    id: str
    """The model's id of the call, which its result must name."""
    name: str
    arguments: str = "{}"
    """JSON text, as the model wrote it: it may be wrong, and then the model is told."""


class ToolOutcome(StrEnum):
    """How a tool call ended."""

    OK = "ok"
    ERROR = "error"
    """The tool, or the check of its arguments, refused; the content says why."""
    UNKNOWN = "unknown"
    """The call may or may not have taken effect, and must not be repeated."""


class ToolResult(_Message):
    """What a tool call came to, as the model is shown it."""

    call_id: str
    name: str
    content: str
    outcome: ToolOutcome = ToolOutcome.OK


class ThinkRequest(_Message):
    """One model call: the context of `head`, plus what is new, to a decision."""

    workflow_id: str
    turn: int
    step: int
    head: str | None
    """The agent's newest entry, or None at the beginning of its life."""
    spec_digest: str
    events: list[Event] = Field(default_factory=list)
    results: list[ToolResult] = Field(default_factory=list)
    tools_allowed: bool = True
    """False in the last step a turn may take: the model has to answer."""
    may_compact: bool = False
    """Whether `Decision.compact` may be answered."""
    repair: str = ""
    """What is wrong with the answer of the step before, as the model is told it; empty: nothing is."""
    limits: tuple[Limit, ...] | None = None
    """What may be spent, if that has changed since the turn began; None: what its spec says."""


class CloseRequest(_Message):
    """A step whose model call was given up is to be closed: what was new in it is kept, and nobody answers it later."""

    step: ThinkRequest
    """The call that was given up."""
    why: str
    cancelled: bool = False
    """Whether the turn ends with it."""


class CompactRequest(_Message):
    """What would no longer fit is to be summed up: a step of its own."""

    workflow_id: str
    turn: int
    step: int
    head: str
    spec_digest: str
    limits: tuple[Limit, ...] | None = None
    """What may be spent, if that has changed since the turn began; None: what its spec says."""


class Decision(_Message):
    """What the model decided: to answer, to call tools, or both."""

    head: str
    """The entry that records this step."""
    text: str = ""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    usage: Usage = Usage()
    model: str = ""
    """The model that answered, as it names itself (gen_ai.response.model)."""
    rehearsal: bool = False
    """True when no real model answered but the rehearsal endpoint."""
    error: str | None = None
    """Why there is no answer: the request itself was refused, and no repetition would help."""
    compact: bool = False
    """The conversation has to be summed up first: no call was made, and nothing is recorded."""
    data: JsonValue = None
    """The answer as JSON, if the agent's spec has a schema for it and the answer fits."""
    faults: list[str] = Field(default_factory=list)
    """What is wrong with the answer, if it does not."""
    empty: bool = False
    """Whether the model has said nothing and called nothing."""
    cost: Cost = Cost()
    refused: Refusal | None = None
    """Why no call was made, and nothing recorded: it might have broken a limit of the budget."""
    given_up: bool = False
    """Whether the step was closed without an answer."""
    summed_up: bool = False
    """Whether what the step has recorded is a summary of the conversation."""


class ToolRequest(_Message):
    """One tool call to run."""

    workflow_id: str
    turn: int
    call: ToolCall
    spec_digest: str
    idempotency_key: str
    result_bytes: int = 32 * 1024
    """How long the result may be; the rest of a longer one is kept in the ledger, for the agent to read."""


class ReplyRequest(_Message):
    """Asks for the reply of a turn that has ended."""

    workflow_id: str
    turn: int


class SpecRequest(_Message):
    """Asks for the newest spec of an agent, if it is not the known one."""

    tenant: str
    agent: str
    known_digest: str = ""


class Waits(StrEnum):
    """What an open call waits for."""

    APPROVAL = "approval"
    """A human's decision; it is not made before."""
    ANSWER = "answer"
    """The answer from outside; it is made."""


class OpenCall(_Message):
    """A tool call that waits for people, or for an answer from outside."""

    call: str
    """Its id, which is its idempotency key."""
    tool: str
    arguments: str
    """JSON text, shortened if it is long."""
    waits_for: Waits
    since: datetime
    expires: datetime | None = None
    """When it waits no longer."""


class DecideRequest(_Message):
    """A human's decision about a call: what the `decide` update and a `perennial.approval.decide.v1` event carry."""

    call: str = Field(min_length=1)
    """The call's id."""
    approve: bool
    by: str = ""
    why: str = ""


class CompleteRequest(_Message):
    """An answer from outside to a call: what the `complete` update and a `perennial.tool.complete.v1` event carry."""

    call: str = Field(min_length=1)
    """The call's id."""
    content: str
    """What the model is shown."""
    failed: bool = False
    """Whether it says what went wrong."""
    by: str = ""


class Settlement(_Message):
    """What an open call came to: what the updates return, and part of the lifecycle events' data."""

    call: str
    waits_for: Waits
    approved: bool | None = None
    """None of an answer."""
    by: str = ""
    why: str = ""
    at: datetime


class Missed(_Message):
    """The data of the lifecycle events of a call whose outcome is unknown, and of words for one that is not open."""

    call: str
    why: str
    tool: str = ""
    arguments: str = ""
    """JSON text, shortened if it is long."""
    by: str = ""


class Approval(_Message):
    """A decision as it is kept in the ledger."""

    workflow_id: str
    turn: int
    call: str
    tool: str
    arguments: str
    """JSON text, as the model wrote it."""
    approved: bool
    by: str
    why: str
    asked_at: datetime
    decided_at: datetime


class ResultToKeep(_Message):
    """An answer from outside, to be kept whole and shortened for the model."""

    workflow_id: str
    content: str
    result_bytes: int


class TurnOutcome(StrEnum):
    """How a turn ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """By a person; the reply's error says by whom."""


class TurnSummary(_Message):
    """What a turn came to: the data of the `perennial.turn.*` lifecycle events."""

    agent: str
    turn: int
    outcome: TurnOutcome
    seconds: float
    """From the moment its events were taken until its answer was decided."""
    events: int = 0
    steps: int = 0
    tool_calls: int = 0
    usage: Usage = Usage()
    error: str | None = None
    cost: Cost = Cost()
    not_repeated: int = 0
    """Tool calls that were not made, since they had been made again and again with the same result."""


class Interrupted(_Message):
    """The data of `perennial.turn.interrupted.v1`: a model call was given up for these events."""

    turn: int
    step: int
    events: list[EventReference] = Field(default_factory=list)


class PublishRequest(_Message):
    """Replies and lifecycle events to put on their topics, in order."""

    messages: list[Outgoing]


class Reply(_Message):
    """An agent's answer: the data of a `perennial.reply.v1` event, and what `ask` returns."""

    id: str
    workflow_id: str
    turn: int
    text: str
    data: JsonValue = None
    """The answer as JSON, if the agent's spec has a schema for it (`reply`)."""
    outcome: TurnOutcome = TurnOutcome.COMPLETED
    error: str | None = None
    """Why there is no answer, when the turn failed."""
    answers: list[EventReference] = Field(default_factory=list)
    usage: Usage = Usage()
    steps: int = 0
    tool_calls: int = 0
    model: str = ""
    rehearsal: bool = False
    entry: str | None = None
    """The ledger entry that holds the answer."""
    cost: Cost = Cost()


class DeltaKind(StrEnum):
    """What a part of an answer, told while the model gives it, is."""

    START = "start"
    """The text begins anew."""
    TEXT = "text"
    """More of it."""
    TOOL_CALL = "tool_call"
    """A tool is called; the text is its name."""
    END = "end"
    """The answer is recorded: the text since the last start is all of it."""


class Delta(_Message):
    """A part of what a model says: the data of a `perennial.stream.v1` event."""

    turn: int
    step: int
    attempt: int
    """Which try of the call, from 1. What is of a lower one than was seen is to be dropped."""
    sequence: int
    """Within the attempt, from 0; a gap says that parts are missing, which a `start` that follows makes good."""
    kind: DeltaKind
    text: str = ""
    answers: list[EventReference] = Field(default_factory=list)
    """Of a start: the events that were new in this step."""

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where it belongs; parts of one agent come in growing order, but for those that are void."""
        return self.turn, self.step, self.attempt, self.sequence


class AskRequest(_Message):
    """A question from a person who waits for the answer: the argument of the `ask` update."""

    text: str = Field(min_length=1)
    id: str = ""
    """Names the question: asked again with the same id and source, it is not answered twice. Empty: a new one."""
    source: str = "perennial/ask"


class Intervention(_Message):
    """Who pauses, resumes or stops an agent or cancels its turn, and why; recorded with the change."""

    by: str = ""
    reason: str = ""
    drain: bool = False
    """Of a stop: whether the mail that waits is answered first."""


class SteerRequest(_Message):
    """A person's word to an agent at work: the argument of the `steer` update."""

    text: str = Field(min_length=1)
    interrupt: bool = False
    """Whether the model call in progress is cancelled, and made again with these words."""
    by: str = ""
    id: str = ""
    """Names the words: said again with the same id, they have no further effect. Empty: new ones."""


class RewindRequest(_Message):
    """Which entry an agent is to go on behind: the argument of the `rewind` and the `fork` update."""

    entry: str = Field(min_length=1)
    """A ledger entry's id, in full."""
    id: str = ""
    """Names the request: made again with the same id, it has no further effect. Empty: a new one."""
    by: str = ""
    reason: str = ""
    over: str | None = None
    """The head that is to be left; if the agent has gone on by then, it refuses. None: whichever it is."""


class RewindRecord(_Message):
    """A rewind to be recorded, before it takes effect."""

    workflow_id: str
    turn: int
    """The newest turn, which has ended."""
    head: str | None
    """The entry that is left."""
    known: int = 0
    """The number of the newest rewind that the agent has taken in."""
    fork: bool = False
    lived: bool = True
    """Whether the agent has heard or said anything yet; if so, it can be no fork."""
    request: RewindRequest


class MadeCall(_Message):
    """A tool call that was made on a branch that is left: rewinding does not undo it."""

    turn: int
    step: int
    name: str
    arguments: str
    """JSON text, shortened if it is long."""
    outcome: ToolOutcome
    """Unknown also when no result is recorded."""
    repeatable: bool | None = None
    """As the spec of then says; None when that had no such tool."""


class Rewound(_Message):
    """A rewind or fork that was made: what the updates return, and the data of the lifecycle events."""

    id: str
    workflow_id: str
    turn: int
    """The newest turn at that time; turns are numbered on from there."""
    head: str
    """The entry that the agent goes on behind."""
    head_turn: int
    head_step: int
    old_head: str | None = None
    """The entry that was left; None of a fork, which begins here."""
    by: str = ""
    reason: str = ""
    steps: int = 0
    """Entries that are left on their branch."""
    calls: list[MadeCall] = Field(default_factory=list)
    """Tool calls made on it, the first of them."""
    calls_total: int = 0
    recorded_at: str = ""
    """UTC, ISO 8601."""
    number: int = 0
    """Grows with every rewind in the ledger."""


class WakeUp(_Message):
    """When an agent wakes itself, and why: at a time, or when an event comes, whichever is first."""

    id: str
    """TURN-STEP-NUMBER of the call that set it."""
    note: str
    """What the agent has to remind itself of."""
    set_at: datetime
    due: datetime | None = None
    when: str = ""
    """The type of the event; `*` stands for any text. Empty: none."""


class Alarm(_Message):
    """When an agent that hibernates is to be woken: the argument of `AlarmWorkflow`, and of its signal."""

    workflow_id: str
    due: datetime


class Mail(_Message):
    """Events for an agent; none: it is only woken."""

    workflow_id: str
    events: list[Event] = Field(default_factory=list)


class Occurrence(_Message):
    """What a schedule brings to an agent, each time: the argument of `OccurrenceWorkflow`."""

    workflow_id: str
    """The agent's."""
    type: str
    data: dict[str, JsonValue] = Field(default_factory=dict)
    wait: timedelta = timedelta(days=1)
    """How long the agent's answer is waited for; zero: not at all."""
    when: str = ""
    """The schedule's times, in words."""
    written: str = ""
    """The digest of the schedule as its spec has it."""


class RecentItem(_Message):
    """A line of an agent's recent life, for the Web UI and `status`."""

    at: datetime
    text: str


class Status(_Message):
    """What the `status` query answers."""

    workflow_id: str
    doing: str
    """What the agent does now, in words."""
    state: str
    """idle, working, waiting, over budget, paused, held, quiet or stopping."""
    turn: int
    head: str | None
    waiting: int
    """Events accepted and not yet taken into a turn."""
    accepted: int
    duplicates: int
    rejected: int = 0
    """Events that came during a turn and were not taken, by the spec's `during_turn`."""
    forgotten: int = 0
    """Events beyond the de-duplication horizon (`mailbox.remember_ids`): sent again, they would be taken again."""
    held_by: str | None = None
    """The place (topic/partition/offset) of the dead letter that mail waits behind."""
    replies: int
    failed_turns: int
    model_calls: int
    tool_calls: int
    usage: Usage
    cost: Cost = Cost()
    refused: Refusal | None = None
    """The limit of the budget that the turn in progress waits for."""
    spec_digest: str
    recent: list[RecentItem]
    open_calls: list[OpenCall] = Field(default_factory=list)
    """Tool calls that wait for people, or for an answer from outside."""
    wake_ups: list[WakeUp] = Field(default_factory=list)
    """When it wakes itself."""
