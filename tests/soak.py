"""A soak: mail all the while, a fault every few seconds, and in the end the oracle. Both come from a seed (chaos.py).

    make soak MINUTES=10                        # SEED=7 repeats one, BROKER=embedded or kafka
    figures = await soak(folder, broker, seed=7, seconds=25)        # AssertionError: a promise was broken

Workers that end by themselves are started again, as their supervisor would, and counted. In the end all must be
answered within a bound, and the oracle of the fault tests has nothing to say (oracle.py). Besides, during the chaos
nothing is committed that is not durable and no commit goes back, workers that are asked to stop end with status 0, and
what agents have done in the store they did once.

How much is sent depends on the machine: mail waits while there is much unanswered. What is sent, and which faults there
are, does not. The moments do, a little: who holds what (chaos.py) may have to wait for it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from chaos import LINKS, NAPPER_SPEC, ONE_MORE, REFUND, TEXT, Fault, Kind, plan, post
from field import Field, Worker
from proxy import Proxy
from servers import AnyBroker, Broker, Server
from stack import PERENNIAL, STORE, Finished, run
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from traffic import Place

from activities.demo_store import DATABASE, effects
from workers import wiring
from workers.deadletter import REDRIVEN
from workers.embedded import AGENT, BROKER, MODEL, REHEARSAL, TEMPORAL
from workers.flow import Partition
from workers.tally import Tally

log = logging.getLogger(__name__)

Report = Callable[[str], None]

_MAIL_A_SECOND = 10.0
_MOST_WAITING = 300
"""Events without an answer; when there are more, mail waits."""
_SETTLE_SECONDS = 240
"""After the chaos all must be answered within this time; ingest's watchdog alone may take more than one minute."""
_TELL_SECONDS = 5.0
_PROBE_SECONDS = 10.0
_READ_SECONDS = 30
_SUPERVISOR_SECONDS = 0.5
_STARTS = 5
_SLOWEST_SECONDS = 0.4
_SUGGEST_AFTER = 120
"""Events of a run's history after which an agent continues as new."""


@dataclass
class Figures:
    """What came of a soak."""

    seed: int
    seconds: float = 0
    faults: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    """Workers that ended by themselves, with their status."""
    redriven: int = 0
    replayed: int = 0
    """Records that were read again."""
    commands_failed: int = 0
    probes: int = 0
    """How often it was asked whether too much was committed."""
    probes_failed: int = 0
    redelivered: int = 0
    settled_after: float = 0
    load: float = 0
    """The highest of the machine's, over a minute."""
    tally: Tally | None = None

    def lines(self) -> list[str]:
        """For people."""
        assert self.tally
        tally = self.tally
        return [
            f"faults        {self.faults.total()}: "
            + ", ".join(f"{kind} {n}" for kind, n in self.faults.most_common()),
            f"ended by itself and was started again  {dict(self.exits) or 'none'}",
            f"events in     {tally.events_in}, of which {tally.skipped} are for nobody",
            f"accepted      {tally.accepted}, in {tally.replies} replies",
            f"duplicates    {tally.duplicates} dropped, of which {self.redelivered} were sent once and delivered again",
            f"dead letters  {tally.dead_letters}, of which {self.redriven} were redriven",
            f"replayed      {self.replayed} records, which changed nothing; {self.commands_failed} commands failed",
            f"model calls   {tally.model_calls}; {tally.calls_repeated} made again, {tally.paid_twice} paid twice",
            f"lost          {tally.lost}; answered twice {tally.answered_twice}; failed {tally.failed}",
            f"event to reply  median {tally.median_seconds:.2f} s, 99th percentile {tally.p99_seconds:.1f} s",
            f"commits       looked at {self.probes} times, never too far; {self.probes_failed} times without an answer",
            f"time          {self.seconds:.0f} s, settled {self.settled_after:.0f} s later; load up to {self.load:.1f}",
        ]


async def soak(folder: Path, broker: AnyBroker, *, seed: int, seconds: float, report: Report = print) -> Figures:
    """Run one on a broker that runs and has no topics; what it leaves in the folder tells what happened.

    Raises:
        AssertionError: a promise was broken; the message says which, and the seed.
    """
    specs = shutil.copytree(STORE, folder / "specs")
    (specs / "napper.yaml").write_text(NAPPER_SPEC)
    lines = (specs / "customer-service.yaml").read_text().splitlines(keepends=True)
    # A customer who writes for minutes on end would wait for the next day's budget, as the store wants it.
    (specs / "customer-service.yaml").write_text(
        "".join(line for line in lines if not re.match(r" +(limits:|- \{scope:)", line))
    )
    suggest = f"limit.historyCount.suggestContinueAsNew={_SUGGEST_AFTER}"
    report(f"seed {seed}: {seconds:.0f} s of chaos, {type(broker).__name__}; logs in {folder}")
    deployment = Field(folder, broker, specs=specs, ingests=2, temporal=["--dynamic-config-value", suggest])
    async with deployment:
        running = Soak(deployment, seed, seconds, report)
        try:
            return await running.run()
        except Exception as error:
            running.leave_traces(error)
            why = "".join(traceback.format_exception(error))
            raise AssertionError(f"{why}\nseed {seed}, traces in {folder}") from error


@contextlib.asynccontextmanager
async def _meanwhile(*work: Callable[[asyncio.Event], Coroutine[object, object, None]]) -> AsyncIterator[None]:
    """While these go on; in the end each comes to its own end."""
    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for one in work:
            group.create_task(one(over))
        try:
            yield
        finally:
            over.set()


class Soak:
    """A soak of a deployment."""

    def __init__(self, deployment: Field, seed: int, seconds: float, report: Report) -> None:
        self._field = deployment
        self._seconds = seconds
        self._report = report
        self._faults = plan(seed, seconds, broker_remembers=deployment.broker.remembers)
        self._post = post(seed)
        self._pace = random.Random(f"pace {seed}")
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._began = time.monotonic()
        self._wrong: list[str] = []
        self._committed: dict[Partition, int] = {}
        self.figures = Figures(seed)
        ingests = {ingest.name: ingest for ingest in deployment.ingests}
        self._servers: dict[str, Server] = {
            AGENT: deployment.agent,
            MODEL: deployment.model,
            REHEARSAL: deployment.rehearsal,
            TEMPORAL: deployment.temporal,
            **ingests,
        }
        self._links: dict[str, Proxy] = dict(zip(LINKS, deployment.links, strict=True))

    async def run(self) -> Figures:
        """All of it."""
        deployment, figures = self._field, self.figures
        async with _meanwhile(self._supervise, self._tell):
            async with _meanwhile(self._send, self._probe):
                await self._chaos()
            figures.seconds = self._now()
            self._say("the chaos is over")
            figures.tally = await deployment.settled(_SETTLE_SECONDS)
            figures.settled_after = self._now() - figures.seconds
            await self._check_commits()
        figures.redelivered = deployment.redelivered
        if figures.tally.failed:
            self._complain(f"{figures.tally.failed} replies say that there is no answer")
        self._check_effects()
        for line in figures.lines():
            self._report(f"  {line}")
        assert not self._wrong, "\n".join(self._wrong)
        self._report(f"seed {figures.seed}: nothing lost, nothing twice")
        return figures

    def _complain(self, what: str) -> None:
        """A promise is broken; the soak goes on, and will fail."""
        self._wrong.append(f"at {self._now():.1f} s: {what}")
        self._report(self._wrong[-1])

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _say(self, what: str) -> None:
        answered = len(self._field.observer.answered)
        figures = f"in {len(self._field.sent)}, answered {answered}, waiting {self._waiting}"
        self._report(f"{self._now():7.1f} s  {what:<44}  {figures}")

    async def _tell(self, over: asyncio.Event) -> None:
        while not over.is_set():
            self.figures.load = max(self.figures.load, os.getloadavg()[0])
            await wiring.sleep_unless(over, _TELL_SECONDS)
            self._say("")

    # Mail ------------------------------------------------------------------------------------------------------------

    async def _send(self, over: asyncio.Event) -> None:
        deployment = self._field
        while not over.is_set():
            if self._waiting > _MOST_WAITING:
                await wiring.sleep_unless(over, 1)
                continue
            mail = next(self._post)
            await deployment.send(*mail.values, topic=mail.topic, key=mail.key)
            await wiring.sleep_unless(over, self._pace.expovariate(_MAIL_A_SECOND))

    @property
    def _waiting(self) -> int:
        """How many events have no answer yet."""
        return len(self._field.expected.pairs) - len(self._field.observer.answered)

    # Faults ----------------------------------------------------------------------------------------------------------

    async def _chaos(self) -> None:
        async with asyncio.TaskGroup() as group:
            for fault in self._faults:
                await asyncio.sleep(fault.at - self._now())
                group.create_task(self._suffer(fault))
            await asyncio.sleep(self._seconds - self._now())

    async def _suffer(self, fault: Fault) -> None:
        async with contextlib.AsyncExitStack() as held:
            for name in sorted(fault.holds):  # in one order, so that nobody waits for somebody who waits for him
                await held.enter_async_context(self._locks[name])
            self._say(str(fault))
            self.figures.faults[fault.kind.value] += 1
            if fault.target in self._links:
                await self._break(self._links[fault.target], fault)
            elif fault.kind is Kind.REDRIVE:
                await self._redrive(fault)
            elif fault.kind is Kind.REPLAY:
                await self._replay(fault)
            elif fault.kind is Kind.JOIN:
                await self._join(fault)
            elif fault.target == BROKER:
                await self._break_broker(fault)
            else:
                await self._harm(self._servers[fault.target], fault)

    async def _break(self, link: Proxy, fault: Fault) -> None:
        match fault.kind:
            case Kind.CUT:
                link.cut()
            case Kind.HALF_OPEN:
                link.half_open()
            case Kind.DEAF:
                link.drop_answers()
            case _:
                link.delay(_SLOWEST_SECONDS * fault.chance)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            link.mend()

    async def _break_broker(self, fault: Fault) -> None:
        broker = self._field.broker
        harm, heal = (broker.kill, broker.start) if fault.kind is Kind.KILL else (broker.suspend, broker.resume)
        await asyncio.to_thread(harm)
        await asyncio.sleep(fault.seconds)
        await asyncio.to_thread(heal)

    async def _harm(self, server: Server, fault: Fault) -> None:
        if not _runs(server):  # it has ended by itself just now, and is the supervisor's
            return
        if fault.kind is Kind.FREEZE:
            server.suspend()
            await asyncio.sleep(fault.seconds)
            server.resume()
            return
        if fault.kind is Kind.KILL:
            server.kill()
        else:
            await self._stop(server)
        await asyncio.sleep(fault.seconds)
        await self._start(fault.target, server)

    async def _stop(self, server: Server) -> None:
        assert isinstance(server, Worker)
        if status := await server.stop():
            self._complain(f"{server.name} was asked to stop and ended with status {status}: {_end(server)}")

    async def _start(self, name: str, server: Server) -> None:
        """Start it as a supervisor does: again, if it ends at once."""
        for _ in range(_STARTS):
            try:
                await asyncio.to_thread(server.start)
            except AssertionError:  # it has ended, or does not listen for long, which a busy machine may bring about
                if not _runs(server):
                    self._note_exit(name, server)
                server.kill()
            else:
                return
        raise AssertionError(f"{name} does not start: {_end(server)}")

    async def _join(self, fault: Fault) -> None:
        ingest = self._field.new_ingest()
        self._servers[ONE_MORE] = ingest
        await self._start(ONE_MORE, ingest)
        await asyncio.sleep(fault.seconds)
        if _runs(ingest):
            await self._stop(ingest)
        else:
            self._note_exit(ONE_MORE, ingest)
        del self._servers[ONE_MORE]
        self._field.ingests.remove(ingest)

    async def _supervise(self, over: asyncio.Event) -> None:
        """Start again what has ended without a fault."""
        while not over.is_set():
            await wiring.sleep_unless(over, _SUPERVISOR_SECONDS)
            for name, server in list(self._servers.items()):
                if not self._locks[name].locked() and not _runs(server):
                    async with self._locks[name]:
                        self._note_exit(name, server)
                        await self._start(name, server)

    def _note_exit(self, name: str, server: Server) -> None:
        assert server.process
        self.figures.exits[f"{name} (status {server.process.returncode})"] += 1
        self._say(f"{name} has ended with status {server.process.returncode}")

    # What people do --------------------------------------------------------------------------------------------------

    async def _redrive(self, fault: Fault) -> None:
        """Send a dead letter again, although nothing was mended: it comes back as another one."""
        listed = await self._command("dlq", "list", "--state=all", "--limit=100000")
        letters = [one for one in listed.json if one["letter"]["original"]["key"]] if not listed.status else []
        if not letters:
            return
        letter = letters[int(fault.chance * len(letters))]
        original = letter["letter"]["original"]
        partition = Partition(original["topic"], original["partition"])
        begin = (await self._field.ends())[partition]
        await self._command("dlq", "redrive", letter["id"], "--why=to see it come back")
        value = None if original["value"] is None else base64.urlsafe_b64decode(original["value"])
        for offset in await self._redriven(partition, begin):
            self._field.note(partition.topic, value, Place(*partition, offset))
            self.figures.redriven += 1

    async def _redriven(self, partition: Partition, begin: int) -> list[int]:
        """The offsets of records that were redriven, from this one on."""
        there = TopicPartition(*partition)
        end = (await self._field.ends())[partition]
        found: list[int] = []
        async with asyncio.timeout(_READ_SECONDS):
            consumer = AIOKafkaConsumer(**self._field.kafka.client(), group_id=None, enable_auto_commit=False)
            try:
                await consumer.start()
                consumer.assign([there])
                consumer.seek(there, begin)
                while await consumer.position(there) < end:
                    records = (await consumer.getmany(timeout_ms=200)).get(there, [])
                    found += [record.offset for record in records if REDRIVEN in dict(record.headers)]
            finally:
                await consumer.stop()
        return found

    async def _replay(self, fault: Fault) -> None:
        """Hand over once more what is committed of a partition."""
        committed = sorted((await self._field.committed()).items())
        if not committed:
            return
        partition, end = committed[int(fault.chance * len(committed))]
        stretch = [f"--from={int(end * fault.chance / 2)}", f"--until={end}", f"--partition={partition.partition}"]
        told = await self._command("ingest", "replay", partition.topic, *stretch)
        self.figures.replayed += 0 if told.status else told.json["read"]

    async def _command(self, *arguments: str) -> Finished:
        """What a person does. When it fails, they would do it again; here it is counted."""
        told = await run(str(PERENNIAL), *arguments, "--json", variables=self._field.variables)
        if told.status:
            self.figures.commands_failed += 1
            log.warning("%s: %s", arguments, told.err)
        return told

    # Promises --------------------------------------------------------------------------------------------------------

    async def _probe(self, over: asyncio.Event) -> None:
        while not over.is_set():
            await wiring.sleep_unless(over, _PROBE_SECONDS)
            async with self._locks[BROKER], self._locks[TEMPORAL]:
                await self._check_commits()

    async def _check_commits(self) -> None:
        """P3, while both servers are there to be asked."""
        try:
            committed = await self._field.committed()
            for partition, offset in self._committed.items():
                if committed.get(partition, 0) < offset:
                    self._complain(f"{partition}: {offset} was committed, and then {committed.get(partition)}")
            self._committed = committed
            too_far = await self._field.committed_too_far()
        except (KafkaError, RPCError, ApplicationError, TimeoutError) as error:
            log.warning("no answer to what is committed: %r", error)
            self.figures.probes_failed += 1
        else:
            self.figures.probes += 1
            for record in too_far:
                self._complain(f"committed and nowhere: {record}")

    def _check_effects(self) -> None:
        """P9: what may be repeated has taken effect once, what must not be was done once at most."""
        sent, pairs = self._field.sent, self._field.expected.pairs
        wanted = sum(f"[[call {REFUND}".encode() in sent[index].value for index in pairs.values())
        made = effects(self._field.folder / "tools" / DATABASE)
        refunds = sum(effect.kind == REFUND for effect in made)
        if refunds != wanted:
            self._complain(f"{wanted} refunds were asked for, and {refunds} made")
        texts = Counter(json.loads(effect.result)["text"] for effect in made if effect.kind == TEXT)
        for text, times in texts.items():
            if times > 1:
                self._complain(f"text message {text} was sent {times} times")

    # Traces ----------------------------------------------------------------------------------------------------------

    def leave_traces(self, error: BaseException) -> None:
        """What helps to understand a failure, beside the logs and databases that are in the folder."""
        deployment = self._field
        folder = deployment.folder
        (folder / "verdict.txt").write_text("\n".join([f"{error!r}", f"{self.figures}", *self._wrong]))
        (folder / "plan.txt").write_text("".join(f"{fault.at:7.1f} {fault}\n" for fault in self._faults))
        agents = defaultdict(list)
        for pair, index in deployment.expected.pairs.items():
            agents[index].append(pair)
        with (folder / "sent.jsonl").open("w") as lines:
            for index, record in enumerate(deployment.sent):
                value = record.value[:2000].decode(errors="replace")
                lines.write(json.dumps([index, record.at, record.place, agents[index], value]) + "\n")
        with (folder / "answers.jsonl").open("w") as lines:
            for answer in deployment.observer.answers:
                lines.write(json.dumps([answer.at, answer.reply.model_dump(mode="json")]) + "\n")
        if deployment.broker.remembers:
            (folder / "broker.log").write_text(deployment.broker.log(1))


def _runs(server: Server) -> bool:
    return server.process is not None and server.process.poll() is None


def _end(server: Server) -> str:
    return server.log.read_text(errors="replace")[-1000:] if isinstance(server, Worker) else ""


# The command ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """`make soak`; the exit status."""
    parser = argparse.ArgumentParser(description="Random faults from a seed, and in the end the oracle.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="repeats a run; without it, one is drawn")
    parser.add_argument("--broker", choices=("embedded", "kafka"), default=None)
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed
    broker = given.broker or ("kafka" if shutil.which("java") and shutil.which("mvn") else "embedded")
    folder = Path(tempfile.mkdtemp(prefix=f"perennial-soak-{seed}-"))
    logging.basicConfig(filename=folder / "soak.log", level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        asyncio.run(_main(folder, broker, seed, given.minutes * 60))
    except AssertionError as error:
        _print(f"{error}\nFAILED: seed {seed}, on {broker}; traces in {folder}")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        _print(f"stopped: seed {seed}, on {broker}; traces in {folder}")
        return 130
    shutil.rmtree(folder)
    return 0


async def _main(folder: Path, broker: str, seed: int, seconds: float) -> None:
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with _new_broker(broker) as server:
        await soak(folder, server, seed=seed, seconds=seconds, report=_print)


def _new_broker(name: str) -> AnyBroker:
    if name == "embedded":
        return Broker()
    from apache_kafka import ApacheKafka  # noqa: PLC0415  # it is not there without Java

    return ApacheKafka()


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201  # this is what people look at


if __name__ == "__main__":
    sys.exit(main())
