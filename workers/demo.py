"""`perennial demo`: a small store's agents answer real events while their workers are killed, and all of it is counted.

    status = await Demo(settings, output, events=Path("deploy/demo/events.jsonl"), seed=7).run(stay=False)

The stack is started in a fresh state directory. The events are sent to Kafka at a steady pace; the agent worker and
the model worker are ended with SIGKILL at random moments, while turns are in flight. What came of it is read from the
reply topic, the ledger, the dead-letter topic and the rehearsal endpoint (`workers/tally.py`), and compared with the
workers' own metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from rich.text import Text

from activities.ledger import Ledger
from workers import dev, records
from workers.console import Output
from workers.deadletter import DeadLetter
from workers.dlq import Resolution
from workers.embedded import AGENT, INGEST, MODEL, TOPICS, EmbeddedStack, StackError, StackReport
from workers.exits import BAD_INPUT, FAILED, OK, CommandError
from workers.flow import Limits
from workers.operations import known_specs
from workers.records import Record, Rejected, Routes
from workers.settings import Settings
from workers.supervisor import Died, Ready
from workers.tally import Answer, Expected, Pair, Tally, answered, count, expect
from workers.topics import HEADERS, Line, read_lines
from workflows import names
from workflows.messages import Reply
from workflows.spec import AgentSpec

EVENTS = Path("deploy/demo/events.jsonl")

_SENDING_SECONDS = 12.0
"""How long sending all events takes: a steady pace, as events come in life."""
_KILLS = (0.05, 0.6)
"""A worker is killed after a part of the answers, drawn from this range."""
_QUIET_SECONDS = 45.0
"""When for so long nothing more comes, nothing will: a dead worker's calls are made again within twenty seconds."""
_LATENCY = "0.1-0.4"
_POLL_MS = 100
_STEP_SECONDS = 0.05
_SHARES_TOLD = 4
_LABEL_WIDTH = 22


class Kill(BaseModel):
    """A worker that was ended with SIGKILL."""

    worker: str
    pid: int
    after: int
    """Answers that were there."""
    in_flight: int
    """Events sent and not yet answered."""


class Report(BaseModel):
    """What `perennial demo --json` prints."""

    seed: int
    seconds: float
    """Of the whole run, start and count included."""
    kills: list[Kill]
    tally: Tally
    disagreements: list[str]
    """Where the workers' metrics say something else than the tally."""

    @property
    def kept(self) -> bool:
        """Whether every promise was."""
        return self.tally.kept and not self.disagreements


class Observer:
    """Reads what agents and ingest put on their topics, from the beginning, in no consumer group."""

    def __init__(self, bootstrap: str) -> None:
        self.answers: list[Answer] = []
        self.answered: dict[Pair, dict[str, int]] = {}
        self.duplicates: set[str] = set()
        self.dead_letters: set[tuple[str, int, int]] = set()
        self._consumer = AIOKafkaConsumer(
            names.REPLIES_TOPIC,
            names.ACTIVITY_TOPIC,
            names.DEAD_LETTER_TOPIC,
            bootstrap_servers=bootstrap,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """While it reads."""
        await self._consumer.start()
        reading = asyncio.create_task(self._read())
        try:
            yield
        finally:
            reading.cancel()
            # Waited for, not awaited: aiokafka's stop raises CancelledError when the broker has just been away.
            await asyncio.wait([reading, asyncio.create_task(self._consumer.stop())])

    @property
    def seen(self) -> tuple[int, int, int]:
        """How much there is of each; it changes when something comes."""
        return len(self.answered), len(self.duplicates), len(self.dead_letters)

    async def _read(self) -> None:
        while True:
            fetched = await self._consumer.getmany(timeout_ms=_POLL_MS)
            for messages in fetched.values():
                for message in messages:
                    self._take(message)

    def _take(self, message: ConsumerRecord) -> None:
        record = Record.of(message)
        if record.topic == names.DEAD_LETTER_TOPIC:
            if Resolution.parse(record):
                return
            original = DeadLetter.parse(record).original
            self.dead_letters.add((original.topic, original.partition, original.offset))
            return
        decoded = records.decode(record, max_bytes=Limits().event_bytes * 4)
        if isinstance(decoded, Rejected):
            raise CommandError(f"{record.topic} holds what is no event: {decoded.message}")
        if decoded.event.type == names.REPLY_TYPE:
            answer = Answer(Reply.model_validate(decoded.event.data), record.timestamp)
            self.answers.append(answer)
            for pair, ids in answered([answer]).items():
                self.answered.setdefault(pair, {}).update(ids)
        elif decoded.event.type == names.DUPLICATE_TYPE:
            self.duplicates.add(decoded.event.id)


class Demo:
    """One run.

    Args:
        settings: specs; the stack's state goes to `demo` below the state directory.
        output: where it is told; what happens is a note, the result is data.
        events: JSON Lines; lines that are no events are sent as they stand.
        seed: repeats the moments at which workers are killed; None draws one.
        live: the configured model provider answers, and costs money; else the rehearsal endpoint.
    """

    def __init__(
        self, settings: Settings, output: Output, *, events: Path, seed: int | None = None, live: bool = False
    ) -> None:
        state = settings.state_dir / "demo"
        self._settings = settings.model_copy(
            update={
                "state_dir": state,
                "ledger_url": f"sqlite:///{state.absolute() / 'ledger.db'}",
                "rehearsal_latency": _LATENCY,
            }
        )
        self._output = output
        self._live = live
        self._seed = random.randrange(1_000_000) if seed is None else seed  # noqa: S311  # guards nothing
        self._specs = _specs(settings.specs)
        self._routes = Routes(self._specs)
        self._lines = _read(events)
        self._topics = [_topic(line.value, self._specs) for line in self._lines]
        self._sent: dict[int, int] = {}
        self._kills: list[Kill] = []
        self._began = time.monotonic()

    async def run(self, *, stay: bool) -> int:
        """Run it all; the exit status: 0 when every promise was kept.

        Raises:
            CommandError: the stack can't be started.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        stack = EmbeddedStack(
            self._settings,
            report=self._tell,
            topics=sorted({*TOPICS, *self._topics, *self._routes.topics}),
            fresh=True,
            rehearse=not self._live,
        )
        running = loop.create_task(self._run(stack))
        stopped = loop.create_task(stop.wait())
        try:
            await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                self._note("interrupted; stopping what was started")
                return FAILED
            report = await running
            self._show(report, stack)
            if stay:
                for line in dev.hints(self._settings, self._specs):
                    self._output.note(line)
                await stop.wait()
        except StackError as error:
            raise CommandError(str(error)) from error
        else:
            return OK if report.kept else FAILED
        finally:
            for task in (running, stopped):
                task.cancel()
            await asyncio.wait([running, stopped])
            await stack.stop()

    async def _run(self, stack: EmbeddedStack) -> Report:
        self._note(f"starting Temporal, Kafka and the workers; state and logs in {self._settings.state_dir}")
        with self._output.working("starting Temporal, Kafka and the workers"):
            addresses = await stack.start()
        self._note(f"up. Temporal Web UI: {addresses.ui}   logs: {addresses.logs}")
        if addresses.rehearsal:
            self._note("no real model answers here: replies come from a rehearsal endpoint, and say so")
        expected = expect(
            [(topic, line.value) for topic, line in zip(self._topics, self._lines, strict=True)], self._routes
        )
        observer = Observer(addresses.kafka)
        async with observer.watching():
            await self._answered(stack, observer, expected)
            async with Ledger(self._settings.ledger_url) as ledger:
                totals = await ledger.totals()
                agents = {pair.workflow_id for pair in expected.pairs}
                entries = [await ledger.transcript(agent, limit=len(self._lines) * 100) for agent in agents]
        tally = count(
            expected,
            sent=self._sent,
            answers=observer.answers,
            recorded=(entry for of_agent in entries for entry in of_agent),
            duplicates=observer.duplicates,
            dead_letters=observer.dead_letters,
            totals=totals,
            asked=await _asked(addresses.rehearsal) if addresses.rehearsal else None,
        )
        metrics = {worker: await _scrape(url) for worker, url in addresses.metrics.items()}
        return Report(
            seed=self._seed,
            seconds=time.monotonic() - self._began,
            kills=self._kills,
            tally=tally,
            disagreements=disagreements(tally, metrics),
        )

    async def _answered(self, stack: EmbeddedStack, observer: Observer, expected: Expected) -> None:
        """Send the events, kill the workers, and wait until all is answered or nothing more comes."""
        total = len(expected.pairs)
        chance = random.Random(self._seed)  # noqa: S311  # guards nothing
        kills = sorted((chance.uniform(*_KILLS) * total, worker) for worker in (AGENT, MODEL))
        self._note(f"sending {len(self._lines)} events over {_SENDING_SECONDS:.0f} s (seed {self._seed})")
        sending = asyncio.create_task(self._send(stack.addresses.kafka))
        seen, since, told = observer.seen, time.monotonic(), 0
        try:
            with self._output.progress("events answered", total) as progress:
                while not (sending.done() and _complete(observer, expected)):
                    if sending.done():
                        sending.result()
                    done = len(observer.answered)
                    progress(done)
                    if done * _SHARES_TOLD // max(total, 1) > told:
                        told = done * _SHARES_TOLD // total
                        self._note(f"{done} of {total} events answered")
                    in_flight = self._in_flight(observer, expected)
                    if kills and done >= kills[0][0] and in_flight:
                        self._kill(stack, kills.pop(0)[1], done, in_flight)
                    if observer.seen != seen:
                        seen, since = observer.seen, time.monotonic()
                    elif sending.done() and time.monotonic() - since > _QUIET_SECONDS:
                        self._note(f"nothing has come for {_QUIET_SECONDS:.0f} s; counting what there is")
                        return
                    await asyncio.sleep(_STEP_SECONDS)
        finally:
            sending.cancel()
            await asyncio.wait([sending])

    def _in_flight(self, observer: Observer, expected: Expected) -> int:
        return sum(index in self._sent and pair not in observer.answered for pair, index in expected.pairs.items())

    def _kill(self, stack: EmbeddedStack, worker: str, done: int, in_flight: int) -> None:
        pid = stack.pid(worker)
        if pid is None:
            return
        stack.kill(worker)
        self._kills.append(Kill(worker=worker, pid=pid, after=done, in_flight=in_flight))
        self._note(Text(f"SIGKILL to the {worker} worker (pid {pid}) with {in_flight} events in flight", "bold yellow"))

    async def _send(self, bootstrap: str) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=False)
        await producer.start()
        try:
            began = time.monotonic()
            waiting = []
            for index, (topic, line) in enumerate(zip(self._topics, self._lines, strict=True)):
                due = began + _SENDING_SECONDS * index / len(self._lines)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self._sent[index] = int(time.time() * 1000)
                key = _key(line.value, topic, self._routes)
                waiting.append(
                    await producer.send(
                        topic, value=line.value, key=key, headers=list(HEADERS), timestamp_ms=self._sent[index]
                    )
                )
            await asyncio.gather(*waiting)
        finally:
            await producer.stop()

    # Telling ---------------------------------------------------------------------------------------------------------

    def _tell(self, happened: StackReport) -> None:
        """Of what happens in the stack, what is part of the story."""
        if isinstance(happened, Died) or (isinstance(happened, Ready) and happened.again):
            for line in dev.lines(happened):
                self._note(line)

    def _note(self, text: str | Text) -> None:
        self._output.note(Text.assemble((f"[{time.monotonic() - self._began:5.1f} s] ", "dim"), text))

    def _show(self, report: Report, stack: EmbeddedStack) -> None:
        if self._output.as_json:
            self._output.data(report)
            return
        for line in summary(report):
            self._output.say(line)
        self._output.note(
            f"The ledger, the logs and Temporal's database are in {self._settings.state_dir}. "
            f"`make demo ARGS=--stay` keeps everything up, with the Web UI at {stack.addresses.ui}; "
            "`make dev` starts a stack of one's own."
        )


def main(*, events: Path | None, stay: bool, seed: int | None, live: bool, output: Output) -> int:
    """Run the demo; its exit status.

    Raises:
        CommandError: there are no events, or the stack can't be started.
    """
    settings = Settings.load()
    demo = Demo(settings, output, events=events or EVENTS, seed=seed, live=live)
    return asyncio.run(demo.run(stay=stay))


def summary(report: Report) -> list[Text]:
    """The result, for people."""
    tally = report.tally

    def line(label: str, value: object, *, good: bool | None = None, remark: str = "") -> Text:
        style = "" if good is None else "green" if good else "bold red"
        mark = "" if good is None else "  ok" if good else "  NOT OK"
        return Text.assemble(
            "  ",
            label.ljust(_LABEL_WIDTH),
            (f"{value:>7}", style),
            (mark, style),
            (f"   {remark}" if remark else "", "dim"),
        )

    def zero(label: str, value: int | None, remark: str = "") -> Text:
        if value is None:
            return line(label, "-", remark="the provider does not say")
        return line(label, value, good=value == 0, remark=remark)

    killed = ", ".join(f"{kill.worker} after {kill.after} answers" for kill in report.kills) or "nobody"
    wanted = f"of what ought to be, {tally.missing} missing" if tally.missing else ""
    return [
        Text(),
        Text("counted from the reply topic, the ledger, the dead-letter topic and the model endpoint", "bold"),
        line("events in", tally.events_in),
        line("accepted", tally.accepted),
        *([line("woke themselves", tally.woken)] if tally.woken else []),
        line("duplicates dropped", tally.duplicates, remark=wanted),
        line("dead-lettered", tally.dead_letters, remark=wanted),
        *([line("for no agent here", tally.skipped)] if tally.skipped else []),
        line(
            "replies out",
            tally.replies,
            remark=f"{tally.failed} of them say why there is no answer" if tally.failed else "",
        ),
        zero("lost", tally.lost),
        zero("answered twice", tally.answered_twice),
        zero(
            "model calls paid twice",
            tally.paid_twice,
            f"of {tally.model_calls}; {tally.calls_repeated} cut off and made again",
        ),
        line(
            "event to reply",
            _seconds(tally.median_seconds),
            remark=f"median; 99th percentile {_seconds(tally.p99_seconds)}",
        ),
        line("killed", len(report.kills), remark=killed),
        zero("metrics that disagree", len(report.disagreements), "; ".join(report.disagreements)),
        Text(),
        Text.assemble(
            ("Every promise was kept", "bold green") if report.kept else ("A promise was broken", "bold red"),
            f" in {report.seconds:.0f} s (seed {report.seed}).",
            (" All replies are rehearsals: no real model was asked." if tally.rehearsal else "", "magenta"),
        ),
    ]


def disagreements(tally: Tally, metrics: dict[str, dict[str, float]]) -> list[str]:
    """Where the workers' metrics contradict the tally.

    A worker that was killed has forgotten what it counted, so its counters may say less, and never more.
    """
    found = []

    def compare(worker: str, metric: str, figure: int, *, exactly: bool) -> None:
        value = metrics[worker].get(metric, 0.0)
        if value > figure or (exactly and value != figure):
            found.append(f"{metric} is {value:g}, counted were {figure}")

    compare(INGEST, "perennial_events_received_total", tally.events_in, exactly=True)
    compare(INGEST, "perennial_dead_letters_total", tally.dead_letters, exactly=True)
    compare(INGEST, "perennial_events_accepted_total", tally.accepted + tally.duplicates, exactly=True)
    compare(AGENT, "perennial_events_duplicate_total", tally.duplicates, exactly=False)
    compare(MODEL, "perennial_model_calls_total", tally.model_calls, exactly=False)
    return found


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _complete(observer: Observer, expected: Expected) -> bool:
    return (
        all(pair in observer.answered for pair in expected.pairs)
        and len(observer.duplicates) >= expected.repeated
        and len(observer.dead_letters) >= expected.rejected
    )


def _specs(folder: Path) -> list[AgentSpec]:
    specs = known_specs(folder)
    if not specs:
        raise CommandError(
            f"There are no agents in {folder}. Run this in a checkout of Perennial, or set PERENNIAL_SPECS.", BAD_INPUT
        )
    return specs


def _read(file: Path) -> list[Line]:
    try:
        with file.open("rb") as stream:
            lines = read_lines(stream, str(file))
    except OSError as error:
        raise CommandError(f"{file} can't be read: {error.strerror}. Name a file with --events.", BAD_INPUT) from error
    if not lines:
        raise CommandError(f"{file} holds no events.", BAD_INPUT)
    return lines


def _topic(value: bytes, specs: Sequence[AgentSpec]) -> str:
    """Where an event belongs: to `agents.events` if it names its agent, else to the topic of whoever wants it."""
    decoded = records.decode(Record(names.EVENTS_TOPIC, 0, 0, -1, None, value), max_bytes=Limits().event_bytes)
    subscriptions = [subscription for spec in specs for subscription in spec.subscriptions]
    if isinstance(decoded, Rejected):
        return subscriptions[0].topic if subscriptions else names.EVENTS_TOPIC
    if decoded.event.extensions.get("agent"):
        return names.EVENTS_TOPIC
    wanting = (subscription.topic for subscription in subscriptions if subscription.wants(decoded.event.type))
    return next(wanting, names.EVENTS_TOPIC)


def _key(value: bytes, topic: str, routes: Routes) -> bytes | None:
    """The record's key: that of the agent, so that its events share a partition."""
    decoded = records.decode(Record(topic, 0, 0, -1, None, value), max_bytes=Limits().event_bytes)
    addresses = () if isinstance(decoded, Rejected) else routes.route(decoded.event, topic).addresses
    return addresses[0].key.encode() if addresses else None


async def _asked(rehearsal: str) -> dict[str, float]:
    """When the rehearsal endpoint was last asked for each call, by the call's key: seconds since 1970 (UTC)."""
    calls = json.loads(await _fetched(f"{rehearsal.removesuffix('/v1')}/rehearsal/calls"))
    return {call["key"]: call["asked_at"] for call in calls}


async def _fetched(url: str) -> str:
    def get() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  # our own loopback address
            text: str = answer.read().decode()
            return text

    return await asyncio.to_thread(get)


async def _scrape(url: str) -> dict[str, float]:
    """The counters a worker serves, each summed over its labels."""
    text = await _fetched(url)
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums
