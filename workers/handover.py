"""From records to agents' mailboxes: decode, hand over to Temporal, dead-letter; and what may be in flight at once.

    handover = Handover(client, settings, routes, limits)
    handover.take_in(record); handover.pump()       # as records are read
    handover.flow.full, handover.flow.frontiers()   # whom to pause, what to commit
    await handover.failed                           # raises `IngestError`
    await handover.drain(partitions, seconds)

A delivery is made for as long as it takes. A record is dead-lettered for what is in it, never because a server is down,
slow or over its limits. Where records come from is not known here: `ingest` reads as a member of a group, `replay` a
stretch of a topic.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from functools import partial

from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from activities import metrics
from workers import kafka, records, wiring
from workers.deadletter import DeadLetter, DeadLetters, filling, first_origin
from workers.flow import Batch, Flow, Item, Limits, Part, Partition
from workers.records import Decoded, Reason, Record, Rejected, Routes
from workers.settings import Settings
from workflows import names
from workflows.events import Event, hold
from workflows.names import Address

log = logging.getLogger(__name__)

FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0

_LOOK_AFTER_BYTES = 2 * 1024 * 1024
_LONG_HISTORY_BYTES = 16 * 1024 * 1024
_AGENTS_REMEMBERED = 10_000

_MESSAGE_CHARACTERS = 1000
_HOLD_BYTES = 2000


class IngestError(Exception):
    """Events can't be handed over; the message says why and what to do."""


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


@dataclass(frozen=True)
class _Refusal:
    """Temporal will never take a delivery."""

    error: RPCError
    tries: int
    since: datetime


_Lane = Address | None  # an agent's, or the dead letters'
_Content = _Mail | DeadLetter
_Items = Sequence[Item[_Content]]

Known = Callable[[Address, Sequence[Event]], Awaitable[Collection[str]]]
"""The digests of those of an agent's events that it need not be handed."""


@dataclass
class Counts:
    """What became of the records so far; an event for two agents counts twice."""

    read: int = 0
    skipped: int = 0
    """Records that no agent wants."""
    rejected: int = 0
    """Records with something in them that could not be understood."""
    known: int = 0
    """Events that were not handed over, since they are known."""
    accepted: int = 0
    """Events that are durable in Temporal."""


class Handover:
    """From records to mailboxes, and what is in flight.

    Args:
        client: Temporal's, with the pydantic data converter.
        settings: Kafka's addresses, the agents' task queue.
        routes: whom events are for.
        limits: how much is taken on at once, and the pace.
        on_room: called when something has been handed over.
        known: for a replay; asked before each delivery for events that are to be left out. Rejected records are left
            alone then, and where subscriptions start does not matter.
    """

    def __init__(  # noqa: PLR0913  # what a process shares, and what `replay` does otherwise
        self,
        client: Client,
        settings: Settings,
        routes: Routes,
        limits: Limits,
        *,
        on_room: Callable[[], None] = lambda: None,
        known: Known | None = None,
    ) -> None:
        self.flow: Flow[_Lane, _Content] = Flow(limits)
        self.counts = Counts()
        self.broker = Outage(f"Kafka at {settings.kafka_bootstrap}")
        self.temporal = Outage(f"Temporal at {settings.temporal_address}")
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends with an exception when nothing can be handed over any more."""
        self._client = client
        self._settings = settings
        self._kafka = kafka.reached_by(settings)
        self._routes = routes
        self._limits = limits
        self._on_room = on_room
        self._known = known
        self._letters = DeadLetters(self._kafka)
        self._tasks: dict[Batch[_Lane, _Content], asyncio.Task[None]] = {}
        self._resting: set[asyncio.Task[None]] = set()
        self._handed: dict[Address, int] = {}
        """Bytes handed to each agent since its history was looked at."""

    def take_in(self, record: Record) -> None:
        """Decode a record, and queue it for whom it is for."""
        self.counts.read += 1
        decoded = records.decode(record, max_bytes=self._limits.event_bytes)
        event = decoded.event if isinstance(decoded, Decoded) else None
        written = -1 if self._known else record.timestamp
        route = self._routes.route(event, record.topic, written) if event else None
        rejected = route.rejected if route else decoded
        parts: list[Part[_Lane, _Content]] = []
        if route and isinstance(decoded, Decoded):
            mail = _Mail(record, filling(decoded.event, record))
            parts = [Part(address, mail, decoded.size) for address in route.addresses]
        if isinstance(rejected, Rejected):
            parts += self._rejected(record, rejected, self._routes.held(record, event))
        elif not parts:
            self.counts.skipped += 1
            metrics.skipped(record.topic)
        self.flow.add(Partition(record.topic, record.partition), record.offset, record.size, parts, record.timestamp)

    def _rejected(self, record: Record, rejected: Rejected, held: Sequence[Address]) -> list[Part[_Lane, _Content]]:
        """A dead letter, and for each agent whose order is strict a hold in its place."""
        self.counts.rejected += 1
        if self._known:
            return []
        holding = _Mail(record, _hold(record, rejected))
        parts: list[Part[_Lane, _Content]] = [Part(address, holding, _HOLD_BYTES) for address in held]
        return [*parts, Part(None, self._letter(record, rejected, held), record.size)]

    def pump(self) -> None:
        """Start what may start."""
        loop = asyncio.get_running_loop()
        while batch := self.flow.take(loop.time()):
            task = self._tasks[batch] = loop.create_task(self._hand_over(batch))
            task.add_done_callback(partial(self._handed_over, batch))
        metrics.in_flight(self.flow.in_flight)

    async def drain(self, partitions: Collection[Partition], seconds: float) -> None:
        """Let deliveries with events of these partitions finish; give up those that wait for a server anyway."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        tasks = {self._tasks[batch] for batch in self.flow.batches(partitions)}
        while tasks and loop.time() < deadline:
            for task in tasks & self._resting:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=FIRST_DELAY)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def fail(self, why: str) -> None:
        """Let nothing more be handed over."""
        if not self.failed.done():
            self.failed.set_exception(IngestError(why))

    async def aclose(self) -> None:
        """Leave the broker."""
        await self._letters.aclose()

    async def _hand_over(self, batch: Batch[_Lane, _Content]) -> None:
        if batch.lane is None:
            await self._bury(batch.items)
        else:
            await self._deliver(batch.lane, batch.items)

    def _handed_over(self, batch: Batch[_Lane, _Content], task: asyncio.Task[None]) -> None:
        del self._tasks[batch]
        self.flow.release(batch, asyncio.get_running_loop().time())
        error = None if task.cancelled() else task.exception()
        if error is None:
            self.pump()
            self._on_room()
        elif self.failed.done():
            log.error("While ending: %s", error)
        else:
            self.failed.set_exception(error)

    async def _deliver(self, address: Address, items: _Items) -> None:
        """Make these events durable in Temporal, or dead-letter one it will never take."""
        mail = await self._unknown(address, [item.content for item in items if isinstance(item.content, _Mail)])
        refusal = await self._persist(address, [letter.event for letter in mail]) if mail else None
        if refusal:
            await self._divide(address, items, refusal)
            return
        self.flow.finish(items)
        self._handed[address] = self._handed.get(address, 0) + sum(item.size for item in items)
        for letter in mail:
            if letter.event.type != names.HOLD_TYPE:
                self.counts.accepted += 1
                metrics.events_accepted(letter.record.topic)

    async def _unknown(self, address: Address, mail: list[_Mail]) -> list[_Mail]:
        if self._known is None:
            return mail
        known = await self._known(address, [letter.event for letter in mail])
        unknown = [letter for letter in mail if letter.event.digest not in known]
        self.counts.known += len(mail) - len(unknown)
        return unknown

    async def _persist(self, address: Address, events: list[Event]) -> _Refusal | None:
        """Make these durable in Temporal, however long it takes; why not, if it will never take them."""
        loop = asyncio.get_running_loop()
        since = datetime.now(UTC)
        await self._let_it_catch_up(address)
        for tries, delay in enumerate(delays(), 1):
            started = loop.time()
            try:
                await wiring.deliver(self._client, self._settings.task_queue, address, events)
            except RPCError as error:
                metrics.delivery_failed(error.status.name)
                verdict = judge(error)
                if verdict is Verdict.STOP:
                    raise IngestError(
                        f"Temporal at {self._settings.temporal_address}, namespace {self._client.namespace!r}, refuses "
                        f"us: {error.message} ({error.status.name}). Check the address, the namespace, the API key and "
                        "the search attributes."
                    ) from error
                if verdict is Verdict.REFUSED:
                    return _Refusal(error, tries, since)
                self.temporal.began(error)
                await self._rest(delay)
            else:
                break
        self.temporal.ended()
        metrics.delivery(len(events), loop.time() - started)
        return None

    async def _let_it_catch_up(self, address: Address) -> None:
        """Wait while an agent's run is long already: Temporal ends a run, and its mail, whose history has 50 MB.

        An agent can't begin a new run while it waits for a model or a tool. Its partition fills up and waits, too.
        """
        if self._handed.get(address, 0) < _LOOK_AFTER_BYTES:
            return
        handle = self._client.get_workflow_handle(names.workflow_id(address))
        for delay in delays():
            try:
                about = await handle.describe(rpc_timeout=wiring.RPC_TIMEOUT)
            except RPCError:
                break  # the delivery itself will tell
            run = about.raw_description.workflow_execution_info
            if run.history_size_bytes < _LONG_HISTORY_BYTES or about.close_time:
                break
            await self._rest(delay)
        if len(self._handed) > _AGENTS_REMEMBERED:
            self._handed.clear()
        self._handed.pop(address, None)

    async def _divide(self, address: Address, items: _Items, refusal: _Refusal) -> None:
        """A delivery is refused: find the event that is to blame, and dead-letter that one alone."""
        if len(items) > 1:
            half = len(items) // 2
            await self._deliver(address, items[:half])
            await self._deliver(address, items[half:])
            return
        why = f"Temporal refuses the event: {refusal.error.message} ({refusal.error.status.name})"
        rejected = Rejected(Reason.REFUSED, why)
        held = [address] if self._routes.is_strict(address) else []
        for item in items:
            if isinstance(item.content, _Mail):
                record = item.content.record
                if held and not self._known:
                    await self._persist(address, [_hold(record, rejected)])
                item.content = self._letter(record, rejected, held, refusal)
        await self._bury(items)

    async def _bury(self, items: _Items) -> None:
        """Make these dead letters durable in their topic, however long it takes."""
        letters = [item.content for item in items if isinstance(item.content, DeadLetter) and not self._known]
        for delay in delays():
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
                self.broker.began(await self.denied() or error)
                await self._rest(delay)
            else:
                break
        self.broker.ended()
        self.flow.finish(items)
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

    async def denied(self) -> str | None:
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

    def _letter(
        self, record: Record, rejected: Rejected, held: Sequence[Address], refusal: _Refusal | None = None
    ) -> DeadLetter:
        now = datetime.now(UTC)
        return DeadLetter(
            original=record,
            group=self._settings.consumer_group,
            reason=rejected.reason,
            message=rejected.message[:_MESSAGE_CHARACTERS],
            held=tuple(map(names.workflow_id, held)),
            attempts=refusal.tries if refusal else 1,
            first_failed=refusal.since if refusal else now,
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


def _hold(record: Record, rejected: Rejected) -> Event:
    return hold(first_origin(record), f"{rejected.message[:_MESSAGE_CHARACTERS]} ({rejected.reason})")


class Outage:
    """Says once that a server is away, and once that it is back."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.away = False

    def began(self, error: Exception | str) -> None:
        """A request was not taken."""
        if not self.away:
            why = error if isinstance(error, str) else repr(error)
            log.warning("%s does not take our requests; waiting and trying again: %s", self._server, why)
        self.away = True

    def ended(self) -> None:
        """A request was taken."""
        if self.away:
            log.info("%s takes our requests again", self._server)
        self.away = False


def delays() -> Iterator[float]:
    """Seconds to wait before each further try: exponential, capped, with jitter."""
    longest = FIRST_DELAY
    while True:
        yield random.uniform(longest / 2, longest)  # noqa: S311  # spreads load, guards nothing
        longest = min(2 * longest, _LONGEST_DELAY)
