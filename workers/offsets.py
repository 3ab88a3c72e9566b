"""How far a partition has been worked off. Pure: knows nothing of Kafka, asyncio or the clock.

`Frontier` says which offset may be committed; `Watchdog` says when reading a partition has got stuck.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable


class Frontier:
    """The contiguous frontier of one partition: no record before it is unfinished.

    Offsets may have gaps (compacted topics, transaction markers); what counts is which records were handed out.
    """

    def __init__(self) -> None:
        self._begun: deque[tuple[int, int]] = deque()
        self._finished: set[int] = set()
        self._next: int | None = None

    def begin(self, offset: int, timestamp: int = -1) -> None:
        """A record was read.

        Args:
            offset: its own.
            timestamp: when it was written; only `oldest` wants to know.

        Raises:
            ValueError: the offset is not beyond all that were read before.
        """
        if self._next is not None and offset < self._next:
            raise ValueError(f"offset {offset} comes after offset {self._next - 1} was read")
        self._begun.append((offset, timestamp))
        self._next = offset + 1

    def finish(self, offset: int) -> None:
        """A record is durably dealt with."""
        self._finished.add(offset)
        while self._begun and self._begun[0][0] in self._finished:
            self._finished.discard(self._begun.popleft()[0])

    @property
    def next(self) -> int | None:
        """The offset after the newest record read; None before the first."""
        return self._next

    @property
    def position(self) -> int | None:
        """The offset to commit, that is the next one to read after a restart; None before the first record."""
        return self._begun[0][0] if self._begun else self._next

    @property
    def oldest(self) -> int | None:
        """The timestamp of the record at the frontier; None when all are finished."""
        return self._begun[0][1] if self._begun else None

    def __len__(self) -> int:
        """How many records were read at or past the frontier, finished or not: what a restart would read again."""
        return len(self._begun)


class Watchdog:
    """Notices that the consumer's position in a partition does not move, although it is not at the end.

    It is before the end when records wait; it is beyond the end when the topic was created anew behind our back.

    aiokafka can stop reading after a broker's restart without any error (DESIGN.md, "Facts"); the cure is a restart.

    Args:
        patience: for how long, in seconds, a partition may stand still.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._seen: dict[Hashable, tuple[int | None, float]] = {}

    def stuck(self, partition: Hashable, *, position: int | None, end: int, held: bool, now: float) -> bool:
        """Whether the partition has stood still for too long, as of this observation.

        Args:
            partition: which one.
            position: the next offset the consumer will read; None when it does not know.
            end: the offset after the newest record, as the broker says.
            held: nothing is read on purpose (paused).
            now: seconds on a monotonic clock.
        """
        before = self._seen.get(partition)
        if held or position == end or before is None or before[0] != position:
            self._seen[partition] = (position, now)
            return False
        return now - before[1] >= self._patience

    def reset(self) -> None:
        """Begin to watch anew: the broker was away, or the assignment has changed."""
        self._seen.clear()
