"""Ingest on Apache Kafka, where the embedded broker has nothing like it: three nodes, and topics that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace

import pytest
from apache_kafka import ApacheKafka
from recorders import ORDERS, QUICK, Rig, numbered
from servers import TemporalServer, eventually

from workflows import names

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

KEYS = [f"key-{number}" for number in range(8)]
PARTITIONS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[ApacheKafka]:
    """Three nodes; each topic is on all of them."""
    with ApacheKafka(nodes=3) as three:
        yield three


@pytest.fixture
async def rig(temporal_server: TemporalServer, cluster: ApacheKafka) -> AsyncIterator[Rig]:
    await cluster.delete_topics()
    rig = Rig(temporal_server, cluster)
    async with rig.recording():
        yield rig


async def through(rig: Rig, fault: Callable[[], Awaitable[None]], count: int = 80) -> None:
    """A stream of events, in the midst of which something happens: each arrives, in order, and all is committed."""

    async def produce(numbers: range) -> None:
        for number in numbers:
            await asyncio.gather(
                *(rig.order(key, number, partition=index % PARTITIONS) for index, key in enumerate(KEYS))
            )
            await asyncio.sleep(0.02)

    async with rig.ingesting():
        await produce(range(10))
        await rig.arrive(KEYS[0], 10)
        producing = asyncio.create_task(produce(range(10, count)))
        await fault()
        await producing
        for key in KEYS:
            arrived = list(dict.fromkeys(await rig.arrive(key, count, seconds=60)))
            assert arrived == numbered(key, range(count))

        async def committed() -> bool:
            expected = count * len(KEYS) // PARTITIONS
            return [await rig.committed(ORDERS, number) for number in range(PARTITIONS)] == [expected] * PARTITIONS

        await eventually(committed)


async def test_leaders_and_coordinators_move_and_nothing_is_lost(rig: Rig, cluster: ApacheKafka) -> None:
    """P1, P2, P3: the leaders of the topic, of the dead letters and of the group's offsets move, three times."""

    async def move() -> None:
        for _ in range(3):
            for topic in (ORDERS, "__consumer_offsets", names.DEAD_LETTER_TOPIC):
                await cluster.move_leaders(topic)

    await through(rig, move)


async def test_a_node_is_killed_and_comes_back(rig: Rig, cluster: ApacheKafka) -> None:
    """P1, P5: the node that leads a partition dies in the midst of a stream, and is back later; nobody notices."""
    victim = (await cluster.leaders(ORDERS))[0]

    async def kill() -> None:
        cluster.kill(victim)

        async def led_by_another() -> bool:
            leaders = await cluster.leaders(ORDERS)
            return leaders[0] not in {victim, -1, 0}

        await eventually(led_by_another, 60)
        await asyncio.to_thread(cluster.start, victim)

    await through(rig, kill)


async def test_all_nodes_are_restarted_one_after_another(rig: Rig, cluster: ApacheKafka) -> None:
    """P1: an upgrade of the cluster, node by node."""

    async def roll() -> None:
        for node in (1, 2, 3):
            await asyncio.to_thread(cluster.stop, node)
            await asyncio.to_thread(cluster.start, node)

    await through(rig, roll)


async def test_a_cluster_that_hangs_is_waited_for(rig: Rig, cluster: ApacheKafka) -> None:
    """P5: no answer, with all connections open, for longer than the group's session."""

    async def hang() -> None:
        cluster.suspend()
        await asyncio.sleep(QUICK.session_seconds + 2)  # the fault is that long
        cluster.resume()

    await through(rig, hang)


async def test_a_topic_that_is_made_anew_is_read_from_its_beginning(rig: Rig, cluster: ApacheKafka) -> None:
    """P1: offsets of the topic that was deleted say nothing about the one that has its name now."""
    async with rig.ingesting(replace(QUICK, commit_seconds=0.1)):
        for number in range(30):
            await rig.order("a", number)
        await rig.arrive("a", 30)
        async with cluster.admin() as admin:
            await admin.delete_topics([ORDERS])

            async def gone() -> bool:
                return ORDERS not in await admin.list_topics()

            await eventually(gone)
        await cluster.create_topics(ORDERS)
        for number in range(30, 50):
            await rig.order("a", number)
        assert list(dict.fromkeys(await rig.arrive("a", 50, seconds=60))) == numbered("a", range(50))

        async def committed() -> bool:
            return await rig.committed(ORDERS) == 20

        await eventually(committed)


@pytest.mark.parametrize("idempotence", [True, False])
async def test_with_and_without_idempotent_producers(
    temporal_server: TemporalServer, cluster: ApacheKafka, idempotence: bool
) -> None:
    """PERENNIAL_KAFKA_IDEMPOTENCE, both ways: dead letters are written, each once, while leaders move."""
    await cluster.delete_topics()
    rig = Rig(temporal_server, cluster, kafka_idempotence=idempotence)
    async with rig.recording(), rig.ingesting():
        for number in range(20):
            await rig.producer.send_and_wait(ORDERS, b"poison %d" % number, partition=0)
            if number % 5 == 0:
                await cluster.move_leaders(names.DEAD_LETTER_TOPIC)
        letters = await rig.dead_letters(20)
        assert list(dict.fromkeys(letter.original.value for letter in letters)) == [b"poison %d" % n for n in range(20)]
        if idempotence:
            assert len(letters) == 20
