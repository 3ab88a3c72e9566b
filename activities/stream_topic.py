"""`StreamTopic`: puts parts of answers on `agents.stream`, as far as Kafka takes them in time; the rest is dropped.

async with contextlib.aclosing(StreamTopic(kafka)) as topic:
    Model(ledger, pools, topic.put)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from activities import metrics
from activities.kafka import Kafka
from activities.publish import encode
from workflows.events import Outgoing

log = logging.getLogger(__name__)

_WAITING = 2000  # some seconds of many agents talking at once: about 2 MB
_PAUSE_SECONDS = 5.0
_CLOSING_SECONDS = 2.0


class StreamTopic:
    """The way to the topic. It connects when there is first something to send, and again after it was lost."""

    def __init__(self, kafka: Kafka, waiting: int = _WAITING) -> None:
        self._kafka = kafka
        self._queue: asyncio.Queue[Outgoing] = asyncio.Queue(waiting)
        self._sending: asyncio.Task[None] | None = None
        self._producer: AIOKafkaProducer | None = None

    def put(self, message: Outgoing) -> None:
        """Have it sent. It takes no time and raises nothing; where too much waits already, it is dropped."""
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            metrics.delta("dropped")
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all())

    async def aclose(self) -> None:
        """Send what waits, if that is quickly done, and leave the broker."""
        if self._sending is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSING_SECONDS):
                    await self._queue.join()
            self._sending.cancel()
            await asyncio.wait([self._sending])
        await self._disconnect()

    async def _send_all(self) -> None:
        while True:
            message = await self._queue.get()
            try:
                await self._send(message)
            except KafkaError as error:
                metrics.delta("dropped")
                log.warning("%s is away, and what models say is not told meanwhile: %r", self._kafka.bootstrap, error)
                await self._disconnect()
                await asyncio.sleep(_PAUSE_SECONDS)
            except Exception:  # whatever it is, the next one may be sent
                metrics.delta("dropped")
                log.exception("a part of an answer could not be sent")
            finally:
                self._queue.task_done()

    async def _send(self, message: Outgoing) -> None:
        if self._producer is None:
            self._producer = await self._kafka.connected_producer()
        sent = await self._producer.send(message.topic, key=message.source.encode(), **encode(message))
        sent.add_done_callback(_count)

    async def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(_CLOSING_SECONDS):
                    await producer.stop()


def _count(sent: asyncio.Future[object]) -> None:
    failed = sent.cancelled() or sent.exception() is not None
    metrics.delta("dropped" if failed else "sent")
