"""Dead letters, for people: `perennial dlq list | show | redrive | drop`.

    letters = await read(settings)                       # all that the topic still holds, oldest first
    await redrive(settings, [letter for letter in letters if wanted(letter)], by="ada")

A dead letter is named by its place in the dead-letter topic, `PARTITION-OFFSET`. What was done about it stands on the
same topic, as a record of its own with an empty value: a topic forgets nothing, so nothing is changed there.

Redriving puts the original record back onto its own topic, byte for byte: the event keeps its identity, and an agent
that has seen it drops it. So a redrive that was cut off may be made again. A header says where the record stood first:
an agent whose order is strict takes the event in its old place, before the mail that has waited for it. When a letter
is dropped, that mail goes on without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError
from pydantic import BaseModel

from activities.kafka import LARGEST
from workers import kafka, operations
from workers.deadletter import REDRIVEN, DeadLetter, first_origin
from workers.exits import BAD_INPUT, CommandError
from workers.records import Record
from workers.settings import Settings
from workers.topics import connected
from workflows import names
from workflows.events import release

_POLL_MS = 200
_QUIET_SECONDS = 15.0

_LETTER = "dlq.letter"
_STATE = "dlq.state"
_BY = "dlq.by"
_WHY = "dlq.why"
_AT = "dlq.at"


class State(StrEnum):
    """What was done about a dead letter."""

    OPEN = "open"
    REDRIVEN = "redriven"
    DROPPED = "dropped"


class Resolution(BaseModel):
    """What somebody did about a dead letter."""

    letter: str
    state: State
    by: str
    why: str
    at: datetime

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        """The headers of the record that says so."""
        ours = {
            _LETTER: self.letter,
            _STATE: self.state.value,
            _BY: self.by,
            _WHY: self.why,
            _AT: self.at.astimezone(UTC).isoformat(),
        }
        return [(name, text.encode()) for name, text in ours.items()]

    @classmethod
    def parse(cls, record: Record) -> Self | None:
        """The resolution in a record of the dead-letter topic; None when it holds something else."""
        found = {name: (value or b"").decode(errors="replace") for name, value in record.headers}
        if record.value or _LETTER not in found:
            return None
        try:
            return cls.model_validate(
                {
                    "letter": found[_LETTER],
                    "state": found[_STATE],
                    "by": found[_BY],
                    "why": found[_WHY],
                    "at": found[_AT],
                }
            )
        except (KeyError, ValueError):
            return None


class Letter(BaseModel):
    """A dead letter with its name, and what was done about it."""

    id: str
    """PARTITION-OFFSET in the dead-letter topic."""
    letter: DeadLetter
    resolution: Resolution | None = None
    """The newest one."""

    @property
    def state(self) -> State:
        """What was done about it."""
        return self.resolution.state if self.resolution else State.OPEN


@dataclass(frozen=True)
class Filter:
    """Which dead letters somebody means; what is not given does not matter."""

    state: State | None = State.OPEN
    reason: str | None = None
    """A pattern, as in `bad_*`."""
    topic: str | None = None
    """A pattern, of the topic of origin."""
    since: datetime | None = None
    """Dead-lettered at this time or later."""

    def wants(self, letter: Letter) -> bool:
        """Whether the dead letter is one of those."""
        dead = letter.letter
        return (
            (self.state is None or letter.state is self.state)
            and (self.reason is None or fnmatchcase(dead.reason, self.reason))
            and (self.topic is None or fnmatchcase(dead.original.topic, self.topic))
            and (self.since is None or dead.last_failed >= self.since)
        )


def gather(found: Sequence[Record]) -> list[Letter]:
    """The dead letters among these records of the dead-letter topic, the oldest first. Pure.

    A record that was dead-lettered again, since ingest died before it had committed that, is one letter: the first.
    """
    letters: dict[Record, Letter] = {}
    firsts: dict[str, str] = {}
    resolutions: dict[str, Resolution] = {}
    for record in sorted(found, key=lambda record: (record.timestamp, record.partition, record.offset)):
        resolution = Resolution.parse(record)
        if resolution:
            known = resolutions.get(resolution.letter)
            if known is None or resolution.at >= known.at:
                resolutions[resolution.letter] = resolution
            continue
        try:
            dead = DeadLetter.parse(record)
        except ValueError:
            continue  # put there by somebody else: not ours to judge
        name = f"{record.partition}-{record.offset}"
        firsts[name] = letters.setdefault(dead.original, Letter(id=name, letter=dead)).id
    done: dict[str, Resolution] = {}
    for resolution in sorted(resolutions.values(), key=lambda resolution: resolution.at):
        done[firsts.get(resolution.letter, resolution.letter)] = resolution
    told = [letter.model_copy(update={"resolution": done.get(letter.id)}) for letter in letters.values()]
    return sorted(told, key=lambda letter: (letter.letter.last_failed, letter.letter.original.offset))


def pick(letters: Sequence[Letter], wanted: Sequence[str]) -> list[Letter]:
    """The dead letters with these names.

    Raises:
        CommandError: there is none of that name.
    """
    known = {letter.id: letter for letter in letters}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise CommandError(
            f"There is no dead letter {', '.join(missing)}. `perennial dlq list --state all` names those there are.",
            BAD_INPUT,
        )
    return [known[name] for name in dict.fromkeys(wanted)]


async def read(settings: Settings) -> list[Letter]:
    """All dead letters that the topic still holds, the oldest first.

    Raises:
        CommandError: Kafka is away, or has no such topic.
    """
    consumer = AIOKafkaConsumer(
        names.DEAD_LETTER_TOPIC,
        **kafka.reached_by(settings).client(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    found: list[Record] = []
    async with connected(consumer, settings):
        ends = await consumer.end_offsets(consumer.assignment())
        waiting = set(ends)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _QUIET_SECONDS
        while waiting:
            for messages in (await consumer.getmany(timeout_ms=_POLL_MS)).values():
                deadline = loop.time() + _QUIET_SECONDS
                found += [Record.of(message) for message in messages]
            for partition in list(waiting):
                # What comes along with a fetch counts too: the embedded broker's answer about the end lags behind it.
                end = consumer.highwater(partition)
                if end is not None and await consumer.position(partition) >= max(end, ends[partition]):
                    waiting.discard(partition)
            if loop.time() > deadline:
                raise CommandError(
                    f"Kafka at {settings.kafka_bootstrap} has sent nothing of {names.DEAD_LETTER_TOPIC} for "
                    f"{_QUIET_SECONDS:g} s, although there is more. Try again."
                )
    return gather(found)


async def redrive(
    settings: Settings,
    letters: Sequence[Letter],
    *,
    by: str,
    why: str = "",
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Put the original records back onto their topics, in the order in which they stood, and note that.

    Raises:
        CommandError: Kafka is away or refuses one; those before it are redriven.
    """
    ordered = sorted(
        letters,
        key=lambda letter: (
            letter.letter.original.topic,
            letter.letter.original.partition,
            letter.letter.original.offset,
        ),
    )
    async with _Writer(settings) as writer:
        for done, letter in enumerate(ordered, 1):
            original = letter.letter.original
            if original.key is None and original.value is None:
                raise CommandError(
                    f"Dead letter {letter.id} has neither key nor value: there is nothing to send again."
                )
            headers = [header for header in original.headers if header[0] != REDRIVEN]
            await writer.send(
                original.topic,
                key=original.key,
                value=original.value,
                headers=[*headers, (REDRIVEN, first_origin(original).encode())],
                partition=original.partition,
            )
            await writer.note(letter, State.REDRIVEN, by=by, why=why)
            on_progress(done)


async def drop(settings: Settings, letters: Sequence[Letter], *, by: str, why: str) -> None:
    """Note that nothing will be done about these, and let the mail go on that waits behind them.

    They stay on the topic for as long as it keeps them.

    Raises:
        CommandError: Kafka is away, or Temporal is, and agents wait.
    """
    client = await operations.connect(settings) if any(letter.letter.held for letter in letters) else None
    async with _Writer(settings) as writer:
        for letter in letters:
            origin = first_origin(letter.letter.original)
            for agent in letter.letter.held:
                assert client is not None, "connected, since somebody is held"
                await operations.deliver(client, settings, names.parse_workflow_id(agent), release(origin, by, why))
            await writer.note(letter, State.DROPPED, by=by, why=why)


class _Writer:
    """Puts records onto topics, one after the other."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer = AIOKafkaProducer(**kafka.reached_by(settings).producer(), max_request_size=LARGEST)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(connected(self._producer, self._settings))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def send(  # a record has these parts
        self,
        topic: str,
        *,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes | None]],
        partition: int | None = None,
    ) -> None:
        """Return when the broker has it; on another partition if the topic has not that one any more."""
        try:
            there = await self._producer.partitions_for(topic)
            await self._producer.send_and_wait(
                topic, key=key, value=value, headers=headers, partition=partition if partition in there else None
            )
        except KafkaError as error:
            raise CommandError(
                f"Kafka at {self._settings.kafka_bootstrap} did not take a record for {topic}: {error!r}. "
                "Mend that, and give the same command again: agents drop the events they have seen."
            ) from error

    async def note(self, letter: Letter, state: State, *, by: str, why: str) -> None:
        """Say on the dead-letter topic what was done about a letter."""
        done = Resolution(letter=letter.id, state=state, by=by, why=why, at=datetime.now(UTC))
        await self.send(names.DEAD_LETTER_TOPIC, key=letter.letter.original.key, value=b"", headers=[*done.headers])
