"""Dead letters on a real broker: written by ingest, then listed, redriven and dropped as the command does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from cloudevents.core.bindings.kafka import to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from recorders import ORDERS, Rig
from servers import AnyBroker, TemporalServer, eventually

from workers import dlq
from workers.dlq import State
from workflows.spec import Subscription


@pytest.fixture
async def rig(temporal_server: TemporalServer, fresh_broker: AnyBroker) -> AsyncIterator[Rig]:
    rig = Rig(temporal_server, fresh_broker)
    async with rig.recording():
        yield rig


async def test_a_redriven_event_keeps_its_identity_and_is_taken_once_its_agent_is_there(rig: Rig) -> None:
    """P4: what stood in its way is mended, and the event arrives as it was sent; the letter says who did it."""
    about = {"id": "order-1-1", "source": "/store", "type": "store.order.placed"}
    await rig.send(ORDERS, to_structured(CloudEvent(about, {"order": "order-1"}), JSONFormat()))
    async with rig.ingesting():
        (letter,) = await rig.dead_letters(1)
    assert letter.reason == "no_key"
    (found,) = await dlq.read(rig.settings)
    assert (found.letter, found.state) == (letter, State.OPEN)

    rig.spec = rig.spec.model_copy(update={"subscriptions": [Subscription(topic=ORDERS, key="data.order")]})
    async with rig.ingesting():
        await dlq.redrive(rig.settings, [found], by="ada", why="the spec named the wrong field")
        assert await rig.arrive("order-1", 1) == ["order-1-1"]
    (found,) = await dlq.read(rig.settings)
    assert found.state is State.REDRIVEN
    assert found.resolution
    assert (found.resolution.by, found.resolution.why) == ("ada", "the spec named the wrong field")


async def test_letters_are_kept_whatever_their_record_lacks_and_can_be_set_aside(rig: Rig) -> None:
    """Bytes that are nothing, no key, no value: each has its letter; dropped ones stay on the topic, marked."""
    await rig.producer.send_and_wait(ORDERS, b"\xff\x00", partition=0)
    await rig.producer.send_and_wait(ORDERS, None, key=b"tombstone", partition=1)
    async with rig.ingesting():
        await rig.dead_letters(2)
    letters = await dlq.read(rig.settings)
    originals = {letter.letter.reason: (letter.letter.original.key, letter.letter.original.value) for letter in letters}
    assert originals == {"not_utf8": (None, b"\xff\x00"), "no_value": (b"tombstone", None)}
    await dlq.drop(rig.settings, letters[:1], by="ada", why="a test")
    after = await dlq.read(rig.settings)
    assert [letter.id for letter in after] == [letter.id for letter in letters]
    assert [letter.state for letter in after] == [State.DROPPED, State.OPEN]


async def test_a_letter_redriven_before_anything_is_mended_comes_back_as_another(rig: Rig) -> None:
    """Nothing is lost by trying too early: the record is dead-lettered again, from its new place."""
    await rig.producer.send_and_wait(ORDERS, b"not JSON", key=b"k", partition=0)
    async with rig.ingesting():
        await rig.dead_letters(1)
        await dlq.redrive(rig.settings, await dlq.read(rig.settings), by="ada")

        async def again() -> bool:
            return len(await dlq.read(rig.settings)) == 2

        await eventually(again)
    old, new = await dlq.read(rig.settings)
    assert (old.state, new.state) == (State.REDRIVEN, State.OPEN)
    assert (old.letter.original.offset, new.letter.original.offset) == (0, 1)
    assert old.letter.original.value == new.letter.original.value == b"not JSON"


async def test_a_topic_without_dead_letters_is_read_at_once(rig: Rig) -> None:
    """Nothing is there: nothing is waited for."""
    assert await dlq.read(rig.settings) == []
