"""From records to events and addresses: what is understood, what is rejected and why, and that nothing ever raises."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from workers.deadletter import DeadLetter
from workers.records import Decoded, Headers, Reason, Record, Rejected, Route, Routes, decode
from workflows import names
from workflows.events import Delivery, Event
from workflows.names import Address
from workflows.spec import AgentSpec, Subscription

LIMIT = 256 * 1024
MINIMAL = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}


def record(value: bytes | None, *headers: tuple[str, bytes | None], key: bytes | None = None) -> Record:
    return Record(names.EVENTS_TOPIC, 0, 0, 0, key, value, headers)


def structured(**attributes: object) -> Record:
    return record(json.dumps({**MINIMAL, **attributes}).encode())


def binary(value: bytes | None, **headers: bytes | None) -> Record:
    ours = {"ce_specversion": b"1.0", "ce_id": b"1", "ce_source": b"/s", "ce_type": b"t"}
    return record(
        value, *{**ours, **{name.replace("content_type", "content-type"): v for name, v in headers.items()}}.items()
    )


def event(given: Record) -> Event:
    decoded = decode(given, max_bytes=LIMIT)
    assert isinstance(decoded, Decoded), decoded
    return decoded.event


def rejection(given: Record, max_bytes: int = LIMIT) -> Rejected:
    decoded = decode(given, max_bytes=max_bytes)
    assert isinstance(decoded, Rejected), decoded
    return decoded


# Whatever the bytes.

HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["content-type", "Content-Type", "ce_id", "ce_source", "ce_type", "ce_specversion", "ce_time"])
        | st.text(max_size=8).map(lambda name: f"ce_{name}")
        | st.text(max_size=8),
        st.none()
        | st.binary(max_size=12)
        | st.sampled_from([b"1.0", b"application/cloudevents+json", b"application/json; charset=utf-8", b"text/plain"]),
    ),
    max_size=8,
).map(tuple)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
ENVELOPES = st.dictionaries(
    st.sampled_from([*MINIMAL, "time", "subject", "data", "data_base64", "datacontenttype", "agent"])
    | st.text(max_size=5),
    JSON | st.sampled_from(["1.0", "/s", "2026-11-24T12:00:00Z", "AAEC", "text/plain", "application/json"]),
).map(lambda envelope: json.dumps({**MINIMAL, **envelope}).encode())


@given(value=st.none() | st.binary() | JSON.map(lambda v: json.dumps(v).encode()) | ENVELOPES, headers=HEADERS)
def test_any_bytes_give_an_event_an_agent_can_read_or_a_reason(value: bytes | None, headers: Headers) -> None:
    """P4, P14: decode never raises; and what it accepts comes out of a signal's payload as it went in."""
    decoded = decode(record(value, *headers), max_bytes=LIMIT)
    if isinstance(decoded, Rejected):
        assert decoded.message
        return
    payload = Delivery(events=[decoded.event]).model_dump_json().encode()
    assert Delivery.model_validate_json(payload).events == [decoded.event]
    assert 0 < decoded.size <= len(payload)
    routes = Routes([spec("x", Subscription(topic=names.EVENTS_TOPIC, key="data.a.b"))])
    for address in routes.route(decoded.event, names.EVENTS_TOPIC).addresses:
        assert names.parse_workflow_id(names.workflow_id(address)) == address


NAME = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20)
FINITE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(
    attributes=st.fixed_dictionaries(
        {"id": NAME, "source": NAME, "type": NAME},
        optional={
            "subject": NAME,
            "time": st.datetimes(timezones=st.just(UTC), min_value=datetime(1000, 1, 1)),  # noqa: DTZ001  # the zone is given
            "tenant": NAME,
            "traceparent": NAME,
        },
    ),
    data=st.dictionaries(st.text(max_size=6), FINITE),
    key=st.none() | st.binary(),
    mode=st.sampled_from([to_structured, to_binary]),
)
def test_what_the_cloudevents_library_writes_is_read(
    attributes: dict[str, Any],
    data: dict[str, Any],
    key: bytes | None,
    mode: Callable[[CloudEvent, JSONFormat], KafkaMessage],
) -> None:
    """Both modes of the Kafka binding, whatever the record's key."""
    message = mode(CloudEvent({**attributes, "datacontenttype": "application/json"}, data), JSONFormat())
    read = event(record(message.value, *message.headers.items(), key=key))
    assert (read.id, read.source, read.type) == (attributes["id"], attributes["source"], attributes["type"])
    assert read.subject == attributes.get("subject")
    assert read.data == (data or None if mode is to_binary and not message.value else data)
    assert read.extensions == {name: attributes[name] for name in ("tenant", "traceparent") if name in attributes}
    if "time" in attributes:
        assert read.time == attributes["time"]


# Modes.


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("content-type", b"application/cloudevents+json")],
        [("Content-Type", b"Application/CloudEvents+JSON; charset=UTF-8")],
        [("content-type", b"application/json")],
        [("content-type", None), ("ce_id", None)],
    ],
)
def test_structured_mode_is_recognised_by_header_or_by_the_object_itself(headers: list[tuple[str, bytes]]) -> None:
    """Simple producers forget the header, or leave their framework's."""
    assert event(record(structured().value, *headers)).id == "1"


def test_the_structured_header_wins_over_ce_headers() -> None:
    """In structured mode the value alone counts (Kafka binding 3.3)."""
    headers = [("content-type", b"application/cloudevents+json"), ("ce_id", b"other")]
    assert event(record(structured().value, *headers)).id == "1"


def test_binary_mode_takes_attributes_from_headers() -> None:
    """Names in any case; a null value is an event without data, not a tombstone."""
    given = binary(None, CE_Subject=b"k", ce_priority=b"3", ce_time=b"2026-11-24T12:00:00.5+01:00")
    read = event(given)
    assert (read.subject, read.extensions, read.data) == ("k", {"priority": "3"}, None)
    assert read.time == datetime(2026, 11, 24, 11, 0, 0, 500_000, UTC)


@pytest.mark.parametrize(
    ("content_type", "value", "data"),
    [
        (b"application/json", b'{"a": 1}', {"a": 1}),
        (b"application/vnd.store+json; charset=utf-8", b"[1]", [1]),
        (b"text/plain", b'{"a": 1}', '{"a": 1}'),
        (b"text/plain", "é".encode(), "é"),
        (b"application/octet-stream", b"\xff\x00", {"data_base64": "/wA="}),
        (None, b'{"a": 1}', {"a": 1}),
        (None, b"{a", "{a"),
        (None, b"\xff", {"data_base64": "/w=="}),
        (b"application/json", b"", None),
    ],
)
def test_binary_data_by_its_content_type(content_type: bytes | None, value: bytes, data: object) -> None:
    """JSON as JSON, text as text, the rest as base64; without a content type, whatever it turns out to be."""
    assert event(binary(value, content_type=content_type)).data == data


@pytest.mark.parametrize(
    ("attributes", "data"),
    [
        ({"data": {"a": [1, None, "é"]}}, {"a": [1, None, "é"]}),
        ({"data": "text", "datacontenttype": "text/plain"}, "text"),
        ({"data": "text"}, "text"),
        ({"data_base64": base64.b64encode(b'{"a": 1}').decode(), "datacontenttype": "application/json"}, {"a": 1}),
        ({"data_base64": base64.b64encode(b"hi").decode(), "datacontenttype": "text/plain"}, "hi"),
        ({"data_base64": "/wA=", "datacontenttype": "image/png"}, {"data_base64": "/wA="}),
        ({"data": None, "data_base64": None}, None),
    ],
)
def test_structured_data(attributes: dict[str, object], data: object) -> None:
    """As in binary mode; what was base64 in the envelope is decoded where it is JSON or text."""
    assert event(structured(**attributes)).data == data


def test_extensions_become_strings_and_unknown_ones_are_kept() -> None:
    """CloudEvents' types as text; null is the same as absent; dataschema is kept among them."""
    read = event(structured(agent="a", priority=3, sampled=True, ratio=0.5, gone=None, dataschema="/x", orderId="7"))
    expected = {"agent": "a", "priority": "3", "sampled": "true", "ratio": "0.5", "dataschema": "/x", "orderId": "7"}
    assert read.extensions == expected


# Rejections.

DEEP = "[" * 100 + "]" * 100


@pytest.mark.parametrize(
    ("given", "reason", "named"),
    [
        (record(None), Reason.NO_VALUE, "tombstone"),
        (record(b"x" * (LIMIT + 1)), Reason.TOO_LARGE, str(LIMIT + 1)),
        (binary(b"\x01" * 100_000, content_type=b"text/plain"), Reason.TOO_LARGE, "as JSON"),
        (record(b"\xff"), Reason.NOT_UTF8, "the value"),
        (record(b""), Reason.NOT_JSON, "the value"),
        (record(b"{"), Reason.NOT_JSON, "line 1"),
        (record(b'{"specversion": NaN}'), Reason.NOT_JSON, "the value"),
        (record(json.dumps({**MINIMAL, "data": "\ud800"}).encode()), Reason.NOT_JSON, "hex escape"),
        (record(b"[" * 100_000), Reason.NOT_JSON, "recursion"),
        (record(b'{"n": ' + b"9" * 10_000 + b"}"), Reason.NOT_JSON, "number"),
        (record(b"[]"), Reason.NOT_AN_OBJECT, "[]"),
        (record(b'"text"'), Reason.NOT_AN_OBJECT, "text"),
        (record(b"{}"), Reason.MISSING_ATTRIBUTE, "specversion"),
        (record(b"{}", ("content-type", b"application/cloudevents+json")), Reason.MISSING_ATTRIBUTE, "specversion"),
        (record(b"[]", ("content-type", b"application/cloudevents-batch+json")), Reason.UNSUPPORTED_MODE, "batch"),
        (structured(specversion="0.3"), Reason.SPECVERSION, "0.3"),
        (structured(specversion=1.0), Reason.SPECVERSION, "string"),
        (structured(id=""), Reason.MISSING_ATTRIBUTE, "'id' is empty"),
        (structured(id=None), Reason.MISSING_ATTRIBUTE, "'id' is missing"),
        (structured(source=""), Reason.MISSING_ATTRIBUTE, "source"),
        (structured(type=None), Reason.MISSING_ATTRIBUTE, "type"),
        (structured(id=7), Reason.BAD_ATTRIBUTE, "'id' has to be a string, not 7"),
        (structured(subject={}), Reason.BAD_ATTRIBUTE, "subject"),
        (structured(datacontenttype=1), Reason.BAD_ATTRIBUTE, "datacontenttype"),
        (structured(extra={"a": 1}), Reason.BAD_ATTRIBUTE, "'extra'"),
        (structured(time="yesterday"), Reason.BAD_TIME, "yesterday"),
        (structured(time="2026-11-24T12:00:00"), Reason.BAD_TIME, "RFC 3339"),
        (structured(time="2026-13-24T12:00:00Z"), Reason.BAD_TIME, "2026-13"),
        (structured(time="1795530639"), Reason.BAD_TIME, "1795530639"),
        (structured(data=1, data_base64="AA=="), Reason.BAD_DATA, "both"),
        (structured(data_base64="?"), Reason.BAD_DATA, "data_base64"),
        (structured(data_base64=7), Reason.BAD_DATA, "data_base64"),
        (structured(data_base64="e3s=", datacontenttype="application/json"), Reason.NOT_JSON, "the data"),
        (record(structured(data="?").value.replace(b'"?"', b"1e999")), Reason.BAD_DATA, "too large"),
        (record(structured(data="?").value.replace(b'"?"', DEEP.encode())), Reason.BAD_DATA, "nested"),
        (binary(b"{", content_type=b"application/json"), Reason.NOT_JSON, "the data"),
        (binary(b"\xff", content_type=b"text/json"), Reason.NOT_UTF8, "the data"),
        (binary(None, ce_id=b"\xff"), Reason.NOT_UTF8, "ce_id"),
        (binary(None, ce_source=None), Reason.MISSING_ATTRIBUTE, "source"),
        (binary(None, ce_specversion=None), Reason.MISSING_ATTRIBUTE, "specversion"),
        (binary(None, CE_ID=b"2"), Reason.BAD_ATTRIBUTE, "more than once"),
    ],
)
def test_what_is_wrong_is_named(given: Record, reason: Reason, named: str) -> None:
    """P14: a reason from the closed set, and a message that names the field."""
    rejected = rejection(given)
    assert rejected.reason == reason
    assert named in rejected.message


def test_a_header_that_is_repeated_alike_is_no_fault() -> None:
    """Proxies repeat headers."""
    assert event(record(None, *binary(None).headers, *binary(None).headers)).id == "1"


# Whom it is for.


def spec(name: str, *subscriptions: Subscription, tenant: str = "default") -> AgentSpec:
    return AgentSpec(name=name, tenant=tenant, instructions="x", subscriptions=list(subscriptions))


SPECS = [
    spec("care", Subscription(topic="store", types=["order.*", "note"])),
    spec("care", Subscription(topic="store"), tenant="acme"),
    spec(
        "logistics",
        Subscription(topic="store", types=["order.shipped"], key="data.order.id"),
        Subscription(topic="store", types=["order.*"]),
        Subscription(topic=names.EVENTS_TOPIC, types=["alarm"], key="data.id"),
    ),
]


def routed(topic: str, *, type: str = "t", subject: str | None = None, data: object = None, **extensions: str) -> Route:  # noqa: A002  # its name
    given = event(structured(type=type, subject=subject, data=data, **extensions))
    return Routes(SPECS).route(given, topic)


def test_topics_are_the_subscriptions_and_agents_events() -> None:
    assert Routes(SPECS).topics == {"store", names.EVENTS_TOPIC}
    assert Routes([]).topics == {names.EVENTS_TOPIC}


def test_an_addressed_event_goes_to_its_agent() -> None:
    """On agents.events, by the extensions agent and tenant; the key is the subject."""
    assert routed(names.EVENTS_TOPIC, subject="k/1", agent="care") == Route((Address("default", "care", "k/1"),))
    acme = routed(names.EVENTS_TOPIC, type="alarm", subject="k", agent="care", tenant="acme")
    assert acme == Route((Address("acme", "care", "k"),))


@pytest.mark.parametrize(
    ("route", "reason", "named"),
    [
        (routed(names.EVENTS_TOPIC, subject="k", agent="nobody"), Reason.UNKNOWN_AGENT, "care, logistics"),
        (routed(names.EVENTS_TOPIC, subject="k", agent="care", tenant="x"), Reason.UNKNOWN_AGENT, "tenant 'x'"),
        (routed(names.EVENTS_TOPIC, agent="care"), Reason.NO_KEY, "'subject'"),
        (routed(names.EVENTS_TOPIC, subject="", agent="care"), Reason.NO_KEY, "'subject'"),
        (routed(names.EVENTS_TOPIC, subject="k"), Reason.NO_SUBSCRIBER, "'t'"),
        (routed(names.EVENTS_TOPIC, type="alarm", subject="k", data={"id": 1.5}), Reason.NO_KEY, "'data.id'"),
        (routed(names.EVENTS_TOPIC, type="alarm", subject="k", data="id"), Reason.NO_KEY, "'data.id'"),
        (routed(names.EVENTS_TOPIC, subject="k" * 1000, agent="care"), Reason.BAD_ADDRESS, "1000"),
    ],
)
def test_an_event_that_cannot_be_addressed_is_rejected(route: Route, reason: Reason, named: str) -> None:
    """P14: the message names the field, and the agents there are."""
    assert route.addresses == ()
    assert route.rejected
    assert route.rejected.reason == reason
    assert named in route.rejected.message


def test_an_event_may_be_for_several_agents_and_none_is_in_order() -> None:
    """By the specs' subscriptions; of one agent's the first that wants the event decides."""
    shipped = routed("store", type="order.shipped", subject="c7", data={"order": {"id": 12}})
    assert shipped == Route(
        (Address("default", "care", "c7"), Address("acme", "care", "c7"), Address("default", "logistics", "12"))
    )
    placed = routed("store", type="order.placed", subject="c7", tenant="default")
    assert placed == Route((Address("default", "care", "c7"), Address("default", "logistics", "c7")))
    assert routed("store", type="gossip", subject="c7", tenant="default") == Route()
    assert routed("store", type="order.placed", subject="c7", tenant="elsewhere") == Route()


def test_a_key_that_one_agent_misses_does_not_keep_the_event_from_another() -> None:
    """P4: it reaches those it can, and is dead-lettered for the rest."""
    route = routed("store", type="order.shipped", subject="c7", tenant="default")
    assert route.addresses == (Address("default", "care", "c7"),)
    assert route.rejected
    assert "'logistics'" in route.rejected.message


# Order: who waits for a dead letter.


def strict(name: str, *subscriptions: Subscription, tenant: str = "default") -> AgentSpec:
    return AgentSpec(name=name, tenant=tenant, instructions="x", order="strict", subscriptions=list(subscriptions))


STRICT = Routes(
    [
        strict("ledger", Subscription(topic="store", types=["order.*"], key="data.id")),
        strict("guard", Subscription(topic="alarms")),
        strict("audit", Subscription(topic="store"), tenant="acme"),
        AgentSpec(name="care", instructions="x", subscriptions=[Subscription(topic="store")]),
    ]
)


@pytest.mark.parametrize(
    ("topic", "key", "found", "held"),
    [
        ("store", b"k", None, ["ledger", "audit"]),
        ("alarms", b"k", None, ["guard"]),
        ("elsewhere", b"k", None, []),
        (names.EVENTS_TOPIC, b"k", None, ["ledger", "guard", "audit"]),
        ("store", None, None, []),
        ("store", b"", None, []),
        ("store", b"\xff", None, []),
        ("store", b"k" * 1000, None, []),
        ("store", b"k", Event(id="1", source="s", type="order.paid", subject="k"), ["ledger"]),
        ("store", b"k", Event(id="1", source="s", type="order.paid", subject="k", data={"id": "k"}), []),
        ("store", b"k", Event(id="1", source="s", type="gossip"), ["audit"]),
        ("store", b"k", Event(id="1", source="s", type="gossip", extensions={"tenant": "default"}), []),
        (names.EVENTS_TOPIC, b"k", Event(id="1", source="s", type="x", extensions={"agent": "guard"}), ["guard"]),
        (names.EVENTS_TOPIC, b"k", Event(id="1", source="s", type="x", extensions={"agent": "nobody"}), []),
    ],
)
def test_a_dead_letter_holds_the_strict_agents_it_may_have_been_for(
    topic: str, key: bytes | None, found: Event | None, held: list[str]
) -> None:
    """Issue 3, `order: strict`: those that read the topic, at the record's key, and that it did not reach."""
    rejected = Record(topic, 0, 7, 1, key, b"{")
    addresses = STRICT.held(rejected, found)
    assert [address.agent for address in addresses] == held
    assert all(address.key == "k" for address in addresses)


def test_only_agents_that_say_so_are_strict() -> None:
    """The default lets later events pass."""
    assert STRICT.is_strict(Address("acme", "audit", "k"))
    assert not STRICT.is_strict(Address("default", "care", "k"))
    assert not STRICT.is_strict(Address("default", "nobody", "k"))


def test_nobody_may_send_what_is_ours_alone() -> None:
    """A hold or a release that came by Kafka would let anybody stop an agent, or let its mail pass."""
    for kind in (names.HOLD_TYPE, names.RELEASE_TYPE):
        assert rejection(structured(type=kind)).reason is Reason.BAD_ATTRIBUTE


# Dead letters.

RECORDS = st.builds(
    Record,
    topic=st.just("t"),
    partition=st.integers(0, 9),
    offset=st.integers(0),
    timestamp=st.integers(-1),
    key=st.none() | st.binary(),
    value=st.none() | st.binary(),
    headers=st.lists(st.tuples(st.text(), st.none() | st.binary())).map(tuple),
)


@given(original=RECORDS, message=st.text(), tries=st.integers(1, 9), when=st.datetimes(timezones=st.just(UTC)))
def test_a_dead_letter_is_read_back_as_it_was_written(
    original: Record, message: str, tries: int, when: datetime
) -> None:
    """P4: bytes, headers, origin and reason survive; also when a dead letter is itself dead-lettered; also as JSON."""
    letter = DeadLetter(
        original=original,
        group="g",
        reason=Reason.REFUSED,
        message=message,
        attempts=tries,
        first_failed=when,
        last_failed=when,
    )
    stored = Record(names.DEAD_LETTER_TOPIC, 1, 2, 3, original.key, original.value, tuple(letter.headers))
    assert DeadLetter.parse(stored) == letter
    assert DeadLetter.model_validate_json(letter.model_dump_json()) == letter
    again = letter.model_copy(update={"original": stored})
    assert DeadLetter.parse(Record("d", 1, 2, 3, stored.key, stored.value, tuple(again.headers))) == again


def test_a_record_that_is_no_dead_letter_says_why() -> None:
    """P14: the place, and the header that is missing or wrong."""
    stray = Record(names.DEAD_LETTER_TOPIC, 1, 2, 3, None, b"x", (("dlq.reason", b"x"),))
    with pytest.raises(ValueError, match=r"agents\.events\.dlq/1 at offset 2 .* 'dlq\.original\.topic'"):
        DeadLetter.parse(stray)
    half = Record("d", 1, 2, 3, None, b"x", (("dlq.original.topic", b"t"), ("dlq.original.partition", b"x")))
    with pytest.raises(ValueError, match="d/1 at offset 2 is not a dead letter: invalid literal"):
        DeadLetter.parse(half)
