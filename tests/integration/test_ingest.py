"""Ingest between a real broker and a real Temporal server; the agents are recorders of what is delivered to them."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.protocol.commit import OffsetFetchRequest, OffsetFetchResponse_v3
from cloudevents.core.bindings.kafka import to_binary
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from recorders import LATER, ORDERS, QUICK, Rig, numbered
from servers import AnyBroker, TemporalServer, eventually
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from typing_extensions import override

from workers import handover as handover_module
from workers import ingest as ingest_module
from workers.ingest import Ingest, IngestError
from workflows import names
from workflows.names import Address


@pytest.fixture
async def rig(temporal_server: TemporalServer, fresh_broker: AnyBroker) -> AsyncIterator[Rig]:
    rig = Rig(temporal_server, fresh_broker)
    async with rig.recording():
        yield rig


async def test_events_in_both_modes_reach_their_agents_as_they_were_sent(rig: Rig) -> None:
    """An addressed event goes by its subject, another by a subscription; the recorder sees what the producer sent."""
    addressed = {
        "id": "a",
        "source": "/crm",
        "type": "crm.note",
        "subject": "customer 7/é",
        "tenant": rig.spec.tenant,
        "agent": "recorder",
        "traceparent": "00-1-2-03",
        "datacontenttype": "text/plain",
    }
    await rig.send(names.EVENTS_TOPIC, to_binary(CloudEvent(addressed, "hello, é"), JSONFormat()))
    await rig.order("order-1", 1, data=[1, 2.5, None, "é"])
    async with rig.ingesting():
        await rig.arrive("customer 7/é", 1)
        await rig.arrive("order-1", 1)
        await rig.broker.create_topics(LATER)
        await rig.order("later", 1, topic=LATER)
        await rig.arrive("later", 1)
    [[note]] = await rig.delivered("customer 7/é")
    assert (note.id, note.source, note.type, note.data) == ("a", "/crm", "crm.note", "hello, é")
    assert note.extensions == {"tenant": rig.spec.tenant, "agent": "recorder", "traceparent": "00-1-2-03"}
    [[order]] = await rig.delivered("order-1")
    assert order.data == {"order_id": "order-1", "data": [1, 2.5, None, "é"]}


async def test_what_waits_for_an_agent_is_coalesced_in_order(rig: Rig) -> None:
    """P2: while one delivery of an agent is held up, its next 50 events wait, and go together in the next one."""
    rig.gate.closed = {"hot"}
    async with rig.ingesting():
        await rig.order("hot", 0)
        await eventually(lambda: rig.gate.held == 1)
        for number in range(1, 51):
            await rig.order("hot", number)
        await rig.order("other", 0)  # read after them, so they have all been read when it has arrived
        await rig.arrive("other", 1)
        assert rig.gate.held == 1, "one delivery in flight per agent"
        rig.gate.closed = set()
        assert await rig.arrive("hot", 51) == numbered("hot", range(51))
    assert [len(events) for events in await rig.delivered("hot")] == [1, 50]


async def test_many_agents_each_get_their_events_once_and_in_order(rig: Rig) -> None:
    """P2: agents side by side, over four partitions; per agent the order of its partition."""
    keys = [f"key-{number}" for number in range(20)]
    async with rig.ingesting():
        for number in range(25):
            await asyncio.gather(*(rig.order(key, number, partition=i % 4) for i, key in enumerate(keys)))
        for key in keys:
            assert await rig.arrive(key, 25) == numbered(key, range(25))


async def test_commit_never_passes_an_event_that_is_not_accepted(rig: Rig) -> None:
    """P3, P5: a held agent stops the commit of its partition and, when the window is full, its reading; not others.

    How much is read beyond the window depends on how far the producer was when ingest first read.
    """
    rig.gate.closed = {"held"}
    limits = replace(QUICK, window_records=20)
    waiting = TopicPartition(ORDERS, 0)
    async with rig.ingesting(limits) as ingest:
        await rig.order("free", 0)
        await rig.order("held", 0)
        for number in range(1, 300):
            await rig.order("free", number)
        await rig.arrive("free", limits.window_records - 1)
        await eventually(lambda: set(ingest._consumer.paused()) == {waiting})
        for number in range(30):
            await rig.order("elsewhere", number, partition=1)
        await rig.arrive("elsewhere", 30)

        async def elsewhere_committed() -> bool:
            return await rig.committed(ORDERS, 1) == 30

        await eventually(elsewhere_committed)
        assert await rig.committed(ORDERS, 0) == 1
        assert set(ingest._consumer.paused()) == {waiting}
        assert await ingest._consumer.position(waiting) < 301, "reading goes on beyond the window"
        rig.gate.closed = set()
        assert await rig.arrive("free", 300) == numbered("free", range(300))
        assert await rig.ids("held") == ["held-0"]

        async def all_committed() -> bool:
            return await rig.committed(ORDERS, 0) == 301

        await eventually(all_committed)


async def test_poison_is_dead_lettered_byte_for_byte_and_its_neighbours_do_not_notice(rig: Rig) -> None:
    """P4: for every bad record one dead letter with key, value, headers, origin and reason."""
    poison: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]], str]] = [
        (b"k\xff", b"\xff\xfe\x00", [("h", b"\x00\xff"), ("h", None)], "not_utf8"),
        (None, b"{not json", [], "not_json"),
        (b"", b"[1]", [("", b"")], "not_an_object"),
        (b"k", None, [], "no_value"),
        (None, b'{"specversion": "1.0", "id": "", "source": "/s", "type": "t"}', [], "missing_attribute"),
        (None, b'{"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}', [], "no_key"),
        (None, b"x" * 300_000, [], "too_large"),
    ]
    await rig.order("good", 0)
    for key, value, headers, _ in poison:
        await rig.producer.send_and_wait(ORDERS, value, key=key, headers=headers, partition=0)
    await rig.order("good", 1)
    stray = CloudEvent({"id": "s", "source": "/s", "type": "t", "agent": "nobody"}, None)
    await rig.send(names.EVENTS_TOPIC, to_binary(stray, JSONFormat()))
    async with rig.ingesting():
        assert await rig.arrive("good", 2) == numbered("good", range(2))
        letters = await rig.dead_letters(len(poison) + 1)
    assert letters.pop(0).reason == "unknown_agent"
    assert len(letters) == len(poison)
    for offset, (letter, (key, value, headers, reason)) in enumerate(zip(letters, poison, strict=True), 1):
        origin = letter.original
        assert (origin.topic, origin.partition, origin.offset, origin.timestamp > 0) == (ORDERS, 0, offset, True)
        assert (origin.key, origin.value, origin.headers) == (key, value, tuple(headers))
        assert (letter.reason, letter.group, letter.attempts) == (reason, rig.settings.consumer_group, 1)
    assert await rig.committed(ORDERS) == len(poison) + 2


async def test_an_event_temporal_never_takes_is_dead_lettered_alone(rig: Rig) -> None:
    """P4: of a refused delivery, only the event that is to blame is dead-lettered."""
    rig.gate.closed = {"big"}
    limits = replace(QUICK, event_bytes=8_000_000, delivery_bytes=32_000_000)
    rig.producer._metadata.max_request_size = rig.producer._max_request_size = 16_000_000
    async with rig.ingesting(limits):
        await rig.order("big", 0)
        await eventually(lambda: rig.gate.held == 1)
        for number, size in enumerate([10, 2_500_000, 10, 5_000_000, 10], 1):
            await rig.order("big", number, data="x" * size)
        await rig.order("other", 0)
        await rig.arrive("other", 1)
        rig.gate.closed = set()
        assert await rig.arrive("big", 4) == numbered("big", [0, 1, 3, 5])
        letters = await rig.dead_letters(2)
    assert [(letter.original.offset, letter.reason) for letter in letters] == [(2, "refused"), (4, "refused")]


async def test_stopping_finishes_what_is_in_flight_and_nothing_is_delivered_again(rig: Rig) -> None:
    """A stop commits what was accepted, also when commits are rare; the next process begins behind it."""
    async with rig.ingesting(replace(QUICK, commit_seconds=3600)):
        for number in range(20):
            await rig.order("a", number)
        await rig.arrive("a", 20)
    assert await rig.committed(ORDERS) == 20
    await rig.order("a", 20)
    async with rig.ingesting():
        assert await rig.arrive("a", 21, seconds=45) == numbered("a", range(21))


async def test_a_second_member_takes_over_half_and_nothing_is_lost(rig: Rig) -> None:
    """P1, P2: partitions change hands in the middle of a stream; every event arrives, first arrivals in order."""
    keys = [f"key-{number}" for number in range(8)]

    async def produce() -> None:
        for number in range(150):
            await asyncio.gather(*(rig.order(key, number, partition=i % 4) for i, key in enumerate(keys)))
            await asyncio.sleep(0.05)

    async with rig.ingesting() as first:
        await rig.order("warm", 0)
        await rig.arrive("warm", 1)
        producing = asyncio.create_task(produce())
        async with rig.ingesting() as second:
            await producing
            await eventually(lambda: len(second._consumer.assignment()) == len(first._consumer.assignment()))
            for key in keys:
                ids = await rig.arrive(key, 150)
                assert list(dict.fromkeys(ids)) == numbered(key, range(150))
            assert not first._consumer.assignment() & second._consumer.assignment()


async def test_temporal_away_delays_and_loses_nothing(tmp_path: Path, fresh_broker: AnyBroker) -> None:
    """P4, P5: Temporal hangs, is killed and comes back: the partition waits, and nothing is dead-lettered."""
    with TemporalServer(tmp_path / "temporal.db") as temporal:
        rig = Rig(temporal, fresh_broker)
        async with rig.recording(), rig.ingesting() as ingest:
            await rig.order("a", 0)
            await rig.arrive("a", 1)
            temporal.suspend()
            for number in range(1, 30):
                await rig.order("a", number)
                await rig.order("b", number)
            await eventually(lambda: ingest._handover.temporal.away)
            assert await rig.committed(ORDERS) == 1
            temporal.resume()
            assert list(dict.fromkeys(await rig.arrive("a", 30))) == numbered("a", range(30))
            temporal.kill()
            for number in range(30, 60):
                await rig.order("a", number)
            await eventually(lambda: ingest._handover.temporal.away)
            temporal.start()
            assert list(dict.fromkeys(await rig.arrive("a", 60, seconds=60))) == numbered("a", range(60))
            assert list(dict.fromkeys(await rig.arrive("b", 29))) == numbered("b", range(1, 30))

            async def all_committed() -> bool:
                return await rig.committed(ORDERS) == 89

            await eventually(all_committed)
            # One record that is to blame itself shows that there are no others before it.
            await rig.producer.send_and_wait(ORDERS, b"poison", partition=0)
            assert [letter.original.value for letter in await rig.dead_letters(1)] == [b"poison"]


@pytest.mark.parametrize("commit_seconds", [0.1, 3600])
async def test_the_broker_is_killed_and_ingest_goes_on(rig: Rig, commit_seconds: float) -> None:
    """P1: Apache Kafka comes back as it was. The embedded broker comes back empty: its new topics are read from 0.

    That holds also when offsets of the old topics were still to be committed: they say nothing about the new ones.
    """
    async with rig.ingesting(replace(QUICK, commit_seconds=commit_seconds)):
        for number in range(30):
            await rig.order("a", number)
        await rig.arrive("a", 30)
        rig.broker.kill()
        rig.broker.start()
        await rig.broker.create_topics(names.EVENTS_TOPIC, names.DEAD_LETTER_TOPIC, ORDERS)
        for number in range(30, 50):
            await rig.order("a", number)
        assert list(dict.fromkeys(await rig.arrive("a", 50, seconds=45))) == numbered("a", range(50))
    assert await rig.committed(ORDERS) == (50 if rig.broker.remembers else 20)


CHILD = """
    import asyncio, sys
    from temporalio.client import Client
    from temporalio.contrib.pydantic import pydantic_data_converter
    from workers.flow import Limits
    from workers.ingest import Ingest
    from workers.settings import Settings
    from workflows.spec import AgentSpec

    async def main():
        settings = Settings.model_validate_json(sys.argv[1])
        client = await Client.connect(settings.temporal_address, data_converter=pydantic_data_converter)
        spec = AgentSpec.model_validate_json(sys.argv[2])
        limits = Limits(commit_seconds=3600, session_seconds=6)
        await Ingest(client, settings, [spec], limits=limits).run(asyncio.Event())

    asyncio.run(main())
"""


async def test_killed_between_accept_and_commit_it_delivers_again(rig: Rig) -> None:
    """P1, P3: after kill -9 the next process delivers the uncommitted events again, in order; none is lost."""
    arguments = [rig.settings.model_dump_json(), rig.spec.model_dump_json()]
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(CHILD), *arguments)
    try:
        for number in range(10):
            await rig.order("a", number)
        await rig.arrive("a", 10)
    finally:
        child.kill()
        await child.wait()
    assert await rig.committed(ORDERS) is None
    await rig.order("a", 10)
    async with rig.ingesting():
        assert await rig.arrive("a", 21, seconds=60) == numbered("a", [*range(10), *range(11)])


async def test_a_namespace_that_does_not_exist_ends_the_process(rig: Rig) -> None:
    """Nothing is dead-lettered for a wrong setup: ingest ends, and says what to check."""
    client = await Client.connect(rig.temporal.address, namespace="nowhere", data_converter=pydantic_data_converter)
    await rig.order("a", 0)
    ingest = Ingest(client, rig.settings, [rig.spec], limits=QUICK)
    with pytest.raises(IngestError, match="namespace 'nowhere'"):
        await asyncio.wait_for(ingest.run(asyncio.Event()), timeout=60)
    assert not await rig.committed(ORDERS)


async def test_an_agent_whose_run_has_grown_long_is_given_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """P1, P4: Temporal ends a run, and its mail, at 50 MB; an agent that can't begin a new one now is handed no more.

    The limits are scaled down: a run counts as long from 200 KB, and is looked at after every 50 KB.
    """
    monkeypatch.setattr(handover_module, "_LONG_HISTORY_BYTES", 200_000)
    monkeypatch.setattr(handover_module, "_LOOK_AFTER_BYTES", 50_000)
    for number in range(40):
        await rig.order("busy", number, data="x" * 20_000)
        await rig.order("quiet", number, partition=1)
    limits = replace(QUICK, delivery_bytes=30_000)
    async with rig.ingesting(limits):
        await rig.arrive("quiet", 40)
        at_first = await rig.arrive("busy", 9)
        assert len(at_first) < 20
        busy = names.workflow_id(Address(rig.spec.tenant, rig.spec.name, "busy"))
        first_run = rig.client.get_workflow_handle(busy)
        await first_run.terminate()  # what continue-as-new does for an agent: the next run is short
        await rig.arrive("busy", 5)
        letters: list[str] = []
        assert letters == [letter.original.topic for letter in await rig.dead_letters(0)]


async def test_what_was_taken_does_not_come_again_when_the_coordinator_does_not_know_yet_what_is_committed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1, P3: a coordinator that has just been started refuses to say; that is not "nothing was committed"."""
    async with rig.ingesting():
        for number in range(3):
            await rig.order("order-1", number)
        await rig.arrive("order-1", 3)

    class Refused(AIOKafkaConsumer):  # type: ignore[misc]  # aiokafka has no type hints
        @override
        async def start(self) -> None:
            await super().start()
            ask = self._coordinator._send_req
            refusals = [OffsetFetchResponse_v3(throttle_time_ms=0, topics=[], error_code=14)]

            async def send(request: object) -> object:
                refused = isinstance(request, OffsetFetchRequest) and (ORDERS, [0]) in request._partitions
                return refusals.pop() if refused and refusals else await ask(request)

            self._coordinator._send_req = send

    monkeypatch.setattr(ingest_module, "AIOKafkaConsumer", Refused)
    async with rig.ingesting():
        await rig.order("order-1", 3)
        assert await rig.arrive("order-1", 4) == numbered("order-1", range(4))
