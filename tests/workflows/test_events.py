"""Events: an event's identity is its source and id, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from workflows.events import Delivery, Event, EventReference, Outgoing, event_digest

TEXTS = st.text(max_size=12)


def test_the_digest_never_changes() -> None:
    """Agents carry digests for years; computed another way, everything they have seen would be new."""
    assert event_digest("store", "event-1") == "1a349002d3a7763f5d1ad3f6"


@given(one=st.tuples(TEXTS, TEXTS), other=st.tuples(TEXTS, TEXTS))
def test_events_are_the_same_when_source_and_id_are(one: tuple[str, str], other: tuple[str, str]) -> None:
    """CloudEvents 1.0; also where source and id, put together, would read the same."""
    assert (event_digest(*one) == event_digest(*other)) == (one == other)


def test_an_event_and_a_reference_to_it_have_one_identity() -> None:
    """What a turn answers is found among what the mailbox has seen."""
    event = Event(id="1", source="store", type="store.order", data={"anything": [1]})
    assert event.digest == EventReference(id="1", source="store", type="another").digest == event_digest("store", "1")


@pytest.mark.parametrize("field", ["id", "source", "type"])
def test_an_event_needs_what_cloudevents_requires(field: str) -> None:
    """P14: an empty id, source or type is refused by name."""
    attributes = {"id": "1", "source": "store", "type": "store.order", field: ""}
    with pytest.raises(ValidationError, match=field):
        Event.model_validate(attributes)


def test_what_an_older_or_newer_release_wrote_is_read() -> None:
    """Unknown fields are ignored, missing ones have defaults."""
    delivery = Delivery.model_validate_json(
        '{"events": [{"id": "1", "source": "s", "type": "t", "colour": "red"}], "priority": 7}'
    )
    assert delivery == Delivery(events=[Event(id="1", source="s", type="t")])


def test_an_outgoing_event_survives_the_history() -> None:
    """It waits in the state until it is published, so it goes through JSON unchanged."""
    outgoing = Outgoing(topic="t", id="i", type="y", source="s", time="2026-01-02T03:04:05Z", data={"n": [1, None]})
    assert Outgoing.model_validate_json(outgoing.model_dump_json()) == outgoing
