"""publish: replies and lifecycle events to Kafka, as CloudEvents with deterministic ids.

A retry publishes the same events under the same ids: on the wire an event may stand twice, and consumers drop the
repetition by its id. The record's key is the agent's workflow id, so one agent's events stay in order.
"""

from __future__ import annotations

import asyncio

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from cloudevents.core.bindings.kafka import to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from temporalio import activity
from typing_extensions import override

from activities import metrics
from activities.heartbeat import beating
from activities.kafka import Kafka
from workflows import names
from workflows.errors import Remedy, activity_error
from workflows.events import Outgoing
from workflows.interface import PublishActivities
from workflows.messages import PublishRequest, Settlement, TurnSummary

_TURNS = (names.TURN_COMPLETED_TYPE, names.TURN_FAILED_TYPE, names.TURN_CANCELLED_TYPE)


class Publish(PublishActivities):
    """Puts events on their topics. The producer connects when it is first needed, and again after it was lost."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._producer: AIOKafkaProducer | None = None
        self._connecting = asyncio.Lock()

    @override
    @activity.defn(name="publish")
    async def publish(self, request: PublishRequest) -> None:
        async with beating():
            try:
                refused = await self._send(request.messages)
            except KafkaError as error:
                await self._disconnect()
                denial = await self._kafka.denial()
                why = denial.why if denial else repr(error)
                raise activity_error(
                    Remedy.RETRY_LATER, f"Kafka at {self._kafka.bootstrap} did not take the events: {why}"
                ) from error
        for message in request.messages:
            if message.id not in refused:
                _count(message)
        if refused:
            raise activity_error(
                Remedy.FINAL,
                f"Kafka refuses as too large, and all others are published: {', '.join(refused)}. What they say is in "
                f"the ledger. {next(iter(refused.values()))}",
            )

    async def aclose(self) -> None:
        """Leave the broker."""
        await self._disconnect()

    async def _send(self, messages: list[Outgoing]) -> dict[str, MessageSizeTooLargeError]:
        """Put all on their topics; the ids of those that are too large for the broker, and what it said."""
        producer = await self._connected()
        refused: dict[str, MessageSizeTooLargeError] = {}
        sent: dict[str, asyncio.Future[object]] = {}
        for message in messages:  # sent in order, awaited together: the producer keeps the order of one key
            try:
                sent[message.id] = await producer.send(message.topic, key=message.source.encode(), **encode(message))
            except MessageSizeTooLargeError as error:
                refused[message.id] = error
        for event_id, result in zip(sent, await asyncio.gather(*sent.values(), return_exceptions=True), strict=True):
            if isinstance(result, MessageSizeTooLargeError):
                refused[event_id] = result
            elif isinstance(result, BaseException):
                raise result
        return refused

    async def _connected(self) -> AIOKafkaProducer:
        async with self._connecting:
            if self._producer is None:
                self._producer = await self._kafka.connected_producer()
            return self._producer

    async def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.stop()


def encode(message: Outgoing) -> dict[str, object]:
    """The record's value and headers: a CloudEvent in structured mode (CloudEvents 1.0, Kafka binding 3.3)."""
    event = CloudEvent(
        attributes={
            "specversion": "1.0",
            "id": message.id,
            "source": message.source,
            "type": message.type,
            "time": message.time,
            "datacontenttype": "application/json",
            **({"subject": message.subject} if message.subject else {}),
            **message.extensions,
        },
        data=message.data,
    )
    record = to_structured(event, JSONFormat())
    return {"value": record.value, "headers": list(record.headers.items())}


def _count(message: Outgoing) -> None:
    agent = message.extensions.get("agent", "")
    if message.type == names.REPLY_TYPE:
        metrics.reply(agent)
    elif message.type == names.DUPLICATE_TYPE:
        metrics.duplicate(agent)
    elif message.type in _TURNS:
        summary = TurnSummary.model_validate(message.data)
        metrics.turn(agent, summary.outcome.value, summary.seconds)
    elif message.type == names.APPROVAL_REQUESTED_TYPE:
        metrics.approval(agent, "requested")
    elif message.type == names.APPROVAL_DECIDED_TYPE:
        metrics.approval(agent, "approved" if Settlement.model_validate(message.data).approved else "refused")
