"""What our Kafka clients do beyond what aiokafka's do; the broker is real."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import GroupAuthorizationFailedError
from aiokafka.protocol.commit import OffsetFetchRequest, OffsetFetchResponse_v3
from servers import AnyBroker, eventually

from workers.kafka import heed_refusals

LOADING, NOT_THE_COORDINATOR, NOT_ALLOWED = 14, 16, 30
COMMITTED = 5


@asynccontextmanager
async def member(
    broker: AnyBroker, topic: str, group: str, refusals: list[int], heed: Callable[[AIOKafkaConsumer], None]
) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer that the coordinator refuses so often, as Apache Kafka does when it has just been started."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=broker.bootstrap,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        session_timeout_ms=6000,
        retry_backoff_ms=20,
    )
    await consumer.start()
    try:
        answer_of = consumer._coordinator._send_req

        async def refusing(request: object) -> Any:
            if isinstance(request, OffsetFetchRequest) and refusals:
                return OffsetFetchResponse_v3(throttle_time_ms=0, topics=[], error_code=refusals.pop())
            return await answer_of(request)

        consumer._coordinator._send_req = refusing
        heed(consumer)
        yield consumer
    finally:
        await consumer.stop()


@pytest.fixture
async def topic(broker: AnyBroker) -> str:
    """With ten records in its one partition."""
    name = f"topic-{uuid4()}"
    await broker.create_topics(name, partitions=1)
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap)
    await producer.start()
    try:
        for number in range(10):
            await producer.send_and_wait(name, str(number).encode())
    finally:
        await producer.stop()
    return name


@pytest.mark.parametrize("refusal", [LOADING, NOT_THE_COORDINATOR])
async def test_a_coordinator_that_does_not_know_yet_is_asked_again(broker: AnyBroker, topic: str, refusal: int) -> None:
    """P1, P3: "I can't say what is committed" is not "nothing is": a restart of the broker skips or repeats nothing."""
    partition = TopicPartition(topic, 0)
    group = f"group-{uuid4()}"
    async with member(broker, topic, group, [refusal] * 2, heed_refusals) as consumer:
        consumer.assign([partition])
        await consumer.commit({partition: COMMITTED})
        assert await consumer.committed(partition) == COMMITTED
    async with member(broker, topic, group, [refusal] * 2, heed_refusals) as consumer:
        consumer.subscribe([topic])
        await eventually(consumer.assignment)
        first = await consumer.getone()
        assert first.offset == COMMITTED


async def test_a_coordinator_that_will_never_say_is_not_asked_for_ever(broker: AnyBroker, topic: str) -> None:
    """A group that we may not read ends in an error."""
    async with member(broker, topic, f"group-{uuid4()}", [NOT_ALLOWED] * 9, heed_refusals) as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        with pytest.raises(GroupAuthorizationFailedError):
            await consumer.committed(TopicPartition(topic, 0))


async def test_without_us_it_would_be_taken_for_nothing(broker: AnyBroker, topic: str) -> None:
    """When this fails, aiokafka has learned it, and `heed_refusals` may go."""
    partition = TopicPartition(topic, 0)
    async with member(broker, topic, f"group-{uuid4()}", [LOADING] * 9, lambda _: None) as consumer:
        consumer.assign([partition])
        await consumer.commit({partition: COMMITTED})
        assert await consumer.committed(partition) is None
