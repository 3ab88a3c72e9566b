"""A step of a turn as it is recorded, and what was decided in it.

messages = new_messages(request)
entry = entry_of(request, [*messages, answer], usage=usage, answers=references(request))
return decision(entry)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

from activities.conversation import storable
from activities.entries import Entry, Message, RepairMessage, ToolMessage, UserMessage
from activities.forms import Form, Reading
from workflows import names
from workflows.budget import Cost
from workflows.events import Event, EventReference
from workflows.messages import CompactRequest, Decision, ThinkRequest, Usage


def entry_of(  # noqa: PLR0913  # what an entry says of its call
    request: ThinkRequest | CompactRequest,
    messages: list[Message],
    *,
    answers: Sequence[EventReference] = (),
    model: str = "",
    rehearsal: bool = False,
    usage: Usage = Usage(),  # noqa: B008  # it is frozen
    error: str | None = None,
) -> Entry:
    """What came of a step, as it is recorded."""
    return Entry(
        workflow_id=request.workflow_id,
        turn=request.turn,
        step=request.step,
        parent=request.head,
        messages=messages,
        answers=list(answers),
        spec_digest=request.spec_digest,
        model=model,
        rehearsal=rehearsal,
        usage=usage,
        error=error,
        recorded_at=datetime.now(UTC).isoformat(),
    )


def references(request: ThinkRequest) -> list[EventReference]:
    """The events that are new in a step."""
    return [event.reference for event in request.events]


def new_messages(request: ThinkRequest, reminder: list[Message] | None = None) -> list[Message]:
    """What is new in a step, as the model is shown it.

    The results it waited for, or what was wrong with its answer; the reminder; then the events.
    """
    results = (
        ToolMessage(
            call_id=storable(result.call_id),
            name=storable(result.name),
            content=storable(result.content),
            outcome=result.outcome,
        )
        for result in request.results
    )
    repair = [RepairMessage(text=storable(request.repair))] if request.repair else []
    return [
        *results,
        *repair,
        *(reminder or []),
        *(UserMessage(text=storable(render(event))) for event in request.events),
    ]


def render(event: Event) -> str:
    """An event as the model is shown it. A person's question stands for itself, and so do words to an agent at work."""
    if event.type == names.ASK_TYPE and isinstance(event.data, dict) and isinstance(event.data.get("text"), str):
        return str(event.data["text"])
    if event.type == names.STEER_TYPE and isinstance(event.data, dict) and isinstance(event.data.get("text"), str):
        return f"({event.source} says to you while you work:) {event.data['text']}"
    data = json.dumps(event.data, ensure_ascii=False, separators=(",", ":"))
    facts = [f"id {event.id}"]
    if event.subject:
        facts.append(f"subject {event.subject}")
    facts.append(f"from {event.source}")
    if event.time:
        facts.append(f"at {event.time.isoformat()}")
    return f"Event {event.type} ({', '.join(facts)})\n{data}"


def decision(entry: Entry, form: Form | None = None, cost: Cost = Cost()) -> Decision:  # noqa: B008  # it is frozen
    """What was decided in a recorded step, by an agent whose answers have to fit this form, and what it has cost."""
    answer = entry.answer
    final = answer is not None and not answer.tool_calls
    reading = form.read(answer.text) if form and answer and final else Reading()
    return Decision(
        head=entry.id,
        text=answer.text if answer else "",
        tool_calls=answer.tool_calls if answer else [],
        usage=entry.usage,
        model=entry.model,
        rehearsal=entry.rehearsal,
        error=entry.error,
        data=reading.data,
        faults=reading.faults,
        empty=form is None and answer is not None and final and not answer.text.strip(),
        cost=cost,
        given_up=entry.interruption is not None,
        summed_up=entry.summary is not None,
    )
