"""The mailbox: events accepted and not yet taken, and the ids of those seen before. Pure.

`accept` drops what was seen before (DESIGN.md, P1), `take` hands out a turn's worth in the order of arrival (P2). The
mailbox is part of the state that goes through continue-as-new and into the snapshot, so what it has seen it has seen
for ever, up to its horizon.

A hold in the mailbox (see `events.hold`) lets nothing behind it pass, save a person's words.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Collection, Container, Iterable
from itertools import groupby
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer

from workflows import names
from workflows.events import DIGEST_CHARACTERS, Event
from workflows.quiet_hours import QuietHours

_TURN_BYTES = 512 * 1024
_LIFTED = -1
_FROM_PEOPLE = (names.ASK_TYPE, names.STEER_TYPE)
_SEEN_BYTES = 19  # a digest and its turn, as they are written: at most, if turns come one after the other


def _written(seen: dict[str, int]) -> str:
    """Digests by turn, `TURN:DIGEST,DIGEST TURN:DIGEST`, each turn as its distance from the one before.

    Thousands of them travel in every snapshot and every continue-as-new: as JSON they would be twice as long (P7).
    """
    groups, last = [], 0
    for turn, members in groupby(seen, key=seen.__getitem__):
        digests = (urlsafe_b64encode(bytes.fromhex(digest)).decode().rstrip("=") for digest in members)
        groups.append(f"{turn - last}:{','.join(digests)}")
        last = turn
    return " ".join(groups)


def _read(written: Any) -> Any:
    """The reverse of `_written`; what an older release wrote was a JSON object, with longer digests."""
    if isinstance(written, dict):
        return {digest[:DIGEST_CHARACTERS]: turn for digest, turn in written.items()}
    if not isinstance(written, str):
        return written
    seen, turn = {}, 0
    for group in written.split():
        distance, digests = group.split(":")
        turn += int(distance)
        for digest in digests.split(","):
            seen[urlsafe_b64decode(digest + "=" * (-len(digest) % 4)).hex()] = turn
    return seen


Seen = Annotated[dict[str, int], BeforeValidator(_read), PlainSerializer(_written)]
"""Digest of each event to the turn that took it, oldest first."""


def size(event: Event) -> int:
    """An event's bytes, as it travels in Temporal."""
    return len(event.model_dump_json().encode())


class Mailbox(BaseModel):
    """Events of one agent that wait, and the digests of those it has accepted."""

    waiting: list[Event] = Field(default_factory=list)
    seen: Seen = Field(default_factory=dict)
    """Digest of each accepted event, oldest first, to the turn that took it; 0 while it waits, -1 for a lifted hold."""
    waiting_bytes: int = 0
    """Of the events that wait, as they travel in Temporal."""
    accepted: int = 0
    duplicates: int = 0
    rejected: int = 0
    """Events that came at the wrong time, by the spec's `during_turn`."""
    forgotten: int = 0
    """Events that would not be recognised any more: as many as were taken beyond the horizon."""

    def accept(self, events: Iterable[Event], *, horizon: int) -> list[Event]:
        """Put new events at the end and return those that were duplicates.

        Args:
            events: in the order of their partition.
            horizon: how many ids of taken events are remembered; events still waiting are never forgotten.
        """
        duplicates = []
        for event in events:
            if event.type == names.RELEASE_TYPE:
                self._lift(event.digest)
                continue
            place = self._lift(event.fills[:DIGEST_CHARACTERS]) if event.fills else None
            is_hold = event.type == names.HOLD_TYPE
            if event.digest in self.seen:
                if not is_hold:
                    duplicates.append(event)
                continue
            self.seen[event.digest] = 0
            self.waiting.insert(len(self.waiting) if place is None else place, event)
            self.waiting_bytes += size(event)
            self.accepted += not is_hold
        self.duplicates += len(duplicates)
        self._forget(horizon)
        return duplicates

    def take(self, turn: int, limit: int, quiet: QuietHours | None = None) -> list[Event]:
        """Take the next events for a turn: a question alone, since a person waits for it.

        Of others at most `limit`, and no more bytes than travel well: Temporal refuses what has 2 MB. Behind a hold
        only questions are taken; in quiet hours questions, and what these let pass.
        """
        start, end = self._next(limit, quiet)
        taken = self.waiting[start:end]
        del self.waiting[start:end]
        for event in taken:
            self.waiting_bytes -= size(event)
            self.seen[event.digest] = turn
        return taken

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""
        return self.is_ready(None)

    def is_ready(self, quiet: QuietHours | None) -> bool:
        """Whether there is something to take, in these quiet hours if it is quiet."""
        start, end = self._next(1, quiet)
        return start < end

    @property
    def held(self) -> Event | None:
        """The hold that everything waits behind, if there is one."""
        first = self.waiting[0] if self.waiting else None
        return first if first and first.type == names.HOLD_TYPE else None

    @property
    def carried_bytes(self) -> int:
        """About how much of the agent's state the mailbox takes."""
        return self.waiting_bytes + _SEEN_BYTES * len(self.seen)

    def turn_of(self, digest: str) -> int | None:
        """The turn that took an event, 0 while it waits, None when it was never seen or is forgotten."""
        return self.seen.get(digest)

    def pick(self, types: Container[str], turn: int) -> list[Event]:
        """Take the waiting events of these types out of their order, also from behind a hold."""
        picked = [event for event in self.waiting if event.type in types]
        self._settle(picked, turn or _LIFTED)
        return picked

    def join(self, turn: int, joins: Callable[[Event], bool], limit: int) -> list[Event]:
        """Take the events that are `joining` for the turn in progress, out of their order."""
        joining = self.joining(joins, limit)
        self._settle(joining, turn)
        return joining

    def joining(self, joins: Callable[[Event], bool], limit: int) -> list[Event]:
        """The waiting events that may join a turn in progress, oldest first.

        At most `limit`, and no more bytes than travel well. Nothing behind a hold joins it but a person's words.
        """
        joining: list[Event] = []
        total, is_held = 0, False
        for event in self.waiting:
            is_held = is_held or event.type == names.HOLD_TYPE
            if not joins(event) or (is_held and event.type not in _FROM_PEOPLE):
                continue
            total += size(event)
            if len(joining) >= limit or (joining and total > _TURN_BYTES):
                break
            joining.append(event)
        return joining

    def reject(self, events: Collection[Event], turn: int) -> None:
        """Let these, which were accepted, not be taken."""
        self._settle(events, turn)
        self.accepted -= len(events)
        self.rejected += len(events)

    def drop(self, digests: Container[str]) -> None:
        """Let these no longer wait."""
        self.waiting = [event for event in self.waiting if event.digest not in digests]
        self.waiting_bytes = sum(map(size, self.waiting))

    def _settle(self, events: Collection[Event], turn: int) -> None:
        """Let these no longer wait, wherever they stand."""
        if events:
            self.drop({event.digest for event in events})
            self.seen.update({event.digest: turn for event in events})

    def _next(self, limit: int, quiet: QuietHours | None) -> tuple[int, int]:
        """From where to where the events of the next turn are waiting."""
        start, is_held = self._first(quiet)
        limit = 1 if is_held else limit
        count = total = 0
        for event in self.waiting[start : start + limit]:
            is_question = event.type == names.ASK_TYPE
            total += size(event)
            barred = event.type == names.HOLD_TYPE or not _passes(event, quiet)
            if barred or (count and (is_question or total > _TURN_BYTES)):
                break
            count += 1
            if is_question:
                break
        return start, start + count

    def _first(self, quiet: QuietHours | None) -> tuple[int, bool]:
        """Where the first event waits that may be taken, and whether behind a hold; the end, if there is none."""
        is_held = False
        for place, event in enumerate(self.waiting):
            is_held = is_held or event.type == names.HOLD_TYPE
            if event.type in _FROM_PEOPLE or (not is_held and _passes(event, quiet)):
                return place, is_held
        return len(self.waiting), is_held

    def _lift(self, digest: str) -> int | None:
        """Remove a hold; where it was, None if it is not there. One that is still on its way will hold nothing."""
        self.seen[digest] = _LIFTED
        for place, event in enumerate(self.waiting):
            if event.type == names.HOLD_TYPE and event.digest == digest:
                del self.waiting[place]
                self.waiting_bytes -= size(event)
                return place
        return None

    def _forget(self, horizon: int) -> None:
        surplus = len(self.seen) - len(self.waiting) - horizon
        if surplus > 0:
            for digest in [digest for digest, turn in self.seen.items() if turn][:surplus]:
                del self.seen[digest]
                self.forgotten += 1


def _passes(event: Event, quiet: QuietHours | None) -> bool:
    """Whether it may be taken in these quiet hours; what people say always may."""
    return quiet is None or event.type in _FROM_PEOPLE or quiet.lets_pass(event.type)
