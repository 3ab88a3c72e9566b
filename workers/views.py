"""How agents, events and replies look to people: models in, rich text out. Pure.

Colours say what kind of line it is; nothing is said by colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pydantic import ValidationError
from rich.text import Text

from activities.entries import (
    AssistantMessage,
    Entry,
    InterruptMessage,
    MemoryMessage,
    Message,
    RepairMessage,
    SummaryMessage,
    ToolMessage,
    UserMessage,
)
from workers.console import one_line, visible
from workflows import names
from workflows.budget import Cost, Lifted, LiftRequest, Measure, Per, Refusal, amount, usd
from workflows.events import Event, EventReference
from workflows.messages import (
    Approval,
    Interrupted,
    Intervention,
    Missed,
    OpenCall,
    Reply,
    Rewound,
    Settlement,
    Status,
    ToolOutcome,
    TurnOutcome,
    TurnSummary,
    Usage,
    Waits,
)
from workflows.wake_ups import described

if TYPE_CHECKING:  # they import Temporal's client, which `perennial tail` can do without
    from activities.memory import KeptFact
    from activities.spend import Account
    from activities.verify import Finding
    from workers.dlq import Letter
    from workers.doctor import Check
    from workers.handover import Counts
    from workers.history import Node, Plan, TreeReport, Verdict
    from workers.pins import Pinned
    from workers.report import AgentReport
    from workers.schedules import Listed

REHEARSAL_MARK = "[rehearsal]"

_STATE_STYLES = {
    "active": "green",
    "working": "green",
    "idle": "green",
    "asleep": "dim",
    "quiet": "dim",
    names.OVER_BUDGET: "yellow",
    "waiting": "yellow",
    "paused": "yellow",
    "held": "yellow",
    "stopped": "yellow",
    "stopping": "yellow",
    "failed": "bold red",
    "terminated": "red",
    "canceled": "red",
    "timed out": "red",
}
_KINDS = {
    names.REPLY_TYPE: ("reply", "green"),
    names.TURN_COMPLETED_TYPE: ("completed", "dim"),
    names.TURN_FAILED_TYPE: ("failed", "red"),
    names.TURN_CANCELLED_TYPE: ("cancelled", "yellow"),
    names.TURN_INTERRUPTED_TYPE: ("cut short", "yellow"),
    names.REJECTED_TYPE: ("rejected", "yellow"),
    names.DUPLICATE_TYPE: ("duplicate", "yellow"),
    names.AGENT_PAUSED_TYPE: ("paused", "magenta"),
    names.AGENT_RESUMED_TYPE: ("resumed", "magenta"),
    names.AGENT_STOPPED_TYPE: ("stopped", "magenta"),
    names.AGENT_REWOUND_TYPE: ("rewound", "magenta"),
    names.AGENT_FORKED_TYPE: ("forked", "magenta"),
    names.BUDGET_EXCEEDED_TYPE: ("budget", "yellow"),
    names.BUDGET_LIFTED_TYPE: ("lifted", "magenta"),
    names.APPROVAL_REQUESTED_TYPE: ("approval", "yellow"),
    names.APPROVAL_REMINDER_TYPE: ("reminder", "yellow"),
    names.APPROVAL_DECIDED_TYPE: ("decided", "magenta"),
    names.TOOL_WAITING_TYPE: ("waiting", "yellow"),
    names.TOOL_COMPLETED_TYPE: ("answered", "magenta"),
    names.TOOL_UNKNOWN_TYPE: ("unknown", "red"),
    names.CALL_MISSED_TYPE: ("not taken", "red"),
}
_KIND_WIDTH = max(len(word) for word, _ in _KINDS.values())
_ENTRY_DIGITS = 12
_LABEL_WIDTH = 9
_MARK_WIDTH = len("unclear")


def state(word: str) -> Text:
    """An agent's state, coloured."""
    return Text(word, _STATE_STYLES.get(word, ""))


def moment(at: datetime) -> str:
    """A time, in the person's own time zone."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def usage(used: Usage) -> str:
    """Tokens, in words."""
    return f"{used.input_tokens} tokens in, {used.output_tokens} out"


def money(cost: Cost) -> str:
    """What model calls have cost, in words; empty if they cost nothing."""
    unknown = f"{count(cost.unpriced, 'call')} of unknown price" if cost.unpriced else ""
    return " and ".join(part for part in (usd(cost.micro_usd) if cost.micro_usd else "", unknown) if part)


def count(number: int, noun: str) -> str:
    """A number of things: `1 step`, `2 steps`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def marked(text: str, *, rehearsal: bool) -> str:
    """An answer, marked when no real model gave it."""
    return text if not rehearsal or text.startswith(REHEARSAL_MARK) else f"{REHEARSAL_MARK} {text}"


# Replies and lifecycle --------------------------------------------------------------------------------------------


def reply(answer: Reply) -> Text:
    """What an agent said, in full."""
    return _with_mark(Text(visible(marked(answer.text, rehearsal=answer.rehearsal))))


def reply_cost(answer: Reply) -> Text:
    """What a reply took."""
    parts = [
        f"turn {answer.turn}",
        count(answer.steps, "step"),
        count(answer.tool_calls, "tool call") if answer.tool_calls else "",
        usage(answer.usage),
        money(answer.cost),
        answer.model,
    ]
    return Text(" · ".join(visible(part) for part in parts if part), "dim")


def event(happened: Event) -> Text:
    """A line of `perennial tail`: when, of what kind, who, and what."""
    at = (happened.time or datetime.now(UTC)).astimezone().strftime("%H:%M:%S")
    kind, style = _KINDS.get(happened.type, (happened.type, ""))
    failed = happened.type == names.TURN_FAILED_TYPE
    try:
        what = _what(happened)
    except ValidationError:
        what, failed = f"of a form not known here: {happened.data}", True
    line = Text.assemble(
        (at, "dim"),
        "  ",
        (visible(kind).ljust(_KIND_WIDTH), style),
        "  ",
        (visible(_who(happened)), "cyan"),
        "  ",
    )
    return line + _with_mark(Text(one_line(visible(what)), "red" if failed else ""))


def _who(happened: Event) -> str:
    extensions = happened.extensions
    return "/".join((extensions.get("tenant", "?"), extensions.get("agent", "?"), happened.subject or "?"))


def _what(happened: Event) -> str:
    """What happened, in words."""
    if happened.type == names.REPLY_TYPE:
        answer = Reply.model_validate(happened.data)
        if answer.outcome is not TurnOutcome.COMPLETED:
            return f"no answer: {answer.error or answer.text}"
        return marked(answer.text, rehearsal=answer.rehearsal)
    if happened.type in {names.TURN_COMPLETED_TYPE, names.TURN_FAILED_TYPE, names.TURN_CANCELLED_TYPE}:
        summary = TurnSummary.model_validate(happened.data)
        took = (
            f"turn {summary.turn} in {summary.seconds:.1f} s: {count(summary.events, 'event')}, "
            f"{count(summary.steps, 'step')}, {count(summary.tool_calls, 'tool call')}, {usage(summary.usage)}"
        )
        return f"{took}: {summary.error}" if summary.error else took
    if happened.type in {names.DUPLICATE_TYPE, names.REJECTED_TYPE}:
        reference = EventReference.model_validate(happened.data)
        why = ", which came during a turn" if happened.type == names.REJECTED_TYPE else ""
        return f"dropped {reference.type} {reference.id} of {reference.source}{why}"
    if happened.type == names.BUDGET_EXCEEDED_TYPE:
        return f"waits: {Refusal.model_validate(happened.data)}"
    return _steering(happened) or _about_calls(happened) or str(happened.data)


def _steering(happened: Event) -> str | None:
    """What a person did to the agent, if that is what happened."""
    if happened.type in {names.AGENT_REWOUND_TYPE, names.AGENT_FORKED_TYPE}:
        went = Rewound.model_validate(happened.data)
        return f"{_went(went)}, {_by(went.by, went.reason)}"
    if happened.type == names.TURN_INTERRUPTED_TYPE:
        given_up = Interrupted.model_validate(happened.data)
        came = ", ".join(f"{one.type} {one.id}" for one in given_up.events)
        return f"turn {given_up.turn}, step {given_up.step}, by {came}"
    if happened.type == names.BUDGET_LIFTED_TYPE:
        made = Lifted.model_validate(happened.data)
        return f"{allowed(made)}, {_by(made.by, made.reason)}"
    if happened.type in {names.AGENT_PAUSED_TYPE, names.AGENT_RESUMED_TYPE, names.AGENT_STOPPED_TYPE}:
        intervention = Intervention.model_validate(happened.data)
        return _by(intervention.by, intervention.reason)
    return None


def _about_calls(happened: Event) -> str | None:
    """What a tool call waits for, or has come to, if that is what happened."""
    if happened.type in {names.APPROVAL_REQUESTED_TYPE, names.APPROVAL_REMINDER_TYPE, names.TOOL_WAITING_TYPE}:
        call = OpenCall.model_validate(happened.data)
        until = f" until {moment(call.expires)}" if call.expires else ""
        wants = "a decision" if call.waits_for is Waits.APPROVAL else "its answer"
        return f"{call.tool} {call.arguments} waits for {wants}{until}: call {call.call}"
    if happened.type in {names.APPROVAL_DECIDED_TYPE, names.TOOL_COMPLETED_TYPE}:
        call, settlement = OpenCall.model_validate(happened.data), Settlement.model_validate(happened.data)
        return f"{call.tool} {call.arguments}: {_verb(settlement)} {_by(settlement.by, settlement.why)}"
    if happened.type == names.TOOL_UNKNOWN_TYPE:
        unknown = Missed.model_validate(happened.data)
        return f"{unknown.tool} {unknown.arguments}: {unknown.why} Call {unknown.call}"
    if happened.type == names.CALL_MISSED_TYPE:
        missed = Missed.model_validate(happened.data)
        return f"word from {missed.by or 'somebody'}: {missed.why}"
    return None


def _by(who: str, why: str) -> str:
    return f"by {who or 'somebody'}" + (f": {why}" if why else "")


def _with_mark(text: Text) -> Text:
    if text.plain.startswith(REHEARSAL_MARK):
        text.stylize("magenta", 0, len(REHEARSAL_MARK))
    return text


# Transcripts ------------------------------------------------------------------------------------------------------


def entry(recorded: Entry) -> Iterator[Text]:
    """The lines of one step: a heading, and what was said in it."""
    heading = [
        f"turn {recorded.turn}, step {recorded.step}",
        moment(datetime.fromisoformat(recorded.recorded_at)),
        recorded.model,
        usage(recorded.usage),
        f"entry {recorded.id[:_ENTRY_DIGITS]}",
    ]
    yield Text(" · ".join(visible(part) for part in heading if part), "bold")
    for message in recorded.messages:
        yield from _message(message, rehearsal=recorded.rehearsal)
    if recorded.error:
        yield _indented("error", recorded.error, "red")


def _halt(message: RepairMessage | InterruptMessage) -> str:
    """Why the turn did not go straight on, in a word or two."""
    if isinstance(message, RepairMessage):
        return "sent back"
    return "cancelled" if message.cancelled else "interrupted"


def _message(message: Message, *, rehearsal: bool) -> Iterator[Text]:
    match message:
        case UserMessage():
            yield _indented("event", message.text, "cyan")
        case RepairMessage() | InterruptMessage():
            yield _indented(_halt(message), message.text, "yellow")
        case MemoryMessage():
            for fact in message.facts:
                yield _indented("recalls", f"{fact.text} ({fact.scope}, {fact.id})", "magenta")
        case SummaryMessage(text=summary) if summary:
            yield _indented("sums up", summary, "magenta")
        case ToolMessage():
            yield _result(message)
        case AssistantMessage():
            if message.text:
                yield _indented("agent", marked(message.text, rehearsal=rehearsal), "green")
            for call in message.tool_calls:
                yield _indented("calls", f"{call.name} {call.arguments}", "blue")


def _result(message: ToolMessage) -> Text:
    fine = message.outcome is ToolOutcome.OK
    how = "" if fine else f"({message.outcome.value}) "
    return _indented(message.name, f"{how}{message.content}", "blue" if fine else "red")


def _indented(label: str, text: str, style: str) -> Text:
    """A labelled paragraph; its further lines stand below the first."""
    lines = visible(text.strip()).split("\n")
    return Text.assemble("  ", (visible(label), style), ": ", "\n    ".join(lines))


def pinned(found: Pinned) -> tuple[str, str, str, str, str, str]:
    """A row of `perennial pins`."""
    entry, pin = found.entry, found.pin
    lines = [line for message in entry.messages for line in _message(message, rehearsal=entry.rehearsal)]
    return (
        entry.id[:_ENTRY_DIGITS],
        f"{entry.turn}.{entry.step}",
        moment(datetime.fromisoformat(pin.pinned_at)),
        pin.by,
        one_line(pin.why),
        one_line(" ".join(line.plain.strip() for line in lines)),
    )


# Memory -----------------------------------------------------------------------------------------------------------


def kept_fact(found: KeptFact) -> tuple[str, str, str, str, str]:
    """A row of `perennial memory`."""
    fact, gone = found.fact, found.forgotten
    entry = f", entry {fact.entry[:_ENTRY_DIGITS]}" if fact.entry else ""
    notes = ["pinned"] if fact.pinned else []
    if gone:
        notes.append(f"forgotten {moment(datetime.fromisoformat(gone.at))} by {gone.by}: {gone.why}")
    return (
        fact.id,
        fact.scope.value,
        moment(datetime.fromisoformat(fact.kept_at)),
        f"{fact.workflow_id.partition('/')[2]}, turn {fact.turn}{entry}",
        one_line(f"{fact.text} ({'; '.join(notes)})" if notes else fact.text),
    )


# One agent --------------------------------------------------------------------------------------------------------


def report(told: AgentReport) -> Iterator[Text]:
    """`perennial show`: the agent, then what was said."""
    yield Text.assemble((visible(told.agent), "bold"), "  ", state(told.state))
    for label, value in _facts(told):
        yield Text.assemble("  ", (label.ljust(_LABEL_WIDTH), "dim"), visible(value))
    if told.status and told.status.open_calls:
        yield Text()
        for call in told.status.open_calls:
            yield from _waiting(call)
    if told.status and told.status.recent:
        yield Text()
        yield Text("recently", "bold")
        for item in told.status.recent:
            yield Text.assemble("  ", (moment(item.at), "dim"), "  ", visible(item.text))
    yield Text()
    if not told.transcript:
        yield Text("nothing said yet" if told.steps == 0 else "transcript not shown", "dim")
        return
    missing = told.steps - len(told.transcript)
    yield Text(f"transcript, {count(missing, 'earlier step')} not shown" if missing else "transcript", "bold")
    for recorded in told.transcript:
        yield from entry(recorded)


def _facts(told: AgentReport) -> Iterator[tuple[str, str]]:
    if told.status:
        status = told.status
        yield "now", status.doing if told.awake else told.state + (f" since {moment(told.since)}" if told.since else "")
        yield "waiting", count(status.waiting, "event")
        for wake_up in status.wake_ups:
            yield "wakes", f"{described(wake_up)}: {wake_up.note}"
        events = f"{count(status.accepted, 'event')} accepted, {count(status.duplicates, 'duplicate')} dropped"
        if status.forgotten:
            events += f", {status.forgotten} older than it remembers"
        yield "so far", f"{count(status.turn, 'turn')} ({status.failed_turns} failed), {events}"
        calls = f"{count(status.model_calls, 'model call')}, {count(status.tool_calls, 'tool call')}"
        yield "spent", ", ".join(part for part in (usage(status.usage), money(status.cost), calls) if part)
        if status.head:
            yield "head", f"entry {status.head}"
    if told.note:
        yield "note", told.note
    yield "Web UI", told.link


def steered(who: str, update: str, status: Status) -> Text:
    """What a person's hand on an agent came to."""
    waiting = count(status.waiting, "event")
    what = {
        names.PAUSE: f"is paused; {waiting} waiting, until `perennial resume`",
        names.RESUME: f"goes on: {status.doing}",
        names.STOP: "goes to sleep; its next event or question wakes it",
        names.STEER: f"has heard it: {status.doing}",
        names.CANCEL_TURN: f"gives up: {status.doing}",
    }[update]
    return Text.assemble((visible(who), "bold"), f" {visible(what)}")


# Calls that wait --------------------------------------------------------------------------------------------------


def _waiting(call: OpenCall) -> Iterator[Text]:
    """A call that an agent waits for, and the command that settles it."""
    is_approval = call.waits_for is Waits.APPROVAL
    wants = "decision" if is_approval else "answer"
    until = f", until {moment(call.expires)}" if call.expires else ""
    yield Text.assemble(
        (f"waits for {'a' if is_approval else 'an'} {wants} ", "bold yellow"),
        (visible(one_line(f"{call.tool} {call.arguments}")), "blue"),
        (f"  since {moment(call.since)}{until}", "dim"),
    )
    command = "approvals approve {} --reason ..." if is_approval else "tool complete {} TEXT"
    yield Text(f"  perennial {command.format(call.call)}")


def open_call(call: OpenCall) -> tuple[str, str, str, str]:
    """A row of `perennial approvals` and of `perennial tool list`."""
    until = moment(call.expires) if call.expires else ""
    return call.call, moment(call.since), until, one_line(f"{call.tool} {call.arguments}")


def decision(made: Approval) -> tuple[str, Text, str, str, str, str]:
    """A row of `perennial approvals --decided`."""
    word = Text("approved", "green") if made.approved else Text("refused", "red")
    what = one_line(f"{made.tool} {made.arguments}")
    return moment(made.decided_at), word, made.by or "somebody", one_line(made.why), what, made.call


def settled(made: Settlement) -> Text:
    """What a decision or an answer came to."""
    return Text.assemble((visible(made.call), "bold"), f" is {_verb(made)} {visible(_by(made.by, made.why))}")


def _verb(made: Settlement) -> str:
    return {True: "approved", False: "refused", None: "answered"}[made.approved]


# Budgets ----------------------------------------------------------------------------------------------------------

_WINDOWS = {Per.DAY: "today", Per.MONTH: "this month", Per.TOTAL: "ever"}


def account(found: Account) -> tuple[str, str, str, str, str, str, str]:
    """A row of `perennial budget show`: whose, when, what was spent of what may be, and what calls may take now."""
    spent, limit = found.spent, found.limit

    def of(measure: Measure) -> str:
        allowed = limit.of(measure) if limit else None
        number = spent.of(measure)
        shown = usd(number) if measure is Measure.USD else f"{number:,}"
        if allowed is None:
            return shown
        total = allowed + found.lifted.of(measure)
        return f"{shown} of {usd(total) if measure is Measure.USD else f'{total:,}'}"

    who = "/".join(map(unquote, found.place.split("/")[1:]))
    until = moment(found.until) if found.until else ""
    unknown = f"{spent.unpriced:,}" if spent.unpriced else ""
    return who, _WINDOWS[found.per], of(Measure.TOKENS), of(Measure.USD), of(Measure.TURNS), unknown, until


def schedule(found: Listed) -> tuple[str, ...]:
    """A row of `perennial schedules list`."""
    times = (moment(at) if at else "" for at in (found.next, found.last))
    return found.schedule, found.agent, found.when, found.state, *times, f"{found.taken:,}", f"{found.skipped:,}"


def lifted(who: str, made: Lifted) -> Text:
    """What `perennial budget lift` came to."""
    return Text.assemble((visible(who), "bold"), f" may spend {allowed(made)}")


def allowed(made: Lifted) -> str:
    """What a lift came to."""
    extra = LiftRequest(tokens=made.tokens, micro_usd=made.micro_usd, turns=made.turns).allows
    what = ", ".join(amount(number, of) for of in Measure if (number := extra.of(of)))
    until = f" until {moment(made.until)}" if made.until else ""
    return f"{what} more for the {made.scope.value} {_WINDOWS[made.per]}{until}"


# An agent's past --------------------------------------------------------------------------------------------------

_HEARD_CHARACTERS = 50
_SAID_CHARACTERS = 90


def plan(found: Plan) -> Iterator[Text]:
    """What a rewind would do: what it leaves, and which tool calls were made there."""
    place = f"entry {found.entry[:_ENTRY_DIGITS]} (turn {found.turn}, step {found.step})"
    left = f"{count(found.steps, 'step')} left on a branch"
    yield Text.assemble((visible(found.agent), "bold"), f" goes back to {place}: {left}")
    if not found.calls_total:
        return
    yield Text("Tool calls were made there; a rewind does not undo them:", "yellow")
    for call in found.calls:
        can = {True: "repeatable", False: "not repeatable", None: "no such tool"}[call.repeatable]
        what = one_line(visible(f"{call.name} {call.arguments}"))
        yield Text.assemble(
            (f"  turn {call.turn}, step {call.step}  ", "dim"),
            (what, "blue"),
            f"  {call.outcome.value}, ",
            (can, "" if call.repeatable else "yellow"),
        )
    if found.calls_total > len(found.calls):
        yield Text(f"  and {found.calls_total - len(found.calls)} more", "dim")


def rewound(who: str, made: Rewound) -> Text:
    """What a rewind or a fork came to."""
    return Text.assemble((visible(who), "bold"), f" {_went(made)}")


def _went(made: Rewound) -> str:
    place = f"entry {made.head[:_ENTRY_DIGITS]} (turn {made.head_turn}, step {made.head_step})"
    if made.old_head is None:
        return f"begins behind {place}"
    calls = f", with {count(made.calls_total, 'tool call')} that a rewind does not undo" if made.calls_total else ""
    left = f"{count(made.steps, 'step')} left at entry {made.old_head[:_ENTRY_DIGITS]}"
    return f"goes on behind {place}; {left}{calls}"


def tree(told: TreeReport) -> Iterator[Text]:
    """`perennial show --tree`: entries below each other, branches that were left beside them, the head marked."""
    origin = f", forked from {told.forked_from}" if told.forked_from else ""
    number = "1 entry" if told.entries == 1 else f"{told.entries} entries"
    yield Text.assemble((visible(told.agent), "bold"), f"  {number}{visible(origin)}")
    below: dict[str | None, list[Node]] = {}
    shown = {node.entry for node in told.nodes}
    for node in told.nodes:
        below.setdefault(node.parent if node.parent in shown else None, []).append(node)
    waiting = [(node, "", "") for node in reversed(below.get(None, []))]
    while waiting:
        node, first, rest = waiting.pop()
        if node.parent and node.parent not in shown:
            yield Text(f"{first}⋮ earlier entries are not shown", "dim")
        yield Text.assemble((first, "dim"), _node(node, told.agent))
        for note in _notes(node):
            yield Text.assemble((rest, "dim"), ("    ", ""), note)
        children = below.get(node.entry, [])
        main = next((child for child in children if child.live), children[-1] if children else None)
        if main:
            waiting.append((main, rest, rest))
        sides = [child for child in children if child is not main]
        waiting.extend((child, f"{rest}├─ ", f"{rest}│  ") for child in reversed(sides))


def _node(node: Node, agent: str) -> Text:
    heard = _cut(" + ".join(node.heard), _HEARD_CHARACTERS)
    said = node.error or marked(node.said, rehearsal=node.rehearsal) if node.error or node.said else ""
    answer = _cut(said or (f"calls {', '.join(node.calls)}" if node.calls else ""), _SAID_CHARACTERS)
    line = Text.assemble(
        ("● " if node.live else "○ ", "green" if node.live else "dim"),
        (f"turn {node.turn}, step {node.step} · {node.entry[:_ENTRY_DIGITS]}", "bold" if node.live else ""),
        f" · {visible(node.agent)}" if node.agent != agent else "",
        (f" · {heard}" if heard else "", "cyan"),
        (f" → {answer}", "red" if node.error else "green"),
    )
    return line + Text("  ← head", "bold magenta") if node.head else line


def _notes(node: Node) -> Iterator[Text]:
    for agent in node.forks:
        yield Text(f"fork: {visible(agent)} begins here", "magenta")
    for made in node.left:
        at = moment(datetime.fromisoformat(made.recorded_at))
        yield Text(f"left {at} {visible(_by(made.by, made.reason))}", "yellow")


def _cut(text: str, characters: int) -> str:
    line = one_line(visible(text))
    return line if len(line) <= characters else f"{line[: characters - 1]}…"


def finding(found: Finding) -> Text:
    """Something that is not what was recorded."""
    of = f" of {found.agent}" if found.agent else ""
    return Text.assemble((f"{found.kind} {visible(found.id)}", "bold red"), visible(f"{of}: {found.wrong}"))


def verdict(told: Verdict) -> str:
    """What `perennial verify` has looked at."""
    looked = ", ".join(f"{number} {table}" for table, number in told.read.items())
    return f"looked at {looked}: " + (
        "all as it was recorded" if not told.wrong else count(told.wrong, "fault") + " found"
    )


# Topics -----------------------------------------------------------------------------------------------------------


def replayed(counts: Counts) -> Iterator[Text]:
    """What `perennial ingest replay` has done."""
    lines = [
        ("records read", counts.read),
        ("handed over", counts.accepted),
        ("taken before", counts.known),
        ("for nobody", counts.skipped),
        ("not understood", counts.rejected),
    ]
    for label, number in lines:
        yield Text.assemble(("  " + label.ljust(16), "dim"), f"{number:>7}")


# Dead letters -----------------------------------------------------------------------------------------------------


def dead_letter(found: Letter) -> tuple[str, Text, str, str, str, str]:
    """A row of `perennial dlq list`."""
    origin = found.letter.original
    return (
        found.id,
        _letter_state(found),
        found.letter.reason,
        f"{origin.topic}/{origin.partition} at {origin.offset}",
        moment(found.letter.last_failed),
        one_line(found.letter.message),
    )


def dead_letter_whole(found: Letter) -> Iterator[Text]:
    """`perennial dlq show`."""
    dead, origin = found.letter, found.letter.original
    yield Text.assemble("dead letter ", (found.id, "bold"), "  ", _letter_state(found))
    facts = [
        ("why", f"{dead.reason}: {dead.message}"),
        ("from", f"{origin.topic}, partition {origin.partition}, offset {origin.offset}"),
        ("written", moment(datetime.fromtimestamp(max(origin.timestamp, 0) / 1000, UTC))),
        (
            "failed",
            f"{moment(dead.first_failed)} first, {moment(dead.last_failed)} last; {count(dead.attempts, 'attempt')}",
        ),
        ("group", dead.group),
    ]
    if done := found.resolution:
        why = f": {done.why}" if done.why else ""
        facts.append(("done", f"{done.state.value} by {done.by or 'somebody'} {moment(done.at)}{why}"))
    if dead.held:
        facts.append(("held", f"{', '.join(dead.held)}: later mail waits until this is redriven or dropped"))
    facts.append(("key", _readable(origin.key)))
    facts += [("header", f"{name}: {_readable(value)}") for name, value in origin.headers]
    for label, value in facts:
        yield Text.assemble("  ", (label.ljust(_LABEL_WIDTH), "dim"), visible(value))
    yield _indented("value", _readable(origin.value), "cyan")


def _letter_state(found: Letter) -> Text:
    styles = {"open": "yellow", "redriven": "green", "dropped": "dim"}
    return Text(found.state.value, styles[found.state.value])


def _readable(raw: bytes | None) -> str:
    """Bytes as text; what is no UTF-8 is written as escapes."""
    return "(none)" if raw is None else raw.decode(errors="backslashreplace")


# The doctor -------------------------------------------------------------------------------------------------------


def checks(looked_at: Sequence[Check]) -> Iterator[Text]:
    """`perennial doctor`: a line for each thing looked at, and below it what to do."""
    width = max((len(looked.what) for looked in looked_at), default=0)
    margin = " " * (_MARK_WIDTH + width + 4)
    for looked in looked_at:
        mark, style = _mark(looked)
        found = visible(looked.found.strip()).replace("\n", f"\n{margin}")
        yield Text.assemble((mark.ljust(_MARK_WIDTH), style), "  ", (looked.what.ljust(width), "bold"), "  ", found)
        if looked.remedy:
            yield Text.assemble(margin, ("→ ", style), visible(looked.remedy))


def _mark(looked: Check) -> tuple[str, str]:
    if looked.ok:
        return "ok", "green"
    return ("not ok", "bold red") if looked.needed else ("unclear", "yellow")
