"""Wake-ups: how an agent sets a timer for itself, with a note on what it is for. Pure.

The model calls `wake_me`, `list_wake_ups` and `cancel_wake_up`; what it has set is part of the agent's state, so that
it goes through continue-as-new and into the snapshot. The workflow runs these tools itself: nothing of them can fail
half-way. When one is due, or the event has come that it waits for, it becomes an event in the agent's mailbox, once.

    wake_ups, said = use(ToolCall(...), "3-1-0", wake_ups, at_most=20, now=now)
    ringing, left = due(wake_ups, now, fresh_events)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Annotated, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from workflows import names
from workflows.durations import duration
from workflows.events import Event
from workflows.messages import ToolCall, WakeUp
from workflows.spec import ToolDefinition

LONGEST = timedelta(days=5 * 366)
_SOONEST = timedelta(seconds=1)
_NOTE_CHARACTERS = 1000
_UNSEEN = (names.WAKE_TYPE, names.HOLD_TYPE, names.RELEASE_TYPE)
"""No event of these types wakes an agent by its type: they are its own, or tell of no event at all."""


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WakeMe(_Arguments):
    """What the model says to be woken."""

    note: str = Field(
        min_length=1,
        max_length=_NOTE_CHARACTERS,
        description="What you want to be told then: why you wake, and what you meant to do.",
    )
    at: AwareDatetime | None = Field(
        None, description="When, as ISO 8601 with the offset from UTC: 2026-03-01T09:00:00+01:00."
    )
    in_: float | str | None = Field(
        None, alias="in", description='Or in how long: "3 days", "1 h 30 min", "2 weeks"; a bare number is seconds.'
    )
    when: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = Field(
        None,
        description=(
            "Or when an event of this type comes for you, such as store.parcel.delivered; * stands for any text. "
            "With a time as well: whichever is first."
        ),
    )


class ListWakeUps(_Arguments):
    """Nothing need be said to see the wake-ups."""


class CancelWakeUp(_Arguments):
    """Which wake-up is not wanted any more."""

    id: str = Field(description="Its id, as wake_me and list_wake_ups tell it.")


class Ringing(NamedTuple):
    """A wake-up that is due."""

    wake_up: WakeUp
    because: Event | None
    """The event that it waited for; None: it is its time."""

    def event(self, agent: str, now: datetime) -> Event:
        """What the agent finds in its mailbox."""
        wake_up = self.wake_up
        late = max(now - wake_up.due, timedelta(0)) if wake_up.due and not self.because else None
        told = {
            "note": wake_up.note,
            "set_at": shown(wake_up.set_at),
            "due": shown(wake_up.due) if wake_up.due else None,
            "late_seconds": int(late.total_seconds()) if late is not None else None,
            "when": wake_up.when or None,
            "event": _reference(self.because) if self.because else None,
        }
        return Event(
            id=names.wake_id(agent, wake_up.id),
            source=agent,
            type=names.WAKE_TYPE,
            subject=names.parse_workflow_id(agent).key,
            time=now,
            data={name: value for name, value in told.items() if value is not None},
        )


def definitions() -> list[ToolDefinition]:
    """The tools, as the model is told of them."""
    return [
        ToolDefinition(
            name=name, description=description, parameters=arguments.model_json_schema(by_alias=True), built_in=True
        )
        for name, (description, arguments, _) in _TOOLS.items()
    ]


def use(
    call: ToolCall, key: str, wake_ups: Sequence[WakeUp], *, at_most: int, now: datetime
) -> tuple[list[WakeUp], str]:
    """Run one of the tools: the wake-ups that are set from now on, and what the model is told.

    A call that is made again, with the same key, has no further effect.

    Raises:
        ValueError: the arguments are wrong, or too many are set; the message is for the model.
    """
    _, kind, run = _TOOLS[call.name]
    try:
        arguments = kind.model_validate_json(call.arguments or "{}")
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError(f"Wrong arguments: {faults}. It is {shown(now)}.") from None
    return run(arguments, key, list(wake_ups), at_most, now)


def due(wake_ups: Sequence[WakeUp], now: datetime, fresh: Sequence[Event]) -> tuple[list[Ringing], list[WakeUp]]:
    """The wake-ups whose time or event has come, in the order of their times, and those that are left."""
    ringing, left = [], []
    for wake_up in wake_ups:
        because = next((event for event in fresh if _waits_for(wake_up, event)), None)
        if because or (wake_up.due and wake_up.due <= now):
            ringing.append(Ringing(wake_up, because))
        else:
            left.append(wake_up)
    return sorted(ringing, key=lambda one: one.wake_up.due or now), left


def next_due(wake_ups: Sequence[WakeUp]) -> WakeUp | None:
    """The one whose time comes first; None if none waits for a time."""
    timed = [(wake_up.due, place, wake_up) for place, wake_up in enumerate(wake_ups) if wake_up.due]
    return min(timed)[-1] if timed else None


def shown(at: datetime) -> str:
    """A time as the model is told it, and can give it back."""
    return at.astimezone(UTC).isoformat(timespec="seconds")


def described(wake_up: WakeUp) -> str:
    """A wake-up in words."""
    at = f"at {shown(wake_up.due)}" if wake_up.due else ""
    event = f"when {wake_up.when} comes" if wake_up.when else ""
    return f"{event}, or {at} at the latest" if at and event else at or event


def _set(arguments: _Arguments, key: str, known: list[WakeUp], at_most: int, now: datetime) -> tuple[list[WakeUp], str]:
    assert isinstance(arguments, WakeMe), "the table says so"
    others = [wake_up for wake_up in known if wake_up.id != key]
    if len(others) >= at_most:
        raise ValueError(f"Not set: {len(others)} wake-ups are set already, and no more may be. Cancel one first.")
    wake_up = WakeUp(
        id=key, note=arguments.note, set_at=now, due=_time(arguments, now), when=(arguments.when or "").strip()
    )
    if not wake_up.due and not wake_up.when:
        raise ValueError(f"Not set: say at what time, in how long, or when which event comes. It is {shown(now)}.")
    return [*others, wake_up], f"Set: you are woken {described(wake_up)}. Its id is {key}. It is {shown(now)} now."


def _time(arguments: WakeMe, now: datetime) -> datetime | None:
    if arguments.at is not None and arguments.in_ is not None:
        raise ValueError("Not set: give either at or in, not both.")
    if arguments.at is None and arguments.in_ is None:
        return None
    try:
        due = arguments.at.astimezone(UTC) if arguments.at else now + duration(str(arguments.in_))
    except OverflowError:
        raise ValueError(f"Not set: that is too far away. It is {shown(now)}.") from None
    if due < now + _SOONEST:
        raise ValueError(f"Not set: {shown(due)} is not in the future. It is {shown(now)}.")
    if due > now + LONGEST:
        raise ValueError(f"Not set: {shown(due)} is more than {LONGEST.days} days away. It is {shown(now)}.")
    return due


def _list(_: _Arguments, __: str, known: list[WakeUp], ___: int, now: datetime) -> tuple[list[WakeUp], str]:
    lines = [f"{wake_up.id}: {described(wake_up)}. Note: {wake_up.note}" for wake_up in known]
    return known, "\n".join([f"It is {shown(now)}. Wake-ups set: {len(known)}.", *lines])


def _cancel(arguments: _Arguments, _: str, known: list[WakeUp], __: int, now: datetime) -> tuple[list[WakeUp], str]:
    assert isinstance(arguments, CancelWakeUp), "the table says so"
    left = [wake_up for wake_up in known if wake_up.id != arguments.id]
    if len(left) == len(known):
        ids = ", ".join(wake_up.id for wake_up in known) or "none"
        raise ValueError(f"No wake-up {arguments.id!r} is set, or it has woken you already. Set are: {ids}.")
    return left, f"Cancelled. Wake-ups set: {len(left)}. It is {shown(now)}."


def _waits_for(wake_up: WakeUp, event: Event) -> bool:
    return bool(wake_up.when) and event.type not in _UNSEEN and fnmatchcase(event.type, wake_up.when)


def _reference(event: Event) -> dict[str, str]:
    return event.reference.model_dump()


_Run = Callable[[_Arguments, str, list[WakeUp], int, datetime], tuple[list[WakeUp], str]]
_TOOLS: dict[str, tuple[str, type[_Arguments], _Run]] = {
    names.WAKE_ME: (
        (
            "Have yourself woken later, at a time or when an event comes, with a note from yourself. Use it for what "
            "you have promised or have to check again; end your turn meanwhile. You are woken with the note."
        ),
        WakeMe,
        _set,
    ),
    names.LIST_WAKE_UPS: ("See which wake-ups you have set, and what time it is now.", ListWakeUps, _list),
    names.CANCEL_WAKE_UP: ("Cancel a wake-up that is not needed any more.", CancelWakeUp, _cancel),
}
