"""A worker that is asked to stop ends with status 0, each time (DESIGN.md, "Facts": temporalio at interpreter exit)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from servers import Broker, TemporalServer, eventually
from stack import PERENNIAL, ROOT, STORE, environment
from traffic import fetched, letter

from workers.embedded import AGENT, INGEST, MODEL, TOPICS
from workers.ports import free_ports
from workers.rehearsal import serving
from workers.rehearsal_rules import Rules
from workflows import names

_DEPLOYMENTS = 7  # of three workers each: 21 tries

_WORK = {
    INGEST: "perennial_events_accepted_total",
    AGENT: "perennial_replies_total",
    MODEL: "perennial_model_calls_total",
}
"""What a worker has counted once it has done its work."""

_HEADERS = [("content-type", b"application/cloudevents+json")]


class _Worker:
    """A worker process, with its scrape address and its log."""

    def __init__(self, name: str, folder: Path, variables: dict[str, str], port: int) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._metrics = f"127.0.0.1:{port}"
        self._variables = {**variables, "PERENNIAL_METRICS_ADDRESS": self._metrics}

    async def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(str(PERENNIAL), "worker", self.name), cwd=ROOT, env=environment(self._variables), stderr=log
            )

    async def has_worked(self) -> bool:
        """Whether it has counted some of its work."""
        assert self.process.returncode is None, self.log.read_text()
        try:
            metrics = await fetched(f"http://{self._metrics}/metrics")
        except OSError:
            return False
        return any(line.startswith(_WORK[self.name]) and float(line.split()[-1]) > 0 for line in metrics.splitlines())


@asynccontextmanager
async def _deployments(
    number: int, folder: Path, broker: Broker, workers_of: Sequence[str] = (INGEST, AGENT, MODEL)
) -> AsyncIterator[list[_Worker]]:
    """The workers so many times, each deployment with a namespace, a consumer group and a ledger of its own."""
    namespaces = [f"try-{of}" for of in range(number)]
    temporal = TemporalServer(arguments=[f"--namespace={name}" for name in namespaces])
    workers: list[_Worker] = []
    with temporal:
        async with serving(Rules()) as rehearsal:
            try:
                for namespace in namespaces:
                    state = folder / namespace
                    state.mkdir()
                    variables = {
                        "PERENNIAL_TEMPORAL_ADDRESS": temporal.address,
                        "PERENNIAL_TEMPORAL_NAMESPACE": namespace,
                        "PERENNIAL_KAFKA_BOOTSTRAP": broker.bootstrap,
                        "PERENNIAL_KAFKA_IDEMPOTENCE": "false",
                        "PERENNIAL_KAFKA_SESSION_SECONDS": "6",
                        "PERENNIAL_CONSUMER_GROUP": namespace,
                        "PERENNIAL_LEDGER_URL": f"sqlite:///{state}/ledger.db",
                        "PERENNIAL_REHEARSAL_URL": rehearsal,
                        "PERENNIAL_SPECS": str(STORE),
                        "PERENNIAL_STATE_DIR": str(state),
                    }
                    ports = free_ports(dict.fromkeys(workers_of, 0))
                    workers += [_Worker(name, state, variables, ports[name]) for name in workers_of]
                await asyncio.gather(*(worker.start() for worker in workers))
                yield workers
            finally:
                for worker in workers:
                    if worker.process.returncode is None:
                        worker.process.kill()
                        await worker.process.wait()


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_worker_that_has_worked_ends_with_status_0_in_20_of_20_tries(tmp_path: Path) -> None:
    """Issue 2: agent, model and ingest workers, asked to stop by SIGTERM while another turn is under way."""
    with Broker() as broker:
        await broker.create_topics(*TOPICS, "store.events")
        producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, acks="all")
        await producer.start()
        try:
            async with _deployments(_DEPLOYMENTS, tmp_path, broker) as workers:
                await producer.send_and_wait(names.EVENTS_TOPIC, letter("customer-1", "Hello?"), headers=_HEADERS)
                for worker in workers:
                    await eventually(worker.has_worked, 120)
                slow = letter("customer-2", "[[latency 1]] [[say That took a while.]]")
                await producer.send_and_wait(names.EVENTS_TOPIC, slow, headers=_HEADERS)
                for worker in workers:
                    worker.process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(60):
                    statuses = await asyncio.gather(*(worker.process.wait() for worker in workers))
        finally:
            await producer.stop()
    assert len(statuses) >= 20
    ended = {worker.log: status for worker, status in zip(workers, statuses, strict=True)}
    assert set(statuses) == {0}, {str(log): log.read_text()[-500:] for log, status in ended.items() if status}


async def test_ingest_ends_with_status_0_also_when_the_broker_has_just_gone(tmp_path: Path) -> None:
    """A machine that shuts down ends everything at once: what is committed is safe, so the status is 0."""
    with Broker() as broker:
        await broker.create_topics(*TOPICS, "store.events")
        producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, acks="all")
        await producer.start()
        try:
            async with _deployments(1, tmp_path, broker, [INGEST]) as (ingest,):
                await producer.send_and_wait(names.EVENTS_TOPIC, letter("customer-1", "Hello?"), headers=_HEADERS)
                await eventually(ingest.has_worked, 60)
                await eventually(lambda: _has_committed(broker, "try-0"))
                broker.kill()
                ingest.process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(60):
                    status = await ingest.process.wait()
        finally:
            await producer.stop()
    assert status == 0, ingest.log.read_text()[-3000:]


async def _has_committed(broker: Broker, group: str) -> bool:
    """Whether the group has committed an offset of the events' topic."""
    consumer = AIOKafkaConsumer(bootstrap_servers=broker.bootstrap, group_id=group, enable_auto_commit=False)
    await consumer.start()
    try:
        partitions = [TopicPartition(names.EVENTS_TOPIC, partition) for partition in range(4)]
        consumer.assign(partitions)
        return any([await consumer.committed(partition) for partition in partitions])
    finally:
        await consumer.stop()
