"""Wiring: what all processes share; the processes themselves are real ones."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import World, event
from servers import TemporalServer, eventually
from temporalio.api.workflowservice.v1 import SignalWithStartWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.runtime import Runtime
from temporalio.service import RPCError

from workers import exits, wiring
from workers.ports import free_port
from workers.settings import Settings
from workflows import names
from workflows.events import Delivery
from workflows.names import Address
from workflows.state import AgentInput

PROCESS = """
    import asyncio, sys
    from pathlib import Path
    from workers import exits, wiring
    from workers.settings import Settings

    async def main(settings, stop):
        ready = Path(sys.argv[1])
        {body}

    wiring.run_process("tester", main, Settings.load())
"""
WAITS = """
        ready.touch()
        await stop.wait()
        ready.unlink()
"""


@contextmanager
def process(folder: Path, body: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that `run_process` runs, and a file it touches when it is ready."""
    ready = folder / "ready"
    code = textwrap.dedent(PROCESS).format(body=body.strip())
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(ready)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield child, ready
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_process_that_is_asked_to_stop_drains_and_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C set `stop`; the main goes on to its end."""
    body = "ready.touch()\n    await stop.wait()\n    ready.unlink()"
    with process(tmp_path, body) as (child, ready):
        await eventually(ready.exists)
        child.send_signal(number)
        _, log = await asyncio.to_thread(child.communicate, timeout=30)
        assert child.returncode == exits.OK, log
        assert not ready.exists()
        assert "stopped, exit status 0" in log


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("return", exits.OK, "stopped, exit status 0"),
        ("raise RuntimeError('the ledger is gone')", exits.FAILED, "RuntimeError: the ledger is gone"),
        (
            "raise SystemExit('port 9 is taken; choose another')",
            exits.BAD_INPUT,
            "port 9 is taken; choose another",
        ),
        ("raise SystemExit(7)", 7, "stopped, exit status 7"),
        ("asyncio.current_task().cancel(); await asyncio.sleep(1)", exits.FAILED, "tester has failed"),
    ],
)
async def test_the_exit_status_says_how_it_ended(tmp_path: Path, body: str, status: int, said: str) -> None:
    """P14: a supervisor tells a failure from an end, and the log has the reason."""
    with process(tmp_path, body) as (child, _):
        _, log = await asyncio.to_thread(child.communicate, timeout=30)
        assert child.returncode == status, log
        assert said in log


async def test_a_taken_metrics_port_is_said_plainly(tmp_path: Path) -> None:
    """P14: the address and the setting to change, exit status 2, and no traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with process(tmp_path, "wiring.start_metrics(settings)", PERENNIAL_METRICS_ADDRESS=address) as (child, _):
            _, log = await asyncio.to_thread(child.communicate, timeout=30)
            assert child.returncode == exits.BAD_INPUT, log
    assert f"Cannot serve metrics at {address}" in log
    assert "PERENNIAL_METRICS_ADDRESS" in log
    assert "Traceback" not in log


async def test_one_address_serves_our_metrics_and_the_sdk_s(tmp_path: Path, temporal_server: TemporalServer) -> None:
    """A scrape of a process shows both, with base units in the names."""
    body = (
        "client = await wiring.connect(settings, runtime=wiring.start_metrics(settings))\n"
        "    from activities import metrics\n"
        "    metrics.reply('desk')\n"
        "    ready.touch()\n"
        "    await stop.wait()"
    )
    address = f"127.0.0.1:{free_port()}"
    variables = {"PERENNIAL_METRICS_ADDRESS": address, "PERENNIAL_TEMPORAL_ADDRESS": temporal_server.address}
    with process(tmp_path, body, **variables) as (child, ready):
        await eventually(ready.exists)
        text = await asyncio.to_thread(_scrape, address)
        child.send_signal(signal.SIGTERM)
        await asyncio.to_thread(child.communicate, timeout=30)
    assert 'perennial_replies_total{agent="desk"} 1.0' in text
    assert "temporal_request_total{" in text
    assert re.search(r"temporal_request_latency(_seconds)?_bucket\{.*le=\"0\.05\"", text), "durations in seconds"


def _scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        text: str = answer.read().decode()
        return text


async def test_a_delivery_that_fails_is_gone_at_once(temporal_server: TemporalServer) -> None:
    """P5: in an outage deliveries fail again and again; what they were made of is not left to the garbage collector."""
    client = await Client.connect(temporal_server.address, namespace="nowhere", data_converter=pydantic_data_converter)

    def requests() -> int:
        return sum(type(kept) is SignalWithStartWorkflowExecutionRequest for kept in gc.get_objects())

    failed = 0
    gc.collect()
    before = requests()
    gc.disable()
    try:
        for _ in range(3):
            try:
                await wiring.deliver(client, "queue", Address("store", "desk", "order-42"), [event("x")])
            except RPCError:
                failed += 1
        assert (failed, requests()) == (3, before)
    finally:
        gc.enable()


def test_an_agent_is_started_so_that_it_reads_well_in_the_web_ui() -> None:
    """P13: id, summary and search attributes, the same whoever starts it."""
    options = wiring.start_options(Address("store", "desk", "order/42"), "queue")
    assert (options["id"], options["task_queue"]) == ("agent/store/desk/order%2F42", "queue")
    assert options["static_summary"] == "desk for order/42"
    assert {pair.key.name: pair.value for pair in options["search_attributes"]} == {
        "PerennialTenant": "store",
        "PerennialAgent": "desk",
        "PerennialState": "active",
    }
    with pytest.raises(ValueError, match="needs a key"):
        wiring.start_options(Address("store", "desk", ""), "queue")


async def test_search_attributes_are_registered_where_they_are_missing() -> None:
    """P13: on a server that knows none of them; again is no mistake; then agents are found by them."""
    server = _BareServer()
    with server:
        client = await wiring.connect(Settings(temporal_address=server.address))
        for _ in range(2):
            await wiring.ensure_search_attributes(client)
        world = World()
        async with world.workers(client, "queue"):
            await client.start_workflow(
                names.WORKFLOW_TYPE,
                AgentInput(),
                start_signal=names.DELIVER,
                start_signal_args=[Delivery(events=[event(1)])],
                **wiring.start_options(Address("store", "desk", "a"), "queue"),
            )
            await eventually(lambda: len(world.replies) == 1)

            async def found() -> list[str]:
                query = f"{names.AGENT_ATTRIBUTE} = 'desk' AND {names.TENANT_ATTRIBUTE} = 'store'"
                return [workflow.id async for workflow in client.list_workflows(query)]

            assert await eventually(found) == ["agent/store/desk/a"]


class _BareServer(TemporalServer):
    """A server on which nobody has registered our search attributes."""

    def command(self) -> list[str]:
        return [part for part in super().command() if not part.startswith("--search-attribute")]


async def test_a_process_waits_for_a_temporal_that_is_away() -> None:
    """P5: it may be started first; and it stops at once when it is asked to while it waits."""
    server = TemporalServer()
    settings = Settings(temporal_address=server.address)
    stop = asyncio.Event()
    waiting = asyncio.create_task(wiring.connect_patiently(settings, stop, runtime=Runtime.default()))
    with server:
        client = await waiting
        assert client is not None
        assert await client.service_client.check_health()

    waiting = asyncio.create_task(wiring.connect_patiently(settings, stop, runtime=Runtime.default()))
    stop.set()
    assert await waiting is None


async def test_sleeping_ends_early_when_asked_to_stop() -> None:
    """A stopping process does not wait for a pause to pass."""
    stop = asyncio.Event()
    await wiring.sleep_unless(stop, 0.001)
    sleeping = asyncio.create_task(wiring.sleep_unless(stop, 3600))
    stop.set()
    await sleeping
