"""Put events on Kafka topics, and watch what agents put there: `perennial send` and `perennial tail`.

lines = prepare(read_lines(Path("events.jsonl")), topic="store.events", specs=specs)
await send(settings, "store.events", lines)
async for event in watch(settings): ...
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from pydantic import JsonValue
from pydantic_core import from_json, to_json

from activities.kafka import LARGEST
from workers import kafka, records
from workers.exits import BAD_INPUT, CommandError
from workers.flow import Limits
from workers.records import Decoded, Record, Rejected, Routes
from workers.settings import Settings
from workflows import names
from workflows.events import Event
from workflows.spec import AgentSpec

HEADERS = (("content-type", b"application/cloudevents+json"),)
"""Of a record whose value is a CloudEvent in structured mode."""
_KAFKA_SECONDS = 10.0
_FAULTS_SHOWN = 20
_IDS_REMEMBERED = 10_000
_POLL_MS = 500
_GATHER_SECONDS = 0.03


class NotLetInError(CommandError):
    """Kafka is there, and our settings are not those it wants."""


@dataclass(frozen=True)
class Line:
    """Bytes to send, and where they come from, as in `events.jsonl:3`."""

    place: str
    value: bytes


@dataclass(frozen=True)
class Prepared:
    """A record to send. `id` is the event's; None when the bytes are no event."""

    place: str
    value: bytes
    key: bytes | None
    id: str | None


def read_lines(stream: Iterable[bytes], name: str) -> list[Line]:
    """The lines of a JSON Lines file that are not blank."""
    return [Line(f"{name}:{number}", text) for number, line in enumerate(stream, 1) if (text := line.strip())]


def event_bytes(  # noqa: PLR0913, PLR0917  # an event has these parts
    kind: str,
    subject: str | None,
    data: str | None,
    agent: str | None,
    tenant: str | None,
    source: str,
    event_id: str | None,
) -> bytes:
    """One event from its parts, as JSON; without an id it is given one. Its time is now.

    Raises:
        CommandError: the data is not JSON.
    """
    event: dict[str, JsonValue] = {
        "specversion": "1.0",
        "id": event_id or str(uuid4()),
        "source": source,
        "type": kind,
        "time": datetime.now(UTC).isoformat(),
        "datacontenttype": "application/json",
    }
    event |= {name: value for name, value in (("subject", subject), ("agent", agent), ("tenant", tenant)) if value}
    if data is not None:
        try:
            event["data"] = from_json(data, allow_inf_nan=False)
        except ValueError as error:
            raise CommandError(f"--data is not JSON: {error}. Text goes in quotes: '\"text\"'.", BAD_INPUT) from error
    return to_json(event)


def prepare(
    lines: Sequence[Line], topic: str, specs: Sequence[AgentSpec] | None, *, raw: bool = False
) -> tuple[list[Prepared], list[str]]:
    """The records to send, and warnings of events that nobody here would take.

    Args:
        lines: one CloudEvent each, in structured mode.
        topic: where they will go.
        specs: the agents, to warn of events that none of them takes; None when they are not known.
        raw: lines that are no events are sent as they stand.

    Raises:
        CommandError: lines that are no events; the message names each place and fault.
    """
    routes = Routes(specs) if specs is not None else None
    limit = Limits().event_bytes
    prepared: list[Prepared] = []
    faults: list[str] = []
    warnings: list[str] = []
    for line in lines:
        record = Record(topic, 0, 0, -1, None, line.value, HEADERS)
        decoded = records.decode(record, max_bytes=limit)
        if isinstance(decoded, Decoded):
            key, rejected = _key(decoded.event, topic, routes)
            prepared.append(Prepared(line.place, line.value, key, decoded.event.id))
            if rejected:
                warnings.append(f"{line.place}: {rejected.message}; ingest will put it into {names.DEAD_LETTER_TOPIC}")
        elif raw:
            prepared.append(Prepared(line.place, line.value, None, None))
        else:
            faults.append(f"{line.place}: {decoded.message}")
    if faults:
        more = len(faults) - _FAULTS_SHOWN
        listed = "\n".join(f"  {fault}" for fault in islice(faults, _FAULTS_SHOWN))
        raise CommandError(
            f"{len(faults)} of {len(lines)} events are not valid, and nothing was sent:\n{listed}"
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nCorrect them, or send the lines as they stand with --raw.",
            BAD_INPUT,
        )
    return prepared, warnings


def _key(event: Event, topic: str, routes: Routes | None) -> tuple[bytes | None, Rejected | None]:
    """The record's key, so that one agent's events share a partition; and why no agent would take the event."""
    route = routes.route(event, topic) if routes else None
    agent_key = route.addresses[0].key if route and route.addresses else None
    key = event.subject or agent_key
    return key.encode() if key else None, route.rejected if route else None


async def send(
    settings: Settings,
    topic: str,
    events: Sequence[Prepared],
    *,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Put these on a topic, in order; return when the broker has them all.

    Args:
        settings: where Kafka is.
        topic: has to exist.
        events: what to send.
        on_progress: told how many the broker has.

    Raises:
        CommandError: there is no such topic, or Kafka is away or refuses an event.
    """
    await check_topic(settings, topic)
    producer = AIOKafkaProducer(
        **kafka.reached_by(settings).producer(),
        max_request_size=LARGEST,
        linger_ms=5,
    )
    done = 0

    def count(_: object) -> None:
        nonlocal done
        done += 1
        on_progress(done)

    async with connected(producer, settings):
        sent: list[asyncio.Future[object]] = []
        for event in events:
            future = await producer.send(topic, value=event.value, key=event.key, headers=list(HEADERS))
            future.add_done_callback(count)
            sent.append(future)
        results = await asyncio.gather(*sent, return_exceptions=True)
    refused = [(event, error) for event, error in zip(events, results, strict=True) if isinstance(error, KafkaError)]
    if refused:
        listed = "\n".join(f"  {event.place}: {error}" for event, error in refused[:_FAULTS_SHOWN])
        raise CommandError(
            f"Kafka at {settings.kafka_bootstrap} did not take {len(refused)} of {len(events)} events:\n{listed}\n"
            "Mend that and send all of them again: agents drop the events they have seen."
        )


async def check_topic(settings: Settings, topic: str) -> None:
    """Refuse a topic that does not exist: brokers create what is mentioned, so that a typing mistake goes unseen.

    Raises:
        CommandError: there is no such topic, or Kafka is away.
    """
    known = await topics(settings)
    if topic not in known:
        listed = ", ".join(sorted(name for name in known if not name.startswith("_"))) or "none"
        raise CommandError(
            f"There is no topic {topic!r} at {settings.kafka_bootstrap}; there are: {listed}.", BAD_INPUT
        )


async def topics(settings: Settings) -> set[str]:
    """The names of all topics.

    Raises:
        CommandError: Kafka is away.
    """
    admin = AIOKafkaAdminClient(**kafka.reached_by(settings).client())
    async with connected(admin, settings, stop=admin.close):
        return set(await admin.list_topics())


async def watch(
    settings: Settings,
    watched: Sequence[str] = (names.REPLIES_TOPIC, names.ACTIVITY_TOPIC),
    *,
    from_beginning: bool = False,
    on_ready: Callable[[], None] = lambda: None,
    on_reject: Callable[[str], None] = lambda _: None,
) -> AsyncGenerator[Event, None]:
    """The events on these topics, as they come, each once; in no consumer group, so that nobody else misses any.

    Args:
        settings: where Kafka is.
        watched: topics.
        from_beginning: also what is there already.
        on_ready: called once whatever comes from now on will be seen.
        on_reject: told of records that are no events.

    Raises:
        CommandError: Kafka is away, or has no such topic.
    """
    consumer = AIOKafkaConsumer(
        *watched,
        **kafka.reached_by(settings).client(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    seen: dict[tuple[str, str], None] = {}
    async with connected(consumer, settings):
        if not from_beginning:
            # Not `seek_to_end`: soon after the start, the reset to the earliest that is under way may win over it.
            ends = await consumer.end_offsets(consumer.assignment())
            for partition, offset in ends.items():
                consumer.seek(partition, offset)
        on_ready()
        while True:
            fetched = list((await consumer.getmany(timeout_ms=_POLL_MS)).values())
            if fetched:  # what comes together is shown in order: a reply, then that its turn is completed
                await asyncio.sleep(_GATHER_SECONDS)
                fetched += (await consumer.getmany()).values()
            messages = sorted(
                (message for part in fetched for message in part),
                key=lambda message: (message.timestamp, watched.index(message.topic)),
            )
            for message in messages:
                record = Record.of(message)
                decoded = records.decode(record, max_bytes=LARGEST)
                if isinstance(decoded, Rejected):
                    on_reject(f"{record.topic}/{record.partition} at offset {record.offset}: {decoded.message}")
                elif (identity := (decoded.event.source, decoded.event.id)) not in seen:
                    seen[identity] = None
                    if len(seen) > _IDS_REMEMBERED:
                        del seen[next(iter(seen))]
                    yield decoded.event


@contextlib.asynccontextmanager
async def connected(
    client: AIOKafkaProducer | AIOKafkaConsumer | AIOKafkaAdminClient,
    settings: Settings,
    *,
    stop: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[None]:
    """A connected Kafka client.

    Raises:
        CommandError: Kafka is away; the message says where it was looked for and what to do.
    """
    leave: Callable[[], Awaitable[None]] = stop or client.stop
    try:
        try:
            async with asyncio.timeout(_KAFKA_SECONDS):
                await client.start()
        except TimeoutError as error:
            raise await _away(settings) from error
        yield
    except UnknownTopicOrPartitionError as error:
        raise CommandError(
            f"Kafka at {settings.kafka_bootstrap} lacks a topic: {error}. `perennial doctor` names those needed."
        ) from error
    except KafkaError as error:
        if not error.retriable:
            raise
        raise await _away(settings) from error
    finally:
        await leave()


async def _away(settings: Settings) -> CommandError:
    """What to say when Kafka does not answer."""
    place = f"Kafka at {settings.kafka_bootstrap}"
    if denial := await kafka.reached_by(settings).denial():
        return NotLetInError(f"{place} does not let us in: {denial.why}. Check the PERENNIAL_KAFKA_* settings.")
    return CommandError(
        f"{place} does not answer. Start the embedded stack with `perennial dev`, or set PERENNIAL_KAFKA_BOOTSTRAP."
    )
