"""The agent worker: runs the agents' workflows, their tools, and their quick activities."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import timedelta
from functools import partial
from pathlib import Path

from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.agent_state import AgentLedger
from activities.clock import Clock
from activities.ledger import Ledger
from activities.mcp_servers import Servers
from activities.memory import Embedder, Memory
from activities.publish import Publish
from activities.specs import SpecError, Specs, SpecSet, load_specs
from activities.spend import Budgets, Spending
from activities.tools import Tools
from workers import embeddings, kafka, schedules, wiring
from workers.exits import CommandError
from workers.settings import Settings, environment
from workers.spawn import launcher
from workflows.agent import AgentWorkflow
from workflows.alarm import AlarmWorkflow
from workflows.occurrence import OccurrenceWorkflow

log = logging.getLogger(__name__)

# An agent of a worker that died is taken over by another after so long.
_STICKY_TIMEOUT = timedelta(seconds=5)
# Heartbeats are sent on at least this often, well within the heartbeat timeout.
HEARTBEAT_THROTTLE = timedelta(seconds=3)


def specs_or_exit(settings: Settings) -> SpecSet:
    """The specs that a worker starts with.

    Raises:
        SystemExit: a spec is wrong; all faults are named.
    """
    try:
        return load_specs(settings.specs)
    except SpecError as error:
        raise SystemExit(f"The specs are wrong:\n{error}") from error


def mcp_servers(folder: Path) -> Servers:
    """The MCP servers of the specs in a folder; their processes end with this one."""
    return Servers(environment, folder=folder, launcher=launcher())


def agent_worker(  # noqa: PLR0913, PLR0917  # what it is wired from
    client: Client,
    settings: Settings,
    specs: SpecSet,
    ledger: Ledger,
    publisher: Publish,
    servers: Servers,
    embedder: Embedder | None = None,
) -> Worker:
    """The worker for the agents' task queue: workflows, tools, ledger, specs, publish."""
    state = AgentLedger(ledger)
    tools = Tools(specs.tool, settings.state_dir / "tools", ledger, servers, Memory(ledger, embedder))
    clock = Clock(client, partial(wiring.deliver, client, settings.task_queue))
    return Worker(
        client,
        task_queue=settings.task_queue,
        workflows=[AgentWorkflow, AlarmWorkflow, OccurrenceWorkflow],
        activities=[
            state.wake,
            state.keep_snapshot,
            state.find_reply,
            state.record_rewind,
            Budgets(Spending(ledger)).record_lift,
            Specs(specs, ledger, servers).load_spec,
            state.record_approval,
            state.close_step,
            tools.run_tool,
            tools.keep_result,
            publisher.publish,
            clock.set_alarm,
            clock.deliver,
            clock.look_at_clock,
        ],
        workflow_runner=wiring.workflow_runner(),
        sticky_queue_schedule_to_start_timeout=_STICKY_TIMEOUT,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        graceful_shutdown_timeout=settings.drain,
    )


async def _apply_schedules(client: Client, settings: Settings, specs: SpecSet) -> None:
    """Have Temporal keep the schedules that the specs say. Agents work without; an operator is told, and can do it."""
    try:
        changes = await schedules.apply(client, settings.task_queue, specs.agents)
    except (CommandError, RPCError) as error:
        log.warning("The schedules could not be applied; do it with `perennial schedules apply`: %s", error)
        return
    for change in changes:
        if change.did != "unchanged":
            log.info("schedule %s %s", change.schedule, change.did)


async def main(settings: Settings, stop: asyncio.Event) -> None:
    """Run until asked to stop; then let running activities finish, within the drain time.

    Raises:
        SystemExit: a spec is wrong; all faults are named.
    """
    specs = specs_or_exit(settings)
    runtime = wiring.start_metrics(settings)
    client = await wiring.connect_patiently(settings, stop, runtime=runtime)
    if client is None:
        return
    await wiring.ensure_search_attributes(client)
    await _apply_schedules(client, settings, specs)
    publisher = Publish(kafka.reached_by(settings))
    async with (
        Ledger(settings.ledger_url) as ledger,
        contextlib.aclosing(publisher),
        mcp_servers(settings.specs) as servers,
        embeddings.embedder(settings) as embedder,
        agent_worker(client, settings, specs, ledger, publisher, servers, embedder),
    ):
        await stop.wait()
