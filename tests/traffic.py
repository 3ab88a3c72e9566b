"""What was sent to agents, and what came of it: of a whole system under test, asked from the outside.

`Stack` and `Field` are systems: each says where it is, and has all of this. What is sent is kept, so that the oracles
(`workers/tally.py` and `oracle.py`) can say what ought to have come of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from aiokafka import AIOKafkaProducer
from servers import eventually
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from activities.entries import Entry
from activities.kafka import LARGEST, Kafka
from activities.ledger import Ledger
from workers.demo import Observer
from workers.flow import Partition
from workers.operations import known_specs
from workers.records import Routes
from workers.tally import Expected, Pair, Tally, count
from workers.topics import HEADERS
from workflows import names
from workflows.names import Address

_ENTRIES = 100_000


class Place(NamedTuple):
    """Where a record stands."""

    topic: str
    partition: int
    offset: int


@dataclass
class Sent:
    """A record that was sent."""

    topic: str
    value: bytes
    at: int
    """Milliseconds since 1970 (UTC)."""
    place: Place | None = None
    """None until the broker has it."""
    gone: bool = False
    """Its topic was deleted, or lost, since then."""

    @property
    def partition(self) -> Partition | None:
        """Where it still stands."""
        return None if self.place is None or self.gone else Partition(self.place.topic, self.place.partition)

    @property
    def offset(self) -> int:
        """Where in its partition."""
        return self.place.offset if self.place else -1


def letter(key: str, text: str, event_id: str = "", *, agent: str = "customer-service") -> bytes:
    """A message to an agent of the store with this key, as a structured CloudEvent for `agents.events`."""
    event = {
        "specversion": "1.0",
        "id": event_id or str(uuid4()),
        "source": "/tests",
        "type": "test.letter",
        "subject": key,
        "tenant": "store",
        "agent": agent,
        "data": {"text": text},
    }
    return json.dumps(event).encode()


def workflow_of(key: str, agent: str = "customer-service") -> str:
    """The workflow id of an agent of the store with this key."""
    return names.workflow_id(Address("store", agent, key))


@dataclass(frozen=True)
class Calls:
    """How often a model call was asked for, and answered."""

    asked: int
    answered: int
    asked_at: float
    """When it was last asked for: seconds since 1970 (UTC)."""


class Traffic(ABC):
    """What was sent to a system, and what came of it, while it is `watched`.

    Args:
        specs: the agents.
    """

    def __init__(self, specs: Path) -> None:
        self.client: Client
        self.observer: Observer
        self.specs = specs
        self.read_specs()
        self.sent: list[Sent] = []
        self.expected = Expected()
        """What ought to come of all that was sent, by the specs of then."""
        self.clocks_agree = True
        """False where a test sets them wrong: what is told by two of them can't be compared."""
        self._observing = contextlib.AsyncExitStack()

    def read_specs(self) -> None:
        """What is sent from now on is for the agents that have a spec now."""
        self.routes = Routes(known_specs(self.specs) or [])

    # Where the system is ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def kafka(self) -> Kafka:
        """How the test reaches the broker."""

    @property
    @abstractmethod
    def temporal_address(self) -> str:
        """How the test reaches Temporal."""

    @property
    @abstractmethod
    def ledger_url(self) -> str: ...

    @property
    @abstractmethod
    def rehearsal_url(self) -> str:
        """Where the model calls go; empty, if not to a rehearsal endpoint."""

    @abstractmethod
    def logs(self) -> str:
        """What the workers have said lately, for a failed test to show."""

    # Sending ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While events can be sent, and what comes of them is read."""
        self.client = await Client.connect(self.temporal_address, data_converter=pydantic_data_converter)
        self.observer = Observer(self.kafka.bootstrap)
        self._producer = AIOKafkaProducer(**self.kafka.producer(), max_request_size=LARGEST)
        await self._producer.start()
        try:
            await self._observing.enter_async_context(self.observer.watching())
            yield
        finally:
            await self._observing.aclose()
            await self._producer.stop()

    async def observe_anew(self) -> None:
        """Read the topics from their beginning again, as is needed once the broker has lost and made them."""
        await self._observing.aclose()
        before, self.observer = self.observer, Observer(self.kafka.bootstrap)
        self.observer.answers, self.observer.answered = before.answers, before.answered
        self.observer.duplicates, self.observer.dead_letters = before.duplicates, before.dead_letters
        await self._observing.enter_async_context(self.observer.watching())

    async def send(self, *values: bytes | None, topic: str = names.EVENTS_TOPIC, key: bytes | None = None) -> None:
        """Put structured events on a topic, in this order; the key is theirs, unless one is given."""
        waiting = []
        for value in values:
            record = self.note(topic, value)
            sending = await self._producer.send(topic, value=value, key=key or _key(value), headers=list(HEADERS))
            waiting.append((record, sending))
        for record, sending in waiting:
            stands = await sending
            record.place = Place(stands.topic, stands.partition, stands.offset)

    def note(self, topic: str, value: bytes | None, place: Place | None = None) -> Sent:
        """Somebody sends this; it counts from now on."""
        record = Sent(topic, value or b"", int(time.time() * 1000), place)
        self.expected.add(len(self.sent), topic, record.value, self.routes)
        self.sent.append(record)
        return record

    # What came of it -------------------------------------------------------------------------------------------------

    def unanswered(self) -> list[Pair]:
        """The events that have no reply on the topic yet."""
        return [pair for pair in self.expected.pairs if pair not in self.observer.answered]

    async def all_answered(self, seconds: float = 60, *, besides: str | None = None) -> None:
        """Wait until each event has a reply on the topic, and duplicates and dead letters are reported.

        Args:
            seconds: how long without getting on.
            besides: agents with this in their workflow id, and what is dropped or set aside, are not waited for.
        """

        def waited_for() -> list[Pair]:
            return [pair for pair in self.unanswered() if besides is None or besides not in pair.workflow_id]

        def complete() -> bool:
            expected = self.expected
            reported = (
                len(self.observer.duplicates) >= expected.repeated
                and len(self.observer.dead_letters) >= expected.rejected
            )
            return not waited_for() and (reported or besides is not None)

        try:
            await eventually(complete, seconds, progress=lambda: len(self.observer.answered))
        except AssertionError as error:
            raise AssertionError(
                f"for {seconds} s no answer to {len(waited_for())} events, such as {waited_for()[:10]}; duplicates: "
                f"{len(self.observer.duplicates)} of {self.expected.repeated}, dead letters: "
                f"{len(self.observer.dead_letters)} of {self.expected.rejected}; {self.logs()}"
            ) from error

    def replies(self, key: str, agent: str = "customer-service") -> list[str]:
        """What an agent of the store with this key has answered on the reply topic, in order, each reply once."""
        workflow_id = workflow_of(key, agent)
        replies = (answer.reply for answer in self.observer.answers if answer.reply.workflow_id == workflow_id)
        return list({reply.id: reply.text for reply in replies}.values())

    async def tally(self) -> Tally:
        """The figures of all that was sent."""
        async with self.ledger() as ledger:
            totals = await ledger.totals()
        return count(
            self.expected,
            sent={index: record.at for index, record in enumerate(self.sent)},
            answers=self.observer.answers,
            recorded=[entry for entries in (await self.recorded()).values() for entry in entries],
            duplicates=self.observer.duplicates,
            dead_letters=self.observer.dead_letters,
            totals=totals,
            asked=await self._asked(),
        )

    async def _asked(self) -> dict[str, float] | None:
        """When the rehearsal endpoint was last asked for each call, by its key; None when that can't be compared."""
        if not (self.rehearsal_url and self.clocks_agree):
            return None
        return {key: call.asked_at for key, call in (await self.calls()).items()}

    async def recorded(self) -> dict[str, list[Entry]]:
        """What the agents that events were sent to have in the ledger, oldest first, by workflow id."""
        async with self.ledger() as ledger:
            agents = {pair.workflow_id for pair in self.expected.pairs}
            return {agent: await ledger.transcript(agent, limit=_ENTRIES) for agent in agents}

    @contextlib.asynccontextmanager
    async def ledger(self) -> AsyncIterator[Ledger]:
        """The ledger, to look at."""
        async with Ledger(self.ledger_url) as ledger:
            yield ledger

    async def calls(self) -> dict[str, Calls]:
        """What the rehearsal endpoint has counted since it was started, by the key of the call."""
        url = f"{self.rehearsal_url.removesuffix('/v1')}/rehearsal/calls"
        return {line.pop("key"): Calls(**line) for line in json.loads(await fetched(url))}

    async def call_in_flight(self, key: str) -> None:
        """Wait until the agent with this key has a model call that was asked for and is not answered."""

        async def in_flight() -> bool:
            calls = await self.calls()
            return any(workflow_of(key) in call and not counted.answered for call, counted in calls.items())

        await eventually(in_flight)


def _key(value: bytes | None) -> bytes | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(value or b"")["subject"]).encode()
    return None


async def fetched(url: str) -> str:
    """The body at an address of ours."""

    def get() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    return await asyncio.to_thread(get)


def tails(folder: Path) -> str:
    """The last lines of the logs in a folder, without what is usual."""
    found = []
    for log in sorted(folder.glob("*.log")):
        lines = [line for line in log.read_text(errors="replace").splitlines() if " INFO " not in line]
        found.append(f"== {log.name}\n" + "\n".join(lines[-12:]))
    return "logs:\n" + "\n".join(found)
