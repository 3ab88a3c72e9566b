"""The mailbox: events accepted and not yet taken, and the ids of those seen before. Pure.

`accept` drops what was seen before (DESIGN.md, P1), `take` hands out a turn's worth in the order of arrival (P2). The
mailbox is part of the state that goes through continue-as-new and into the snapshot, so what it has seen it has seen
for ever, up to its horizon.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, Field

from workflows import names
from workflows.events import Event

_TURN_BYTES = 512 * 1024
_SEEN_BYTES = 41  # a digest and its turn, as JSON


def size(event: Event) -> int:
    """An event's bytes, as it travels in Temporal."""
    return len(event.model_dump_json().encode())


class Mailbox(BaseModel):
    """Events of one agent that wait, and the digests of those it has accepted."""

    waiting: list[Event] = Field(default_factory=list)
    seen: dict[str, int] = Field(default_factory=dict)
    """Digest of each accepted event, oldest first, to the turn that took it; 0 while it waits."""
    waiting_bytes: int = 0
    """Of the events that wait, as they travel in Temporal."""
    accepted: int = 0
    duplicates: int = 0

    def accept(self, events: Iterable[Event], *, horizon: int) -> list[Event]:
        """Put new events at the end and return those that were duplicates.

        Args:
            events: in the order of their partition.
            horizon: how many ids are remembered; events still waiting are never forgotten.
        """
        duplicates = []
        for event in events:
            if event.digest in self.seen:
                duplicates.append(event)
                continue
            self.seen[event.digest] = 0
            self.waiting.append(event)
            self.waiting_bytes += size(event)
            self.accepted += 1
        self.duplicates += len(duplicates)
        self._forget(horizon)
        return duplicates

    def take(self, turn: int, limit: int) -> list[Event]:
        """Take the next events for a turn: a question alone, since a person waits for it.

        Of others at most `limit`, and no more bytes than travel well: Temporal refuses what has 2 MB.
        """
        count = taken_bytes = 0
        for event in self.waiting[:limit]:
            is_question = event.type == names.ASK_TYPE
            event_bytes = size(event)
            if count and (is_question or taken_bytes + event_bytes > _TURN_BYTES):
                break
            count += 1
            taken_bytes += event_bytes
            if is_question:
                break
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        self.waiting_bytes -= taken_bytes
        for event in taken:
            self.seen[event.digest] = turn
        return taken

    @property
    def carried_bytes(self) -> int:
        """About how much of the agent's state the mailbox takes."""
        return self.waiting_bytes + _SEEN_BYTES * len(self.seen)

    def turn_of(self, digest: str) -> int | None:
        """The turn that took an event, 0 while it waits, None when it was never seen or is forgotten."""
        return self.seen.get(digest)

    def _forget(self, horizon: int) -> None:
        surplus = len(self.seen) - horizon
        for digest in [digest for digest, turn in list(self.seen.items())[: max(surplus, 0)] if turn]:
            del self.seen[digest]
