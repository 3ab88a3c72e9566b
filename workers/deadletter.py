"""The dead-letter topic: records that could not be understood, byte for byte, with their origin and the reason.

A dead letter has the key, value and headers of the original record; after the original's headers stand our own, the
`dlq.*` ones below. `DeadLetter.parse` is the inverse of `DeadLetter.headers`, also when the original is itself a dead
letter. One record may be written more than once (a crash in between); origin topic, partition and offset tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from pydantic import BaseModel, ConfigDict

from activities.kafka import LARGEST, Kafka
from workers.records import Record
from workflows import names
from workflows.events import Event, hold_digest

_STOP_SECONDS = 5

# The first of our headers: what stands before its last occurrence is the original's.
_TOPIC = "dlq.original.topic"
_PARTITION = "dlq.original.partition"
_OFFSET = "dlq.original.offset"
_TIMESTAMP = "dlq.original.timestamp"
_GROUP = "dlq.group"
_REASON = "dlq.reason"
_MESSAGE = "dlq.message"
_ATTEMPTS = "dlq.attempts"
_FIRST_FAILED = "dlq.first-failed"
_LAST_FAILED = "dlq.last-failed"
_HELD = "dlq.held"
REDRIVEN = "dlq.redriven"
"""On a record that was redriven, as one of the original's own then: where it stood first, TOPIC/PARTITION/OFFSET."""
_VALUE = "dlq.original.value"
"""Says that the original has neither key nor value: our client can't write that, so an empty value stands in."""
_NULL = "null"


class DeadLetter(BaseModel):
    """A record that went to the dead-letter topic. In JSON, bytes are base64."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    original: Record
    """The record as it stood in its own topic."""
    group: str
    """The consumer group that could not take it."""
    reason: str
    """A `records.Reason`; a newer release may know more of them."""
    message: str
    held: tuple[str, ...] = ()
    """Workflow ids of the agents whose later mail waits, their order being strict."""
    attempts: int = 1
    first_failed: datetime
    last_failed: datetime

    @property
    def headers(self) -> list[tuple[str, bytes | None]]:
        """The headers of the record in the dead-letter topic."""
        ours = {
            _TOPIC: self.original.topic,
            _PARTITION: str(self.original.partition),
            _OFFSET: str(self.original.offset),
            _TIMESTAMP: str(self.original.timestamp),
            _GROUP: self.group,
            _REASON: self.reason,
            _MESSAGE: self.message,
            _ATTEMPTS: str(self.attempts),
            _FIRST_FAILED: self.first_failed.astimezone(UTC).isoformat(),
            _LAST_FAILED: self.last_failed.astimezone(UTC).isoformat(),
        }
        if self.held:
            ours[_HELD] = " ".join(self.held)
        if self._is_empty:
            ours[_VALUE] = _NULL
        return [*self.original.headers, *((name, text.encode()) for name, text in ours.items())]

    @property
    def value(self) -> bytes | None:
        """The value of the record in the dead-letter topic."""
        return b"" if self._is_empty else self.original.value

    @property
    def _is_empty(self) -> bool:
        return self.original.key is None and self.original.value is None

    @classmethod
    def parse(cls, record: Record) -> Self:
        """The dead letter in a record of the dead-letter topic.

        Raises:
            ValueError: the record is none; the message says what it lacks.
        """
        where = f"{record.topic}/{record.partition} at offset {record.offset}"
        starts = [index for index, (name, _) in enumerate(record.headers) if name == _TOPIC]
        if not starts:
            raise ValueError(f"{where} is not a dead letter: it has no header {_TOPIC!r}")
        ours = {name: (value or b"").decode(errors="replace") for name, value in record.headers[starts[-1] :]}
        try:
            original = Record(
                topic=ours[_TOPIC],
                partition=int(ours[_PARTITION]),
                offset=int(ours[_OFFSET]),
                timestamp=int(ours[_TIMESTAMP]),
                key=record.key,
                value=None if ours.get(_VALUE) == _NULL else record.value,
                headers=record.headers[: starts[-1]],
            )
            return cls(
                original=original,
                group=ours[_GROUP],
                reason=ours[_REASON],
                message=ours[_MESSAGE],
                held=tuple(ours.get(_HELD, "").split()),
                attempts=int(ours[_ATTEMPTS]),
                first_failed=datetime.fromisoformat(ours[_FIRST_FAILED]),
                last_failed=datetime.fromisoformat(ours[_LAST_FAILED]),
            )
        except KeyError as error:
            raise ValueError(f"{where} is not a dead letter: it has no header {error}") from error
        except ValueError as error:
            raise ValueError(f"{where} is not a dead letter: {error}") from error


def first_origin(record: Record) -> str:
    """Where a record stood first, before it was redriven: TOPIC/PARTITION/OFFSET."""
    redriven = _redriven(record)
    return redriven or f"{record.topic}/{record.partition}/{record.offset}"


def filling(event: Event, record: Record) -> Event:
    """The event; if its record was redriven, so that it takes the place of the hold it has left."""
    redriven = _redriven(record)
    return event.model_copy(update={"fills": hold_digest(redriven)}) if redriven else event


def _redriven(record: Record) -> str:
    found = [value for name, value in record.headers if name == REDRIVEN and value]
    return found[-1].decode(errors="replace") if found else ""


class DeadLetters:
    """Writes to the dead-letter topic. Connects when first needed, and again after a failure."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._producer: AIOKafkaProducer | None = None
        self._writing = asyncio.Lock()

    async def write(self, letters: Iterable[DeadLetter]) -> None:
        """Return when all are durable in the topic.

        Raises:
            KafkaError: at least one is not; write them all again.
        """
        async with self._writing:  # one at a time: who fails leaves the broker, and must not take others' producer away
            try:
                producer = await self._connected()
                sent = [
                    await producer.send(
                        names.DEAD_LETTER_TOPIC,
                        key=letter.original.key,
                        value=letter.value,
                        headers=letter.headers,
                    )
                    for letter in letters
                ]
                await asyncio.gather(*sent)
            except KafkaError:
                await self.aclose()
                raise

    async def aclose(self) -> None:
        """Leave the broker."""
        producer, self._producer = self._producer, None
        if producer is not None:
            # What was not sent by then is written again, by a new producer. It can end as if we were cancelled.
            stopping = asyncio.create_task(producer.stop())
            await asyncio.wait([stopping], timeout=_STOP_SECONDS)
            stopping.cancel()

    async def _connected(self) -> AIOKafkaProducer:
        if self._producer is None:
            self._producer = await self._kafka.connected_producer(
                max_request_size=LARGEST,
                compression_type="gzip",  # our headers must not push a record over the broker's limit
            )
        return self._producer
