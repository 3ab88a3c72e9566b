"""The flow of ingest against a model broker and a model Temporal: promises P2, P3 and P5, after every step."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.flow import Batch, Flow, Limits, Part, Partition

LIMITS = Limits(window_records=6, window_bytes=30, delivery_events=3, delivery_bytes=12, in_flight=2, spacing=1.0)
LANES = ("a", "b", None)
PARTITIONS = (Partition("t", 0), Partition("t", 1))

Content = tuple[Partition, int, int]
"""Where a part comes from: partition, incarnation of its topic, offset."""


@dataclass
class Log:
    """A partition as the broker keeps it."""

    incarnation: int = 0
    records: dict[int, tuple[int, list[Part[str | None, Content]]]] = field(default_factory=dict)
    end: int = 0
    committed: int | None = None
    read: int = 0
    """The consumer's position."""


class Ingesting(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.flow: Flow[str | None, Content] = Flow(LIMITS)
        self.now = 0.0
        self.logs = {partition: Log() for partition in PARTITIONS}
        self.in_flight: list[Batch[str | None, Content]] = []
        self.taken_at: dict[str | None, float] = {}
        self.accepted: dict[str | None, list[Content]] = defaultdict(list)

    # The world.

    @rule(
        partition=st.sampled_from(PARTITIONS),
        records=st.lists(
            st.tuples(st.sets(st.sampled_from(LANES), max_size=2), st.integers(1, 6)), min_size=1, max_size=8
        ),
        gap=st.integers(0, 2),
    )
    def produce(self, partition: Partition, records: list[tuple[set[str | None], int]], gap: int) -> None:
        log = self.logs[partition]
        for lanes, size in records:
            offset = log.end + gap
            parts = [Part(lane, (partition, log.incarnation, offset), size) for lane in sorted(lanes, key=str)]
            log.records[offset] = (2 * size, parts)
            log.end = offset + 1

    @rule(partition=st.sampled_from(PARTITIONS), count=st.integers(1, 10))
    def read(self, partition: Partition, count: int) -> None:
        for _ in range(count):
            self.read_one(partition)

    def read_one(self, partition: Partition) -> bool:
        log = self.logs[partition]
        ahead = [offset for offset in log.records if offset >= log.read]
        if not ahead or partition in self.flow.full:
            return False
        size, parts = log.records[min(ahead)]
        self.flow.add(partition, min(ahead), size, parts)
        log.read = min(ahead) + 1
        return True

    @rule()
    def take(self) -> None:
        self.take_one()

    def take_one(self) -> bool:
        batch = self.flow.take(self.now)
        if batch is None:
            return False
        contents = [item.content for item in batch.items]
        assert batch.lane not in {other.lane for other in self.in_flight}, "one in flight per agent"
        assert 1 <= len(contents) <= LIMITS.delivery_events
        assert len(contents) == 1 or sum(item.size for item in batch.items) <= LIMITS.delivery_bytes
        assert all(item.record.log in self.flow._logs.values() for item in batch.items), "what is ours, and no more"
        assert self.now - self.taken_at.get(batch.lane, -9) >= LIMITS.spacing
        self.in_flight.append(batch)
        self.taken_at[batch.lane] = self.now
        return True

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), parts=st.integers(0, 3))
    def hand_over(self, data: st.DataObject, parts: int) -> None:
        """So many of the batch's items are accepted, in order; then the delivery ends, well or in failure."""
        self.end(data.draw(st.sampled_from(self.in_flight)), parts)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def lose_the_answer(self, data: st.DataObject) -> None:
        """Temporal has accepted all of it, and nobody hears of that."""
        batch = data.draw(st.sampled_from(self.in_flight))
        self.accept(batch, len(batch.items))
        self.end(batch, 0)

    def accept(self, batch: Batch[str | None, Content], parts: int) -> None:
        self.accepted[batch.lane] += [item.content for item in batch.items[:parts]]

    def end(self, batch: Batch[str | None, Content], parts: int) -> None:
        self.accept(batch, parts)
        self.flow.finish(batch.items[:parts])
        self.in_flight.remove(batch)
        self.flow.release(batch, self.now)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def commit(self) -> None:
        for partition, position in self.flow.frontiers().items():
            self.logs[partition].committed = position

    @rule(partition=st.sampled_from(PARTITIONS), drain=st.booleans(), commit=st.booleans())
    def rebalance(self, partition: Partition, drain: bool, commit: bool) -> None:  # drawn
        """The partition goes away and comes back, read again from its committed offset."""
        self.flow.hold([partition])
        if drain:
            for batch in self.flow.batches([partition]):
                self.end(batch, len(batch.items))
            assert not self.flow.batches([partition])
        if commit:
            self.commit()
        self.flow.forget([partition])
        log = self.logs[partition]
        log.read = log.committed or 0

    @rule(partition=st.sampled_from(PARTITIONS))
    def recreate(self, partition: Partition) -> None:
        """The topic is deleted and created anew; the reader notices by the offsets."""
        log = self.logs[partition]
        if any(offset < log.read for offset in log.records):
            self.logs[partition] = Log(incarnation=log.incarnation + 1)
            self.produce(partition, [({"a"}, 1)], 0)
            if partition not in self.flow.full:
                self.read_one(partition)
            else:
                self.flow.forget([partition])

    # The promises.

    @invariant()
    def the_frontier_passes_nothing_that_is_not_accepted(self) -> None:
        """P3."""
        for partition, position in self.flow.frontiers().items():
            log = self.logs[partition]
            for offset, (_, parts) in log.records.items():
                if offset < position:
                    for part in parts:
                        assert part.content in self.accepted[part.lane], (partition, offset, position)

    @invariant()
    def first_arrivals_are_in_order(self) -> None:
        """P2: of one partition, an agent gets its events in order; what comes again, comes later."""
        for contents in self.accepted.values():
            for partition in PARTITIONS:
                first = [content for content in dict.fromkeys(contents) if content[0] == partition]
                assert first == sorted(first)

    @invariant()
    def windows_are_bounded(self) -> None:
        """P5: not more is read than the window, or the record that filled it."""
        assert self.flow.in_flight == len(self.in_flight) <= LIMITS.in_flight
        for log in self.flow._logs.values():
            assert len(log.frontier) <= LIMITS.window_records
            assert log.bytes < LIMITS.window_bytes + 12

    def teardown(self) -> None:
        """P1, P5: when nothing fails any more, everything is accepted, and all can be committed."""
        while True:
            for batch in list(self.in_flight):
                self.end(batch, len(batch.items))
            progress = [self.read_one(partition) for partition in PARTITIONS]
            self.now += LIMITS.spacing
            while self.take_one():
                progress.append(True)
            if not any(progress):
                break
        self.first_arrivals_are_in_order()
        for partition, log in self.logs.items():
            assert log.read == log.end or not log.records
            for _, parts in log.records.values():
                for part in parts:
                    assert part.content in self.accepted[part.lane]
            if position := self.flow.frontiers().get(partition):
                assert position == log.end
        assert not self.flow.full
        self.now += LIMITS.spacing
        assert self.flow.take(self.now) is None
        assert not self.flow._lanes, "an agent without mail leaves nothing behind"


Ingesting.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestIngesting = Ingesting.TestCase


def test_what_waits_for_an_agent_goes_together() -> None:
    """P2: events that come in during a delivery are coalesced, in order, up to the limits."""
    flow: Flow[str, int] = Flow(Limits(delivery_events=4, spacing=0))
    partition = Partition("t", 0)
    flow.add(partition, 0, 1, [Part("a", 0, 1)])
    first = flow.take(0)
    for offset in range(1, 8):
        flow.add(partition, offset, 1, [Part("a", offset, 1)])
    assert first
    assert flow.take(0) is None
    flow.finish(first.items)
    flow.release(first, 0)
    second = flow.take(0)
    assert second
    assert [item.content for item in second.items] == [1, 2, 3, 4]
    assert flow.frontiers() == {partition: 1}


def test_agents_take_turns() -> None:
    """P2: an agent with much mail does not keep another from its first event."""
    flow: Flow[str, int] = Flow(Limits(delivery_events=1, in_flight=1, spacing=0))
    for offset, lane in enumerate("aaaab"):
        flow.add(Partition("t", 0), offset, 1, [Part(lane, offset, 1)])
    order = []
    while batch := flow.take(0):
        order.append(batch.lane)
        flow.finish(batch.items)
        flow.release(batch, 0)
    assert order == ["a", "b", "a", "a", "a"]


def test_a_record_for_nobody_is_finished_at_once() -> None:
    """P3: a skipped record does not hold up the commit."""
    flow: Flow[str, int] = Flow(Limits())
    flow.add(Partition("t", 0), 7, 10, [])
    assert flow.frontiers() == {Partition("t", 0): 8}
    assert flow.take(0) is None
