"""Ingest: from Kafka topics to agents' mailboxes, as one member of a consumer group.

    await Ingest(client, settings, specs).run(stop)

It polls, gives records to a `Handover`, and commits what that has made durable: in Temporal, or in the dead-letter
topic. While a server is away its partitions wait, and polling goes on. Several processes share the topics as one group.

It goes on by itself when a server comes back. It ends with `IngestError` when only a person or a restart can help.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from temporalio.client import Client
from typing_extensions import override

from activities import metrics
from workers import exits, kafka, wiring
from workers.agent import specs_or_exit
from workers.flow import Limits, Partition
from workers.handover import FIRST_DELAY, Handover, IngestError, delays
from workers.offsets import Watchdog
from workers.records import Record, Routes
from workers.settings import Settings
from workflows.spec import AgentSpec

log = logging.getLogger(__name__)

_POLL_MS = 200  # also how soon an agent's next delivery, and a request to stop, is noticed
_POLL_RECORDS = 200

# Giving partitions back takes a drain and a commit; a member that takes longer than the group waits loses them.
_REBALANCE_SECONDS = 15
_REVOKE_SECONDS = 5
_COMMIT_SECONDS = 0.9
_BACKOFF_SECONDS = 1.0  # longer than a commit may take, so that aiokafka never repeats one by itself, membership lost
_ANSWER_SECONDS = 3
_BEGIN_SECONDS = 10

_METADATA_SECONDS = 5  # how soon a topic or partition created later is noticed
_WATCH_SECONDS = 10
_LEAVE_SECONDS = 10
_NAMESAKE_JOINS = 5
_NAMESAKE_SECONDS = 120


class Ingest:
    """One member of the consumer group.

    Args:
        client: Temporal's, with the pydantic data converter.
        settings: Kafka's addresses, the consumer group, the agents' task queue.
        specs: the agents, for their subscriptions.
        limits: how much is taken on at once, and the pace.
    """

    def __init__(
        self,
        client: Client,
        settings: Settings,
        specs: Sequence[AgentSpec],
        *,
        limits: Limits | None = None,
    ) -> None:
        self._settings = settings
        self._limits = limits or Limits()
        self._kafka = kafka.reached_by(settings)
        self._routes = Routes(specs)
        self._handover = Handover(client, settings, self._routes, self._limits, on_room=self._pace)
        self._flow = self._handover.flow
        self._committed: dict[Partition, int] = {}
        self._members: deque[tuple[float, str]] = deque(maxlen=_NAMESAKE_JOINS)
        """When the group took us for which member."""
        self._beginning: set[TopicPartition] = set()
        """Partitions of which it is not known yet where to begin."""
        self._watchdog = Watchdog(self._limits.patience_seconds)
        self._polled = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then let what is in flight finish, commit, and leave the group.

        Raises:
            IngestError: going on makes no sense; the process is to exit with a status other than 0.
        """
        loop = asyncio.get_running_loop()
        consumer = await self._connect(stop)
        if consumer is None:
            return
        self._consumer = consumer
        self._polled = loop.time()
        work = [
            loop.create_task(self._poll(), name="poll"),
            loop.create_task(self._tend(), name="tend"),
            loop.create_task(_wait(stop), name="stop"),
            self._handover.failed,
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in work:
                task.cancel()
            await asyncio.wait(work)
            await self._leave()
        for task in done:
            task.result()

    # Kafka: poll, pause, commit.

    async def _connect(self, stop: asyncio.Event) -> AIOKafkaConsumer | None:
        settings = self._settings
        waits = delays()
        while True:
            consumer = AIOKafkaConsumer(
                **self._kafka.client(),
                group_id=settings.consumer_group,
                group_instance_id=settings.kafka_instance_id,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                session_timeout_ms=int(self._limits.session_seconds * 1000),
                heartbeat_interval_ms=int(self._limits.session_seconds * 200),
                rebalance_timeout_ms=_REBALANCE_SECONDS * 1000,
                metadata_max_age_ms=_METADATA_SECONDS * 1000,
                retry_backoff_ms=int(_BACKOFF_SECONDS * 1000),
            )
            try:
                await consumer.start()
                kafka.heed_refusals(consumer)
                missing = self._routes.topics - await consumer.topics()
            except KafkaError as error:
                await consumer.stop()
                why = await self._handover.denied()
                if not error.retriable:
                    raise IngestError(f"Kafka at {settings.kafka_bootstrap} refuses us: {error}") from error
                self._handover.broker.began(why or error)
                await wiring.sleep_unless(stop, next(waits))
                if stop.is_set():
                    return None
                continue
            self._handover.broker.ended()
            if missing:
                log.warning("These topics do not exist yet; their events are read once they do: %s", sorted(missing))
            # Subscribed only now: `start` would wait for an assignment without an end.
            consumer.subscribe(sorted(self._routes.topics), listener=_Listener(self))
            return consumer

    async def _poll(self) -> None:
        """Read, also while all partitions are paused: a consumer that does not poll is put out of the group."""
        while True:
            try:
                fetched = await self._consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
            except KafkaError as error:
                if not error.retriable:
                    # What is newer than aiokafka is "unknown" to it, such as that we are fenced.
                    named = self._settings.kafka_instance_id and "UnknownError" in str(error)
                    raise IngestError(
                        self._namesake if named else f"Reading from Kafka has failed: {error!r}"
                    ) from error
                self._handover.broker.began(error)
                await asyncio.sleep(FIRST_DELAY)
                continue
            self._polled = asyncio.get_running_loop().time()
            # From here to the pump nothing is awaited: what was read belongs to the present assignment.
            for partition, messages in fetched.items():
                metrics.events_received(partition.topic, len(messages))
                for message in messages:
                    self._handover.take_in(Record.of(message))
            self._pump()

    def _pump(self) -> None:
        """Start what may start, and pause and resume partitions accordingly."""
        self._handover.pump()
        self._pace()

    def _pace(self) -> None:
        assigned = self._consumer.assignment()
        paused = self._consumer.paused()
        held = (_kafka(self._flow.full) | self._beginning) & assigned
        self._consumer.pause(*(held - paused))
        self._consumer.resume(*(paused - held))

    async def _tend(self) -> None:
        loop = asyncio.get_running_loop()
        watched = tended = loop.time()
        while True:
            await asyncio.sleep(self._limits.commit_seconds)
            await self._commit()
            self._tell(loop.time() - tended)
            tended = loop.time()
            if tended - watched >= min(_WATCH_SECONDS, self._limits.patience_seconds / 3):
                watched = tended
                await self._watch()

    def _tell(self, seconds: float) -> None:
        """How far behind we are; and how long, of the time since this was last asked, was spent pausing."""
        oldest = self._flow.oldest()
        for partition, position in self._flow.frontiers().items():
            end = self._consumer.highwater(TopicPartition(*partition))
            if end is not None:
                metrics.ingest_lag(*partition, max(0, end - position))
            metrics.oldest_unacknowledged(*partition, oldest.get(partition))
        for partition in self._consumer.paused():
            metrics.paused(partition.topic, seconds)

    async def _commit(self) -> None:
        """Commit what is finished without a gap, of the partitions that are ours."""
        assigned = self._consumer.assignment()
        offsets = {
            TopicPartition(*partition): position
            for partition, position in self._flow.frontiers().items()
            if partition in assigned and self._committed.get(partition) != position
        }
        # A commit by nobody in particular is not refused by a broker that has lost its memory: it would take our old
        # offsets for its new topics. aiokafka has no other way to ask whether we are a member.
        group = self._consumer._coordinator  # noqa: SLF001
        if not offsets or not group.member_id or group.coordinator_id is None:
            return
        try:
            async with asyncio.timeout(_COMMIT_SECONDS):
                await self._consumer.commit(offsets)
        except (CommitFailedError, IllegalStateError):
            metrics.commit_failed("rebalanced")
            log.info(
                "The group has rebalanced before %d offsets were committed; their records come again", len(offsets)
            )
        except (KafkaError, TimeoutError) as error:
            metrics.commit_failed("unavailable")
            self._handover.broker.began(error)
        else:
            self._handover.broker.ended()
            self._committed.update(offsets)

    async def _watch(self) -> None:
        """End when Kafka answers, and yet we have not been at the end of a partition, nor moved, for long."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                assigned = self._consumer.assignment()
                await self._consumer.topics()  # does it answer at all?
                ends = await self._consumer.end_offsets(assigned) if assigned else {}
        except (KafkaError, TimeoutError):
            await self._handover.denied()  # a password that was changed is not an outage
            self._watchdog.reset()
            self._polled = loop.time()
            return
        stuck = [f"{partition.topic}/{partition.partition}" for partition in ends if await self._stuck(partition, ends)]
        if loop.time() - self._polled >= self._limits.patience_seconds:
            stuck.append("the group: the consumer does not come back from joining it")
        if stuck:
            raise IngestError(
                f"Kafka answers, but for {self._limits.patience_seconds:.0f} s nothing was read where records wait, or "
                f"the topic was created anew: {', '.join(stuck)}. Start this process again."
            )

    async def _stuck(self, partition: TopicPartition, ends: Mapping[TopicPartition, int]) -> bool:
        position: int | None = None
        try:
            async with asyncio.timeout(1):
                position = await self._consumer.position(partition)
            # The embedded broker's answer to "where is the end" lags behind what it sends along with records.
            end = max(ends[partition], self._consumer.highwater(partition) or 0)
            held = partition in self._consumer.paused()
        except TimeoutError:
            end, held = ends[partition], False
        except (IllegalStateError, AssertionError):
            return False  # no longer ours
        now = asyncio.get_running_loop().time()
        return self._watchdog.stuck(partition, position=position, end=end, held=held, now=now)

    async def revoked(self, partitions: Collection[Partition]) -> None:
        """Partitions go to another member: finish what is in flight, commit, and forget the rest."""
        self._flow.hold(partitions)
        await self._handover.drain(partitions, _REVOKE_SECONDS)
        await self._commit()
        self._forget(partitions)

    async def assigned(self, partitions: Collection[Partition]) -> None:
        """Partitions are ours, from their committed offset on; where there is none, from where their topic starts."""
        self._forget(partitions)
        self._look_for_namesakes()
        self._beginning = {tp for tp in _kafka(partitions) if self._routes.start(tp.topic) != "earliest"}
        self._pace()  # before anything is awaited: aiokafka begins at the first record meanwhile
        try:
            async with asyncio.timeout(_BEGIN_SECONDS):
                for partition in self._beginning:
                    if await self._consumer.committed(partition) is None:
                        start = self._routes.start(partition.topic)
                        self._consumer.seek(partition, await kafka.offset_at(self._consumer, partition, start))
        except (KafkaError, TimeoutError) as error:
            self._handover.fail(f"Kafka does not say where topics start ({error!r}). Start this process again.")
            return
        self._beginning = set()
        self._pace()

    def _look_for_namesakes(self) -> None:
        """End when another member with our name pushes us out of the group again and again; and we it.

        Kafka tells a client that it is fenced; aiokafka asks in a way that is too old for that (Heartbeat v1).
        """
        member = str(self._consumer._coordinator.member_id)  # noqa: SLF001  # as in `_commit`
        if self._settings.kafka_instance_id is None or (self._members and self._members[-1][1] == member):
            return
        self._members.append((asyncio.get_running_loop().time(), member))
        if len(self._members) == _NAMESAKE_JOINS and self._members[-1][0] - self._members[0][0] < _NAMESAKE_SECONDS:
            self._handover.fail(self._namesake)

    @property
    def _namesake(self) -> str:
        return (
            f"Another ingest worker bears the name {self._settings.kafka_instance_id!r} in the group "
            f"{self._settings.consumer_group!r}. Give each a PERENNIAL_KAFKA_INSTANCE_ID of its own."
        )

    def _forget(self, partitions: Collection[Partition]) -> None:
        self._flow.forget(partitions)
        for partition in partitions:
            self._committed.pop(partition, None)
            metrics.not_ours(*partition)
        self._watchdog.reset()

    async def _leave(self) -> None:
        ours = self._flow.frontiers().keys()
        self._flow.hold(ours)
        await self._handover.drain(ours, self._settings.drain_seconds)
        await self._commit()
        for leave in (self._consumer.stop(), self._handover.aclose()):
            # Waited for, not awaited: aiokafka's stop can hang, and with the broker away ends as if we were cancelled.
            leaving = asyncio.ensure_future(leave)
            await asyncio.wait([leaving], timeout=_LEAVE_SECONDS)
            if not leaving.done():
                leaving.cancel()
                log.warning("Leaving Kafka takes more than %d s, the process ends all the same", _LEAVE_SECONDS)
            elif not leaving.cancelled() and (error := leaving.exception()):
                log.warning("Leaving Kafka has failed, the process ends all the same: %r", error)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no type hints
    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest

    @override
    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await self._ingest.revoked([Partition(*partition) for partition in revoked])

    @override
    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        log.info("assigned: %s", sorted(f"{partition.topic}/{partition.partition}" for partition in assigned))
        metrics.rebalanced(len(assigned))
        await self._ingest.assigned([Partition(*partition) for partition in assigned])


def _kafka(partitions: Collection[Partition]) -> set[TopicPartition]:
    return {TopicPartition(*partition) for partition in partitions}


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def main(settings: Settings, stop: asyncio.Event) -> None:
    """Run until asked to stop; then finish what is in flight, commit, and leave the group.

    Raises:
        SystemExit: a spec is wrong (status 2), or ingest can't go on (status 1).
    """
    specs = specs_or_exit(settings)
    runtime = wiring.start_metrics(settings)
    client = await wiring.connect_patiently(settings, stop, runtime=runtime)
    if client is None:
        return
    await wiring.ensure_search_attributes(client)
    try:
        limits = Limits(session_seconds=settings.kafka_session_seconds)
        await Ingest(client, settings, specs.agents, limits=limits).run(stop)
    except IngestError as error:
        log.critical("%s", error)
        raise SystemExit(exits.FAILED) from error
