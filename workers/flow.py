"""What ingest does next: the queues of agents, deliveries, windows and offsets. Pure; the clock is an argument.

A record comes in as parts, each for one lane: an agent's, or the dead letters'. Of each lane one batch at a time is in
flight, and what waits meanwhile is coalesced into the next one. A record is finished when all its parts are.

    flow.add(partition, offset, size, parts)      # read from Kafka
    while batch := flow.take(now): ...            # hand it over, outside
    flow.finish(batch.items)                      # durable
    flow.release(batch, now)                      # the lane is free; what is unfinished goes back to its front
    flow.full, flow.frontiers()                   # whom to pause, what to commit
    flow.hold(revoked); ...; flow.forget(revoked)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from workers.offsets import Frontier

L = TypeVar("L", bound=Hashable)
C = TypeVar("C")


class Partition(NamedTuple):
    """A partition of a topic; equal to aiokafka's TopicPartition of the same values."""

    topic: str
    partition: int


@dataclass(frozen=True)
class Limits:
    """How much ingest takes on at once, and its pace. Memory is bounded by the windows times the partitions."""

    event_bytes: int = 256 * 1024
    """An event larger than this, as it travels in a Temporal signal, is dead-lettered."""
    window_records: int = 500
    """Records read past the committed offset, per partition (and one poll more): what a restart delivers again, so it
    stays below the ids an agent remembers (`MailboxSpec.remember_ids`)."""
    window_bytes: int = 8 * 1024 * 1024
    """Bytes of records read and not yet finished, per partition (and one poll more)."""
    delivery_events: int = 100
    """Events in one delivery."""
    delivery_bytes: int = 512 * 1024
    """Bytes of one delivery of several events; Temporal refuses payloads of 2 MB."""
    in_flight: int = 64
    """Deliveries waiting for Temporal, over all agents."""
    spacing: float = 0.2
    """Seconds between the deliveries of one agent: Temporal wants five signals a second per workflow at most."""
    commit_seconds: float = 1.0
    """Seconds between commits."""
    session_seconds: float = 10.0
    """After so long without a heartbeat a member of the group counts as dead; Kafka allows 6 at least."""
    patience_seconds: float = 60.0
    """How long records may wait unread, with nothing in the way, before ingest gives up, to be started again."""


class _Log:
    """One partition of the present assignment."""

    def __init__(self) -> None:
        self.frontier = Frontier()
        self.bytes = 0
        self.full = False
        self.held = False
        """Nothing of it is handed over any more; it will be forgotten."""


@dataclass(eq=False)
class _Record:
    log: _Log
    offset: int
    size: int
    open: int
    """Parts not finished yet."""


class Part(NamedTuple, Generic[L, C]):
    """What a record means for one lane; the size is that of the content, in bytes."""

    lane: L
    content: C
    size: int


@dataclass(eq=False)
class Item(Generic[C]):
    """A part on its way."""

    content: C
    size: int
    record: _Record
    finished: bool = False


@dataclass(eq=False)
class Batch(Generic[L, C]):
    """What is handed over for one lane at once."""

    lane: L
    items: list[Item[C]]


@dataclass(eq=False)
class _Lane(Generic[L, C]):
    """A lane is in exactly one place: among the ready, in flight, or cooling."""

    name: L
    queue: deque[Item[C]] = field(default_factory=deque)


class Flow(Generic[L, C]):
    """The state of ingest between Kafka and Temporal."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._logs: dict[Partition, _Log] = {}
        self._lanes: dict[L, _Lane[L, C]] = {}
        self._ready: deque[_Lane[L, C]] = deque()
        self._cooling: deque[tuple[float, _Lane[L, C]]] = deque()
        self._in_flight: set[Batch[L, C]] = set()

    def add(
        self, partition: Partition, offset: int, size: int, parts: Iterable[Part[L, C]], timestamp: int = -1
    ) -> None:
        """Take in a record of `size` bytes. One without parts is finished at once."""
        partition = Partition(*partition)
        log = self._logs.get(partition)
        if log is not None and log.frontier.next is not None and offset < log.frontier.next:
            # The position went backwards: the topic was created anew, or somebody sought. What was read before belongs
            # to another log, and its offsets say nothing about this one.
            self.forget([partition])
            log = None
        if log is None:
            log = self._logs[partition] = _Log()
        parts = list(parts)
        record = _Record(log, offset, size, open=len(parts))
        log.frontier.begin(offset, timestamp)
        log.bytes += size
        for part in parts:
            lane = self._lanes.get(part.lane)
            if lane is None:
                lane = self._lanes[part.lane] = _Lane(part.lane)
                self._ready.append(lane)
            lane.queue.append(Item(part.content, part.size, record))
        if not parts:
            self._close(record)
        self._judge(log)

    def take(self, now: float) -> Batch[L, C] | None:
        """The next batch to hand over, or None when there is nothing to do, or enough in flight."""
        while self._cooling and self._cooling[0][0] <= now:
            self._ready.append(self._cooling.popleft()[1])
        while self._ready and len(self._in_flight) < self._limits.in_flight:
            lane = self._ready.popleft()
            items = self._fill(lane.queue)
            if items:
                batch = Batch(lane.name, items)
                self._in_flight.add(batch)
                return batch
            del self._lanes[lane.name]
        return None

    def finish(self, items: Iterable[Item[C]]) -> None:
        """These are durable. Items whose partition is no longer ours count for nothing, and do no harm."""
        for item in items:
            if not item.finished:
                item.finished = True
                item.record.open -= 1
                if item.record.open == 0:
                    self._close(item.record)

    def release(self, batch: Batch[L, C], now: float) -> None:
        """The batch is over, for better or worse: its lane may have the next one after a pause."""
        self._in_flight.remove(batch)
        lane = self._lanes[batch.lane]
        lane.queue.extendleft(item for item in reversed(batch.items) if _wanted(item))
        self._cooling.append((now + self._limits.spacing, lane))

    @property
    def full(self) -> set[Partition]:
        """Partitions of which no more may be read for now."""
        return {partition for partition, log in self._logs.items() if log.full}

    @property
    def in_flight(self) -> int:
        """How many batches are handed over and not yet released."""
        return len(self._in_flight)

    def batches(self, partitions: Collection[Partition]) -> list[Batch[L, C]]:
        """Batches in flight that hold something of these partitions."""
        logs = {self._logs[partition] for partition in partitions if partition in self._logs}
        return [batch for batch in self._in_flight if any(item.record.log in logs for item in batch.items)]

    def frontiers(self) -> Mapping[Partition, int]:
        """The offset to commit for each partition of which something was read."""
        return {
            partition: position
            for partition, log in self._logs.items()
            if (position := log.frontier.position) is not None
        }

    def oldest(self) -> Mapping[Partition, int]:
        """The timestamp of the oldest record that is not finished, of partitions that have one."""
        return {
            partition: timestamp
            for partition, log in self._logs.items()
            if (timestamp := log.frontier.oldest) is not None
        }

    def hold(self, partitions: Iterable[Partition]) -> None:
        """Hand over nothing more of these partitions; what waits is dropped, what is in flight may still finish."""
        for partition in partitions:
            if log := self._logs.get(Partition(*partition)):
                log.held = True
        for lane in self._lanes.values():
            lane.queue = deque(item for item in lane.queue if _wanted(item))

    def forget(self, partitions: Iterable[Partition]) -> None:
        """These partitions are no longer ours, or are begun anew."""
        partitions = [Partition(*partition) for partition in partitions]
        self.hold(partitions)
        for partition in partitions:
            self._logs.pop(partition, None)

    def _fill(self, queue: deque[Item[C]]) -> list[Item[C]]:
        items: list[Item[C]] = []
        size = 0
        while queue and len(items) < self._limits.delivery_events:
            if items and size + queue[0].size > self._limits.delivery_bytes:
                break
            item = queue.popleft()
            size += item.size
            items.append(item)
        return items

    def _close(self, record: _Record) -> None:
        log = record.log
        log.frontier.finish(record.offset)
        log.bytes -= record.size
        self._judge(log)

    def _judge(self, log: _Log) -> None:
        """Full when a window is, and until both have fallen to half: pausing throws away what was fetched ahead."""
        share = max(len(log.frontier) / self._limits.window_records, log.bytes / self._limits.window_bytes)
        log.full = share >= 1 or (log.full and share > 1 / 2)


def _wanted(item: Item[C]) -> bool:
    return not item.finished and not item.record.log.held
