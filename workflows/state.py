"""The agent's small control state: one model for continue-as-new, the snapshot and the `status` query.

It never holds the conversation, only the ledger's newest entry (`head`). Every field has a default, so that a state
written by an older release still loads.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from workflows import names
from workflows.budget import Cost, Limit, Refusal
from workflows.calls import REMEMBERED, StepCalls, Waiting, told
from workflows.events import Event, EventReference, Outgoing
from workflows.mailbox import Mailbox
from workflows.messages import (
    Decision,
    Intervention,
    RecentItem,
    Reply,
    Rewound,
    Settlement,
    Status,
    ToolResult,
    TurnOutcome,
    Usage,
    Waits,
    WakeUp,
)
from workflows.quiet_hours import Hush, QuietHours
from workflows.repeats import Repeat
from workflows.spec import ControlSpec
from workflows.wake_ups import described, next_due

_CARRIED_BYTES = 1_500_000
_PUBLISH_BYTES = 512 * 1024
_RESULTS_BYTES = 512 * 1024
_RESULT_BYTES = 32 * 1024  # about 8,000 tokens; a longer result would crowd out the conversation
_RECENT = 10
_RECENT_CHARACTERS = 160


class CurrentTurn(BaseModel):
    """The turn in progress: enough to go on with it in the next run."""

    number: int
    started: datetime
    answers: list[EventReference] = Field(default_factory=list)
    step: int = 1
    """The next step to take, counted from 1."""
    events: list[Event] = Field(default_factory=list)
    """Events the model has not been shown yet."""
    results: list[ToolResult] = Field(default_factory=list)
    """Results of tool calls the model has not been shown yet."""
    repair: str = ""
    """What is wrong with the last answer, which the model has not been told yet; empty: nothing is."""
    repairs: int = 0
    """How often it was told so in this turn."""
    empty: int = 0
    """How often it was asked again in this turn, since it had answered with nothing."""
    interruptions: int = 0
    """How many of its steps were given up."""
    cancelled: Intervention | None = None
    """Who has cancelled it, and why; it is about to end."""
    acting: StepCalls | None = None
    """The tool calls of the step before, while some of them wait."""
    repeats: list[Repeat] = Field(default_factory=list)
    """The tool calls of the step before, to know them again."""
    not_repeated: int = 0
    """How many tool calls were not made, since they had been made again and again with the same result."""
    usage: Usage = Usage()
    tool_calls: int = 0
    cost: Cost = Cost()
    refused: Refusal | None = None
    """The limit of the budget that the next step waits for."""
    limits: tuple[Limit, ...] | None = None
    """Those of a newer spec, looked up while it waited; None: those of its own."""

    @property
    def why_cancelled(self) -> str:
        """Why the turn ends without an answer, in words; empty: it was not cancelled."""
        return f"The turn was cancelled{_by(self.cancelled)}" if self.cancelled else ""

    def activity(self) -> tuple[str, str]:
        """What the turn does, in a word or two and in a sentence."""
        if self.cancelled is not None:
            return "working", f"turn {self.number} is being cancelled{_by(self.cancelled)}"
        place = f"turn {self.number}, step {self.step}"
        if self.refused is not None:
            return names.OVER_BUDGET, f"over budget; {place} waits: {self.refused}"
        if self.acting and self.acting.open:
            return "waiting", f"turn {self.number}{_for(self.acting.open)}"
        kinds = ", ".join(sorted({reference.type for reference in self.answers}))
        return "working", f"{place}: {kinds}"


class AgentState(BaseModel):
    """What an agent knows of itself, besides what it has said and heard."""

    mailbox: Mailbox = Field(default_factory=Mailbox)
    head: str | None = None
    turn: int = 0
    """The number of the newest turn; it only ever grows, since entries are keyed by it."""
    current: CurrentTurn | None = None
    spec: ControlSpec | None = None
    paused: Intervention | None = None
    rewound: int = 0
    """The number of the newest rewind in the ledger that is taken in here."""
    stopping: Intervention | None = None
    """Asked to stop, and not closed yet; a snapshot never holds it, or the agent would wake up stopping."""
    outbox: list[Outgoing] = Field(default_factory=list)
    """Events decided on and not yet published."""
    settled: list[Settlement] = Field(default_factory=list)
    """Of calls that have waited, the newest."""
    wake_ups: list[WakeUp] = Field(default_factory=list)
    """When the agent wakes itself."""
    hush: Hush | None = None
    """Whether it was quiet when the agent last looked at the clock, and until when that stays so."""
    occurrences: list[str] = Field(default_factory=list)
    """Of schedules, which have been answered and are not told so yet."""
    usage: Usage = Usage()
    cost: Cost = Cost()
    model_calls: int = 0
    tool_calls: int = 0
    replies: int = 0
    failed_turns: int = 0
    recent: list[RecentItem] = Field(default_factory=list)

    def begin_turn(self, now: datetime, limit: int) -> CurrentTurn:
        """Take waiting events into a new turn."""
        self.turn += 1
        events = self.mailbox.take(self.turn, limit, self.quiet_at(now))
        references = [event.reference for event in events]
        self.current = CurrentTurn(number=self.turn, started=now, answers=references, events=events)
        for event in events:
            self.note(now, f"← {event.type} {event.id}")
        return self.current

    def record_step(self, turn: CurrentTurn, decision: Decision) -> None:
        """Note what a step decided: the new head, and what it cost."""
        self.record_call(turn, decision)
        turn.events = []
        turn.results = []
        turn.repair = ""

    def record_call(self, turn: CurrentTurn, decision: Decision) -> None:
        """Note the new head, and what a call cost, but not that the model was shown what is new in the turn."""
        self.head = decision.head
        self.usage += decision.usage
        self.model_calls += 1
        self.cost += decision.cost
        turn.usage += decision.usage
        turn.cost += decision.cost
        turn.step += 1

    def record_given_up(self, turn: CurrentTurn, decision: Decision) -> None:
        """Note that a step was closed without an answer; what was new in it is in the ledger."""
        self.head = decision.head
        turn.events = []
        turn.results = []
        turn.repair = ""
        turn.step += 1
        turn.interruptions += 1

    def join(self, now: datetime, turn: CurrentTurn, events: list[Event]) -> None:
        """Take events into the turn in progress."""
        turn.events += events
        turn.answers += [event.reference for event in events]
        for event in events:
            self.note(now, f"← {event.type} {event.id}, into turn {turn.number}")

    def record_tools(self, turn: CurrentTurn, results: list[ToolResult]) -> None:
        """Note the results of a step's tool calls, for the model to see in the next step."""
        turn.acting = None
        turn.results = shortened(results)
        turn.tool_calls += len(results)
        self.tool_calls += len(results)

    def end_turn(self, now: datetime, reply: Reply) -> None:
        """Note the turn's answer; the next turn may begin."""
        self.current = None
        self.replies += 1
        self.failed_turns += reply.outcome is TurnOutcome.FAILED
        self.note(now, f"→ {reply.text or reply.error}")

    def rewind(self, rewound: Rewound) -> None:
        """Go on behind another entry. Only the head changes: turns grow on, mail waits, what was seen stays seen."""
        self.head = rewound.head
        self.rewound = rewound.number

    def hush_at(self, now: datetime) -> Hush | None:
        """What the agent knows of its quiet hours now; None: it has none, or has to look at the clock."""
        hours = self.spec.quiet_hours if self.spec else None
        known = self.hush if self.hush and self.hush.hours == hours else None
        return known if known and now < known.until else None

    def quiet_at(self, now: datetime) -> QuietHours | None:
        """The quiet hours, if it is known to be quiet now."""
        hush = self.hush_at(now)
        return hush.hours if hush and hush.quiet else None

    @property
    def is_over_budget(self) -> bool:
        """Whether the turn in progress waits for the budget."""
        return self.current is not None and self.current.refused is not None

    @property
    def acting(self) -> StepCalls | None:
        """The tool calls of the step in progress, while some of them wait."""
        return self.current.acting if self.current else None

    @property
    def open_calls(self) -> list[Waiting]:
        """The tool calls that wait for people, or for an answer from outside."""
        return self.acting.open if self.acting else []

    def settle(self, waiting: Waiting, settlement: Settlement) -> None:
        """Remember what a call came to that has waited."""
        self.settled = [*self.settled, settlement][-REMEMBERED:]
        self.note(settlement.at, f"{waiting.tool} {told(settlement)}")

    @property
    def fits(self) -> bool:
        """Whether the state can be carried in one piece: Temporal refuses what has 2 MB."""
        acting = len(self.acting.model_dump_json().encode()) if self.acting else 0
        own = acting + sum(len(wake_up.model_dump_json().encode()) for wake_up in self.wake_ups)
        return self.mailbox.carried_bytes + sum(map(_size, self.outbox)) + own <= _CARRIED_BYTES

    def next_out(self) -> list[Outgoing]:
        """As many of the events decided on as can be published at once; at least one, if there is any."""
        total = 0
        for count, message in enumerate(self.outbox):
            total += _size(message)
            if count and total > _PUBLISH_BYTES:
                return self.outbox[:count]
        return list(self.outbox)

    def note(self, now: datetime, text: str) -> None:
        """Remember a line of the agent's recent life, shortened."""
        line = " ".join(text.split())
        if len(line) > _RECENT_CHARACTERS:
            line = line[: _RECENT_CHARACTERS - 1] + "…"
        self.recent = [*self.recent, RecentItem(at=now, text=line)][-_RECENT:]

    def activity(self) -> tuple[str, str]:
        """The agent's state in a word or two, and in a sentence: stopping, its turn's, paused, or its mail's."""
        if self.stopping is not None:
            return "stopping", f"stopping{_by(self.stopping)}; what is in hand is finished first{_for(self.open_calls)}"
        if self.current is not None:
            return self.current.activity()
        if self.paused is not None:
            return "paused", f"paused{_by(self.paused)}; {len(self.mailbox.waiting)} events wait"
        return self._mail()

    def _mail(self) -> tuple[str, str]:
        """What it does while it may take mail: held, quiet, working or idle."""
        if self.mailbox.held and not self.mailbox.ready:
            behind = len(self.mailbox.waiting) - 1
            return (
                "held",
                f"{behind} events wait behind the dead letter from {self.mailbox.held.id}: redrive or drop it",
            )
        if self.mailbox.waiting and self.hush and self.hush.quiet and not self.mailbox.is_ready(self.hush.hours):
            return "quiet", f"quiet until {self.hush.until:%Y-%m-%d %H:%M} UTC; {len(self.mailbox.waiting)} events wait"
        if self.mailbox.waiting:
            return "working", f"about to take {len(self.mailbox.waiting)} waiting events"
        first = next_due(self.wake_ups)
        return "idle", f"waiting for events; wakes itself {described(first)}" if first else "waiting for events"

    def status(self, workflow_id: str) -> Status:
        """The answer of the `status` query."""
        state, doing = self.activity()
        return Status(
            workflow_id=workflow_id,
            state=state,
            doing=doing,
            turn=self.turn,
            head=self.head,
            waiting=len(self.mailbox.waiting),
            accepted=self.mailbox.accepted,
            duplicates=self.mailbox.duplicates,
            rejected=self.mailbox.rejected,
            forgotten=self.mailbox.forgotten,
            held_by=self.mailbox.held.id if self.mailbox.held else None,
            replies=self.replies,
            failed_turns=self.failed_turns,
            model_calls=self.model_calls,
            tool_calls=self.tool_calls,
            usage=self.usage,
            cost=self.cost,
            refused=self.current.refused if self.current else None,
            spec_digest=self.spec.digest if self.spec else "",
            recent=self.recent,
            open_calls=[waiting.report for waiting in self.open_calls],
            wake_ups=self.wake_ups,
        )


class AgentInput(BaseModel):
    """The workflow's argument: empty when an agent is started, its state when it continues as new."""

    state: AgentState | None = None


class Snapshot(BaseModel):
    """An agent's state as it is kept when its workflow closes."""

    workflow_id: str
    run_id: str
    state: AgentState


def result_bytes(calls: int) -> int:
    """How long the result of each of a step's tool calls may be, so that all of them travel in one piece."""
    return min(_RESULT_BYTES, _RESULTS_BYTES // max(calls, 1))


def shortened(results: list[ToolResult], limit: int = _RESULTS_BYTES) -> list[ToolResult]:
    """The results of a step's tool calls, each cut to its share if all together have more than `limit` bytes.

    Results that keep to `result_bytes` are never cut; those of a worker of an older release may not.
    """
    if sum(len(result.content.encode()) for result in results) <= limit:
        return results
    share = limit // len(results)
    return [_cut(result, share) for result in results]


def _cut(result: ToolResult, share: int) -> ToolResult:
    raw = result.content.encode()
    if len(raw) <= share:
        return result
    text = raw[:share].decode(errors="ignore")
    left_out = len(result.content) - len(text)
    return result.model_copy(
        update={"content": f"{text}\n[shortened, since many tools were called at once: {left_out} more characters]"}
    )


def _size(message: Outgoing) -> int:
    return len(message.model_dump_json().encode())


def _for(waiting: list[Waiting]) -> str:
    """What these calls wait for, as the end of a sentence."""
    approvals = [one for one in waiting if one.waits_for is Waits.APPROVAL]
    answers = [one.tool for one in waiting if one.waits_for is Waits.ANSWER]
    told = ", ".join(f"{one.tool} {one.arguments} ({one.call})" for one in approvals)
    return (f"; waits for approval of {told}" if approvals else "") + (
        f"; waits for the answer to {', '.join(answers)}" if answers else ""
    )


def _by(intervention: Intervention) -> str:
    who = f" by {intervention.by}" if intervention.by else ""
    why = f": {intervention.reason}" if intervention.reason else ""
    return who + why
