"""A Kafka record as an event, and whom it is for, or the reason why not. Pure: values come back, whatever the bytes.

    decoded = decode(record, max_bytes=limit)           # Decoded or Rejected
    route = Routes(specs).route(decoded.event, topic)   # addresses, and what was wrong

CloudEvents 1.0, Kafka binding, structured and binary mode. The wire format is read here and not by the `cloudevents`
library (2.2): on reading, it invents an id, a time and a specversion that are missing (an event would get another
identity each time it is read), takes data that is not JSON for text without a word, raises on a record key that is not
UTF-8, and wants headers as a dict, so that a repeated header is silently dropped. For writing, it is right.

How data arrives in `Event.data`: JSON as JSON; text as text; anything else as `{"data_base64": "..."}`. Data without a
content type is taken for JSON if it is, else for text if it is.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import JsonValue, ValidationError
from pydantic_core import from_json

from workflows import names
from workflows.events import Event
from workflows.names import Address
from workflows.spec import AgentSpec, Subscription

Headers = tuple[tuple[str, bytes | None], ...]

_STRUCTURED = "application/cloudevents+json"
_ATTRIBUTES = frozenset(
    ("specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data", "data_base64")
)
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_RESERVED = (names.HOLD_TYPE, names.RELEASE_TYPE)
_MAX_DEPTH = 64  # pydantic reads JSON 200 deep; on its way data is wrapped a few times


class Reason(StrEnum):
    """Why a record is dead-lettered. A closed set: it labels a metric, and `perennial dlq` filters by it."""

    NO_VALUE = "no_value"
    TOO_LARGE = "too_large"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    UNSUPPORTED_MODE = "unsupported_mode"
    SPECVERSION = "specversion"
    MISSING_ATTRIBUTE = "missing_attribute"
    BAD_ATTRIBUTE = "bad_attribute"
    BAD_TIME = "bad_time"
    BAD_DATA = "bad_data"
    UNKNOWN_AGENT = "unknown_agent"
    NO_SUBSCRIBER = "no_subscriber"
    NO_KEY = "no_key"
    BAD_ADDRESS = "bad_address"
    REFUSED = "refused"
    """Temporal does not take it, however often it is asked."""


@dataclass(frozen=True)
class Record:
    """A record as it stands in Kafka."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    """Milliseconds since 1970 (UTC), as Kafka keeps it; -1 when there is none."""
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    @classmethod
    def of(cls, message: Any) -> Self:
        """The record in a message of aiokafka (a `ConsumerRecord`, which has no type hints)."""
        return cls(
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            timestamp=message.timestamp,
            key=message.key,
            value=message.value,
            headers=tuple(message.headers),
        )

    @property
    def size(self) -> int:
        """Bytes of key, value and headers."""
        headers = sum(len(name.encode()) + len(value or b"") for name, value in self.headers)
        return len(self.key or b"") + len(self.value or b"") + headers


@dataclass(frozen=True)
class Decoded:
    """An event, and its size in bytes as it travels in a Temporal signal."""

    event: Event
    size: int


@dataclass(frozen=True)
class Rejected:
    """What is wrong with a record; the message names the field."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Route:
    """Whom an event is for, and what was wrong with those it may have been for as well."""

    addresses: tuple[Address, ...] = ()
    rejected: Rejected | None = None


class _Fault(Exception):  # noqa: N818  # not an error of ours: it carries a `Rejected` to `decode`
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.rejected = Rejected(reason, message)


def decode(record: Record, *, max_bytes: int) -> Decoded | Rejected:
    """The event in a record.

    Args:
        record: as it was read.
        max_bytes: how large its value may be, and the event as it travels in a Temporal signal.
    """
    raw = len(record.value or b"")
    if raw > max_bytes:
        return Rejected(Reason.TOO_LARGE, f"the value has {raw} bytes; at most {max_bytes} are taken")
    try:
        event = _event(record)
    except _Fault as fault:
        return fault.rejected
    except ValidationError as error:
        # Not known to happen: the checks below are meant to be at least as strict as the model.
        return Rejected(Reason.BAD_ATTRIBUTE, f"not an event: {error.errors(include_url=False)}"[:1000])
    size = len(event.model_dump_json().encode())
    if size > max_bytes:
        return Rejected(Reason.TOO_LARGE, f"the event takes {size} bytes as JSON; at most {max_bytes} are taken")
    return Decoded(event, size)


def _event(record: Record) -> Event:
    headers = _headers(record.headers)
    content_type = headers.get("content-type")
    media_type = _media_type(content_type)
    binary = {name.removeprefix("ce_"): value for name, value in headers.items() if name.startswith("ce_")}
    if media_type == _STRUCTURED:
        return _structured(_envelope(record.value))
    if media_type.startswith("application/cloudevents"):
        raise _Fault(
            Reason.UNSUPPORTED_MODE,
            f"content-type {content_type!r}: only {_STRUCTURED} and binary mode (ce_ headers) are read",
        )
    if binary:
        kind = content_type if content_type is not None else binary.get("datacontenttype")
        # A null value is an event without data; without ce_ headers it would be a tombstone.
        return _build(binary, kind, _data(record.value or b"", kind))
    # Simple producers forget the header: an object with a specversion says what it is.
    envelope = _envelope(record.value)
    if "specversion" not in envelope:
        raise _Fault(
            Reason.MISSING_ATTRIBUTE,
            "not a CloudEvent: the value is an object without 'specversion', and there are no ce_ headers",
        )
    return _structured(envelope)


def _headers(headers: Headers) -> dict[str, str]:
    """The headers that matter, names in lower case."""
    found: dict[str, str] = {}
    for name, raw in headers:
        lower = name.lower()
        if raw is None or not (lower == "content-type" or lower.startswith("ce_")):
            continue
        try:
            value = raw.decode()
        except UnicodeDecodeError as error:
            raise _Fault(
                Reason.NOT_UTF8, f"header {name!r} is not UTF-8: {error.reason} at byte {error.start}"
            ) from error
        if found.setdefault(lower, value) != value:
            raise _Fault(Reason.BAD_ATTRIBUTE, f"header {name!r} occurs more than once, with different values")
    return found


def _envelope(value: bytes | None) -> dict[str, JsonValue]:
    if value is None:
        raise _Fault(Reason.NO_VALUE, "the record has no value (a tombstone) and no ce_ headers")
    envelope = _json(_text(value, "the value"), "the value")
    if not isinstance(envelope, dict):
        raise _Fault(Reason.NOT_AN_OBJECT, f"the value is JSON, but not an object: {reprlib.repr(envelope)}")
    return envelope


def _structured(envelope: dict[str, JsonValue]) -> Event:
    content_type = envelope.get("datacontenttype")
    if content_type is not None and not isinstance(content_type, str):
        raise _Fault(Reason.BAD_ATTRIBUTE, f"'datacontenttype' has to be a string, not {reprlib.repr(content_type)}")
    data = envelope.get("data")
    encoded = envelope.get("data_base64")
    if encoded is not None:
        if data is not None:
            raise _Fault(Reason.BAD_DATA, "the event has both 'data' and 'data_base64'; it may have one of them")
        data = _data(_base64(encoded), content_type)
    return _build(envelope, content_type, data)


def _build(attributes: Mapping[str, JsonValue], content_type: str | None, data: JsonValue) -> Event:
    version = attributes.get("specversion")
    if version is None:
        raise _Fault(Reason.MISSING_ATTRIBUTE, "'specversion' is missing; it has to be \"1.0\"")
    if version != "1.0":
        raise _Fault(Reason.SPECVERSION, f"'specversion' has to be the string \"1.0\", not {reprlib.repr(version)}")
    if attributes.get("type") in _RESERVED:
        raise _Fault(Reason.BAD_ATTRIBUTE, f"'type': {attributes['type']} is Perennial's own; choose another")
    return Event(
        id=_required(attributes, "id"),
        source=_required(attributes, "source"),
        type=_required(attributes, "type"),
        subject=_optional(attributes, "subject"),
        time=_time(_optional(attributes, "time")),
        datacontenttype=content_type,
        data=data,
        extensions={
            name: text
            for name, value in attributes.items()
            if name not in _ATTRIBUTES and (text := _extension(name, value)) is not None
        },
    )


def _required(attributes: Mapping[str, JsonValue], name: str) -> str:
    value = _optional(attributes, name)
    if not value:
        raise _Fault(
            Reason.MISSING_ATTRIBUTE, f"{name!r} is {'missing' if value is None else 'empty'}; every event needs it"
        )
    return value


def _optional(attributes: Mapping[str, JsonValue], name: str) -> str | None:
    value = attributes.get(name)
    if value is not None and not isinstance(value, str):
        raise _Fault(Reason.BAD_ATTRIBUTE, f"{name!r} has to be a string, not {reprlib.repr(value)}")
    return value


def _extension(name: str, value: JsonValue) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        raise _Fault(
            Reason.BAD_ATTRIBUTE,
            f"extension {name!r} has to be a string, number or boolean, not {reprlib.repr(value)}; put it into 'data'",
        )
    return None if value is None else str(value)


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    upper = text.upper()
    if _RFC3339.fullmatch(upper):
        try:
            return datetime.fromisoformat(upper)
        except ValueError:
            pass
    raise _Fault(
        Reason.BAD_TIME, f"'time' has to be a time like 2026-11-24T12:00:00Z (RFC 3339), not {reprlib.repr(text)}"
    )


def _data(raw: bytes, content_type: str | None) -> JsonValue:
    if not raw:
        return None
    kind = _media_type(content_type)
    if kind in {"application/json", "text/json"} or kind.endswith("+json"):
        return _json(_text(raw, "the data"), "the data")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return {"data_base64": base64.b64encode(raw).decode()}
    if content_type is None:
        try:
            return _json(text, "the data")
        except _Fault:
            pass
    return text


def _media_type(content_type: str | None) -> str:
    return (content_type or "").partition(";")[0].strip().lower()


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _Fault(Reason.NOT_UTF8, f"{what} is not UTF-8: {error.reason} at byte {error.start}") from error


def _json(text: str, what: str) -> JsonValue:
    """JSON by the parser that will read it in the agent; it refuses lone surrogates, NaN and 200 levels."""
    try:
        value: JsonValue = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise _Fault(Reason.NOT_JSON, f"{what} is not JSON: {error}") from error
    _check(value, what)
    return value


def _base64(encoded: JsonValue) -> bytes:
    try:
        if isinstance(encoded, str):
            return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise _Fault(Reason.BAD_DATA, f"'data_base64' has to be base64, not {reprlib.repr(encoded)}")


def _check(value: JsonValue, what: str) -> None:
    """Refuse what would not arrive as it was sent, or could not be read by all that handle it."""
    level: Iterable[JsonValue] = [value]
    for _ in range(_MAX_DEPTH):
        below: list[JsonValue] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise _Fault(Reason.BAD_DATA, f"{what} holds a number too large for a 64-bit float")
        if not below:
            return
        level = below
    raise _Fault(Reason.BAD_DATA, f"{what} is nested deeper than {_MAX_DEPTH} levels")


class Routes:
    """Which agents' specs want an event.

    An event on `agents.events` that names an `agent` (and a `tenant`, "default" if it does not) is for that one, at the
    key in its subject. Any other is for every agent with a subscription that wants it; of one agent's subscriptions to
    a topic the first that wants the event decides. An event that names a tenant is never for another tenant's agents.
    """

    def __init__(self, specs: Sequence[AgentSpec]) -> None:
        self._specs = {(spec.tenant, spec.name): spec for spec in specs}

    @property
    def topics(self) -> set[str]:
        """What to read: `agents.events`, and whatever the specs subscribe to."""
        return {names.EVENTS_TOPIC, *(sub.topic for spec in self._specs.values() for sub in spec.subscriptions)}

    def start(self, topic: str) -> Literal["earliest"] | datetime:
        """From where a topic is read that was never read before: where the first of its subscriptions starts."""
        subscribed = (sub for spec in self._specs.values() for sub in spec.subscriptions if sub.topic == topic)
        starts = [subscription.start for subscription in subscribed]
        times = [start for start in starts if isinstance(start, datetime)]
        return min(times) if times and len(times) == len(starts) and topic != names.EVENTS_TOPIC else "earliest"

    def is_strict(self, address: Address) -> bool:
        """Whether this agent's mail waits behind a dead letter."""
        spec = self._specs.get((address.tenant, address.agent))
        return spec is not None and spec.order == "strict"

    def held(self, record: Record, event: Event | None) -> list[Address]:
        """The agents whose order is strict, and for which a rejected record may have been; its key says which.

        Args:
            record: as it was read.
            event: what was read in it; None when it could not be decoded, and may have been for anybody.
        """
        try:
            key = (record.key or b"").decode()
        except UnicodeDecodeError:
            return []  # no agent's key
        reached = (
            {address[:2] for address in self.route(event, record.topic, record.timestamp).addresses} if event else set()
        )
        addresses = [
            Address(spec.tenant, spec.name, key)
            for spec in self._specs.values()
            if spec.order == "strict"
            and (spec.tenant, spec.name) not in reached
            and self._may_want(spec, event, record)
        ]
        return [address for address in addresses if not _address_fault(address)]

    @staticmethod
    def _may_want(spec: AgentSpec, event: Event | None, record: Record) -> bool:
        topic = record.topic
        if event is None:
            return topic in {names.EVENTS_TOPIC, *(subscription.topic for subscription in spec.subscriptions)}
        tenant, agent = event.extensions.get("tenant"), event.extensions.get("agent")
        if topic == names.EVENTS_TOPIC and agent:
            return (tenant or "default", agent) == (spec.tenant, spec.name)
        return tenant in {None, spec.tenant} and _first(spec.subscriptions, event, topic, record.timestamp) is not None

    def route(self, event: Event, topic: str, written_ms: int = -1) -> Route:
        """Whom an event on this topic is for; an empty route: nobody wants it, and that is in order.

        Args:
            event: as it was decoded.
            topic: where it stands.
            written_ms: when it was written, in milliseconds since 1970; -1: a subscription's start does not matter.
        """
        agent = event.extensions.get("agent")
        if topic == names.EVENTS_TOPIC and agent:
            return self._addressed(event, event.extensions.get("tenant") or "default", agent)
        route = _merge(self._subscribed(spec, event, topic, written_ms) for spec in self._specs.values())
        if topic == names.EVENTS_TOPIC and route == Route():
            return Route(
                rejected=Rejected(
                    Reason.NO_SUBSCRIBER,
                    f"no agent subscribes to events of type {event.type!r} on {topic}, and the event names no 'agent'",
                )
            )
        return route

    def _addressed(self, event: Event, tenant: str, agent: str) -> Route:
        if (tenant, agent) not in self._specs:
            known = ", ".join(sorted(name for of, name in self._specs if of == tenant)) or "none"
            return Route(
                rejected=Rejected(
                    Reason.UNKNOWN_AGENT, f"'agent': tenant {tenant!r} has no agent {agent!r}; it has: {known}"
                )
            )
        return _to(tenant, agent, event, "subject")

    def _subscribed(self, spec: AgentSpec, event: Event, topic: str, written_ms: int) -> Route:
        if event.extensions.get("tenant") not in {None, spec.tenant}:
            return Route()
        subscription = _first(spec.subscriptions, event, topic, written_ms)
        return _to(spec.tenant, spec.name, event, subscription.key) if subscription else Route()


def _first(
    subscriptions: Iterable[Subscription], event: Event, topic: str, written_ms: int = -1
) -> Subscription | None:
    return next((s for s in subscriptions if s.topic == topic and s.wants(event.type, written_ms)), None)


def _to(tenant: str, agent: str, event: Event, path: str) -> Route:
    key = _key(event, path)
    if key is None:
        message = f"{path!r} has to hold the key of agent {agent!r}, as text or an integer"
        return Route(rejected=Rejected(Reason.NO_KEY, message))
    address = Address(tenant, agent, key)
    if error := _address_fault(address):
        return Route(rejected=Rejected(Reason.BAD_ADDRESS, f"{path!r} is no key for agent {agent!r}: {error}"))
    return Route((address,))


def _address_fault(address: Address) -> str | None:
    try:
        names.workflow_id(address)
    except ValueError as error:
        return str(error)
    return None


def _key(event: Event, path: str) -> str | None:
    """The agent's key at a spec's `KeyPath`: `subject`, or a dotted path into the data."""
    if path == "subject":
        return event.subject or None
    value = event.data
    for part in path.split(".")[1:]:
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def _merge(routes: Iterable[Route]) -> Route:
    parts = list(routes)
    faults = [route.rejected for route in parts if route.rejected]
    return Route(
        addresses=tuple(address for route in parts for address in route.addresses),
        rejected=Rejected(faults[0].reason, "; ".join(fault.message for fault in faults)) if faults else None,
    )
