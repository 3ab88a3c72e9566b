"""Wiring that all processes share: the Temporal client, the scrape address, logging, signals, the exit status.

async def main(settings: Settings, stop: asyncio.Event) -> None: ...
wiring.run_process("agent", main, settings)      # never returns
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypedDict

from prometheus_client import REGISTRY, start_http_server
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.common import (
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.runtime import PrometheusConfig, Runtime, TelemetryConfig
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions
from typing_extensions import override

from workers import exits
from workers.ports import HOST, free_port
from workers.settings import Settings
from workflows import names
from workflows.events import Delivery, Event
from workflows.state import AgentInput

log = logging.getLogger("perennial")

SEARCH_ATTRIBUTES = (names.TENANT_ATTRIBUTE, names.AGENT_ATTRIBUTE, names.STATE_ATTRIBUTE)
"""Keyword search attributes an agent's workflow carries."""

RPC_TIMEOUT = timedelta(seconds=10)
_CONNECT_RETRY = timedelta(seconds=1)


class StartOptions(TypedDict):
    """How an agent's workflow is started, by whomever: arguments of `Client.start_workflow` and its kin."""

    id: str
    task_queue: str
    static_summary: str
    search_attributes: TypedSearchAttributes


def start_options(address: names.Address, task_queue: str) -> StartOptions:
    """The options with which the agent at this address is started, so that it reads well in the Web UI.

    Raises:
        ValueError: the address is not one (see `names.workflow_id`).
    """
    values = (address.tenant, address.agent, "active")
    return StartOptions(
        id=names.workflow_id(address),
        task_queue=task_queue,
        static_summary=f"{address.agent} for {address.key}",
        search_attributes=TypedSearchAttributes(
            [
                SearchAttributePair(SearchAttributeKey.for_keyword(name), value)
                for name, value in zip(SEARCH_ATTRIBUTES, values, strict=True)
            ]
        ),
    )


async def deliver(client: Client, task_queue: str, address: names.Address, events: Sequence[Event]) -> None:
    """Put events into an agent's mailbox, waking or starting it: one signal-with-start, durable when it returns.

    Raises:
        RPCError: Temporal has not taken them, or its answer was lost.
    """
    try:
        await client.start_workflow(
            names.WORKFLOW_TYPE,
            AgentInput(),
            **start_options(address, task_queue),
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            start_signal=names.DELIVER,
            start_signal_args=[Delivery(events=list(events))],
            rpc_timeout=RPC_TIMEOUT,
        )
    except RPCError as error:
        # The SDK's error and the request it is about keep each other alive, and the garbage collector, which goes by
        # the number of objects, may leave hundreds of megabytes of them in an outage.
        if error.__context__ is not None:
            error.__context__.__traceback__ = None
        raise


async def connect(settings: Settings, *, runtime: Runtime | None = None) -> Client:
    """A Temporal client for these settings.

    Raises:
        RuntimeError: Temporal can't be reached.
    """
    return await Client.connect(
        settings.temporal_address,
        namespace=settings.temporal_namespace,
        data_converter=pydantic_data_converter,
        tls=settings.temporal_tls or None,
        api_key=settings.temporal_api_key.get_secret_value() if settings.temporal_api_key else None,
        runtime=runtime,
    )


async def connect_patiently(settings: Settings, stop: asyncio.Event, *, runtime: Runtime) -> Client | None:
    """As `connect`, waiting for as long as Temporal is away; None when asked to stop first."""
    said = False
    while not stop.is_set():
        try:
            return await connect(settings, runtime=runtime)
        except RuntimeError as error:
            if not said:
                log.warning("Temporal at %s does not answer, waiting for it: %s", settings.temporal_address, error)
                said = True
        await sleep_unless(stop, _CONNECT_RETRY.total_seconds())
    return None


async def ensure_search_attributes(client: Client) -> None:
    """Register the agents' search attributes, where they are missing and we may."""
    operator = client.operator_service
    try:
        known = await operator.list_search_attributes(ListSearchAttributesRequest(namespace=client.namespace))
        missing = [name for name in SEARCH_ATTRIBUTES if name not in known.custom_attributes]
        if missing:
            keyword = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
            await operator.add_search_attributes(
                AddSearchAttributesRequest(
                    namespace=client.namespace, search_attributes=dict.fromkeys(missing, keyword)
                )
            )
    except RPCError as error:
        if error.status == RPCStatusCode.ALREADY_EXISTS:
            return
        log.warning(
            "Could not see to the search attributes %s (%s). If agents do not start, register them as Keyword.",
            ", ".join(SEARCH_ATTRIBUTES),
            error.message,
        )


class _SdkMetrics(Collector):
    """The Temporal SDK's own metrics, so that one address serves theirs and ours."""

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}/metrics"

    @override
    def collect(self) -> Iterator[Metric]:
        try:
            with urllib.request.urlopen(self._url, timeout=2) as answer:  # noqa: S310  # our own loopback address
                text = answer.read().decode()
        except (urllib.error.URLError, TimeoutError) as error:
            log.warning("The Temporal SDK's metrics can't be read: %s", error)
            return
        yield from text_string_to_metric_families(text)


def workflow_runner() -> SandboxedWorkflowRunner:
    """Runs workflow code in Temporal's sandbox; pydantic, which is pure, is imported once and shared."""
    return SandboxedWorkflowRunner(
        restrictions=SandboxRestrictions.default.with_passthrough_modules("pydantic", "pydantic_core")
    )


def start_metrics(settings: Settings) -> Runtime:
    """Serve /metrics, ours and the Temporal SDK's, and return the runtime whose metrics these are.

    Raises:
        SystemExit: the address is taken or is none.
    """
    host, _, port = settings.metrics_address.rpartition(":")
    internal = f"{HOST}:{free_port()}"
    runtime = Runtime(
        telemetry=TelemetryConfig(
            metrics=PrometheusConfig(
                bind_address=internal, counters_total_suffix=True, unit_suffix=True, durations_as_seconds=True
            )
        )
    )
    REGISTRY.register(_SdkMetrics(internal))
    try:
        server, _ = start_http_server(int(port), addr=host or "127.0.0.1")
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"Cannot serve metrics at {settings.metrics_address}: {error}. Set PERENNIAL_METRICS_ADDRESS to host:port."
        ) from error
    log.info("metrics at http://%s:%s/metrics", host or "127.0.0.1", server.server_port)
    return runtime


async def sleep_unless(stop: asyncio.Event, seconds: float) -> None:
    """Sleep, but no longer than until `stop` is set."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass


def run_process(name: str, main: Callable[[Settings, asyncio.Event], Awaitable[None]], settings: Settings) -> None:
    """Run a process's main until it ends or SIGTERM or SIGINT asks it to stop; then exit, without ever returning.

    The exit status is 0 when `main` returned, 1 when it failed. The process leaves by `os._exit`, since temporalio on
    Python 3.11 aborts at interpreter exit in about one run of eight (DESIGN.md, "Facts").
    """
    logging.basicConfig(
        level=settings.log_level, format=f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s", stream=sys.stderr
    )
    for chatty in ("httpx", "httpx2", "aiokafka", "openai"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    status = exits.OK
    try:
        asyncio.run(_until_stopped(main, settings))
    except SystemExit as error:
        if isinstance(error.code, str):
            log.critical("%s", error.code)
        status = error.code if isinstance(error.code, int) else exits.BAD_INPUT
    except BaseException:
        log.critical("%s has failed", name, exc_info=True)
        status = exits.FAILED
    log.info("stopped, exit status %d", status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


async def _until_stopped(main: Callable[[Settings, asyncio.Event], Awaitable[None]], settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await main(settings, stop)
