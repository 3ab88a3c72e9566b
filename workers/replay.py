"""Hand a stretch of a topic to its agents once more: `perennial ingest replay`.

    stretch = Stretch(topic="store.events", start=datetime(2026, 11, 1, tzinfo=UTC))
    told = await replay(settings, specs, stretch)

It reads beside the consumer group, which notices nothing. An event that an agent has taken is not handed to it again,
however long ago that was: the ledger says so. One that it has accepted, and not taken yet, it drops itself. So what
comes of a replay are the events that an agent never had, such as those from before it subscribed. They come behind all
that it has by now, among themselves in order.

Dead letters are left to `perennial dlq`. A replay that was cut off may be made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from aiokafka import AIOKafkaConsumer, TopicPartition
from temporalio.exceptions import ApplicationError
from typing_extensions import override

from activities.ledger import Ledger
from workers import kafka, operations
from workers.exits import BAD_INPUT, CommandError
from workers.flow import Limits, Partition
from workers.handover import Counts, Handover, IngestError
from workers.records import Record, Route, Routes
from workers.settings import Settings
from workers.topics import check_topic, connected
from workflows import names
from workflows.events import Event
from workflows.names import Address
from workflows.spec import AgentSpec

_POLL_MS = 200
_POLL_RECORDS = 200
_QUIET_SECONDS = 30.0
_ENDS: tuple[kafka.Start, kafka.Start] = ("earliest", "latest")

Place = kafka.Start | int
"""A time, an end of the topic, or an offset, which means something in one partition only."""


@dataclass(frozen=True)
class Stretch:
    """Part of a topic."""

    topic: str
    start: Place
    end: Place = "latest"
    """The first record that no longer belongs to it. `latest`: all that are there now."""
    partition: int | None = None
    """Of this partition only."""

    def holds(self, written_ms: int) -> bool:
        """Whether a record that was written then belongs to it; times need not rise from one offset to the next."""
        starts = not isinstance(self.start, datetime) or self.start.timestamp() * 1000 <= written_ms
        return starts and not (isinstance(self.end, datetime) and self.end.timestamp() * 1000 <= written_ms)


async def replay(  # noqa: PLR0913  # what the command may say
    settings: Settings,
    specs: Sequence[AgentSpec],
    stretch: Stretch,
    *,
    agent: str | None = None,
    limits: Limits | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Counts:
    """Hand these records to the agents they are for; what became of them.

    Args:
        settings: where Kafka, Temporal and the ledger are.
        specs: the agents.
        stretch: what to read.
        agent: only what is for this one: AGENT or TENANT/AGENT.
        limits: how much is taken on at once, and the pace.
        on_progress: told how many records are done, of how many.

    Raises:
        CommandError: there is no such topic, partition or agent, or a server is away.
    """
    routes = _OfAgent(specs, agent)
    limits = limits or Limits()
    client = await operations.connect(settings)
    await check_topic(settings, stretch.topic)
    consumer = AIOKafkaConsumer(
        stretch.topic,
        **kafka.reached_by(settings).client(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    async with Ledger(settings.ledger_url) as ledger, connected(consumer, settings):
        spans = await _spans(consumer, stretch)

        async def known(address: Address, events: Sequence[Event]) -> Collection[str]:
            return await ledger.taken(names.workflow_id(address), [event.digest for event in events])

        handover = Handover(client, settings, routes, limits, known=known)
        try:
            await _Reading(consumer, handover, stretch, spans, on_progress).run()
        except IngestError as error:
            raise CommandError(str(error)) from error
        except ApplicationError as error:  # the ledger's
            raise CommandError(f"{error.message} Mend that, and give the same command again.") from error
        finally:
            await handover.drain(handover.flow.frontiers().keys(), 0)
    return handover.counts


class _OfAgent(Routes):
    """Routes to one agent only, or to all."""

    def __init__(self, specs: Sequence[AgentSpec], agent: str | None) -> None:
        super().__init__(specs)
        self._wanted = {
            (spec.tenant, spec.name) for spec in specs if agent in {None, spec.name, f"{spec.tenant}/{spec.name}"}
        }
        if not self._wanted:
            listed = ", ".join(sorted(f"{spec.tenant}/{spec.name}" for spec in specs)) or "none"
            raise CommandError(f"There is no agent {agent!r}. Known are: {listed}.", BAD_INPUT)

    @override
    def route(self, event: Event, topic: str, written_ms: int = -1) -> Route:
        route = super().route(event, topic, written_ms)
        wanted = tuple(address for address in route.addresses if address[:2] in self._wanted)
        return Route(wanted, route.rejected)


class _Reading:
    """Reads spans of partitions through a handover."""

    def __init__(
        self,
        consumer: AIOKafkaConsumer,
        handover: Handover,
        stretch: Stretch,
        spans: Mapping[TopicPartition, tuple[int, int]],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._consumer = consumer
        self._handover = handover
        self._stretch = stretch
        self._starts = {partition: start for partition, (start, _) in spans.items()}
        self._ends = {partition: end for partition, (_, end) in spans.items()}
        self._open = set(spans) if stretch.end == "latest" else set()
        """Partitions whose end is taken from their first fetch: the embedded broker's answer about it lags behind."""
        self._on_progress = on_progress

    async def run(self) -> None:
        """Read until all is handed over.

        Raises:
            CommandError: Kafka sends nothing more.
        """
        self._consumer.pause(*self._consumer.assignment())
        for partition, start in self._starts.items():
            self._consumer.seek(partition, start)
        await self._pace()
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while waiting := await self._unread() or self._handover.flow.oldest():
            fetched = await self._consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
            self._close_ends()
            for partition, messages in fetched.items():
                for message in messages:
                    if self._starts[partition] <= message.offset < self._ends[partition] and self._stretch.holds(
                        message.timestamp
                    ):
                        self._handover.take_in(Record.of(message))
            self._handover.pump()
            await self._pace()
            if self._handover.failed.done():
                self._handover.failed.result()
            if fetched or self._handover.flow.oldest():
                heard = loop.time()
            elif loop.time() - heard > _QUIET_SECONDS:
                raise CommandError(
                    f"Kafka has sent nothing of {waiting} for {_QUIET_SECONDS:g} s, although there is more. Try again."
                )
            self._tell()
        self._tell()

    def _close_ends(self) -> None:
        for partition in list(self._open):
            if (end := self._consumer.highwater(partition)) is not None:
                self._ends[partition] = max(end, self._ends[partition])
                self._open.discard(partition)

    async def _unread(self) -> list[TopicPartition]:
        return [
            partition
            for partition, end in self._ends.items()
            if partition in self._open or await self._position(partition) < end
        ]

    async def _position(self, partition: TopicPartition) -> int:
        position: int = await self._consumer.position(partition)
        return position

    async def _pace(self) -> None:
        """Read no partition further whose window is full, or whose end is reached."""
        unread = set(await self._unread())
        full = {TopicPartition(*partition) for partition in self._handover.flow.full}
        held = (self._consumer.assignment() - unread) | full
        paused = self._consumer.paused()
        self._consumer.pause(*(held - paused))
        self._consumer.resume(*(paused - held))

    def _tell(self) -> None:
        frontiers = self._handover.flow.frontiers()
        done = sum(
            min(frontiers.get(Partition(*partition), start), self._ends[partition]) - start
            for partition, start in self._starts.items()
        )
        self._on_progress(done, sum(self._ends.values()) - sum(self._starts.values()))


async def _spans(consumer: AIOKafkaConsumer, stretch: Stretch) -> dict[TopicPartition, tuple[int, int]]:
    """From which to before which offset each partition is read, where there is anything to read."""
    numbers = {partition.partition for partition in consumer.assignment()}
    if stretch.partition is not None:
        if stretch.partition not in numbers:
            raise CommandError(
                f"{stretch.topic} has no partition {stretch.partition}; it has 0 to {max(numbers)}.", BAD_INPUT
            )
        numbers = {stretch.partition}
    elif len(numbers) > 1 and any(isinstance(place, int) for place in (stretch.start, stretch.end)):
        raise CommandError(
            f"{stretch.topic} has {len(numbers)} partitions, and an offset means another record in each: say which by "
            "--partition, or give a time.",
            BAD_INPUT,
        )
    spans: dict[TopicPartition, tuple[int, int]] = {}
    for number in sorted(numbers):
        partition = TopicPartition(stretch.topic, number)
        first, last = [await kafka.offset_at(consumer, partition, end) for end in _ENDS]
        start, end = [
            place if isinstance(place, int) else await kafka.offset_at(consumer, partition, place)
            for place in (stretch.start, stretch.end)
        ]
        start, end = max(start, first), min(last, end)
        if start < end or stretch.end == "latest":
            spans[partition] = (start, end)
    return spans


def place(text: str) -> Place:
    """What somebody means by `earliest`, `latest`, an offset such as `1200`, or a time such as `2026-11-01T08:00:00Z`.

    A time without a zone is UTC.

    Raises:
        CommandError: it is none of these.
    """
    for end in _ENDS:
        if text == end:
            return end
    if text.isdecimal():
        return int(text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise CommandError(
            f"{text!r} is no place in a topic: give earliest, latest, an offset, or a time such as "
            "2026-11-01T08:00:00Z.",
            BAD_INPUT,
        ) from error
    return at if at.tzinfo else at.replace(tzinfo=UTC)
