"""P5: what Temporal can't take waits in Kafka, not in the memory of ingest.

The figures: pytest --broker kafka tests/faults/test_memory.py --log-cli-level=info
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from statistics import median

import pytest
from aiokafka import AIOKafkaProducer
from field import Field, Worker
from servers import AnyBroker, eventually
from traffic import letter

from workers.embedded import PARTITIONS
from workers.flow import Limits
from workers.topics import HEADERS
from workflows import names

log = logging.getLogger(__name__)

_EVENTS = 200_000
_BYTES = 1000
_AGENTS = 5000
_AT_A_TIME = 4
_BATCH_BYTES = 512 * 1024
_SAMPLES = 120
_ONE_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""With its heap for each thread, glibc keeps up to 20 MB of what was freed, for minutes: that is not held by ingest."""


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_memory_is_flat_while_temporal_is_stopped_and_200000_events_wait(
    tmp_path: Path, fresh_broker: AnyBroker
) -> None:
    """P4, P5: ingest takes in what its windows hold, stays in its group, and goes on by itself afterwards.

    Two minutes of outage on Apache Kafka, and a short one in `make test`.
    """
    outage_seconds = 120 if fresh_broker.remembers else 15
    async with Field(tmp_path, fresh_broker, variables=_ONE_HEAP) as field:
        await asyncio.gather(field.agent.stop(), field.model.stop())  # this is about ingest: nobody takes the mail
        (ingest,) = field.ingests
        await field.send(letter("warm-up", "Are you there?"))
        await field.no_lag()
        members, before = await field.members(), await committed(field)
        at_start = resident_megabytes(ingest)

        field.temporal.suspend()
        await let_wait(field)
        read = await until_full(ingest)
        assert read < 2 * PARTITIONS * Limits().window_records, "the windows, and one poll more"
        samples = []
        end = time.monotonic() + outage_seconds
        while time.monotonic() < end:
            samples.append(resident_megabytes(ingest))
            assert await field.members() == members
            await asyncio.sleep(outage_seconds / _SAMPLES)
        assert await received(ingest) == read
        assert await committed(field) == before

        quarter = len(samples) // 4
        first, last = median(samples[:quarter]), median(samples[-quarter:])
        figures = (
            f"{at_start:.1f} MB at start, {samples[0]:.1f} with {read:.0f} records in full windows; then, in "
            f"{outage_seconds} s, {min(samples):.1f} to {max(samples):.1f}: {first:.1f} in the first quarter, "
            f"{last:.1f} in the last"
        )
        log.info(figures)
        assert last < 1.05 * first, figures
        assert max(samples) < 1.1 * samples[0], figures

        field.temporal.resume()

        async def goes_on() -> bool:
            assert ingest.runs, field.logs()
            return await committed(field) > 2 * read  # all that it held, and as much again

        await eventually(goes_on, 120)
        assert await field.members() == members
        assert await ingest.metric("perennial_dead_letters_total") == 0
        assert not field.observer.dead_letters


async def let_wait(field: Field) -> None:
    """Put the events on the topic, over all partitions: of about 1 KB each, a few of an agent at a time."""
    producer = AIOKafkaProducer(**field.kafka.client(), acks="all", max_batch_size=_BATCH_BYTES)
    text = "x" * (_BYTES - len(letter("agent-0000", "")))
    await producer.start()
    try:
        for partition in range(PARTITIONS):
            batch = producer.create_batch()
            for number in range(_EVENTS // PARTITIONS):
                key = f"agent-{number // _AT_A_TIME % (_AGENTS // PARTITIONS) * PARTITIONS + partition:04}"
                record = {"key": key.encode(), "value": letter(key, text), "timestamp": None, "headers": [*HEADERS]}
                if batch.append(**record) is None:  # it is full
                    await producer.send_batch(batch, names.EVENTS_TOPIC, partition=partition)
                    batch = producer.create_batch()
                    batch.append(**record)
            await producer.send_batch(batch, names.EVENTS_TOPIC, partition=partition)
        await producer.flush()
    finally:
        await producer.stop()


async def until_full(ingest: Worker) -> float:
    """How many records it has read when its windows are full: more are there, and it reads none."""

    async def stands_still() -> float:
        before = await received(ingest)
        await asyncio.sleep(2)  # polls are far shorter
        return before if before == await received(ingest) > PARTITIONS * Limits().window_records else 0

    return await eventually(stands_still, 60)


async def committed(field: Field) -> int:
    """How many records."""
    return sum((await field.committed()).values())


async def received(ingest: Worker) -> float:
    return await ingest.metric("perennial_events_received_total")


def resident_megabytes(worker: Worker) -> float:
    """The memory of a process that is in RAM."""
    assert worker.process
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(kilobytes) / 1024
