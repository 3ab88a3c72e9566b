"""The fault matrix, where servers are what breaks (see test_matrix.py): Temporal, its disk, the broker, its topics."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition
from apache_kafka import ApacheKafka
from field import SESSION_SECONDS, Field
from recorders import ORDERS, QUICK, Rig, numbered
from servers import AnyBroker, TemporalServer, disks_can_be_made, eventually
from stack import PERENNIAL, STORE, Finished, run
from traffic import Place, letter, workflow_of

from workers import ingest as ingest_module
from workflows import names

KEYS = 6
_LATECOMER = """
name: latecomer
tenant: store
instructions: Better late than never.
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def field(tmp_path_factory: pytest.TempPathFactory, new_broker: Callable[[], AnyBroker]) -> AsyncIterator[Field]:
    """One deployment for most tests; each has keys of its own."""
    folder = tmp_path_factory.mktemp("server-faults")
    specs = shutil.copytree(STORE, folder / "specs")
    with new_broker() as broker:
        async with Field(folder, broker, specs=specs) as field:
            yield field


async def send(field: Field, prefix: str, count: int) -> None:
    """So many letters to each of several agents."""
    for number in range(count):
        await field.send(*(letter(f"{prefix}-{key}", f"Number {number}") for key in range(KEYS)))


def _complaints(field: Field) -> int:
    """How often ingest has said that Temporal is away."""
    return field.ingests[0].log.read_text().count("does not take our requests")


@pytest.mark.parametrize("seconds", [SESSION_SECONDS + 2, pytest.param(60, marks=pytest.mark.kafka)])
async def test_temporal_is_killed_and_stays_away(field: Field, seconds: float) -> None:
    """P3, P4, P5, cases 5 and 6: for longer than the group's session; the member stays, and nothing moves meanwhile."""
    await send(field, "before", 1)
    await field.settled()
    members, committed = await field.members(), await field.committed()
    assert len(members) == 1
    complaints = _complaints(field)
    field.temporal.kill()
    for _ in range(10):
        await send(field, f"away-{seconds}", 5)
        await asyncio.sleep(seconds / 10)  # the fault is that long
    await eventually(lambda: _complaints(field) > complaints)  # Temporal's client has given up trying by itself
    assert await field.committed() == committed
    assert await field.members() == members
    await field.start(field.temporal)
    await field.settled()
    assert await field.members() == members, "it has not left and joined again either"


async def test_an_outage_longer_than_the_longest_time_between_polls(
    tmp_path: Path, fresh_broker: AnyBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P5, case 6: with all it reads from paused, ingest polls on, or it would be put out of the group for good.

    There is no setting for that time, which is five minutes; here it is five seconds.
    """
    impatient = partial(AIOKafkaConsumer, max_poll_interval_ms=5000)
    monkeypatch.setattr(ingest_module, "AIOKafkaConsumer", impatient)
    with TemporalServer(tmp_path / "temporal.db") as temporal:
        rig = Rig(temporal, fresh_broker)
        async with rig.recording(), rig.ingesting(replace(QUICK, window_records=20)) as ingest:
            await rig.order("a", 0)
            await rig.arrive("a", 1)
            member = ingest._consumer._coordinator.member_id
            temporal.suspend()
            for number in range(1, 60):
                await rig.order("a", number)
            await eventually(lambda: TopicPartition(ORDERS, 0) in ingest._consumer.paused())
            await asyncio.sleep(7)  # the fault is that long
            assert TopicPartition(ORDERS, 0) in ingest._consumer.paused()
            temporal.resume()
            assert list(dict.fromkeys(await rig.arrive("a", 60))) == numbered("a", range(60))
            assert ingest._consumer._coordinator.member_id == member


@pytest.mark.kafka  # it takes long, and a second deployment
@pytest.mark.timeout(400)
@pytest.mark.skipif(not disks_can_be_made(), reason="this machine lets nobody mount a disk")
async def test_temporals_disk_is_full(tmp_path: Path, new_broker: Callable[[], AnyBroker]) -> None:
    """P3, P4, case 20: what it can't keep it does not accept; all waits, and goes on when there is room."""
    with new_broker() as broker:
        async with Field(tmp_path, broker, disk_megabytes=64) as field:
            await send(field, "before", 2)
            await field.settled()
            members = await field.members()
            field.temporal.fill_disk()

            async def stuck() -> bool:  # at first there is room left in its write-ahead log
                await send(field, "full", 1)
                return _complaints(field) > 0

            await eventually(stuck)
            committed = await field.committed()
            await send(field, "still-full", 5)
            assert await field.committed() == committed
            assert await field.members() == members
            field.temporal.clear_disk()
            await field.settled(240)


@pytest.mark.kafka
@pytest.mark.timeout(600)
async def test_brokers_go_down_one_after_another(tmp_path: Path) -> None:
    """P1, P2, P3, case 7: each is killed and comes back, and with it goes what it led and coordinated."""
    with ApacheKafka(nodes=3) as cluster:
        async with Field(tmp_path, cluster, ingests=2) as field:
            async with field.commits_watched(), field.stream("nodes", pace=0.3):
                await field.some_answered("nodes")
                for node in (1, 2, 3):
                    await asyncio.to_thread(cluster.kill, node)
                    await asyncio.to_thread(cluster.start, node)
                    await cluster.in_sync()
                for topic in (names.EVENTS_TOPIC, names.REPLIES_TOPIC, "__consumer_offsets"):
                    await cluster.move_leaders(topic)
            await field.settled(120)
            assert all(ingest.runs for ingest in field.ingests)


@pytest.mark.parametrize("runs", [True, False])
async def test_topics_are_made_anew(field: Field, runs: bool) -> None:
    """P1, case 11: while ingest runs, or is down. Offsets begin at 0 again; old events are dropped, new ones taken."""
    (ingest,) = field.ingests
    prefix = f"anew-{runs}"
    await send(field, prefix, 5)
    await field.settled()
    before = field.redelivered
    if not runs:
        assert await ingest.stop() == 0
    again = [record.value for record in field.sent if prefix.encode() in record.value]
    await field.lose_topics()
    await field.send(*again)
    await send(field, prefix, 2)
    if not runs:
        await field.start(ingest)
    await field.settled()
    assert field.redelivered == before


@pytest.mark.kafka  # it takes long
async def test_a_dead_letter_is_redriven(field: Field) -> None:
    """P4, case 11: once its agent is there the event is taken, under its own id: redriven once more it is dropped."""
    (ingest,) = field.ingests
    event = letter("early", "Are you there?", "early/1", agent="latecomer")
    await field.send(event)
    await field.settled()
    partition = field.sent[-1].partition
    assert partition
    (field.specs / "latecomer.yaml").write_text(_LATECOMER)
    field.read_specs()
    for worker in (ingest, field.agent):
        assert await worker.stop() == 0
    await field.start(ingest, field.agent)
    for _ in range(2):
        offset = (await field.ends())[partition]
        (dead,) = (await _dlq(field, "list", "--state=all", "--reason=unknown_agent")).json
        assert (await _dlq(field, "redrive", dead["id"], "--why=it is there now")).status == 0
        field.note(partition.topic, event, Place(*partition, offset))
        await field.settled()
    assert len(field.replies("early", agent="latecomer")) == 1


async def _dlq(field: Field, *arguments: str) -> Finished:
    return await run(str(PERENNIAL), "dlq", *arguments, "--json", variables=field.variables)


async def test_a_reply_is_on_its_topic_and_the_broker_is_not_heard(field: Field) -> None:
    """Case 16: it is sent again, under its own id, so that whoever reads it can tell."""
    field.agent_to_broker.drop_answers()
    await field.send(letter("deaf", "Do you hear me?"))
    await eventually(lambda: not field.unanswered())
    field.agent_to_broker.mend()
    await field.settled()
    await send(field, "deaf", 1)
    await field.settled()
    ids = [answer.reply.id for answer in field.observer.answers if answer.reply.workflow_id == workflow_of("deaf")]
    assert len(set(ids)) == 1
    assert len(ids) <= 2
