"""The tool calls of a step of which some wait: for a human's decision, or for an answer from outside. Pure.

They are part of the agent's state, so that a call can wait for months: through restarts, deploys and new runs of the
workflow. `workflows.acting` runs them.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import BaseModel, Field

from workflows import names
from workflows.messages import OpenCall, Settlement, ToolCall, ToolResult, Waits

REMEMBERED = 50
_SHOWN_CHARACTERS = 1000


class CallError(ValueError):
    """A decision or an answer can't be taken; the message says why.

    Attributes:
        kind: the type of the error with which an update is refused.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Waiting(BaseModel):
    """A call that waits."""

    call: str
    tool: str
    arguments: str
    """Shortened."""
    waits_for: Waits
    since: datetime
    expires: datetime | None = None
    reminded: int = 0
    settlement: Settlement | None = None
    content: str = ""
    """The answer."""
    failed: bool = False
    """Whether the answer says what went wrong."""

    @property
    def report(self) -> OpenCall:
        """As people are told of it."""
        return OpenCall(
            call=self.call,
            tool=self.tool,
            arguments=self.arguments,
            waits_for=self.waits_for,
            since=self.since,
            expires=self.expires,
        )

    def wakes(self, reminds: timedelta | None) -> datetime | None:
        """When something is to be done about it, if nobody does anything: it expires, or its people are reminded."""
        reminder = self.since + reminds * (self.reminded + 1) if reminds else None
        return min((at for at in (self.expires, reminder) if at is not None), default=None)


class StepCalls(BaseModel):
    """The calls of a step of which some may wait."""

    step: int
    calls: list[ToolCall]
    results: dict[int, ToolResult] = Field(default_factory=dict)
    """By the number of the call, of those that have ended."""
    waiting: list[Waiting] = Field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether all have a result."""
        return len(self.results) == len(self.calls)

    @property
    def open(self) -> list[Waiting]:
        """Those that nobody has settled yet."""
        return [one for one in self.waiting if one.settlement is None]

    def find(self, call: str, waits_for: Waits) -> Waiting | None:
        """The call of this id that waits for this, or has waited for it and not ended yet."""
        return next((one for one in self.waiting if (one.call, one.waits_for) == (call, waits_for)), None)

    def wait(self, call: str, wanted: ToolCall, waits_for: Waits, now: datetime, within: timedelta | None) -> Waiting:
        """Let a call wait from now on."""
        waiting = Waiting(
            call=call,
            tool=wanted.name,
            arguments=shortened_arguments(wanted),
            waits_for=waits_for,
            since=now,
            expires=now + within if within else None,
        )
        self.waiting.append(waiting)
        return waiting

    def close(self, call: str, waits_for: Waits) -> None:
        """It waits no longer."""
        self.waiting = [one for one in self.waiting if (one.call, one.waits_for) != (call, waits_for)]


def settle(calls: StepCalls | None, past: list[Settlement], wanted: Settlement) -> Waiting | None:
    """Settle an open call; None if it is settled the same way already, by the same.

    Raises:
        CallError: nothing waits under this id, or it is settled otherwise.
    """
    found = calls.find(wanted.call, wanted.waits_for) if calls else None
    if found and found.settlement is None:
        found.settlement = wanted
        return found
    known = [*([found.settlement] if found and found.settlement else []), *past]
    earlier = next((one for one in known if (one.call, one.waits_for) == (wanted.call, wanted.waits_for)), None)
    if earlier is None:
        raise CallError(names.NOT_OPEN, f"No call {wanted.call} waits for {_what(wanted)} here.")
    if (earlier.approved, earlier.by) != (wanted.approved, wanted.by):
        raise CallError(names.SETTLED, f"Call {wanted.call} is settled already: it {told(earlier)}.")
    return None


def shortened_arguments(call: ToolCall) -> str:
    """A call's arguments, as people are told of them."""
    if len(call.arguments) <= _SHOWN_CHARACTERS:
        return call.arguments
    return call.arguments[: _SHOWN_CHARACTERS - 1] + "…"


def told(settlement: Settlement) -> str:
    """What a settlement says, in words."""
    verb = {True: "was approved", False: "was refused", None: "was answered"}[settlement.approved]
    why = f": {settlement.why}" if settlement.why else ""
    return f"{verb} by {settlement.by or 'somebody'} at {settlement.at:%Y-%m-%d %H:%M:%S}{why}"


def _what(wanted: Settlement) -> str:
    return "an answer" if wanted.waits_for is Waits.ANSWER else "a decision"
