"""A topic of orders, agents that record what is delivered to them, and ingest in between, to start and stop.

    rig = Rig(temporal_server, broker)
    async with rig.recording(), rig.ingesting():
        await rig.order("order-42", 1)
        assert await rig.arrive("order-42", 1) == numbered("order-42", [1])

Temporal and the broker are real; `Gate` holds deliveries back.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from cloudevents.core.bindings.kafka import KafkaMessage, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from servers import AnyBroker, TemporalServer, eventually
from temporalio import workflow
from temporalio.client import Client, Interceptor, OutboundInterceptor, StartWorkflowInput, WorkflowHandle
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker
from typing_extensions import override

from activities.kafka import Kafka
from workers.deadletter import DeadLetter
from workers.flow import Limits, Partition
from workers.ingest import Ingest
from workers.records import Record
from workers.settings import Settings
from workflows import names
from workflows.events import Delivery, Event
from workflows.names import Address
from workflows.spec import AgentSpec, Subscription
from workflows.state import AgentInput

ORDERS = "store.orders"
LATER = "store.later"
"""A topic that nobody has created when ingest starts."""
QUICK = Limits(spacing=0.02, commit_seconds=0.1, session_seconds=6)


@workflow.defn(name=names.WORKFLOW_TYPE)
class Recorder:
    def __init__(self) -> None:
        self._deliveries: list[Delivery] = []

    @workflow.run
    async def run(self, given: AgentInput) -> None:
        await workflow.wait_condition(lambda: False)

    @workflow.signal(name=names.DELIVER)
    def deliver(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)

    @workflow.query
    def deliveries(self) -> list[Delivery]:
        return self._deliveries


class Gate(Interceptor):
    """Holds back deliveries to the agents whose keys are in `closed`."""

    def __init__(self) -> None:
        self.closed: set[str] = set()
        self.held = 0

    @override
    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:
        gate = self

        class Held(OutboundInterceptor):
            @override
            async def start_workflow(self, input: StartWorkflowInput) -> WorkflowHandle[object, object]:  # its name
                key = names.parse_workflow_id(input.id).key
                gate.held += 1
                await eventually(lambda: key not in gate.closed, math.inf)
                gate.held -= 1
                return await super().start_workflow(input)

        return Held(next)


class Rig:
    """A broker without topics, an agent `recorder`, and an ingest to start and stop, with these settings."""

    def __init__(self, temporal: TemporalServer, broker: AnyBroker, **settings: Any) -> None:
        self.temporal = temporal
        self.broker = broker
        self.gate = Gate()
        self._ingests: list[Ingest] = []
        ours = {
            "temporal_address": temporal.address,
            "kafka_bootstrap": broker.bootstrap,
            "kafka_idempotence": broker.idempotent,
            "task_queue": f"ingest-{uuid.uuid4()}",
            "consumer_group": f"group-{uuid.uuid4()}",
            "drain_seconds": 5,
        }
        self.settings = Settings(**(ours | settings))
        self.spec = AgentSpec(
            name="recorder",
            tenant=f"t{uuid.uuid4().hex}",
            instructions="Record.",
            subscriptions=[
                Subscription(topic=ORDERS, key="data.order_id"),
                Subscription(topic=LATER, key="data.order_id"),
            ],
        )

    async def connect(self, *, gated: bool = False) -> Client:
        return await Client.connect(
            self.temporal.address,
            data_converter=pydantic_data_converter,
            interceptors=[self.gate] if gated else [],
        )

    @contextlib.asynccontextmanager
    async def producing(self) -> AsyncIterator[None]:
        """While events can be sent. No worker takes them from Temporal."""
        self.client = await self.connect()
        self.producer = AIOKafkaProducer(**Kafka(self.broker.bootstrap, idempotence=self.broker.idempotent).producer())
        await self.broker.create_topics(names.EVENTS_TOPIC, names.DEAD_LETTER_TOPIC, ORDERS)
        await self.producer.start()
        try:
            yield
        finally:
            await self.producer.stop()

    @contextlib.asynccontextmanager
    async def recording(self) -> AsyncIterator[None]:
        """While events can be sent, and the recorders' worker runs."""
        async with self.producing():
            worker = Worker(
                self.client,
                task_queue=self.settings.task_queue,
                workflows=[Recorder],
                workflow_runner=UnsandboxedWorkflowRunner(),
            )
            async with worker:
                yield

    @contextlib.asynccontextmanager
    async def ingesting(
        self, limits: Limits = QUICK, others: Sequence[AgentSpec] = (), **settings: object
    ) -> AsyncIterator[Ingest]:
        """While an ingest runs, for other agents too, with other settings; it must not fail before it is stopped."""
        stop = asyncio.Event()
        ours = self.settings.model_copy(update=settings)
        ingest = Ingest(await self.connect(gated=True), ours, [self.spec, *others], limits=limits)
        running = asyncio.create_task(ingest.run(stop))
        self._ingests.append(ingest)
        try:
            yield ingest
        finally:
            self._ingests.remove(ingest)
            stop.set()
            await running

    async def order(
        self,
        key: str,
        number: int,
        *,
        topic: str = ORDERS,
        partition: int = 0,
        data: object = None,
        written_ms: int | None = None,
    ) -> None:
        """An event for the recorder at this key, with id `key-number`; written now, or then."""
        attributes = {"id": f"{key}-{number}", "source": "/store", "type": "store.order.placed"}
        event = CloudEvent(attributes, {"order_id": key, "data": data})
        await self.send(topic, to_structured(event, JSONFormat()), partition=partition, written_ms=written_ms)

    async def send(
        self, topic: str, message: KafkaMessage, *, partition: int = 0, written_ms: int | None = None
    ) -> int:
        sent = await self.producer.send_and_wait(
            topic,
            message.value,
            headers=list(message.headers.items()),
            partition=partition,
            timestamp_ms=written_ms,
        )
        offset: int = sent.offset
        return offset

    async def delivered(self, key: str) -> list[list[Event]]:
        """The deliveries that the recorder at this key has had."""
        handle = self.client.get_workflow_handle(names.workflow_id(Address(self.spec.tenant, self.spec.name, key)))
        try:
            return [delivery.events for delivery in await handle.query(Recorder.deliveries)]
        except RPCError:
            return []

    async def ids(self, key: str) -> list[str]:
        return [event.id for events in await self.delivered(key) for event in events]

    async def arrive(self, key: str, count: int, seconds: float = 30) -> list[str]:
        """The ids of the events of this key, once there are so many."""

        async def enough() -> list[str] | None:
            nonlocal ids
            ids = await self.ids(key)
            return ids if len(ids) >= count else None

        ids: list[str] = []
        try:
            found = await eventually(enough, seconds)
        except AssertionError as error:
            came = f"of {key!r} {len(ids)} of {count} events have come within {seconds} s, the last {ids[-1:]}"
            state = "\n".join(map(_state, self._ingests)) or "none runs"
            raise AssertionError(f"{came}; deliveries held: {self.gate.held}; ingest: {state}") from error
        assert found
        return found

    async def committed(self, topic: str, partition: int = 0) -> int | None:
        """What the group has committed, asked from outside."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.broker.bootstrap, group_id=self.settings.consumer_group, enable_auto_commit=False
        )
        await consumer.start()
        try:
            asked = TopicPartition(topic, partition)
            consumer.assign([asked])
            offset: int | None = await consumer.committed(asked)
            return offset
        finally:
            await consumer.stop()

    async def dead_letters(self, count: int) -> list[DeadLetter]:
        """The dead letters, once there are so many of different records; all there are."""
        consumer = AIOKafkaConsumer(
            names.DEAD_LETTER_TOPIC, bootstrap_servers=self.broker.bootstrap, auto_offset_reset="earliest"
        )
        await consumer.start()
        letters: list[DeadLetter] = []

        async def enough() -> bool:
            for messages in (await consumer.getmany(timeout_ms=300)).values():
                for m in messages:
                    headers = tuple(m.headers)
                    record = Record(m.topic, m.partition, m.offset, m.timestamp, m.key, m.value, headers)
                    letters.append(DeadLetter.parse(record))
            return (
                len({(letter.original.topic, letter.original.offset, letter.original.partition) for letter in letters})
                >= count
            )

        try:
            await eventually(enough)
        finally:
            await consumer.stop()
        return sorted(letters, key=lambda letter: (letter.original.topic, letter.original.offset))


def _state(ingest: Ingest) -> str:
    """What an ingest does, for a failed test to show."""
    consumer = getattr(ingest, "_consumer", None)
    if consumer is None:
        return "it has not connected to Kafka"
    now = asyncio.get_running_loop().time()
    frontiers = ingest._flow.frontiers()
    lines = [f"last poll {now - ingest._polled:.1f} s ago, {ingest._flow.in_flight} deliveries in flight, assigned:"]
    for partition in sorted(consumer.assignment()):
        reading = consumer._subscription.subscription.assignment.state_value(partition)
        fetched = "never" if reading.timestamp is None else f"{time.time() - reading.timestamp / 1000:.1f} s ago"
        lines.append(
            f"  {partition.topic}/{partition.partition}: {reading}, end {reading.highwater}, fetched {fetched}, "
            f"{'paused, ' if reading.paused else ''}frontier {frontiers.get(Partition(*partition))}"
        )
    return "\n".join(lines)


def numbered(key: str, numbers: Iterable[int]) -> list[str]:
    return [f"{key}-{number}" for number in numbers]
