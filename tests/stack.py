"""The whole embedded stack for tests: real servers, real workers, the rehearsal endpoint; and what came of events.

    async with Stack(tmp_path) as stack:
        await stack.send(letter("customer-07", "[[latency 1.5]] Where is my order?"))
        await stack.call_in_flight()
        stack.kill(MODEL)
        await stack.all_answered()
        assert (await stack.tally()).kept

Each has a state directory of its own and any free ports. What is sent is kept, so that the oracle of the demo
(`workers/tally.py`) can say what ought to have come of it. `Command` runs `perennial` as people do, as a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer
from processes import alive
from servers import eventually
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from activities.ledger import Ledger
from workers.demo import Observer
from workers.embedded import TOPICS, EmbeddedStack, Ports, StackAddresses, StackReport
from workers.operations import known_specs
from workers.records import Routes
from workers.settings import PROVIDER_VARIABLES, Settings, provider_environment
from workers.tally import Expected, Pair, Tally, count, expect
from workflows import names
from workflows.names import Address

ROOT = Path(__file__).parents[1]
STORE = ROOT / "deploy" / "agents"
PERENNIAL = Path(sys.executable).with_name("perennial")
ANY_PORTS = Ports(temporal=0, temporal_ui=0, kafka=0, rehearsal=0, ingest=0, agent=0, model=0)

_HEADERS = [("content-type", b"application/cloudevents+json")]
_ENTRIES = 1000


def letter(key: str, text: str, event_id: str = "") -> bytes:
    """A message to the customer-service agent with this key, as a structured CloudEvent for `agents.events`."""
    event = {
        "specversion": "1.0",
        "id": event_id or str(uuid4()),
        "source": "/tests",
        "type": "test.letter",
        "subject": key,
        "tenant": "store",
        "agent": "customer-service",
        "data": {"text": text},
    }
    return json.dumps(event).encode()


def workflow_of(key: str) -> str:
    """The workflow id of the customer-service agent with this key."""
    return names.workflow_id(Address("store", "customer-service", key))


class Stack:
    """A running stack.

    Args:
        state: its state directory, and where the tools keep their files.
        specs: the agents.
        rehearse: the rehearsal endpoint answers; else the provider that `variables` name.
        variables: environment variables for the processes, instead of the PERENNIAL_ and provider variables of the
            test's own environment.
    """

    def __init__(
        self,
        state: Path,
        *,
        specs: Path = STORE,
        rehearse: bool = True,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.reports: list[StackReport] = []
        self.client: Client
        self.observer: Observer
        self._rehearse = rehearse
        self._variables = {
            "PERENNIAL_STATE_DIR": str(state),
            "PERENNIAL_SPECS": str(specs),
            "PERENNIAL_REHEARSAL_LATENCY": "0.01",
            **(variables or {}),
        }
        self._state = state
        self._routes = Routes(known_specs(specs) or [])
        self._lines: list[tuple[str, bytes]] = []
        self._sent: dict[int, int] = {}
        self._exits = contextlib.AsyncExitStack()
        self._observing = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        with only_these_variables(self._variables):
            self.settings = Settings.load()
            self._embedded = EmbeddedStack(
                self.settings,
                report=self.reports.append,
                topics=sorted({*TOPICS, *self._routes.topics}),
                ports=ANY_PORTS,
                rehearse=self._rehearse,
            )
            await self._embedded.start()
        try:
            self.client = await Client.connect(self.addresses.temporal, data_converter=pydantic_data_converter)
            self._producer = AIOKafkaProducer(bootstrap_servers=self.addresses.kafka, acks="all")
            await self._producer.start()
            self.observer = Observer(self.addresses.kafka)
            await self._observing.enter_async_context(self.observer.watching())
        except BaseException:
            await self._embedded.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._observing.aclose()
            await self._producer.stop()
        finally:
            await self._embedded.stop()

    @property
    def addresses(self) -> StackAddresses:
        return self._embedded.addresses

    @property
    def tools(self) -> Path:
        """Where the tools keep their files."""
        return self._state / "tools"

    # Faults ----------------------------------------------------------------------------------------------------------

    def kill(self, component: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a component."""
        self._embedded.kill(component, number)

    def pid(self, component: str) -> int | None:
        return self._embedded.pid(component)

    async def ready_again(self, component: str) -> None:
        """Wait until a component that was killed works again."""
        async with asyncio.timeout(60):
            await self._embedded.wait_ready(component)

    async def observe_anew(self) -> None:
        """Read the topics from their beginning again, as is needed once the broker has lost and made them."""
        await self._observing.aclose()
        before, self.observer = self.observer, Observer(self.addresses.kafka)
        self.observer.answers, self.observer.answered = before.answers, before.answered
        self.observer.duplicates, self.observer.dead_letters = before.duplicates, before.dead_letters
        await self._observing.enter_async_context(self.observer.watching())

    # Events and what came of them ------------------------------------------------------------------------------------

    async def send(self, *values: bytes, topic: str = names.EVENTS_TOPIC) -> None:
        """Put structured events on a topic, in this order."""
        for value in values:
            self._lines.append((topic, value))
            self._sent[len(self._lines) - 1] = int(time.time() * 1000)
            await self._producer.send_and_wait(topic, value=value, key=_key(value), headers=_HEADERS)

    @property
    def expected(self) -> Expected:
        """What ought to come of all that was sent."""
        return expect(self._lines, self._routes)

    def unanswered(self) -> list[Pair]:
        """The events that have no reply on the topic yet."""
        return [pair for pair in self.expected.pairs if pair not in self.observer.answered]

    async def all_answered(self, seconds: float = 60, *, besides: str | None = None) -> None:
        """Wait until each event has a reply on the topic, and duplicates and dead letters are reported.

        Args:
            seconds: how long.
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
            await eventually(complete, seconds)
        except AssertionError as error:
            raise AssertionError(f"no answer within {seconds} s to {waited_for()}; {self.logs()}") from error

    def replies(self, key: str) -> list[str]:
        """What the agent with this key has answered on the reply topic, in order, each reply once."""
        replies = (answer.reply for answer in self.observer.answers if answer.reply.workflow_id == workflow_of(key))
        return list({reply.id: reply.text for reply in replies}.values())

    async def tally(self) -> Tally:
        """The figures of all that was sent."""
        expected = self.expected
        async with self.ledger() as ledger:
            totals = await ledger.totals()
            agents = {pair.workflow_id for pair in expected.pairs}
            recorded = [entry for agent in agents for entry in await ledger.transcript(agent, limit=_ENTRIES)]
        return count(
            expected,
            sent=self._sent,
            answers=self.observer.answers,
            recorded=recorded,
            duplicates=self.observer.duplicates,
            dead_letters=self.observer.dead_letters,
            totals=totals,
        )

    @contextlib.asynccontextmanager
    async def ledger(self) -> AsyncIterator[Ledger]:
        """The ledger, to look at."""
        async with Ledger(self.addresses.ledger) as ledger:
            yield ledger

    async def calls(self) -> dict[str, Calls]:
        """What the rehearsal endpoint has counted since it was started, by the key of the call."""
        url = f"{str(self.addresses.rehearsal).removesuffix('/v1')}/rehearsal/calls"
        return {line["key"]: Calls(line["asked"], line["answered"]) for line in json.loads(await fetched(url))}

    async def call_in_flight(self, key: str) -> None:
        """Wait until the agent with this key has a model call that was asked for and is not answered."""

        async def in_flight() -> bool:
            calls = await self.calls()
            return any(workflow_of(key) in call and not counted.answered for call, counted in calls.items())

        await eventually(in_flight)

    def logs(self) -> str:
        """The last lines of the workers' logs, for a failed test to show."""
        tails = []
        for log in sorted(self.addresses.logs.glob("*.log")):
            lines = [line for line in log.read_text(errors="replace").splitlines() if " INFO " not in line]
            tails.append(f"== {log.name}\n" + "\n".join(lines[-12:]))
        return "logs:\n" + "\n".join(tails)


@dataclass(frozen=True)
class Calls:
    """How often a model call was asked for, and answered."""

    asked: int
    answered: int


def _key(value: bytes) -> bytes | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(value)["subject"]).encode()
    return None


async def fetched(url: str) -> str:
    """The body at an address of ours."""

    def get() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    return await asyncio.to_thread(get)


def own_variables() -> list[str]:
    """The names of the variables in this environment that speak of Perennial or of model providers."""
    ours = [name for name in os.environ if name.startswith("PERENNIAL_")]
    return [*ours, *PROVIDER_VARIABLES, *provider_environment()]


@contextlib.contextmanager
def only_these_variables(variables: Mapping[str, str]) -> Any:
    """This process's environment with these variables, and no others of ours or of model providers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in own_variables():
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


class Command:
    """A `perennial` command that runs until it is asked to stop, such as `perennial dev`.

    Its output goes to files in `state`, so that it never waits for a reader.
    """

    def __init__(
        self, *arguments: str, state: Path, cwd: Path = ROOT, variables: Mapping[str, str] | None = None
    ) -> None:
        self.state = state
        self._arguments = arguments
        self._cwd = cwd
        self._variables = {"PERENNIAL_STATE_DIR": str(state), **(variables or {})}
        self.process: asyncio.subprocess.Process
        self.children: list[int] = []

    async def __aenter__(self) -> Self:
        self.state.mkdir(parents=True, exist_ok=True)
        with self.output.open("wb") as output:
            self.process = await asyncio.create_subprocess_exec(
                *(str(PERENNIAL), *self._arguments),
                cwd=self._cwd,
                env=environment(self._variables),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    @property
    def output(self) -> Path:
        return self.state.with_name(f"{self.state.name}-output.txt")

    def said(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace")

    async def up(self) -> None:
        """Wait until its stack is up."""

        def is_up() -> bool:
            assert self.process.returncode is None, self.said()
            return "up after" in self.said()

        await eventually(is_up, 60)

    def send_signal(self, number: signal.Signals) -> list[int]:
        """Signal it as a terminal would, the whole group; the processes of its stack that are there now."""
        children = descendants(self.process.pid)
        os.killpg(self.process.pid, number)
        return children

    async def ended(self, seconds: float = 60) -> int:
        """Wait for its end; its exit status."""
        async with asyncio.timeout(seconds):
            return await self.process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that this process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, _, rest = stat.read_text().rpartition(")")
            children.setdefault(int(rest.split()[1]), []).append(int(number.split()[0]))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


async def none_alive(pids: Sequence[int]) -> None:
    """Wait until none of these processes runs."""
    await eventually(lambda: not any(map(alive, pids)))


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This environment with these variables, and no others of ours or of model providers."""
    left_out = own_variables()
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    path = f"{PERENNIAL.parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, **variables}


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def run(
    *command: str, cwd: Path = ROOT, variables: Mapping[str, str] | None = None, seconds: float = 90
) -> Finished:
    """Run a command to its end, with only these variables of ours."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=environment(variables or {}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


async def perennial(*arguments: str, state: Path, cwd: Path = ROOT, seconds: float = 90) -> Finished:
    """Run a `perennial` command to its end, beside a stack on this state directory."""
    variables = {"PERENNIAL_STATE_DIR": str(state)}
    return await run(str(PERENNIAL), *arguments, cwd=cwd, variables=variables, seconds=seconds)
