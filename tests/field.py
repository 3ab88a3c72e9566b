"""A deployment as in production, to be broken: servers and workers as processes of their own, with proxies in between.

    with new_broker() as broker:
        async with Field(tmp_path, broker, ingests=2) as field:
            await field.send(letter("customer-07", "Where is my order?"))
            field.ingests[0].kill()                       # or suspend(), resume(), await stop()
            field.ingest_to_temporal.drop_answers()       # or cut(), half_open(), delay(0.5)
            ...
            field.ingest_to_temporal.mend()
            await field.start(field.ingests[0])
            tally = await field.settled()                 # the oracle: nothing lost, nothing twice, in order, no lag

Temporal has a database file, so that it remembers. Workers are `perennial worker ...`, with settings by environment.
Ingest reaches Temporal and the broker, and the agent worker the broker, through a proxy each; the test itself directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import sqlite3
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from oracle import undurable, wrong
from proxy import KafkaProxy, Proxy
from servers import AnyBroker, Server, TemporalServer, eventually
from stack import PERENNIAL, ROOT, STORE, environment
from temporalio.api.history.v1 import History, HistoryEvent
from temporalio.converter import DataConverter
from temporalio.service import RPCError, RPCStatusCode
from traffic import Traffic, fetched, letter, tails
from typing_extensions import override

from activities.kafka import Kafka
from workers.embedded import AGENT, INGEST, MODEL, PARTITIONS, REHEARSAL, TOPICS
from workers.flow import Partition
from workers.kafka import heed_refusals
from workers.tally import Pair, Tally
from workflows import names
from workflows.events import Delivery
from workflows.messages import Status
from workflows.state import AgentInput

SESSION_SECONDS = 6
"""Of the consumer group: after so long a member that is not heard of is dead."""
_ASK_SECONDS = 5
_WATCH_SECONDS = 0.3


class Worker(Server):
    """`perennial worker ...`; the port is that of its metrics, or of the rehearsal endpoint."""

    def __init__(self, kind: str, name: str, folder: Path, variables: Mapping[str, str]) -> None:
        super().__init__()
        self.kind = kind
        self.name = name
        self.log = folder / f"{name}.log"
        address = "REHEARSAL_URL" if kind == REHEARSAL else "METRICS_ADDRESS"
        here = f"http://127.0.0.1:{self.port}/v1" if kind == REHEARSAL else f"127.0.0.1:{self.port}"
        self.variables = {**variables, f"PERENNIAL_{address}": here}

    @override
    def command(self) -> list[str]:
        return [str(PERENNIAL), "worker", self.kind]

    @override
    def launch(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command(), cwd=ROOT, env=environment(self.variables), stdout=log, stderr=log)

    @property
    def runs(self) -> bool:
        """Whether it has been started and has not ended."""
        return self.process is not None and self.process.poll() is None

    async def stop(self) -> int:
        """SIGTERM; its exit status, once it has ended."""
        self.signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self, seconds: float = 60) -> int:
        """Its exit status, once it has ended."""
        assert self.process
        return await asyncio.to_thread(self.process.wait, seconds)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric of ours over all labels but these; 0 when it is not there."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        total = 0.0
        for line in (await fetched(f"http://127.0.0.1:{self.port}/metrics")).splitlines():
            place, _, value = line.rpartition(" ")
            if place.partition("{")[0] == name and all(label in place for label in wanted):
                total += float(value)
        return total


class Field(Traffic):
    """A running deployment.

    Args:
        folder: for its files: Temporal's database, the ledger, the logs.
        broker: which it does not start; a broker may serve several fields one after the other, if it is emptied.
        specs: the agents.
        ingests: how many ingest workers.
        temporal: further arguments of the Temporal server.
        disk_megabytes: of a disk of its own for Temporal's database; it then forgets when it is killed.
        variables: further settings of the workers.
    """

    def __init__(
        self,
        folder: Path,
        broker: AnyBroker,
        *,
        specs: Path = STORE,
        ingests: int = 1,
        temporal: Sequence[str] = (),
        disk_megabytes: int | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(specs)
        self.folder = folder
        self.broker = broker
        self._database = folder / "temporal" / "temporal.db"
        self._database.parent.mkdir()
        self.temporal = TemporalServer(
            self._database, disk_megabytes=disk_megabytes, arguments=[*_QUICK_DATABASE, *temporal]
        )
        brokers = [int(address.rpartition(":")[2]) for address in broker.bootstrap.split(",")]
        self.ingest_to_temporal = Proxy(self.temporal.port)
        self.ingest_to_broker = KafkaProxy(*brokers)
        self.agent_to_broker = KafkaProxy(*brokers)
        self.rehearsal = Worker(REHEARSAL, REHEARSAL, folder, {"PERENNIAL_REHEARSAL_LATENCY": "0.01"})
        self.variables = {
            "PERENNIAL_TEMPORAL_ADDRESS": self.temporal.address,
            "PERENNIAL_KAFKA_BOOTSTRAP": broker.bootstrap,
            "PERENNIAL_KAFKA_IDEMPOTENCE": str(broker.idempotent).lower(),
            "PERENNIAL_KAFKA_SESSION_SECONDS": str(SESSION_SECONDS),
            "PERENNIAL_LEDGER_URL": f"sqlite:///{folder}/ledger.db",
            "PERENNIAL_REHEARSAL_URL": self.rehearsal.variables["PERENNIAL_REHEARSAL_URL"],
            "PERENNIAL_SPECS": str(specs),
            "PERENNIAL_STATE_DIR": str(folder),
            "PERENNIAL_CONSUMER_GROUP": "field",
            **(variables or {}),
        }
        self.agent = self._worker(AGENT, KAFKA_BOOTSTRAP=self.agent_to_broker.address)
        self.model = self._worker(MODEL)
        self.ingests: list[Worker] = []
        for _ in range(ingests):
            self.new_ingest()
        self._exits = contextlib.AsyncExitStack()

    def new_ingest(self) -> Worker:
        """One more ingest worker, to be started."""
        self.ingests.append(
            self._worker(
                INGEST,
                f"{INGEST}-{len(self.ingests) + 1}",
                TEMPORAL_ADDRESS=self.ingest_to_temporal.address,
                KAFKA_BOOTSTRAP=self.ingest_to_broker.address,
            )
        )
        return self.ingests[-1]

    def _worker(self, kind: str, name: str = "", **variables: str) -> Worker:
        own = {f"PERENNIAL_{variable}": value for variable, value in variables.items()}
        return Worker(kind, name or kind, self.folder, {**self.variables, **own})

    # Where it is -----------------------------------------------------------------------------------------------------

    @property
    @override
    def kafka(self) -> Kafka:
        return Kafka(self.broker.bootstrap, idempotence=self.broker.idempotent)

    @property
    @override
    def temporal_address(self) -> str:
        return self.temporal.address

    @property
    @override
    def ledger_url(self) -> str:
        return self.variables["PERENNIAL_LEDGER_URL"]

    @property
    @override
    def rehearsal_url(self) -> str:
        return self.variables["PERENNIAL_REHEARSAL_URL"]

    @property
    def group(self) -> str:
        """The consumer group."""
        return self.variables["PERENNIAL_CONSUMER_GROUP"]

    @property
    def topics(self) -> list[str]:
        """Those that ingest reads."""
        return sorted(self.routes.topics)

    @property
    def links(self) -> list[Proxy]:
        """The proxies."""
        return [self.ingest_to_temporal, self.ingest_to_broker, self.agent_to_broker]

    @property
    def workers(self) -> list[Worker]:
        """All of them."""
        return [self.rehearsal, self.agent, self.model, *self.ingests]

    @override
    def logs(self) -> str:
        return tails(self.folder)

    # Life ------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def _begin(self) -> None:
        self._exits.callback(self._end_processes)
        for link in self.links:
            await self._exits.enter_async_context(link)
        await self.create_topics()
        await self.start(self.temporal)
        await self.start(*self.workers)
        await self._exits.enter_async_context(self.watched())

    def _end_processes(self) -> None:
        for process in (*self.workers, self.temporal):
            process.end()

    async def lose_topics(self) -> None:
        """Those that ingest reads are deleted and made anew; the embedded broker is restarted, and loses all."""
        if self.broker.remembers:
            await self.broker.delete_topics(*self.topics)
        else:
            await asyncio.to_thread(self.broker.kill)
            await asyncio.to_thread(self.broker.start)
        await self.create_topics()
        for record in self.sent:
            record.gone = True
        if not self.broker.remembers:
            await self.observe_anew()

    async def create_topics(self) -> None:
        """Those that it needs and that are not there."""
        await self.broker.create_topics(*sorted({*TOPICS, *self.topics}), partitions=PARTITIONS)

    async def start(self, *processes: Server) -> None:
        """Start these, also again, and wait until each serves; ingest, until it has partitions to read."""
        await asyncio.gather(*(asyncio.to_thread(process.start) for process in processes))
        for process in processes:
            if isinstance(process, Worker) and process.kind == INGEST:
                await self.reading(process)

    async def reading(self, ingest: Worker) -> None:
        """Wait until the group has given it partitions."""

        async def assigned() -> bool:
            assert ingest.runs, ingest.log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                return await ingest.metric("perennial_ingest_assigned_partitions") > 0
            return False

        await eventually(assigned, 60)

    async def balanced(self) -> None:
        """Wait until those ingest workers that run share all partitions."""

        async def shared() -> bool:
            assigned = "perennial_ingest_assigned_partitions"
            with contextlib.suppress(OSError):
                shares = [await ingest.metric(assigned) for ingest in self.ingests if ingest.runs]
                return sum(shares) == PARTITIONS * len(self.topics) and all(shares)
            return False

        await eventually(shared, 60)

    # The consumer group, asked from the outside ----------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _group(self) -> AsyncIterator[tuple[AIOKafkaConsumer, list[TopicPartition]]]:
        """A consumer that speaks for the group without being a member, and all partitions."""
        consumer = AIOKafkaConsumer(**self.kafka.client(), group_id=self.group, enable_auto_commit=False)
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                await consumer.start()
                heed_refusals(consumer)
                partitions = [TopicPartition(topic, number) for topic in self.topics for number in range(PARTITIONS)]
                consumer.assign(partitions)
                yield consumer, partitions
        finally:
            await consumer.stop()

    async def committed(self) -> dict[Partition, int]:
        """What the group has committed."""
        async with self._group() as (consumer, partitions):
            found = {Partition(*one): await consumer.committed(one) for one in partitions}
        return {partition: offset for partition, offset in found.items() if offset is not None}

    async def ends(self) -> dict[Partition, int]:
        """The ends of the partitions that the group reads."""
        async with self._group() as (consumer, partitions):
            ends = {Partition(*one): end for one, end in (await consumer.end_offsets(partitions)).items()}
        for record in self.sent:  # the embedded broker's answer may lag behind
            if record.partition in ends:
                ends[record.partition] = max(ends[record.partition], record.offset + 1)
        return ends

    async def members(self) -> set[str]:
        """The ids of the group's members: a new one for each that has left, or was put out, and joined again."""
        admin = AIOKafkaAdminClient(**self.kafka.client())
        await admin.start()
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                (answer,) = await admin.describe_consumer_groups([self.group])
        finally:
            await admin.close()
        (described,) = answer.to_object()["groups"]
        return {member["member_id"] for member in described["members"]}

    @contextlib.asynccontextmanager
    async def commits_watched(self) -> AsyncIterator[None]:
        """What is committed meanwhile never goes back (P3): a member that is none any more commits nothing."""
        backwards: list[str] = []
        before: dict[Partition, int] = {}

        async def watch() -> None:
            while True:
                with contextlib.suppress(KafkaError, TimeoutError):
                    for partition, offset in (await self.committed()).items():
                        if offset < before.get(partition, 0):
                            backwards.append(f"{partition}: from {before[partition]} to {offset}")
                        before[partition] = offset
                await asyncio.sleep(_WATCH_SECONDS)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])
        assert not backwards

    async def lag(self) -> int:
        """How many records the group has not committed."""
        committed, ends = await self.committed(), await self.ends()
        return sum(end - committed.get(partition, 0) for partition, end in ends.items())

    async def no_lag(self, seconds: float = 60) -> None:
        """Wait until all is committed."""

        async def none() -> bool:
            with contextlib.suppress(KafkaError, TimeoutError):
                return await self.lag() == 0
            return False

        await eventually(none, seconds)

    # Sending, going on ------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def stream(
        self, prefix: str, *, agents: int = 6, rounds: int | None = None, pace: float = 0.05
    ) -> AsyncIterator[None]:
        """All the while, and until so many rounds are sent, letters to several agents in turn: `{prefix}-{number}`."""
        over = asyncio.Event()

        async def send() -> None:
            for number in itertools.count():
                if number == rounds or (rounds is None and over.is_set()):
                    return
                await self.send(*(letter(f"{prefix}-{agent}", f"Number {number}") for agent in range(agents)))
                await asyncio.sleep(pace)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            yield
            over.set()

    async def some_answered(self, prefix: str) -> None:
        """Wait until an agent with such a key has answered something."""
        await eventually(lambda: any(f"/{prefix}-" in pair.workflow_id for pair in self.observer.answered))

    # The oracle ------------------------------------------------------------------------------------------------------

    async def settled(self, seconds: float = 60) -> Tally:
        """Wait until all that was sent is dealt with, and the figures; AssertionError if any promise is broken."""
        await self.all_answered(seconds)
        await self.no_lag(seconds)
        await eventually(self._duplicates_told, seconds)
        tally = await self.tally()
        faults = wrong(
            self.expected,
            tally,
            sent=self.sent,
            recorded=await self.recorded(),
            dead_letters=self.observer.dead_letters,
            committed=await self.committed(),
            ends=await self.ends(),
        )
        assert not faults, "\n".join([*faults, repr(tally), self.logs()])
        return tally

    @property
    def redelivered(self) -> int:
        """How often agents have dropped an event that was not sent again, but delivered again."""
        return len(self.observer.duplicates) - self.expected.repeated

    async def _duplicates_told(self) -> bool:
        """Whether the agents have told of every duplicate they have dropped."""
        agents = {pair.workflow_id for pair in self.expected.pairs}
        dropped = [(await self.status(agent)).duplicates for agent in agents]
        return sum(dropped) == len(self.observer.duplicates)

    async def status(self, workflow_id: str) -> Status:
        """What an agent says of itself."""
        status: Status = await self.client.get_workflow_handle(workflow_id).query(names.STATUS, result_type=Status)
        return status

    async def committed_too_far(self) -> list[str]:
        """Records before the committed offsets that are durable nowhere (P3)."""
        committed = await self.committed()  # asked first: what is durable only ever grows
        return undurable(
            self.expected,
            sent=self.sent,
            committed=committed,
            accepted=await self.accepted(),
            dead_letters=self.observer.dead_letters,
        )

    async def accepted(self) -> set[Pair]:
        """The events that are with their agents, by Temporal's database, its histories, and the ledger.

        Each is asked after the one that hands over to it, so that nothing is on its way in between. What comes while a
        workflow task is under way is durable and in no history until that ends, which a frozen worker delays.
        """
        sent: dict[str, set[str]] = defaultdict(set)
        for pair in self.expected.pairs:
            sent[pair.workflow_id].add(pair.digest)
        found = await self._buffered()
        async with self.ledger() as ledger:
            for agent, digests in sent.items():
                seen = await self._in_history(agent)
                snapshot = await ledger.get_snapshot(agent)
                seen |= set(snapshot.state.mailbox.seen) if snapshot else set()
                seen |= (await ledger.taken(agent, digests)).keys()
                found |= {Pair(agent, digest) for digest in seen}
        return found

    async def _in_history(self, agent: str) -> set[str]:
        """The digests of the events that an agent's newest run began with or was handed."""
        converter: DataConverter = self.client.data_converter
        try:
            history = await self.client.get_workflow_handle(agent).fetch_history()
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            return set()
        found = await self._delivered(history.events)
        for event in history.events:
            if event.HasField("workflow_execution_started_event_attributes"):
                payloads = event.workflow_execution_started_event_attributes.input.payloads
                (begun,) = await converter.decode(payloads, [AgentInput])
                found |= set(begun.state.mailbox.seen) if begun.state else set()
        return found

    async def _buffered(self) -> set[Pair]:
        """The events that wait in Temporal's database for a workflow task to end; of a disk of its own nobody knows."""
        if not self._database.exists():
            return set()
        with contextlib.closing(sqlite3.connect(self._database)) as database:
            rows = database.execute("SELECT workflow_id, data FROM buffered_events").fetchall()
        found: set[Pair] = set()
        for agent, data in rows:
            found |= {Pair(agent, digest) for digest in await self._delivered(History.FromString(data).events)}
        return found

    async def _delivered(self, events: Iterable[HistoryEvent]) -> set[str]:
        """The digests of what was handed over in these events of a history."""
        converter: DataConverter = self.client.data_converter
        found: set[str] = set()
        for event in events:
            if event.HasField("workflow_execution_signaled_event_attributes"):
                payloads = event.workflow_execution_signaled_event_attributes.input.payloads
                (delivery,) = await converter.decode(payloads, [Delivery])
                found |= {mail.digest for mail in delivery.events}
        return found


_QUICK_DATABASE = ("--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL")
