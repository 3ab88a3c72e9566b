"""publish: replies and lifecycle events on a real broker, under the same ids however often they are published."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from prometheus_client import REGISTRY
from pydantic import JsonValue
from servers import AnyBroker, eventually
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.kafka import Kafka
from activities.publish import Publish
from workers import records
from workers.records import Decoded, Record
from workflows import names
from workflows.errors import Remedy
from workflows.events import Outgoing
from workflows.messages import PublishRequest, Settlement, TurnOutcome, TurnSummary, Usage, Waits

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PARTITIONS = 4


@pytest.fixture
async def topic(broker: AnyBroker) -> str:
    """A topic of the test's own."""
    name = f"replies-{uuid.uuid4()}"
    await broker.create_topics(name, partitions=PARTITIONS)
    return name


@pytest.fixture
async def publisher(broker: AnyBroker) -> AsyncIterator[Publish]:
    """The activity, on the shared broker."""
    async with aclosing(Publish(Kafka(broker.bootstrap, idempotence=broker.idempotent))) as activity:
        yield activity


def message(topic: str, number: int, key: str = "order-42", **changes: Any) -> Outgoing:
    """The number-th reply of an agent."""
    agent = f"agent/store/desk/{key}"
    data: dict[str, JsonValue] = {"text": f"réponse {number}"}
    reply = Outgoing(
        topic=topic,
        id=names.reply_id(agent, number, 0),
        type=names.REPLY_TYPE,
        source=agent,
        subject=key,
        time=NOW,
        extensions={"tenant": "store", "agent": "desk", "causationid": f"e{number}"},
        data=data,
    )
    return reply.model_copy(update=changes)


async def publish(activity: Publish, *messages: Outgoing) -> None:
    """Run the activity as Temporal does."""
    await ActivityEnvironment().run(activity.publish, PublishRequest(messages=list(messages)))


async def read(bootstrap: str, topic: str) -> list[ConsumerRecord[bytes, bytes]]:
    """All records of a topic, those of a partition in its order."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        consumer.assign(partitions)
        count = sum((await consumer.end_offsets(partitions)).values())
        found: list[ConsumerRecord[bytes, bytes]] = []

        async def all_are_found() -> bool:
            for part in (await consumer.getmany(timeout_ms=100)).values():
                found.extend(part)
            return len(found) >= count

        await eventually(all_are_found)
    finally:
        await consumer.stop()
    return found


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_a_reply_is_a_structured_cloudevent(broker: AnyBroker, publisher: Publish, topic: str) -> None:
    """CloudEvents 1.0, Kafka binding: any consumer, in any language, reads it with a JSON library."""
    await publish(publisher, message(topic, 1))
    (record,) = await read(broker.bootstrap, topic)
    assert record.key == b"agent/store/desk/order-42"
    assert dict(record.headers)["content-type"].startswith(b"application/cloudevents+json")
    assert json.loads(record.value) == {
        "specversion": "1.0",
        "id": "agent/store/desk/order-42/1/0",
        "source": "agent/store/desk/order-42",
        "type": "perennial.reply.v1",
        "subject": "order-42",
        "time": "2026-01-02T03:04:05Z",
        "datacontenttype": "application/json",
        "tenant": "store",
        "agent": "desk",
        "causationid": "e1",
        "data": {"text": "réponse 1"},
    }


async def test_what_is_published_can_be_taken_as_an_event(broker: AnyBroker, publisher: Publish, topic: str) -> None:
    """One agent's reply may wake another: ingest understands it."""
    await publish(publisher, message(topic, 1, subject=None))
    (record,) = await read(broker.bootstrap, topic)
    decoded = records.decode(
        Record(topic, record.partition, record.offset, record.timestamp, record.key, record.value, record.headers),
        max_bytes=1_000_000,
    )
    assert isinstance(decoded, Decoded)
    assert (decoded.event.id, decoded.event.type) == ("agent/store/desk/order-42/1/0", "perennial.reply.v1")
    assert decoded.event.subject is None
    assert decoded.event.extensions["causationid"] == "e1"


async def test_published_again_it_has_the_same_bytes(broker: AnyBroker, publisher: Publish, topic: str) -> None:
    """P1: consumers drop the repetition by its id."""
    await publish(publisher, message(topic, 1))
    await publish(publisher, message(topic, 1))
    one, other = await read(broker.bootstrap, topic)
    assert (one.key, one.value, one.partition) == (other.key, other.value, other.partition)


async def test_the_events_of_one_agent_stay_in_order(broker: AnyBroker, publisher: Publish, topic: str) -> None:
    """P2: within a request and from one to the next; all of an agent's are in one partition."""
    keys = [f"order-{number}" for number in range(6)]
    for first in (1, 11):
        await publish(publisher, *(message(topic, n, key) for n in range(first, first + 10) for key in keys))
    found = await read(broker.bootstrap, topic)
    for key in keys:
        of_agent = [record for record in found if record.key == f"agent/store/desk/{key}".encode()]
        assert len({record.partition for record in of_agent}) == 1
        ids = [json.loads(record.value)["id"] for record in of_agent]
        assert ids == [f"agent/store/desk/{key}/{n}/0" for n in range(1, 21)]
    assert len({record.partition for record in found}) > 1


async def test_what_is_published_is_counted(publisher: Publish, topic: str) -> None:
    """The metrics agree with the topics: replies, turns by outcome, duplicates, decisions."""
    agent = f"desk-{uuid.uuid4()}"
    extensions = {"agent": agent}
    refused = Settlement(call="c", waits_for=Waits.APPROVAL, approved=False, by="ada", at=NOW)
    failed = TurnSummary(agent=agent, turn=1, outcome=TurnOutcome.FAILED, seconds=2, usage=Usage(input_tokens=1))
    await publish(
        publisher,
        message(topic, 1, extensions=extensions),
        message(topic, 2, type=names.TURN_FAILED_TYPE, extensions=extensions, data=failed.model_dump(mode="json")),
        message(topic, 3, type=names.DUPLICATE_TYPE, extensions=extensions),
        message(topic, 4, type=names.AGENT_PAUSED_TYPE, extensions=extensions),
        message(topic, 5, type=names.APPROVAL_REQUESTED_TYPE, extensions=extensions),
        message(
            *(topic, 6), type=names.APPROVAL_DECIDED_TYPE, extensions=extensions, data=refused.model_dump(mode="json")
        ),
    )
    assert counted("perennial_approvals_total", agent=agent, outcome="requested") == 1
    assert counted("perennial_approvals_total", agent=agent, outcome="refused") == 1
    assert counted("perennial_approvals_total", agent=agent, outcome="approved") == 0
    assert counted("perennial_replies_total", agent=agent) == 1
    assert counted("perennial_turns_total", agent=agent, outcome="failed") == 1
    assert counted("perennial_turn_seconds_sum", agent=agent) == 2
    assert counted("perennial_events_duplicate_total", agent=agent) == 1


async def test_an_event_kafka_will_never_take_is_final(publisher: Publish, topic: str) -> None:
    """P11: no repetition makes it smaller; the message says where its text is."""
    with pytest.raises(ApplicationError) as refused:
        await publish(publisher, message(topic, 1, data={"text": "x" * 2_000_000}))
    assert (refused.value.type, refused.value.non_retryable) == (Remedy.FINAL, True)
    assert "ledger" in refused.value.message


async def test_an_event_that_is_too_large_does_not_take_others_with_it(
    broker: AnyBroker, publisher: Publish, topic: str
) -> None:
    """P1: the replies beside it are on their topic when the activity reports the refusal."""
    with pytest.raises(ApplicationError):
        await publish(
            publisher, message(topic, 1), message(topic, 2, data={"text": "x" * 2_000_000}), message(topic, 3)
        )
    await publish(publisher, message(topic, 4))
    found = await read(broker.bootstrap, topic)
    assert [json.loads(record.value)["id"].split("/")[-2] for record in found] == ["1", "3", "4"]


async def test_while_the_broker_is_away_it_is_tried_again(topic: str, new_broker: Callable[[], AnyBroker]) -> None:
    """P11: retried by Temporal, saying where Kafka was looked for; when it is back, the same activity publishes."""
    own = new_broker()
    async with aclosing(Publish(Kafka(own.bootstrap, idempotence=own.idempotent))) as activity:
        with pytest.raises(ApplicationError) as refused:
            await publish(activity, message(topic, 1))
        assert (refused.value.type, refused.value.non_retryable) == (Remedy.RETRY_LATER, False)
        assert own.bootstrap in refused.value.message

        with own:
            for life in range(2):  # the second time, the producer was connected when the broker died
                if life:
                    own.kill()
                    own.start()
                await own.create_topics(topic, partitions=PARTITIONS)

                async def published() -> bool:
                    try:
                        await publish(activity, message(topic, 1))
                    except ApplicationError as error:
                        if error.non_retryable:
                            raise
                        return False
                    return True

                await eventually(published, seconds=90)
                ids = {json.loads(record.value)["id"] for record in await read(own.bootstrap, topic)}
                assert ids == {"agent/store/desk/order-42/1/0"}


@pytest.mark.parametrize("idempotence", [True, False])
async def test_with_and_without_idempotent_producers(broker: AnyBroker, topic: str, idempotence: bool) -> None:
    """PERENNIAL_KAFKA_IDEMPOTENCE, both ways: a broker that has none takes no events then, and we say why."""
    async with aclosing(Publish(Kafka(broker.bootstrap, idempotence=idempotence))) as activity:
        if idempotence and not broker.idempotent:
            with pytest.raises(ApplicationError, match="PERENNIAL_KAFKA_IDEMPOTENCE=false") as refused:
                await publish(activity, message(topic, 1))
            assert (refused.value.type, refused.value.non_retryable) == (Remedy.RETRY_LATER, False)
            return
        await publish(activity, message(topic, 1), message(topic, 2))
    assert len(await read(broker.bootstrap, topic)) == 2
