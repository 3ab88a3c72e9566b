"""Events in and replies out: CloudEvents 1.0 as pydantic models.

`Event` is what the mailbox takes; `Delivery` is the argument of the `deliver` signal; `Outgoing` is what the publish
activity puts on a topic. How they look on the wire (Kafka binding, structured and binary mode) is not known here.

Where an agent's spec says `order: strict`, a dead letter that may have been for it leaves a `hold` in its mailbox, in
the place of the event. What comes later waits behind it, until the event itself comes after all (it `fills` the hold),
or a `release` says that it never will.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from workflows import names

DIGEST_CHARACTERS = 24
"""Of an event's digest. Histories of before hold longer ones, which begin the same."""


class Event(BaseModel):
    """One CloudEvent addressed to an agent. Attributes as in CloudEvents 1.0; unknown extensions are kept."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(min_length=1)
    source: str = Field(min_length=1)
    type: str = Field(min_length=1)
    subject: str | None = None
    time: datetime | None = None
    datacontenttype: str | None = None
    data: JsonValue = None
    extensions: dict[str, str] = Field(default_factory=dict)
    """Extension attributes, as strings: tenant, agent, priority, traceparent and any other."""
    fills: str | None = None
    """Of a redriven dead letter: the digest of the hold whose place it takes."""

    @property
    def digest(self) -> str:
        """The event's identity, (source, id), in 24 characters: what an agent remembers of events it has seen."""
        return event_digest(self.source, self.id)

    @property
    def reference(self) -> EventReference:
        """The event without its data."""
        return EventReference(source=self.source, id=self.id, type=self.type)


def event_digest(source: str, event_id: str) -> str:
    """96 bits of the SHA-256 of (source, id), in hexadecimal; that pair is an event's identity (CloudEvents 1.0)."""
    return hashlib.sha256(json.dumps([source, event_id]).encode()).hexdigest()[:DIGEST_CHARACTERS]


def hold(origin: str, why: str) -> Event:
    """Keeps the place of a record that was dead-lettered.

    Args:
        origin: the record's place, TOPIC/PARTITION/OFFSET, which identifies the hold.
        why: the record could not be taken.
    """
    return Event(id=origin, source=names.HOLD_SOURCE, type=names.HOLD_TYPE, data={"why": why})


def release(origin: str, by: str, why: str) -> Event:
    """Ends the hold for this origin; it has the hold's digest."""
    return Event(id=origin, source=names.HOLD_SOURCE, type=names.RELEASE_TYPE, data={"by": by, "why": why})


def hold_digest(origin: str) -> str:
    """The digest of the hold for this origin."""
    return event_digest(names.HOLD_SOURCE, origin)


class EventReference(BaseModel):
    """The identity of an event, without its data."""

    model_config = ConfigDict(frozen=True)

    source: str
    id: str
    type: str = ""

    @property
    def digest(self) -> str:
        """As `Event.digest`."""
        return event_digest(self.source, self.id)


class Delivery(BaseModel):
    """Events for one agent, in the order of their partition; the argument of the `deliver` signal."""

    events: list[Event]


class Outgoing(BaseModel):
    """An event that Perennial produces, ready for a topic.

    The id is deterministic: published again on a retry, it is the same, and consumers drop the repetition.
    """

    topic: str
    id: str
    type: str
    source: str
    subject: str | None = None
    time: datetime
    extensions: dict[str, str] = Field(default_factory=dict)
    data: dict[str, JsonValue] = Field(default_factory=dict)
