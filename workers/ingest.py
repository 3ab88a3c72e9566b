"""Ingest: from Kafka topics to agents' mailboxes. The thin shell around `records`, `flow`, `offsets` and `deadletter`.

    await Ingest(client, settings, specs).run(stop)

It polls, decodes, hands each agent its events as one signal-with-start, and commits what is durable: in Temporal, or in
the dead-letter topic. A record is dead-lettered for what is in it, never because a server is down, slow or over its
limits: then its partition waits, and polling goes on. Several processes share the topics as one consumer group.

It goes on by itself when a server comes back. It ends with `IngestError` when only a person or a restart can help.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from functools import partial

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError, MessageSizeTooLargeError
from temporalio.client import Client
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.service import RPCError, RPCStatusCode
from typing_extensions import override

from activities import metrics
from workers import exits, kafka, records, wiring
from workers.agent import specs_or_exit
from workers.deadletter import DeadLetter, DeadLetters
from workers.flow import Batch, Flow, Item, Limits, Part, Partition
from workers.offsets import Watchdog
from workers.records import Decoded, Reason, Record, Rejected, Routes
from workers.settings import Settings
from workflows import names
from workflows.events import Delivery, Event
from workflows.names import Address
from workflows.spec import AgentSpec
from workflows.state import AgentInput

log = logging.getLogger(__name__)

_POLL_MS = 200  # also how soon an agent's next delivery, and a request to stop, is noticed
_POLL_RECORDS = 200
_RPC_TIMEOUT = timedelta(seconds=10)
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0

# Giving partitions back takes a drain and a commit; a member that takes longer than the group waits loses them.
_REBALANCE_SECONDS = 15
_REVOKE_SECONDS = 5
_COMMIT_SECONDS = 0.9
_BACKOFF_SECONDS = 1.0  # longer than a commit may take, so that aiokafka never repeats one by itself, membership lost
_ANSWER_SECONDS = 3

_LOOK_AFTER_BYTES = 2 * 1024 * 1024
_LONG_HISTORY_BYTES = 16 * 1024 * 1024
_AGENTS_REMEMBERED = 10_000

_METADATA_SECONDS = 5  # how soon a topic or partition created later is noticed
_WATCH_SECONDS = 10
_LEAVE_SECONDS = 10
_MESSAGE_CHARACTERS = 1000


class IngestError(Exception):
    """Ingest can't go on; the message says why and what to do."""


class Verdict(Enum):
    """What Temporal's refusal of a delivery means."""

    RETRY = auto()
    """The server is away, busy or over its limits: the same delivery will be taken later."""
    REFUSED = auto()
    """The delivery itself is not acceptable."""
    STOP = auto()
    """Nothing we send will be accepted until somebody has changed the setup."""


_STOP = {
    RPCStatusCode.NOT_FOUND,
    RPCStatusCode.PERMISSION_DENIED,
    RPCStatusCode.UNAUTHENTICATED,
    RPCStatusCode.UNIMPLEMENTED,
}


def judge(error: RPCError) -> Verdict:
    """What to do about Temporal's refusal; whatever is not known to lie in the delivery is retried."""
    if error.status in _STOP:
        return Verdict.STOP
    if error.status == RPCStatusCode.RESOURCE_EXHAUSTED and "larger than max" in error.message:
        return Verdict.REFUSED  # gRPC's own limit on a message's size
    if error.status != RPCStatusCode.INVALID_ARGUMENT:
        return Verdict.RETRY
    if "signal events" in error.message or "history" in error.message.lower():
        return Verdict.RETRY  # of the run, not of the delivery: the agent is about to continue as new
    return Verdict.STOP if "search attribute" in error.message.lower() else Verdict.REFUSED


@dataclass(frozen=True)
class _Mail:
    record: Record
    event: Event


_Lane = Address | None  # an agent's, or the dead letters'
_Items = Sequence[Item[_Mail | DeadLetter]]


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
        self._client = client
        self._settings = settings
        self._kafka = kafka.reached_by(settings)
        self._routes = Routes(specs)
        self._limits = limits or Limits()
        self._flow: Flow[_Lane, _Mail | DeadLetter] = Flow(self._limits)
        self._tasks: dict[Batch[_Lane, _Mail | DeadLetter], asyncio.Task[None]] = {}
        self._resting: set[asyncio.Task[None]] = set()
        self._committed: dict[Partition, int] = {}
        self._handed: dict[Address, int] = {}
        """Bytes handed to each agent since its history was looked at."""
        self._watchdog = Watchdog(self._limits.patience_seconds)
        self._polled = 0.0
        self._temporal = _Outage(f"Temporal at {settings.temporal_address}")
        self._broker = _Outage(f"Kafka at {settings.kafka_bootstrap}")
        self._letters = DeadLetters(self._kafka)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then let what is in flight finish, commit, and leave the group.

        Raises:
            IngestError: going on makes no sense; the process is to exit with a status other than 0.
        """
        loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[None] = loop.create_future()
        consumer = await self._connect(stop)
        if consumer is None:
            return
        self._consumer = consumer
        self._polled = loop.time()
        work = [
            loop.create_task(self._poll(), name="poll"),
            loop.create_task(self._tend(), name="tend"),
            loop.create_task(_wait(stop), name="stop"),
            self._broken,
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
        delays = _delays()
        while True:
            consumer = AIOKafkaConsumer(
                **self._kafka.client(),
                group_id=settings.consumer_group,
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
                missing = self._routes.topics - await consumer.topics()
            except KafkaError as error:
                await consumer.stop()
                why = await self._denied()
                if not error.retriable:
                    raise IngestError(f"Kafka at {settings.kafka_bootstrap} refuses us: {error}") from error
                self._broker.began(why or error)
                await wiring.sleep_unless(stop, next(delays))
                if stop.is_set():
                    return None
                continue
            self._broker.ended()
            if missing:
                log.warning("These topics do not exist yet; their events are read once they do: %s", sorted(missing))
            # Subscribed only now: `start` would wait for an assignment without an end.
            consumer.subscribe(sorted(self._routes.topics), listener=_Listener(self))
            return consumer

    async def _denied(self) -> str | None:
        """Why Kafka may not let us in, where that is to be seen.

        Raises:
            IngestError: it does not, whenever we ask.
        """
        denial = await self._kafka.denial()
        if denial is None:
            return None
        if denial.final:
            raise IngestError(
                f"Kafka at {self._kafka.bootstrap} does not let us in: {denial.why}. Check the PERENNIAL_KAFKA_* "
                "settings; nothing is lost."
            )
        return denial.why

    async def _poll(self) -> None:
        """Read, also while all partitions are paused: a consumer that does not poll is put out of the group."""
        while True:
            try:
                fetched = await self._consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
            except KafkaError as error:
                if not error.retriable:
                    raise IngestError(f"Reading from Kafka has failed: {error!r}") from error
                self._broker.began(error)
                await asyncio.sleep(_FIRST_DELAY)
                continue
            self._polled = asyncio.get_running_loop().time()
            # From here to the pump nothing is awaited: what was read belongs to the present assignment.
            for partition, messages in fetched.items():
                metrics.events_received(partition.topic, len(messages))
                for message in messages:
                    self._take_in(Record.of(message))
            self._pump()

    def _take_in(self, record: Record) -> None:
        decoded = records.decode(record, max_bytes=self._limits.event_bytes)
        parts: list[Part[_Lane, _Mail | DeadLetter]] = []
        rejected: Rejected | None = None
        if isinstance(decoded, Decoded):
            route = self._routes.route(decoded.event, record.topic)
            rejected = route.rejected
            mail = _Mail(record, decoded.event)
            parts = [Part(address, mail, decoded.size) for address in route.addresses]
        else:
            rejected = decoded
        if rejected:
            parts.append(Part(None, self._letter(record, rejected), record.size))
        if not parts:
            metrics.skipped(record.topic)
        self._flow.add(Partition(record.topic, record.partition), record.offset, record.size, parts)

    def _pump(self) -> None:
        """Start what may start, and pause and resume partitions accordingly."""
        loop = asyncio.get_running_loop()
        while batch := self._flow.take(loop.time()):
            task = self._tasks[batch] = loop.create_task(self._hand_over(batch))
            task.add_done_callback(partial(self._handed_over, batch))
        metrics.in_flight(self._flow.in_flight)
        paused = self._consumer.paused()
        full = _kafka(self._flow.full) & self._consumer.assignment()
        self._consumer.pause(*(full - paused))
        self._consumer.resume(*(paused - full))

    async def _tend(self) -> None:
        loop = asyncio.get_running_loop()
        watched = loop.time()
        while True:
            await asyncio.sleep(self._limits.commit_seconds)
            await self._commit()
            for partition, position in self._flow.frontiers().items():
                end = self._consumer.highwater(TopicPartition(*partition))
                if end is not None:
                    metrics.ingest_lag(*partition, max(0, end - position))
            if loop.time() - watched >= min(_WATCH_SECONDS, self._limits.patience_seconds / 3):
                watched = loop.time()
                await self._watch()

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
            log.info(
                "The group has rebalanced before %d offsets were committed; their records come again", len(offsets)
            )
        except (KafkaError, TimeoutError) as error:
            self._broker.began(error)
        else:
            self._broker.ended()
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
            await self._denied()  # a password that was changed is not an outage
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
        await self._drain(partitions, _REVOKE_SECONDS)
        await self._commit()
        self.assigned(partitions)

    def assigned(self, partitions: Collection[Partition]) -> None:
        """Partitions are ours, from their committed offset on."""
        self._flow.forget(partitions)
        for partition in partitions:
            self._committed.pop(partition, None)
        self._watchdog.reset()

    async def _drain(self, partitions: Collection[Partition], seconds: float) -> None:
        """Let deliveries with events of these partitions finish; give up those that wait for a server anyway."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        tasks = {self._tasks[batch] for batch in self._flow.batches(partitions)}
        while tasks and loop.time() < deadline:
            for task in tasks & self._resting:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=_FIRST_DELAY)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _leave(self) -> None:
        ours = self._flow.frontiers().keys()
        self._flow.hold(ours)
        await self._drain(ours, self._settings.drain_seconds)
        await self._commit()
        for leave in (self._consumer.stop(), self._letters.aclose()):
            # Waited for, not awaited: aiokafka's stop can hang, and with the broker away ends as if we were cancelled.
            leaving = asyncio.ensure_future(leave)
            await asyncio.wait([leaving], timeout=_LEAVE_SECONDS)
            if not leaving.done():
                leaving.cancel()
                log.warning("Leaving Kafka takes more than %d s, the process ends all the same", _LEAVE_SECONDS)
            elif not leaving.cancelled() and (error := leaving.exception()):
                log.warning("Leaving Kafka has failed, the process ends all the same: %r", error)

    # Temporal and the dead-letter topic.

    async def _hand_over(self, batch: Batch[_Lane, _Mail | DeadLetter]) -> None:
        if batch.lane is None:
            await self._bury(batch.items)
        else:
            await self._deliver(batch.lane, batch.items)

    def _handed_over(self, batch: Batch[_Lane, _Mail | DeadLetter], task: asyncio.Task[None]) -> None:
        del self._tasks[batch]
        self._flow.release(batch, asyncio.get_running_loop().time())
        error = None if task.cancelled() else task.exception()
        if error is None:
            self._pump()
        elif self._broken.done():
            log.error("While ending: %s", error)
        else:
            self._broken.set_exception(error)

    async def _deliver(self, address: Address, items: _Items) -> None:
        """Make these events durable in Temporal, however long it takes, or dead-letter one it will never take."""
        mail = [item.content for item in items if isinstance(item.content, _Mail)]
        loop = asyncio.get_running_loop()
        since = datetime.now(UTC)
        await self._let_it_catch_up(address)
        for tries, delay in enumerate(_delays(), 1):
            started = loop.time()
            try:
                await self._signal(address, [letter.event for letter in mail])
            except RPCError as error:
                verdict = judge(error)
                if verdict is Verdict.STOP:
                    raise IngestError(
                        f"Temporal at {self._settings.temporal_address}, namespace {self._client.namespace!r}, refuses "
                        f"us: {error.message} ({error.status.name}). Check the address, the namespace, the API key and "
                        "the search attributes."
                    ) from error
                if verdict is Verdict.REFUSED:
                    await self._divide(address, items, error, tries, since)
                    return
                self._temporal.began(error)
                await self._rest(delay)
            else:
                break
        self._temporal.ended()
        self._flow.finish(items)
        self._handed[address] = self._handed.get(address, 0) + sum(item.size for item in items)
        metrics.delivery(len(mail), loop.time() - started)
        for letter in mail:
            metrics.events_accepted(letter.record.topic)

    async def _let_it_catch_up(self, address: Address) -> None:
        """Wait while an agent's run is long already: Temporal ends a run, and its mail, whose history has 50 MB.

        An agent can't begin a new run while it waits for a model or a tool. Its partition fills up and waits, too.
        """
        if self._handed.get(address, 0) < _LOOK_AFTER_BYTES:
            return
        handle = self._client.get_workflow_handle(names.workflow_id(address))
        for delay in _delays():
            try:
                about = await handle.describe(rpc_timeout=_RPC_TIMEOUT)
            except RPCError:
                break  # the delivery itself will tell
            run = about.raw_description.workflow_execution_info
            if run.history_size_bytes < _LONG_HISTORY_BYTES or about.close_time:
                break
            await self._rest(delay)
        if len(self._handed) > _AGENTS_REMEMBERED:
            self._handed.clear()
        self._handed.pop(address, None)

    async def _signal(self, address: Address, events: list[Event]) -> None:
        await self._client.start_workflow(
            names.WORKFLOW_TYPE,
            AgentInput(),
            **wiring.start_options(address, self._settings.task_queue),
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            start_signal=names.DELIVER,
            start_signal_args=[Delivery(events=events)],
            rpc_timeout=_RPC_TIMEOUT,
        )

    async def _divide(self, address: Address, items: _Items, error: RPCError, tries: int, since: datetime) -> None:
        """A delivery is refused: find the event that is to blame, and dead-letter that one alone."""
        if len(items) > 1:
            half = len(items) // 2
            await self._deliver(address, items[:half])
            await self._deliver(address, items[half:])
            return
        rejected = Rejected(Reason.REFUSED, f"Temporal refuses the event: {error.message} ({error.status.name})")
        for item in items:
            if isinstance(item.content, _Mail):
                item.content = self._letter(item.content.record, rejected, since=since, tries=tries)
        await self._bury(items)

    async def _bury(self, items: _Items) -> None:
        """Make these dead letters durable in their topic, however long it takes."""
        letters = [item.content for item in items if isinstance(item.content, DeadLetter)]
        for delay in _delays():
            try:
                await self._letters.write(letters)
            except MessageSizeTooLargeError as error:
                log.error(  # noqa: TRY400  # the operator needs the sentence, not our stack
                    "The broker refuses a dead letter as too large; its partition waits. Raise max.message.bytes of %s "
                    "above that of the topics read: %s",
                    names.DEAD_LETTER_TOPIC,
                    error,
                )
                await self._rest(delay)
            except KafkaError as error:
                self._broker.began(await self._denied() or error)
                await self._rest(delay)
            else:
                break
        self._broker.ended()
        self._flow.finish(items)
        for letter in letters:
            metrics.dead_letter(letter.reason)
            origin = letter.original
            log.warning(
                "dead letter: %s/%d at offset %d: %s (%s)",
                origin.topic,
                origin.partition,
                origin.offset,
                letter.message,
                letter.reason,
            )

    def _letter(
        self, record: Record, rejected: Rejected, *, since: datetime | None = None, tries: int = 1
    ) -> DeadLetter:
        now = datetime.now(UTC)
        return DeadLetter(
            original=record,
            group=self._settings.consumer_group,
            reason=rejected.reason,
            message=rejected.message[:_MESSAGE_CHARACTERS],
            attempts=tries,
            first_failed=since or now,
            last_failed=now,
        )

    async def _rest(self, seconds: float) -> None:
        """Wait before the next try; a drain need not wait for that."""
        task = asyncio.current_task()
        assert task is not None
        self._resting.add(task)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._resting.discard(task)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no type hints
    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest

    @override
    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await self._ingest.revoked([Partition(*partition) for partition in revoked])

    @override
    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        log.info("assigned: %s", sorted(f"{partition.topic}/{partition.partition}" for partition in assigned))
        metrics.assigned(len(assigned))
        self._ingest.assigned([Partition(*partition) for partition in assigned])


class _Outage:
    """Says once that a server is away, and once that it is back."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._away = False

    def began(self, error: Exception | str) -> None:
        if not self._away:
            why = error if isinstance(error, str) else repr(error)
            log.warning("%s does not take our requests; waiting and trying again: %s", self._server, why)
        self._away = True

    def ended(self) -> None:
        if self._away:
            log.info("%s takes our requests again", self._server)
        self._away = False


def _kafka(partitions: Collection[Partition]) -> set[TopicPartition]:
    return {TopicPartition(*partition) for partition in partitions}


def _delays() -> Iterator[float]:
    """Seconds to wait before each further try: exponential, capped, with jitter."""
    longest = _FIRST_DELAY
    while True:
        yield random.uniform(longest / 2, longest)  # noqa: S311  # spreads load, guards nothing
        longest = min(2 * longest, _LONGEST_DELAY)


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
